"""A video on the page: from words to a video that plays, with everything that can happen on the way."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import expect

from tests.server.client_server import PROMPT, ServerProcess
from tests.server.page.browser import Tab
from tests.server.page.conftest import OpenTab

STEPS, ANY_NUMBER = "Steps", re.compile(r"^\d+$")
STATUS = ".work .status p"
PLAYS = """(id) => {
    const stage = document.querySelector(`#stage[data-video="${id}"]`);
    const video = stage?.querySelector('.player:not([hidden]) video') ?? null;
    return video !== null && video.currentTime > 0 && !video.paused;
}"""


def begin(tab: Tab, prompt: str = PROMPT, *, frames: int = 25, steps: int = 40) -> str:
    """Submits a video that takes a few seconds, and returns its id."""
    tab.type_prompt(prompt)
    tab.set_length(frames)
    tab.set_more(STEPS, str(steps))
    return submit(tab, tab.make)


def submit(tab: Tab, press: Callable[[], object]) -> str:
    """Presses a button that makes a video, and returns its id once it is on the stage."""
    with tab.page.expect_response("**/v1/videos") as response:
        press()
    video_id = response.value.json()["id"]
    expect(tab.page.locator("#stage")).to_have_attribute("data-video", video_id)
    return str(video_id)


def wait_for_video(tab: Tab, video_id: str) -> None:
    """Waits until a video plays on the stage."""
    tab.page.wait_for_function(PLAYS, arg=video_id)


def test_progress_and_preview_move_on_after_a_reload_and_the_video_plays(tab: Tab) -> None:
    video_id = begin(tab, steps=120)
    expect(tab.page.locator(STATUS)).to_contain_text("denoising")
    expect(tab.page.locator(".work")).to_have_attribute("data-preview", ANY_NUMBER)
    first, preview = tab.number(".work progress"), tab.page.locator(".work").get_attribute("data-preview")
    tab.page.reload()
    expect(tab.page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
    expect(tab.page.locator(STATUS)).to_contain_text("denoising")
    tab.page.wait_for_function("(first) => document.querySelector('.work progress').value > first", arg=first)
    expect(tab.page.locator(".work")).not_to_have_attribute("data-preview", preview or "")
    wait_for_video(tab, video_id)
    expect(tab.page.locator(".tile")).to_have_count(1)


def test_two_tabs_show_the_same(server: ServerProcess, open_tab: OpenTab) -> None:
    first, second = open_tab(server), open_tab(server)
    prompt = "a green square rising on a gray background"
    begin(first, prompt, steps=150)
    for tab in (first, second):
        expect(tab.page.locator("#queue .video .one-line").first).to_have_text(prompt)
        tab.page.locator("#queue .video .open").first.click()
        expect(tab.page.locator(STATUS)).to_contain_text("denoising")
    second.page.get_by_role("button", name="Cancel this video").click()
    for tab in (first, second):
        expect(tab.page.locator("#queue .failed .hint")).to_have_text("cancelled")
        expect(tab.page.locator("#queue .rows").first.locator(".video")).to_have_count(0)
    first.page.locator("#queue summary").click()
    first.page.locator("#queue .failed").get_by_role("button", name="Delete").click()
    first.page.reload()  # whoever leaves has decided
    expect(second.page.locator("#queue .failed")).to_have_count(0)


def test_cancelled_video_is_made_after_all(tab: Tab) -> None:
    begin(tab, "a blue ring falling on a brown background", steps=100)
    expect(tab.page.locator(STATUS)).to_contain_text("denoising")
    tab.page.get_by_role("button", name="Cancel this video").click()
    video_id = submit(tab, tab.page.get_by_role("button", name="Make it after all").click)
    wait_for_video(tab, video_id)


def test_video_is_made_again_with_another_seed(tab: Tab) -> None:
    first = begin(tab, steps=2, frames=9)
    wait_for_video(tab, first)
    facts = tab.page.locator(".about .hint").inner_text()
    second = submit(tab, tab.page.get_by_role("button", name="Another seed").click)
    wait_for_video(tab, second)
    assert second != first
    expect(tab.page.locator(".about .hint")).not_to_have_text(facts)
    expect(tab.page.locator(".about .said")).to_have_text(PROMPT)


def test_variations_wait_and_change_places(tab: Tab) -> None:
    tab.page.get_by_label("Variations").select_option("4")
    tab.page.get_by_label("Seed", exact=True).fill("50")
    begin_button = tab.page.get_by_role("button", name="Make 4")
    tab.set_length(25)
    tab.set_more(STEPS, "100")
    tab.type_prompt(PROMPT)
    begin_button.click()
    rows = tab.page.locator("#queue .rows").first.locator(".video")
    expect(rows).to_have_count(4)
    expect(rows.nth(3)).to_contain_text("number 3 in the queue")
    last = rows.nth(3).get_attribute("data-key")
    rows.nth(3).get_by_role("button", name="Move up").click()
    expect(rows.nth(2)).to_have_attribute("data-key", last or "")
    rows.nth(2).drag_to(rows.nth(1))
    expect(rows.nth(1)).to_have_attribute("data-key", last or "")
    rows.nth(1).get_by_role("button", name="Only this").click()
    expect(rows).to_have_count(2)
    rows.nth(1).get_by_role("button", name="Cancel", exact=True).click()
    rows.nth(0).get_by_role("button", name="Cancel", exact=True).click()
    expect(rows).to_have_count(0)


def test_paused_queue_says_so_in_every_tab(server: ServerProcess, open_tab: OpenTab) -> None:
    first, second = open_tab(server), open_tab(server)
    video_id = begin(first, steps=60)
    first.page.get_by_role("button", name="Pause").click()
    for tab in (first, second):
        expect(tab.page.get_by_text("The queue is paused")).to_be_visible()
    second.page.get_by_role("button", name="Resume").click()
    for tab in (first, second):
        expect(tab.page.get_by_text("The queue is paused")).to_be_hidden()
    wait_for_video(first, video_id)


def test_frame_by_frame(tab: Tab) -> None:
    wait_for_video(tab, begin(tab, frames=25, steps=2))
    video = tab.page.locator(".player video").first
    video.focus()
    place = tab.page.locator(".place")
    tab.page.keyboard.press("ArrowRight")
    tab.page.wait_for_function("() => ((video) => video.paused && !video.seeking)(document.querySelector('video'))")
    before = int(tab.page.locator(".player").get_attribute("data-frame") or 0)
    expect(place).to_have_text(f"frame {before + 1} of 25")
    for step in range(1, 4):
        tab.page.keyboard.press("ArrowRight")
        expect(place).to_have_text(f"frame {(before + step) % 25 + 1} of 25")


def test_refused_request_says_why_and_keeps_everything(tab: Tab) -> None:
    tab.type_prompt(PROMPT)
    tab.set_more(STEPS, "5000")
    expect(tab.page.locator("#plan")).to_have_text("steps is 5000; it must lie between 1 and 1000.")
    tab.make()
    expect(tab.page.locator(".toast.error")).to_contain_text("steps is 5000")
    expect(tab.page.get_by_label("Prompt", exact=True)).to_have_value(PROMPT)
    expect(tab.page.get_by_label(STEPS, exact=True)).to_have_value("5000")


def test_markup_in_a_prompt_is_only_text(tab: Tab) -> None:
    prompt = "<img src=x onerror=alert(1)> & <b>bold</b> \u202eevil"
    wait_for_video(tab, begin(tab, prompt, frames=9, steps=1))
    expect(tab.page.locator(".about .said")).to_have_text(prompt)
    assert tab.page.locator("img[src=x]").count() == 0
