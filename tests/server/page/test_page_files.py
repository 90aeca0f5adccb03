"""The files of the page: small, complete, and nothing in them from elsewhere or that a foreign text could run in."""

from __future__ import annotations

import re

import pytest

from kadr.server.routes.page import page_files
from tests.server.answers import Answer
from tests.server.opened_app import OpenedApp

MAX_BYTES = 150_000
MAX_LINES = 250
SCRIPTS = {name: file.content.decode() for name, file in page_files().items() if name.endswith(".js")}
# What turns text into markup or code.
DANGEROUS = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc")


def get(app: OpenedApp, path: str, method: str = "GET", **headers: str) -> Answer:
    """Sends a request without a token, as a browser does that opens the page."""
    return app.send(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})


def test_page_is_served_without_a_token(app: OpenedApp) -> None:
    answer = get(app, "/")
    assert answer.status == 200
    assert answer.header("content-type") == "text/html; charset=utf-8"
    policy = answer.header("content-security-policy")
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize("name", sorted(page_files()))
def test_file_is_served_with_its_type_and_policy(app: OpenedApp, name: str) -> None:
    answer = get(app, f"/page/{name}")
    assert (answer.status, answer.body) == (200, page_files()[name].content)
    assert answer.header("x-content-type-options") == "nosniff"
    assert answer.header("content-security-policy")
    assert get(app, f"/page/{name}", if_none_match=answer.header("etag") or "").status == 304
    assert get(app, f"/page/{name}", "HEAD").status == 200


@pytest.mark.parametrize(
    "path", ["/page/", "/page/../state.py", "/page/%2e%2e/app.py", "/page/js", "/page/js/none.js", "/page//etc/passwd"]
)
def test_nothing_else_is_served(app: OpenedApp, path: str) -> None:
    assert get(app, path).status == 404


def test_page_weighs_less_than_150_kb() -> None:
    assert sum(len(file.content) for file in page_files().values()) < MAX_BYTES


def test_files_are_short() -> None:
    assert {name: text.count("\n") for name, text in SCRIPTS.items() if text.count("\n") > MAX_LINES} == {}


def test_page_loads_every_module_at_once() -> None:
    index = page_files()["index.html"].content.decode()
    preloaded = re.findall(r'<link rel="modulepreload" href="/page/(js/[a-z]+\.js)">', index)
    assert sorted(preloaded) == sorted(SCRIPTS)
    imported = {f"js/{name}" for text in SCRIPTS.values() for name in re.findall(r'from "\./([a-z]+\.js)"', text)}
    assert imported | {"js/main.js"} == set(SCRIPTS)


def test_nothing_turns_text_into_markup_or_code() -> None:
    assert {name: DANGEROUS.findall(text) for name, text in SCRIPTS.items() if DANGEROUS.search(text)} == {}


def test_markup_has_no_script_or_style_of_its_own() -> None:
    index = page_files()["index.html"].content.decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*\ssrc=)", index)


def test_nothing_is_fetched_from_elsewhere() -> None:
    for name, file in page_files().items():
        addresses = set(re.findall(r"https?://[^\s\"'`]+|//[a-z]+\.[a-z]{2,}", file.content.decode()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
