"""`ServerState`: all that the routes share, and how they find out who asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from kadr.jobs.queue import JobQueue
from kadr.server.auth import Client
from kadr.server.catalogue import Catalogue
from kadr.server.metrics import Metrics
from kadr.server.signed_urls import UrlSigner
from kadr.server.uploads import UploadStore


@dataclass(frozen=True)
class ServerState:
    """All that the routes share.

    Args:
        hides_prompts: no prompt is written to the log.
        log: takes lines for the operator.
    """

    queue: JobQueue
    catalogue: Catalogue
    uploads: UploadStore
    signer: UrlSigner
    metrics: Metrics
    hides_prompts: bool
    log: Callable[[str], object]


def _state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


def _client(request: Request) -> Client:
    client: Client = request.state.client
    return client


State = Annotated[ServerState, Depends(_state)]
Sender = Annotated[Client, Depends(_client)]
