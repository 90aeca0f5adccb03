"""The Hadamard matrices are cached for the whole process, whoever needs them first."""

from __future__ import annotations

import torch

from kadr.kernels import hadamard
from kadr.kernels.hadamard import hadamard_transform


def test_gradients_flow_after_a_first_use_in_inference_mode() -> None:
    hadamard._hadamard_matrix.cache_clear()
    with torch.inference_mode():
        hadamard_transform(torch.ones(1, 8), 8)
    x = torch.randn(2, 8, requires_grad=True)
    hadamard_transform(x, 8).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())  # the transform is orthogonal
