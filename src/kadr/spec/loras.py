"""The LoRAs of a model: checked against it, with the strengths of each pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.lora.file import REFERENCE_DOWNSCALE_KEY, LoraFile
from kadr.errors import RequestError
from kadr.models.lora_layers import LoraWeightsByLayer
from kadr.quoting import quote
from kadr.spec.lora import Lora, LoraStrength, refuse_merged_twice

MAX_LORAS = 100  # more than anyone needs; each takes a hundredth of a second to open


@dataclass(frozen=True)
class Loras:
    """The LoRAs of a model: checked against it, with their default strengths.

    Args:
        entries: as given.
        files: their headers, in the same order.
        allow_partial: see `LoraFile.open`.
        is_merged: they are added to the weights when those are loaded, instead of computed beside the weights.
    """

    entries: tuple[Lora, ...] = ()
    files: tuple[LoraFile, ...] = ()
    allow_partial: bool = False
    is_merged: bool = False

    def __bool__(self) -> bool:
        return bool(self.entries)

    def fit_to(self, transformers: Sequence[Checkpoint]) -> Loras:
        """Returns the LoRAs for the transformers of both passes; `allow_partial` leaves out layers these lack.

        Raises:
            CheckpointError: one does not fit.
        """
        files = self.files
        for checkpoint in {checkpoint.path: checkpoint for checkpoint in transformers}.values():
            config = checkpoint.info.transformer
            if config is None:
                raise checkpoint.missing_component_error("transformer")
            if self.allow_partial:
                files = tuple(file.without_missing_layers(config, checkpoint.path) for file in files)
            for file in files:
                file.check_fits(config, checkpoint.path)
        return replace(self, files=files)

    def check_merge(self, num_passes: int, transformers: Sequence[Checkpoint]) -> None:
        """Checks that merged weights can have the strengths of every pass.

        Raises:
            RequestError: one transformer runs two passes, and a LoRA has another strength in each.
        """
        if self.is_merged and num_passes > 1 and transformers[0] is transformers[1]:
            refuse_merged_twice(self.entries)

    def strengths(
        self, pass_index: int, requested_strengths: Sequence[LoraStrength] | None = None
    ) -> tuple[float, ...]:
        """Returns the strength of each LoRA in a pass.

        Args:
            pass_index: 0 or 1.
            requested_strengths: strengths of a request, in the order of the LoRAs; None means the engine's.

        Raises:
            RequestError: their number differs from the number of LoRAs, or merged LoRAs have other strengths.
        """
        defaults = tuple(lora.pass_strengths()[pass_index] for lora in self.entries)
        if requested_strengths is None:
            return defaults
        if len(requested_strengths) != len(defaults):
            raise RequestError(
                f"{len(requested_strengths)} strengths of LoRAs are given, and this engine has {len(defaults)} LoRAs. "
                "Give one for each."
            )
        strengths = tuple(
            strength[pass_index] if isinstance(strength, tuple) else float(strength) for strength in requested_strengths
        )
        if self.is_merged and strengths != defaults:
            raise RequestError("the LoRAs are merged, which fixes their strengths. Open the engine without merging.")
        return strengths

    def load(self) -> tuple[LoraWeightsByLayer, ...]:
        """Loads the weights of each LoRA from its file."""
        return tuple(file.load() for file in self.files)

    def has_in_context(self, requested_strengths: Sequence[LoraStrength] | None = None) -> bool:
        """Returns whether an active LoRA states that it is an in-context LoRA; argument as in `strengths`."""
        return any(is_in_context(file) for file in self._active_files(requested_strengths))

    def _active_files(self, requested_strengths: Sequence[LoraStrength] | None) -> list[LoraFile]:
        """Returns the files with a strength other than 0 in any pass."""
        strengths_of_both = zip(
            *(self.strengths(pass_index, requested_strengths) for pass_index in (0, 1)), strict=True
        )
        return [file for file, strengths in zip(self.files, strengths_of_both, strict=True) if any(strengths)]

    def reference_downscale(self, requested_strengths: Sequence[LoraStrength] | None = None) -> int:
        """Returns the video size divided by the control's size for the active LoRAs; 1 where none states it.

        Args:
            requested_strengths: see `strengths`.

        Raises:
            RequestError: two LoRAs state different factors.
        """
        return common_reference_downscale(self._active_files(requested_strengths))

    @property
    def target_layers(self) -> frozenset[str]:
        """Names of all adapted layers."""
        return frozenset(name for file in self.files for name in file.layers)

    def adapter_bytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes of all LoRAs beside the weights."""
        return sum(self.parameter_counts) * dtype.itemsize

    def merged_weight_bytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes of the weights that the LoRAs are merged into."""
        layers = {name: layer for file in self.files for name, layer in file.layers.items()}
        return sum(layer.in_features * layer.out_features for layer in layers.values()) * dtype.itemsize

    @property
    def parameter_counts(self) -> tuple[int, ...]:
        """Number of parameters of each LoRA."""
        return tuple(
            sum(layer.rank * (layer.in_features + layer.out_features) for layer in file.layers.values())
            for file in self.files
        )

    @property
    def max_rank(self) -> int:
        """Highest rank of any layer, summed over all LoRAs."""
        ranks: dict[str, int] = {}
        for file in self.files:
            for name, layer in file.layers.items():
                ranks[name] = ranks.get(name, 0) + layer.rank
        return max(ranks.values(), default=0)

    @property
    def max_out_features(self) -> int:
        """Largest output width of any adapted layer."""
        return max((layer.out_features for file in self.files for layer in file.layers.values()), default=0)

    def metadata(self) -> dict[str, Any]:
        """Returns the metadata of a video: enough to open the same LoRAs again."""
        if not self.entries:
            return {}
        metadata: dict[str, Any] = {
            "loras": [
                {**asdict(lora), "path": str(file.path.absolute()), "sha256": file.sha256}
                for lora, file in zip(self.entries, self.files, strict=True)
            ]
        }
        metadata |= {"lora_partial": True} if self.allow_partial else {}
        return metadata | ({"merge_loras": True} if self.is_merged else {})


def parse_loras(loras: Any) -> tuple[Lora, ...]:
    """Parses the LoRAs of `Engine.open`; see `Lora.parse`.

    Raises:
        RequestError: they are not a list of LoRAs, or more than `MAX_LORAS`.
    """
    if not isinstance(loras, list | tuple):
        raise RequestError(f"loras is {quote(loras)}; it must be a list, such as [('style.safetensors', 0.8)].")
    if len(loras) > MAX_LORAS:
        raise RequestError(f"{len(loras)} LoRAs are given; an engine takes at most {MAX_LORAS}. Leave some out.")
    return tuple(Lora.parse(value) for value in loras)


def is_in_context(file: LoraFile) -> bool:
    """Returns whether a LoRA's header states that it is an in-context LoRA. The released ones do not."""
    return REFERENCE_DOWNSCALE_KEY in file.source.metadata


def common_reference_downscale(files: Iterable[LoraFile]) -> int:
    """Returns the video size divided by the control's size that in-context LoRAs state; 1 where none states it.

    Raises:
        RequestError: two LoRAs state different factors.
    """
    factors = {file.path: file.reference_downscale for file in files if is_in_context(file)}
    if len(set(factors.values())) > 1:
        listed = ", ".join(f"{path} {factor}" for path, factor in factors.items())
        raise RequestError(f"these LoRAs were trained with controls of different sizes: {listed}. Use one at a time.")
    return next(iter(factors.values()), 1)
