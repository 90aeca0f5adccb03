"""Tensors into modules, strictly: every tensor of the file has a place, every place gets its tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kadr.checkpoints.fp8_scales import apply_weight_scale, find_weight_scales, scale_tensor_names
from kadr.checkpoints.header import FP8_DTYPES, TensorInfo
from kadr.checkpoints.keys import (
    T5_KEYS,
    T5_UNUSED_KEYS,
    TRANSFORMER_KEYS,
    UPSCALER_KEYS,
    VAE_UNUSED_KEYS,
    Key,
    map_keys,
)
from kadr.checkpoints.keys import VAE_KEYS as VAE_KEYS
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

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_LISTED = 5  # tensors of each kind of complaint
_T5_EMBEDDING_KEY = "shared.weight"
_WEIGHT_SUFFIX = ".weight"
_POSITION_BIAS_KEY = "position_bias.weight"  # small, and read whole: it is not worth keeping packed


def load_weights(
    module: nn.Module,
    source: Source,
    key_map: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    keep_storage_dtype: bool = False,
    ignored_keys: Iterable[str] = (),
) -> None:
    """Give every parameter and buffer of a module its tensor from a source.

    Where the dtypes agree the module shares its memory with the file. Weights packed in blocks stay packed and are
    unpacked as they are used; all else is converted, one by one.

    Args:
        module: on the meta device.
        key_map: our name -> the source's, for every name in the module's state.
        dtype: bf16, fp16 or fp32; None keeps each tensor as it is stored. Weights stored in blocks or 8-bit floats are
            read into a wider dtype only.
        keep_storage_dtype: weights of the module's blocks stay as they are in the file, whatever they are, and are converted as
            they are used.
        ignored_keys: names that the source may have and nobody reads.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or of a dtype that is not read.
    """
    account(module, source, key_map, ignored_keys=ignored_keys)
    assign(module, source, key_map, dtype=dtype, keep_storage_dtype=keep_storage_dtype)


def account(module: nn.Module, source: Source, key_map: Mapping[str, str], *, ignored_keys: Iterable[str] = ()) -> None:
    """Check that module and source have the same tensors, from the header alone. As `load_weights`, without filling."""
    places = {key_map[ours]: tuple(tensor.shape) for ours, tensor in module.state_dict().items()}
    infos = source.infos
    shared = [name for name in places if name in infos]
    complaints = [
        ("missing", [name for name in places if name not in infos]),
        ("left over", sorted(infos.keys() - places.keys() - set(ignored_keys) - scale_tensor_names(infos))),
        (
            "of another shape",
            [
                f"{n} is {_format_shape(infos[n].shape)}, not {_format_shape(places[n])}"
                for n in shared
                if infos[n].shape != places[n]
            ],
        ),
        (
            "stored in a dtype that is not read here",
            [f"{n} in {infos[n].storage_type}" for n in shared if not _is_supported(infos[n])],
        ),
    ]
    if any(found for _, found in complaints):
        told = "; ".join(f"{len(found)} tensors {what}: {_join_first(found)}" for what, found in complaints if found)
        raise CheckpointError(
            f"{source.path} does not fit its {type(module).__name__.lower()}: {told}. "
            "The file is incomplete or of another model; take it as it was released."
        )


def _is_supported(info: TensorInfo) -> bool:
    return info.ggml_type is not None or info.dtype in (*COMPUTE_DTYPES, *FP8_DTYPES)


def assign(
    module: nn.Module,
    source: Source,
    key_map: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    keep_storage_dtype: bool = False,
) -> None:
    """Put the tensors in their places. The module is then ready for inference: in eval mode, without gradients."""
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise CheckpointError(f"weights cannot be held in {_dtype_name(dtype)}; use bfloat16, float16 or float32.")
    _refuse_storage_only_dtype(module, source, key_map, dtype)
    module.requires_grad_(False).eval()
    reader = _WeightReader(source, key_map, dtype, keep_storage_dtype)
    state, stored = {}, {}
    for ours in module.state_dict():
        if reader.keeps_storage(ours, module):
            stored[ours.removesuffix(_WEIGHT_SUFFIX)] = reader.read_stored_weight(ours)
        else:
            state[ours] = reader.read_dequantized(ours)
    scratch = Scratch()
    for name, weight in stored.items():
        owner = module.get_submodule(name)
        own = dtype or torch.bfloat16
        bias = state.pop(f"{name}.bias", None)
        replace_module(module, name, wrap_stored_weight(owner, bias=bias, dtype=own, scratch=scratch, **weight))
    module.load_state_dict(state, strict=not stored, assign=True)


def _refuse_storage_only_dtype(
    module: nn.Module, source: Source, key_map: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    """Refuse to compute in what weights are only stored in."""
    infos = [source.infos[key_map[ours]] for ours in module.state_dict()]
    narrow = [info for info in infos if info.ggml_type is not None or info.dtype in FP8_DTYPES]
    if dtype is None and narrow:
        raise CheckpointError(
            f"{source.path} stores {len(narrow)} tensors in 8-bit floats or blocks, such as {narrow[0].name} in "
            f"{narrow[0].storage_type}; nothing is computed in those. Ask for bfloat16, float16 or float32."
        )


@dataclass(frozen=True)
class _WeightReader:
    """Takes tensors from a source; arguments as of `load_weights`."""

    source: Source
    key_map: Mapping[str, str]
    dtype: torch.dtype | None
    keep_storage_dtype: bool

    @cached_property
    def scale_keys(self) -> dict[str, str]:
        return find_weight_scales(self.source.infos, self.key_map.values())

    def keeps_storage(self, key: str, module: nn.Module) -> bool:
        """Whether a tensor of the module stays as it is stored."""
        if not key.endswith(_WEIGHT_SUFFIX):
            return False
        owner = module.get_submodule(key.removesuffix(_WEIGHT_SUFFIX))
        info = self.source.infos[self.key_map[key]]
        if info.ggml_type is not None:
            return isinstance(owner, Linear | nn.Embedding) and len(info.shape) == 2 and key != _POSITION_BIAS_KEY
        return self.keep_storage_dtype and isinstance(owner, Linear) and in_block(key) and info.dtype != self.dtype

    def read_stored_weight(self, key: str) -> dict[str, Any]:
        """A weight as it is stored, in the words of `held`."""
        theirs = self.key_map[key]
        return {
            "weight": self.source.read(theirs),
            "packing": self.source.infos[theirs].ggml_type,
            "scale": self._read_scale(theirs),
        }

    def read_dequantized(self, key: str) -> Tensor:
        """A tensor in plain numbers of the dtype."""
        theirs = self.key_map[key]
        info, tensor = self.source.infos[theirs], self.source.read(theirs)
        if info.ggml_type is not None:
            assert self.dtype is not None
            made = torch.empty(len(tensor), info.numel // max(1, len(tensor)), dtype=self.dtype)
            return dequantize(tensor, info.ggml_type, made).view(info.shape)
        return tensor if self.dtype is None else apply_weight_scale(tensor, self._read_scale(theirs), self.dtype)

    def _read_scale(self, file_key: str) -> Tensor | None:
        name = self.scale_keys.get(file_key)
        return None if name is None else self.source.read(name)


def load_transformer(
    config: TransformerConfig,
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    is_diffusers: bool = False,
    keep_storage_dtype: bool = False,
) -> Transformer:
    """The transformer, on the CPU.

    Args:
        source: its tensors, under their names without prefix.
        is_diffusers: the names are those of a diffusers folder.
        keep_storage_dtype: see `load_weights`.

    Raises:
        CheckpointError: see `load_weights`.
    """
    with torch.device("meta"):
        module = Transformer(config)
    wanted = map_keys(TRANSFORMER_KEYS, module.state_dict(), is_diffusers=is_diffusers)
    load_weights(module, source, wanted, dtype=dtype, keep_storage_dtype=keep_storage_dtype)
    return module


def load_vae(
    config: VAEConfig,
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    diffusers_vae_family: str | None = None,
    with_encoder: bool = True,
    with_decoder: bool = True,
) -> VAE:
    """The VAE, on the CPU.

    Args:
        source: its tensors, under their names without prefix.
        diffusers_vae_family: of `keys.DIFFUSERS_BLOCKS`, where the names are those of a diffusers folder.
        with_encoder, with_decoder: a part that is not asked for is None in the module and takes no memory. It is accounted for
            all the same.

    Raises:
        CheckpointError: see `load_weights`.
    """
    with torch.device("meta"):
        module = VAE(config)
    diffusers = diffusers_vae_family is not None
    wanted = map_keys(VAE_KEYS, module.state_dict(), is_diffusers=diffusers, diffusers_vae_family=diffusers_vae_family)
    account(module, source, wanted, ignored_keys=() if diffusers else VAE_UNUSED_KEYS)
    for part, asked in (("encoder", with_encoder), ("decoder", with_decoder)):
        if not asked:
            setattr(module, part, None)
    assign(module, source, wanted, dtype=dtype)
    return module


def load_upscaler(
    config: UpscalerConfig, source: Source, *, dtype: torch.dtype | None = torch.float32
) -> LatentUpscaler:
    """The upscaler, on the CPU.

    Args:
        source: its tensors, of a single file or a diffusers folder: the names are the same.
        dtype: float32 unless asked otherwise, which is what the released ones are stored and run in.

    Raises:
        CheckpointError: see `load_weights`.
    """
    with torch.device("meta"):
        module = LatentUpscaler(config)
    load_weights(module, source, map_keys(UPSCALER_KEYS, module.state_dict()), dtype=dtype)
    return module


def load_text_encoder(
    config: T5Config,
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    keep_storage_dtype: bool = False,
    key_table: Iterable[Key] = T5_KEYS,
) -> T5Encoder:
    """The text encoder, on the CPU.

    Args:
        keep_storage_dtype: see `load_weights`.
        key_table: of the names in the source.

    Raises:
        CheckpointError: see `load_weights`.
    """
    with torch.device("meta"):
        module = T5Encoder(config)
    (second,) = T5_UNUSED_KEYS
    if second in source.infos and _T5_EMBEDDING_KEY not in source.infos:  # some writers keep this one of the two names
        source = source.rename_tensors({_T5_EMBEDDING_KEY if name == second else name: name for name in source.infos})
    wanted = map_keys(key_table, module.state_dict())
    load_weights(
        module, source, wanted, dtype=dtype, keep_storage_dtype=keep_storage_dtype, ignored_keys=T5_UNUSED_KEYS
    )
    return module


def _format_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _join_first(found: list[str]) -> str:
    return ", ".join(found[:MAX_LISTED]) + (f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else "")
