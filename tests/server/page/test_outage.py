"""The page without its server, and with one that asks for a token: nothing that was typed is lost."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import expect

from tests.server.client_server import PROMPT, ServerProcess, png
from tests.server.page.conftest import OpenTab
from tests.server.page.test_making import ANY_NUMBER, STATUS, begin, wait_for_video

GONE = "The server cannot be reached"
TOKEN = "a-token-of-the-operator-0000"


def restart(server: ServerProcess) -> None:
    """Starts a server again at the address that it had."""
    port = server.address.rpartition(":")[2]
    server.arguments = ("--port", port)
    server.start()


def test_killed_server_comes_back_and_nothing_is_lost(tmp_path: Path, open_tab: OpenTab) -> None:
    server = ServerProcess(tmp_path / "data").start()
    tab = open_tab(server)
    video_id = begin(tab, steps=200)
    expect(tab.page.locator(STATUS)).to_contain_text("denoising")
    tab.drop(".track", "photo.png", png("orange", (96, 64)))
    expect(tab.page.locator(".item")).to_have_count(1)
    server.kill()
    expect(tab.page.get_by_text(GONE)).to_be_visible()
    tab.type_prompt("what I type while it is gone")
    expect(tab.page.locator("#make")).to_be_disabled()
    tab.page.screenshot(path=tmp_path / "gone.png")
    restart(server)
    expect(tab.page.get_by_text(GONE)).to_be_hidden()
    expect(tab.page.get_by_label("Prompt", exact=True)).to_have_value("what I type while it is gone")
    expect(tab.page.locator(".item")).to_have_count(1)
    wait_for_video(tab, video_id)  # it was begun again
    expect(tab.page.locator(".about .said")).to_have_text(PROMPT)
    assert server.stop() == 0, server.log()


def test_page_that_is_loaded_without_its_server_again_keeps_the_draft(tmp_path: Path, open_tab: OpenTab) -> None:
    server = ServerProcess(tmp_path / "data").start()
    tab = open_tab(server)
    tab.type_prompt("typed before")
    tab.page.get_by_label("Seed", exact=True).fill("77")
    server.stop()
    restart(server)
    tab.open()
    expect(tab.page.get_by_label("Prompt", exact=True)).to_have_value("typed before")
    expect(tab.page.get_by_label("Seed", exact=True)).to_have_value("77")
    assert server.stop() == 0, server.log()


def test_token_is_asked_for_and_kept_for_the_tab(tmp_path: Path, open_tab: OpenTab) -> None:
    server = ServerProcess(tmp_path / "data", environment={"KADR_TOKEN": TOKEN}).start()
    tab = open_tab(server, waits=False)
    tab.page.goto(tab.address)
    field = tab.page.get_by_label("This server asks for a token")
    field.fill("a-wrong-token-of-mine-0000")
    tab.page.keyboard.press("Enter")
    expect(field).to_be_visible()
    field.fill(TOKEN)
    tab.page.keyboard.press("Enter")
    expect(field).to_be_hidden()
    expect(tab.page.locator("#make")).to_be_enabled()
    video_id = begin(tab, steps=40)
    expect(tab.page.locator(".work")).to_have_attribute("data-preview", ANY_NUMBER)  # images come with the token too
    wait_for_video(tab, video_id)
    expect(tab.page.locator(".tile img")).to_have_js_property("complete", True)
    tab.page.reload()
    expect(tab.page.locator("#make")).to_be_enabled()
    assert tab.evaluate("() => localStorage.getItem('kadr.token')") is None
    assert server.stop() == 0, server.log()
