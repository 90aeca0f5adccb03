"""Offload modes. Nothing here loads torch."""

from __future__ import annotations

from kadr.errors import RequestError
from kadr.quoting import quote

# auto: the planner decides. none: all modules stay loaded. stages: each module is unloaded after its stage. blocks:
# transformer blocks are streamed.
OFFLOAD_MODES = OFFLOAD_AUTO, OFFLOAD_NONE, OFFLOAD_STAGES, OFFLOAD_BLOCKS = "auto", "none", "stages", "blocks"


def check_offload(name: str) -> str:
    """Checks the name of an offload mode and returns it.

    Raises:
        RequestError: there is no such mode.
    """
    if name not in OFFLOAD_MODES:
        raise RequestError(f"offload is {quote(name)}; it must be one of {', '.join(OFFLOAD_MODES)}.")
    return name
