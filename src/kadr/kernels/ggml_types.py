"""The block formats of GGML: how many numbers share a block, and how many bytes it takes.

https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h has their layouts; `dequant` says each in words.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GGMLType:
    """One block format. Blocks lie along the last axis of a weight, row after row.

    Args:
        name: as GGML has it, such as "Q4_K".
        block_size: numbers in a block.
        type_size: that a block takes.
    """

    name: str
    block_size: int
    type_size: int

    @property
    def bits_per_weight(self) -> float:
        """Per number."""
        return 8 * self.type_size / self.block_size

    def row_bytes(self, columns: int) -> int:
        """Of a row of so many numbers.

        Raises:
            ValueError: the row is no whole number of blocks.
        """
        blocks, rest = divmod(columns, self.block_size)
        if rest:
            raise ValueError(
                f"a row of {columns} numbers is no whole number of {self.name} blocks of {self.block_size}"
            )
        return blocks * self.type_size


GGML_TYPES = {
    packing.name: packing
    for packing in (
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
