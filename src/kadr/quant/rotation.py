"""Weights that were turned before they were stored, told by what they do.

The first fp8 upload of 13B 0.9.7-dev held weights turned by a Walsh-Hadamard rotation, under the names and in the
shapes of plain ones: read as plain weights they give noise and no error. What tells them apart is that a trained model
answers pure noise with a velocity that is mostly that noise (it is the noise less the picture), and a turned one does
not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kadr.kernels.hadamard import hadamard_transform
from kadr.nn.linear import Linear
from kadr.quant.convert import in_block
from kadr.quant.layers import ScaledLinear

# Of the answer to the noise, from here on a model is taken for a trained one: those reach 0.9, distilled ones 0.7. With
# turned weights only what goes around the blocks is left of it, at most 0.5.
MIN_NOISE_CORRELATION = 0.55
FULL_ROW = 0  # turned over the whole row
ROTATION_SIZES = (
    FULL_ROW,
    4096,
    2048,
    1024,
    512,
    256,
    128,
    64,
)  # columns that may have been turned together, tried in this order

VelocityFunction = Callable[[Tensor], Tensor]
_ROTATABLE_LAYERS = (Linear, ScaledLinear)


def noise_correlation(velocity: VelocityFunction, noise: Tensor) -> float:
    """How much of the noise is in the answer to it: the correlation of the two, in [-1, 1]; 0 if it is not finite.

    Args:
        velocity: of pure noise, shaped as it.
    """
    answer = velocity(noise).double().flatten()
    given = noise.double().flatten()
    answer, given = answer - answer.mean(), given - given.mean()
    value = float((answer @ given) / (answer.norm() * given.norm()).clamp(min=1e-30))
    return value if value == value else 0.0


def detect_and_undo_rotation(module: nn.Module, velocity: VelocityFunction, noise: Tensor) -> int | None:
    """How the weights of the blocks were turned, found by trying; afterwards the module computes as if they were not.

    Args:
        module: the transformer that `velocity` asks.

    Returns:
        The columns turned together, 0 for whole rows; None where they were not turned.

    Raises:
        ValueError: the model gives no answer like that of a trained one, whichever way its weights are turned. It
            carries the likeness of the plain ones.
    """
    plain = noise_correlation(velocity, noise)
    if plain >= MIN_NOISE_CORRELATION:
        return None
    for size in ROTATION_SIZES:
        if not rotate_weights(module, size):
            continue
        if noise_correlation(velocity, noise) >= MIN_NOISE_CORRELATION:
            return size
        rotate_weights(module, size)  # back: a rotation is its own inverse
    raise ValueError(f"{plain:.2f}")


def rotate_weights(module: nn.Module, size: int) -> bool:
    """Turn the weights of the blocks, or turn them back; False where their rows are no multiple of `size`."""
    layers = [
        layer for name, layer in module.named_modules() if in_block(name) and isinstance(layer, _ROTATABLE_LAYERS)
    ]
    blocks = [size or layer.weight.shape[1] for layer in layers]
    if any(layer.weight.shape[1] % block or block & (block - 1) for layer, block in zip(layers, blocks, strict=True)):
        return False
    for layer, block in zip(layers, blocks, strict=True):
        if isinstance(layer, ScaledLinear):
            layer.rotation_size = None if layer.rotation_size == block else block
        else:
            layer.weight.data = torch.cat([hadamard_transform(rows, block) for rows in layer.weight.data.split(256)])
    return bool(layers)
