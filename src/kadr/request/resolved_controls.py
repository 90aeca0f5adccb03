"""The request's controls: looked into, checked against the video, and fitted to each pass.

A control becomes a reference video, encoded at the size of the pass and seen by the network beside the video's tokens,
as an in-context LoRA was trained to.
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

CONTROL_LIBRARIES = {CANNY: ("cv2", "control"), DEPTH: ("onnxruntime", "depth"), POSE: ("rtmlib", "pose")}


@dataclass(frozen=True)
class ResolvedControl:
    """A control whose medium is known to be there and whole, and long enough.

    Args:
        frames: one for each of the video's, as made; those of a clip are decoded when they are gone through.
    """

    control: Control
    frames: Frames

    def read_frames(self) -> Iterator[np.ndarray]:
        """Each frame, uint8 (H, W, 3) RGB."""
        for frame in self.frames:
            yield frame if isinstance(frame, np.ndarray) else np.asarray(load_image(frame))


def resolve_controls(request: Request) -> list[ResolvedControl]:
    """Look into all controls of a request whose frames are known.

    Raises:
        MediaError: a file cannot be read.
        RequestError: one is shorter than the video, or made with a library that is not installed.
    """
    for control in request.controls:
        if control.kind in CONTROL_LIBRARIES:
            import_optional(*CONTROL_LIBRARIES[control.kind])
    return [_resolve_control(control, request) for control in request.controls]


def _resolve_control(control: Control, request: Request) -> ResolvedControl:
    assert request.frames is not None
    if control.is_clip:
        return ResolvedControl(control, _open_control_clip(control, request.frames))
    load_image(control.media)  # refuses here what is no picture
    if request.frames > 1:
        raise RequestError(
            f"{control.media} is a picture, and the video has {request.frames} frames. Give a clip of as many, or ask "
            "for one frame."
        )
    return ResolvedControl(control, [control.media])


def _open_control_clip(control: Control, frames: int) -> ClipReader:
    """As many frames as are made: the last is repeated where only those asked for are there."""
    made = snap_frames(frames)
    kept = open_clip(control.media, control.frame_range, max_frames=made + 1)
    if len(kept) < frames:
        whole = probe_video(control.media)[0]
        which = f"{control.media} has {whole} frames" + (f", {len(kept)} of them taken" if control.frame_range else "")
        way = f"Ask for {len(kept)} or fewer" if len(kept) else "Take another part"
        raise RequestError(f"{which}, and the video has {frames}: a control must be as long. {way}.")
    if len(kept) > frames:
        warnings.warn(
            f"{control.media} goes on after the {frames} frames of the video; the first {frames} "
            f"{'that are taken ' if control.frame_range else ''}are followed.",
            KadrWarning,
            stacklevel=2,
        )
    return kept.select(min(place, len(kept) - 1) for place in range(made))


def warn_control_lora_mismatch(request: Request, *, has_loras: bool, has_in_context_lora: bool) -> None:
    """Say where controls are given, and no LoRA that could read them; and where a LoRA waits for one.

    Args:
        has_loras: there are some.
        has_in_context_lora: one of them says that it was trained with a reference.
    """
    if has_in_context_lora and not request.controls:
        warnings.warn(
            "a LoRA is given that was trained to follow a reference, and no control. Give one with --control.",
            KadrWarning,
            stacklevel=2,
        )
    if request.controls and not has_loras:
        warnings.warn(
            "a control is given, and no LoRA: the model itself never learned to follow one. Add the in-context LoRA "
            "that was trained for it with --lora.",
            KadrWarning,
            stacklevel=2,
        )
