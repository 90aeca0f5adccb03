"""Tokens: their file says what is wrong with it, and a server that others reach does not start without one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from kadr.errors import RequestError
from kadr.server.auth import MAX_TOKENS_BYTES, MIN_TOKEN_CHARACTERS, Client, Tokens, new_token
from kadr.server.run import ServerSettings

DIGEST = hashlib.sha256(b"x").hexdigest()


def test_new_token_is_found_by_its_lines_alone(tmp_path: Path) -> None:
    anna, lines = new_token("anna")
    boss, boss_lines = new_token("the.boss-1_a", is_admin=True)
    path = tmp_path / "tokens.toml"
    path.write_text(f"{lines}max_queued = 3\n{boss_lines}")
    tokens = Tokens.read(path)
    assert tokens.find(anna) == Client("anna", max_queued=3)
    assert tokens.find(boss) == Client("the.boss-1_a", is_admin=True)
    assert tokens.find(anna + "x") is tokens.find("") is tokens.find(DIGEST) is None
    assert anna not in path.read_text()
    assert len(anna) >= 2 * MIN_TOKEN_CHARACTERS
    assert (Client("anna").scope, Client("boss", is_admin=True).scope) == ("anna", None)


WRONG_FILES = {
    "no TOML": ("[anna", "is not TOML"),
    "no tokens": ("", "has no tokens"),
    "no table": ("anna = 1", "must have sha256"),
    "no hash": ("[anna]\nadmin = true", "must have sha256"),
    "token instead of its hash": (f'[anna]\ntoken = "x"\nsha256 = "{DIGEST}"', "and nothing else"),
    "hash too short": (f'[anna]\nsha256 = "{DIGEST[:-1]}"', "64 hexadecimal"),
    "hash in capitals": (f'[anna]\nsha256 = "{DIGEST.upper()}"', "64 hexadecimal"),
    "hash that is a number": ("[anna]\nsha256 = 1", "64 hexadecimal"),
    "admin that is no boolean": (f'[anna]\nsha256 = "{DIGEST}"\nadmin = "no"', "true or false"),
    "share of nothing": (f'[anna]\nsha256 = "{DIGEST}"\nmax_queued = 0', "must lie between"),
    "share that is no number": (f'[anna]\nsha256 = "{DIGEST}"\nmax_queued = true', "whole number"),
    "name twice": (f'[anna]\nsha256 = "{DIGEST}"\n[anna]\nsha256 = "{DIGEST}"', "is not TOML"),
    "token twice": (f'[anna]\nsha256 = "{DIGEST}"\n[ben]\nsha256 = "{DIGEST}"', "have the same token"),
    "name with a slash": (f'["a/b"]\nsha256 = "{DIGEST}"', "is not the name"),
    "name with a line": (f'["a\\nb"]\nsha256 = "{DIGEST}"', "is not the name"),
    "empty name": (f'[""]\nsha256 = "{DIGEST}"', "is not the name"),
    "too large": ("#" * (MAX_TOKENS_BYTES + 1), "not a file of tokens"),
    "deep": ("a = " + "[" * 10_000, "is not TOML"),
}


@pytest.mark.parametrize("text, message", WRONG_FILES.values(), ids=WRONG_FILES)
def test_file_of_tokens_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        Tokens.read(path)


def test_file_of_tokens_must_be_readable(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "none", tmp_path / "bytes"):
        with pytest.raises(RequestError, match="cannot be read"):
            Tokens.read(path)


@pytest.mark.parametrize(
    "token", ["", "short", "x" * (MIN_TOKEN_CHARACTERS - 1), "é" * 20, "x" * 20 + "\n", " " + "x" * 20]
)
def test_token_that_is_unsafe_or_cannot_be_sent_is_refused(token: str) -> None:
    with pytest.raises(RequestError, match="Make one: kadr serve --new-token"):
        Tokens.single(token)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "", "127.0.0.1.example", "127.1", "::ffff:0.0.0.0"]
)
def test_host_that_others_reach_needs_a_token(tmp_path: Path, host: str) -> None:
    with pytest.raises(RequestError, match="there is no token"):
        ServerSettings(models={"demo": "demo"}, folder=tmp_path, host=host)
    ServerSettings(models={"demo": "demo"}, folder=tmp_path, host=host, tokens=Tokens.single("x" * 20))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_host_that_this_machine_alone_reaches_needs_none(tmp_path: Path, host: str) -> None:
    assert not ServerSettings(models={"demo": "demo"}, folder=tmp_path, host=host).tokens
