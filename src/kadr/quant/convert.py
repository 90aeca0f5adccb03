"""Change how the weights of a finished module are stored.

The layers changed are those inside the blocks, attention and feed-forward: nearly all of the bytes. What is around them
(embeddings, modulation, the way in and out) stays as it is, as in the released fp8 files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from kadr.errors import CheckpointError
from kadr.kernels import fp8, int8, reference
from kadr.kernels.ggml_types import PACKINGS, Packing
from kadr.nn.linear import Linear
from kadr.quant.ggml import quantize
from kadr.quant.layers import (
    EightBitLinear,
    Fp8Linear,
    Int8Linear,
    PackedLinear,
    ScaledLinear,
    Scratch,
    StoredEmbedding,
)
from kadr.quant.mixes import FALLBACK
from kadr.quant.weight_formats import FP8, FP8_WEIGHTS, INT8, INT8_WEIGHTS

BLOCKS = ("layers", "blocks")  # where a transformer and a text encoder have theirs
Release = Callable[[Iterable[Tensor]], None]


def nothing(tensors: Iterable[Tensor]) -> None:
    """Let go of nothing."""


def blocks_of(module: nn.Module) -> nn.ModuleList:
    """The blocks of a transformer or a text encoder."""
    return next(getattr(module, name) for name in BLOCKS if hasattr(module, name))


def in_block(name: str) -> bool:
    """Whether a module or parameter of that name is inside a block."""
    return name.partition(".")[0] in BLOCKS


def block_linears(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The layers whose storage may be changed, with their names."""
    for name, child in list(module.named_modules()):
        if isinstance(child, Linear) and in_block(name):
            yield name, child


def held(
    owner: nn.Module,
    weight: Tensor,
    *,
    packing: Packing | None,
    scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    scratch: Scratch,
) -> nn.Module:
    """What takes the place of a layer, so that its weight can stay as the file has it.

    Args:
        owner: the layer, a `Linear` or an embedding; on meta.
        weight: as stored: packed, or in a float dtype.
        scale: of a weight in 8-bit floats.
        dtype: that is computed in.
    """
    if isinstance(owner, nn.Embedding):
        assert packing is not None
        return StoredEmbedding(weight, packing, owner.embedding_dim, dtype)
    if packing is not None:
        return PackedLinear(weight, packing, owner.in_features, bias, scratch)
    return ScaledLinear(weight, None if scale is None else scale.float().reshape(-1, 1), bias, scratch)


def requantize(module: nn.Module, scheme: str, *, device: torch.device, release: Release = nothing) -> None:
    """Store the layers inside the blocks otherwise, one after the other: no second copy of the module is made.

    Args:
        module: its weights are plain numbers; for "fp8" they may be 8-bit floats already, which stay what they are.
        scheme: of `scheme.SCHEMES`, neither "none" nor "auto".
        device: where the new weights go; the arithmetic is done there.
        release: told of each weight that is not needed any more.

    Raises:
        CheckpointError: a weight that is stored in fewer bits already, or that is not finite.
    """
    scratch = Scratch()
    if scheme == FP8 and _multiply_as_stored(module, device):
        return
    refuse_quantized(module)
    for name, linear in block_linears(module):
        weight, bias = linear.weight.detach(), linear.bias
        try:
            made = _made(weight.to(device), None if bias is None else bias.detach().to(device), scheme, scratch)
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be stored as {scheme}: {error}. Verify the file.") from error
        replace(module, name, made)
        release([weight])


def refuse_quantized(module: nn.Module) -> None:
    """Refuse to quantize what is quantized: it would lose twice."""
    for name, child in module.named_modules():
        if in_block(name) and isinstance(child, PackedLinear | ScaledLinear | EightBitLinear):
            raise CheckpointError(
                f"{name} is stored in fewer bits already, and to round it again would lose twice. Leave --quant out, "
                "or take the bf16 file of the model."
            )


def _multiply_as_stored(module: nn.Module, device: torch.device) -> bool:
    """Multiply in 8 bits what is stored in 8-bit floats. False where nothing is.

    Turned weights stay as they are, and so does what GPUs do not multiply for its sides.
    """
    stored = [
        (name, child)
        for name, child in module.named_modules()
        if in_block(name) and isinstance(child, ScaledLinear) and child.weight.dtype == fp8.E4M3
    ]
    for name, child in stored:
        if child.rotation is None and fp8.fits(*child.weight.shape):
            scale = child.weight.new_ones(1, 1, dtype=torch.float32) if child.scale is None else child.scale
            rows = scale.expand(len(child.weight), 1).flatten()
            replace(module, name, Fp8Linear(child.weight, rows, child.bias).to(device))
    return bool(stored)


def replace(module: nn.Module, name: str, child: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, child.eval())


def _made(weight: Tensor, bias: Tensor | None, scheme: str, scratch: Scratch) -> nn.Module:
    if not bool(torch.isfinite(weight.sum(dtype=torch.float32))):
        raise ValueError("it has numbers that are not finite")
    if scheme in (INT8, INT8_WEIGHTS):
        numbers, scale = _by_rows(weight, int8.quantize_rows)
        if scheme == INT8 and int8.fits(*weight.shape):
            return Int8Linear(numbers, scale.flatten(), bias)
        return ScaledLinear(numbers, scale, bias, scratch)
    if scheme in (FP8, FP8_WEIGHTS):
        numbers, scale = _by_rows(weight, quantize_fp8)
        if scheme == FP8 and fp8.fits(*weight.shape):
            return Fp8Linear(numbers, scale.flatten(), bias)
        return ScaledLinear(numbers, scale, bias, scratch)
    packing = packing_for(scheme, weight.shape[1])
    return PackedLinear(quantize(weight, packing), packing, weight.shape[1], bias, scratch)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (rows, columns) -> float8_e4m3fn, and the scale (rows, 1) in fp32 that gives it back."""
    return reference.quantize_rows(weight, fp8.E4M3)


def packing_for(name: str, columns: int) -> Packing:
    """The packing of that name, or the one that takes its place where rows are no whole number of its blocks.

    Raises:
        CheckpointError: none fits.
    """
    for candidate in (PACKINGS[name], PACKINGS[FALLBACK.get(name, name)]):
        if columns % candidate.elements == 0:
            return candidate
    raise CheckpointError(
        f"rows of {columns} numbers are no whole number of {name} blocks. Use {INT8_WEIGHTS} or {FP8} for this model."
    )


def _by_rows(weight: Tensor, rule: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A rule that works row by row, for a piece of the rows at a time: its temporaries are wide."""
    made = [rule(piece) for piece in weight.split(max(1, 4_194_304 // weight.shape[1]))]
    return torch.cat([numbers for numbers, _ in made]), torch.cat([scale for _, scale in made])
