"""LoRAs of a model: opened, checked against it, and how much of each a pass gets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.lora.file import REFERENCE_DOWNSCALE_KEY, LoraFile
from kadr.errors import RequestError
from kadr.models.lora_layers import LoraWeightsByLayer
from kadr.spec.locate import check_lora_name, locate_lora
from kadr.spec.lora import Lora, LoraStrength, refuse_merged_twice


class Loras:
    """The LoRAs of an engine.

    Args:
        loras: see `Lora.parse`.
        allow_partial: see `LoraFile.open`.
        merge: they are added to the weights when those are loaded, and not beside them at every step.
    """

    def __init__(self, loras: Sequence[Any], *, allow_partial: bool = False, merge: bool = False) -> None:
        if not isinstance(loras, list | tuple):
            raise RequestError(f"loras is {loras!r}; it must be a list, such as [('style.safetensors', 0.8)].")
        self.entries = tuple(Lora.parse(one) for one in loras)
        self.files = tuple(LoraFile.open(locate_lora(use.path), allow_partial=allow_partial) for use in self.entries)
        self.allow_partial, self.is_merged = allow_partial, merge and bool(self.entries)

    def __bool__(self) -> bool:
        return bool(self.entries)

    def check_fits(self, transformers: Sequence[Checkpoint]) -> None:
        """Check that they fit the transformers of both passes; with `partial`, leave out the layers that they lack.

        Raises:
            CheckpointError: one does not fit.
        """
        for checkpoint in {one.path: one for one in transformers}.values():
            config = checkpoint.info.transformer
            assert config is not None
            if self.allow_partial:
                self.files = tuple(file.without_missing_layers(config, checkpoint.path) for file in self.files)
            for file in self.files:
                file.check_fits(config, checkpoint.path)

    def check_merge(self, num_passes: int, transformers: Sequence[Checkpoint]) -> None:
        """Check that they can be merged as they are to act.

        Raises:
            RequestError: one transformer makes two passes, and is to have other strengths in each.
        """
        if self.is_merged and num_passes > 1 and transformers[0] is transformers[1]:
            refuse_merged_twice(self.entries)

    def strengths(
        self, pass_index: int, requested_strengths: Sequence[LoraStrength] | None = None
    ) -> tuple[float, ...]:
        """How much of each acts in a pass, 0 or 1.

        Args:
            requested_strengths: of a request, in their order; None: as the engine was opened with.

        Raises:
            RequestError: another number of them, or others than were merged.
        """
        own = tuple(use.pass_strengths()[pass_index] for use in self.entries)
        if requested_strengths is None:
            return own
        if len(requested_strengths) != len(own):
            raise RequestError(
                f"{len(requested_strengths)} strengths of LoRAs are given, and this engine has {len(own)} LoRAs. Give one for each."
            )
        made = tuple(each[pass_index] if isinstance(each, tuple) else float(each) for each in requested_strengths)
        if self.is_merged and made != own:
            raise RequestError("the LoRAs are merged, and their strengths are fixed with that. Open without merging.")
        return made

    def load(self) -> tuple[LoraWeightsByLayer, ...]:
        """What they add, read from their files."""
        return tuple(file.load() for file in self.files)

    def has_in_context(self, requested_strengths: Sequence[LoraStrength] | None = None) -> bool:
        """Whether one that acts says that it was trained with a reference. asked: as of `strengths`."""
        return any(is_in_context(file) for file in self._active_files(requested_strengths))

    def _active_files(self, requested_strengths: Sequence[LoraStrength] | None) -> list[LoraFile]:
        """Those with a strength other than 0 in a pass."""
        both = zip(*(self.strengths(number, requested_strengths) for number in (0, 1)), strict=True)
        return [file for file, strengths in zip(self.files, both, strict=True) if any(strengths)]

    def reference_downscale(self, requested_strengths: Sequence[LoraStrength] | None = None) -> int:
        """How many times smaller than the video the references of these are; 1 where none says, of those that act.

        Args:
            requested_strengths: as of `strengths`.

        Raises:
            RequestError: two say differently.
        """
        return common_reference_downscale(self._active_files(requested_strengths))

    @property
    def target_layers(self) -> frozenset[str]:
        """The layers that any of them changes."""
        return frozenset(name for file in self.files for name in file.layers)

    def adapter_bytes(self, dtype: torch.dtype) -> int:
        """That they take beside the weights."""
        return sum(self.parameter_counts) * dtype.itemsize

    def merged_weight_bytes(self, dtype: torch.dtype) -> int:
        """Of the weights that they are merged into."""
        layers = {name: layer for file in self.files for name, layer in file.layers.items()}
        return sum(layer.in_features * layer.out_features for layer in layers.values()) * dtype.itemsize

    @property
    def parameter_counts(self) -> tuple[int, ...]:
        """Of each."""
        return tuple(
            sum(layer.rank * (layer.in_features + layer.out_features) for layer in file.layers.values())
            for file in self.files
        )

    @property
    def max_rank(self) -> int:
        """The highest of any layer, all LoRAs together."""
        ranks: dict[str, int] = {}
        for file in self.files:
            for name, layer in file.layers.items():
                ranks[name] = ranks.get(name, 0) + layer.rank
        return max(ranks.values(), default=0)

    @property
    def max_out_features(self) -> int:
        """Of what any changed layer gives."""
        return max((layer.out_features for file in self.files for layer in file.layers.values()), default=0)

    def metadata(self) -> dict[str, Any]:
        """For what is stored beside the pictures: enough to open them again."""
        if not self.entries:
            return {}
        made: dict[str, Any] = {
            "loras": [
                {**asdict(use), "path": str(file.path.absolute()), "sha256": file.sha256}
                for use, file in zip(self.entries, self.files, strict=True)
            ]
        }
        made |= {"lora_partial": True} if self.allow_partial else {}
        return made | ({"merge_loras": True} if self.is_merged else {})


def check_lora_names(loras: Any) -> None:
    """Refuse LoRAs that are not there, before gigabytes are fetched for them.

    Raises:
        RequestError: one is the name of something else, or none.
        CheckpointError: a path that is not there.
    """
    if isinstance(loras, list | tuple):
        for one in loras:
            check_lora_name(Lora.parse(one).path)


def is_in_context(file: LoraFile) -> bool:
    """Whether a LoRA says that it was trained with a reference. The released ones do not."""
    return REFERENCE_DOWNSCALE_KEY in file.source.metadata


def common_reference_downscale(files: Iterable[LoraFile]) -> int:
    """How many times smaller than the video the references of some LoRAs are; 1 where none says.

    Raises:
        RequestError: two say differently.
    """
    said = {file.path: file.reference_downscale for file in files if is_in_context(file)}
    if len(set(said.values())) > 1:
        told = ", ".join(f"{path} {factor}" for path, factor in said.items())
        raise RequestError(f"these LoRAs were trained with references of other sizes: {told}. Use one at a time.")
    return next(iter(said.values()), 1)
