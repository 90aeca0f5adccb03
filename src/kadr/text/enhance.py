"""Prompts written out by a chat model, behind any endpoint that speaks as OpenAI's chat completions do.

The second and last module that touches the network, beside `checkpoints/hub.py`: where an endpoint is named, and no
other host than that one.
"""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Overdue
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from kadr.errors import EnhanceError, KadrWarning, RequestError
from kadr.text.chat_completion import (
    MAX_WORDS,
    Redact,
    UnusableAnswer,
    completion_text,
    error_message,
    extract_paragraph,
    sanitize,
    split_words,
    truncate_to_sentences,
)
from kadr.text.chat_messages import ChatImage, build_messages
from kadr.text.endpoint import KEY_VARIABLE, check_key, completions_url, is_loopback, parse_endpoint_url, redact_url
from kadr.version import __version__

DEFAULT_TIMEOUT = 60.0  # seconds
MAX_TIMEOUT = 3600.0
MAX_RESPONSE_BYTES = 1 << 20  # bytes of an answer
MIN_KEY_LENGTH = 12  # letters: a shorter key is a word that servers without keys are given, and may stand in any text
DETAILED_PROMPT_WORDS = 40  # words: a prompt that has as many may be given back as it is
_STATUS_ADVICE = {
    401: f"; give it its key, on the command line in {KEY_VARIABLE} in the environment",
    403: f"; give it its key, on the command line in {KEY_VARIABLE} in the environment",
    404: "; check the model's name, and the URL: that of most endpoints ends in /v1",
    429: "; wait, or see what the account has left",
}


class _HTTPStatusError(UnusableAnswer):
    """The endpoint answered with an error.

    Args:
        reason: what it says itself; "" where it says nothing.
    """

    def __init__(self, status: int, reason: str) -> None:
        self.summary = f"HTTP {status}{f' ({reason})' if reason else ''}"
        super().__init__(f"answered with {self.summary}{_STATUS_ADVICE.get(status, '')}")
        self.status, self.reason = status, reason

    @property
    def may_reject_images(self) -> bool:
        """Whether it may be about pictures: llama.cpp answers 500 to them, routers 404 that speaks of images."""
        if self.status in (401, 403, 429):
            return False
        usual = self.status == 500 or (400 <= self.status < 500 and self.status not in (404, 408))
        return usual or "image" in self.reason.lower()


@dataclass(frozen=True)
class Enhancer:
    """An endpoint that writes prompts out.

    Args:
        url: of the endpoint, such as http://localhost:11434/v1; with or without /chat/completions.
        model: the name by which the endpoint knows it; None sends none, which endpoints with one model take.
        key: sent as a bearer token, over https or to this machine alone. It is in no message and no repr.
        required: `kadr.enhance_prompt` raises where the endpoint fails, instead of going on with the user's own words.
        timeout: seconds for each answer, from the look-up of the name to the last byte; a second try without pictures
            has what is left of them.

    Raises:
        RequestError: a URL that is none, or that the key must not be sent to; a timeout out of its range.
    """

    url: str
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    required: bool = False
    timeout: float = DEFAULT_TIMEOUT

    def __post_init__(self) -> None:
        address = parse_endpoint_url(self.url)
        if self.model is not None and (not isinstance(self.model, str) or not self.model.strip()):
            raise RequestError(f"the model that is to enhance is {self.model!r}; give its name, or leave it out.")
        if self.key is not None:
            check_key(self.key, address)
        if not isinstance(self.timeout, int | float) or not 0 < self.timeout <= MAX_TIMEOUT:
            raise RequestError(f"the timeout is {self.timeout!r}; it must lie above 0 and up to {MAX_TIMEOUT:g} s.")

    @property
    def display_url(self) -> str:
        """The endpoint, as messages call it."""
        return redact_url(self.url)

    def enhance(self, prompt: str, images: Sequence[ChatImage] = ()) -> str:
        """A prompt of one scene, written out. See `enhance_scenes`."""
        return self.enhance_scenes([prompt], images)[0]

    def enhance_scenes(self, scenes: Sequence[str], images: Sequence[ChatImage] = ()) -> list[str]:
        """The scenes of a video, each written out with the others in view.

        An endpoint that refuses the pictures is asked once more without them, with a warning; an answer that is too
        long is cut after a whole sentence, with a warning.

        Args:
            scenes: the user's words for each.
            images: that the video is held to.

        Returns:
            One paragraph for each, of `answers.MOST_WORDS` words at most.

        Raises:
            EnhanceError: an answer did not come in time, is an error, or no description. No scene is enhanced then.
        """
        made: list[str] = []
        blind = False
        for index, scene in enumerate(scenes):
            around = {"previous_scenes": tuple(made), "next_scenes": scenes[index + 1 :]}
            try:
                answer, blind = self._enhance_scene(scene, images, omit_images=blind, **around)
                made.append(self._fit_to_encoder(extract_paragraph(answer, self._redact_key), scene))
            except UnusableAnswer as reason:
                told = f"{self.display_url} {reason}"
                raise EnhanceError(f"the prompt was not enhanced: {told}{'' if told[-1] in '.!?' else '.'}") from None
        return made

    def _enhance_scene(
        self, scene: str, images: Sequence[ChatImage], *, omit_images: bool, **around: Any
    ) -> tuple[str, bool]:
        """The text of the answer, and whether the endpoint is known to be blind after it."""
        until = time.monotonic() + self.timeout
        try:
            return self._request_completion(
                build_messages(scene, images, omit_images=omit_images, **around), until
            ), omit_images
        except _HTTPStatusError as refused:
            if omit_images or not images or not refused.may_reject_images:
                raise
            answer = self._request_completion(build_messages(scene, images, omit_images=True, **around), until)
            _warn(
                f"{self.display_url} cannot see: with pictures it answered with {refused.summary}, so the prompt was enhanced "
                "without them. Name a model that can see."
            )
            return answer, True

    def _request_completion(self, messages: list[dict[str, Any]], deadline: float) -> str:
        """The text of one answer."""
        body = {"messages": messages, "stream": False} | ({"model": self.model} if self.model else {})
        headers = {"Content-Type": "application/json", "User-Agent": f"kadr/{__version__}"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(completions_url(self.url), json.dumps(body).encode(), headers, method="POST")
        try:
            return completion_text(
                _run_until(lambda: _send(request, deadline, self._redact_key), self.timeout, deadline), self._redact_key
            )
        except _HTTPStatusError as refused:
            if self.model is None and refused.status in (400, 404, 422):
                said = f"{refused.reason}; " if refused.reason else ""
                raise _HTTPStatusError(refused.status, f"{said}no model was named") from None
            raise

    def _redact_key(self, text: str) -> str:
        """A text without the key, should an endpoint repeat it."""
        return text.replace(self.key, "(the key)") if self.key and len(self.key) >= MIN_KEY_LENGTH else text

    def _fit_to_encoder(self, text: str, scene: str) -> str:
        """The paragraph, as far as the text encoder has room for it."""
        if split_words(text) == split_words(scene) and len(split_words(scene)) < DETAILED_PROMPT_WORDS:
            raise UnusableAnswer("gave the same words back")
        cut = truncate_to_sentences(text)
        if cut != text:
            _warn(
                f"{self.display_url} answered with {len(text.split())} words, and the text encoder has room for about "
                f"{MAX_WORDS}; of its sentences those that fit are used, {len(cut.split())} words."
            )
        return cut


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Answers that point elsewhere are errors: neither key nor prompt goes to a host that was not named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _run_until(exchange: Any, seconds: float, deadline: float) -> bytes:
    """What an exchange gives, if it does so until then.

    It has a thread of its own, because neither the look-up of a name nor an answer that drips ends with a socket's
    timeout. A thread that is left behind holds nothing up, and ends with the server.
    """
    done: Future[bytes] = Future()

    def run() -> None:
        try:
            done.set_result(exchange())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="kadr enhance", daemon=True).start()
    try:
        return done.result(max(deadline - time.monotonic(), 0))
    except (urllib.error.URLError, OSError, http.client.HTTPException, UnicodeError, Overdue) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError | Overdue):
            raise UnusableAnswer(
                f"did not answer within {seconds:g} s; give it longer, or take a smaller model"
            ) from None
        raise UnusableAnswer(_connection_failure(reason)) from None


def _send(request: urllib.request.Request, deadline: float, redact: Redact) -> bytes:
    """Ask, and take in the answer."""
    proxies: dict[str, str] | None = (
        {} if is_loopback(urlsplit(request.full_url).hostname) else None
    )  # None: as the environment says
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _NoRedirect)
    try:
        with opener.open(request, timeout=max(deadline - time.monotonic(), 0.01)) as response:
            return _read_body(response, deadline)
    except urllib.error.HTTPError as error:
        with error:
            if 300 <= error.code < 400:
                where = sanitize(error.headers.get("Location") or "nowhere", redact)
                raise _HTTPStatusError(error.code, f"it points to {where}; name that, if you trust it") from None
            try:
                reason = error_message(_read_body(error, deadline), redact)
            except (UnusableAnswer, OSError, http.client.HTTPException):  # the status says enough
                reason = ""
            raise _HTTPStatusError(error.code, reason) from None


def _read_body(response: Any, deadline: float) -> bytes:
    """All of a body, as long as it keeps to time and size."""
    body = b""
    while piece := response.read1(1 << 16):
        body += piece
        if len(body) > MAX_RESPONSE_BYTES:
            raise UnusableAnswer(f"answered with more than {MAX_RESPONSE_BYTES >> 20} MB")
        if time.monotonic() > deadline:
            raise TimeoutError
    if missing := getattr(response, "length", None):  # what was announced and never came
        raise http.client.IncompleteRead(body, missing)
    return body


def _connection_failure(error: Any) -> str:
    """Why there was no answer."""
    if isinstance(error, ssl.SSLError):
        told = sanitize(str(getattr(error, "verify_message", "") or error.reason or error))
        return f"cannot be spoken to over TLS ({told}); check its certificate, and whether it is http or https"
    if isinstance(error, ConnectionRefusedError):
        return "refuses the connection; is it running, and is the port right?"
    if isinstance(error, ConnectionError | http.client.IncompleteRead):
        return "hung up before its answer was whole"
    if isinstance(error, http.client.HTTPException):
        return "does not speak HTTP; check the port"
    told = sanitize(str(getattr(error, "strerror", None) or error)) or type(error).__name__
    return f"cannot be reached ({told}); check the address"


def _warn(text: str) -> None:
    warnings.warn(text, KadrWarning, stacklevel=2)
