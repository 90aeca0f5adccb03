"""How the weights of a part are held, and the bytes that it takes: told from the header, then done to the module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kadr.checkpoints.memory_map import prefetch_pages, release_pages
from kadr.kernels import fp8, mode
from kadr.kernels.cpu.winograd import F23
from kadr.memory.block_swap import Carousel, stream_pages
from kadr.memory.device import DTYPES
from kadr.models.lora_layers import LoraWeightsByLayer, attach_loras
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.planning.plan import AS_STORED, CONVERTED, Choice
from kadr.quant.convert import blocks_of, quantize_blocks
from kadr.quant.layers import DequantizingLinear
from kadr.quant.prepack import prepack_convs, prepack_linears, should_prepack_convs
from kadr.quant.weight_formats import FP8


def compile_layers(module: Transformer, backend: str = "inductor") -> None:
    """Compile a transformer's layers but for the unpacking of weights, which has kernels of its own."""
    for child in module.modules():
        if isinstance(child, DequantizingLinear):
            child.forward = torch.compiler.disable(child.forward)  # type: ignore[method-assign]
            child.with_gelu = torch.compiler.disable(child.with_gelu)  # type: ignore[method-assign]
    module.compile_blocks(backend)


def placed(
    module: nn.Module,
    choice: Choice,
    device: torch.device,
    *,
    compiled: bool = False,
    loras: Sequence[LoraWeightsByLayer] = (),
) -> nn.Module:
    """A module that was just loaded, held as the plan has it and ready to run.

    Args:
        compiled: compile the layers of a transformer.
        loras: put beside its weights.
    """
    if choice.hold not in (AS_STORED, CONVERTED):
        quantize_blocks(module, choice.hold, device=device, release=release_pages)
    if loras:
        attach_loras(module, loras, DTYPES[choice.dtype])
    if compiled and isinstance(module, Transformer):
        if choice.hold == FP8:
            fp8.select_matmul(device, DTYPES[choice.dtype])  # found out by trying, which the compiler is not to see
        compile_layers(module)
    if not choice.streamed:
        return packed(module.to(device), DTYPES[choice.dtype], device, choice.together)
    blocks = list(blocks_of(module))
    if device.type == "cpu":
        stream_pages(blocks, release=release_pages, prefetch=prefetch_pages)
        return module
    away = spread(len(blocks), choice.streamed)
    _move_others(module, [block for index, block in enumerate(blocks) if index in away], device)
    Carousel([blocks[index] for index in sorted(away)], device)
    return module


def packed(module: nn.Module, dtype: torch.dtype, device: torch.device, together: int) -> nn.Module:
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
        prepack_convs(module, winograd_frames=together or F23, release=release_pages)
    elif isinstance(module, VAE) and recorded:
        module.to(memory_format=torch.channels_last_3d)
    return module


def spread(count: int, chosen: int) -> set[int]:
    """`chosen` of `count` blocks, as far from each other as can be: each copy then has the most work to hide under."""
    return {index * count // chosen for index in range(chosen)}


def _move_others(module: nn.Module, staying: list[nn.Module], device: torch.device) -> None:
    """Move all tensors of a module to a device, but for those of some of its blocks."""
    kept = {id(tensor) for block in staying for tensor in (*block.parameters(), *block.buffers())}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in kept:
            tensor.data = tensor.data.to(device)
