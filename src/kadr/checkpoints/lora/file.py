"""LoRA files: which layers they change, and by what; every tensor has its layer, or is named as a stranger."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

from kadr.checkpoints.digest import SHA256_HEX_DIGITS, compute_digest
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
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError, KadrWarning
from kadr.models.lora_layers import LoraWeights, LoraWeightsByLayer
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.nn.linear import Linear

DIFFUSERS_LORA_FILE = "pytorch_lora_weights.safetensors"
REFERENCE_DOWNSCALE_KEY = (
    "reference_downscale_factor"  # of an in-context LoRA: how much smaller its reference videos were
)
MAX_LISTED = 5  # strangers that an error names
# Headers that name LTX-2 as their base. Layers alone do not tell: those for pictures are as wide as the 13B's.
_BASE_MODEL_KEY = re.compile(r"base_model|architecture|model_name|model_version", re.IGNORECASE)
_LTX2_NAME = re.compile(r"\bltx[-_ ]?2(?![\db])", re.IGNORECASE)


@dataclass(frozen=True)
class LoraLayer:
    """What a file has for one layer.

    Args:
        name: the layer's, in kadr's transformer.
        down_key, up_key: names of the two tensors.
        rank, in_features, out_features: their sizes.
        alpha: as the file has it; None where it does not say, which means the rank.
        scale: what up · down is multiplied with at strength 1.
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
    """What `kadr inspect` says of a LoRA. `dataclasses.asdict` of it is ready for JSON.

    Args:
        key_format: whose names it has: "diffusers", "Comfy", "PEFT", "kohya" or "plain"; see `lora_names`.
        model_size: which transformers: "2B", "13B", or None where the widths are of neither.
        num_adapted_layers: how many it changes.
        num_adapted_blocks: of the transformer, how many have such layers.
        target_counts: which layers of a block, or around the blocks -> how many.
        ranks, alphas: every one there is. No alpha: it is the rank.
        scales: what the products of the pairs are multiplied with at strength 1, every one there is.
        unexpected_keys: tensors that belong to no layer of the transformer.
        metadata: of the header, as it is.
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
    """A LoRA on disk, known by its header.

    Args:
        key_format: see `LoraDescription`.
        layers: by name.
        unexpected_keys: names of tensors that belong to no layer.
    """

    path: Path
    source: Source
    key_format: str
    layers: Mapping[str, LoraLayer]
    unexpected_keys: tuple[str, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, allow_partial: bool = False) -> LoraFile:
        """Read a header, and PEFT's config where there is one.

        Args:
            path: a .safetensors, or a folder as PEFT or diffusers write one.
            allow_partial: leave out what belongs to no layer, with a warning, instead of refusing the file.

        Raises:
            CheckpointError: it is no LoRA, is for another family of models, is more than pairs of matrices, has one
                half of a pair, or tensors that belong to no layer of the transformer.
        """
        source = Source.open(_find_weights_file(Path(path)))
        _refuse_unsupported(source)
        found = LoraKeys.parse(source.infos)
        if not any(parts.keys() & {"down", "up"} for parts in found.layers.values()):
            raise _not_a_lora_error(source)
        _refuse_unexpected_keys(source, found.unexpected_keys, allow_partial)
        scales = LoraScaling.from_source(source, found.key_format)
        layers = {name: _parse_layer(source, name, parts, scales) for name, parts in found.layers.items()}
        return cls(Path(path), source, found.key_format, layers, found.unexpected_keys)

    @property
    def sha256(self) -> str:
        """Of the file: LoRAs are trained again under the name they had."""
        return lora_sha256(self.path)

    @property
    def reference_downscale(self) -> int:
        """How many times smaller than the video the reference of an in-context LoRA is; 1 where it does not say."""
        said = self.source.metadata.get(REFERENCE_DOWNSCALE_KEY, "1")
        try:
            factor = float(said)
        except ValueError:
            factor = math.nan
        if not 1 <= factor < math.inf or factor != int(factor):
            raise CheckpointError(
                f"{self.path}: its header has {REFERENCE_DOWNSCALE_KEY} = {said!r}; kadr knows whole numbers."
            )
        return int(factor)

    def check_fits(self, config: TransformerConfig, model_path: Path) -> None:
        """Check that every layer is there and as wide as the LoRA was made for.

        Raises:
            CheckpointError: with what differs.
        """
        absent, wrong = self._compare_layers(config)
        told = []
        if absent:
            which = f"{len(absent)} of its {len(self.layers)} layers are not there, such as {self._layer_key_in_file(absent[0])}"
            told.append(f"{which} (the model has {config.num_layers} blocks)")
        if wrong:
            name, (inputs, outputs) = next(iter(wrong.items()))
            layer = self.layers[name]
            told.append(
                f"{len(wrong)} of its {len(self.layers)} layers are of other widths, such as {self._layer_key_in_file(name)}: the "
                f"model's takes {inputs} and gives {outputs}, the LoRA's {layer.in_features} and {layer.out_features}"
            )
        if told:
            made_for = f" It looks like one for {fits}." if (fits := self.model_size) else ""
            way = "Take the LoRA that was trained for this model."
            if absent and not wrong and len(absent) < len(self.layers):
                way = f"{way.removesuffix('.')}; or --lora-partial takes it without them."
            raise CheckpointError(f"the LoRA {self.path} does not fit {model_path}: {'; '.join(told)}.{made_for} {way}")

    def without_missing_layers(self, config: TransformerConfig, model_path: Path) -> LoraFile:
        """The LoRA without the layers that a model does not have, with a warning.

        Raises:
            CheckpointError: it has none of them, or some are of another width.
        """
        absent, wrong = self._compare_layers(config)
        if wrong or len(absent) == len(self.layers):
            self.check_fits(config, model_path)
        if not absent:
            return self
        warnings.warn(
            f"{len(absent)} of the {len(self.layers)} layers of {self.path} are not in {model_path} and are left out: "
            f"{_join_first([self._layer_key_in_file(name) for name in absent])}.",
            KadrWarning,
            stacklevel=3,
        )
        kept = {name: layer for name, layer in self.layers.items() if name not in absent}
        return replace(self, layers=kept)

    def _compare_layers(self, config: TransformerConfig) -> tuple[list[str], dict[str, tuple[int, int]]]:
        """Layers that a model does not have; and those of other widths, with the model's."""
        with torch.device("meta"):
            module = Transformer(config)
        absent, wrong = [], dict[str, tuple[int, int]]()
        for name, layer in self.layers.items():
            own = _find_linear(module, name)
            if own is None:
                absent.append(name)
            elif (own.in_features, own.out_features) != (layer.in_features, layer.out_features):
                wrong[name] = own.in_features, own.out_features
        return absent, wrong

    def _layer_key_in_file(self, name: str) -> str:
        """A layer's name in the file's words."""
        return strip_role(self.layers[name].down_key)

    def load(self) -> dict[str, LoraWeights]:
        """What it adds to each layer, by name; tensors share memory with the file.

        Raises:
            CheckpointError: a tensor is not finite, or the file went away.
        """
        made = {}
        for name, layer in self.layers.items():
            down, up = self.source.read(layer.down_key), self.source.read(layer.up_key)
            for tensor, theirs in ((down, layer.down_key), (up, layer.up_key)):
                if not bool(torch.isfinite(tensor.float()).all()):
                    raise CheckpointError(f"{self.path}: {theirs} has numbers that are not finite. Download it again.")
            made[name] = LoraWeights(down.flatten(1), up.flatten(1), layer.scale)
        return made

    @property
    def model_size(self) -> str | None:
        """ "2B" or "13B", by the width of what its attention reads; None where it is another."""
        widths = {layer.in_features for name, layer in self.layers.items() if name.endswith("_attention.q")}
        return {frozenset({2048}): "2B", frozenset({4096}): "13B"}.get(frozenset(widths))

    def _downscale_or_none(self) -> int | None:
        """None where it is not said, or in a way that is refused once a control is there."""
        if REFERENCE_DOWNSCALE_KEY not in self.source.metadata:
            return None
        try:
            return self.reference_downscale
        except CheckpointError:
            return None

    def describe(self) -> LoraDescription:
        """Everything that the header tells."""
        targets: dict[str, int] = {}
        blocks = set()
        for name in self.layers:
            inside = name.startswith(BLOCKS_PREFIX)
            target = name.split(".", 2)[2] if inside else name
            targets[target] = targets.get(target, 0) + 1
            if inside:
                blocks.add(name.split(".")[1])
        own = [self.source.infos[name] for layer in self.layers.values() for name in (layer.down_key, layer.up_key)]
        return LoraDescription(
            path=str(self.path),
            key_format=self.key_format,
            model_size=self.model_size,
            num_adapted_layers=len(self.layers),
            num_adapted_blocks=len(blocks),
            target_counts=targets,
            ranks=tuple(sorted({layer.rank for layer in self.layers.values()})),
            alphas=tuple(sorted({layer.alpha for layer in self.layers.values() if layer.alpha is not None})),
            scales=tuple(sorted({layer.scale for layer in self.layers.values()})),
            dtype=next(iter(self.source.type_counts)),
            num_parameters=sum(info.numel for info in own),
            size_bytes=sum(info.size_bytes for info in own),
            reference_downscale=self._downscale_or_none(),
            unexpected_keys=self.unexpected_keys,
            metadata=dict(self.source.metadata),
        )


def lora_sha256(path: str | os.PathLike[str]) -> str:
    """Of a LoRA's file, or of that in a folder."""
    file = _find_weights_file(Path(path))
    state = file.stat()
    return _sha256(file, state.st_size, state.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    """size, changed: of the file; another one is read again."""
    return compute_digest(path, like="0" * SHA256_HEX_DIGITS)


def is_lora(path: str | os.PathLike[str]) -> bool:
    """Whether a file, or a folder, is an adapter rather than a model. Of kinds that are refused as well."""
    path = Path(path)
    if path.is_dir():
        return any((path / name).is_file() for name in (PEFT_WEIGHTS_FILE, DIFFUSERS_LORA_FILE))
    try:
        return any(map(is_adapter_key, Source.open(path).infos))
    except CheckpointError:
        if path.suffix.lower() == ".safetensors":
            raise
        return False  # some other kind of file


def write_lora(
    path: str | os.PathLike[str],
    additions: LoraWeightsByLayer,
    *,
    key_format: str = "Comfy",
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA that every engine of the family reads. What it is scaled with goes into `up`: alpha is the rank.

    Args:
        additions: by kadr's names of the layers.
        key_format: "Comfy", with the single file's names, or "diffusers", with that layout's.
        dtype: that is stored.

    Raises:
        CheckpointError: the file cannot be written.
    """
    prefix = {"Comfy": "diffusion_model.", "diffusers": "transformer."}[key_format]
    theirs = map_keys(
        TRANSFORMER_KEYS, [f"{name}{WEIGHT_SUFFIX}" for name in additions], is_diffusers=key_format == "diffusers"
    )
    tensors: dict[str, torch.Tensor] = {}
    for name, each in additions.items():
        start = prefix + theirs[f"{name}{WEIGHT_SUFFIX}"].removesuffix(WEIGHT_SUFFIX)
        tensors |= {f"{start}.lora_A.weight": each.down, f"{start}.lora_B.weight": each.up * each.scale}
    write_tensors(Path(path), tensors, dtype=dtype, metadata=metadata)


def _find_weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (PEFT_WEIGHTS_FILE, DIFFUSERS_LORA_FILE):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} is a folder without a LoRA in it: neither {PEFT_WEIGHTS_FILE} nor {DIFFUSERS_LORA_FILE}. Name the .safetensors."
    )


def _refuse_unsupported(source: Source) -> None:
    """Refuse adapters of LTX-2, and those that are more than pairs of matrices: left out in part they would run, and
    draw something else."""
    for name in source.infos:
        if is_ltx2_key(name):
            raise _ltx2_error(source, f"it has {name}")
        if (kind := unsupported_adapter_kind(name)) is not None:
            raise CheckpointError(
                f"{source.path} is {kind} (it has {name}): more than pairs of matrices, which kadr does not read. Take "
                "a plain LoRA."
            )
    for key, value in source.metadata.items():
        if _BASE_MODEL_KEY.search(key) and _LTX2_NAME.search(value):
            raise _ltx2_error(source, f"{key} in its header is {value[:60]!r}")


def _not_a_lora_error(source: Source) -> CheckpointError:
    example = next(iter(source.infos), "none at all")
    return CheckpointError(
        f"{source.path} is not a LoRA for LTX-Video: none of its {len(source.infos)} tensors, such as {example}, is "
        "the half of a pair (lora_A and lora_B, lora_down and lora_up) for a layer of the transformer. A model is "
        "given as --model."
    )


def _ltx2_error(source: Source, evidence: str) -> CheckpointError:
    return CheckpointError(
        f"{source.path} is a LoRA for LTX-2, another family of models, which makes sound too ({evidence}). "
        "kadr runs LTX-Video 0.9 to 0.9.8; take a LoRA for one of those."
    )


def _refuse_unexpected_keys(source: Source, unexpected_keys: Collection[str], allow_partial: bool) -> None:
    if not unexpected_keys:
        return
    told = (
        f"{len(unexpected_keys)} of the {len(source.infos)} tensors of {source.path} belong to no layer of the transformer, "
        "or to one that another tensor is for already"
    )
    if not allow_partial:
        raise CheckpointError(
            f"{told}: {_join_first(unexpected_keys)}. The LoRA would be half of itself; --lora-partial takes it without them."
        )
    warnings.warn(f"{told}, and are left out: {_join_first(unexpected_keys)}.", KadrWarning, stacklevel=3)


def _parse_layer(source: Source, name: str, keys_by_role: Mapping[str, str], scaling: LoraScaling) -> LoraLayer:
    """Check a layer's tensors against each other."""
    for role, other in (("down", "up"), ("up", "down")):
        if role not in keys_by_role:
            has = keys_by_role.get(other) or keys_by_role["alpha"]
            raise CheckpointError(
                f"{source.path} has {has}, and not the other half of the pair. The file is incomplete; download it "
                "again."
            )
    down, up = source.infos[keys_by_role["down"]], source.infos[keys_by_role["up"]]
    told = f"{source.path}: {down.name} is {_format_shape(down.shape)} and {up.name} is {_format_shape(up.shape)}"
    if any(len(shape) < 2 or any(side != 1 for side in shape[2:]) for shape in (down.shape, up.shape)):
        raise CheckpointError(f"{told}; the layers of this family are matrices. It is a LoRA for another model.")
    if down.shape[0] != up.shape[1] or not down.shape[0]:
        raise CheckpointError(
            f"{told}; the first side of the one must be the second of the other, and at least 1. Download the file "
            "again."
        )
    rank = down.shape[0]
    alpha, scale = scaling.layer_alpha_and_scale(keys_by_role, rank)
    return LoraLayer(name, keys_by_role["down"], keys_by_role["up"], rank, down.shape[1], up.shape[0], alpha, scale)


def _find_linear(module: nn.Module, name: str) -> Linear | None:
    try:
        found = module.get_submodule(name)
    except AttributeError:
        return None
    return found if isinstance(found, Linear) else None


def _format_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _join_first(found: Collection[str]) -> str:
    return ", ".join(list(found)[:MAX_LISTED]) + (
        f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
    )
