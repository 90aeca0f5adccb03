"""`kadr generate --enhance`: the video stores the prompt it was made with; a bad endpoint costs no video."""

from __future__ import annotations

import json
import os
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
    FakeChat,
    Reply,
    chat_completion,
    error_reply,
    serve_fake_chat,
)

Run = Callable[..., CommandResult]
PROMPT = "a red circle"
ENHANCED = "A red circle moves right on a black background."
KEY = "sk-very-secret-0123456789"
TINY = ("--model", "demo", "--size", "64x64", "--frames", "9", "--steps", "1", "--device", "cpu")


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChat]:
    monkeypatch.delenv("KADR_ENHANCE_KEY", raising=False)
    with serve_fake_chat() as chat:
        yield chat


def test_flags_and_key_variable_reach_the_endpoint(
    kadr: Run, engine: FakeEngine, chat: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KADR_ENHANCE_KEY", f" {KEY}\n")
    monkeypatch.setenv("OPENAI_API_KEY", "of another service")
    result = kadr("generate", PROMPT, "--enhance", chat.url, "--enhance-model", "m:4b", "--enhance-timeout", "9")
    assert (result.code, result.out) == (0, "out.mp4\n"), result.err
    (chat_request,) = chat.requests
    assert chat_request.body["model"] == "m:4b"
    assert chat_request.headers["Authorization"] == f"Bearer {KEY}"
    assert engine.written_requests == [Request(prompt=PARAGRAPH, original_prompt=PROMPT)]
    assert f"asking {chat.url} to enhance the prompt\nenhanced: {PARAGRAPH}\n" in result.err
    assert KEY not in result.err


def test_no_other_key_is_sent_without_kadr_enhance_key(
    kadr: Run, engine: FakeEngine, chat: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("KADR_ENHANCE_KEY", "")
    assert kadr("generate", PROMPT, "--enhance", chat.url).code == 0
    assert KEY not in str(chat.requests)
    assert "Authorization" not in chat.requests[0].headers


def test_enhancement_is_off_by_default(
    kadr: Run, engine: FakeEngine, chat: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KADR_ENHANCE_KEY", KEY)
    result = kadr("generate", PROMPT)
    assert engine.written_requests == [Request(prompt=PROMPT)]
    assert (chat.requests, "enhance" in result.err) == ([], False)


def test_rerun_uses_the_stored_prompt_and_calls_no_endpoint(kadr: Run, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    Image.new("RGB", (96, 64), (200, 30, 30)).save(tmp_path / "photo.png")
    with serve_fake_chat() as chat:
        chat.reply = chat_completion(f'<think>hm</think>Here is the prompt:\n"{ENHANCED}"')
        args = ("--enhance", chat.url, "--image", tmp_path / "photo.png", "--output", output, "--json")
        result = kadr("generate", PROMPT, *TINY, *args)
    assert result.code == 0, result.err
    assert len(chat.requests[0].images) == 1
    for request in (json.loads(result.out)["request"], read_metadata(output)["request"]):
        assert (request["prompt"], request["original_prompt"]) == (ENHANCED, PROMPT)
    rerun = kadr("rerun", output, "--output", tmp_path / "again.mp4")  # the endpoint no longer exists
    assert rerun.code == 0, rerun.err
    assert len(chat.requests) == 1
    assert (read_video(tmp_path / "again.mp4").frames == read_video(output).frames).all()
    assert read_metadata(tmp_path / "again.mp4")["request"] == read_metadata(output)["request"]
    unenhanced = kadr(
        "generate", ENHANCED, *TINY, "--image", tmp_path / "photo.png", "--output", tmp_path / "unenhanced.mp4"
    )
    assert unenhanced.code == 0, unenhanced.err
    assert (read_video(tmp_path / "unenhanced.mp4").frames == read_video(output).frames).all()


def test_long_video_resumes_with_its_enhanced_prompt(
    kadr: Run, engine: FakeEngine, chat: FakeChat, tmp_path: Path
) -> None:
    windows = tmp_path / "out.windows"
    windows.mkdir()
    stored = Request(prompt=ENHANCED, original_prompt=PROMPT)
    (windows / "request.json").write_text(json.dumps({"request": stored.to_json()}))
    args = ("--enhance", chat.url, "--window", "9", "--output", tmp_path / "out.mp4", "--resume")
    for flags in (args, args[2:]):  # the second time without --enhance
        result = kadr("generate", PROMPT, *flags)
        assert result.code == 0, result.err
        assert (engine.written_requests[-1].prompt, engine.written_requests[-1].original_prompt) == (
            ENHANCED,
            PROMPT,
        )
        assert f"enhanced when the video began: {ENHANCED}" in result.err
    assert chat.requests == []
    assert kadr("generate", "other words", *args).code == 0
    assert len(chat.requests) == 1  # for another video; the engine refuses the folder


def test_long_video_begun_without_enhancement_resumes_without(
    kadr: Run, engine: FakeEngine, chat: FakeChat, tmp_path: Path
) -> None:
    """The endpoint failed when the video was begun, and works now."""
    windows = tmp_path / "out.windows"
    windows.mkdir()
    (windows / "request.json").write_text(json.dumps({"request": Request(prompt=PROMPT).to_json()}))
    args = ("--enhance", chat.url, "--window", "9", "--output", tmp_path / "out.mp4", "--resume")
    assert kadr("generate", PROMPT, *args).code == 0
    assert (engine.written_requests[-1].prompt, engine.written_requests[-1].original_prompt) == (PROMPT, None)
    assert chat.requests == []


def test_endpoint_is_not_called_for_an_impossible_video(
    kadr: Run, engine: FakeEngine, chat: FakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, enhance = ("--window", "9"), ("--enhance", chat.url)
    (tmp_path / "a.windows").mkdir()
    (tmp_path / "a.windows" / "window-0001.safetensors").touch()
    (tmp_path / "a.windows" / "request.json").write_text("{}")
    unfinished = kadr("generate", PROMPT, *windows, "--frames", "25", *enhance, "--output", tmp_path / "a.mp4")
    assert "holds 1 finished window of an unfinished video" in unfinished.err
    three_prompts = kadr("generate", "--prompt", "one", "--prompt", "two", "--prompt", "three", *windows, *enhance)
    assert three_prompts.code == 0  # a window for each
    chat.requests.clear()
    assert "4 prompts are given" in kadr("generate", "a | b | c | d", *windows, "--frames", "9", *enhance).err

    def refuse(request: Request) -> None:
        raise RequestError("it does not fit")

    monkeypatch.setattr(engine, "plan", refuse)
    assert "it does not fit" in kadr("generate", PROMPT, "--enhance", chat.url).err
    assert chat.requests == []


def test_failure_is_a_warning_and_keeps_the_users_prompt(kadr: Run, tmp_path: Path, chat: FakeChat) -> None:
    output = tmp_path / "out.mp4"
    chat.reply = error_reply(429, "You exceeded your quota.")
    result = kadr("generate", PROMPT, *TINY, "--enhance", chat.url, "--output", output)
    assert (result.code, result.out) == (0, f"{output}\n"), result.err
    (line,) = [line for line in result.err.splitlines() if line.startswith("warning: ")]
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
def test_bad_endpoint_is_a_warning_or_an_error_if_required(
    kadr: Run, engine: FakeEngine, chat: FakeChat, reply: Reply, required: bool
) -> None:
    chat.reply = reply
    args = ("--enhance-timeout", "0.3", *(["--enhance-required"] if required else []))
    result = kadr("generate", PROMPT, "--enhance", chat.url, *args)
    if required:
        assert (result.code, result.out, engine.written_requests, os.listdir()) == (1, "", [], [])
        assert result.err.splitlines()[-1].startswith(f"error: the prompt was not enhanced: {chat.url} ")
    else:
        assert (result.code, result.out, engine.written_requests) == (0, "out.mp4\n", [Request(prompt=PROMPT)])
        assert f"warning: the prompt was not enhanced: {chat.url} " in result.err


def test_a_server_that_is_down_is_a_warning(kadr: Run, engine: FakeEngine) -> None:
    with serve_fake_chat() as chat:
        url = chat.url
    result = kadr("generate", PROMPT, "--enhance", url)
    assert (result.code, engine.written_requests) == (0, [Request(prompt=PROMPT)])
    assert "refuses the connection" in result.err


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_dry_run_calls_no_endpoint_and_says_so(kadr: Run, chat: FakeChat, json_flag: list[str]) -> None:
    result = kadr("generate", PROMPT, "--model", "demo", "--enhance", chat.url, "--dry-run", *json_flag)
    assert (result.code, chat.requests) == (0, [])
    assert f"{chat.url} would enhance the prompt; a dry run does not call it" in result.err
    assert PROMPT in result.out
    assert not json_flag or json.loads(result.out)["request"]["original_prompt"] is None


@pytest.mark.parametrize(
    "args, message",
    [
        (("--image", "absent.png"), "absent.png"),
        (("--output", "no/such/folder/v.mp4"), "no/such/folder"),
        (("--steps", "0"), "steps"),
        (("--seconds", "-1"), "seconds"),
    ],
)
def test_bad_request_is_refused_before_the_endpoint_is_called(
    kadr: Run, engine: FakeEngine, chat: FakeChat, args: tuple[str, ...], message: str
) -> None:
    result = kadr("generate", PROMPT, "--enhance", chat.url, *args)
    assert (result.code, chat.requests) == (1, [])
    assert message in result.err


@pytest.mark.parametrize("args", ["--enhance-model m", "--enhance-required", "--enhance-timeout 5", "--enhance"])
def test_flags_without_an_endpoint_are_bad_usage(kadr: Run, engine: FakeEngine, args: str) -> None:
    result = kadr("generate", PROMPT, *args.split())
    assert (result.code, result.out, engine.open_calls) == (2, "", [])
    assert args.split()[0] in result.err


@pytest.mark.parametrize("url", ["localhost:11434", "", "http://h/v1#x"])
def test_malformed_url_is_refused_before_the_model_is_opened(kadr: Run, engine: FakeEngine, url: str) -> None:
    for dry_run in ([], ["--dry-run"]):
        result = kadr("generate", PROMPT, "--enhance", url, *dry_run)
        assert (result.code, result.out, engine.open_calls) == (1, "", [])
        assert "It looks like http://localhost:11434/v1." in result.err


def test_key_over_plain_http_is_refused(kadr: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KADR_ENHANCE_KEY", KEY)
    result = kadr("generate", PROMPT, "--enhance", "http://chat.example/v1")
    assert (result.code, engine.open_calls) == (1, [])
    assert "unset KADR_ENHANCE_KEY" in result.err
    assert KEY not in result.err
