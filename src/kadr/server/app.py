"""The application: routes, errors, and the gate before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kadr.server.errors import ApiError, add_error_handlers
from kadr.server.gate import Gate, GateRules
from kadr.server.metrics import Metrics
from kadr.server.routes import commands, content, events, page, selftest, system, videos
from kadr.server.state import ServerState
from kadr.version import __version__

ROUTERS = (
    videos.router,
    commands.router,
    content.router,
    events.router,
    selftest.router,
    system.router,
    page.router,
)


def create_app(state: ServerState, rules: GateRules) -> ASGIApp:
    """Returns the application. The queue of the state is started and closed by whoever made it."""
    # No page for the description: FastAPI's loads its scripts from elsewhere.
    app = FastAPI(
        title="kadr",
        version=__version__,
        description="Makes video with the LTX-Video family of models. Speaks the OpenAI Videos API.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.server, app.state.log = state, state.log
    for router in ROUTERS:
        app.include_router(router)
    add_error_handlers(app)
    _complete_description(app, needs_token=bool(rules.tokens))
    gated: ASGIApp = Gate(app, rules)
    if rules.origins:
        gated = _Cors(
            gated,
            allow_origins=list(rules.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "idempotency-key", "last-event-id"],
            expose_headers=["openai-poll-after-ms", "retry-after", "x-video-id"],
        )
    return _Counter(gated, state.metrics)


# Answers of every route to what is hardly a request.
_ANY_ROUTE = {
    400: "The request is not HTTP, or the length of its body is unclear.",
    403: "The server does not go by this name, or another site's page sent the request.",
    413: "The body is too large.",
    414: "The address is too long.",
    431: "The headers are too large.",
    503: "There are too many connections, or the server stops.",
}
_ENVELOPE = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorEnvelope"}}}


class _Cors(CORSMiddleware):
    """Lets the pages of other sites in; what it refuses is in the envelope of all errors."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answers a browser that asks whether a page may send a request."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        message = "this page may not send such a request. The operator of the server can let it: --allow-origin ORIGIN."
        return ApiError(403, message, code="cross_site").response()


class _Counter:
    """Counts answers by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "unknown")
                self._metrics.answers.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, count if scope["type"] == "http" else send)


def _complete_description(app: FastAPI, *, needs_token: bool) -> None:
    """Says in the OpenAPI description what the gate and the connections answer, and that a token is needed."""
    describe: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        description = describe()
        for path in description["paths"].values():
            for operation in path.values():
                responses = operation["responses"]
                if "HTTPValidationError" in str(responses.get("422")):  # FastAPI's own, which is a 400 here
                    del responses["422"]
                for status, meaning in _ANY_ROUTE.items():
                    responses.setdefault(str(status), {"description": meaning, "content": _ENVELOPE})
        for unused in ("HTTPValidationError", "ValidationError"):
            description["components"]["schemas"].pop(unused, None)
        if needs_token:
            schemes = description.setdefault("components", {}).setdefault("securitySchemes", {})
            schemes["token"] = {"type": "http", "scheme": "bearer"}
            description["security"] = [{"token": []}]
        return description

    app.openapi = openapi  # type: ignore[method-assign]
