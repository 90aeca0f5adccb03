"""`Gate`: what every HTTP request passes before anything is done for it.

In this order: the size of its head, the host's name (a page may have rebound its own name to this machine), the page
that sent it (another site must not change anything here), the token, and the size and pace of the body.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kadr.quoting import quote
from kadr.server.auth import LOCAL_CLIENT, Client, Tokens
from kadr.server.errors import ApiError
from kadr.server.signed_urls import UrlSigner

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# A container's health check has no token; nor has a browser that opens the page, which then asks for one.
OPEN_PATHS, OPEN_PREFIX = ("/", "/health/alive"), "/page/"
MAX_URL_BYTES = 8192
MAX_HEADERS, MAX_HEADERS_BYTES = 100, 32 << 10  # of all of them
MAX_LENGTH_DIGITS = 20
BODY_SECONDS = 30.0  # without a byte of the body
MIN_BYTES_PER_SECOND = 4096  # of a body, once those seconds are over
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?")


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
        body = _IncomingBody(receive, self._rules)
        send = _with_safe_headers(send, body)
        try:
            headers = Headers(scope=scope)
            self._check_head(scope)
            self._check_host(headers)
            self._check_origin(scope["method"], headers)
            scope.setdefault("state", {})["client"] = self._find_client(scope, headers)
            self._check_length(headers)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, body.receive, send)

    def _check_head(self, scope: Scope) -> None:
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_URL_BYTES:
            raise ApiError(414, f"the address has more than {MAX_URL_BYTES} bytes.", code="address_too_long")
        num_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
        if len(scope["headers"]) > MAX_HEADERS or num_bytes > MAX_HEADERS_BYTES:
            raise ApiError(
                431,
                f"the request has more than {MAX_HEADERS} headers, or more than {MAX_HEADERS_BYTES:,} bytes of them.",
                code="headers_too_large",
            )

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_own_host(hosts[0]):
            raise ApiError(
                403,
                f"this server does not go by the name {quote(', '.join(hosts))}. Use its IP address, or have its "
                "operator add --allow-host NAME.",
                code="unknown_host",
            )

    def _is_own_host(self, host: str) -> bool:
        """Tells whether a Host header names this server: by an IP address, which no page can rebind, or by a name."""
        match = _HOST.fullmatch(host)
        if match is None or int(match["port"] or 0) > 65535:
            return False
        if match["address"] is not None:
            return _is_ip_address(match["address"], 6)
        name = match["name"].lower()
        return _is_ip_address(name, 4) or name in self._rules.own_names or name in self._rules.hosts

    def _check_origin(self, method: str, headers: Headers) -> None:
        """Refuses a change that another site's page asks for. Programs send neither header."""
        if method in SAFE_METHODS:
            return
        origins, sites = headers.getlist("origin"), headers.getlist("sec-fetch-site")
        if len(origins) == 1 and origins[0] in self._rules.origins:
            return
        own = [f"{scheme}://{headers['host'].lower()}" for scheme in ("http", "https")]
        is_own = not origins or (len(origins) == 1 and origins[0].lower() in own)
        if not is_own or not set(sites) <= {"same-origin", "none"}:
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
        if scope["method"] in ("GET", "HEAD"):
            if not authorization and rules.signer.is_valid(path, scope["query_string"]):
                return Client(is_admin=True)  # of this one path: the signature was given to who may see it
            if path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
                return Client()
        raise ApiError(
            401,
            "a token is needed: send the header Authorization: Bearer TOKEN. If this is a signed address, it may have "
            "expired: ask for its video again.",
            code="invalid_token",
            headers={"www-authenticate": "Bearer"},
        )

    def _check_length(self, headers: Headers) -> None:
        """Refuses a body that is too large, and one whose length can be read in two ways, as two servers may."""
        limit = self._rules.max_body_bytes
        lengths, encodings = headers.getlist("content-length"), headers.getlist("transfer-encoding")
        if len(lengths) > 1 or (lengths and (encodings or not _is_length(lengths[0]))):
            raise ApiError(
                400,
                "Content-Length must be one number, and there must be no Transfer-Encoding beside it.",
                code="invalid_length",
                headers={"connection": "close"},
            )
        if lengths and int(lengths[0]) > limit:
            raise _too_large(limit)


class _IncomingBody:
    """A body on its way in, whose bytes are counted, and that must not stop.

    Attributes:
        is_over: it is complete, or its request is answered, and nobody waits for it.
    """

    def __init__(self, receive: Receive, rules: GateRules) -> None:
        self._receive, self._rules = receive, rules
        self._num_bytes, self.is_over = 0, False
        self._seconds = 0.0  # that the server has waited for it

    async def receive(self) -> Message:
        """Returns the next message.

        Raises:
            ApiError: the body is too large or too slow.
        """
        if self.is_over:
            return await self._receive()
        patience = self._rules.body_seconds
        began, left = time.monotonic(), patience + self._num_bytes / MIN_BYTES_PER_SECOND - self._seconds
        try:
            message = await asyncio.wait_for(self._receive(), min(left, patience))
        except asyncio.TimeoutError as error:
            if self.is_over:  # answered meanwhile
                return await self._receive()
            slow = f"the body comes too slowly: send at least {MIN_BYTES_PER_SECOND:,} bytes each second."
            raise ApiError(408, slow, code="too_slow", headers={"connection": "close"}) from error
        self._seconds += time.monotonic() - began
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self.is_over = not message.get("more_body", False)
            if self._num_bytes > self._rules.max_body_bytes:
                raise _too_large(self._rules.max_body_bytes)
        return message


def _with_safe_headers(send: Send, body: _IncomingBody) -> Send:
    """Returns a `send` that tells browsers to take no answer for a page or script that it is not."""

    async def send_safely(message: Message) -> None:
        if message["type"] == "http.response.start":
            body.is_over = True
            MutableHeaders(scope=message).setdefault("x-content-type-options", "nosniff")
        await send(message)

    return send_safely


def _too_large(limit: int) -> ApiError:
    message = f"the body has more than {limit:,} bytes, as many as this server takes. Send less."
    return ApiError(413, message, code="too_large", headers={"connection": "close"})


def _is_length(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= MAX_LENGTH_DIGITS


def _is_ip_address(name: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(name).version == version
    except ValueError:
        return False
