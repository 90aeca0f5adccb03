"""Places a loaded module: quantizes its weights, attaches LoRAs, compiles it, moves it or streams its blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kadr.cancellation import check_cancelled
from kadr.kernels import fp8, mode
from kadr.kernels.cpu.winograd import F23
from kadr.memory.block_swap import BlockSwapper
from kadr.memory.device import DTYPES, move_module
from kadr.memory.mapped_files import release_pages, stream_blocks
from kadr.models.lora_layers import LoraWeightsByLayer, attach_loras
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.nn.weak_method import weak_method
from kadr.planning.placement import AS_STORED, CONVERTED, Placement
from kadr.quant.convert import blocks_of, quantize_blocks
from kadr.quant.layers import DequantizingLinear
from kadr.quant.prepack import prepack_convs, prepack_linears, should_prepack_convs
from kadr.quant.weight_formats import FP8


def compile_blocks(module: Transformer, backend: str = "inductor") -> None:
    """Compiles the blocks of a transformer, except the dequantization of weights, which has its own kernels."""
    for child in module.modules():
        if isinstance(child, DequantizingLinear):
            child.forward = torch.compiler.disable(weak_method(child.forward))  # type: ignore[method-assign]
            child.with_gelu = torch.compiler.disable(weak_method(child.with_gelu))  # type: ignore[method-assign]
    module.compile_blocks(backend)


def place_module(
    module: nn.Module,
    placement: Placement,
    device: torch.device,
    *,
    compile_transformer: bool = False,
    loras: Sequence[LoraWeightsByLayer] = (),
) -> nn.Module:
    """Returns a module that was just loaded in its placement, ready to run.

    Args:
        compile_transformer: compile the blocks, if the module is a transformer.
        loras: LoRAs to attach beside its weights.
    """
    if placement.weight_format not in (AS_STORED, CONVERTED):
        home = torch.device("cpu") if placement.streamed_blocks else device
        quantize_blocks(module, placement.weight_format, device=device, home=home, release=release_pages)
    if loras:
        attach_loras(module, loras, DTYPES[placement.dtype])
    if compile_transformer and isinstance(module, Transformer):
        if placement.weight_format == FP8:
            fp8.select_matmul(
                device, DTYPES[placement.dtype]
            )  # chosen by trial, which must run outside of the compiler
        compile_blocks(module)
    if not placement.streamed_blocks:
        module = move_module(module, device)
        return optimize_for_device(module, DTYPES[placement.dtype], device, placement.winograd_frames)
    blocks = list(blocks_of(module))
    if device.type == "cpu":
        stream_blocks(blocks)
        return module
    streamed = spread_blocks(len(blocks), placement.streamed_blocks)
    _move_other_tensors(module, [block for index, block in enumerate(blocks) if index in streamed], device)
    BlockSwapper([blocks[index] for index in sorted(streamed)], device, pin_memory=placement.pins_blocks)
    return module


def optimize_for_device(module: nn.Module, dtype: torch.dtype, device: torch.device, winograd_frames: int) -> nn.Module:
    """Returns a resident module prepared to run fastest on this device.

    On a CPU its weights are prepacked into the order that kernels read. On a GPU a transformer runs as CUDA graphs and
    a VAE in channels-last memory format.
    """
    use_fast_gpu = device.type == "cuda" and mode.current() != mode.REFERENCE
    if isinstance(module, Transformer) and device.type == "cpu":
        prepack_linears(module, release=release_pages)
    elif isinstance(module, Transformer) and use_fast_gpu:
        module.use_cuda_graphs()
    elif isinstance(module, VAE) and should_prepack_convs(dtype, device):
        prepack_convs(module, winograd_frames=winograd_frames or F23, release=release_pages)
    elif isinstance(module, VAE) and use_fast_gpu:
        module.to(memory_format=torch.channels_last_3d)
    return module


def spread_blocks(count: int, num_chosen: int) -> set[int]:
    """Returns the indices of `num_chosen` of `count` blocks, spread evenly: each copy then overlaps the most work."""
    return {index * count // num_chosen for index in range(num_chosen)}


def _move_other_tensors(module: nn.Module, excluded_blocks: list[nn.Module], device: torch.device) -> None:
    """Moves all tensors of a module to a device, except those of some of its blocks."""
    excluded = {id(tensor) for block in excluded_blocks for tensor in (*block.parameters(), *block.buffers())}
    for tensor in (*module.parameters(), *module.buffers()):
        check_cancelled()
        if id(tensor) not in excluded:
            tensor.data = tensor.data.to(device)
