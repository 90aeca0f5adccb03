"""The server that a page starts with `kadr serve` in a terminal of its own, while the page goes on in another one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.page_commands import Call, run_in_process
from tests.server.client_server import ServerProcess

ADDRESS = "127.0.0.1:8000"  # as pages write it
TOKEN = "Bearer TOKEN"


class PageServer:
    """Runs `kadr serve` of a page, on a port that is free; a new server takes the place of the one before.

    Args:
        folder: of its queue.
        environment: of the page.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._process: ServerProcess | None = None
        self._token = ""

    def run(self, arguments: list[str]) -> Call:
        """Runs `kadr serve` with these arguments: a server goes on in the background."""
        if "--new-token" in arguments:
            call = run_in_process(arguments)
            self._token = call.err.splitlines()[1]
            return call
        self.stop()
        self._process = ServerProcess(self._folder, tuple(arguments[1:]), self._environment).start()
        return Call(" ".join(arguments), 0, f"{self._process.address}\n", "")

    def localize(self, text: str) -> str:
        """Returns a block of the page with the address of the server, and the last token that it printed."""
        if self._process is None:
            return text
        port = self._process.address.rpartition(":")[2]
        return text.replace(ADDRESS, f"127.0.0.1:{port}").replace(TOKEN, f"Bearer {self._token}")

    def stop(self) -> None:
        """Stops the server, if one runs, as its operator does."""
        if self._process is not None:
            process, self._process = self._process, None
            assert process.stop() == 0, process.log()
