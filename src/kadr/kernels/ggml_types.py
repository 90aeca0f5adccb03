"""GGML block formats: elements and bytes per block.

https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h has their layouts; `dequant` describes each in words.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GGMLType:
    """A GGML block format. Blocks run along the last axis of a weight, row after row.

    Args:
        name: GGML's name, such as "Q4_K".
        block_size: elements per block.
        type_size: bytes per block.
    """

    name: str
    block_size: int
    type_size: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per element, with the scales of its block."""
        return 8 * self.type_size / self.block_size

    def row_bytes(self, columns: int) -> int:
        """Returns the bytes of a row of `columns` elements.

        Raises:
            ValueError: the row does not divide into blocks.
        """
        blocks, remainder = divmod(columns, self.block_size)
        if remainder:
            raise ValueError(
                f"a row of {columns} elements does not divide into {self.name} blocks of {self.block_size}"
            )
        return blocks * self.type_size


GGML_TYPES = {
    ggml_type.name: ggml_type
    for ggml_type in (
        GGMLType("Q8_0", 32, 34),
        GGMLType("Q6_K", 256, 210),
        GGMLType("Q5_K", 256, 176),
        GGMLType("Q5_1", 32, 24),
        GGMLType("Q5_0", 32, 22),
        GGMLType("Q4_K", 256, 144),
        GGMLType("Q4_1", 32, 20),
        GGMLType("Q4_0", 32, 18),
        GGMLType("Q3_K", 256, 110),
        GGMLType("Q2_K", 256, 84),
    )
}
