"""LoRA files: the layers they adapt and the weights they add. Every tensor belongs to a layer or is unexpected."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from kadr.checkpoints.digest import SHA256_HEX_DIGITS, compute_digest
from kadr.checkpoints.header import format_shape
from kadr.checkpoints.keys import TRANSFORMER_KEYS, map_keys
from kadr.checkpoints.lora.key_formats import (
    BLOCKS_PREFIX,
    WEIGHT_SUFFIX,
    LoraKeys,
    is_adapter_key,
    is_ltx2_key,
    strip_role,
    unsupported_adapter_kind,
)
from kadr.checkpoints.lora.scaling import PEFT_WEIGHTS_FILE, LoraScaling
from kadr.checkpoints.save import write_tensors
from kadr.checkpoints.source import Source, join_first
from kadr.errors import CheckpointError, KadrWarning
from kadr.models.lora_layers import LoraWeights, LoraWeightsByLayer
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.nn.linear import Linear
from kadr.quoting import quote

DIFFUSERS_LORA_FILE = "pytorch_lora_weights.safetensors"
REFERENCE_DOWNSCALE_KEY = "reference_downscale_factor"  # header of an in-context LoRA: video size / control size
# Header entries that name LTX-2 as the base. Layers alone do not tell: those for video are as wide as the 13B's.
_BASE_MODEL_KEY = re.compile(r"base_model|architecture|model_name|model_version", re.IGNORECASE)
_LTX2_NAME = re.compile(r"\bltx[-_ ]?2(?![\db])", re.IGNORECASE)


@dataclass(frozen=True)
class LoraLayer:
    """One adapted layer of a LoRA file.

    Args:
        name: name of the layer in kadr's transformer.
        down_key, up_key: keys of the two tensors in the file.
        rank, in_features, out_features: their sizes.
        alpha: alpha in the file; None where the file does not state it, which means the rank.
        scale: factor of up · down at strength 1.
    """

    name: str
    down_key: str
    up_key: str
    rank: int
    in_features: int
    out_features: int
    alpha: float | None
    scale: float


@dataclass(frozen=True)
class LoraDescription:
    """The description that `kadr inspect` prints of a LoRA; `dataclasses.asdict` makes it JSON.

    Args:
        key_format: "diffusers", "Comfy", "PEFT", "kohya" or "plain"; see `key_formats`.
        model_size: size of the transformers it fits: "2B", "13B", or None where the widths are of neither.
        num_adapted_blocks: transformer blocks with at least one adapted layer.
        target_counts: layer within a block, or around the blocks -> number of adapted layers.
        ranks, alphas: distinct values. No alpha in the file means the rank.
        scales: distinct factors of up · down at strength 1.
        unexpected_keys: keys that belong to no layer of the transformer.
        metadata: metadata of the header, unchanged.
    """

    path: str
    key_format: str
    model_size: str | None
    num_adapted_layers: int
    num_adapted_blocks: int
    target_counts: Mapping[str, int]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    scales: tuple[float, ...]
    dtype: str
    num_parameters: int
    size_bytes: int
    reference_downscale: int | None
    unexpected_keys: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA, opened by its header or predicted (`checkpoints.predict`).

    Args:
        path: the file or folder; of a predicted one, the file in its repository.
        key_format: see `LoraDescription`.
        layers: kadr's layer name -> adapted layer.
        unexpected_keys: keys that belong to no layer.
    """

    path: Path
    source: Source
    key_format: str
    layers: Mapping[str, LoraLayer]
    unexpected_keys: tuple[str, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, allow_partial: bool = False) -> LoraFile:
        """Reads the header, and PEFT's config where there is one.

        Args:
            path: a .safetensors, or a folder as PEFT or diffusers write one.
            allow_partial: leave out keys of no layer of the transformer, with a warning, instead of refusing the file.

        Raises:
            CheckpointError: it is no LoRA of this family, has more than matrix pairs, half of a pair, or such keys.
        """
        source = Source.open(_find_weights_file(Path(path)))
        return cls.from_source(Path(path), source, allow_partial=allow_partial)

    @classmethod
    def from_source(cls, path: Path, source: Source, *, allow_partial: bool = False) -> LoraFile:
        """Matches the tensors of a source to layers; see `open`."""
        _refuse_unsupported(source)
        keys = LoraKeys.parse(source.infos)
        if not any(keys_by_role.keys() & {"down", "up"} for keys_by_role in keys.layers.values()):
            raise _not_a_lora_error(source)
        _refuse_unexpected_keys(source, keys.unexpected_keys, allow_partial)
        scaling = LoraScaling.from_source(source, keys.key_format)
        layers = {name: _parse_layer(source, name, keys_by_role, scaling) for name, keys_by_role in keys.layers.items()}
        return cls(path, source, keys.key_format, layers, keys.unexpected_keys)

    @property
    def is_on_disk(self) -> bool:
        """False for a predicted LoRA, which `load` refuses to load."""
        return self.source.is_on_disk

    @property
    def sha256(self) -> str:
        """Checksum of the file; a retrained LoRA often keeps its file name.

        Raises:
            CheckpointError: the file is not on disk.
        """
        self.source.refuse_absent()
        return lora_sha256(self.path)

    @property
    def reference_downscale(self) -> int:
        """Video size divided by the control's size, for an in-context LoRA; 1 where the header does not state it.

        Raises:
            CheckpointError: the header states something else than a whole number of at least 1.
        """
        value = self.source.metadata.get(REFERENCE_DOWNSCALE_KEY, "1")
        try:
            factor = float(value)
        except ValueError:
            factor = math.nan
        if not 1 <= factor < math.inf or factor != int(factor):
            raise CheckpointError(
                f"{self.path}: its header has {REFERENCE_DOWNSCALE_KEY} = {quote(value)}; it must be a whole number of "
                "at least 1."
            )
        return int(factor)

    def check_fits(self, config: TransformerConfig, model_path: Path) -> None:
        """Checks that the model has every adapted layer, with the LoRA's widths.

        Raises:
            CheckpointError: it does not; the message names the difference.
        """
        missing, mismatched = self._compare_layers(config)
        problems = []
        if missing:
            problems.append(
                f"{len(missing)} of its {len(self.layers)} layers are not in the model, such as "
                f"{self._layer_key_in_file(missing[0])} (the model has {config.num_layers} blocks)"
            )
        if mismatched:
            name, (in_features, out_features) = next(iter(mismatched.items()))
            layer = self.layers[name]
            problems.append(
                f"{len(mismatched)} of its {len(self.layers)} layers are of other widths, such as "
                f"{self._layer_key_in_file(name)}: {in_features} in and {out_features} out in the model, "
                f"{layer.in_features} in and {layer.out_features} out in the LoRA"
            )
        if problems:
            fits = f" It fits a {self.model_size} model." if self.model_size else ""
            way_out = "Use a LoRA that was trained for this model."
            if missing and not mismatched and len(missing) < len(self.layers):
                way_out = f"{way_out.removesuffix('.')}; or pass --lora-partial to leave them out."
            raise CheckpointError(
                f"the LoRA {self.path} does not fit {model_path}: {'; '.join(problems)}.{fits} {way_out}",
                topic="LoRA",
                fix="--lora-partial" if "--lora-partial" in way_out else "",
            )

    def without_missing_layers(self, config: TransformerConfig, model_path: Path) -> LoraFile:
        """Returns the LoRA without the layers that a model does not have, with a warning.

        Raises:
            CheckpointError: the model has none of them, or some are of another width.
        """
        missing, mismatched = self._compare_layers(config)
        if mismatched or len(missing) == len(self.layers):
            self.check_fits(config, model_path)
        if not missing:
            return self
        message = (
            f"{len(missing)} of the {len(self.layers)} layers of {self.path} are not in {model_path} and are left out: "
            f"{join_first([self._layer_key_in_file(name) for name in missing])}."
        )
        warnings.warn(KadrWarning(message, topic="LoRA"), stacklevel=3)
        return replace(self, layers={name: layer for name, layer in self.layers.items() if name not in missing})

    def _compare_layers(self, config: TransformerConfig) -> tuple[list[str], dict[str, tuple[int, int]]]:
        """Returns the layers that a model lacks; and those of other widths, with the model's in and out features."""
        with torch.device("meta"):
            module = Transformer(config)
        missing, mismatched = [], dict[str, tuple[int, int]]()
        for name, layer in self.layers.items():
            linear = _find_linear(module, name)
            if linear is None:
                missing.append(name)
            elif (linear.in_features, linear.out_features) != (layer.in_features, layer.out_features):
                mismatched[name] = linear.in_features, linear.out_features
        return missing, mismatched

    def _layer_key_in_file(self, name: str) -> str:
        """Returns a layer's name in the file."""
        return strip_role(self.layers[name].down_key)

    def load(self) -> dict[str, LoraWeights]:
        """Loads the weights of each layer, by kadr's layer name; tensors share memory with the file.

        Raises:
            CheckpointError: a tensor is not finite, or the file is not on disk or is gone.
        """
        weights = {}
        for name, layer in self.layers.items():
            down, up = self.source.read(layer.down_key), self.source.read(layer.up_key)
            for tensor, key in ((down, layer.down_key), (up, layer.up_key)):
                if not bool(torch.isfinite(tensor.float()).all()):
                    raise CheckpointError(f"{self.path}: {key} has values that are not finite. Download it again.")
            weights[name] = LoraWeights(down.flatten(1), up.flatten(1), layer.scale)
        return weights

    @property
    def model_size(self) -> str | None:
        """ "2B" or "13B", by the input width of its attention layers; None for other widths."""
        widths = {layer.in_features for name, layer in self.layers.items() if name.endswith("_attention.q")}
        return {frozenset({2048}): "2B", frozenset({4096}): "13B"}.get(frozenset(widths))

    def _downscale_or_none(self) -> int | None:
        """Returns `reference_downscale`, or None where the header does not state it or states an invalid one."""
        if REFERENCE_DOWNSCALE_KEY not in self.source.metadata:
            return None
        try:
            return self.reference_downscale
        except CheckpointError:
            return None

    def describe(self) -> LoraDescription:
        """Describes the LoRA from its header."""
        target_counts: dict[str, int] = {}
        blocks = set()
        for name in self.layers:
            is_in_block = name.startswith(BLOCKS_PREFIX)
            target = name.split(".", 2)[2] if is_in_block else name
            target_counts[target] = target_counts.get(target, 0) + 1
            if is_in_block:
                blocks.add(name.split(".")[1])
        infos = [self.source.infos[key] for layer in self.layers.values() for key in (layer.down_key, layer.up_key)]
        return LoraDescription(
            path=str(self.path),
            key_format=self.key_format,
            model_size=self.model_size,
            num_adapted_layers=len(self.layers),
            num_adapted_blocks=len(blocks),
            target_counts=target_counts,
            ranks=tuple(sorted({layer.rank for layer in self.layers.values()})),
            alphas=tuple(sorted({layer.alpha for layer in self.layers.values() if layer.alpha is not None})),
            scales=tuple(sorted({layer.scale for layer in self.layers.values()})),
            dtype=next(iter(self.source.type_counts)),
            num_parameters=sum(info.numel for info in infos),
            size_bytes=sum(info.size_bytes for info in infos),
            reference_downscale=self._downscale_or_none(),
            unexpected_keys=self.unexpected_keys,
            metadata=dict(self.source.metadata),
        )


def lora_sha256(path: str | os.PathLike[str]) -> str:
    """Computes the checksum of a LoRA's file, or of the one in a folder."""
    file = _find_weights_file(Path(path))
    stat = file.stat()
    return _sha256(file, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Computes a checksum once per path, size and mtime: a changed file is read again."""
    return compute_digest(path, like="0" * SHA256_HEX_DIGITS)


def is_lora(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file or folder is an adapter and not a model; unsupported kinds of adapters count too."""
    path = Path(path)
    if path.is_dir():
        return any((path / name).is_file() for name in (PEFT_WEIGHTS_FILE, DIFFUSERS_LORA_FILE))
    try:
        return any(map(is_adapter_key, Source.open(path).infos))
    except CheckpointError:
        if path.suffix.lower() == ".safetensors":
            raise
        return False  # a file of another kind


def write_lora(
    path: str | os.PathLike[str],
    additions: LoraWeightsByLayer,
    *,
    key_format: str = "Comfy",
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a LoRA that every engine of the family reads. The scale is multiplied into `up`, so alpha is the rank.

    Args:
        additions: kadr's layer name -> weights.
        key_format: "Comfy", with the single file's layer names, or "diffusers", with diffusers' layer names.
        dtype: storage dtype.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, (down_key, up_key) in lora_keys(additions, key_format).items():
        weights = additions[name]
        tensors |= {down_key: weights.down, up_key: weights.up * weights.scale}
    write_tensors(Path(path), tensors, dtype=dtype, metadata=metadata)


def lora_keys(names: Iterable[str], key_format: str = "Comfy") -> dict[str, tuple[str, str]]:
    """Returns kadr's layer name -> keys of its two matrices, down and up, in a file.

    Args:
        key_format: see `write_lora`.
    """
    prefix = {"Comfy": "diffusion_model.", "diffusers": "transformer."}[key_format]
    kadr_keys = [f"{name}{WEIGHT_SUFFIX}" for name in names]
    key_map = map_keys(TRANSFORMER_KEYS, kadr_keys, is_diffusers=key_format == "diffusers")
    layers = {key.removesuffix(WEIGHT_SUFFIX): prefix + key_map[key].removesuffix(WEIGHT_SUFFIX) for key in kadr_keys}
    return {name: (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight") for name, layer in layers.items()}


def _find_weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (PEFT_WEIGHTS_FILE, DIFFUSERS_LORA_FILE):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} is a folder without a LoRA in it: neither {PEFT_WEIGHTS_FILE} nor {DIFFUSERS_LORA_FILE}. Name the "
        ".safetensors."
    )


def _refuse_unsupported(source: Source) -> None:
    """Refuses adapters of LTX-2, and those that are more than pairs of matrices: read in part they would run, with
    wrong results."""
    for name in source.infos:
        if is_ltx2_key(name):
            raise _ltx2_error(source, f"it has {name}")
        if (kind := unsupported_adapter_kind(name)) is not None:
            raise CheckpointError(
                f"{source.path} is {kind} (it has {name}): more than pairs of matrices, which kadr does not support. "
                "Use a plain LoRA."
            )
    for key, value in source.metadata.items():
        if _BASE_MODEL_KEY.search(key) and _LTX2_NAME.search(value):
            raise _ltx2_error(source, f"{key} in its header is {quote(value[:60])}")


def _not_a_lora_error(source: Source) -> CheckpointError:
    example = next(iter(source.infos), "none at all")
    return CheckpointError(
        f"{source.path} is not a LoRA for LTX-Video: none of its {len(source.infos)} tensors, such as {example}, is "
        "half of a pair (lora_A and lora_B, lora_down and lora_up) for a layer of the transformer. Give a model as "
        "--model."
    )


def _ltx2_error(source: Source, evidence: str) -> CheckpointError:
    return CheckpointError(
        f"{source.path} is a LoRA for LTX-2, another family of models, with audio ({evidence}). "
        "kadr runs LTX-Video 0.9 to 0.9.8; use a LoRA for one of these."
    )


def _refuse_unexpected_keys(source: Source, unexpected_keys: Collection[str], allow_partial: bool) -> None:
    if not unexpected_keys:
        return
    problem = (
        f"{len(unexpected_keys)} of the {len(source.infos)} tensors of {source.path} are unexpected: they belong to no "
        "layer of the transformer, or to one that other tensors adapt already"
    )
    if not allow_partial:
        raise CheckpointError(
            f"{problem}: {join_first(unexpected_keys)}. Without them the LoRA is incomplete; pass --lora-partial to "
            "leave them out."
        )
    message = f"{problem}. They are left out: {join_first(unexpected_keys)}."
    warnings.warn(KadrWarning(message, topic="LoRA"), stacklevel=4)


def _parse_layer(source: Source, name: str, keys_by_role: Mapping[str, str], scaling: LoraScaling) -> LoraLayer:
    """Checks a layer's tensors against each other."""
    _refuse_half_pair(source, keys_by_role)
    down, up = source.infos[keys_by_role["down"]], source.infos[keys_by_role["up"]]
    shapes = f"{source.path}: {down.name} is {format_shape(down.shape)} and {up.name} is {format_shape(up.shape)}"
    if any(len(shape) < 2 or any(length != 1 for length in shape[2:]) for shape in (down.shape, up.shape)):
        raise CheckpointError(f"{shapes}; the layers of this family are matrices. It is a LoRA for another model.")
    if down.shape[0] != up.shape[1] or not down.shape[0]:
        raise CheckpointError(
            f"{shapes}; the first axis of one and the second of the other are the rank, which must be the same and at "
            "least 1. Download the file again."
        )
    rank = down.shape[0]
    alpha, scale = scaling.layer_alpha_and_scale(keys_by_role, rank)
    return LoraLayer(name, keys_by_role["down"], keys_by_role["up"], rank, down.shape[1], up.shape[0], alpha, scale)


def _refuse_half_pair(source: Source, keys_by_role: Mapping[str, str]) -> None:
    """Refuses a layer without one of its two matrices."""
    for role, other in (("down", "up"), ("up", "down")):
        if role not in keys_by_role:
            key = keys_by_role.get(other) or keys_by_role["alpha"]
            raise CheckpointError(
                f"{source.path} has {key}, and not the other half of the pair. The file is incomplete; download it "
                "again."
            )


def _find_linear(module: nn.Module, name: str) -> Linear | None:
    try:
        submodule = module.get_submodule(name)
    except AttributeError:
        return None
    return submodule if isinstance(submodule, Linear) else None
