"""Bodies that are too large, too deep, damaged, or not what they say they are."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from itertools import repeat

import pytest

from kadr.server.errors import ApiError
from kadr.server.inputs import bodies, form_reader
from kadr.server.inputs.body_memory import BodyMemory
from tests.server.answers import refused
from tests.server.app_client import multipart
from tests.server.media import data_url, image
from tests.server.opened_app import ANNA, SMALL, OpenedApp

JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=b"}
URLENCODED = {"content-type": "application/x-www-form-urlencoded"}
BODY_ROUTES = ("/v1/videos", "/v1/videos/sync", "/v1/videos/edits", "/v1/videos/extensions", "/v1/plan")

NOT_JSON = {
    "empty": b"",
    "spaces": b"   ",
    "cut": b'{"prompt": "x',
    "two": b'{"prompt": "x"}{"prompt": "y"}',
    "trailing comma": b'{"prompt": "x",}',
    "single quotes": b"{'prompt': 'x'}",
    "comment": b'{"prompt": "x"} // no',
    "bad UTF-8": b'{"prompt": "\xff\xfe"}',
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "surrogate in UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "half a character": b'{"prompt": "\\ud800"}',
    "half a character in a key": b'{"\\udfff": 1, "prompt": "x"}',
    "half a character deep inside": b'{"prompt": "x", "windows": {"a": [{"\\ud800": 1}]}}',
    "control character": b'{"prompt": "\x00"}',
    "NaN": b'{"prompt": "x", "fps": NaN}',
    "infinity": b'{"prompt": "x", "fps": -Infinity}',
    "too large a float": b'{"prompt": "x", "fps": 1e999}',
    "too many digits": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "twice": b'{"prompt": "x", "prompt": "y"}',
    "twice deep inside": b'{"prompt": "x", "guidance": {"cfg_scale": 1, "cfg_scale": 2}}',
    "deep lists": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"prompt": "x", "windows": ' + b'{"a":' * 1000 + b"1" + b"}" * 1000 + b"}",
    "deep and open": b"[" * 100_000,
    "binary": bytes(range(256)),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(100),
    "XML": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
    "form": b"prompt=x",
}
NOT_OBJECTS = (b"null", b"true", b"1", b'"x"', b"[]", b'[{"prompt": "x"}]', b"1e3")


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_json_is_refused(app: OpenedApp, body: bytes) -> None:
    with app.unchanged():
        for path in BODY_ROUTES:
            refused(app.send("POST", path, token=ANNA, body=body, headers=JSON), 400, "invalid_json")


@pytest.mark.parametrize("body", NOT_OBJECTS)
def test_json_that_is_no_object_is_refused(app: OpenedApp, body: bytes) -> None:
    with app.unchanged():
        refused(app.send("POST", "/v1/videos", token=ANNA, body=body, headers=JSON), 400, "invalid_body")


@pytest.mark.parametrize(
    "kind",
    [None, "", "text/plain", "text/json", "application/xml", "application/json-patch", "image/png", "multipart/mixed"]
    + ["application/octet-stream", ";application/json", "x" * 5000, "application/json\0", "/", "*/*"],
)
def test_bodies_of_other_types_are_refused(app: OpenedApp, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    with app.unchanged():
        for path in BODY_ROUTES:
            body = json.dumps(SMALL).encode()
            refused(app.send("POST", path, token=ANNA, body=body, headers=headers), 415, "unsupported_type")


def endless(chunk: bytes = b" " * 65536, start: bytes = b"") -> Iterator[bytes]:
    """Yields a body that never ends."""
    yield start
    yield from repeat(chunk)


@pytest.mark.parametrize("headers", [JSON, FORM, URLENCODED])
@pytest.mark.parametrize("path", BODY_ROUTES)
def test_endless_bodies_are_refused(app: OpenedApp, path: str, headers: dict[str, str]) -> None:
    start = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' if headers == FORM else b""
    with app.unchanged():
        answer = app.send("POST", path, token=ANNA, body=endless(start=start), headers=headers)
        assert refused(answer, 413, "too_large").header("connection") == "close"


def test_endless_upload_is_refused(app: OpenedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    object.__setattr__(app.state.uploads.limits, "max_bytes", 1 << 20)
    try:
        with app.unchanged():
            refused(app.send("POST", "/v1/uploads", token=ANNA, body=endless(start=image())), 413, "too_large")
            start = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + image()
            for path in ("/v1/uploads", "/v1/videos"):
                refused(app.send("POST", path, token=ANNA, body=endless(start=start), headers=FORM), 413, "too_large")
    finally:
        object.__setattr__(app.state.uploads.limits, "max_bytes", 512 << 20)


def test_json_takes_memory_in_proportion(app: OpenedApp) -> None:
    lists = b'{"prompt": [' + b"[]," * 2_000_000 + b"1]}"
    commas = b'{"prompt": "' + b"," * 300_000 + b'"}'
    tracemalloc.start()
    try:
        with app.unchanged():
            for body in (lists, commas):
                refused(app.send("POST", "/v1/videos", token=ANNA, body=body, headers=JSON), 413, "too_large")
        assert tracemalloc.get_traced_memory()[1] < 4 * len(lists)
    finally:
        tracemalloc.stop()


BROKEN_FORMS = {
    "empty": b"",
    "no end": b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx',
    "end alone cut": b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--b',
    "other boundary": b'--c\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--c--\r\n',
    "no disposition": b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n--b--\r\n",
    "no name": b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
    "other disposition": b'--b\r\nContent-Disposition: attachment; name="prompt"\r\n\r\nx\r\n--b--\r\n',
    "no headers": b"--b\r\n\r\nx\r\n--b--\r\n",
    "bad header": b'--b\r\nContent Disposition: form-data; name="prompt"\r\n\r\nx\r\n--b--\r\n',
    "header without a name": b"--b\r\n: x\r\n\r\nx\r\n--b--\r\n",
    "header without an end": b"--b\r\nContent-Disposition: form-data" + b"x" * 100_000,
    "huge header": b'--b\r\nContent-Disposition: form-data; name="' + b"x" * 100_000 + b'"\r\n\r\nx\r\n--b--\r\n',
    "many headers": b"--b\r\n" + b"X: y\r\n" * 10_000 + b"\r\nx\r\n--b--\r\n",
    "bad UTF-8 in a value": b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\r\n--b--\r\n',
    "bad UTF-8 in a name": b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nx\r\n--b--\r\n',
    "prompt twice": multipart(("prompt", b"x"), ("prompt", b"y"), boundary="b")[0],
    "file twice": multipart(("prompt", b"x"), *2 * [("input_reference", image(), "a.png")], boundary="b")[0],
    "file and field": multipart(
        ("prompt", b"x"), ("input_reference", image(), "a.png"), ("input_reference", b"x"), boundary="b"
    )[0],
    "10,000 fields": multipart(*((f"f{n}", b"x") for n in range(10_000)), boundary="b")[0],
    "10,000 files": multipart(*((f"f{n}", b"x", "x") for n in range(10_000)), boundary="b")[0],
    "JSON": b'{"prompt": "x"}',
    "newlines": b"\r\n" * 100_000,
}


@pytest.mark.parametrize("body", BROKEN_FORMS.values(), ids=BROKEN_FORMS)
def test_broken_forms_are_refused(app: OpenedApp, body: bytes) -> None:
    with app.unchanged():
        for path in ("/v1/videos", "/v1/videos/edits", "/v1/uploads"):
            refused(app.send("POST", path, token=ANNA, body=body, headers=FORM), (400, 415))
            chunks = (body[start : start + 997] for start in range(0, len(body), 997))
            refused(app.send("POST", path, token=ANNA, body=chunks, headers=FORM), (400, 415))


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/form-data;",
    ]
    + ["multipart/form-data; boundary=" + "b" * 5000, "multipart/form-data; charset=utf-8", "Multipart/Form-Data;x=b"],
)
def test_forms_without_a_boundary_are_refused(app: OpenedApp, kind: str) -> None:
    body, _ = multipart(("prompt", b"x"), boundary="b")
    with app.unchanged():
        answer = app.send("POST", "/v1/videos", token=ANNA, body=body, headers={"content-type": kind})
        refused(answer, 400, "invalid_body")


@pytest.mark.parametrize(
    "charset", ["undefined", "idna", "punycode", "zlib", "utf-7", "unicode_escape", "\0", "utf-16"]
)
def test_charset_of_a_form_is_not_used(app: OpenedApp, charset: str) -> None:
    body, _ = multipart(("prompt", "é+AAA-".encode()), ("size", b"64x64"), ("num_frames", b"9"), boundary="b")
    kind = f"multipart/form-data; boundary=b; charset={charset}"
    answer = app.send("POST", "/v1/videos", token=ANNA, body=body, headers={"content-type": kind})
    assert answer.data["prompt"] == "é+AAA-"


@pytest.mark.parametrize(
    "body",
    [b"", b"&", b"prompt", b"prompt=x&prompt=y", b"prompt=%ff", b"prompt=\xff", b"prompt=x&" + b"a=1&" * 10_000]
    + [b"=x", b"prompt[=x", b"prompt]=x", b"[]=x", b"a[b][c][d][e][f]=x", b"prompt[]=x&prompt=y", b"prompt[a]=x"]
    + [b"conditions[][media]=x&conditions[][frame]=1&conditions[][frame]=2", b"__proto__[x]=1&prompt=x", b"prompt=x;y"],
)
def test_broken_urlencoded_forms_are_refused(app: OpenedApp, body: bytes) -> None:
    if body == b"prompt=x;y":  # only & separates
        assert app.send("POST", "/v1/plan", token=ANNA, body=body, headers=URLENCODED).status == 200
        return
    with app.unchanged():
        refused(app.send("POST", "/v1/videos", token=ANNA, body=body, headers=URLENCODED), 400)


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/edits", "/v1/plan"])
def test_files_under_other_names_are_refused(app: OpenedApp, path: str) -> None:
    names = ["mask", "image", "prompt", "input_reference[]", "conditions[0][media]", "../x"]
    names += ["video"] if path != "/v1/videos/edits" else []
    with app.unchanged():
        for name in names:
            body, headers = multipart(("prompt", b"x"), (name, image(), "x.png"))
            refused(app.send("POST", path, token=ANNA, body=body, headers=headers), 400)


def test_what_follows_a_form_is_not_read(app: OpenedApp) -> None:
    form, headers = multipart(("prompt", b"x"), ("size", b"64x64"), ("num_frames", b"9"))

    def body() -> Iterator[bytes]:
        yield form
        yield b"more"
        raise AssertionError("it was read")

    assert app.send("POST", "/v1/plan", token=ANNA, body=body(), headers=headers).status == 200


def test_client_that_hangs_up_leaves_nothing(app: OpenedApp) -> None:
    whole, headers = multipart(("prompt", b"x"), ("input_reference", image(), "x.png"))
    app.lines.clear()
    with app.unchanged():
        for path in ("/v1/videos", "/v1/uploads"):
            app.send("POST", path, token=ANNA, body=[whole[:-60], whole[-60:-50]], headers=headers, is_gone=True)
        app.send("POST", "/v1/uploads", token=ANNA, body=[image()[:50]], is_gone=True)
        app.send("POST", "/v1/videos", token=ANNA, body=[b'{"prompt":'], headers=JSON, is_gone=True)
    assert app.lines == []


def test_body_that_stops_is_refused(app: OpenedApp) -> None:
    object.__setattr__(app.rules, "body_seconds", 0.2)
    try:
        with app.unchanged():
            for path, headers in (("/v1/videos", JSON), ("/v1/videos", FORM), ("/v1/uploads", {})):
                answer = app.send("POST", path, token=ANNA, body=b"--b\r\n", headers=headers, stops=True)
                assert refused(answer, 408, "too_slow").header("connection") == "close"
    finally:
        object.__setattr__(app.rules, "body_seconds", 30.0)


def test_memory_of_bodies_is_shared_and_given_back() -> None:
    memory = BodyMemory(max_bytes=100, max_client_bytes=60)
    with memory.share("anna") as count:
        count(50)
        with pytest.raises(ApiError) as refusal, memory.share("anna") as count_more:
            count_more(11)
        assert (refusal.value.status, refusal.value.headers["retry-after"]) == (429, "5")
        with memory.share("ben") as count_bens:
            count_bens(50)
            with pytest.raises(ApiError) as refusal:
                count_bens(1)
        assert refusal.value.status == 503
        with memory.share("ben") as count_bens:
            count_bens(50)
    assert not memory._num_bytes


def test_bodies_in_memory_are_bounded(app: OpenedApp) -> None:
    with app.unchanged(), app.state.body_memory.share("anna") as count:
        count(256 << 20)
        refused(app.send("POST", "/v1/videos", token=ANNA, json_body=SMALL), 429, "too_many_bytes")
        body, headers = multipart(("prompt", b"x"))
        refused(app.send("POST", "/v1/videos", token=ANNA, body=body, headers=headers), 429, "too_many_bytes")
    assert app.send("POST", "/v1/plan", token=ANNA, json_body=SMALL).status == 200


def test_large_fields_are_bounded(app: OpenedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form_reader, "MAX_FIELDS_BYTES", 1000)
    monkeypatch.setattr(bodies, "MAX_JSON_BYTES", 1000)
    with app.unchanged():
        body, headers = multipart(("prompt", b"x" * 600), ("negative_prompt", b"x" * 600))
        refused(app.send("POST", "/v1/videos", token=ANNA, body=body, headers=headers), 413, "too_large")
        fields = {**SMALL, "input_reference": {"image_url": data_url(bytes(1000))}}
        refused(app.send("POST", "/v1/videos", token=ANNA, json_body=fields), 413, "too_large")
