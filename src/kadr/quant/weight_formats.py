"""The ways to store a weight that a user can name. Nothing here loads torch."""

from __future__ import annotations

from kadr.errors import RequestError
from kadr.kernels.ggml_types import GGML_TYPES

NONE, AUTO_QUANT = "none", "auto"
INT8, INT8_WEIGHT_ONLY, FP8, FP8_WEIGHT_ONLY = "int8", "int8-weights", "fp8", "fp8-weights"
# What each is, for help and documents.
WEIGHT_FORMATS = {
    NONE: "as the file has them",
    AUTO_QUANT: "as the file has them where that fits, else in 8 bits",
    INT8: "8-bit whole numbers, weights and activations: twice as fast on CPUs with VNNI",
    INT8_WEIGHT_ONLY: "8-bit whole numbers, weights alone: keeps more of the picture, and is not faster",
    FP8: "8-bit floats, weights and activations: faster on GPUs since Ada and Hopper",
    FP8_WEIGHT_ONLY: "8-bit floats, weights alone",
    **{
        name: f"{packing.bits_per_weight:g} bits a weight, in GGML's {name} blocks"
        for name, packing in GGML_TYPES.items()
    },
}
EIGHT_BIT_FORMATS = (INT8, INT8_WEIGHT_ONLY, FP8, FP8_WEIGHT_ONLY)  # with a scale for each row
# Bits per weight, without what a row costs.
BITS_PER_WEIGHT = {
    **dict.fromkeys(EIGHT_BIT_FORMATS, 8.0),
    **{name: packing.bits_per_weight for name, packing in GGML_TYPES.items()},
}


def check_weight_format(name: str) -> str:
    """The scheme of that name.

    Raises:
        RequestError: there is none.
    """
    for known in WEIGHT_FORMATS:
        if known.lower() == name.lower():
            return known
    raise RequestError(f"quant is {name!r}; it must be one of {', '.join(WEIGHT_FORMATS)}.")
