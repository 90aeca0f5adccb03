"""Linear layers in float32 on a CPU: their bits do not depend on where a weight lies in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels.matmul import ALIGNMENT, linear, linear_gelu
from tests.oracles import randn, relative_error


def place_at(weight: Tensor, offset: int) -> Tensor:
    """Copies a weight to an address that is `offset` bytes after a multiple of `ALIGNMENT`."""
    buffer = torch.empty(weight.numel() + 2 * ALIGNMENT, dtype=weight.dtype)
    first = (-buffer.data_ptr() % ALIGNMENT + offset) // weight.element_size()
    placed = buffer[first : first + weight.numel()].view(weight.shape).copy_(weight)
    assert placed.data_ptr() % ALIGNMENT == offset
    return placed


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 37])
@pytest.mark.parametrize(("outputs", "inputs"), [(192, 256), (7, 64), (129, 31), (4200, 1024)])
def test_result_does_not_depend_on_the_address_of_the_weight(rows: int, outputs: int, inputs: int) -> None:
    x, weight, bias = randn(1, rows, inputs), randn(outputs, inputs, seed=1), randn(outputs, seed=2)
    for function in (linear, linear_gelu):
        expected = function(x, place_at(weight, 0), bias)
        for offset in range(4, ALIGNMENT, 4):
            assert torch.equal(function(x, place_at(weight, offset), bias), expected)
    assert torch.equal(linear(x, place_at(weight, 8), None), F.linear(x, place_at(weight, 0)))


def test_one_row_times_a_weight_at_any_address_has_its_gradient() -> None:
    gradients = []
    for offset in (0, 8):
        x = randn(1, 1024).requires_grad_()
        linear(x, place_at(randn(2100, 1024, seed=1), offset), None).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert relative_error(*gradients) <= 1e-6
