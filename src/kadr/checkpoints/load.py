"""Tensors into modules, strictly: every tensor of the file has a place, every place gets its tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kadr.checkpoints.fp8_scales import belonging, scaled, scales_of
from kadr.checkpoints.header import EIGHT_BIT, TensorInfo
from kadr.checkpoints.keys import T5, T5_UNUSED, TRANSFORMER, UPSAMPLER, VAE_UNUSED, Key, names
from kadr.checkpoints.keys import VAE as VAE_KEYS
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.kernels.dequant import dequantize
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.models.upscaler import LatentUpscaler, UpscalerConfig
from kadr.models.vae import VAE, VAEConfig
from kadr.nn.linear import Linear
from kadr.quant.convert import in_block, replace_module, wrap_stored_weight
from kadr.quant.layers import Scratch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHOWN = 5  # tensors of each kind of complaint
_T5_EMBEDDING = "shared.weight"
_WEIGHT = ".weight"
_POSITION_BIAS = "position_bias.weight"  # small, and read whole: it is not worth keeping packed


def fill(
    module: nn.Module,
    source: Source,
    wanted: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    as_stored: bool = False,
    known_unused: Iterable[str] = (),
) -> None:
    """Give every parameter and buffer of a module its tensor from a source.

    Where the dtypes agree the module shares its memory with the file. Weights packed in blocks stay packed and are
    unpacked as they are used; all else is converted, one by one.

    Args:
        module: on the meta device.
        wanted: our name -> the source's, for every name in the module's state.
        dtype: bf16, fp16 or fp32; None keeps each tensor as it is stored. Weights stored in blocks or 8-bit floats are
            read into a wider dtype only.
        as_stored: weights of the module's blocks stay as they are in the file, whatever they are, and are converted as
            they are used.
        known_unused: names that the source may have and nobody reads.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or of a dtype that is not read.
    """
    account(module, source, wanted, known_unused=known_unused)
    assign(module, source, wanted, dtype=dtype, as_stored=as_stored)


def account(module: nn.Module, source: Source, wanted: Mapping[str, str], *, known_unused: Iterable[str] = ()) -> None:
    """Check that module and source have the same tensors, from the header alone. As `fill`, without filling."""
    places = {wanted[ours]: tuple(tensor.shape) for ours, tensor in module.state_dict().items()}
    infos = source.infos
    shared = [name for name in places if name in infos]
    complaints = [
        ("missing", [name for name in places if name not in infos]),
        ("left over", sorted(infos.keys() - places.keys() - set(known_unused) - belonging(infos))),
        (
            "of another shape",
            [
                f"{n} is {_shape(infos[n].shape)}, not {_shape(places[n])}"
                for n in shared
                if infos[n].shape != places[n]
            ],
        ),
        (
            "stored in a dtype that is not read here",
            [f"{n} in {infos[n].stored}" for n in shared if not _is_read(infos[n])],
        ),
    ]
    if any(found for _, found in complaints):
        told = "; ".join(f"{len(found)} tensors {what}: {_some(found)}" for what, found in complaints if found)
        raise CheckpointError(
            f"{source.path} does not fit its {type(module).__name__.lower()}: {told}. "
            "The file is incomplete or of another model; take it as it was released."
        )


def _is_read(info: TensorInfo) -> bool:
    return info.packing is not None or info.dtype in (*DTYPES, *EIGHT_BIT)


def assign(
    module: nn.Module,
    source: Source,
    wanted: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    as_stored: bool = False,
) -> None:
    """Put the tensors in their places. The module is then ready for inference: in eval mode, without gradients."""
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"weights cannot be held in {_dtype(dtype)}; use bfloat16, float16 or float32.")
    _refuse_narrow(module, source, wanted, dtype)
    module.requires_grad_(False).eval()
    reader = _Reader(source, wanted, dtype, as_stored)
    state, stored = {}, {}
    for ours in module.state_dict():
        if reader.stays(ours, module):
            stored[ours.removesuffix(_WEIGHT)] = reader.weight(ours)
        else:
            state[ours] = reader.plain(ours)
    scratch = Scratch()
    for name, weight in stored.items():
        owner = module.get_submodule(name)
        own = dtype or torch.bfloat16
        bias = state.pop(f"{name}.bias", None)
        replace_module(module, name, wrap_stored_weight(owner, bias=bias, dtype=own, scratch=scratch, **weight))
    module.load_state_dict(state, strict=not stored, assign=True)


def _refuse_narrow(module: nn.Module, source: Source, wanted: Mapping[str, str], dtype: torch.dtype | None) -> None:
    """Refuse to compute in what weights are only stored in."""
    infos = [source.infos[wanted[ours]] for ours in module.state_dict()]
    narrow = [info for info in infos if info.packing is not None or info.dtype in EIGHT_BIT]
    if dtype is None and narrow:
        raise CheckpointError(
            f"{source.path} stores {len(narrow)} tensors in 8-bit floats or blocks, such as {narrow[0].name} in "
            f"{narrow[0].stored}; nothing is computed in those. Ask for bfloat16, float16 or float32."
        )


@dataclass(frozen=True)
class _Reader:
    """Takes tensors from a source; arguments as of `fill`."""

    source: Source
    wanted: Mapping[str, str]
    dtype: torch.dtype | None
    as_stored: bool

    @cached_property
    def scales(self) -> dict[str, str]:
        return scales_of(self.source.infos, self.wanted.values())

    def stays(self, ours: str, module: nn.Module) -> bool:
        """Whether a tensor of the module stays as it is stored."""
        if not ours.endswith(_WEIGHT):
            return False
        owner = module.get_submodule(ours.removesuffix(_WEIGHT))
        info = self.source.infos[self.wanted[ours]]
        if info.packing is not None:
            return isinstance(owner, Linear | nn.Embedding) and len(info.shape) == 2 and ours != _POSITION_BIAS
        return self.as_stored and isinstance(owner, Linear) and in_block(ours) and info.dtype != self.dtype

    def weight(self, ours: str) -> dict[str, Any]:
        """A weight as it is stored, in the words of `held`."""
        theirs = self.wanted[ours]
        return {
            "weight": self.source.read(theirs),
            "packing": self.source.infos[theirs].packing,
            "scale": self._scale(theirs),
        }

    def plain(self, ours: str) -> Tensor:
        """A tensor in plain numbers of the dtype."""
        theirs = self.wanted[ours]
        info, tensor = self.source.infos[theirs], self.source.read(theirs)
        if info.packing is not None:
            assert self.dtype is not None
            made = torch.empty(len(tensor), info.count // max(1, len(tensor)), dtype=self.dtype)
            return dequantize(tensor, info.packing, made).view(info.shape)
        return tensor if self.dtype is None else scaled(tensor, self._scale(theirs), self.dtype)

    def _scale(self, theirs: str) -> Tensor | None:
        name = self.scales.get(theirs)
        return None if name is None else self.source.read(name)


def load_transformer(
    config: TransformerConfig,
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    diffusers: bool = False,
    as_stored: bool = False,
) -> Transformer:
    """The transformer, on the CPU.

    Args:
        source: its tensors, under their names without prefix.
        diffusers: the names are those of a diffusers folder.
        as_stored: see `fill`.

    Raises:
        CheckpointError: see `fill`.
    """
    with torch.device("meta"):
        module = Transformer(config)
    wanted = names(TRANSFORMER, module.state_dict(), diffusers=diffusers)
    fill(module, source, wanted, dtype=dtype, as_stored=as_stored)
    return module


def load_vae(
    config: VAEConfig,
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    diffusers_family: str | None = None,
    encoder: bool = True,
    decoder: bool = True,
) -> VAE:
    """The VAE, on the CPU.

    Args:
        source: its tensors, under their names without prefix.
        diffusers_family: of `keys.DIFFUSERS_BLOCKS`, where the names are those of a diffusers folder.
        encoder, decoder: a part that is not asked for is None in the module and takes no memory. It is accounted for
            all the same.

    Raises:
        CheckpointError: see `fill`.
    """
    with torch.device("meta"):
        module = VAE(config)
    diffusers = diffusers_family is not None
    wanted = names(VAE_KEYS, module.state_dict(), diffusers=diffusers, diffusers_family=diffusers_family)
    account(module, source, wanted, known_unused=() if diffusers else VAE_UNUSED)
    for part, asked in (("encoder", encoder), ("decoder", decoder)):
        if not asked:
            setattr(module, part, None)
    assign(module, source, wanted, dtype=dtype)
    return module


def load_upsampler(
    config: UpscalerConfig, source: Source, *, dtype: torch.dtype | None = torch.float32
) -> LatentUpscaler:
    """The upscaler, on the CPU.

    Args:
        source: its tensors, of a single file or a diffusers folder: the names are the same.
        dtype: float32 unless asked otherwise, which is what the released ones are stored and run in.

    Raises:
        CheckpointError: see `fill`.
    """
    with torch.device("meta"):
        module = LatentUpscaler(config)
    fill(module, source, names(UPSAMPLER, module.state_dict()), dtype=dtype)
    return module


def load_text_encoder(
    config: T5Config,
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    as_stored: bool = False,
    table: Iterable[Key] = T5,
) -> T5Encoder:
    """The text encoder, on the CPU.

    Args:
        as_stored: see `fill`.
        table: of the names in the source.

    Raises:
        CheckpointError: see `fill`.
    """
    with torch.device("meta"):
        module = T5Encoder(config)
    (second,) = T5_UNUSED
    if second in source.infos and _T5_EMBEDDING not in source.infos:  # some writers keep this one of the two names
        source = source.renamed({_T5_EMBEDDING if name == second else name: name for name in source.infos})
    wanted = names(table, module.state_dict())
    fill(module, source, wanted, dtype=dtype, as_stored=as_stored, known_unused=T5_UNUSED)
    return module


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(found: list[str]) -> str:
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
