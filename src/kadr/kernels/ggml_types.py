"""The block formats of GGML: how many numbers share a block, and how many bytes it takes.

https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h has their layouts; `dequant` says each in words.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Packing:
    """One block format. Blocks lie along the last axis of a weight, row after row.

    Args:
        name: as GGML has it, such as "Q4_K".
        elements: numbers in a block.
        bytes: that a block takes.
    """

    name: str
    elements: int
    bytes: int

    @property
    def bits(self) -> float:
        """Per number."""
        return 8 * self.bytes / self.elements

    def row_bytes(self, columns: int) -> int:
        """Of a row of so many numbers.

        Raises:
            ValueError: the row is no whole number of blocks.
        """
        blocks, rest = divmod(columns, self.elements)
        if rest:
            raise ValueError(f"a row of {columns} numbers is no whole number of {self.name} blocks of {self.elements}")
        return blocks * self.bytes


PACKINGS = {
    packing.name: packing
    for packing in (
        Packing("Q8_0", 32, 34),
        Packing("Q6_K", 256, 210),
        Packing("Q5_K", 256, 176),
        Packing("Q5_1", 32, 24),
        Packing("Q5_0", 32, 22),
        Packing("Q4_K", 256, 144),
        Packing("Q4_1", 32, 20),
        Packing("Q4_0", 32, 18),
        Packing("Q3_K", 256, 110),
        Packing("Q2_K", 256, 84),
    )
}
