"""Prompt enhancement against a real HTTP server on this machine, well-behaved or not."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from kadr import Enhancer
from kadr.errors import EnhanceError, KadrWarning, RequestError
from kadr.text.chat_completion import MAX_WORDS, UnusableAnswer, extract_paragraph
from kadr.text.chat_messages import ChatImage
from kadr.text.enhance import MAX_RESPONSE_BYTES
from tests.fakechat import (
    PARAGRAPH,
    ChatRequest,
    FakeChat,
    Reply,
    assert_faster_than,
    chat_completion,
    error_reply,
    json_reply,
    serve_fake_chat,
)

PROMPT = 'a red fox in snow, a sign says "ЗИМА"'
KEY = "sk-very-secret-0123456789"
IMAGES = [ChatImage(b"\xff\xd8first", "the first frame of the video"), ChatImage(b"\xff\xd8last", "the last frame")]
TIMEOUT = 0.3  # seconds
SOON_SECONDS = 10.0  # seconds: far more than a client needs that times out, less than a slow server takes


@pytest.fixture
def chat() -> Iterator[FakeChat]:
    with serve_fake_chat() as chat:
        yield chat


def failure(chat: FakeChat, reply: Reply, **options: Any) -> str:
    """Returns the error message for an answer."""
    chat.reply = reply
    with pytest.raises(EnhanceError) as caught:
        Enhancer(chat.url, **options).enhance(PROMPT)
    message = str(caught.value)
    assert message.startswith(f"the prompt was not enhanced: {chat.url} ")
    assert message.endswith(".")
    assert "\n" not in message
    assert caught.value.__cause__ is None
    return message


# --- the request --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["", "/", "/chat/completions", "/chat/completions/"])
def test_the_url_may_end_in_v1_or_chat_completions(chat: FakeChat, tail: str) -> None:
    assert Enhancer(chat.url + tail).enhance(PROMPT) == PARAGRAPH
    assert (chat.requests[0].method, chat.requests[0].path) == ("POST", "/v1/chat/completions")


def test_a_url_query_is_sent_and_stays_out_of_messages(chat: FakeChat) -> None:
    url = f"{chat.url}?api-version=3&code=abc"
    assert Enhancer(url).enhance(PROMPT) == PARAGRAPH
    assert chat.requests[0].path == "/v1/chat/completions?api-version=3&code=abc"
    assert Enhancer(url).display_url == chat.url


def test_the_whole_prompt_is_sent_with_instructions(chat: FakeChat) -> None:
    Enhancer(chat.url, "some-model:4b").enhance(PROMPT)
    (request,) = chat.requests
    assert request.body.keys() == {"model", "messages", "stream"}
    assert (request.body["model"], request.body["stream"]) == ("some-model:4b", False)
    assert [message["role"] for message in request.body["messages"]] == ["system", "user"]
    assert request.text == f"The request:\n{PROMPT}"
    assert "one flowing paragraph" in request.system
    assert "held to pictures" not in request.system
    assert "Authorization" not in request.headers


def test_no_model_name_is_sent_by_default(chat: FakeChat) -> None:
    Enhancer(chat.url).enhance(PROMPT)
    assert "model" not in chat.requests[0].body


def test_the_key_is_in_one_header_and_nowhere_else(chat: FakeChat) -> None:
    enhancer = Enhancer(chat.url, key=KEY)
    assert KEY not in repr(enhancer)
    enhancer.enhance(PROMPT)
    (request,) = chat.requests
    assert request.headers.pop("Authorization") == f"Bearer {KEY}"
    assert KEY not in str(request)


@pytest.mark.parametrize(
    "reply",
    [
        error_reply(401, f"Incorrect API key provided: {KEY}"),
        error_reply(400, f"{'long ' * 38}{KEY}"),  # cut in its middle
        Reply(f"no {KEY}".encode(), 500),
        Reply(status=307, headers={"Location": f"http://127.0.0.1:9/?key={KEY}"}),
        chat_completion(f"{{{KEY}}}"),
        chat_completion(KEY),
        json_reply({"error": KEY}),
    ],
)
def test_a_key_repeated_by_the_endpoint_is_in_no_message(chat: FakeChat, reply: Reply) -> None:
    message = failure(chat, reply, key=KEY)
    assert KEY[:6] not in message


def test_a_key_repeated_by_the_endpoint_is_not_in_the_prompt(chat: FakeChat) -> None:
    chat.reply = chat_completion(f"A fox runs past a wall that says {KEY} in the snow.")
    assert Enhancer(chat.url, key=KEY).enhance(PROMPT) == "A fox runs past a wall that says (the key) in the snow."


# --- images and scenes --------------------------------------------------------------------------------------------


def test_images_are_sent_after_their_frame_descriptions(chat: FakeChat) -> None:
    Enhancer(chat.url).enhance(PROMPT, IMAGES)
    (request,) = chat.requests
    assert [part["type"] for part in request.content_parts] == ["text", "image_url", "text", "image_url", "text"]
    assert request.content_parts[0]["text"] == "Picture 1 is the first frame of the video:"
    assert request.images == ["data:image/jpeg;base64,/9hmaXJzdA==", "data:image/jpeg;base64,/9hsYXN0"]
    assert "that you are shown" in request.system


@pytest.mark.parametrize(
    "refusal",
    [
        error_reply(400, "Invalid content type. image_url is only supported by certain models."),
        error_reply(413, "too much"),
        error_reply(415, ""),
        error_reply(422, "messages.1.content: Input should be a valid string"),
        error_reply(500, "image input is not supported - hint: you may need to provide the mmproj"),
        error_reply(404, "No endpoints found that support image input"),
    ],
)
def test_an_endpoint_that_refuses_images_is_called_again_without_them(chat: FakeChat, refusal: Reply) -> None:
    chat.reply = lambda request: refusal if request.images else chat_completion(PARAGRAPH)
    with pytest.warns(KadrWarning, match=rf"takes no images: .* HTTP {refusal.status}"):
        assert Enhancer(chat.url).enhance(PROMPT, IMAGES) == PARAGRAPH
    first, second = chat.requests
    assert (len(first.images), second.images) == (2, [])
    assert "that you cannot be shown" in second.system


@pytest.mark.parametrize("status", [401, 403, 404, 408, 429, 502, 503])
def test_errors_unrelated_to_images_are_not_retried(chat: FakeChat, status: int) -> None:
    chat.reply = error_reply(status, "no")
    with pytest.raises(EnhanceError, match=f"HTTP {status}"):
        Enhancer(chat.url).enhance(PROMPT, IMAGES)
    assert len(chat.requests) == 1


@pytest.mark.parametrize("status", [400, 500])
def test_without_images_an_error_is_not_retried(chat: FakeChat, status: int) -> None:
    failure(chat, error_reply(status, "no"))
    assert len(chat.requests) == 1


def test_an_endpoint_that_fails_without_images_too_raises(chat: FakeChat) -> None:
    chat.reply = error_reply(400, "no")
    with warnings.catch_warnings(record=True) as warned, pytest.raises(EnhanceError, match="HTTP 400"):
        Enhancer(chat.url, "m").enhance(PROMPT, IMAGES)
    assert (len(chat.requests), warned) == (2, [])


def test_each_scene_is_requested_with_the_others_as_context(chat: FakeChat) -> None:
    chat.reply = lambda request: chat_completion(f"A long and whole scene of number {len(chat.requests)}.")
    enhanced = Enhancer(chat.url).enhance_scenes(["a fox", "a hare", "an owl"])
    assert enhanced == [f"A long and whole scene of number {number}." for number in (1, 2, 3)]
    first, second, third = (request.text for request in chat.requests)
    assert "Write scene 2 alone" in second
    assert second.endswith("The request:\na hare")
    assert "Scene 1: A long and whole scene of number 1.\nScene 3: an owl" in second
    assert "Scene 2: a hare\nScene 3: an owl" in first
    assert "Scene 3" not in third


def test_after_a_refusal_later_scenes_are_sent_without_images(chat: FakeChat) -> None:
    chat.reply = lambda request: error_reply(400, "no images") if request.images else chat_completion(PARAGRAPH)
    with pytest.warns(KadrWarning, match="takes no images") as warned:
        Enhancer(chat.url).enhance_scenes(["a fox", "a hare"], IMAGES)
    assert [len(request.images) for request in chat.requests] == [2, 0, 0]
    assert len(warned) == 1
    assert all("cannot be shown" in request.system for request in chat.requests[1:])


def test_one_failed_scene_fails_all(chat: FakeChat) -> None:
    chat.reply = lambda request: chat_completion(PARAGRAPH if len(chat.requests) < 2 else "")
    with pytest.raises(EnhanceError, match="answered with nothing"):
        Enhancer(chat.url).enhance_scenes(["a fox", "a hare", "an owl"])
    assert len(chat.requests) == 2


# --- slow, down, refusing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        Reply(chat_completion(PARAGRAPH).body, delay_seconds=60.0),
        Reply(chat_completion(PARAGRAPH).body, byte_interval=0.2),
        Reply(chat_completion(PARAGRAPH).body, header_interval=0.2),
        Reply(error_reply(500, "long" * 99).body, status=500, byte_interval=0.2),
    ],
    ids=["silent", "slow body", "slow headers", "slow error"],
)
def test_a_slow_answer_times_out(chat: FakeChat, reply: Reply) -> None:
    with assert_faster_than(SOON_SECONDS):
        assert "did not answer within 0.3 s" in failure(chat, reply, timeout=TIMEOUT)


def test_the_thread_of_an_abandoned_answer_ends(chat: FakeChat) -> None:
    before = set(threading.enumerate())
    failure(chat, Reply(chat_completion(PARAGRAPH).body, byte_interval=0.2), timeout=TIMEOUT)
    (thread,) = [new for new in set(threading.enumerate()) - before if new.name == "kadr enhance"]
    thread.join(SOON_SECONDS)
    assert not thread.is_alive()


def test_the_retry_without_images_has_the_remaining_time(chat: FakeChat) -> None:
    chat.reply = lambda request: (
        Reply(error_reply(400, "no").body, 400, delay_seconds=0.2) if request.images else Reply(delay_seconds=60.0)
    )
    with assert_faster_than(SOON_SECONDS), pytest.raises(EnhanceError, match="within 1 s"):
        Enhancer(chat.url, "m", timeout=1.0).enhance(PROMPT, IMAGES)
    assert len(chat.requests) == 2


def test_a_slow_dns_lookup_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: threading.Event().wait(30))
    with assert_faster_than(SOON_SECONDS), pytest.raises(EnhanceError, match="did not answer within"):
        Enhancer("https://chat.example/v1", timeout=TIMEOUT).enhance(PROMPT)


def test_an_unknown_host_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any, **more: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(EnhanceError, match=r"cannot be reached \(Name or service not known\); check the address"):
        Enhancer("https://chat.example/v1").enhance(PROMPT)


def test_a_refused_connection_is_reported() -> None:
    with serve_fake_chat() as chat:
        url = chat.url
    with pytest.raises(EnhanceError, match=r"refuses the connection; is it running, and is the port right\?"):
        Enhancer(url).enhance(PROMPT)


def test_a_server_without_tls_is_reported(chat: FakeChat) -> None:
    with pytest.raises(EnhanceError, match=r"over TLS .* http or https"):
        Enhancer(chat.url.replace("http:", "https:"), timeout=SOON_SECONDS).enhance(PROMPT)


@pytest.mark.parametrize(
    "reply, words",
    [
        (error_reply(401, "No key."), ["HTTP 401 (No key)", "KADR_ENHANCE_KEY"]),
        (error_reply(403, "No."), ["HTTP 403 (No)", "KADR_ENHANCE_KEY"]),
        (error_reply(404, 'model "x" not found, try pulling it first'), ["HTTP 404", "try pulling it first", "/v1"]),
        (error_reply(429, "You exceeded your current quota"), ["HTTP 429", "exceeded", "account"]),
        (error_reply(500, "out of memory"), ["HTTP 500 (out of memory)"]),
        (json_reply({"error": "a string"}, 400), ["HTTP 400 (a string; no model was named)"]),
        (json_reply({"message": "plain"}, 400), ["(plain; no model was named)"]),
        (json_reply({"detail": [{"msg": "field required"}]}, 422), ["field required"]),
        (json_reply(["odd"], 500), ['HTTP 500 (["odd"])']),
        (Reply(b"<html><body>Bad Gateway</body></html>", 502), ["HTTP 502."]),
        (Reply(b"upstream\n\x1b[31mfailed\x00", 503), ["HTTP 503 (upstream [31mfailed)"]),
        (Reply(b"", 400), ["HTTP 400 (no model was named)"]),
        (Reply(b"\xff\xfe", 500), ["HTTP 500"]),
        (error_reply(500, "x" * 5000), ["HTTP 500", "x..."]),
        (Reply(b"y" * (MAX_RESPONSE_BYTES + 9), 500), ["HTTP 500."]),
    ],
)
def test_an_error_quotes_the_endpoint_briefly(chat: FakeChat, reply: Reply, words: list[str]) -> None:
    message = failure(chat, reply)
    assert [word for word in words if word not in message] == []
    assert len(message) < 500
    assert message.isprintable()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_reported_and_not_followed(chat: FakeChat, status: int) -> None:
    with serve_fake_chat() as other:
        message = failure(chat, Reply(status=status, headers={"Location": f"{other.url}/chat/completions"}), key=KEY)
        assert f"{other.url}/chat/completions" in message
        assert (len(chat.requests), other.requests) == (1, [])


def test_proxies_are_not_used_for_this_machine(chat: FakeChat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert Enhancer(chat.url).enhance(PROMPT) == PARAGRAPH


# --- unusable answers ---------------------------------------------------------------------------------------------

UNUSABLE_ANSWERS: dict[str, tuple[Reply, str]] = {
    "no bytes": (Reply(b""), "answered with nothing, not JSON"),
    "HTML": (Reply(b"<!doctype html><title>hi</title>"), "answered with HTML, not JSON"),
    "not JSON": (Reply(b"A fox runs."), "answered with something else, not JSON"),
    "not text": (Reply(bytes(range(256))), "not JSON"),
    "cut JSON": (
        Reply(chat_completion(PARAGRAPH).body, truncate_at=40),
        "closed the connection before its answer was complete.",
    ),
    "one endless word": (
        chat_completion("A fox runs fast " + "y" * 9000),
        "not a description: 'A fox runs fast yyy",
    ),
    "no spaces": (chat_completion("y" * 100_000), "not a description"),
    "another script": (
        chat_completion("一只红色的小狐狸从左到右在新雪中小跑，" * 9),
        "a script that the text encoder cannot read",
    ),
    "a stream": (Reply(b'data: {"choices": []}\n\n'), "answered with a stream of events"),
    "deep JSON": (Reply(b"[" * 200_000), "JSON"),
    "not HTTP": (Reply(raw_bytes=b"SSH-2.0-OpenSSH_9.6\r\n"), "does not speak HTTP"),
    "hung up": (Reply(raw_bytes=b""), "closed the connection"),
    "a bad chunk": (
        Reply(raw_bytes=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        "closed the connection",
    ),
    "too much": (Reply(b" " * (MAX_RESPONSE_BYTES + 1)), "more than 1 MB"),
    "a number": (json_reply(5), "without choices"),
    "null": (json_reply(None), "without choices"),
    "no choices": (json_reply({"id": 1}), "without choices"),
    "empty choices": (json_reply({"choices": []}), "without choices"),
    "odd choices": (json_reply({"choices": ["x"]}), "without choices"),
    "choices of another kind": (json_reply({"choices": {"0": 1}}), "without choices"),
    "no message": (json_reply({"choices": [{}]}), "answered with nothing"),
    "odd message": (json_reply({"choices": [{"message": "x"}]}), "answered with nothing"),
    "an error that is no status": (json_reply({"error": {"message": "overloaded"}}), "with an error: overloaded"),
    "null content": (chat_completion(None), "answered with nothing"),
    "empty": (chat_completion(""), "answered with nothing"),
    "space": (chat_completion(" \n\t"), "answered with nothing"),
    "a number for text": (chat_completion(7), "not text: 7"),
    "an object for text": (chat_completion({"a": 1}), "not text"),
    "no part of text": (chat_completion([{"type": "image"}]), "answered with nothing"),
    "half a character": (chat_completion("A fox \ud83d runs in the snow."), "half a character"),
    "a refusal": (chat_completion(None, refusal="I can't help with that."), "declined: I can't help with that."),
    "a refusal in words": (chat_completion("I’m sorry, but I can’t assist with this request."), "declined: I’m sorry"),
    "another": (chat_completion("I cannot create content that shows foxes in the snow."), "declined: I cannot"),
    "a filter": (chat_completion("", "content_filter"), "filter"),
    "a cut answer": (chat_completion("A fox runs through the snow and", "length"), "cut its answer off"),
    "reasoning only": (chat_completion("<think>The user wants a fox. Let me see.</think>\n"), "reasoning only"),
    "thoughts without an end": (chat_completion("<think>The user wants a fox. Let me see."), "reasoning only"),
    "the same words": (chat_completion(f'"{PROMPT}"'), "returned the same words"),
    "hardly other words": (chat_completion('A red fox in snow; a sign says: "ЗИМА".'), "returned the same words"),
    "OK": (chat_completion("Sure!"), "not a description: 'Sure!'"),
    "JSON in text": (
        chat_completion('```json\n{"prompt": "a fox runs in snow"}\n```'),
        "data instead of a description",
    ),
    "HTML in text": (chat_completion("<div>a fox runs through the snow</div>"), "data instead of a description"),
    "fences alone": (chat_completion("```\n```"), "answered with nothing"),
    "a heading alone": (chat_completion("**Enhanced prompt:**"), "answered with nothing"),
    "bars alone": (chat_completion("| | |"), "answered with nothing"),
    "one endless sentence": (chat_completion("a fox runs and " * 200), "800 words"),
}


@pytest.mark.parametrize("key", ["x", "none", "key", "content", "token123"])
def test_a_placeholder_key_is_not_redacted(chat: FakeChat, key: str) -> None:
    """Users give servers without keys any word."""
    text = PARAGRAPH.replace("fox", "fox, the content key, none of token123 x")
    chat.reply = chat_completion(text)
    assert Enhancer(chat.url, key=key).enhance("a red fox") == text


def prompt_or_message(chat: FakeChat, reply: Reply, key: str) -> str:
    """Returns the enhanced prompt, or the error message."""
    chat.reply = reply
    try:
        return Enhancer(chat.url, key=key).enhance("a red fox")
    except EnhanceError as error:
        return str(error)


def test_a_key_is_redacted_however_json_escapes_it(chat: FakeChat) -> None:
    key = "c2Vj/cmV0+a/0123=="
    body = json.dumps({"error": {"message": f"bad key {key}"}}).replace("/", "\\/")
    for reply in (Reply(body.encode(), 401), chat_completion(f"{PARAGRAPH} {key}")):
        text = prompt_or_message(chat, reply, key)
        assert "(the key)" in text
        assert key not in text


@pytest.mark.parametrize(
    "noise", ["\n", "\n ", " \n", "\nnote ", "<think>", "**", "- ", '"', "Here is ", "```\n", "sorry "]
)
def test_an_answer_of_any_shape_is_parsed_fast(noise: str) -> None:
    """An endpoint may send a megabyte of anything."""
    times = 300_000 // len(noise)
    with assert_faster_than(5):
        for text in (noise * times, PARAGRAPH + noise * times + "x", noise * times + PARAGRAPH):
            with suppress(UnusableAnswer):
                extract_paragraph(text)


def test_removing_control_characters_does_not_reveal_a_key(chat: FakeChat) -> None:
    key = "sk-abcdefghij1234"
    for reply in (
        error_reply(401, "bad key sk-abcdef\u0007ghij1234"),
        chat_completion(f"{PARAGRAPH} sk-abcdef\u0007ghij1234"),
    ):
        text = prompt_or_message(chat, reply, key)
        assert "(the key)" in text
        assert key not in text


@pytest.mark.parametrize(
    "answer",
    [
        'This is a close-up of a neon sign that slowly lights up with the words: "OPEN" and a fox runs past it.',
        "Sorry! reads the sign in the shop window while a fox runs past it in the snow.",
        "Here is where the river bends, and a fox drinks: its red coat shines in the low sun.",
    ],
)
def test_a_description_keeps_its_beginning(chat: FakeChat, answer: str) -> None:
    chat.reply = chat_completion(answer)
    assert Enhancer(chat.url).enhance("a red fox") == answer


def test_a_long_prompt_may_be_returned_unchanged_and_a_short_one_not(chat: FakeChat) -> None:
    long = (
        f"{PARAGRAPH} It stops at the edge of the wood and looks back over its shoulder, and snow falls from a branch."
    )
    chat.reply = chat_completion(long)
    assert Enhancer(chat.url).enhance(long) == long
    chat.reply = chat_completion("a red fox runs")
    with pytest.raises(EnhanceError, match="returned the same words"):
        Enhancer(chat.url).enhance("A red fox runs.")


def test_a_message_ends_in_one_mark(chat: FakeChat) -> None:
    with serve_fake_chat() as other:
        url = other.url
    with pytest.raises(EnhanceError, match=r"is the port right\?$"):
        Enhancer(url).enhance("a red fox")


@pytest.mark.parametrize("reply, words", UNUSABLE_ANSWERS.values(), ids=UNUSABLE_ANSWERS)
def test_an_unusable_answer_is_reported_and_never_a_prompt(chat: FakeChat, reply: Reply, words: str) -> None:
    message = failure(chat, reply, timeout=SOON_SECONDS)
    assert words in message
    assert len(message) < 500


# --- clean-up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        f"  {PARAGRAPH}\n",
        PARAGRAPH.replace(", ", ",\n\n"),
        f'"{PARAGRAPH}"',
        f"“{PARAGRAPH}”",
        f"Prompt: '{PARAGRAPH}'",
        f"'{PARAGRAPH}'",
        f"```\n{PARAGRAPH}\n```",
        f"```text\n{PARAGRAPH}\n```",
        f"<think>\nA fox. Short.\n</think>\n\n{PARAGRAPH}",
        f"A fox. Short.\n</think>\n{PARAGRAPH}",
        f"Prompt: {PARAGRAPH}",
        f"**Prompt:** {PARAGRAPH}",
        f"### Enhanced Video Prompt:\n\n{PARAGRAPH}",
        f"Here is the enhanced prompt:\n\n{PARAGRAPH}",
        f"Here's a detailed paragraph for your video:\n{PARAGRAPH}",
        f'Sure! Here is your prompt: "{PARAGRAPH}"',
        f"Certainly, here are the words you asked for:\n> {PARAGRAPH}",
        f"{PARAGRAPH}\n\nLet me know if you would like another version!",
        f"{PARAGRAPH}\n\n(Word count: 37)",
        f"- {PARAGRAPH}",
        f"[THINK]A fox. Short.[/THINK]{PARAGRAPH}",
        f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{PARAGRAPH}<|return|>",
        PARAGRAPH.replace(" while", " | while"),
        PARAGRAPH.replace(" while", "\x00 \x1bwhile"),
        PARAGRAPH.replace("red", "**red**"),
    ],
)
def test_text_around_the_paragraph_is_removed(chat: FakeChat, answer: str) -> None:
    chat.reply = chat_completion(answer)
    assert Enhancer(chat.url).enhance(PROMPT) == PARAGRAPH


@pytest.mark.parametrize(
    "answer",
    [
        '"OPEN" glows on a red sign, and beside it "CLOSED"',
        "A sign reads: here is the prompt of the day",
        'A woman says "I\'m sorry" and closes the door.',
        "Der Fuchs läuft über den Schnee, 狐は走る.",
        "Thinking hard, a man sits before 3 < 4 on a blackboard.",
        "The family's fox runs past the owners' house",
    ],
)
def test_text_within_the_paragraph_is_kept(chat: FakeChat, answer: str) -> None:
    chat.reply = chat_completion(answer)
    assert Enhancer(chat.url).enhance(PROMPT) == answer


def test_quotes_around_a_paragraph_with_quotes_are_removed(chat: FakeChat) -> None:
    for begin, end in ('""', "“”"):
        inner = f"A fox walks past a sign that says {begin}ЗИМА{end}"
        chat.reply = chat_completion(f"{begin}{inner}{end}")
        assert Enhancer(chat.url).enhance("a fox") == inner


def test_content_parts_are_joined(chat: FakeChat) -> None:
    half = PARAGRAPH.index("while")
    parts = [{"type": "text", "text": PARAGRAPH[:half]}, {"type": "text", "text": PARAGRAPH[half:]}]
    chat.reply = chat_completion([{"type": "reasoning", "summary": []}, *parts])
    assert Enhancer(chat.url).enhance(PROMPT) == PARAGRAPH


def test_a_long_answer_is_cut_after_a_sentence_with_a_warning(chat: FakeChat) -> None:
    sentence = "The fox turns its head and walks on through the snow."  # 11 words
    chat.reply = chat_completion(" ".join([sentence] * 30))
    with pytest.warns(KadrWarning, match=f"330 words.*{MAX_WORDS // 11 * 11} words"):
        enhanced = Enhancer(chat.url).enhance(PROMPT)
    assert enhanced == " ".join([sentence] * (MAX_WORDS // 11))


def test_an_answer_that_just_fits_is_not_cut(chat: FakeChat) -> None:
    chat.reply = chat_completion(" ".join(["word"] * MAX_WORDS))
    assert len(Enhancer(chat.url).enhance(PROMPT).split()) == MAX_WORDS


# --- refused at construction --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["", "localhost:11434/v1", "ftp://localhost/v1", "http://", "http:///v1", "http://a b/v1", "http://h:port/v1", None]
    + [
        "http://h:99999/v1",
        "http://h/v1#part",
        "http://[::1/v1",
        "http://h/ключ",
        "file:///etc/passwd",
        "http://h\n/v1",
    ],
)
def test_an_invalid_url_is_refused(url: Any) -> None:
    with pytest.raises(RequestError, match=r"It looks like http://localhost:11434/v1\."):
        Enhancer(url)


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(RequestError, match="KADR_ENHANCE_KEY") as caught:
        Enhancer("https://me:hunter2@chat.example/v1")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("host", ["chat.example", "192.168.1.5:8000", "localhost.example", "0.0.0.0", "[fe80::1]"])
def test_a_key_is_not_sent_where_others_can_read_it(host: str) -> None:
    with pytest.raises(RequestError, match="everyone on the way could read it") as caught:
        Enhancer(f"http://{host}/v1", key=KEY)
    assert KEY not in str(caught.value)
    Enhancer(f"http://{host}/v1")
    Enhancer(f"https://{host}/v1", key=KEY)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:9", "127.8.8.8", "[::1]:8080"])
def test_a_key_may_be_sent_to_this_machine(host: str) -> None:
    Enhancer(f"http://{host}/v1", key=KEY)


@pytest.mark.parametrize("key", ["", "two words", "line\nend", "ключ", 5])
def test_an_invalid_key_is_refused_and_not_repeated(key: Any) -> None:
    with pytest.raises(RequestError, match="KADR_ENHANCE_KEY") as caught:
        Enhancer("https://chat.example/v1", key=key)
    assert not key or repr(key).strip("'") not in str(caught.value)


@pytest.mark.parametrize(
    "option", [{"timeout": 0}, {"timeout": -1.0}, {"timeout": float("nan")}, {"timeout": 3601}, {"timeout": "60"}]
    + [{"model": ""}, {"model": "  "}, {"model": 5}],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(option))):
        Enhancer("https://chat.example/v1", **option)


def test_the_fake_server_speaks_http_over_a_socket(chat: FakeChat) -> None:
    """The other tests rely on it: bytes over a socket of this machine."""
    with socket.create_connection(("127.0.0.1", int(chat.url.split(":")[2].removesuffix("/v1")))) as line:
        line.sendall(b"GET /v1/chat/completions HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: line.recv(4096), b""))
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] == PARAGRAPH
    assert isinstance(chat.requests[0], ChatRequest)
    assert issubclass(http.server.ThreadingHTTPServer, http.server.HTTPServer)
