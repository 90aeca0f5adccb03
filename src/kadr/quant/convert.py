"""Changes the weight format of a finished module.

Only the layers inside the blocks change, attention and feed-forward: nearly all of the bytes. Embeddings, modulation,
and the projections in and out stay as they are, as in the released fp8 files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from kadr.cancellation import check_cancelled
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

BLOCK_LIST_NAME = "blocks"  # attribute of a transformer and of a text encoder
ReleaseTensors = Callable[[Iterable[Tensor]], None]


def release_nothing(tensors: Iterable[Tensor]) -> None:
    """Releases nothing: the weights that were replaced are only garbage-collected."""


def blocks_of(module: nn.Module) -> nn.ModuleList:
    """Returns the blocks of a transformer or a text encoder."""
    return getattr(module, BLOCK_LIST_NAME)


def in_block(name: str) -> bool:
    """Returns whether a module or parameter of that name is inside a block."""
    return name.partition(".")[0] == BLOCK_LIST_NAME


def linears_in_blocks(module: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Yields the layers whose weight format can be changed, with their names."""
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
    """Returns a module that replaces `layer` and keeps its weight as the file stores it.

    Args:
        layer: a `Linear` or an embedding, on the meta device.
        weight: as stored: in GGML's blocks, or in a float dtype.
        ggml_type: block format of `weight`, or None.
        scale: of a weight in 8-bit floats.
        dtype: the dtype of the output of an embedding.
        scratch: the buffer that the weight is dequantized into.
    """
    if isinstance(layer, nn.Embedding):
        assert ggml_type is not None
        return GGMLEmbedding(weight, ggml_type, layer.embedding_dim, dtype)
    if ggml_type is not None:
        return GGMLLinear(weight, ggml_type, layer.in_features, bias, scratch)
    return ScaledLinear(weight, None if scale is None else scale.float().reshape(-1, 1), bias, scratch)


def quantize_blocks(
    module: nn.Module,
    weight_format: str,
    *,
    device: torch.device,
    home: torch.device | None = None,
    release: ReleaseTensors = release_nothing,
) -> None:
    """Quantizes the layers inside the blocks, one after the other, without a second copy of the module.

    Args:
        module: has unquantized weights; for "fp8" they may be 8-bit floats already, whose values stay.
        weight_format: a key of `WEIGHT_FORMATS`, neither "none" nor "auto".
        device: where the new weights are computed.
        home: where they stay, layer by layer; None: on `device`.
        release: called with each weight that was replaced.

    Raises:
        CheckpointError: a weight is quantized already, or not finite.
    """
    scratch, home = Scratch(), device if home is None else home
    if weight_format == FP8 and _use_fp8_matmul(module, home):
        return
    refuse_quantized(module)
    for name, linear in linears_in_blocks(module):
        check_cancelled()
        weight, bias = linear.weight.detach(), linear.bias
        try:
            quantized = _quantized_layer(
                weight.to(device), None if bias is None else bias.detach().to(device), weight_format, scratch
            )
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be stored as {weight_format}: {error}. Verify the file.") from error
        replace_module(module, name, quantized.to(home))
        release([weight])


def refuse_quantized(module: nn.Module) -> None:
    """Refuses a module that is quantized already: rounding twice loses twice.

    Raises:
        CheckpointError: a layer inside the blocks is quantized.
    """
    for name, child in module.named_modules():
        if in_block(name) and isinstance(child, GGMLLinear | ScaledLinear | W8A8Linear):
            raise CheckpointError(
                f"{name} is quantized already, and rounding it again would lose twice. Leave --quant out, or use the "
                "bf16 file of the model."
            )


def _use_fp8_matmul(module: nn.Module, device: torch.device) -> bool:
    """Replaces layers stored in 8-bit floats by ones that multiply in 8 bits. Returns whether there are any.

    Hadamard-rotated weights stay as they are, and so do those whose shape no fp8 matmul supports.
    """
    fp8_layers = [
        (name, child)
        for name, child in module.named_modules()
        if in_block(name) and isinstance(child, ScaledLinear) and child.weight.dtype == fp8.E4M3
    ]
    for name, child in fp8_layers:
        if child.rotation_size is None and fp8.supports_shape(*child.weight.shape):
            scale = child.weight.new_ones(1, 1, dtype=torch.float32) if child.scale is None else child.scale
            row_scales = scale.expand(len(child.weight), 1).flatten()
            replace_module(module, name, Fp8Linear(child.weight, row_scales, child.bias).to(device))
    return bool(fp8_layers)


def replace_module(module: nn.Module, name: str, child: nn.Module) -> None:
    """Replaces the module of that name by `child`."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, child.eval())


def _quantized_layer(weight: Tensor, bias: Tensor | None, weight_format: str, scratch: Scratch) -> nn.Module:
    if not bool(torch.isfinite(weight.sum(dtype=torch.float32))):
        raise ValueError("it has values that are not finite")
    if weight_format in (INT8, INT8_WEIGHT_ONLY):
        codes, scale = _quantize_in_slices(weight, int8.quantize_rows)
        if weight_format == INT8 and int8.supports_shape(*weight.shape):
            return Int8Linear(codes, scale.flatten(), bias)
        return ScaledLinear(codes, scale, bias, scratch)
    if weight_format in (FP8, FP8_WEIGHT_ONLY):
        codes, scale = _quantize_in_slices(weight, quantize_rows_fp8)
        if weight_format == FP8 and fp8.supports_shape(*weight.shape):
            return Fp8Linear(codes, scale.flatten(), bias)
        return ScaledLinear(codes, scale, bias, scratch)
    ggml_type = ggml_type_for(weight_format, weight.shape[1])
    return GGMLLinear(quantize(weight, ggml_type), ggml_type, weight.shape[1], bias, scratch)


def quantize_rows_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes weight (rows, columns) to float8_e4m3fn codes and fp32 scales (rows, 1)."""
    return reference.quantize_rows(weight, fp8.E4M3)


def ggml_type_for(name: str, columns: int) -> GGMLType:
    """Returns the GGML type of that name, or its fallback if rows of `columns` do not divide into its blocks.

    Raises:
        CheckpointError: they do not divide into blocks of the fallback either.
    """
    for candidate in (GGML_TYPES[name], GGML_TYPES[FALLBACK_TYPES.get(name, name)]):
        if columns % candidate.block_size == 0:
            return candidate
    raise CheckpointError(
        f"rows of {columns} elements do not divide into {name} blocks. Use {INT8_WEIGHT_ONLY} or {FP8} for this model."
    )


def _quantize_in_slices(
    weight: Tensor, quantize_rows: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Applies `quantize_rows` to a slice of the rows at a time, because its temporaries are in float32."""
    quantized = []
    for rows in weight.split(max(1, 4_194_304 // weight.shape[1])):
        check_cancelled()
        quantized.append(quantize_rows(rows))
    return torch.cat([codes for codes, _ in quantized]), torch.cat([scale for _, scale in quantized])
