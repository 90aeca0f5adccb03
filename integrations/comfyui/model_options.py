"""`ModelOptions`: the output KADR_MODEL, a model that is named and not yet open."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .model_files import StampedFile


@dataclass(frozen=True)
class ModelOptions:
    """Arguments of `kadr.Engine.open`, and the strength of each LoRA.

    Args:
        model, text_encoder, vae, upscaler: files, or names of releases; None is what kadr finds.
        release, quant: None is what the file says.
        loras: in the order of their nodes.
        strengths: of the LoRAs. They belong to a request: another strength does not load the model again.
    """

    model: StampedFile
    text_encoder: StampedFile | None = None
    vae: StampedFile | None = None
    upscaler: StampedFile | None = None
    release: str | None = None
    quant: str | None = None
    offload: str = "auto"
    device: str = "auto"
    loras: tuple[StampedFile, ...] = ()
    strengths: tuple[float, ...] = ()

    def with_lora(self, lora: StampedFile, strength: float) -> ModelOptions:
        """Returns the model with one more LoRA."""
        return replace(self, loras=(*self.loras, lora), strengths=(*self.strengths, strength))

    def without_strengths(self) -> ModelOptions:
        """Returns what an engine is opened with; engines of equal options are the same."""
        return replace(self, strengths=())

    def engine_arguments(self) -> dict[str, Any]:
        """Returns the arguments of `kadr.Engine.open`."""
        arguments: dict[str, Any] = {"loras": [lora.path for lora in self.loras]}
        for name in ("model", "text_encoder", "vae", "upscaler"):
            if (file := getattr(self, name)) is not None:
                arguments[name] = file.path
        return arguments | {name: getattr(self, name) for name in ("release", "quant", "offload", "device")}
