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
from kadr.kernels.ggml_types import GGML_TYPES, GGMLType
from kadr.nn.linear import Linear
from kadr.quant.ggml import quantize
from kadr.quant.layers import (
    Fp8Linear,
    GGMLEmbedding,
    GGMLLinear,
    Int8Linear,
    ScaledLinear,
    Scratch,
    W8A8Linear,
)
from kadr.quant.mixes import FALLBACK_TYPES
from kadr.quant.weight_formats import FP8, FP8_WEIGHT_ONLY, INT8, INT8_WEIGHT_ONLY

BLOCK_LIST_NAME = "blocks"  # of a transformer and of a text encoder
ReleaseTensors = Callable[[Iterable[Tensor]], None]


def release_nothing(tensors: Iterable[Tensor]) -> None:
    """Let go of nothing."""


def blocks_of(module: nn.Module) -> nn.ModuleList:
    """The blocks of a transformer or a text encoder."""
    return getattr(module, BLOCK_LIST_NAME)


def in_block(name: str) -> bool:
    """Whether a module or parameter of that name is inside a block."""
    return name.partition(".")[0] == BLOCK_LIST_NAME


def linears_in_blocks(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The layers whose storage may be changed, with their names."""
    for name, child in list(module.named_modules()):
        if isinstance(child, Linear) and in_block(name):
            yield name, child


def wrap_stored_weight(
    layer: nn.Module,
    weight: Tensor,
    *,
    ggml_type: GGMLType | None,
    scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    scratch: Scratch,
) -> nn.Module:
    """What takes the place of a layer, so that its weight can stay as the file has it.

    Args:
        layer: the layer, a `Linear` or an embedding; on meta.
        weight: as stored: packed, or in a float dtype.
        scale: of a weight in 8-bit floats.
        dtype: that is computed in.
    """
    if isinstance(layer, nn.Embedding):
        assert ggml_type is not None
        return GGMLEmbedding(weight, ggml_type, layer.embedding_dim, dtype)
    if ggml_type is not None:
        return GGMLLinear(weight, ggml_type, layer.in_features, bias, scratch)
    return ScaledLinear(weight, None if scale is None else scale.float().reshape(-1, 1), bias, scratch)


def quantize_blocks(
    module: nn.Module, weight_format: str, *, device: torch.device, release: ReleaseTensors = release_nothing
) -> None:
    """Store the layers inside the blocks otherwise, one after the other: no second copy of the module is made.

    Args:
        module: its weights are plain numbers; for "fp8" they may be 8-bit floats already, which stay what they are.
        weight_format: of `weight_format.SCHEMES`, neither "none" nor "auto".
        device: where the new weights go; the arithmetic is done there.
        release: told of each weight that is not needed any more.

    Raises:
        CheckpointError: a weight that is stored in fewer bits already, or that is not finite.
    """
    scratch = Scratch()
    if weight_format == FP8 and _use_fp8_matmul(module, device):
        return
    refuse_quantized(module)
    for name, linear in linears_in_blocks(module):
        weight, bias = linear.weight.detach(), linear.bias
        try:
            made = _quantized_layer(
                weight.to(device), None if bias is None else bias.detach().to(device), weight_format, scratch
            )
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be stored as {weight_format}: {error}. Verify the file.") from error
        replace_module(module, name, made)
        release([weight])


def refuse_quantized(module: nn.Module) -> None:
    """Refuse to quantize what is quantized: it would lose twice."""
    for name, child in module.named_modules():
        if in_block(name) and isinstance(child, GGMLLinear | ScaledLinear | W8A8Linear):
            raise CheckpointError(
                f"{name} is stored in fewer bits already, and to round it again would lose twice. Leave --quant out, "
                "or take the bf16 file of the model."
            )


def _use_fp8_matmul(module: nn.Module, device: torch.device) -> bool:
    """Multiply in 8 bits what is stored in 8-bit floats. False where nothing is.

    Turned weights stay as they are, and so does what GPUs do not multiply for its sides.
    """
    stored = [
        (name, child)
        for name, child in module.named_modules()
        if in_block(name) and isinstance(child, ScaledLinear) and child.weight.dtype == fp8.E4M3
    ]
    for name, child in stored:
        if child.rotation_size is None and fp8.supports_shape(*child.weight.shape):
            scale = child.weight.new_ones(1, 1, dtype=torch.float32) if child.scale is None else child.scale
            rows = scale.expand(len(child.weight), 1).flatten()
            replace_module(module, name, Fp8Linear(child.weight, rows, child.bias).to(device))
    return bool(stored)


def replace_module(module: nn.Module, name: str, child: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, child.eval())


def _quantized_layer(weight: Tensor, bias: Tensor | None, weight_format: str, scratch: Scratch) -> nn.Module:
    if not bool(torch.isfinite(weight.sum(dtype=torch.float32))):
        raise ValueError("it has numbers that are not finite")
    if weight_format in (INT8, INT8_WEIGHT_ONLY):
        numbers, scale = _quantize_in_slices(weight, int8.quantize_rows)
        if weight_format == INT8 and int8.supports_shape(*weight.shape):
            return Int8Linear(numbers, scale.flatten(), bias)
        return ScaledLinear(numbers, scale, bias, scratch)
    if weight_format in (FP8, FP8_WEIGHT_ONLY):
        numbers, scale = _quantize_in_slices(weight, quantize_rows_fp8)
        if weight_format == FP8 and fp8.supports_shape(*weight.shape):
            return Fp8Linear(numbers, scale.flatten(), bias)
        return ScaledLinear(numbers, scale, bias, scratch)
    packing = ggml_type_for(weight_format, weight.shape[1])
    return GGMLLinear(quantize(weight, packing), packing, weight.shape[1], bias, scratch)


def quantize_rows_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (rows, columns) -> float8_e4m3fn, and the scale (rows, 1) in fp32 that gives it back."""
    return reference.quantize_rows(weight, fp8.E4M3)


def ggml_type_for(name: str, columns: int) -> GGMLType:
    """The packing of that name, or the one that takes its place where rows are no whole number of its blocks.

    Raises:
        CheckpointError: none fits.
    """
    for candidate in (GGML_TYPES[name], GGML_TYPES[FALLBACK_TYPES.get(name, name)]):
        if columns % candidate.block_size == 0:
            return candidate
    raise CheckpointError(
        f"rows of {columns} numbers are no whole number of {name} blocks. Use {INT8_WEIGHT_ONLY} or {FP8} for this model."
    )


def _quantize_in_slices(
    weight: Tensor, quantize_rows: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """A rule that works row by row, for a piece of the rows at a time: its temporaries are wide."""
    made = [quantize_rows(piece) for piece in weight.split(max(1, 4_194_304 // weight.shape[1]))]
    return torch.cat([numbers for numbers, _ in made]), torch.cat([scale for _, scale in made])
