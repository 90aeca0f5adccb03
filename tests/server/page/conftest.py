"""Fixtures of the tests in a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.server.client_server import ServerProcess
from tests.server.page.browser import CHROMIUM, DESK, WITHOUT_CHROMIUM, Tab, open_browser

OpenTab = Callable[..., Tab]


@pytest.fixture(scope="module")  # its event loop runs as long as it is there, and other tests have loops of their own
def browser() -> Iterator[Browser]:
    """Returns a browser, or skips the test where none is installed."""
    if CHROMIUM is None:
        pytest.skip(WITHOUT_CHROMIUM)
    with open_browser() as browser:
        yield browser


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[OpenTab]:
    """Returns a function that opens the page of a server; afterwards no tab may have complained of anything."""
    tabs: list[Tab] = []

    def open_tab(server: ServerProcess, *, size: tuple[int, int] = DESK, waits: bool = True, **options: Any) -> Tab:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        tab = Tab(context.new_page(), server.address)
        tabs.append(tab)
        return tab.open() if waits else tab

    yield open_tab
    for tab in tabs:
        tab.page.context.close()
    for tab in tabs:
        tab.check()


@pytest.fixture
def tab(open_tab: OpenTab, server: ServerProcess) -> Tab:
    """Returns the page of the server of this file of tests."""
    return open_tab(server)
