"""Runs the server: opens the queue, starts its workers, listens, and stops in order."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from kadr.cancellation import CancelToken, cancellable
from kadr.errors import KadrError, RequestError
from kadr.jobs.engine_maker import EngineMaker
from kadr.jobs.events import EventLog
from kadr.jobs.expiry import Retention
from kadr.jobs.job import QueueLimits
from kadr.jobs.live_job import Patience
from kadr.jobs.queue import JobQueue
from kadr.jobs.supervisor import MIN_FREE_BYTES
from kadr.server.auth import Tokens
from kadr.server.catalogue import Catalogue
from kadr.server.gate import GateRules
from kadr.server.media_check import MediaChecker, MediaLimits
from kadr.server.metrics import Metrics
from kadr.server.signed_urls import DEFAULT_SECONDS, UrlSigner
from kadr.server.state import ServerState
from kadr.server.uploads import UploadStore
from kadr.spec.model_folders import ModelFolders

HEADER_SECONDS = 20  # for the head of a request to arrive
MAX_CONNECTIONS = 1000
STOP_SECONDS = 5  # for answers on their way when the server stops
STOP_POLL_SECONDS = 0.1  # between looks at the token


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Decisions of the operator.

    Args:
        models: name -> what `Engine.open` takes; the first one is the default.
        folder: of the queue and its videos.
        host, port: where it listens; port 0 is any that is free.
        tokens: none is only for a host that this machine alone reaches.
        hosts, origins: see `GateRules`.
        models_dirs, engine_options: see `Engine.open`.
        devices: one worker for each; () is one worker on the device of `engine_options`.
        limits, retention, patience, min_free_bytes: see `JobQueue`.
        media_limits: see `MediaLimits`.
        max_upload_bytes: of one file.
        upload_seconds: that an upload is kept.
        url_seconds: that a signed address is good.
        is_paused: no job begins until the queue is resumed; None leaves it as it was.
        hides_prompts: no prompt is written to the log.
    """

    models: Mapping[str, str]
    folder: Path
    host: str = "127.0.0.1"
    port: int = 8000
    tokens: Tokens = field(default_factory=Tokens)
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    models_dirs: Sequence[str | Path] = ()
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    devices: Sequence[str] = ()
    limits: QueueLimits = field(default_factory=QueueLimits)
    retention: Retention = field(default_factory=Retention)
    patience: Patience = field(default_factory=Patience)
    min_free_bytes: int = MIN_FREE_BYTES
    media_limits: MediaLimits = field(default_factory=MediaLimits)
    max_upload_bytes: int = 512 << 20
    upload_seconds: float = 24 * 3600.0
    url_seconds: int = DEFAULT_SECONDS
    is_paused: bool | None = None
    hides_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.tokens and not is_loopback(self.host):
            raise RequestError(
                f"{self.host} can be reached from other machines, and there is no token. Give --tokens FILE, or "
                "KADR_TOKEN in the environment; or listen on 127.0.0.1."
            )


def is_loopback(host: str) -> bool:
    """Tells whether only this machine reaches a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(settings: ServerSettings, log: Callable[[str], object], on_ready: Callable[[str], object]) -> None:
    """Serves until the current token is cancelled; jobs in progress go back into the queue.

    Args:
        log: takes lines for the operator.
        on_ready: called with the address once it listens.

    Raises:
        RequestError: the address is taken, or cannot be used.
        StorageError: see `JobQueue`.
    """
    listener = _listen(settings.host, settings.port)
    try:
        with open_state(settings, log) as (state, rules):
            from kadr.server.app import create_app  # loads torch, which the worker does at the same time

            address = _address(settings.host, listener.getsockname()[1])
            config = uvicorn.Config(
                create_app(state, rules),
                http=partial(_Protocol, header_seconds=HEADER_SECONDS),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=STOP_SECONDS,
                proxy_headers=False,
            )
            server = _Server(config)
            threading.Thread(target=_open_default_model, args=(state, log), daemon=True).start()
            on_ready(address)
            with cancellable() as token:
                asyncio.run(server.serve_until(token, listener, state.queue.events))
    finally:
        listener.close()


@contextlib.contextmanager
def open_state(settings: ServerSettings, log: Callable[[str], object]) -> Any:
    """Yields the state and the rules of a server whose queue runs until the block ends."""
    engine_options = {**settings.engine_options, "models_dirs": tuple(map(str, settings.models_dirs))}
    devices = settings.devices or (None,)
    makers = [
        partial(EngineMaker, engine_options if device is None else {**engine_options, "device": device},
                stores_paths=False,
            previews=True, opens_first={"model": next(iter(settings.models.values())), "loras": []})
        for device in devices
    ]  # fmt: skip
    queue = JobQueue(
        settings.folder,
        makers,
        limits=settings.limits,
        retention=settings.retention,
        patience=settings.patience,
        min_free_bytes=settings.min_free_bytes,
        log=log,
    )
    checker = MediaChecker(settings.media_limits)
    try:
        if settings.is_paused is not None:
            queue.store.set_paused(settings.is_paused)
        uploads = UploadStore(
            settings.folder / "uploads", checker, max_bytes=settings.max_upload_bytes, max_age=settings.upload_seconds
        )
        metrics = Metrics()
        queue.events.subscribe(metrics.observe)
        signer = UrlSigner.open(settings.folder, settings.url_seconds)
        catalogue = Catalogue(settings.models, ModelFolders.open(settings.models_dirs), engine_options)
        queue.housekeeping.append(uploads.delete_expired)
        queue.start()
        state = ServerState(queue, catalogue, uploads, signer, metrics, settings.hides_prompts, log)
        rules = GateRules(
            settings.tokens,
            signer,
            hosts=tuple(host.lower() for host in (*settings.hosts, settings.host)),
            origins=tuple(settings.origins),
            max_body_bytes=settings.max_upload_bytes + (1 << 20),
        )
        yield state, rules
    finally:
        queue.close()
        checker.close()


def _open_default_model(state: ServerState, log: Callable[[str], object]) -> None:
    """Reads the headers of the default model ahead of the first request."""
    try:
        state.catalogue.engine({"model": state.catalogue.find_model(None)[1], "loras": []})
    except KadrError as error:
        log(f"the default model cannot be opened: {error}")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_REUSEADDR") and socket.SO_REUSEADDR and not hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(MAX_CONNECTIONS)  # now: whoever reads the address may connect at once
    except OSError as error:
        listener.close()
        raise RequestError(
            f"the server cannot listen on {host} port {port}: {error.strerror or error}. Choose another --port."
        ) from error
    return listener


def _address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    """A server that stops when a token is cancelled; signals are the command line's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield

    async def serve_until(self, token: CancelToken, listener: socket.socket, events: EventLog) -> None:
        """Serves until the token is cancelled, then ends the streams of events."""
        serving = asyncio.ensure_future(self.serve(sockets=[listener]))
        while not token.is_cancelled and not serving.done():
            await asyncio.wait((serving,), timeout=STOP_POLL_SECONDS)
        self.should_exit = True
        events.close()
        await serving


class _Protocol(H11Protocol):
    """Closes a connection on which the head of a request does not arrive in time."""

    def __init__(self, *args: Any, header_seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_seconds = header_seconds
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_header()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
        super().connection_lost(exc)

    def _await_header(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
        before = self.cycle
        self._header_timer = self.loop.call_later(self._header_seconds, self._close_if_idle, before)

    def _close_if_idle(self, before: Any) -> None:
        if self.cycle is before and not self.transport.is_closing():
            self.transport.close()
