"""Runs the server: opens the queue, starts its workers, listens, and stops in order."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kadr.cancellation import cancellable
from kadr.errors import KadrError, RequestError
from kadr.hidden_paths import PathHider
from kadr.jobs.engine_maker import EngineMaker
from kadr.jobs.events import JOB, Event
from kadr.jobs.expiry import Retention
from kadr.jobs.job import QueueLimits
from kadr.jobs.live_job import Patience
from kadr.jobs.queue import JobQueue
from kadr.jobs.supervisor import MIN_FREE_BYTES
from kadr.jobs.worker import MakerFactory
from kadr.server.auth import Tokens
from kadr.server.catalogue import Catalogue
from kadr.server.connections import ConnectionLimits, allowed_connections, create_server
from kadr.server.gate import GateRules
from kadr.server.inputs.frame_reader import FrameReader
from kadr.server.inputs.media_check import MediaChecker, MediaLimits
from kadr.server.inputs.uploads import UploadLimits, UploadStore
from kadr.server.metrics import Metrics
from kadr.server.selftests import Selftests
from kadr.server.signed_urls import DEFAULT_SECONDS, UrlSigner
from kadr.server.state import ServerState
from kadr.server.system_monitor import SystemMonitor
from kadr.spec.locate import MODEL, locate
from kadr.spec.model_folders import ModelFolders

BACKLOG = 1000  # connections that wait to be accepted


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
        upload_limits: see `UploadLimits`.
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
    upload_limits: UploadLimits = field(default_factory=lambda: UploadLimits(min_free_bytes=MIN_FREE_BYTES))
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
        RequestError, CheckpointError: the address is taken, or cannot be used; a model is not there.
        StorageError: see `JobQueue`.
    """
    listener = _listen(settings.host, settings.port)
    try:
        with open_state(settings, log) as (state, rules):
            from kadr.server.app import create_app  # loads torch, which the worker does at the same time

            address = _address(settings.host, listener.getsockname()[1])
            limits = ConnectionLimits(max_connections=allowed_connections())
            server = create_server(create_app(state, rules), limits)
            threading.Thread(target=_open_default_model, args=(state, log), daemon=True).start()
            on_ready(address)
            with cancellable() as token:
                asyncio.run(server.serve_until(token, listener, state.queue.events))
    finally:
        listener.close()


@contextlib.contextmanager
def open_state(
    settings: ServerSettings, log: Callable[[str], object], makers: Sequence[MakerFactory] | None = None
) -> Any:
    """Yields the state and the rules of a server whose queue runs until the block ends.

    Args:
        makers: what each worker makes videos with; None: with the engines of the settings.
    """
    engine_options = {**settings.engine_options, "models_dirs": tuple(map(str, settings.models_dirs))}
    folders = ModelFolders.open(settings.models_dirs)
    for model in settings.models.values():
        locate(model, MODEL, folders)  # a name that means nothing is refused before anything is opened
    if makers is None:
        makers = _engine_makers(settings, engine_options)
    _make_private_folder(settings.folder)
    queue = JobQueue(
        settings.folder,
        makers,
        limits=settings.limits,
        retention=settings.retention,
        patience=settings.patience,
        min_free_bytes=settings.min_free_bytes,
        log=log,
    )
    checker, frames = MediaChecker(settings.media_limits), FrameReader()
    hide_paths = PathHider(_folders(settings, folders))
    selftests = Selftests(engine_options, next(iter(settings.devices), None), hide_paths)
    try:
        if settings.is_paused is not None:
            queue.set_paused(settings.is_paused)
        uploads = UploadStore(settings.folder / "uploads", checker, settings.upload_limits)
        metrics = Metrics()
        queue.events.subscribe(metrics.observe)
        queue.events.subscribe(partial(_log_outcome, log, settings.hides_prompts))
        signer = UrlSigner.open(settings.folder, settings.url_seconds)
        catalogue = Catalogue(settings.models, folders, engine_options)
        queue.housekeeping.append(uploads.delete_expired)
        queue.start()
        state = ServerState(
            queue,
            catalogue,
            uploads,
            frames,
            signer,
            metrics,
            _create_monitor(settings, catalogue),
            bool(settings.tokens),
            settings.hides_prompts,
            log,
            hide_paths,
            selftests=selftests,
        )
        rules = GateRules(
            settings.tokens,
            signer,
            hosts=tuple(host.lower() for host in (*settings.hosts, settings.host)),
            origins=tuple(settings.origins),
            max_body_bytes=settings.upload_limits.max_bytes + (1 << 20),
        )
        yield state, rules
    finally:
        selftests.close()
        queue.close()
        checker.close()
        frames.close()


def _make_private_folder(folder: Path) -> None:
    """Makes the folder of the data for its user alone; one that is there stays as it is."""
    with contextlib.suppress(OSError):  # the queue explains what is wrong with it
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _folders(settings: ServerSettings, models: ModelFolders) -> list[Path]:
    """Returns the folders that messages may name: of the data, of models, and of kadr itself."""
    options = [value for option in settings.engine_options.values() for value in _as_tuple(option)]
    files = [Path(value).absolute() for value in (*settings.models.values(), *options) if os.path.exists(value)]
    parents = [file.parent for file in files]
    own = [Path(__file__).parents[1], Path(os.path.expanduser("~")), Path(tempfile.gettempdir())]
    return [settings.folder, *(folder.path for folder in models.folders), *models.missing, *parents, *own]


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, tuple) else ()


def _create_monitor(settings: ServerSettings, catalogue: Catalogue) -> SystemMonitor:
    device = next(iter(settings.devices), settings.engine_options.get("device", "auto"))
    return SystemMonitor(
        settings.folder, device, settings.min_free_bytes, count_models=lambda: len(catalogue.model_names())
    )


def _engine_makers(settings: ServerSettings, engine_options: Mapping[str, Any]) -> list[MakerFactory]:
    first = {"model": next(iter(settings.models.values())), "loras": []}
    options = [{"device": device} if device is not None else {} for device in settings.devices or (None,)]
    return [
        partial(EngineMaker, {**engine_options, **option}, previews=True, stores_paths=False, opens_first=first)
        for option in options
    ]


def _log_outcome(log: Callable[[str], object], hides_prompts: bool, event: Event) -> None:
    """Writes what became of a video to the log. A message may quote its prompt."""
    if event.kind != JOB or not event.is_outcome:
        return
    job = event.data
    if job.error is None:
        log(f"{job.id} is completed, after {job.finished_at - job.created_at:.1f} s")
    else:
        log(f"{job.id} failed: {job.error.code}" + ("" if hides_prompts else f": {job.error.message}"))


def _open_default_model(state: ServerState, log: Callable[[str], object]) -> None:
    """Reads the headers of the default model ahead of the first request."""
    try:
        state.catalogue.engine({"model": state.catalogue.find_model(None)[1], "loras": []})
    except KadrError as error:
        log(f"the default model cannot be opened: {error}")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sends small writes at once; else each answer waits 40 ms for an ACK of its head.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if hasattr(socket, "SO_REUSEADDR") and socket.SO_REUSEADDR and not hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)  # now: whoever reads the address may connect at once
    except OSError as error:
        listener.close()
        raise RequestError(
            f"the server cannot listen on {host} port {port}: {error.strerror or error}. Choose another --port."
        ) from error
    return listener


def _address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
