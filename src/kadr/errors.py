"""What can go wrong, as one tree.

    KadrError                  everything kadr explains; the command line prints it and exits with 1
    ├── RequestError           the request does not fit: a size, a frame count, a prompt, an unknown model name
    ├── MediaError             a picture or a video cannot be read or written
    ├── CheckpointError        a file is not the checkpoint it should be
    ├── PlanError              no placement fits in memory
    ├── EnhanceError           a prompt was not enhanced
    ├── NonFiniteError         numbers stopped being numbers; carries the stage
    └── Cancelled              the watcher asked to stop

    KadrWarning                something was done otherwise than asked; the command line prints it and goes on

Every message carries the value, the limit and the way out.
"""


class KadrError(Exception):
    """The root: an error whose message is written for the person who sees it."""


class RequestError(KadrError, ValueError):
    """The request does not fit this model. Raised before any weight is moved."""


class MediaError(KadrError):
    """A picture or a video cannot be read or written."""


class CheckpointError(KadrError):
    """A file is not the checkpoint it should be: truncated, incomplete, of another family."""


class PlanError(KadrError):
    """No placement fits in memory.

    Args:
        shortfall: bytes missing.
    """

    def __init__(self, message: str, *, shortfall: int) -> None:
        super().__init__(message)
        self.shortfall = shortfall


class EnhanceError(KadrError):
    """An endpoint did not enhance a prompt: it is down, slow, refuses, or answers what is no prompt."""


class NonFiniteError(KadrError):
    """A stage produced NaN or infinity.

    Args:
        stage: where it was first seen: "text", "encode", "denoise", "upscale", "refine" or "decode".
    """

    def __init__(self, message: str, *, stage: str) -> None:
        super().__init__(message)
        self.stage = stage


class Cancelled(KadrError):
    """The watcher raised; its exception is the cause."""


class KadrWarning(UserWarning):
    """Something was done otherwise than asked, such as a prompt cut at its limit."""
