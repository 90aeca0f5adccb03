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
from kadr.text.chat_completion import MOST_WORDS, Hide, Unusable, content, message, paragraph, plain, shortened, words
from kadr.text.chat_messages import Picture, conversation
from kadr.text.endpoint import KEY, check_key, checked_address, completions, is_here, shown
from kadr.version import __version__

TIMEOUT = 60.0  # seconds
LONGEST_TIMEOUT = 3600.0
LARGEST = 1 << 20  # bytes of an answer
SECRET = 12  # letters: a shorter key is a word that servers without keys are given, and may stand in any text
ENOUGH = 40  # words: a prompt that has as many may be given back as it is
_WAYS_OUT = {
    401: f"; give it its key, on the command line in {KEY} in the environment",
    403: f"; give it its key, on the command line in {KEY} in the environment",
    404: "; check the model's name, and the URL: that of most endpoints ends in /v1",
    429: "; wait, or see what the account has left",
}


class _Refused(Unusable):
    """The endpoint answered with an error.

    Args:
        reason: what it says itself; "" where it says nothing.
    """

    def __init__(self, status: int, reason: str) -> None:
        self.told = f"HTTP {status}{f' ({reason})' if reason else ''}"
        super().__init__(f"answered with {self.told}{_WAYS_OUT.get(status, '')}")
        self.status, self.reason = status, reason

    @property
    def perhaps_blind(self) -> bool:
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
        required: `kadr.enhanced` raises where the endpoint fails, instead of going on with the user's own words.
        timeout: seconds for each answer, from the look-up of the name to the last byte; a second try without pictures
            has what is left of them.

    Raises:
        RequestError: a URL that is none, or that the key must not be sent to; a timeout out of its range.
    """

    url: str
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    required: bool = False
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        address = checked_address(self.url)
        if self.model is not None and (not isinstance(self.model, str) or not self.model.strip()):
            raise RequestError(f"the model that is to enhance is {self.model!r}; give its name, or leave it out.")
        if self.key is not None:
            check_key(self.key, address)
        if not isinstance(self.timeout, int | float) or not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise RequestError(f"the timeout is {self.timeout!r}; it must lie above 0 and up to {LONGEST_TIMEOUT:g} s.")

    @property
    def place(self) -> str:
        """The endpoint, as messages call it."""
        return shown(self.url)

    def enhance(self, prompt: str, pictures: Sequence[Picture] = ()) -> str:
        """A prompt of one scene, written out. See `enhance_scenes`."""
        return self.enhance_scenes([prompt], pictures)[0]

    def enhance_scenes(self, scenes: Sequence[str], pictures: Sequence[Picture] = ()) -> list[str]:
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
            around = {"before": tuple(made), "after": scenes[index + 1 :]}
            try:
                answer, blind = self._answer(scene, pictures, blind=blind, **around)
                made.append(self._fitting(paragraph(answer, self._hide), scene))
            except Unusable as reason:
                told = f"{self.place} {reason}"
                raise EnhanceError(f"the prompt was not enhanced: {told}{'' if told[-1] in '.!?' else '.'}") from None
        return made

    def _answer(self, scene: str, pictures: Sequence[Picture], *, blind: bool, **around: Any) -> tuple[str, bool]:
        """The text of the answer, and whether the endpoint is known to be blind after it."""
        until = time.monotonic() + self.timeout
        try:
            return self._ask(conversation(scene, pictures, blind=blind, **around), until), blind
        except _Refused as refused:
            if blind or not pictures or not refused.perhaps_blind:
                raise
            answer = self._ask(conversation(scene, pictures, blind=True, **around), until)
            _warn(
                f"{self.place} cannot see: with pictures it answered with {refused.told}, so the prompt was enhanced "
                "without them. Name a model that can see."
            )
            return answer, True

    def _ask(self, messages: list[dict[str, Any]], until: float) -> str:
        """The text of one answer."""
        body = {"messages": messages, "stream": False} | ({"model": self.model} if self.model else {})
        headers = {"Content-Type": "application/json", "User-Agent": f"kadr/{__version__}"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(completions(self.url), json.dumps(body).encode(), headers, method="POST")
        try:
            return content(_in_time(lambda: _exchange(request, until, self._hide), self.timeout, until), self._hide)
        except _Refused as refused:
            if self.model is None and refused.status in (400, 404, 422):
                said = f"{refused.reason}; " if refused.reason else ""
                raise _Refused(refused.status, f"{said}no model was named") from None
            raise

    def _hide(self, text: str) -> str:
        """A text without the key, should an endpoint repeat it."""
        return text.replace(self.key, "(the key)") if self.key and len(self.key) >= SECRET else text

    def _fitting(self, text: str, scene: str) -> str:
        """The paragraph, as far as the text encoder has room for it."""
        if words(text) == words(scene) and len(words(scene)) < ENOUGH:
            raise Unusable("gave the same words back")
        cut = shortened(text)
        if cut != text:
            _warn(
                f"{self.place} answered with {len(text.split())} words, and the text encoder has room for about "
                f"{MOST_WORDS}; of its sentences those that fit are used, {len(cut.split())} words."
            )
        return cut


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Answers that point elsewhere are errors: neither key nor prompt goes to a host that was not named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _in_time(exchange: Any, seconds: float, until: float) -> bytes:
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
        return done.result(max(until - time.monotonic(), 0))
    except (urllib.error.URLError, OSError, http.client.HTTPException, UnicodeError, Overdue) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError | Overdue):
            raise Unusable(f"did not answer within {seconds:g} s; give it longer, or take a smaller model") from None
        raise Unusable(_unreached(reason)) from None


def _exchange(request: urllib.request.Request, until: float, hide: Hide) -> bytes:
    """Ask, and take in the answer."""
    proxies: dict[str, str] | None = (
        {} if is_here(urlsplit(request.full_url).hostname) else None
    )  # None: as the environment says
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _NoRedirect)
    try:
        with opener.open(request, timeout=max(until - time.monotonic(), 0.01)) as response:
            return _read(response, until)
    except urllib.error.HTTPError as error:
        with error:
            if 300 <= error.code < 400:
                where = plain(error.headers.get("Location") or "nowhere", hide)
                raise _Refused(error.code, f"it points to {where}; name that, if you trust it") from None
            try:
                reason = message(_read(error, until), hide)
            except (Unusable, OSError, http.client.HTTPException):  # the status says enough
                reason = ""
            raise _Refused(error.code, reason) from None


def _read(response: Any, until: float) -> bytes:
    """All of a body, as long as it keeps to time and size."""
    body = b""
    while piece := response.read1(1 << 16):
        body += piece
        if len(body) > LARGEST:
            raise Unusable(f"answered with more than {LARGEST >> 20} MB")
        if time.monotonic() > until:
            raise TimeoutError
    if missing := getattr(response, "length", None):  # what was announced and never came
        raise http.client.IncompleteRead(body, missing)
    return body


def _unreached(error: Any) -> str:
    """Why there was no answer."""
    if isinstance(error, ssl.SSLError):
        told = plain(str(getattr(error, "verify_message", "") or error.reason or error))
        return f"cannot be spoken to over TLS ({told}); check its certificate, and whether it is http or https"
    if isinstance(error, ConnectionRefusedError):
        return "refuses the connection; is it running, and is the port right?"
    if isinstance(error, ConnectionError | http.client.IncompleteRead):
        return "hung up before its answer was whole"
    if isinstance(error, http.client.HTTPException):
        return "does not speak HTTP; check the port"
    told = plain(str(getattr(error, "strerror", None) or error)) or type(error).__name__
    return f"cannot be reached ({told}); check the address"


def _warn(text: str) -> None:
    warnings.warn(text, KadrWarning, stacklevel=2)
