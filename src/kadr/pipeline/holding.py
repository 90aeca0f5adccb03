"""How the weights of a part are held, and the bytes that it takes: told from the header, then done to the module."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import nn

from kadr.checkpoints.header import EIGHT_BIT, TensorInfo
from kadr.checkpoints.mapped import prefetch, release
from kadr.checkpoints.open import Checkpoint
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError, KadrWarning, RequestError
from kadr.kernels import fp8, switch
from kadr.kernels.winograd import PAIRS
from kadr.memory.block_swap import Carousel, stream_pages
from kadr.memory.device import DTYPES, has_fast_int8
from kadr.models.adapters import Additions, attach
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.planning.plan import AS_STORED, CONVERTED, OFFLOAD, Choice
from kadr.quant.apply import blocks_of, packing_for, requantize
from kadr.quant.packed import CONVOLUTION, pack_convolutions, pack_matrices, packs_convolutions
from kadr.quant.scheme import AUTO, EIGHT, FP8, FP8_WEIGHTS, INT8, INT8_WEIGHTS, NONE, check_scheme
from kadr.quant.stored import StoredLinear

# What the names of the blocks begin with, in every layout; the number of the block follows.
BLOCKS = ("transformer_blocks.", "encoder.block.", "enc.blk.")
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "token_embd.weight")
_SMALL = ("relative_attention_bias", "attn_rel_b")  # two-dimensional, inside a block, and no product
LOOKED_UP = 20_000_000  # bytes of an embedding's rows that the tokens of a prompt touch, in whole pages read around


@dataclass(frozen=True)
class Weights:
    """The bytes of a part's weights in memory.

    Args:
        mapped: in the pages of files.
        own: others.
        block: of `mapped`, what the largest block has.
        blocks: of `mapped`, what all blocks have.
        all_blocks: of both, what all blocks have.
        count: how many blocks.
        scratch: the largest weight, unpacked; what is made while one weight is changed.
    """

    mapped: int
    own: int
    block: int = 0
    blocks: int = 0
    all_blocks: int = 0
    count: int = 0
    scratch: int = 0


def weigh(
    source: Source,
    dtype: torch.dtype,
    hold: str,
    *,
    looked_up: bool = False,
    packed: bool = False,
    together: int = 0,
) -> Weights:
    """The bytes of a component held in some way.

    Args:
        hold: see `planning.plan.Choice`.
        packed: matrices are packed once they are loaded; see `quant.packed`.
        together: so are convolutions, for so many frames at a time; 0 where they are not.
        looked_up: the component is a text encoder, of whose embedding only some rows are read.
    """
    mapped, own, scratch, everything = 0, 0, 0, 0
    blocks: dict[int, int] = defaultdict(int)
    for name, info in source.infos.items():
        number = block_of(name)
        taken, made = _held_bytes(name, info, dtype, hold, number)
        if hold == CONVERTED and info.packing is None and name.endswith(".weight"):
            if together and len(info.shape) == 5:
                taken, made = 0, int(info.count * dtype.itemsize * CONVOLUTION[together])
            elif packed and len(info.shape) == 2:
                taken, made = 0, info.count * dtype.itemsize
        if looked_up and name in EMBEDDINGS and not made:
            taken = min(taken, LOOKED_UP)
        mapped, own = mapped + taken, own + made
        if number is not None:
            blocks[number] += taken
            everything += taken + made
            if _is_linear(name, info) and info.stored != _name(dtype):
                scratch = max(scratch, info.count * dtype.itemsize)
    largest = max(blocks.values(), default=0)
    return Weights(mapped, own, largest, sum(blocks.values()), everything, len(blocks), scratch)


def _held_bytes(name: str, info: TensorInfo, dtype: torch.dtype, hold: str, number: int | None) -> tuple[int, int]:
    """Bytes of one tensor in mapped pages, and of the process's own."""
    in_block = number is not None and _is_linear(name, info)
    if in_block and hold not in (AS_STORED, CONVERTED):
        return 0, _quantized_bytes(info, hold)
    if info.stored == _name(dtype):
        return info.bytes, 0
    if info.packing is not None and name.endswith(".weight") and len(info.shape) == 2:
        return info.bytes, 0
    if in_block and hold == AS_STORED:
        return info.bytes, 0
    return 0, info.count * dtype.itemsize


def _quantized_bytes(info: TensorInfo, scheme: str) -> int:
    rows, columns = info.shape
    if scheme in EIGHT:
        return rows * (columns + 4)
    return rows * packing_for(scheme, columns).row_bytes(columns)


def block_of(name: str) -> int | None:
    """The number of the block that a tensor belongs to; None for what is around the blocks."""
    for start in BLOCKS:
        if name.startswith(start):
            return int(name[len(start) :].partition(".")[0])
    return None


def is_quantized(source: Source) -> bool:
    """Whether weights of blocks are stored in 8 bits or fewer already."""
    return any(
        info.packing is not None or info.dtype in EIGHT_BIT
        for name, info in source.infos.items()
        if block_of(name) is not None
    )


def check_offload(name: str) -> str:
    """The way of that name to make room.

    Raises:
        RequestError: there is none.
    """
    if name not in OFFLOAD:
        raise RequestError(f"offload is {name!r}; it must be one of {', '.join(OFFLOAD)}.")
    return name


def settled_scheme(name: str | None, transformers: Sequence[Checkpoint], device: torch.device) -> str:
    """How the weights of transformers are to be stored in memory: what was asked for, or what comes near it here.

    Raises:
        RequestError: there is no such scheme.
        CheckpointError: the weights are stored in so few bits already that to round them again would lose twice.
    """
    scheme = check_scheme(name or NONE)
    if scheme in (NONE, AUTO):
        return scheme
    for checkpoint in transformers:
        source = checkpoint.sources["transformer"]
        if is_quantized(source) and not (scheme == FP8 and multiplies_as_stored(source)):
            stored = max(stored_counts(source).items(), key=itemgetter(1))[0]
            raise CheckpointError(
                f"{checkpoint.path} is stored as {stored} already, and to round it to {scheme} would lose twice. "
                "Leave --quant out, or take the bf16 file of the model."
            )
    if scheme == FP8 and not fp8.has_units(device):
        return _without_units([checkpoint.sources["transformer"] for checkpoint in transformers], device)
    if scheme == INT8 and device.type == "cpu" and not has_fast_int8():
        warnings.warn(
            f"this CPU has no instructions for products in 8 bits (VNNI), so {INT8} would be slower than it is now; "
            f"weights are stored in 8 bits and computed with in a wider dtype instead ({INT8_WEIGHTS}).",
            KadrWarning,
            stacklevel=2,
        )
        return INT8_WEIGHTS
    return scheme


def _without_units(sources: Sequence[Source], device: torch.device) -> str:
    """What comes nearest to products in 8-bit floats where there are none."""
    warnings.warn(
        f"{device} does not multiply 8-bit floats (GPUs since Ada and Hopper do): weights are stored in 8 bits and "
        f"computed with in a wider dtype instead ({FP8_WEIGHTS}).",
        KadrWarning,
        stacklevel=3,
    )
    return NONE if any(is_quantized(source) for source in sources) else FP8_WEIGHTS


def multiplies_as_stored(source: Source) -> bool:
    """Whether all weights of blocks that are stored in fewer bits are the 8-bit floats that GPUs multiply."""
    blocks = (info for name, info in source.infos.items() if block_of(name) is not None)
    return all(info.packing is None and info.dtype != torch.float8_e5m2 for info in blocks)


def stored_counts(source: Source) -> Mapping[str, int]:
    """What the weights of the blocks are stored as, with how many of them are."""
    counts: dict[str, int] = defaultdict(int)
    for name, info in source.infos.items():
        if block_of(name) is not None and _is_linear(name, info):
            counts[info.stored] += 1
    return counts


def _is_linear(name: str, info: TensorInfo) -> bool:
    return name.endswith(".weight") and len(info.shape) == 2 and not any(word in name for word in _SMALL)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refuse_merging(transformers: Sequence[Checkpoint]) -> None:
    """Refuse to add LoRAs to weights that are stored in fewer bits: they would have to be rounded again.

    Raises:
        CheckpointError: some are.
    """
    for checkpoint in transformers:
        source = checkpoint.sources["transformer"]
        if is_quantized(source):
            stored = max(stored_counts(source).items(), key=itemgetter(1))[0]
            raise CheckpointError(
                f"{checkpoint.path} is stored as {stored}, and to merge a LoRA its weights would be rounded a second "
                "time. Leave --merge-loras out: beside the weights it loses nothing."
            )


def check_compiled(asked: bool, device: torch.device) -> bool:
    """Whether a transformer's layers are to be compiled.

    Raises:
        RequestError: on a device where that is no gain.
    """
    if asked and device.type != "cuda":
        raise RequestError(
            f"layers are compiled for CUDA alone: on {device.type} it takes longer than it saves, and weights could "
            "not stay in the order of its kernels. Leave --compile out."
        )
    return asked


def compile_layers(module: Transformer, backend: str = "inductor") -> None:
    """Compile a transformer's layers but for the unpacking of weights, which has kernels of its own."""
    for child in module.modules():
        if isinstance(child, StoredLinear):
            child.forward = torch.compiler.disable(child.forward)  # type: ignore[method-assign]
            child.with_gelu = torch.compiler.disable(child.with_gelu)  # type: ignore[method-assign]
    module.compile_layers(backend)


def placed(
    module: nn.Module,
    choice: Choice,
    device: torch.device,
    *,
    compiled: bool = False,
    loras: Sequence[Additions] = (),
) -> nn.Module:
    """A module that was just loaded, held as the plan has it and ready to run.

    Args:
        compiled: compile the layers of a transformer.
        loras: put beside its weights.
    """
    if choice.hold not in (AS_STORED, CONVERTED):
        requantize(module, choice.hold, device=device, release=release)
    if loras:
        attach(module, loras, DTYPES[choice.dtype])
    if compiled and isinstance(module, Transformer):
        if choice.hold == FP8:
            fp8.way(device, DTYPES[choice.dtype])  # found out by trying, which the compiler is not to see
        compile_layers(module)
    if not choice.streamed:
        return packed(module.to(device), DTYPES[choice.dtype], device, choice.together)
    blocks = list(blocks_of(module))
    if device.type == "cpu":
        stream_pages(blocks, release=release, prefetch=prefetch)
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
    recorded = device.type == "cuda" and switch.current() != switch.REFERENCE
    if isinstance(module, Transformer) and device.type == "cpu":
        pack_matrices(module, release=release)
    elif isinstance(module, Transformer) and recorded:
        module.replay()
    elif isinstance(module, VAE) and packs_convolutions(dtype, device):
        pack_convolutions(module, together=together or PAIRS, release=release)
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
