"""Nodes that name a model and its LoRAs. Neither opens a file: the node that generates does."""

from __future__ import annotations

from typing import Any

from .kadr_package import release_names, weight_formats
from .model_files import find_file, list_files
from .model_options import ModelOptions

CATEGORY = "kadr"
AUTO = "auto"
AS_IN_FILE = "as in the file"
OFFLOAD_MODES = ["auto", "none", "stages", "blocks"]
DEVICES = ["auto", "cpu", "cuda", "mps"]


class KadrModel:
    """Names a model: a file of ComfyUI's folders, or a release of kadr, which is fetched when it is needed."""

    RETURN_TYPES = ("KADR_MODEL",)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"
    CATEGORY = CATEGORY
    DESCRIPTION = "A model of the LTX-Video family for kadr. It is loaded when a video is generated."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs, with the files that are there now."""
        models = [*release_names("model"), *list_files("kadr_models")]
        return {
            "required": {
                "model": (models or ["demo"], {"tooltip": "A release, or a file in checkpoints or diffusion_models."}),
                "quant": (
                    [AS_IN_FILE, *(name for name in weight_formats() if name != "none")],
                    {"tooltip": "How the transformer's weights are kept in memory; auto: 8 bits if they do not fit."},
                ),
                "offload": (OFFLOAD_MODES, {"tooltip": "auto: the fastest that fits into memory."}),
                "device": (DEVICES, {"tooltip": "auto: the device that ComfyUI computes on."}),
            },
            "optional": {
                "text_encoder": (
                    [AUTO, *list_files("kadr_text_encoders")],
                    {"tooltip": "T5-XXL. auto: kadr finds it."},
                ),
                "vae": ([AUTO, *list_files("kadr_vaes")], {"tooltip": "auto: the one in the model's file."}),
                "upscaler": (
                    [AUTO, *list_files("kadr_upscalers")],
                    {"tooltip": "For two passes. auto: the one released for the model."},
                ),
                "release": (
                    [AUTO, *release_names("model")],
                    {"tooltip": "The release that a file is, where nothing in it tells."},
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, model: str, **others: Any) -> str:
        """Returns another text once a file is another one under the same name."""
        return repr([find_file("kadr_models", model), *_find_parts(others).values()])

    def load(self, model: str, quant: str, offload: str, device: str, **others: str) -> tuple[ModelOptions]:
        """Returns the model's options.

        Args:
            others: the optional inputs.
        """
        release = others.get("release", AUTO)
        options = ModelOptions(
            model=find_file("kadr_models", model),
            release=None if release == AUTO else release,
            quant=None if quant == AS_IN_FILE else quant,
            offload=offload,
            device=device,
            **_find_parts(others),
        )
        return (options,)


class KadrLora:
    """Adds a LoRA to a model; LoRAs are chained. Another strength does not load the model again."""

    RETURN_TYPES = ("KADR_MODEL",)
    RETURN_NAMES = ("model",)
    FUNCTION = "add"
    CATEGORY = CATEGORY
    DESCRIPTION = "Adds a LoRA to a kadr model. Chain several; the in-context ones go with kadr: control."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs, with the files that are there now."""
        return {
            "required": {
                "model": ("KADR_MODEL",),
                "lora": ([*list_files("kadr_loras"), *release_names("LoRA")],),
                "strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, lora: str, **others: Any) -> str:
        """Returns another text once the file is another one under the same name."""
        del others
        return repr(find_file("kadr_loras", lora))

    def add(self, model: ModelOptions, lora: str, strength: float) -> tuple[ModelOptions]:
        """Returns the model with the LoRA."""
        return (model.with_lora(find_file("kadr_loras", lora), strength),)


def _find_parts(others: dict[str, Any]) -> dict[str, Any]:
    """Returns the parts of a model that a node names, by argument of `ModelOptions`."""
    kinds = {"text_encoder": "kadr_text_encoders", "vae": "kadr_vaes", "upscaler": "kadr_upscalers"}
    names = {part: others.get(part) or AUTO for part in kinds}
    return {part: find_file(kinds[part], name) for part, name in names.items() if name != AUTO}
