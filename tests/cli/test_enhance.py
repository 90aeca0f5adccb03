"""`kadr generate --enhance`: what the model was given is what the video remembers; a bad endpoint costs no video."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from kadr.errors import RequestError
from kadr.media.clip import read_metadata, read_video
from kadr.request.request import Request
from tests.cli.conftest import CommandResult, FakeEngine
from tests.fakechat import (
    PARAGRAPH,
    ChatRequest,
    FakeChat,
    Reply,
    assert_faster_than,
    chat_completion,
    error_reply,
    serve_fake_chat,
)

Run = Callable[..., CommandResult]
PROMPT = "a red circle"
WRITTEN_OUT = "A red circle moves right on a black background."
KEY = "sk-very-secret-0123456789"
TINY = ("--model", "demo", "--size", "64x64", "--frames", "9", "--steps", "1", "--device", "cpu")


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChat]:
    monkeypatch.delenv("KADR_ENHANCE_KEY", raising=False)
    with serve_fake_chat() as chat:
        yield chat


def test_flags_and_the_key_of_the_environment_reach_the_endpoint(
    kadr: Run, engine: FakeEngine, chat: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KADR_ENHANCE_KEY", f" {KEY}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "of another place")
    ended = kadr("generate", PROMPT, "--enhance", chat.url, "--enhance-model", "m:4b", "--enhance-timeout", "9")
    assert (ended.code, ended.out) == (0, "out.mp4\n"), ended.err
    (asked,) = chat.requests
    assert asked.body["model"] == "m:4b"
    assert asked.headers["Authorization"] == f"Bearer {KEY}"
    assert engine.written_requests == [Request(prompt=PARAGRAPH, original_prompt=PROMPT)]
    assert f"asking {chat.url} to enhance the prompt\nenhanced: {PARAGRAPH}\n" in ended.err
    assert KEY not in ended.err


def test_without_a_key_of_its_own_none_is_sent(
    kadr: Run, engine: FakeEngine, chat: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("KADR_ENHANCE_KEY", "")
    assert kadr("generate", PROMPT, "--enhance", chat.url).code == 0
    assert KEY not in str(chat.requests)
    assert "Authorization" not in chat.requests[0].headers


def test_off_by_default(kadr: Run, engine: FakeEngine, chat: FakeChat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KADR_ENHANCE_KEY", KEY)
    ended = kadr("generate", PROMPT)
    assert engine.written_requests == [Request(prompt=PROMPT)]
    assert (chat.requests, "enhance" in ended.err) == ([], False)


def test_what_the_model_was_given_is_in_the_file_and_a_rerun_asks_nobody(kadr: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    Image.new("RGB", (96, 64), (200, 30, 30)).save(tmp_path / "photo.png")
    with serve_fake_chat() as chat:
        chat.reply = chat_completion(f'<think>hm</think>Here is the prompt:\n"{WRITTEN_OUT}"')
        words = ("--enhance", chat.url, "--image", tmp_path / "photo.png", "--output", output, "--json")
        ended = kadr("generate", PROMPT, *TINY, *words)
    assert ended.code == 0, ended.err
    assert len(chat.requests[0].images) == 1
    for request in (json.loads(ended.out)["request"], read_metadata(output)["request"]):
        assert (request["prompt"], request["original_prompt"]) == (WRITTEN_OUT, PROMPT)
    again = kadr("rerun", output, "--output", tmp_path / "again.mp4")  # the endpoint is gone
    assert again.code == 0, again.err
    assert len(chat.requests) == 1
    assert (read_video(tmp_path / "again.mp4").frames == read_video(output).frames).all()
    assert read_metadata(tmp_path / "again.mp4")["request"] == read_metadata(output)["request"]
    plain = kadr("generate", WRITTEN_OUT, *TINY, "--image", tmp_path / "photo.png", "--output", tmp_path / "plain.mp4")
    assert plain.code == 0, plain.err
    assert (read_video(tmp_path / "plain.mp4").frames == read_video(output).frames).all()


def test_a_long_video_resumes_with_the_prompt_that_it_began_with(
    kadr: Run, engine: FakeEngine, chat: FakeChat, tmp_path: Path
) -> None:
    windows = tmp_path / "out.windows"
    windows.mkdir()
    begun = Request(prompt=WRITTEN_OUT, original_prompt=PROMPT)
    (windows / "request.json").write_text(json.dumps({"request": begun.to_json()}))
    words = ("--enhance", chat.url, "--window", "9", "--output", tmp_path / "out.mp4", "--resume")
    for extra in (words, words[2:]):  # the endpoint need not be named again
        ended = kadr("generate", PROMPT, *extra)
        assert ended.code == 0, ended.err
        assert (engine.written_requests[-1].prompt, engine.written_requests[-1].original_prompt) == (
            WRITTEN_OUT,
            PROMPT,
        )
        assert f"enhanced when the video began: {WRITTEN_OUT}" in ended.err
    assert chat.requests == []
    assert kadr("generate", "other words", *words).code == 0
    assert len(chat.requests) == 1  # those of another video; the engine refuses the folder


def test_a_long_video_that_was_begun_with_the_users_words_goes_on_with_them(
    kadr: Run, engine: FakeEngine, chat: FakeChat, tmp_path: Path
) -> None:
    """The endpoint had failed when it began, and is there now."""
    windows = tmp_path / "out.windows"
    windows.mkdir()
    (windows / "request.json").write_text(json.dumps({"request": Request(prompt=PROMPT).to_json()}))
    words = ("--enhance", chat.url, "--window", "9", "--output", tmp_path / "out.mp4", "--resume")
    assert kadr("generate", PROMPT, *words).code == 0
    assert (engine.written_requests[-1].prompt, engine.written_requests[-1].original_prompt) == (PROMPT, None)
    assert chat.requests == []


def test_nobody_is_asked_for_a_video_that_cannot_be_made(
    kadr: Run, engine: FakeEngine, chat: FakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = ("--window", "9", "--frames", "25", "--enhance", chat.url)
    (tmp_path / "a.windows").mkdir()
    (tmp_path / "a.windows" / "window-0001.safetensors").touch()
    (tmp_path / "a.windows" / "request.json").write_text("{}")
    again = kadr("generate", PROMPT, *long, "--output", tmp_path / "a.mp4")
    assert "holds 1 finished window of an unfinished video" in again.err
    too_many = kadr("generate", "--prompt", "one", "--prompt", "two", "--prompt", "three", *long[:2], *long[4:])
    assert too_many.code == 0  # a window for each
    chat.requests.clear()
    assert "4 prompts are given" in kadr("generate", "a | b | c | d", "--window", "9", "--frames", "9", *long[4:]).err

    def refuse(request: Request) -> None:
        raise RequestError("it does not fit")

    monkeypatch.setattr(engine, "plan", refuse)
    assert "it does not fit" in kadr("generate", PROMPT, "--enhance", chat.url).err
    assert chat.requests == []


def test_a_failure_is_a_warning_and_the_users_own_words_are_used(kadr: Run, tmp_path: Path, chat: FakeChat) -> None:
    output = tmp_path / "out.mp4"
    chat.reply = error_reply(429, "You exceeded your quota.")
    ended = kadr("generate", PROMPT, *TINY, "--enhance", chat.url, "--output", output)
    assert (ended.code, ended.out) == (0, f"{output}\n"), ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith("warning: ")]
    assert "HTTP 429 (You exceeded your quota)" in line
    assert line.endswith("The prompt is used as it was written.")
    stored = read_metadata(output)["request"]
    assert (stored["prompt"], stored["original_prompt"]) == (PROMPT, None)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(delay_seconds=60.0),
        error_reply(401, "no"),
        error_reply(500, "no"),
        Reply(b"<html>"),
        chat_completion(None),
        chat_completion("ok"),
    ],
    ids=["slow", "401", "500", "HTML", "null", "nonsense"],
)
@pytest.mark.parametrize("required", [False, True])
def test_a_bad_endpoint_is_a_warning_or_where_it_is_required_an_error(
    kadr: Run, engine: FakeEngine, chat: FakeChat, reply: Reply, required: bool
) -> None:
    chat.reply = reply
    words = ("--enhance-timeout", "0.3", *(["--enhance-required"] if required else []))
    ended = kadr("generate", PROMPT, "--enhance", chat.url, *words)
    if required:
        assert (ended.code, ended.out, engine.written_requests, os.listdir()) == (1, "", [], [])
        assert ended.err.splitlines()[-1].startswith(f"error: the prompt was not enhanced: {chat.url} ")
    else:
        assert (ended.code, ended.out, engine.written_requests) == (0, "out.mp4\n", [Request(prompt=PROMPT)])
        assert f"warning: the prompt was not enhanced: {chat.url} " in ended.err


def test_a_server_that_is_down_is_a_warning(kadr: Run, engine: FakeEngine) -> None:
    with serve_fake_chat() as chat:
        url = chat.url
    ended = kadr("generate", PROMPT, "--enhance", url)
    assert (ended.code, engine.written_requests) == (0, [Request(prompt=PROMPT)])
    assert "refuses the connection" in ended.err


def test_waiting_can_be_cancelled(kadr: Run, engine: FakeEngine, chat: FakeChat) -> None:
    def interrupt(asked: ChatRequest) -> Reply:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return Reply(delay_seconds=60.0)

    chat.reply = interrupt
    with assert_faster_than(10):
        ended = kadr("generate", PROMPT, "--enhance", chat.url)
    assert (ended.code, ended.out, engine.written_requests, os.listdir()) == (130, "", [], [])
    assert ended.err.splitlines()[-1] == "cancelled"


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_dry_run_asks_nobody_and_says_so(kadr: Run, chat: FakeChat, more: list[str]) -> None:
    ended = kadr("generate", PROMPT, "--model", "demo", "--enhance", chat.url, "--dry-run", *more)
    assert (ended.code, chat.requests) == (0, [])
    assert f"{chat.url} would enhance the prompt; a dry run does not call it" in ended.err
    assert PROMPT in ended.out
    assert not more or json.loads(ended.out)["request"]["original_prompt"] is None


@pytest.mark.parametrize(
    "words, says",
    [
        (("--image", "absent.png"), "absent.png"),
        (("--output", "no/such/folder/v.mp4"), "no/such/folder"),
        (("--steps", "0"), "steps"),
        (("--seconds", "-1"), "seconds"),
    ],
)
def test_what_is_refused_is_refused_before_the_endpoint_is_asked(
    kadr: Run, engine: FakeEngine, chat: FakeChat, words: tuple[str, ...], says: str
) -> None:
    ended = kadr("generate", PROMPT, "--enhance", chat.url, *words)
    assert (ended.code, chat.requests) == (1, [])
    assert says in ended.err


@pytest.mark.parametrize("words", ["--enhance-model m", "--enhance-required", "--enhance-timeout 5", "--enhance"])
def test_flags_without_an_endpoint_are_bad_usage(kadr: Run, engine: FakeEngine, words: str) -> None:
    ended = kadr("generate", PROMPT, *words.split())
    assert (ended.code, ended.out, engine.open_calls) == (2, "", [])
    assert words.split()[0] in ended.err


@pytest.mark.parametrize("url", ["localhost:11434", "", "http://h/v1#x"])
def test_what_is_no_url_is_refused_before_the_model_is_opened(kadr: Run, engine: FakeEngine, url: str) -> None:
    for more in ([], ["--dry-run"]):
        ended = kadr("generate", PROMPT, "--enhance", url, *more)
        assert (ended.code, ended.out, engine.open_calls) == (1, "", [])
        assert "It looks like http://localhost:11434/v1." in ended.err


def test_a_key_that_others_could_read_stops_the_run(
    kadr: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KADR_ENHANCE_KEY", KEY)
    ended = kadr("generate", PROMPT, "--enhance", "http://chat.example/v1")
    assert (ended.code, engine.open_calls) == (1, [])
    assert "unset KADR_ENHANCE_KEY" in ended.err
    assert KEY not in ended.err
