"""Fixtures of the server's tests: applications in this process, and real servers in processes of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from kadr.media import clip as clip_module
from kadr.media import image as image_module
from tests.server.answers import MARKER
from tests.server.client_server import ServerProcess
from tests.server.opened_app import OpenedApp, open_app, some_tokens


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Returns the event loop of the applications in this process."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Returns a real server on the demo model, one for each file of tests."""
    server = ServerProcess(tmp_path_factory.mktemp("server") / "data").start()
    yield server
    assert server.stop() == 0, server.log()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[httpx2.Client]:
    """Returns a client of the real server."""
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder whose path must be in no answer."""
    return tmp_path_factory.mktemp("server") / MARKER


@pytest.fixture(scope="session")
def app(data_folder: Path, loop: asyncio.AbstractEventLoop) -> Iterator[OpenedApp]:
    """Returns an application with tokens, without workers."""
    with open_app(data_folder / "named", loop, tokens=some_tokens()) as opened:
        yield opened


@pytest.fixture(scope="session")
def local_app(data_folder: Path, loop: asyncio.AbstractEventLoop) -> Iterator[OpenedApp]:
    """Returns an application without tokens, as on loopback, without workers."""
    with open_app(data_folder / "local", loop) as opened:
        yield opened


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets nobody open or decode media in this process: not the server's."""

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("the server's own process opened a medium")

    monkeypatch.setattr(image_module, "_open_file", refuse)
    monkeypatch.setattr(clip_module, "_open_video", refuse)
    monkeypatch.setattr(Image, "open", refuse)
