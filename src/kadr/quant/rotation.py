"""Detection of weights that were Hadamard-rotated before they were stored.

The first fp8 upload of 13B 0.9.7-dev has weights rotated by a Walsh-Hadamard transform under the names and shapes of
plain ones: used as plain weights they give noise and no error. The velocity that a trained model predicts for pure
noise is mostly that noise (it is the noise minus the clean latents); with rotated weights it is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kadr.kernels.hadamard import hadamard_transform
from kadr.nn.linear import Linear
from kadr.quant.convert import in_block
from kadr.quant.layers import ScaledLinear

# Correlation of velocity and noise from which the weights count as plain: trained models reach 0.9, distilled ones 0.7.
# With rotated weights only the residual stream carries the noise through, which gives at most 0.5.
MIN_NOISE_CORRELATION = 0.55
FULL_ROW = 0  # rotated over the whole row
ROTATION_SIZES = (FULL_ROW, 4096, 2048, 1024, 512, 256, 128, 64)  # block_size sizes in columns, tried in this order

VelocityFunction = Callable[[Tensor], Tensor]
_ROTATABLE_LAYERS = (Linear, ScaledLinear)


def noise_correlation(velocity: VelocityFunction, noise: Tensor) -> float:
    """Returns the correlation of the predicted velocity with the noise, in [-1, 1]; 0 if it is not finite.

    Args:
        velocity: predicts the velocity of pure noise, in the shape of the noise.
    """
    predicted = velocity(noise).double().flatten()
    actual = noise.double().flatten()
    predicted, actual = predicted - predicted.mean(), actual - actual.mean()
    correlation = float((predicted @ actual) / (predicted.norm() * actual.norm()).clamp(min=1e-30))
    return correlation if correlation == correlation else 0.0


def detect_and_undo_rotation(module: nn.Module, velocity: VelocityFunction, noise: Tensor) -> int | None:
    """Finds the rotation of the weights of the blocks by trying each size, and undoes it in the module.

    Args:
        module: the transformer that `velocity` evaluates.

    Returns:
        The block size in columns, 0 for whole rows; None if the weights were not rotated.

    Raises:
        ValueError: no rotation makes the model predict as a trained one. It gives the noise correlation as stored.
    """
    correlation = noise_correlation(velocity, noise)
    if correlation >= MIN_NOISE_CORRELATION:
        return None
    for size in ROTATION_SIZES:
        if _try_rotation(module, size, velocity, noise):
            return size
    raise ValueError(f"{correlation:.2f}")


def _try_rotation(module: nn.Module, size: int, velocity: VelocityFunction, noise: Tensor) -> bool:
    """Rotates the weights if the model then predicts as a trained one; returns whether it does."""
    if not rotate_weights(module, size):
        return False
    if noise_correlation(velocity, noise) >= MIN_NOISE_CORRELATION:
        return True
    rotate_weights(module, size)  # undo: a rotation is its own inverse
    return False


def rotate_weights(module: nn.Module, size: int) -> bool:
    """Rotates the weights of the blocks, or rotates them back. Returns False if `size` does not fit their rows."""
    layers = [
        layer for name, layer in module.named_modules() if in_block(name) and isinstance(layer, _ROTATABLE_LAYERS)
    ]
    sizes = [size or layer.weight.shape[1] for layer in layers]
    if any(
        layer.weight.shape[1] % block_size or block_size & (block_size - 1)
        for layer, block_size in zip(layers, sizes, strict=True)
    ):
        return False
    for layer, block_size in zip(layers, sizes, strict=True):
        if isinstance(layer, ScaledLinear):
            layer.rotation_size = None if layer.rotation_size == block_size else block_size
        else:
            layer.weight.data = torch.cat(
                [hadamard_transform(rows, block_size) for rows in layer.weight.data.split(256)]
            )
    return bool(layers)
