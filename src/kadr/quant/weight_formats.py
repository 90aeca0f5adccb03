"""Weight formats that a user can name. Does not import torch."""

from __future__ import annotations

from kadr.errors import RequestError
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.quoting import quote

NONE, AUTO_QUANT = "none", "auto"
INT8, INT8_WEIGHT_ONLY, FP8, FP8_WEIGHT_ONLY = "int8", "int8-weights", "fp8", "fp8-weights"
# Descriptions, for help texts.
WEIGHT_FORMATS = {
    NONE: "as in the file",
    AUTO_QUANT: "as in the file if that fits into memory, else 8 bits",
    INT8: "8-bit integers, weights and activations: twice as fast on CPUs with VNNI",
    INT8_WEIGHT_ONLY: "8-bit integers, weight only: closer to the unquantized output, and not faster",
    FP8: "8-bit floats, weights and activations: faster on GPUs since Ada and Hopper",
    FP8_WEIGHT_ONLY: "8-bit floats, weight only",
    **{
        name: f"{ggml_type.bits_per_weight:g} bits per weight, in GGML's {name} blocks"
        for name, ggml_type in GGML_TYPES.items()
    },
}
EIGHT_BIT_FORMATS = (INT8, INT8_WEIGHT_ONLY, FP8, FP8_WEIGHT_ONLY)  # with one scale per row
# Bits per weight, without the scale of a row.
BITS_PER_WEIGHT = {
    **dict.fromkeys(EIGHT_BIT_FORMATS, 8.0),
    **{name: ggml_type.bits_per_weight for name, ggml_type in GGML_TYPES.items()},
}


def check_weight_format(name: str) -> str:
    """Returns the weight format of that name, in any case of letters.

    Raises:
        RequestError: there is none.
    """
    for weight_format in WEIGHT_FORMATS:
        if weight_format.lower() == str(name).lower():
            return weight_format
    raise RequestError(f"quant is {quote(name)}; it must be one of {', '.join(WEIGHT_FORMATS)}.")
