"""How memory is made for what does not fit. Nothing here loads torch."""

from __future__ import annotations

from kadr.errors import RequestError

# What is done with what does not fit: whatever helps; nothing; modules leave after their stage; blocks come and go.
OFFLOAD_MODES = OFFLOAD_AUTO, OFFLOAD_NONE, OFFLOAD_STAGES, OFFLOAD_BLOCKS = "auto", "none", "stages", "blocks"


def check_offload(name: str) -> str:
    """The way of that name to make room.

    Raises:
        RequestError: there is none.
    """
    if name not in OFFLOAD_MODES:
        raise RequestError(f"offload is {name!r}; it must be one of {', '.join(OFFLOAD_MODES)}.")
    return name
