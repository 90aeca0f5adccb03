"""Files that are no model kadr runs, known by the names of their tensors, each with what it is and the way out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError

_SUPPORTED_MODELS = "kadr runs LTX-Video 0.9 to 0.9.8 (`kadr models` lists them)."
# A pattern that some tensor's name matches, what the file then is, and the way out. The first that matches counts.
_UNSUPPORTED: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r"\.lora_(A|B|down|up)\.|^(lora_unet|lycoris)_"),
        "a LoRA: a change to a model, not a model",
        "Open the model that it was made for; a LoRA is given beside it.",
    ),
    (
        re.compile(
            r"(^|\.)(audio_|av_ca_|video_embeddings_connector)|^(audio_vae|vocoder|text_embedding_projection)\."
        ),
        "LTX-2, another family of models, which makes sound too",
        _SUPPORTED_MODELS,
    ),
    (
        re.compile(r"^(encoder\.block\.\d+\.layer\.|shared\.weight$|enc\.blk\.)"),
        "a T5 text encoder, not a model",
        "Open the model, and give the encoder beside it (--text-encoder).",
    ),
    (
        re.compile(r"^(proj_in\.weight|time_embed\.|latents_mean$|(en|de)coder\.mid_block\.)"),
        "one component of a diffusers folder",
        "Give the folder instead: the one with transformer/ and vae/ in it, or the component's own.",
    ),
    (
        # Read without what the marker says, its weights would be others than it holds.
        re.compile(r"(^|\.)comfy_quant$"),
        "a checkpoint in ComfyUI's mixed precision, which kadr does not read",
        "Take the bf16 file of the same model, or one in 8-bit floats with or without scales.",
    ),
)
_LTX2_CLASS = "AVTransformer3DModel"


def refuse_unsupported(source: Source) -> None:
    """Say what a file is that is not a checkpoint kadr runs.

    Raises:
        CheckpointError: it is one of another kind.
    """
    for pattern, what, way_out in _UNSUPPORTED:
        example = next((name for name in source.infos if pattern.search(name)), None)
        if example is not None:
            raise CheckpointError(f"{source.path} is {what} (it has the tensor {example}). {way_out}")
    if _LTX2_CLASS in _class_name(source.metadata):
        raise CheckpointError(
            f"{source.path} is LTX-2, another family of models (a {_LTX2_CLASS}). {_SUPPORTED_MODELS}"
        )


def _class_name(metadata: Mapping[str, str]) -> str:
    try:
        return str(json.loads(metadata["config"])["transformer"]["_class_name"])
    except (KeyError, TypeError, ValueError):
        return ""
