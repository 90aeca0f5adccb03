"""`Gate`: what every HTTP request passes before anything is done for it.

In this order: the host's name (a page may have rebound its own name to this machine), the page that sent it (another
site must not change anything here), the token, and the size and pace of the body.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kadr.quoting import quote
from kadr.server.auth import LOCAL_CLIENT, Client, Tokens
from kadr.server.errors import ApiError
from kadr.server.signed_urls import UrlSigner

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
OPEN_PATHS = ("/health/alive",)  # a container's health check has no token
MAX_URL_BYTES = 8192
BODY_SECONDS = 30.0  # without a byte of the body
MIN_BYTES_PER_SECOND = 4096  # of a body, once those seconds are over


@dataclass(frozen=True)
class GateRules:
    """The rules of the gate.

    Args:
        tokens: none: everyone may do everything.
        signer: of addresses that need no token.
        hosts: names that the server goes by, besides localhost and IP addresses.
        origins: of other sites whose pages may use the API.
        max_body_bytes: of any request.
        body_seconds: the longest pause within a body.
    """

    tokens: Tokens
    signer: UrlSigner
    hosts: Collection[str] = ()
    origins: Collection[str] = ()
    max_body_bytes: int = 1 << 30
    body_seconds: float = BODY_SECONDS
    own_names: Collection[str] = field(default_factory=lambda: ("localhost", socket.gethostname().lower()))


class Gate:
    """ASGI middleware that refuses what the rules do not let pass, before a body is read.

    It sets `client` in the state of each request.
    """

    def __init__(self, app: ASGIApp, rules: GateRules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_address(scope)
            self._check_host(headers)
            self._check_origin(scope["method"], headers)
            scope.setdefault("state", {})["client"] = self._find_client(scope, headers)
            self._check_length(headers)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, _Body(receive, self._rules).receive, send)

    def _check_address(self, scope: Scope) -> None:
        if len(scope["raw_path"] or b"") + len(scope["query_string"]) > MAX_URL_BYTES:
            raise ApiError(414, f"the address has more than {MAX_URL_BYTES} bytes.", code="address_too_long")

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not (_is_ip_address(name) or name in self._rules.own_names or name in self._rules.hosts):
            raise ApiError(
                403,
                f"this server does not go by the name {quote(', '.join(hosts))}. Use its IP address, or have its "
                "operator add --allow-host NAME.",
                code="unknown_host",
            )

    def _check_origin(self, method: str, headers: Headers) -> None:
        """Refuses a change that another site's page asks for. Programs send neither header."""
        if method in SAFE_METHODS:
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and origin in self._rules.origins:
            return
        is_own = origin is None or (origin != "null" and urlsplit(origin).netloc == headers["host"])
        if not is_own or site not in (None, "same-origin", "none"):
            raise ApiError(
                403,
                "another site's page may not use this server. Its operator can let it: --allow-origin ORIGIN.",
                code="cross_site",
            )

    def _find_client(self, scope: Scope, headers: Headers) -> Client:
        rules, path = self._rules, scope["path"]
        if not rules.tokens:
            return LOCAL_CLIENT
        authorization = headers.getlist("authorization")
        scheme, _, token = authorization[0].partition(" ") if len(authorization) == 1 else ("", "", "")
        if scheme.lower() == "bearer" and (client := rules.tokens.find(token.strip())) is not None:
            return client
        if scope["method"] in ("GET", "HEAD") and not authorization:
            query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
            if rules.signer.is_valid(path, query):
                return Client(is_admin=True)  # of this one path: the signature was given to who may see it
        if path in OPEN_PATHS or scope["method"] == "OPTIONS":
            return Client()
        raise ApiError(
            401,
            "a token is needed: send the header Authorization: Bearer TOKEN.",
            code="invalid_token",
            headers={"www-authenticate": "Bearer"},
        )

    def _check_length(self, headers: Headers) -> None:
        limit = self._rules.max_body_bytes
        lengths = headers.getlist("content-length")
        if len(lengths) > 1 or (lengths and not lengths[0].isdecimal()):
            raise ApiError(400, "Content-Length must be one number.", code="invalid_length")
        if lengths and int(lengths[0]) > limit:
            raise _too_large(limit)


class _Body:
    """A body on its way in, whose bytes are counted, and that must not stop."""

    def __init__(self, receive: Receive, rules: GateRules) -> None:
        self._receive, self._rules = receive, rules
        self._num_bytes, self._is_complete = 0, False
        self._began = time.monotonic()

    async def receive(self) -> Message:
        """Returns the next message.

        Raises:
            ApiError: the body is too large or too slow.
        """
        if self._is_complete:
            return await self._receive()
        patience = self._began + self._rules.body_seconds + self._num_bytes / MIN_BYTES_PER_SECOND - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), min(patience, self._rules.body_seconds))
        except asyncio.TimeoutError as error:
            slow = "the body comes too slowly: send at least 4 kilobytes each second."
            raise ApiError(408, slow, code="too_slow", headers={"connection": "close"}) from error
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._is_complete = not message.get("more_body", False)
            if self._num_bytes > self._rules.max_body_bytes:
                raise _too_large(self._rules.max_body_bytes)
        return message


def _too_large(limit: int) -> ApiError:
    message = f"the body has more than {limit:,} bytes, as many as this server takes. Send less."
    return ApiError(413, message, code="too_large", headers={"connection": "close"})


def _host_name(host: str) -> str | None:
    """Returns the name in a Host header, in small letters and without the port; None where it is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises for what is not a number
    except ValueError:
        return None
    return parts.hostname if parts.hostname and parts.netloc == host and not parts.username else None


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
