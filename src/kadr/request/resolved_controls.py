"""Controls resolved for a video: their clips are checked against its length.

A control becomes reference tokens: its clip is encoded at the size of the pass, and its latents stand beside the
video's tokens, as an in-context LoRA was trained with.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from kadr.errors import KadrWarning, RequestError
from kadr.media.control_maps import import_optional
from kadr.request.inputs import CANNY, DEPTH, POSE, Control
from kadr.request.request import Request
from kadr.request.resolved_media import ResolvedMedia
from kadr.shapes import snap_frames

# kind -> (module that draws its maps, extra of the package that installs it)
CONTROL_LIBRARIES = {CANNY: ("cv2", "control"), DEPTH: ("onnxruntime", "depth"), POSE: ("rtmlib", "pose")}


@dataclass(frozen=True)
class ResolvedControl:
    """A control whose clip exists and is long enough.

    Args:
        media: one frame for each sampled frame of the video.
    """

    control: Control
    media: ResolvedMedia


def resolve_controls(controls: Sequence[Control], frames: int) -> tuple[ResolvedControl, ...]:
    """Returns the controls of a video of `frames` frames.

    Raises:
        MediaError: a file cannot be read.
        RequestError: a control is shorter than the video, or needs a library that is not installed.
    """
    for control in controls:
        if control.kind in CONTROL_LIBRARIES:
            import_optional(*CONTROL_LIBRARIES[control.kind])
    return tuple(_resolve_control(control, frames) for control in controls)


def _resolve_control(control: Control, frames: int) -> ResolvedControl:
    if control.is_clip:
        return ResolvedControl(control, _resolve_control_clip(control, frames))
    media = ResolvedMedia.from_image(control.media)
    if frames > 1:
        raise RequestError(
            f"{control.media} is an image, but the video has {frames} frames. Give a clip of at least as many, "
            "or ask for one frame."
        )
    return ResolvedControl(control, media)


def _resolve_control_clip(control: Control, frames: int) -> ResolvedMedia:
    """Returns one frame of a control's clip for each sampled frame of the video; its last is repeated if needed."""
    clip, header = ResolvedMedia.from_clip(control.media, control.frame_range)
    if len(clip) < frames:
        raise _short_clip_error(control, len(clip), header.frames, frames)
    if len(clip) > frames:
        of_range = " of its frame range" if control.frame_range else ""
        _warn(
            f"{control.media} is longer than the {frames} frames of the video; only the first {frames}{of_range} are "
            "followed.",
            topic="clip",
        )
    return clip.select(min(frame, len(clip) - 1) for frame in range(snap_frames(frames)))


def _short_clip_error(control: Control, frames_in_range: int, clip_frames: int, frames: int) -> RequestError:
    in_range = f", {frames_in_range} of them in the frame range" if control.frame_range else ""
    remedy = f"Ask for {frames_in_range} or fewer" if frames_in_range else "Choose another range"
    return RequestError(
        f"{control.media} has {clip_frames} frames{in_range}, but the video has {frames}: a control must be at least "
        f"as long. {remedy}."
    )


def warn_control_lora_mismatch(request: Request, *, has_loras: bool, has_in_context_lora: bool) -> None:
    """Warns where there are controls but no LoRA, or an in-context LoRA but no control.

    Args:
        has_loras: whether any LoRA is given.
        has_in_context_lora: whether the header of one says that it was trained with a reference.
    """
    if has_in_context_lora and not request.controls:
        _warn("a LoRA that was trained to follow a reference is given, but no control. Give one with --control.")
    if request.controls and not has_loras:
        _warn(
            "a control is given, but no LoRA: the model itself was not trained to follow one. Add the in-context LoRA "
            "that was trained for it with --lora."
        )


def _warn(message: str, topic: str = "control") -> None:
    warnings.warn(KadrWarning(message, topic=topic), stacklevel=3)
