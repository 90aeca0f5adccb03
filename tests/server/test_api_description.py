"""The OpenAPI description is true: schemathesis sends what it allows and what it does not, and looks at the answers.

KADR_API_EXAMPLES sets how many requests each route gets; the suite sends a few, the same each time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings, strategies
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS as ALL_CHECKS
from schemathesis.checks import load_all_checks

from kadr.errors import KadrError
from tests.server.answers import Answer, check_answer
from tests.server.media import image
from tests.server.opened_app import ADMIN, OpenedApp, open_app, some_tokens
from tests.server.raw_http import RawServer, serve_app
from tests.server.routes import OPEN_ROUTES, ROUTES

EXAMPLES = int(os.environ.get("KADR_API_EXAMPLES", "8"))
SECONDS = 30.0  # for an answer
TOKEN = {"authorization": f"Bearer {ADMIN}"}
LEFT_OUT = {
    "positive_data_acceptance": "no description can say which values fit each other and the model",
    "not_a_server_error": "503 and 507 are documented; check_answer knows no other",
    "ignored_auth": "test_gate looks at every route",
    **dict.fromkeys(("use_after_free", "ensure_resource_availability", "object_level_authorization"), "for series"),
}
load_all_checks()
CHECKS = [check for check in ALL_CHECKS.get_all() if check.__name__ not in LEFT_OUT]


@pytest.fixture(scope="module")
def described(data_folder: Path, loop: Any) -> Iterator[OpenedApp]:
    """An application with tokens, whose jobs are completed at once."""
    with open_app(data_folder / "described", loop, tokens=some_tokens()) as opened:
        is_over = threading.Event()

        def work() -> None:
            while not is_over.wait(0.01):
                try:
                    while opened.state.queue.store.counts()["queued"]:
                        opened.complete()
                except (AssertionError, KadrError):  # cancelled, deleted or paused meanwhile
                    continue

        worker = threading.Thread(target=work)
        worker.start()
        yield opened
        is_over.set()
        worker.join()


@pytest.fixture(scope="module")
def described_server(described: OpenedApp) -> Iterator[RawServer]:
    with serve_app(described.send.app, described.state.queue.events, (str(described.folder),)) as server:
        yield server


@pytest.fixture(scope="module")
def address(described_server: RawServer) -> str:
    return f"http://127.0.0.1:{described_server.port}"


@pytest.fixture
def things(described: OpenedApp) -> dict[str, str]:
    """Ids of a video and of an upload that are there."""
    described.state.queue.store.set_paused(False)
    upload_id = described.upload(image(), ADMIN)
    return {"video_id": described.submit(ADMIN), "upload_id": upload_id, "reference": upload_id}


@pytest.fixture(scope="module")
def api(address: str) -> Any:
    """The description, as the server shows it."""
    api = schemathesis.openapi.from_url(f"{address}/openapi.json", headers=TOKEN)
    api.config.max_stream_events = 1  # the stream of all videos has no end
    api.config.generation.update(allow_extra_parameters=False)  # queries that the server does not know are ignored
    return api


DESCRIBED = [
    (method, path.replace(":path", "")) for method, path in ROUTES if path != "/openapi.json" and method != "HEAD"
]


def test_description_has_every_route(api: Any) -> None:
    described = {(method.upper(), path) for path in api for method in api[path]}
    assert described == set(DESCRIBED)


@pytest.mark.parametrize(
    "method, path, mode",
    [(*route, GenerationMode.POSITIVE) for route in DESCRIBED]
    + [(*route, GenerationMode.NEGATIVE) for route in DESCRIBED if route not in OPEN_ROUTES],  # which take nothing
)
def test_description_is_true(
    api: Any, described: OpenedApp, method: str, path: str, mode: GenerationMode, address: str, things: dict[str, str]
) -> None:
    operation = api[path][method]

    @seed(1)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode), strategies.booleans())
    def check(case: Any, is_there: bool) -> None:
        for name in set(case.path_parameters or ()) & set(things):
            case.path_parameters[name] = things[name] if is_there else case.path_parameters[name]
        response = case.call(base_url=address, headers=TOKEN, timeout=SECONDS)
        case.validate_response(response, checks=CHECKS)
        headers = [(name.lower(), value[0]) for name, value in response.headers.items()]
        check_answer(Answer(response.status_code, headers, response.content), (str(described.folder),))

    check()
