"""Tensors into modules, strictly: every tensor of the file has a place, every place gets its tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from kadr.checkpoints.header import EIGHT_BIT
from kadr.checkpoints.keys import T5, T5_UNUSED, TRANSFORMER, UPSAMPLER, VAE_UNUSED, names
from kadr.checkpoints.keys import VAE as VAE_KEYS
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.models.upsampler import LatentUpsampler, UpsamplerConfig
from kadr.models.vae import VAE, VAEConfig

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHOWN = 5  # tensors of each kind of complaint
_T5_EMBEDDING = "shared.weight"


def fill(
    module: nn.Module,
    source: Source,
    wanted: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    known_unused: Iterable[str] = (),
) -> None:
    """Give every parameter and buffer of a module its tensor from a source.

    Where the dtypes agree the module shares its memory with the file; else tensors are converted one by one.

    Args:
        module: on the meta device.
        wanted: our name -> the source's, for every name in the module's state.
        dtype: bf16, fp16 or fp32; None keeps each tensor as it is stored. Weights stored in 8-bit floats are read into
            a wider dtype only.
        known_unused: names that the source may have and nobody reads.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or of a dtype that is not read.
    """
    account(module, source, wanted, known_unused=known_unused)
    assign(module, source, wanted, dtype=dtype)


def account(module: nn.Module, source: Source, wanted: Mapping[str, str], *, known_unused: Iterable[str] = ()) -> None:
    """Check that module and source have the same tensors, from the header alone. As `fill`, without filling."""
    places = {wanted[ours]: tuple(tensor.shape) for ours, tensor in module.state_dict().items()}
    infos = source.infos
    shared = [name for name in places if name in infos]
    complaints = [
        ("missing", [name for name in places if name not in infos]),
        ("left over", sorted(infos.keys() - places.keys() - set(known_unused))),
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
            [f"{n} in {_dtype(infos[n].dtype)}" for n in shared if infos[n].dtype not in (*DTYPES, *EIGHT_BIT)],
        ),
    ]
    if any(found for _, found in complaints):
        told = "; ".join(f"{len(found)} tensors {what}: {_some(found)}" for what, found in complaints if found)
        raise CheckpointError(
            f"{source.path} does not fit its {type(module).__name__.lower()}: {told}. "
            "The file is incomplete or of another model; take it as it was released."
        )


def assign(module: nn.Module, source: Source, wanted: Mapping[str, str], *, dtype: torch.dtype | None = None) -> None:
    """Put the tensors in their places. The module is then ready for inference: in eval mode, without gradients."""
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"weights cannot be held in {_dtype(dtype)}; use bfloat16, float16 or float32.")
    eighths = [wanted[ours] for ours in module.state_dict() if source.infos[wanted[ours]].dtype in EIGHT_BIT]
    if dtype is None and eighths:
        raise CheckpointError(
            f"{source.path} stores {len(eighths)} tensors in 8-bit floats, such as {eighths[0]}; nothing is computed "
            "in those. Ask for bfloat16, float16 or float32."
        )
    module.requires_grad_(False).eval()
    state = {}
    for ours in module.state_dict():
        tensor = source.read(wanted[ours])
        state[ours] = tensor if dtype is None else tensor.to(dtype)
    module.load_state_dict(state, strict=True, assign=True)


def load_transformer(
    config: TransformerConfig, source: Source, *, dtype: torch.dtype | None = None, diffusers: bool = False
) -> Transformer:
    """The transformer, on the CPU.

    Args:
        source: its tensors, under their names without prefix.
        diffusers: the names are those of a diffusers folder.

    Raises:
        CheckpointError: see `fill`.
    """
    with torch.device("meta"):
        module = Transformer(config)
    wanted = names(TRANSFORMER, module.state_dict(), diffusers=diffusers)
    fill(module, source, wanted, dtype=dtype)
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
    config: UpsamplerConfig, source: Source, *, dtype: torch.dtype | None = torch.float32
) -> LatentUpsampler:
    """The upscaler, on the CPU.

    Args:
        source: its tensors, of a single file or a diffusers folder: the names are the same.
        dtype: float32 unless asked otherwise, which is what the released ones are stored and run in.

    Raises:
        CheckpointError: see `fill`.
    """
    with torch.device("meta"):
        module = LatentUpsampler(config)
    fill(module, source, names(UPSAMPLER, module.state_dict()), dtype=dtype)
    return module


def load_text_encoder(config: T5Config, source: Source, *, dtype: torch.dtype | None = None) -> T5Encoder:
    """The text encoder, on the CPU.

    Raises:
        CheckpointError: see `fill`.
    """
    with torch.device("meta"):
        module = T5Encoder(config)
    (second,) = T5_UNUSED
    if second in source.infos and _T5_EMBEDDING not in source.infos:  # some writers keep this one of the two names
        source = source.renamed({_T5_EMBEDDING if name == second else name: name for name in source.infos})
    fill(module, source, names(T5, module.state_dict()), dtype=dtype, known_unused=T5_UNUSED)
    return module


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(found: list[str]) -> str:
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
