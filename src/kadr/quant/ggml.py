"""Placeholder until the kernels are in place."""

from torch import Tensor

from kadr.kernels.packing import Packing


def quantize(weight: Tensor, packing: Packing) -> Tensor:
    raise NotImplementedError
