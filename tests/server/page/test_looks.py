"""Looks and feel of the page: at any width, with 500 videos, by keyboard, and for those who cannot see it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.server.client_server import PROMPT, ServerProcess, make_video
from tests.server.page.browser import PHONE, Tab
from tests.server.page.conftest import OpenTab
from tests.server.page.many_videos import multiply_video
from tests.server.page.test_making import STATUS, begin, submit, wait_for_video
from tests.server.test_clients import NODE_MODULES

AXE = NODE_MODULES / "axe-core" / "axe.min.js"
NUM_VIDEOS = 500
LONGEST_FRAME_MS = 50
ATTEMPTS = 5  # what is slow each time is the page's own doing; else it is the machine's
SCROLL = """async () => {
    const side = document.getElementById('side');
    const lengths = [];
    let last = performance.now();
    for (let step = 0; step < 150; step += 1) {
        side.scrollTop += 120;
        await new Promise(requestAnimationFrame);
        const now = performance.now();
        lengths.push(now - last);
        last = now;
    }
    return lengths.slice(1).sort((a, b) => b - a);
}"""
PAINT = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"


@pytest.fixture(scope="module")
def full_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Returns a server with 500 finished videos."""
    server = ServerProcess(tmp_path_factory.mktemp("full") / "data").start()
    with server.client() as client:
        make_video(client, num_frames=25)
    server.stop()
    multiply_video(server.folder, NUM_VIDEOS)
    yield server.start()
    assert server.stop() == 0, server.log()


def serious_findings(tab: Tab) -> list[str]:
    """Returns what axe-core finds serious or critical."""
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: the registry of npm could not be reached")
    tab.evaluate(f"() => {{ {AXE.read_text('utf-8')} }}")
    found = tab.evaluate("() => axe.run(document, { resultTypes: ['violations'] })")["violations"]
    return [
        f"{rule['id']}: {node['html'][:200]} {node['failureSummary'][:300]}"
        for rule in found
        for node in rule["nodes"]
        if rule["impact"] in ("serious", "critical")
    ]


def overflow(tab: Tab) -> list[str]:
    """Returns what is wider than the window, but for what scrolls by itself."""
    script = """() => [...document.querySelectorAll('main *, header *')].filter((node) => {
        const box = node.getBoundingClientRect();
        const scrolls = node.closest('.about > .row') !== null;
        return box.width > 0 && !scrolls && (box.right > innerWidth + 0.5 || box.left < -0.5);
    }).map((node) => node.outerHTML.slice(0, 200))"""
    found: list[str] = tab.evaluate(script)
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(full_server: ServerProcess, open_tab: OpenTab, scheme: str) -> None:
    tab = open_tab(full_server, color_scheme=scheme)
    expect(tab.page.locator(".tile").first).to_be_visible()
    begin(tab, "a purple ring, and an elephant", steps=100)  # and the fold is open
    expect(tab.page.locator(STATUS)).to_contain_text("denoising")
    assert serious_findings(tab) == []
    tab.page.get_by_role("button", name="Cancel this video").click()
    tab.page.get_by_text("All settings").click()
    tab.page.get_by_role("button", name="About this server").click()
    assert serious_findings(tab) == []


def test_phone_shows_everything_without_scrolling_sideways(full_server: ServerProcess, open_tab: OpenTab) -> None:
    tab = open_tab(full_server, size=PHONE, is_mobile=True, has_touch=True)
    tab.page.locator("details.more > summary").click()
    tab.type_prompt("word" * 200)
    for name in ("Make", "Queue", "Gallery"):
        tab.page.locator("#tabs").get_by_role("button", name=name).click()
        section = {"Make": "composer"}.get(name, name.lower())
        expect(tab.page.locator(f"#{section}")).to_be_visible()
        assert overflow(tab) == []
    tab.page.locator(".tile button").first.click()
    expect(tab.page.locator(".player")).to_be_visible()
    assert overflow(tab) == []
    assert serious_findings(tab) == []


@pytest.mark.alone
def test_gallery_of_500_videos_scrolls_without_a_long_frame(full_server: ServerProcess, open_tab: OpenTab) -> None:
    tab = open_tab(full_server)
    expect(tab.page.locator(".tile").first).to_be_visible()
    tab.page.wait_for_timeout(1000)  # until the page has settled
    longest: list[float] = []
    for _ in range(ATTEMPTS):
        tab.page.locator("#side").evaluate("(side) => { side.scrollTop = 0; }")
        longest.append(tab.evaluate(SCROLL)[0])
        if longest[-1] <= LONGEST_FRAME_MS:
            break
    print(f"longest frames, ms: {longest}")
    assert min(longest) <= LONGEST_FRAME_MS
    tab.page.wait_for_function(
        """async (count) => {
            const side = document.getElementById('side');
            side.scrollTop = side.scrollHeight;
            return document.querySelectorAll('.tile').length === count;
        }""",
        arg=NUM_VIDEOS,
    )


@pytest.mark.alone
def test_first_paint_takes_at_most_three_times_that_of_an_empty_page(server: ServerProcess, browser: Browser) -> None:
    def first_paint(path: str) -> float:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.address + path)
        page.wait_for_function(PAINT)
        milliseconds = page.evaluate(PAINT)
        context.close()
        return float(milliseconds)

    for path in ("/", "/health/alive"):  # nothing is loaded for the first time after this
        first_paint(path)
    ratios: list[float] = []
    for _ in range(ATTEMPTS):  # a machine that is busy with other tests slows one page and not the other
        pairs = [(first_paint("/"), first_paint("/health/alive")) for _ in range(5)]
        page, empty = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"first paint: {page:.0f} ms, of an empty page {empty:.0f} ms")
        ratios.append(page / empty)
        if ratios[-1] <= 3:
            break
    assert min(ratios) <= 3


def test_video_is_made_with_the_keyboard_alone(server: ServerProcess, open_tab: OpenTab) -> None:
    tab = open_tab(server)
    keyboard = tab.page.keyboard
    keyboard.press("Tab")
    expect(tab.page.get_by_text("Skip to the prompt")).to_be_focused()
    keyboard.press("Enter")
    keyboard.type(PROMPT)
    wait_for_video(tab, submit(tab, lambda: keyboard.press("Control+Enter")))
    for _ in range(200):  # every control can be reached, and shows that it is
        keyboard.press("Tab")
        if tab.evaluate("() => document.activeElement.closest('.tile') !== null"):
            break
    style = tab.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    assert style != "none"
    keyboard.press("Enter")
    expect(tab.page.locator(".tile.selected")).to_have_count(1)


def test_progress_is_told_at_each_tenth(tab: Tab) -> None:
    tab.evaluate(
        """() => {
            window.said = [];
            const live = document.getElementById('live');
            new MutationObserver(() => window.said.push(live.textContent)).observe(live, { childList: true });
        }"""
    )
    wait_for_video(tab, begin(tab, steps=60))
    tenths = [text for text in tab.evaluate("() => window.said") if text.endswith("percent")]
    assert 2 <= len(tenths) <= 10
