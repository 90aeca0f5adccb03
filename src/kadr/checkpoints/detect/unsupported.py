"""Refuses files that kadr does not run, recognized by their tensor names; each error says what the file is."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.json_reader import parse_json

_SUPPORTED_MODELS = "kadr runs LTX-Video 0.9 to 0.9.8 (`kadr models` lists them)."
T5_KIND = "a T5 text encoder, not a model"
T5_WAY_OUT = "Open the model, and give the encoder beside it (--text-encoder)."
# Pattern of a tensor name, what the file is, and the way out. The first match counts.
_UNSUPPORTED: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r"\.lora_(A|B|down|up)\.|^(lora_unet|lycoris)_"),
        "a LoRA, not a model",
        "Open the model it was trained for, and give the LoRA beside it (--lora).",
    ),
    (
        re.compile(
            r"(^|\.)(audio_|av_ca_|video_embeddings_connector)|^(audio_vae|vocoder|text_embedding_projection)\."
        ),
        "LTX-2, another family of models, with audio",
        _SUPPORTED_MODELS,
    ),
    (
        re.compile(r"^(encoder\.block\.\d+\.layer\.|shared\.weight$|enc\.blk\.)"),
        T5_KIND,
        T5_WAY_OUT,
    ),
    (
        re.compile(r"^(proj_in\.weight|time_embed\.|latents_mean$|(en|de)coder\.mid_block\.)"),
        "one component of a diffusers folder",
        "Give the folder instead: the one with transformer/ and vae/ in it, or the component's own.",
    ),
)
_LTX2_CLASS = "AVTransformer3DModel"


def refuse_unsupported(source: Source) -> None:
    """Refuses a file of another kind of model, with what it is.

    Raises:
        CheckpointError: it is one.
    """
    for pattern, kind, way_out in _UNSUPPORTED:
        example = next((name for name in source.infos if pattern.search(name)), None)
        if example is not None:
            raise CheckpointError(f"{source.path} is {kind} (it has the tensor {example}). {way_out}")
    if _LTX2_CLASS in _class_name(source.metadata):
        raise CheckpointError(
            f"{source.path} is LTX-2, another family of models (a {_LTX2_CLASS}). {_SUPPORTED_MODELS}"
        )


def _class_name(metadata: Mapping[str, str]) -> str:
    try:
        return str(parse_json(metadata["config"])["transformer"]["_class_name"])
    except (KeyError, TypeError, ValueError):
        return ""
