"""LoRAs of a model: opened, checked against it, and how much of each a pass gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kadr.checkpoints.lora import DOWNSCALE, LoraFile
from kadr.checkpoints.open import Checkpoint
from kadr.errors import RequestError
from kadr.models.adapters import Additions
from kadr.pipeline.locate import located_lora
from kadr.pipeline.request import Strength, check_strength


@dataclass(frozen=True)
class Lora:
    """A LoRA for a model, and how strongly it acts where a request does not say.

    Args:
        path: a .safetensors, a folder as PEFT and diffusers write them, or a name of the registry.
        strength: 1 is as it was trained, 0 is without it, below 0 is away from it.
        second: in the second of two passes; None: as `strength`.
    """

    path: str
    strength: float = 1.0
    second: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        for value in (self.strength, self.second):
            if value is not None:
                check_strength(value)

    @classmethod
    def of(cls, given: Any) -> Lora:
        """From what `Engine.open` takes: a Lora, a path, or a tuple of a path and one strength or two.

        Raises:
            RequestError: it is none of these.
        """
        if isinstance(given, Lora):
            return given
        if isinstance(given, str | Path):
            return cls(str(given))
        if isinstance(given, tuple | list) and 1 <= len(given) <= 3 and isinstance(given[0], str | Path):
            return cls(*given)
        raise RequestError(f"a LoRA is given as {given!r}; it must be a path, or (path, strength).")

    def strengths(self) -> tuple[float, float]:
        """In the first pass and in the second."""
        return self.strength, self.strength if self.second is None else self.second


class Loras:
    """The LoRAs of an engine.

    Args:
        given: see `Lora.of`.
        partial: see `LoraFile.open`.
        merged: they are added to the weights when those are loaded, and not beside them at every step.
    """

    def __init__(self, given: Sequence[Any], *, partial: bool = False, merged: bool = False) -> None:
        if isinstance(given, str | Path):
            raise RequestError(f"loras is {given!r}; it must be a list, such as [({given!r}, 1.0)].")
        self.uses = tuple(Lora.of(one) for one in given)
        self.files = tuple(LoraFile.open(located_lora(use.path), partial=partial) for use in self.uses)
        self.partial, self.merged = partial, merged and bool(self.uses)

    def __bool__(self) -> bool:
        return bool(self.uses)

    def check(self, transformers: Sequence[Checkpoint]) -> None:
        """Check that they fit the transformers of both passes, and can be merged where they are to be.

        Raises:
            CheckpointError: one does not fit.
            RequestError: they are to be merged, with other strengths for each pass of one transformer.
        """
        for checkpoint in {one.path: one for one in transformers}.values():
            assert checkpoint.detected.transformer is not None
            for file in self.files:
                file.check_fits(checkpoint.detected.transformer, checkpoint.path)
        if self.merged and transformers[0] is transformers[1]:
            for use in self.uses:
                first, second = use.strengths()
                if first != second:
                    raise RequestError(
                        f"{use.path} is to be merged, with strength {first:g} in the first pass and {second:g} in the "
                        "second: one transformer makes both. Leave --merge-loras out."
                    )

    def strengths(self, number: int, asked: Sequence[Strength] | None = None) -> tuple[float, ...]:
        """How much of each acts in a pass, 0 or 1.

        Args:
            asked: of a request, in their order; None: as the engine was opened with.

        Raises:
            RequestError: another number of them, or others than were merged.
        """
        own = tuple(use.strengths()[number] for use in self.uses)
        if asked is None:
            return own
        if len(asked) != len(own):
            raise RequestError(
                f"{len(asked)} strengths of LoRAs are given, and this engine has {len(own)} LoRAs. Give one for each."
            )
        made = tuple(each[number] if isinstance(each, tuple) else float(each) for each in asked)
        if self.merged and made != own:
            raise RequestError("the LoRAs are merged, and their strengths are fixed with that. Open without merging.")
        return made

    def additions(self) -> tuple[Additions, ...]:
        """What they add, read from their files."""
        return tuple(file.load() for file in self.files)

    @property
    def reference_downscale(self) -> int:
        """How many times smaller than the video the references of these are; 1 where none says.

        Raises:
            RequestError: two say differently.
        """
        said = {file.path: file.reference_downscale for file in self.files if DOWNSCALE in file.source.metadata}
        if len(set(said.values())) > 1:
            told = ", ".join(f"{path} {factor}" for path, factor in said.items())
            raise RequestError(f"these LoRAs were trained with references of other sizes: {told}. Use one at a time.")
        return next(iter(said.values()), 1)

    @property
    def targets(self) -> frozenset[str]:
        """The layers that any of them changes."""
        return frozenset(name for file in self.files for name in file.layers)

    def bytes(self, dtype: torch.dtype) -> int:
        """That they take beside the weights."""
        return sum(self.parameters) * dtype.itemsize

    def changed_bytes(self, dtype: torch.dtype) -> int:
        """Of the weights that they are merged into."""
        layers = {name: layer for file in self.files for name, layer in file.layers.items()}
        return sum(layer.inputs * layer.outputs for layer in layers.values()) * dtype.itemsize

    @property
    def parameters(self) -> tuple[int, ...]:
        """Of each."""
        return tuple(
            sum(layer.rank * (layer.inputs + layer.outputs) for layer in file.layers.values()) for file in self.files
        )

    @property
    def rank(self) -> int:
        """The highest of any layer, all LoRAs together."""
        ranks: dict[str, int] = {}
        for file in self.files:
            for name, layer in file.layers.items():
                ranks[name] = ranks.get(name, 0) + layer.rank
        return max(ranks.values(), default=0)

    @property
    def widest(self) -> int:
        """Of what any changed layer gives."""
        return max((layer.outputs for file in self.files for layer in file.layers.values()), default=0)

    def record(self) -> dict[str, Any]:
        """For what is stored beside the pictures: enough to open them again."""
        if not self.uses:
            return {}
        made: dict[str, Any] = {
            "loras": [
                {**asdict(use), "path": str(file.path.absolute())}
                for use, file in zip(self.uses, self.files, strict=True)
            ]
        }
        made |= {"lora_partial": True} if self.partial else {}
        return made | ({"merge_loras": True} if self.merged else {})
