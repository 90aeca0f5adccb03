"""Loads tensors into modules, strictly: no tensor is missing, none is unexpected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kadr.cancellation import check_cancelled
from kadr.checkpoints.fp8_scales import apply_weight_scale, find_weight_scales, scale_tensor_names
from kadr.checkpoints.header import FP8_DTYPES, TensorInfo, format_shape
from kadr.checkpoints.keys import (
    T5_KEYS,
    T5_UNUSED_KEYS,
    TRANSFORMER_KEYS,
    UPSCALER_KEYS,
    VAE_KEYS,
    VAE_UNUSED_KEYS,
    Key,
    map_keys,
)
from kadr.checkpoints.source import Source, join_first
from kadr.errors import CheckpointError
from kadr.kernels.dequant import dequantize
from kadr.memory.mapped_files import release_pages
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.models.upscaler import LatentUpscaler, UpscalerConfig
from kadr.models.vae import VAE, VAEConfig
from kadr.nn.linear import Linear
from kadr.quant.convert import in_block, replace_module, wrap_stored_weight
from kadr.quant.layers import Scratch
from kadr.quoting import show

_Module = TypeVar("_Module", bound=nn.Module)
COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_T5_EMBEDDING_KEY = "shared.weight"
_WEIGHT_SUFFIX = ".weight"
_POSITION_BIAS_KEY = "position_bias.weight"  # small and read whole: not worth keeping block-quantized


def load_weights(
    module: nn.Module,
    source: Source,
    key_map: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    keep_storage_dtype: bool = False,
    ignored_keys: Iterable[str] = (),
) -> None:
    """Assigns every parameter and buffer of a module its tensor from a source.

    Tensors already stored in `dtype` share memory with the file. Block-quantized weights stay quantized and are
    dequantized on use; all others are converted, one at a time.

    Args:
        module: on the meta device.
        key_map: kadr key -> file key, for every key of the module's state.
        dtype: bf16, fp16 or fp32; None keeps each tensor as stored, and is refused for block-quantized and fp8 weights.
        keep_storage_dtype: weights of the module's blocks stay in their storage type and are converted on use.
        ignored_keys: keys that the source may have and that nothing reads.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or of an unsupported dtype.
        Cancelled: the work is cancelled; looked at before each tensor.
    """
    account(module, source, key_map, ignored_keys=ignored_keys)
    assign(module, source, key_map, dtype=dtype, keep_storage_dtype=keep_storage_dtype)


def account(module: nn.Module, source: Source, key_map: Mapping[str, str], *, ignored_keys: Iterable[str] = ()) -> None:
    """Checks from the header alone that module and source have the same tensors; see `load_weights`."""
    shapes = {key_map[kadr_key]: tuple(tensor.shape) for kadr_key, tensor in module.state_dict().items()}
    infos = source.infos
    shared = [name for name in shapes if name in infos]
    mismatches = [
        ("missing", [name for name in shapes if name not in infos]),
        ("unexpected", sorted(infos.keys() - shapes.keys() - set(ignored_keys) - scale_tensor_names(infos))),
        (
            "of another shape",
            [
                f"{name} is {format_shape(infos[name].shape)}, not {format_shape(shapes[name])}"
                for name in shared
                if infos[name].shape != shapes[name]
            ],
        ),
        (
            "of an unsupported dtype",
            [f"{name} in {infos[name].storage_type}" for name in shared if not _is_supported(infos[name])],
        ),
    ]
    if any(names for _, names in mismatches):
        report = "; ".join(
            f"{len(names)} tensors {problem}: {join_first(names, 1)}" for problem, names in mismatches if names
        )
        raise CheckpointError(
            f"{source.path} does not fit its {type(module).__name__.lower()}: {report}. "
            "The file is incomplete or of another model; use it as released."
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
    """Assigns the tensors and leaves the module ready for inference: in eval mode, without gradients."""
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise CheckpointError(f"weights cannot be loaded as {_dtype_name(dtype)}; use bfloat16, float16 or float32.")
    _refuse_storage_only_dtype(module, source, key_map, dtype)
    module.requires_grad_(False).eval()
    reader = _WeightReader(source, key_map, dtype, keep_storage_dtype)
    state, stored_weights = {}, {}
    for kadr_key in module.state_dict():
        check_cancelled()
        if reader.keeps_storage(kadr_key, module):
            stored_weights[kadr_key.removesuffix(_WEIGHT_SUFFIX)] = reader.read_stored_weight(kadr_key)
        else:
            state[kadr_key] = reader.read_dequantized(kadr_key)
    scratch = Scratch()
    for name, weight in stored_weights.items():
        layer = module.get_submodule(name)
        bias = state.pop(f"{name}.bias", None)
        wrapped = wrap_stored_weight(layer, bias=bias, dtype=dtype or torch.bfloat16, scratch=scratch, **weight)
        replace_module(module, name, wrapped)
    module.load_state_dict(state, strict=not stored_weights, assign=True)


def _refuse_storage_only_dtype(
    module: nn.Module, source: Source, key_map: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    """Refuses to compute in fp8 or block-quantized types, which only store weights."""
    infos = [source.infos[key_map[kadr_key]] for kadr_key in module.state_dict()]
    quantized = [info for info in infos if info.ggml_type is not None or info.dtype in FP8_DTYPES]
    if dtype is None and quantized:
        raise CheckpointError(
            f"{source.path} stores {len(quantized)} tensors in fp8 or GGUF blocks, such as {quantized[0].name} in "
            f"{quantized[0].storage_type}; these types only store weights. Ask for bfloat16, float16 or float32."
        )


@dataclass(frozen=True)
class _WeightReader:
    """Reads tensors from a source; arguments as in `load_weights`."""

    source: Source
    key_map: Mapping[str, str]
    dtype: torch.dtype | None
    keep_storage_dtype: bool

    @cached_property
    def scale_keys(self) -> dict[str, str]:
        return find_weight_scales(self.source.infos, self.key_map.values())

    def keeps_storage(self, key: str, module: nn.Module) -> bool:
        """Returns whether a tensor of the module keeps its storage type."""
        if not key.endswith(_WEIGHT_SUFFIX):
            return False
        layer = module.get_submodule(key.removesuffix(_WEIGHT_SUFFIX))
        info = self.source.infos[self.key_map[key]]
        if info.ggml_type is not None:
            return isinstance(layer, Linear | nn.Embedding) and len(info.shape) == 2 and key != _POSITION_BIAS_KEY
        return self.keep_storage_dtype and isinstance(layer, Linear) and in_block(key) and info.dtype != self.dtype

    def read_stored_weight(self, key: str) -> dict[str, Any]:
        """Returns a weight as stored, as arguments of `wrap_stored_weight`."""
        file_key = self.key_map[key]
        return {
            "weight": self.source.read(file_key),
            "ggml_type": self.source.infos[file_key].ggml_type,
            "scale": self._read_scale(file_key),
        }

    def read_dequantized(self, key: str) -> Tensor:
        """Returns a tensor dequantized to `dtype`, its fp8 scale applied."""
        file_key = self.key_map[key]
        info, tensor = self.source.infos[file_key], self.source.read(file_key)
        if info.ggml_type is not None:
            assert self.dtype is not None
            output = torch.empty(len(tensor), info.numel // max(1, len(tensor)), dtype=self.dtype)
            converted = dequantize(tensor, info.ggml_type, output).view(info.shape)
        elif self.dtype is None:
            return tensor
        else:
            converted = apply_weight_scale(tensor, self._read_scale(file_key), self.dtype)
        if converted.data_ptr() != tensor.data_ptr():
            release_pages([tensor])  # else the file would be in memory beside what was made of it
        return converted

    def _read_scale(self, file_key: str) -> Tensor | None:
        scale_key = self.scale_keys.get(file_key)
        return None if scale_key is None else self.source.read(scale_key)


def load_transformer(
    config: TransformerConfig,
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    is_diffusers: bool = False,
    keep_storage_dtype: bool = False,
) -> Transformer:
    """Loads a transformer on the CPU; `load_weights` documents the other arguments and the CheckpointError.

    Args:
        source: its tensors, under file keys without prefix.
        is_diffusers: the file keys are those of a diffusers folder.
    """
    module = _build_on_meta(lambda: Transformer(config), source)
    key_map = map_keys(TRANSFORMER_KEYS, module.state_dict(), is_diffusers=is_diffusers)
    load_weights(module, source, key_map, dtype=dtype, keep_storage_dtype=keep_storage_dtype)
    return module


def read_transformer_weights(
    config: TransformerConfig, source: Source, names: Iterable[str], *, is_diffusers: bool = False
) -> dict[str, Tensor]:
    """Reads single tensors of a transformer, dequantized, without loading the others.

    Args:
        source: as in `load_transformer`.
        names: kadr keys.

    Returns:
        kadr key -> tensor in fp32, on the CPU.
    """
    module = _build_on_meta(lambda: Transformer(config), source)
    key_map = map_keys(TRANSFORMER_KEYS, module.state_dict(), is_diffusers=is_diffusers)
    reader = _WeightReader(source, key_map, torch.float32, keep_storage_dtype=False)
    return {name: reader.read_dequantized(name) for name in names}


def account_vae(
    config: VAEConfig, source: Source, *, diffusers_vae_family: str | None = None
) -> tuple[VAE, dict[str, str]]:
    """Checks from the header alone that a source has the tensors of a VAE; arguments and errors as in `load_vae`.

    Returns:
        The VAE on the meta device, and kadr key -> file key.
    """
    module = _build_on_meta(lambda: VAE(config), source)
    is_diffusers = diffusers_vae_family is not None
    key_map = map_keys(
        VAE_KEYS, module.state_dict(), is_diffusers=is_diffusers, diffusers_vae_family=diffusers_vae_family
    )
    account(module, source, key_map, ignored_keys=() if is_diffusers else VAE_UNUSED_KEYS)
    return module, key_map


def account_upscaler(config: UpscalerConfig, source: Source) -> tuple[LatentUpscaler, dict[str, str]]:
    """Checks from the header alone that a source has the tensors of an upscaler; returns as `account_vae`."""
    module = _build_on_meta(lambda: LatentUpscaler(config), source)
    key_map = map_keys(UPSCALER_KEYS, module.state_dict())
    account(module, source, key_map)
    return module, key_map


def _build_on_meta(build: Callable[[], _Module], source: Source) -> _Module:
    try:
        with torch.device("meta"):
            return build()
    except (ValueError, RuntimeError, ArithmeticError, KeyError) as error:
        raise CheckpointError(
            f"{source.path}: the config in its header is of no module that can be built: {show(error, 200)}. Use the "
            "file as released."
        ) from error


def load_vae(
    config: VAEConfig,
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    diffusers_vae_family: str | None = None,
    with_encoder: bool = True,
    with_decoder: bool = True,
) -> VAE:
    """Loads a VAE on the CPU.

    Args:
        source: its tensors, under file keys without prefix.
        diffusers_vae_family: family in `keys.DIFFUSERS_VAE_BLOCKS`, where the file keys are a diffusers folder's.
        with_encoder, with_decoder: False leaves that half None, without memory; its tensors are still checked.

    Raises:
        CheckpointError: see `load_weights`.
    """
    module, key_map = account_vae(config, source, diffusers_vae_family=diffusers_vae_family)
    for half, is_wanted in (("encoder", with_encoder), ("decoder", with_decoder)):
        if not is_wanted:
            setattr(module, half, None)
    assign(module, source, key_map, dtype=dtype)
    return module


def load_upscaler(
    config: UpscalerConfig, source: Source, *, dtype: torch.dtype | None = torch.float32
) -> LatentUpscaler:
    """Loads an upscaler on the CPU.

    Args:
        source: its tensors; a single file and a diffusers folder have the same keys.
        dtype: the released upscalers are stored and run in float32, the default.

    Raises:
        CheckpointError: see `load_weights`.
    """
    module, key_map = account_upscaler(config, source)
    assign(module, source, key_map, dtype=dtype)
    return module


def load_text_encoder(
    config: T5Config,
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    keep_storage_dtype: bool = False,
    key_table: Iterable[Key] = T5_KEYS,
) -> T5Encoder:
    """Loads a text encoder on the CPU.

    Args:
        keep_storage_dtype: see `load_weights`.
        key_table: table of the file keys in the source.

    Raises:
        CheckpointError: see `load_weights`.
    """
    module = _build_on_meta(lambda: T5Encoder(config), source)
    (tied_key,) = T5_UNUSED_KEYS
    if tied_key in source.infos and _T5_EMBEDDING_KEY not in source.infos:  # some writers keep only the tied key
        source = source.rename_tensors({_T5_EMBEDDING_KEY if name == tied_key else name: name for name in source.infos})
    key_map = map_keys(key_table, module.state_dict())
    load_weights(
        module, source, key_map, dtype=dtype, keep_storage_dtype=keep_storage_dtype, ignored_keys=T5_UNUSED_KEYS
    )
    return module


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
