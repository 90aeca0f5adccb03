"""How the weights of a part are held, and the bytes that it takes: told from the header, then done to the module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kadr.checkpoints.memory_map import prefetch_pages, release_pages
from kadr.kernels import fp8, mode
from kadr.kernels.cpu.winograd import F23
from kadr.memory.block_swap import BlockSwapper, stream_mapped_blocks
from kadr.memory.device import DTYPES
from kadr.models.lora_layers import LoraWeightsByLayer, attach_loras
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.planning.plan import AS_STORED, CONVERTED, Placement
from kadr.quant.convert import blocks_of, quantize_blocks
from kadr.quant.layers import DequantizingLinear
from kadr.quant.prepack import prepack_convs, prepack_linears, should_prepack_convs
from kadr.quant.weight_formats import FP8


def compile_blocks(module: Transformer, backend: str = "inductor") -> None:
    """Compile a transformer's layers but for the unpacking of weights, which has kernels of its own."""
    for child in module.modules():
        if isinstance(child, DequantizingLinear):
            child.forward = torch.compiler.disable(child.forward)  # type: ignore[method-assign]
            child.with_gelu = torch.compiler.disable(child.with_gelu)  # type: ignore[method-assign]
    module.compile_blocks(backend)


def place_module(
    module: nn.Module,
    placement: Placement,
    device: torch.device,
    *,
    compile_transformer: bool = False,
    loras: Sequence[LoraWeightsByLayer] = (),
) -> nn.Module:
    """A module that was just loaded, held as the plan has it and ready to run.

    Args:
        compile_transformer: compile the layers of a transformer.
        loras: put beside its weights.
    """
    if placement.weight_format not in (AS_STORED, CONVERTED):
        quantize_blocks(module, placement.weight_format, device=device, release=release_pages)
    if loras:
        attach_loras(module, loras, DTYPES[placement.dtype])
    if compile_transformer and isinstance(module, Transformer):
        if placement.weight_format == FP8:
            fp8.select_matmul(device, DTYPES[placement.dtype])  # found out by trying, which the compiler is not to see
        compile_blocks(module)
    if not placement.streamed_blocks:
        return optimize_for_device(module.to(device), DTYPES[placement.dtype], device, placement.winograd_frames)
    blocks = list(blocks_of(module))
    if device.type == "cpu":
        stream_mapped_blocks(blocks, release=release_pages, prefetch=prefetch_pages)
        return module
    away = spread_blocks(len(blocks), placement.streamed_blocks)
    _move_other_tensors(module, [block for index, block in enumerate(blocks) if index in away], device)
    BlockSwapper([blocks[index] for index in sorted(away)], device)
    return module


def optimize_for_device(module: nn.Module, dtype: torch.dtype, device: torch.device, winograd_frames: int) -> nn.Module:
    """A module that stays where it is, as it runs fastest on this machine.

    On a CPU its weights are put into the order that kernels read them in. On a GPU a transformer's layers are recorded,
    and videos go through a VAE channels last.
    """
    recorded = device.type == "cuda" and mode.current() != mode.REFERENCE
    if isinstance(module, Transformer) and device.type == "cpu":
        prepack_linears(module, release=release_pages)
    elif isinstance(module, Transformer) and recorded:
        module.use_cuda_graphs()
    elif isinstance(module, VAE) and should_prepack_convs(dtype, device):
        prepack_convs(module, winograd_frames=winograd_frames or F23, release=release_pages)
    elif isinstance(module, VAE) and recorded:
        module.to(memory_format=torch.channels_last_3d)
    return module


def spread_blocks(count: int, num_chosen: int) -> set[int]:
    """`num_chosen` of `count` blocks, as far from each other as can be: each copy then has the most work to hide under."""
    return {index * count // num_chosen for index in range(num_chosen)}


def _move_other_tensors(module: nn.Module, excluded_blocks: list[nn.Module], device: torch.device) -> None:
    """Move all tensors of a module to a device, but for those of some of its blocks."""
    kept = {id(tensor) for block in excluded_blocks for tensor in (*block.parameters(), *block.buffers())}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in kept:
            tensor.data = tensor.data.to(device)
