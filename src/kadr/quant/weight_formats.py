"""The ways to store a weight that a user can name. Nothing here loads torch."""

from __future__ import annotations

from kadr.errors import RequestError
from kadr.kernels.ggml_types import PACKINGS

NONE, AUTO = "none", "auto"
INT8, INT8_WEIGHTS, FP8, FP8_WEIGHTS = "int8", "int8-weights", "fp8", "fp8-weights"
# What each is, for help and documents.
SCHEMES = {
    NONE: "as the file has them",
    AUTO: "as the file has them where that fits, else in 8 bits",
    INT8: "8-bit whole numbers, weights and activations: twice as fast on CPUs with VNNI",
    INT8_WEIGHTS: "8-bit whole numbers, weights alone: keeps more of the picture, and is not faster",
    FP8: "8-bit floats, weights and activations: faster on GPUs since Ada and Hopper",
    FP8_WEIGHTS: "8-bit floats, weights alone",
    **{name: f"{packing.bits:g} bits a weight, in GGML's {name} blocks" for name, packing in PACKINGS.items()},
}
EIGHT = (INT8, INT8_WEIGHTS, FP8, FP8_WEIGHTS)  # with a scale for each row
# Bits per weight, without what a row costs.
BITS = {**dict.fromkeys(EIGHT, 8.0), **{name: packing.bits for name, packing in PACKINGS.items()}}


def check_scheme(name: str) -> str:
    """The scheme of that name.

    Raises:
        RequestError: there is none.
    """
    for known in SCHEMES:
        if known.lower() == name.lower():
            return known
    raise RequestError(f"quant is {name!r}; it must be one of {', '.join(SCHEMES)}.")
