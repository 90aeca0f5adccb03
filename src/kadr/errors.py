"""The hierarchy of exceptions that kadr raises.

    KadrError                  base class of all kadr errors; the command line prints it and exits with 1
    ├── RequestError           the request does not fit: a size, a frame count, a prompt, an unknown model name
    ├── MediaError             an image or a video cannot be read or written
    ├── CheckpointError        a file is not the checkpoint it should be
    ├── PlanError              no placement fits in memory
    ├── EnhanceError           a prompt was not enhanced
    ├── NonFiniteError         a stage produced NaN or infinity; carries the stage
    ├── Busy                   the engine makes another video, and the caller does not wait
    └── Cancelled              the work was asked to stop

    KadrWarning                something differs from the request; the command line prints it and goes on

Every message states the value, the limit and the fix, on one line: foreign text in it is escaped and cut (`quoting`).
It names flags on the command line and fields elsewhere (`setting_names`).
"""

import collections.abc
import contextlib
import typing
import warnings

from kadr.quoting import MAX_LINE, one_line
from kadr.setting_names import speak


class KadrError(Exception):
    """Base class of all kadr errors, with a message for the user.

    Args:
        message: shown on one line; see `quoting.one_line`.
        details: further lines, such as one for each file that cannot be used.
        limit: characters of a line; more only where two checksums or paths must be whole.
        topic: what it is about, in a word or two; "" where the class says enough.
        fix: flags that correct it, as `kadr doctor` prints them for pasting; "" where the message has the way out.
        is_about_file: it names the keys of a file, which are the same wherever it is read; see `setting_names`.
    """

    def __init__(
        self,
        message: object = "",
        *,
        details: collections.abc.Iterable[str] = (),
        limit: int = MAX_LINE,
        topic: str = "",
        fix: str = "",
        is_about_file: bool = False,
    ) -> None:
        super().__init__("\n  ".join(one_line(line, limit) for line in (message, *details)))
        self.topic, self.fix, self._is_about_file = topic, fix, is_about_file

    def __str__(self) -> str:
        return super().__str__() if self._is_about_file else speak(super().__str__())


class RequestError(KadrError, ValueError):
    """The request does not fit this model. Raised before any weight is moved."""


class MediaError(KadrError):
    """An image or a video cannot be read or written."""


class CheckpointError(KadrError):
    """A file is not the checkpoint it should be: truncated, incomplete, of another family."""


class PlanError(KadrError):
    """No placement fits in memory.

    Args:
        shortfall: bytes missing.
        smaller: fields of a `Request` that would fit in place of those that do not; {} where none is known.
    """

    def __init__(
        self, message: str, *, shortfall: int, smaller: collections.abc.Mapping[str, typing.Any] | None = None
    ) -> None:
        super().__init__(message)
        self.shortfall, self.smaller = shortfall, dict(smaller or {})


class EnhanceError(KadrError):
    """An endpoint did not enhance a prompt: it is down, is slow, refuses, or its answer is not a prompt."""


class NonFiniteError(KadrError):
    """A stage produced NaN or infinity.

    Args:
        stage: the first stage with such values: "text", "encode", "denoise", "upscale", "refine" or "decode".
    """

    def __init__(self, message: str, *, stage: str) -> None:
        super().__init__(message)
        self.stage = stage


class Cancelled(KadrError):
    """The work was asked to stop: by its `CancelToken`, or by a `watch` callback that raised this."""


class Busy(KadrError):
    """The engine makes another video, and the caller asked not to wait for it."""


class KadrWarning(UserWarning):
    """Something differs from the request, such as a prompt truncated at its limit. Arguments as for `KadrError`."""

    def __init__(
        self,
        message: object = "",
        *,
        details: collections.abc.Iterable[str] = (),
        limit: int = MAX_LINE,
        topic: str = "",
        fix: str = "",
    ) -> None:
        super().__init__("\n  ".join(one_line(line, limit) for line in (message, *details)))
        self.topic, self.fix = topic, fix

    def __str__(self) -> str:
        return speak(super().__str__())


@contextlib.contextmanager
def ignore_kadr_warnings() -> collections.abc.Iterator[None]:
    """Leaves kadr's warnings of the block out: what it looks at ahead says them again when it is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KadrWarning)
        yield
