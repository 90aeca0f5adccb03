"""Requests that the gate refuses before anything is done: of no client, of another site's page, to another name."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kadr.server import auth
from kadr.server.gate import MAX_HEADERS, MAX_URL_BYTES
from tests.server.answers import refused
from tests.server.app_client import HOST
from tests.server.opened_app import ADMIN, ANNA, BEN, SMALL, OpenedApp, open_app, some_tokens
from tests.server.routes import ADMIN_ROUTES, CHANGING_ROUTES, OPEN_ROUTES, ROUTES, fill

WRONG_TOKENS: Mapping[str, list[tuple[str, str]]] = {
    "none": [],
    "empty": [("authorization", "")],
    "without a token": [("authorization", "Bearer ")],
    "wrong": [("authorization", "Bearer " + "x" * 22)],
    "almost right": [("authorization", f"Bearer {ADMIN[:-1]}")],
    "with more": [("authorization", f"Bearer {ADMIN}0")],
    "in capitals": [("authorization", f"Bearer {ADMIN.upper()}")],
    "of another scheme": [("authorization", f"Basic {ADMIN}")],
    "without a scheme": [("authorization", ADMIN)],
    "as its hash": [("authorization", f"Bearer {auth._digest(ADMIN)}")],
    "twice": [("authorization", f"Bearer {ADMIN}"), ("authorization", f"Bearer {ANNA}")],
    "twice the same": [("authorization", f"Bearer {ADMIN}")] * 2,
    "two in one": [("authorization", f"Bearer {ADMIN}, Bearer {ANNA}")],
    "with a NUL": [("authorization", f"Bearer {ADMIN}\0")],
    "not ASCII": [("authorization", f"Bearer {ADMIN}é")],
    "in other headers": [
        ("x-api-key", ADMIN),
        ("cookie", f"token={ADMIN}"),
        ("proxy-authorization", f"Bearer {ADMIN}"),
    ],
}
OTHER_SITES: Mapping[str, list[tuple[str, str]]] = {
    "origin": [("origin", "https://evil.example")],
    "origin of nobody": [("origin", "null")],
    "empty origin": [("origin", "")],
    "origin of another port": [("origin", "http://127.0.0.1:8001")],
    "origin without a port": [("origin", "http://127.0.0.1")],
    "origin of a longer name": [("origin", f"http://{HOST}.evil.example")],
    "origin with a user": [("origin", f"http://{HOST}@evil.example")],
    "origin that is no address": [("origin", "http://[")],
    "origin of another scheme": [("origin", f"file://{HOST}")],
    "two origins": [("origin", f"http://{HOST}"), ("origin", "https://evil.example")],
    "two origins in one": [("origin", f"http://{HOST} https://evil.example")],
    "cross-site": [("sec-fetch-site", "cross-site")],
    "same-site": [("sec-fetch-site", "same-site")],
    "unknown site": [("sec-fetch-site", "whatever")],
    "cross-site with our origin": [("origin", f"http://{HOST}"), ("sec-fetch-site", "cross-site")],
    "two sites": [("sec-fetch-site", "same-origin"), ("sec-fetch-site", "cross-site")],
}
OTHER_HOSTS = (
    *(
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example#localhost",
    ),
    *("localhost@evil.example", "evil.example@localhost", "localhost:8000:8000", "localhost:", "localhost:99999"),
    *("localhost:x", "localhost/", "localhost/evil", "localhost?", "localhost\\evil", "localhost evil", "2130706433"),
    *("0x7f000001", "127.1", "[::1]evil.example", "evil[::1]", "[evil.example]", "[127.0.0.1]", "::1", "", ",", "*"),
    *("localhost,evil.example", "[::1%25eth0]", "xn--localhost", "local\thost", "localhost\0"),
)
OWN_HOSTS = ("127.0.0.1", HOST, "localhost", "LOCALHOST:1", "[::1]", "[::1]:8000", "[::ffff:127.0.0.1]", "10.1.2.3:80")


@pytest.mark.parametrize("method, path", ROUTES)
def test_every_route_but_alive_needs_a_token(app: OpenedApp, method: str, path: str) -> None:
    with app.unchanged():
        for headers in WRONG_TOKENS.values():
            answer = app.send(method, fill(path), headers=headers)
            if (method, path) in OPEN_ROUTES:
                assert answer.status == 200
            else:
                assert refused(answer, 401, "invalid_token").header("www-authenticate") == "Bearer"


@pytest.mark.parametrize("token", [None, ANNA, BEN])
@pytest.mark.parametrize("method, path", sorted(ADMIN_ROUTES))
def test_routes_of_admins_refuse_others(app: OpenedApp, method: str, path: str, token: str | None) -> None:
    with app.unchanged():
        refused(app.send(method, path, token=token), 401 if token is None else 403)
    assert not app.state.queue.store.is_paused


@pytest.mark.parametrize("method, path", CHANGING_ROUTES)
def test_every_change_refuses_pages_of_other_sites(local_app: OpenedApp, method: str, path: str) -> None:
    with local_app.unchanged():
        for headers in OTHER_SITES.values():
            refused(local_app.send(method, fill(path), headers=headers), 403, "cross_site")


@pytest.mark.parametrize("body_type", ["application/x-www-form-urlencoded", "multipart/form-data", "text/plain"])
def test_form_of_another_site_makes_no_job(local_app: OpenedApp, body_type: str) -> None:
    headers = {"origin": "https://evil.example", "content-type": body_type}
    with local_app.unchanged():
        refused(local_app.send("POST", "/v1/videos", body=b"prompt=x", headers=headers), 403, "cross_site")
        refused(local_app.send("POST", "/v1/uploads", body=b"x", headers=headers), 403, "cross_site")


def test_own_page_may_change(local_app: OpenedApp) -> None:
    for headers in (
        {"origin": f"http://{HOST}", "sec-fetch-site": "same-origin"},
        {"origin": f"https://{HOST}"},  # behind a proxy
        {"sec-fetch-site": "none"},
    ):
        assert local_app.send("POST", "/v1/queue/resume", headers=headers).status == 200


@pytest.mark.parametrize("host", OTHER_HOSTS)
def test_other_names_of_the_host_are_refused(local_app: OpenedApp, host: str) -> None:
    for method, path in (("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", "/health/alive"), ("OPTIONS", "/")):
        refused(local_app.send(method, path, host=host), 403, "unknown_host")


def test_a_host_that_is_missing_or_double_is_refused(local_app: OpenedApp) -> None:
    refused(local_app.send("GET", "/v1/videos", host=None), 403, "unknown_host")
    two = [("host", "localhost"), ("host", "localhost")]
    refused(local_app.send("GET", "/v1/videos", host=None, headers=two), 403, "unknown_host")


@pytest.mark.parametrize("host", OWN_HOSTS)
def test_own_names_of_the_host_pass(local_app: OpenedApp, host: str) -> None:
    assert local_app.send("GET", "/v1/queue", host=host).status == 200


def test_forwarded_names_are_not_believed(local_app: OpenedApp) -> None:
    video_id = local_app.add_completed()
    headers = {"x-forwarded-host": "evil.example", "x-forwarded-proto": "gopher", "forwarded": "host=evil.example"}
    video = local_app.send("GET", f"/v1/videos/{video_id}", headers=headers).data
    assert video["url"].startswith(f"http://{HOST}/v1/videos/{video_id}/content?")


@pytest.mark.parametrize("name", ["x-http-method-override", "x-method-override", "x-http-method"])
def test_method_cannot_be_overridden(local_app: OpenedApp, name: str) -> None:
    video_id = local_app.submit()
    site = {"origin": "https://evil.example"}
    with local_app.unchanged():
        local_app.send("GET", f"/v1/videos/{video_id}?_method=DELETE", headers={name: "DELETE"})
        refused(local_app.send("POST", f"/v1/videos/{video_id}", headers={name: "DELETE"}), 405, "method_not_allowed")
        refused(local_app.send("get", f"/v1/videos/{video_id}/cancel", headers=site), 403, "cross_site")
        refused(local_app.send("DELETE ", f"/v1/videos/{video_id}"), 405, "method_not_allowed")


@pytest.mark.parametrize("method", ["PUT", "PATCH", "TRACE", "CONNECT", "PROPFIND", "post", "FOO", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/uploads", "/v1/queue/pause"])
def test_other_methods_are_refused(local_app: OpenedApp, method: str, path: str) -> None:
    with local_app.unchanged():
        refused(local_app.send(method, path), 405, "method_not_allowed")


def test_long_addresses_and_heads_are_refused(app: OpenedApp) -> None:
    refused(app.send("GET", "/v1/videos?after=" + "x" * MAX_URL_BYTES, token=ANNA), 414, "address_too_long")
    refused(app.send("GET", "/" + "x" * MAX_URL_BYTES), 414, "address_too_long")
    refused(app.send("GET", "/", headers=[("x", "y")] * (MAX_HEADERS + 1)), 431, "headers_too_large")
    refused(app.send("GET", "/", headers={"x": "y" * (1 << 16)}), 431, "headers_too_large")
    refused(app.send("GET", "/", headers={"authorization": "Bearer " + "y" * (1 << 15)}), 431, "headers_too_large")


@pytest.mark.parametrize(
    "headers",
    [
        [("content-length", "5"), ("content-length", "5")],
        [("content-length", "5"), ("content-length", "6")],
        [("content-length", "5"), ("transfer-encoding", "chunked")],
        *(
            [("content-length", length)]
            for length in ("-1", "+5", "5, 5", "0x5", "5.0", "1e3", "", " ", "٣", "9" * 5000)
        ),
    ],
)
def test_bodies_whose_length_is_unclear_are_refused(app: OpenedApp, headers: list[tuple[str, str]]) -> None:
    encoded = [(name, value.encode().decode("latin-1")) for name, value in headers]
    with app.unchanged():
        refused(app.send("POST", "/v1/videos", token=ANNA, body=b"12345", headers=encoded), 400, "invalid_length")


def test_announced_body_that_is_too_large_is_not_read(app: OpenedApp) -> None:
    def body() -> Any:
        yield b"{"
        raise AssertionError("it was read")

    headers = {"content-length": str(app.rules.max_body_bytes + 1), "content-type": "application/json"}
    with app.unchanged():
        refused(app.send("POST", "/v1/videos", token=ANNA, body=body(), headers=headers), 413, "too_large")


def test_body_of_no_client_is_not_read(app: OpenedApp) -> None:
    def body() -> Any:
        yield b"{"
        raise AssertionError("it was read")

    for path in ("/v1/videos", "/v1/uploads", "/v1/plan", "/v1/videos/edits"):
        refused(app.send("POST", path, body=body(), headers={"content-type": "application/json"}), 401)


def test_token_is_compared_with_every_hash_in_constant_time(app: OpenedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []
    original = hmac.compare_digest

    def compare(known: str, digest: str) -> bool:
        compared.append((known, digest))
        return original(known, digest)

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    for token in (ADMIN, ANNA, BEN, "wrong", ""):
        compared.clear()
        app.rules.tokens.find(token)
        assert [known for known, _ in compared] == list(app.rules.tokens.by_digest)
        assert {digest for _, digest in compared} == {auth._digest(token)}


def test_tokens_are_not_stored_as_they_are(app: OpenedApp) -> None:
    files = [path.read_bytes() for path in app.folder.rglob("*") if path.is_file()]
    assert all(token.encode() not in content for content in files for token in (ADMIN, ANNA, BEN))
    assert ADMIN not in repr(app.rules.tokens)


@pytest.fixture
def signed(app: OpenedApp) -> str:
    """The signed address of a completed video of Anna's, without its host."""
    return _address(app, "url")


def _address(app: OpenedApp, name: str) -> str:
    video = app.send("GET", f"/v1/videos/{app.add_completed(ANNA)}", token=ANNA).data
    return str(video[name]).removeprefix(f"http://{HOST}")


def test_signed_address_gives_its_file(app: OpenedApp, signed: str) -> None:
    assert app.send("GET", signed).body == b"a video"
    assert app.send("GET", _address(app, "thumbnail_url")).body == b"a still"


ALTERED: Mapping[str, Callable[[str], str]] = {
    "variant": lambda url: f"{url}&variant=thumbnail",
    "variant in front": lambda url: url.replace("?", "?variant=spritesheet&"),
    "empty variant": lambda url: f"{url}&variant=",
    "unknown field": lambda url: f"{url}&x",
    "signature twice": lambda url: f"{url}&signature={url[-64:]}",
    "expires twice": lambda url: url.replace("&signature", "&expires=99999999999&signature"),
    "later": lambda url: url.replace("expires=", "expires=9"),
    "expires in other digits": lambda url: url.replace("expires=1", "expires=%D9%A1"),
    "no expires": lambda url: url.replace("expires=", "x="),
    "no signature": lambda url: url.partition("&signature")[0],
    "empty signature": lambda url: url.partition("&signature")[0] + "&signature=",
    "signature cut": lambda url: url[:-1],
    "signature in capitals": lambda url: url[:-64] + url[-64:].upper() + "A",
    "signature not ASCII": lambda url: url[:-1] + "%C3%A9",
    "path": lambda url: url.replace("/content", ""),
    "events": lambda url: url.replace("/content", "/events"),
    "preview": lambda url: url.replace("/content", "/preview"),
    "list": lambda url: "/v1/videos?" + url.partition("?")[2],
    "path climbs": lambda url: url.replace("/content", "/content/../content"),
    "path with a slash": lambda url: url.replace("/content", "/content/"),
    "query in the path": lambda url: url.replace("?", "%3F"),
}


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_altered_address_is_refused(app: OpenedApp, signed: str, alter: Callable[[str], str]) -> None:
    refused(app.send("GET", alter(signed)), 401, "invalid_token")


def test_signatures_cannot_be_swapped(app: OpenedApp, signed: str) -> None:
    other, thumbnail = _address(app, "url"), _address(app, "thumbnail_url")
    for mine, theirs in ((signed, other), (signed, thumbnail), (thumbnail, signed)):
        refused(app.send("GET", mine[:-64] + theirs[-64:]), 401)
    refused(app.send("GET", other.partition("?")[0] + "?" + signed.partition("?")[2]), 401)


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT", "OPTIONS", "get"])
def test_signed_address_is_for_reading_alone(app: OpenedApp, signed: str, method: str) -> None:
    with app.unchanged():
        refused(app.send(method, signed), 401)


def test_signed_address_beside_a_wrong_token_is_refused(app: OpenedApp, signed: str) -> None:
    refused(app.send("GET", signed, token="x" * 22), 401)


def test_signed_address_expires(app: OpenedApp, signed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = app.rules.signer.clock()
    object.__setattr__(app.rules.signer, "clock", lambda: now + app.rules.signer.seconds - 1)
    try:
        assert app.send("GET", signed).status == 200
        object.__setattr__(app.rules.signer, "clock", lambda: now + app.rules.signer.seconds + 1)
        refused(app.send("GET", signed), 401)
    finally:
        object.__delattr__(app.rules.signer, "clock")


def test_address_of_a_deleted_video_gives_nothing(app: OpenedApp) -> None:
    signed = _address(app, "url")
    video_id = signed.split("/")[3]
    assert app.send("DELETE", f"/v1/videos/{video_id}", token=ANNA).status == 200
    refused(app.send("GET", signed), 404, "video_not_found")


def test_answers_say_that_they_are_no_page(app: OpenedApp, signed: str) -> None:
    for path in (signed, "/health/alive", "/nothing", "/v1/videos"):
        assert app.send("GET", path).header("x-content-type-options") == "nosniff"


def test_video_of_an_admin_is_no_clients(app: OpenedApp) -> None:
    video_id = app.submit(ADMIN, **SMALL)
    refused(app.send("GET", f"/v1/videos/{video_id}", token=ANNA), 404)


STUDIO = "https://studio.example"


@pytest.fixture(scope="module")
def studio_app(data_folder: Path, loop: Any) -> Iterator[OpenedApp]:
    """An application that the pages of one other site may use."""
    with open_app(data_folder / "studio", loop, tokens=some_tokens(), origins=(STUDIO,)) as opened:
        yield opened


def test_pages_of_an_allowed_site_may_use_the_server(studio_app: OpenedApp) -> None:
    asks = {
        "origin": STUDIO,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    answer = studio_app.send("OPTIONS", "/v1/videos", headers=asks)
    assert (answer.status, answer.header("access-control-allow-origin")) == (200, STUDIO)
    assert answer.header("access-control-allow-credentials") is None
    site = {"origin": STUDIO, "sec-fetch-site": "cross-site"}
    answer = studio_app.send("POST", "/v1/videos", token=ANNA, json_body=SMALL, headers=site)
    assert (answer.status, answer.header("access-control-allow-origin")) == (200, STUDIO)
    answer = refused(studio_app.send("POST", "/v1/videos", json_body=SMALL, headers=site), 401)
    assert answer.header("access-control-allow-origin") == STUDIO  # so that the page can read why


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", STUDIO + ".evil.example", "http://studio.example", "*"]
)
def test_pages_of_other_sites_still_may_not(studio_app: OpenedApp, origin: str) -> None:
    for method in ("POST", "DELETE", "PUT"):
        asks = {"origin": origin, "access-control-request-method": method}
        answer = refused(studio_app.send("OPTIONS", "/v1/videos", headers=asks), 403, "cross_site")
        assert answer.header("access-control-allow-origin") is None
    with studio_app.unchanged():
        answer = studio_app.send("POST", "/v1/videos", token=ANNA, json_body=SMALL, headers={"origin": origin})
        assert refused(answer, 403, "cross_site").header("access-control-allow-origin") is None
    assert (
        studio_app.send("GET", "/v1/videos", token=ANNA, headers={"origin": origin}).header(
            "access-control-allow-origin"
        )
        is None
    )
