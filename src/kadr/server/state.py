"""`ServerState`: all that the routes share, and how they find out who asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Request

from kadr.hidden_paths import PathHider
from kadr.jobs.queue import JobQueue
from kadr.server.auth import Client
from kadr.server.catalogue import Catalogue
from kadr.server.errors import ApiError
from kadr.server.inputs.body_memory import BodyMemory
from kadr.server.inputs.frame_reader import FrameReader
from kadr.server.inputs.uploads import UploadStore
from kadr.server.metrics import Metrics
from kadr.server.selftests import Selftests
from kadr.server.signed_urls import UrlSigner
from kadr.server.stream_count import StreamCount
from kadr.server.system_monitor import SystemMonitor

PLANNING_THREADS = 1  # warnings are caught for a whole process: two would get those of each other


@dataclass(frozen=True)
class ServerState:
    """All that the routes share.

    Args:
        needs_token: clients have tokens.
        frames: decodes images and clips of clients.
        hides_prompts: no prompt is written to the log.
        log: takes lines for the operator.
        hide_paths: takes the server's folders out of messages.
        streams: bounds those of one client.
        body_memory: bounds bodies in memory.
        selftests: of models, in processes of their own.
        planning: those who resolve and plan take turns, and none of the threads that all routes share.
    """

    queue: JobQueue
    catalogue: Catalogue
    uploads: UploadStore
    frames: FrameReader
    signer: UrlSigner
    metrics: Metrics
    monitor: SystemMonitor
    needs_token: bool
    hides_prompts: bool
    log: Callable[[str], object]
    hide_paths: PathHider = field(default_factory=PathHider)
    body_memory: BodyMemory = field(default_factory=BodyMemory)
    streams: StreamCount = field(default_factory=StreamCount)
    selftests: Selftests = field(default_factory=Selftests)
    planning: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(PLANNING_THREADS))


def _state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


def _client(request: Request) -> Client:
    client: Client = request.state.client
    return client


State = Annotated[ServerState, Depends(_state)]
Sender = Annotated[Client, Depends(_client)]


def require_admin(client: Client) -> None:
    """Refuses clients that are not admins.

    Raises:
        ApiError: this one is not.
    """
    if not client.is_admin:
        raise ApiError(403, "only an admin's token may do that.", code="admin_only")
