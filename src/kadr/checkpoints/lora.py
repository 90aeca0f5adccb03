"""LoRA files: which layers they change, in whosever words; every tensor has its layer, or is named as a stranger.

Families of names, for a layer m such as transformer_blocks.7.attn1.to_q:

    diffusers   transformer.m.lora_A.weight                   as diffusers saves them, and trainers for it
    Comfy       diffusion_model.m.lora_A.weight               Lightricks' own releases
    PEFT        base_model.model.m.lora_A.weight              beside an adapter_config.json
    kohya       lora_unet_m.lora_down.weight, ....alpha       with _ for every dot of m, or with dots
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kadr.checkpoints.keys import TRANSFORMER, names
from kadr.checkpoints.save import write_tensors
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError, KadrWarning
from kadr.models.adapters import Additions, LowRank
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.nn.linear import Linear

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # of a folder that PEFT wrote
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' copy of that config, in the header
DOWNSCALE = "reference_downscale_factor"  # of an in-context LoRA: how much smaller its reference videos were
SHOWN = 5  # strangers that an error names
_FAMILIES = {
    "base_model.model.": "PEFT",
    "model.diffusion_model.": "Comfy",
    "diffusion_model.": "Comfy",
    "transformer.": "diffusers",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "lycoris_": "kohya",
}
_PLAIN = "plain"  # names without any of these prefixes
# What the end of a name says that the tensor is. PEFT may put the name of the adapter in between: lora_A.default.
_ENDS = (
    ("down", re.compile(r"\.(lora_A(\.[^.]+)?|lora_down|lora\.down)\.weight$")),
    ("up", re.compile(r"\.(lora_B(\.[^.]+)?|lora_up|lora\.up)\.weight$")),
    ("alpha", re.compile(r"\.alpha$")),
)
_OF_LTX2 = re.compile(r"(^|[._])(audio_|av_ca_|video_to_audio|video_embeddings_connector|vocoder)")
_LAYERS, _WEIGHT = "layers.", ".weight"


@dataclass(frozen=True)
class LoraLayer:
    """What a file has for one layer.

    Args:
        name: the layer's, in kadr's transformer.
        down, up: names of the two tensors.
        rank, inputs, outputs: their sizes.
        alpha: as the file has it; None where it does not say, which means the rank.
        scale: what up · down is multiplied with at strength 1.
    """

    name: str
    down: str
    up: str
    rank: int
    inputs: int
    outputs: int
    alpha: float | None
    scale: float


@dataclass(frozen=True)
class LoraDescription:
    """What `kadr inspect` says of a LoRA. `dataclasses.asdict` of it is ready for JSON.

    Args:
        family: whose names it has: "diffusers", "Comfy", "PEFT", "kohya" or "plain".
        fits: which transformers: "2B", "13B", or None where the widths are of neither.
        layers: how many it changes.
        blocks: of the transformer, how many have such layers.
        targets: which layers of a block, or around the blocks -> how many.
        ranks, alphas: every one there is. No alpha: it is the rank.
        strangers: tensors that belong to no layer of the transformer.
        metadata: of the header, as it is.
    """

    path: str
    family: str
    fits: str | None
    layers: int
    blocks: int
    targets: Mapping[str, int]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    dtype: str
    parameters: int
    bytes: int
    reference_downscale: int | None
    strangers: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA on disk, known by its header.

    Args:
        family: see `LoraDescription`.
        layers: by name.
        strangers: names of tensors that belong to no layer.
    """

    path: Path
    source: Source
    family: str
    layers: Mapping[str, LoraLayer]
    strangers: tuple[str, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, partial: bool = False) -> LoraFile:
        """Read a header, and PEFT's config where there is one.

        Args:
            path: a .safetensors, or a folder as PEFT or diffusers write one.
            partial: leave out what belongs to no layer, with a warning, instead of refusing the file.

        Raises:
            CheckpointError: it is no LoRA, is for another family of models, has one half of a pair, or tensors that
                belong to no layer of the transformer.
        """
        file = _file(Path(path))
        source = Source.open(file)
        found, strangers, family = _sorted(source)
        if not any(parts.keys() & {"down", "up"} for parts in found.values()):
            raise _no_lora(source)
        _refuse_strangers(source, strangers, partial)
        scales = _Scales.of(source)
        layers = {name: _layer(source, name, parts, scales) for name, parts in found.items()}
        return cls(Path(path), source, family, layers, tuple(strangers))

    @property
    def reference_downscale(self) -> int:
        """How many times smaller than the video the reference of an in-context LoRA is; 1 where it does not say."""
        said = self.source.metadata.get(DOWNSCALE, "1")
        try:
            factor = float(said)
        except ValueError:
            factor = math.nan
        if not factor >= 1 or factor != int(factor):
            raise CheckpointError(f"{self.path}: its header has {DOWNSCALE} = {said!r}; kadr knows whole numbers.")
        return int(factor)

    def check_fits(self, config: TransformerConfig, model: Path) -> None:
        """Check that every layer is there and as wide as the LoRA was made for.

        Raises:
            CheckpointError: with the first layers that differ.
        """
        with torch.device("meta"):
            module = Transformer(config)
        wrong = []
        for layer in self.layers.values():
            own = _submodule(module, layer.name)
            if own is None:
                wrong.append(f"{layer.name} is not there (the model has {config.layers} blocks)")
            elif (own.in_features, own.out_features) != (layer.inputs, layer.outputs):
                wrong.append(
                    f"{layer.name} takes {own.in_features} and gives {own.out_features}, the LoRA {layer.inputs} and "
                    f"{layer.outputs}"
                )
        if wrong:
            made_for = f" It looks like one for {fits}." if (fits := self.fits) else ""
            raise CheckpointError(
                f"the LoRA {self.path} does not fit {model}: {_some(wrong)}.{made_for} Take the LoRA that was trained "
                "for this model."
            )

    def load(self) -> dict[str, LowRank]:
        """What it adds to each layer, by name; tensors share memory with the file.

        Raises:
            CheckpointError: a tensor is not finite, or the file went away.
        """
        made = {}
        for name, layer in self.layers.items():
            down, up = self.source.read(layer.down), self.source.read(layer.up)
            for tensor, theirs in ((down, layer.down), (up, layer.up)):
                if not bool(torch.isfinite(tensor.float()).all()):
                    raise CheckpointError(f"{self.path}: {theirs} has numbers that are not finite. Download it again.")
            made[name] = LowRank(down.flatten(1), up.flatten(1), layer.scale)
        return made

    @property
    def fits(self) -> str | None:
        """ "2B" or "13B", by the width of what its attention reads; None where it is another."""
        widths = {layer.inputs for name, layer in self.layers.items() if name.endswith("_attention.q")}
        return {frozenset({2048}): "2B", frozenset({4096}): "13B"}.get(frozenset(widths))

    def describe(self) -> LoraDescription:
        """Everything that the header tells."""
        targets: dict[str, int] = {}
        blocks = set()
        for name in self.layers:
            inside = name.startswith(_LAYERS)
            target = name.split(".", 2)[2] if inside else name
            targets[target] = targets.get(target, 0) + 1
            if inside:
                blocks.add(name.split(".")[1])
        own = [self.source.infos[name] for layer in self.layers.values() for name in (layer.down, layer.up)]
        return LoraDescription(
            path=str(self.path),
            family=self.family,
            fits=self.fits,
            layers=len(self.layers),
            blocks=len(blocks),
            targets=targets,
            ranks=tuple(sorted({layer.rank for layer in self.layers.values()})),
            alphas=tuple(sorted({layer.alpha for layer in self.layers.values() if layer.alpha is not None})),
            dtype=next(iter(self.source.stored)),
            parameters=sum(info.count for info in own),
            bytes=sum(info.bytes for info in own),
            reference_downscale=self.reference_downscale if DOWNSCALE in self.source.metadata else None,
            strangers=self.strangers,
            metadata=dict(self.source.metadata),
        )


def is_lora(path: str | os.PathLike[str]) -> bool:
    """Whether a file, or a folder, is a LoRA rather than a model."""
    path = Path(path)
    if path.is_dir():
        return any((path / name).is_file() for name in (ADAPTER_FILE, DIFFUSERS_FILE))
    if path.suffix.lower() != ".safetensors":
        return False
    return any(_end(name) is not None and _end(name) != "alpha" for name in Source.open(path).infos)


def write_lora(
    path: str | os.PathLike[str],
    additions: Additions,
    *,
    family: str = "Comfy",
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA that every engine of the family reads. What it is scaled with goes into `up`: alpha is the rank.

    Args:
        additions: by kadr's names of the layers.
        family: "Comfy", with the single file's names, or "diffusers", with that layout's.
        dtype: that is stored.

    Raises:
        CheckpointError: the file cannot be written.
    """
    prefix = {"Comfy": "diffusion_model.", "diffusers": "transformer."}[family]
    theirs = names(TRANSFORMER, [f"{name}{_WEIGHT}" for name in additions], diffusers=family == "diffusers")
    tensors: dict[str, torch.Tensor] = {}
    for name, each in additions.items():
        start = prefix + theirs[f"{name}{_WEIGHT}"].removesuffix(_WEIGHT)
        tensors |= {f"{start}.lora_A.weight": each.down, f"{start}.lora_B.weight": each.up * each.scale}
    write_tensors(Path(path), tensors, dtype=dtype, metadata=metadata)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (ADAPTER_FILE, DIFFUSERS_FILE):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} is a folder without a LoRA in it: neither {ADAPTER_FILE} nor {DIFFUSERS_FILE}. Name the .safetensors."
    )


def _end(name: str) -> str | None:
    return next((role for role, pattern in _ENDS if pattern.search(name)), None)


def _sorted(source: Source) -> tuple[dict[str, dict[str, str]], list[str], str]:
    """Layer -> its tensors by role; names of no layer; and the family."""
    found: dict[str, dict[str, str]] = {}
    strangers, families = [], dict[str, int]()
    for name in source.infos:
        split = _split(name)
        family, layer, role = split if split is not None else ("", None, "")
        if layer is None or role in found.get(layer, ()):
            strangers.append(name)
            continue
        found.setdefault(layer, {})[role] = name
        families[family] = families.get(family, 0) + 1
    return found, strangers, max(families, key=families.__getitem__, default=_PLAIN)


def _split(name: str) -> tuple[str, str | None, str] | None:
    """Family, our name of the layer (None where there is no such), and role of a tensor; None where it has no role."""
    role = _end(name)
    if role is None:
        return None
    pattern = dict(_ENDS)[role]
    theirs, family = pattern.sub("", name), _PLAIN
    while prefix := next((prefix for prefix in _FAMILIES if theirs.startswith(prefix)), None):
        family, theirs = _FAMILIES[prefix] if family == _PLAIN else family, theirs.removeprefix(prefix)
    return family, _ours(theirs), role


def _ours(theirs: str) -> str | None:
    """Our name of a layer, of one in any layout, with dots or underscores."""
    number = re.match(r"(?:transformer_blocks[._])(\d+)[._]", theirs)
    inside = theirs if number is None else f"transformer_blocks.0.{theirs[number.end() :]}"
    known = _linears().get(inside.replace(".", "_"))
    if known is None or number is None:
        return known
    return known.replace(f"{_LAYERS}0.", f"{_LAYERS}{int(number[1])}.", 1)


@cache
def _linears() -> dict[str, str]:
    """Their names of all layers that have a weight, with _ for every dot, of one block -> ours."""
    with torch.device("meta"):
        module = Transformer(TransformerConfig(layers=1, heads=1, head_width=8))
    ours = [name for name, child in module.named_modules() if isinstance(child, Linear)]
    made: dict[str, str] = {}
    for diffusers in (False, True):
        table = names(TRANSFORMER, [f"{name}{_WEIGHT}" for name in ours], diffusers=diffusers)
        made |= {
            theirs.removesuffix(_WEIGHT).replace(".", "_"): our
            for our, theirs in zip(ours, table.values(), strict=True)
        }
    return made


def _no_lora(source: Source) -> CheckpointError:
    if any(_OF_LTX2.search(name) for name in source.infos):
        return _of_ltx2(source)
    example = next(iter(source.infos), "none at all")
    return CheckpointError(
        f"{source.path} is not a LoRA for LTX-Video: none of its {len(source.infos)} tensors, such as {example}, is "
        "the half of a pair (lora_A and lora_B, lora_down and lora_up) for a layer of the transformer. A model is "
        "given as --model."
    )


def _of_ltx2(source: Source) -> CheckpointError:
    example = next(name for name in source.infos if _OF_LTX2.search(name))
    return CheckpointError(
        f"{source.path} is a LoRA for LTX-2, another family of models, which makes sound too (it has {example}). "
        "kadr runs LTX-Video 0.9 to 0.9.8; take a LoRA for one of those."
    )


def _refuse_strangers(source: Source, strangers: list[str], partial: bool) -> None:
    if not strangers:
        return
    if any(_OF_LTX2.search(name) for name in strangers):
        raise _of_ltx2(source)
    told = f"{len(strangers)} of the {len(source.infos)} tensors of {source.path} belong to no layer of the transformer"
    if not partial:
        raise CheckpointError(
            f"{told}: {_some(strangers)}. The LoRA would be half of itself; --lora-partial takes it without them."
        )
    warnings.warn(f"{told} and are left out: {_some(strangers)}.", KadrWarning, stacklevel=3)


def _layer(source: Source, name: str, parts: Mapping[str, str], scales: _Scales) -> LoraLayer:
    """Check a layer's tensors against each other."""
    for role, other in (("down", "up"), ("up", "down")):
        if role not in parts:
            has = parts.get(other) or parts["alpha"]
            raise CheckpointError(
                f"{source.path} has {has}, and not the other half of the pair. The file is incomplete; download it "
                "again."
            )
    down, up = source.infos[parts["down"]], source.infos[parts["up"]]
    ends = (down.shape, up.shape)
    if any(len(shape) < 2 or any(side != 1 for side in shape[2:]) for shape in ends) or down.shape[0] != up.shape[1]:
        raise CheckpointError(
            f"{source.path}: {down.name} is {_shape(down.shape)} and {up.name} is {_shape(up.shape)}; the first side "
            "of the one must be the second of the other. Download the file again."
        )
    rank = down.shape[0]
    alpha, scale = scales.of_layer(parts, rank)
    return LoraLayer(name, parts["down"], parts["up"], rank, down.shape[1], up.shape[0], alpha, scale)


@dataclass(frozen=True)
class _Scales:
    """Where alphas come from: a tensor of their own, PEFT's config, or diffusers' copy of it in the header."""

    source: Source
    config: Mapping[str, Any]

    @classmethod
    def of(cls, source: Source) -> _Scales:
        return cls(source, _config(source))

    def of_layer(self, parts: Mapping[str, str], rank: int) -> tuple[float | None, float]:
        """Alpha and scale."""
        if "alpha" in parts:
            alpha = float(self.source.read(parts["alpha"]).float().reshape(-1)[0])
        elif "lora_alpha" in self.config:
            theirs = re.sub(r"^(base_model\.model\.|transformer\.)+", "", _bare(parts["down"]))
            alpha = float(_patterned(self.config.get("alpha_pattern"), theirs, self.config["lora_alpha"]))
        else:
            return None, 1.0
        if not math.isfinite(alpha):
            raise CheckpointError(f"{self.source.path}: alpha of {_bare(parts['down'])} is {alpha}. Download it again.")
        return alpha, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _bare(name: str) -> str:
    return _ENDS[0][1].sub("", name)


def _patterned(patterns: object, layer: str, default: object) -> Any:
    """The value of the first pattern that a layer's name ends with, as PEFT matches them."""
    for pattern, value in (patterns or {}).items() if isinstance(patterns, Mapping | None) else ():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def _config(source: Source) -> Mapping[str, Any]:
    """PEFT's config of the adapter; empty where there is none.

    Raises:
        CheckpointError: it cannot be read, or says that the adapter is more than pairs of matrices.
    """
    beside = source.path.parent / ADAPTER_CONFIG
    try:
        if ADAPTER_METADATA in source.metadata:
            packed = json.loads(source.metadata[ADAPTER_METADATA])
            said = {key.removeprefix("transformer."): value for key, value in packed.items()}
        elif source.path.name == ADAPTER_FILE and beside.is_file():
            said = dict(json.loads(beside.read_text("utf-8")))
        else:
            return {}
    except (ValueError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{source.path}: the adapter's config cannot be read: {error}. Download it again."
        ) from error
    for key in ("use_dora", "lora_bias"):
        if said.get(key):
            raise CheckpointError(
                f"{source.path}: its config has {key} = {said[key]!r}: more than pairs of matrices, which kadr does "
                "not read. Take the LoRA without it."
            )
    return said


def _submodule(module: nn.Module, name: str) -> Linear | None:
    try:
        found = module.get_submodule(name)
    except AttributeError:
        return None
    return found if isinstance(found, Linear) else None


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def _some(found: list[str]) -> str:
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
