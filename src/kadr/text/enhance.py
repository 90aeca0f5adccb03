"""Prompt enhancement by a chat model, behind any endpoint with OpenAI's chat completions API.

Besides `checkpoints/hub.py`, the only module that opens connections: to the endpoint that the user names, and to no
other host.
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
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from kadr.errors import EnhanceError, KadrWarning, RequestError
from kadr.quoting import quote
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
from kadr.validation import is_number
from kadr.version import __version__

DEFAULT_TIMEOUT = 60.0  # seconds
MAX_TIMEOUT = 3600.0
MAX_RESPONSE_BYTES = 1 << 20
MIN_KEY_LENGTH = 12  # characters; a shorter key is a placeholder for a server without keys, and may occur in any text
DETAILED_PROMPT_WORDS = 40  # a prompt of as many words may be returned unchanged
_STATUS_ADVICE = {
    401: f"; set its key; the command line reads it from {KEY_VARIABLE} in the environment",
    403: f"; set its key; the command line reads it from {KEY_VARIABLE} in the environment",
    404: "; check the model's name, and the URL, which ends in /v1 for most endpoints",
    429: "; wait, or check the quota of the account",
}


class _HTTPStatusError(UnusableAnswer):
    """An HTTP error status of the endpoint.

    Args:
        reason: the endpoint's own message; "" if there is none.
    """

    def __init__(self, status: int, reason: str) -> None:
        self.summary = f"HTTP {status}{f' ({reason})' if reason else ''}"
        super().__init__(f"answered with {self.summary}{_STATUS_ADVICE.get(status, '')}")
        self.status, self.reason = status, reason

    @property
    def may_reject_images(self) -> bool:
        """True if the cause may be images: llama.cpp answers them with 500, routers with a 404 that mentions images."""
        if self.status in (401, 403, 429):
            return False
        is_likely = self.status == 500 or (400 <= self.status < 500 and self.status not in (404, 408))
        return is_likely or "image" in self.reason.lower()


@dataclass(frozen=True)
class Enhancer:
    """A chat endpoint that turns short prompts into detailed ones.

    Args:
        url: of the endpoint, such as http://localhost:11434/v1; with or without /chat/completions.
        model: its name at the endpoint; None sends none, which endpoints with one model accept.
        key: sent as a bearer token, only over https or to this machine. It appears in no message and no repr.
        required: `kadr.enhance_prompt` raises if the endpoint fails, instead of using the user's own words.
        timeout: seconds for each answer, from the DNS lookup to the last byte; a retry without images has the rest of
            that time.

    Raises:
        RequestError: the URL is invalid, or the key must not be sent to it; or the timeout is out of range.
    """

    url: str
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    required: bool = False
    timeout: float = DEFAULT_TIMEOUT

    def __post_init__(self) -> None:
        url = parse_endpoint_url(self.url)
        if self.model is not None and (not isinstance(self.model, str) or not self.model.strip()):
            raise RequestError(f"the chat model is {quote(self.model)}; give its name, or leave it out.")
        if self.key is not None:
            check_key(self.key, url)
        if not is_number(self.timeout) or not 0 < self.timeout <= MAX_TIMEOUT:
            raise RequestError(
                f"the timeout is {quote(self.timeout)}; it must be above 0 and at most {MAX_TIMEOUT:g} s."
            )

    @property
    def display_url(self) -> str:
        """URL of the endpoint, as messages show it."""
        return redact_url(self.url)

    def enhance(self, prompt: str, images: Sequence[ChatImage] = ()) -> str:
        """Enhances a prompt of one scene. See `enhance_scenes`."""
        return self.enhance_scenes([prompt], images)[0]

    def enhance_scenes(self, scenes: Sequence[str], images: Sequence[ChatImage] = ()) -> list[str]:
        """Enhances the scenes of a video, each with the others as context.

        An endpoint that refuses the images is called once more without them, with a warning; an answer that is too
        long is cut after a whole sentence, with a warning.

        Args:
            scenes: the user's words for each.
            images: the video's conditioning images.

        Returns:
            One paragraph for each scene, of at most `MAX_WORDS` words.

        Raises:
            EnhanceError: an answer was late, is an error, or is not a description. No scene is enhanced then.
        """
        enhanced: list[str] = []
        omit_images = False
        for index, scene in enumerate(scenes):
            context = {"previous_scenes": tuple(enhanced), "next_scenes": scenes[index + 1 :]}
            try:
                answer, omit_images = self._enhance_scene(scene, images, omit_images=omit_images, **context)
                enhanced.append(self._fit_to_encoder(extract_paragraph(answer, self._redact_key), scene))
            except UnusableAnswer as reason:
                cause = f"{self.display_url} {reason}"
                raise EnhanceError(f"the prompt was not enhanced: {cause}{'' if cause[-1] in '.!?' else '.'}") from None
        return enhanced

    def _enhance_scene(
        self, scene: str, images: Sequence[ChatImage], *, omit_images: bool, **context: Any
    ) -> tuple[str, bool]:
        """Returns the text of the answer, and the `omit_images` for the next scene."""
        deadline = time.monotonic() + self.timeout
        try:
            messages = build_messages(scene, images, omit_images=omit_images, **context)
            return self._request_completion(messages, deadline), omit_images
        except _HTTPStatusError as error:
            if omit_images or not images or not error.may_reject_images:
                raise
            messages = build_messages(scene, images, omit_images=True, **context)
            answer = self._request_completion(messages, deadline)
            _warn(
                f"{self.display_url} takes no images: with them it answered with {error.summary}, so the prompt was "
                "enhanced without them. Name a vision model."
            )
            return answer, True

    def _request_completion(self, messages: list[dict[str, Any]], deadline: float) -> str:
        """Returns the text of one answer."""
        body = {"messages": messages, "stream": False} | ({"model": self.model} if self.model else {})
        headers = {"Content-Type": "application/json", "User-Agent": f"kadr/{__version__}"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(completions_url(self.url), json.dumps(body).encode(), headers, method="POST")
        try:
            answer = _run_until(lambda: _send(request, deadline, self._redact_key), self.timeout, deadline)
            return completion_text(answer, self._redact_key)
        except _HTTPStatusError as error:
            if self.model is None and error.status in (400, 404, 422):
                reason = f"{error.reason}; " if error.reason else ""
                raise _HTTPStatusError(error.status, f"{reason}no model was named") from None
            raise

    def _redact_key(self, text: str) -> str:
        """Removes the key from a text, in case an endpoint repeats it."""
        return text.replace(self.key, "(the key)") if self.key and len(self.key) >= MIN_KEY_LENGTH else text

    def _fit_to_encoder(self, text: str, scene: str) -> str:
        """Returns the whole sentences of a paragraph that fit into the text encoder."""
        if split_words(text) == split_words(scene) and len(split_words(scene)) < DETAILED_PROMPT_WORDS:
            raise UnusableAnswer("returned the same words")
        fitting = truncate_to_sentences(text)
        if fitting != text:
            _warn(
                f"{self.display_url} answered with {len(text.split())} words, and the text encoder takes about "
                f"{MAX_WORDS}; the sentences that fit are used, {len(fitting.split())} words."
            )
        return fitting


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Treats redirects as errors: neither key nor prompt goes to a host that the user did not name."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _run_until(exchange: Any, seconds: float, deadline: float) -> bytes:
    """Returns the result of an exchange, if it comes before the deadline.

    The exchange runs in its own thread, because a socket's timeout ends neither a DNS lookup nor an answer that comes
    byte by byte. An abandoned thread blocks nothing, and ends when the server does.

    Args:
        seconds: the whole timeout, for the message.

    Raises:
        UnusableAnswer: there was no answer in time, or no connection.
    """
    result: Future[bytes] = Future()

    def run() -> None:
        try:
            result.set_result(exchange())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="kadr enhance", daemon=True).start()
    try:
        return result.result(max(deadline - time.monotonic(), 0))
    except (urllib.error.URLError, OSError, http.client.HTTPException, UnicodeError, FutureTimeoutError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError | FutureTimeoutError):
            raise UnusableAnswer(
                f"did not answer within {seconds:g} s; raise the timeout, or use a smaller model"
            ) from None
        raise UnusableAnswer(_connection_failure(reason)) from None


def _send(request: urllib.request.Request, deadline: float, redact: Redact) -> bytes:
    """Sends a request, and returns the body of the answer."""
    # None takes the proxies of the environment.
    proxies: dict[str, str] | None = {} if is_loopback(urlsplit(request.full_url).hostname) else None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _NoRedirect)
    try:
        with opener.open(request, timeout=max(deadline - time.monotonic(), 0.01)) as response:
            return _read_body(response, deadline)
    except urllib.error.HTTPError as error:
        with error:
            if 300 <= error.code < 400:
                location = sanitize(error.headers.get("Location") or "nowhere", redact)
                reason = f"it redirects to {location}; name that URL if you trust it"
                raise _HTTPStatusError(error.code, reason) from None
            try:
                reason = error_message(_read_body(error, deadline), redact)
            except (UnusableAnswer, OSError, http.client.HTTPException):  # the status is enough
                reason = ""
            raise _HTTPStatusError(error.code, reason) from None


def _read_body(response: Any, deadline: float) -> bytes:
    """Reads a whole body, within the deadline and `MAX_RESPONSE_BYTES`."""
    body = b""
    while chunk := response.read1(1 << 16):
        body += chunk
        if len(body) > MAX_RESPONSE_BYTES:
            raise UnusableAnswer(f"answered with more than {MAX_RESPONSE_BYTES >> 20} MB")
        if time.monotonic() > deadline:
            raise TimeoutError
    if missing := getattr(response, "length", None):  # announced and never sent
        raise http.client.IncompleteRead(body, missing)
    return body


def _connection_failure(error: Any) -> str:
    """Tells why there was no answer."""
    if isinstance(error, ssl.SSLError):
        reason = sanitize(str(getattr(error, "verify_message", "") or error.reason or error))
        return f"cannot be reached over TLS ({reason}); check its certificate, and whether it is http or https"
    if isinstance(error, ConnectionRefusedError):
        return "refuses the connection; is it running, and is the port right?"
    if isinstance(error, ConnectionError | http.client.IncompleteRead):
        return "closed the connection before its answer was complete"
    if isinstance(error, http.client.HTTPException):
        return "does not speak HTTP; check the port"
    reason = sanitize(str(getattr(error, "strerror", None) or error)) or type(error).__name__
    return f"cannot be reached ({reason}); check the address"


def _warn(text: str) -> None:
    warnings.warn(text, KadrWarning, stacklevel=2)
