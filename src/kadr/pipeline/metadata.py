"""Metadata of a video: enough to generate it again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from kadr.checkpoints.lora.file import LoraFile
from kadr.kernels.choices import record_choices, restore_choices
from kadr.pipeline.generation import Generation
from kadr.pipeline.longvideo.window_folder import EXECUTION_KEY
from kadr.pipeline.modules import TrainedTransformer
from kadr.planning.placement import describe_weights
from kadr.request.request import Request
from kadr.request.resolved_request import ResolvedRequest
from kadr.schema import VIDEO_METADATA
from kadr.spec.lora import Lora
from kadr.spec.loras import Loras
from kadr.spec.model import ModelSpec
from kadr.validation import MAX_PATH_BYTES, expand_home
from kadr.version import __version__

KERNELS_KEY = "kernels"  # in the metadata: the kernels that were chosen by timing


def video_metadata(
    spec: ModelSpec, resolved: ResolvedRequest, trained: TrainedTransformer | None = None
) -> dict[str, Any]:
    """Returns the metadata stored in an mp4, without the notices of its generation."""
    return {
        VIDEO_METADATA.key: VIDEO_METADATA.number,
        "version": __version__,
        "model_name": spec.name,
        "release": spec.release.name if spec.release else None,
        **spec.component_paths(has_two_passes=len(resolved.passes) > 1),
        **(spec.loras if trained is None else _trained_lora(trained)).metadata(),
        "device": spec.device.type,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "quant": spec.quant,
        "compile_transformer": spec.compile_transformer,
        "request": _with_absolute_paths(resolved.request).to_json(),
    }


def with_outcome(metadata: dict[str, Any], generation: Generation) -> dict[str, Any]:
    """Returns the metadata with the kernels that were chosen by timing, and with what was degraded, if anything."""
    outcome = {KERNELS_KEY: record_choices(generation.device), "notices": list(generation.notices)}
    return {**metadata, **{key: value for key, value in outcome.items() if value}}


def without_folders(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns metadata in which every absolute path is the name of its file: others need not know where it lies."""

    def strip(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: strip(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [strip(item) for item in value]
        return os.path.basename(value) if isinstance(value, str) and _is_file_path(value) else value

    stripped: dict[str, Any] = strip(metadata)
    return stripped


def _is_file_path(text: str) -> bool:
    """Tells an absolute path that exists from a prompt that begins with a slash."""
    return os.path.isabs(text) and len(text) <= MAX_PATH_BYTES and "\0" not in text and os.path.exists(text)


def restore_kernels(generation: Generation, choices: Any) -> None:
    """Uses the kernels that a video or a folder of windows recorded; what this machine lacks is a notice.

    Args:
        choices: as recorded; anything else is ignored.
    """
    if not isinstance(choices, Mapping):
        return
    recorded = {str(key): str(name) for key, name in choices.items()}
    if recorded.items() <= record_choices(generation.device).items():
        return
    generation.modules.module_cache.clear()  # a cached transformer may have CUDA graphs of other kernels
    if missing := restore_choices(recorded, generation.device, override=True):
        generation.modules.notices.add(
            f"kernels that were used before are not on this machine: {'; '.join(missing)}. Others are used, which may "
            "round differently."
        )


def window_identity(generation: Generation, metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns what a stored window depends on: the metadata, contents of files, and how it is computed."""
    placement = generation.modules.placement("denoise")
    execution = f"{describe_weights(placement)}, by {placement.backend}, {torch.get_num_threads()} threads"
    fingerprints = generation.spec.file_fingerprints(generation.resolved.request.media_paths())
    return {**metadata, **fingerprints, EXECUTION_KEY: execution}


def _trained_lora(trained: TrainedTransformer) -> Loras:
    """Returns the LoRA that a transformer is trained with, as trained so far."""
    return Loras((Lora.parse(trained.lora_path),), (LoraFile.open(trained.lora_path),))


def _with_absolute_paths(request: Request) -> Request:
    """Returns the request with absolute paths, so that `kadr rerun` works from another folder."""
    conditions = tuple(replace(item, media=_absolute_path(item.media)) for item in request.conditions)
    controls = tuple(replace(item, media=_absolute_path(item.media)) for item in request.controls)
    input_video = None if request.input_video is None else _absolute_path(request.input_video)
    return replace(request, conditions=conditions, controls=controls, input_video=input_video)


def _absolute_path(path: str) -> str:
    return os.path.realpath(expand_home(path))
