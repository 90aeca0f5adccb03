"""The page in a real browser: what a person sees and does there."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WITHOUT_CHROMIUM = "Chromium is not installed, so the page is not tried: apt-get install chromium"
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
DESK, PHONE = (1280, 800), (390, 844)
MAX_MS = 60_000
expect.set_options(timeout=MAX_MS)
_ANSWERS = "Failed to load resource"  # the browser logs by itself every answer of 400 and more, which the page shows


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Starts Chromium without a screen."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Tab:
    """A tab with the page, whose every request and complaint is noted.

    Args:
        page: of the browser.
        address: of the server.
    """

    page: Page
    address: str
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.complaints.append(f"{error}\n{error.stack}"))
        self.page.on("console", self._listen)
        self.page.on("request", self._look_at)
        self.page.set_default_timeout(MAX_MS)

    def open(self) -> Tab:
        """Opens the page and waits until it follows the server."""
        self.page.goto(self.address)
        expect(self.page.locator("#make")).to_be_enabled()
        return self

    def type_prompt(self, text: str) -> None:
        """Replaces the prompt."""
        self.page.get_by_label("Prompt", exact=True).fill(text)

    def set_length(self, frames: int) -> None:
        """Replaces the number of frames."""
        self.page.get_by_label("Frames", exact=True).fill(str(frames))

    def set_more(self, label: str, text: str) -> None:
        """Fills in a field of those that are folded."""
        if self.page.locator("details.more").get_attribute("open") is None:
            self.page.locator("details.more > summary").click()
        self.page.get_by_label(label, exact=True).fill(text)

    def make(self) -> None:
        """Presses the button."""
        self.page.get_by_role("button", name="Make", exact=True).click()

    def evaluate(self, script: str, value: Any = None) -> Any:
        """Runs a script in the page."""
        return self.page.evaluate(script, value)

    def number(self, selector: str, name: str = "value") -> float:
        """Returns a property of an element, as a number."""
        return float(self.page.locator(selector).evaluate(f"(node) => node[{name!r}] ?? 0"))

    def drop(self, selector: str, name: str, content: bytes, at: tuple[float, float] = (0.5, 0.5)) -> None:
        """Drops a file on an element, at a place within it: shares of its width and height."""
        script = """async (node, [name, content, x, y]) => {
            const data = new DataTransfer();
            data.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name));
            const box = node.getBoundingClientRect();
            const place = { clientX: box.left + x * box.width, clientY: box.top + y * box.height };
            const options = { bubbles: true, cancelable: true, dataTransfer: data, ...place };
            for (const kind of ["dragover", "drop"]) node.dispatchEvent(new DragEvent(kind, options));
        }"""
        self.page.locator(selector).evaluate(script, [name, base64.b64encode(content).decode(), *at])

    def check(self) -> None:
        """Checks that the page complained of nothing, and asked no other host."""
        assert self.complaints == []

    def _listen(self, message: Any) -> None:
        if message.type == "error" and not message.text.startswith(_ANSWERS):
            self.complaints.append(message.text)

    def _look_at(self, request: Any) -> None:
        if not request.url.startswith((self.address, "blob:", "data:")):
            self.complaints.append(f"asked {request.url}")
