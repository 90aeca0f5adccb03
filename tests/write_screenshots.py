"""Takes screenshots of the page in many states, to be looked at, and writes two of them into docs/images.

python -m tests.write_screenshots [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, expect

from tests.page_commands import ROOT
from tests.server.client_server import ServerProcess, create_video, make_video, png
from tests.server.page.browser import DESK, PHONE, Tab, open_browser

IMAGES = ROOT / "docs" / "images"
PROMPTS = (
    "a large blue ring growing on a brown background",
    "a small yellow square falls slowly on a navy background",
    "a green triangle moving left on a gray background",
    "a purple circle rising on a black background",
    "a white square standing still on a navy background",
    "a cyan ring moving down on a gray background",
    "an orange circle shrinks quickly on a black background",
)
State = Callable[[Tab, ServerProcess], object]


def empty(tab: Tab, server: ServerProcess) -> None:
    """A first visit."""


def busy(tab: Tab, server: ServerProcess) -> None:
    """A video on its way, others that wait, a timeline with two images."""
    tab.drop(".track", "orange.png", png("orange", (96, 96)), (0.0, 0.5))
    tab.drop(".track", "navy.png", png("navy", (96, 96)), (1.0, 0.5))
    expect(tab.page.locator(".item")).to_have_count(2)
    tab.type_prompt("a red circle moving right on a black background")
    with server.client() as client:
        for seed in range(3):
            create_video(client, size="128x128", num_frames=49, num_inference_steps=250, seed=seed)
    tab.page.locator("#queue .video .open").first.evaluate("(node) => node.click()")
    expect(tab.page.locator(".work.previewed")).to_be_visible()
    tab.page.wait_for_function("() => document.querySelector('.work progress').value > 45")


def playing(tab: Tab, server: ServerProcess) -> None:
    """A finished video, with all its settings."""
    tab.page.locator("#tabs button").nth(2).evaluate("(node) => node.click()")
    tab.page.locator(".tile button").nth(2).click()
    tab.page.get_by_text("All settings").click()
    tab.page.wait_for_function("() => document.querySelector('.player video').currentTime > 0.3")


def long_video(tab: Tab, server: ServerProcess) -> None:
    """A composer with two prompts, unknown words, and everything unfolded."""
    tab.type_prompt("a red elephant on a black background")
    tab.page.get_by_label("Seconds", exact=True).fill("20")
    tab.page.get_by_role("button", name="+ Another prompt").click()
    tab.page.get_by_label("Then", exact=True).fill("a blue ring on a gray background")
    tab.set_more("Steps", "12")
    tab.page.wait_for_timeout(800)


def refused(tab: Tab, server: ServerProcess) -> None:
    """A size that does not fit, and a failed video."""
    with server.client() as client:
        video = create_video(client, num_frames=257, num_inference_steps=200, size="512x512")
        client.post(f"/v1/videos/{video['id']}/cancel")
    tab.type_prompt("a red circle")
    tab.page.get_by_label("Shape", exact=True).select_option("own")
    tab.page.get_by_label("Width x height").fill("8192x8192")
    tab.set_length(257)
    tab.page.locator("#queue .failed .open").first.evaluate("(node) => node.click()")
    tab.page.wait_for_timeout(1500)


STATES: tuple[State, ...] = (empty, playing, busy, long_video, refused)


def take(browser: Browser, server: ServerProcess, state: State, folder: Path) -> None:
    """Takes the screenshots of a state."""
    for name, size in (("desk", DESK), ("phone", PHONE)):
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)  # type: ignore[arg-type]
            tab = Tab(context.new_page(), server.address).open()
            tab.page.wait_for_timeout(500)
            state(tab, server)
            tab.evaluate("() => document.querySelectorAll('.toast').forEach((toast) => toast.remove())")
            tab.page.screenshot(path=folder / f"{state.__name__}-{name}-{scheme}.png")
            with server.client() as client:
                for video in client.get("/v1/videos", params={"limit": 100}).json()["data"]:
                    if video["status"] in ("queued", "in_progress", "failed"):
                        client.delete(f"/v1/videos/{video['id']}")
            tab.check()
            context.close()


def main(folder: Path) -> None:
    """Takes all screenshots."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as data, open_browser() as browser:
        server = ServerProcess(Path(data) / "data").start()
        take(browser, server, STATES[0], folder)
        with server.client() as client:
            for seed, prompt in enumerate(PROMPTS):
                make_video(client, prompt=prompt, seed=seed, size="128x128", num_frames=25, num_inference_steps=20)
        for state in STATES[1:]:
            take(browser, server, state, folder)
        server.stop()
    for source, target in (("busy-desk-light", "page"), ("busy-phone-dark", "page-phone")):
        (IMAGES / f"{target}.png").write_bytes((folder / f"{source}.png").read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "screenshots")
