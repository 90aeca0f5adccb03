"""Controls resolved for a video: their clips are opened, and checked against its length.

A control becomes reference tokens: its clip is encoded at the size of the pass, and its latents stand beside the
video's tokens, as an in-context LoRA was trained with.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kadr.errors import KadrWarning, RequestError
from kadr.media.clip import ClipReader, probe_video
from kadr.media.control_maps import import_optional
from kadr.media.image import load_image
from kadr.request.inputs import CANNY, DEPTH, POSE, Control
from kadr.request.request import Request
from kadr.request.resolved_conditions import Frames, open_clip
from kadr.shapes import snap_frames

# kind -> (module that draws its maps, extra of the package that installs it)
CONTROL_LIBRARIES = {CANNY: ("cv2", "control"), DEPTH: ("onnxruntime", "depth"), POSE: ("rtmlib", "pose")}


@dataclass(frozen=True)
class ResolvedControl:
    """A control whose clip exists, can be read and is long enough.

    Args:
        frames: one for each sampled frame of the video; those of a clip are decoded when they are iterated over.
    """

    control: Control
    frames: Frames

    def read_frames(self) -> Iterator[np.ndarray]:
        """Yields each frame, uint8 (H, W, 3) RGB."""
        for frame in self.frames:
            yield frame if isinstance(frame, np.ndarray) else np.asarray(load_image(frame))


def resolve_controls(request: Request) -> list[ResolvedControl]:
    """Opens all controls of a request whose frames are known.

    Raises:
        MediaError: a file cannot be read.
        RequestError: a control is shorter than the video, or needs a library that is not installed.
    """
    for control in request.controls:
        if control.kind in CONTROL_LIBRARIES:
            import_optional(*CONTROL_LIBRARIES[control.kind])
    return [_resolve_control(control, request) for control in request.controls]


def _resolve_control(control: Control, request: Request) -> ResolvedControl:
    assert request.frames is not None
    if control.is_clip:
        return ResolvedControl(control, _open_control_clip(control, request.frames))
    load_image(control.media)  # refuses a bad image here
    if request.frames > 1:
        raise RequestError(
            f"{control.media} is an image, but the video has {request.frames} frames. Give a clip of at least as many, "
            "or ask for one frame."
        )
    return ResolvedControl(control, [control.media])


def _open_control_clip(control: Control, frames: int) -> ClipReader:
    """Opens a control's clip, one frame for each sampled frame of the video; its last frame is repeated if needed."""
    sampled_frames = snap_frames(frames)
    clip = open_clip(control.media, control.frame_range, max_frames=sampled_frames + 1)
    if len(clip) < frames:
        raise _short_clip_error(control, clip, frames)
    if len(clip) > frames:
        of_range = " of its frame range" if control.frame_range else ""
        _warn(
            f"{control.media} is longer than the {frames} frames of the video; only the first {frames}{of_range} are "
            "followed."
        )
    return clip.select(min(frame, len(clip) - 1) for frame in range(sampled_frames))


def _short_clip_error(control: Control, clip: ClipReader, frames: int) -> RequestError:
    count = probe_video(control.media)[0]
    in_range = f", {len(clip)} of them in the frame range" if control.frame_range else ""
    remedy = f"Ask for {len(clip)} or fewer" if len(clip) else "Choose another range"
    return RequestError(
        f"{control.media} has {count} frames{in_range}, but the video has {frames}: a control must be at least as "
        f"long. {remedy}."
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


def _warn(message: str) -> None:
    warnings.warn(message, KadrWarning, stacklevel=3)
