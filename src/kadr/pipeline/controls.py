"""The request's controls: looked into, checked against the video, and fitted to each pass.

A control becomes a reference video, encoded at the size of the pass and seen by the network beside the video's tokens,
as an in-context LoRA was trained to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kadr.checkpoints import hub
from kadr.errors import CheckpointError, KadrWarning, RequestError
from kadr.media.clip import Film, read_length
from kadr.media.control import cover, edges, library, signed
from kadr.media.depth import DepthNetwork, Depths
from kadr.media.image import load_picture
from kadr.media.pose import PoseNetwork
from kadr.pipeline.progress import Stage, Watch
from kadr.request.conditions import Frames, film_part
from kadr.request.inputs import CANNY, DEPTH, POSE, Control
from kadr.request.passes import PassPlan
from kadr.request.request import Request
from kadr.shapes import SPATIAL, LatentGrid, Size, snap_frames

LIBRARIES = {CANNY: ("cv2", "control"), DEPTH: ("onnxruntime", "depth"), POSE: ("rtmlib", "pose")}
NETWORKS = {  # repository and files on the hub
    DEPTH: ("onnx-community/depth-anything-v2-small", ("onnx/model.onnx",)),
    POSE: ("yzd-v/DWPose", ("yolox_l.onnx", "dw-ll_ucoco_384.onnx")),
}
Drawn = Callable[[int, np.ndarray], np.ndarray]  # place and frame -> the picture of it, uint8 (H, W, 3)


@dataclass(frozen=True)
class Followed:
    """A control whose medium is known to be there and whole, and long enough.

    Args:
        frames: one for each of the video's, as made; those of a clip are decoded when they are gone through.
    """

    control: Control
    frames: Frames

    def pictures(self) -> Iterator[np.ndarray]:
        """Each frame, uint8 (H, W, 3) RGB."""
        for frame in self.frames:
            yield frame if isinstance(frame, np.ndarray) else np.asarray(load_picture(frame))


def read_controls(request: Request) -> list[Followed]:
    """Look into all controls of a request whose frames are known.

    Raises:
        MediaError: a file cannot be read.
        RequestError: one is shorter than the video, or made with a library that is not installed.
    """
    for control in request.controls:
        if control.kind in LIBRARIES:
            library(*LIBRARIES[control.kind])
    return [_read(control, request) for control in request.controls]


def _read(control: Control, request: Request) -> Followed:
    assert request.frames is not None
    if control.clip:
        return Followed(control, _film(control, request.frames))
    load_picture(control.media)  # refuses here what is no picture
    if request.frames > 1:
        raise RequestError(
            f"{control.media} is a picture, and the video has {request.frames} frames. Give a clip of as many, or ask "
            "for one frame."
        )
    return Followed(control, [control.media])


def _film(control: Control, frames: int) -> Film:
    """As many frames as are made: the last is repeated where only those asked for are there."""
    made = snap_frames(frames)
    kept = film_part(control.media, control.part, most=made + 1)
    if len(kept) < frames:
        whole = read_length(control.media)[0]
        which = f"{control.media} has {whole} frames" + (f", {len(kept)} of them taken" if control.part else "")
        way = f"Ask for {len(kept)} or fewer" if len(kept) else "Take another part"
        raise RequestError(f"{which}, and the video has {frames}: a control must be as long. {way}.")
    if len(kept) > frames:
        warnings.warn(
            f"{control.media} goes on after the {frames} frames of the video; the first {frames} "
            f"{'that are taken ' if control.part else ''}are followed.",
            KadrWarning,
            stacklevel=2,
        )
    return kept.chosen(min(place, len(kept) - 1) for place in range(made))


def warn_unheard(request: Request, *, loras: bool, in_context: bool) -> None:
    """Say where controls are given, and no LoRA that could read them; and where a LoRA waits for one.

    Args:
        loras: there are some.
        in_context: one of them says that it was trained with a reference.
    """
    if in_context and not request.controls:
        warnings.warn(
            "a LoRA is given that was trained to follow a reference, and no control. Give one with --control.",
            KadrWarning,
            stacklevel=2,
        )
    if request.controls and not loras:
        warnings.warn(
            "a control is given, and no LoRA: the model itself never learned to follow one. Add the in-context LoRA "
            "that was trained for it with --lora.",
            KadrWarning,
            stacklevel=2,
        )


@dataclass(frozen=True)
class Reference:
    """A control for one pass, as the encoder is given it: drawn when it is asked for, and not kept.

    Args:
        places: for each frame, which of the control's it is.
        frames: those.
        size: of the video, as it was asked for.
        made: of the reference.
        drawn: draws what a network has found; None where none has looked.
    """

    control: Control
    places: Sequence[int]
    frames: Frames
    size: Size
    made: Size
    drawn: Drawn | None = None

    @property
    def grid(self) -> LatentGrid:
        """Of its latents."""
        return LatentGrid.of(self.made, len(self.places))

    def chunks(self, count: int, *, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
        """`count` pictures at a time, the last ones perhaps fewer: (1, 3, n, H, W) in [-1, 1].

        Raises:
            MediaError: a file was changed since it was opened.
        """
        pictures = (self.picture(*pair) for pair in zip(self.places, self.frames, strict=True))
        while chunk := list(islice(pictures, count)):
            yield torch.stack([signed(one) for one in chunk], dim=1)[None].to(device, dtype)

    def picture(self, place: int, frame: str | np.ndarray) -> np.ndarray:
        """What is encoded of one frame, uint8 (H, W, 3)."""
        if self.drawn is not None:
            frame = self.drawn(place, np.asarray(load_picture(frame)))
        covered = cover(frame, self.size, self.made, name=self.control.media)
        return edges(covered) if self.control.kind == CANNY else covered


def reference(followed: Followed, request: Request, plan: PassPlan, downscale: int = 1) -> Reference:
    """A control for one pass or window; every second frame of it, where the pass makes only those.

    Args:
        downscale: how many times smaller than the video the references of the LoRA are.

    Raises:
        RequestError: the sides of the pass cannot be divided so.
        MediaError: the medium is too small.
    """
    assert isinstance(request.size, Size)
    unit = SPATIAL * downscale
    if plan.size.width % unit or plan.size.height % unit:
        raise RequestError(
            f"the references of this LoRA are {downscale} times smaller than the video, and pass {plan.number} is made "
            f"at {plan.size}: both sides must be multiples of {unit}. {_divisible(request, plan, unit)}"
        )
    places = plan.seen(request.fps, len(followed.frames))
    frames = followed.frames.chosen(places) if isinstance(followed.frames, Film) else followed.frames
    made = Size(plan.size.width // downscale, plan.size.height // downscale)
    first = frames.sample if isinstance(frames, Film) else frames[0]
    cover(first, request.size, made, name=followed.control.media)  # refuses here what is too small
    return Reference(followed.control, places, frames, request.size, made)


def _divisible(request: Request, plan: PassPlan, unit: int) -> str:
    """A way out, in words."""
    if request.multi_scale:
        return "Ask for another size, or for a single pass."
    return f"Ask for {Size(*(-(-side // unit) * unit for side in (plan.size.width, plan.size.height)))}."


def fetched(controls: Sequence[Followed]) -> dict[str, list[Path]]:
    """The networks that find what kinds of control show, brought to this machine.

    Raises:
        CheckpointError: one cannot be fetched.
    """
    kinds = {one.control.kind for one in controls} & NETWORKS.keys()
    try:
        return {kind: [hub.fetch(NETWORKS[kind][0], file) for file in NETWORKS[kind][1]] for kind in sorted(kinds)}
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} A clip that shows the {' or '.join(sorted(kinds))} already needs none of this: give it with no "
            "kind in front of its path."
        ) from error


def drawings(controls: Sequence[Followed], networks: dict[str, list[Path]], watch: Watch) -> list[Drawn | None]:
    """For each control what draws its frames, once a network has gone through all of them; None where none has to."""
    count = sum(len(one.frames) for one in controls if one.control.kind in networks)
    if not count:
        return [None] * len(controls)
    stage, done = Stage("control", count, watch), 0

    def gone_through(followed: Followed) -> Iterator[np.ndarray]:
        nonlocal done
        for picture in followed.pictures():
            yield picture
            done += 1
            stage.done(done)

    return [_drawing(one, networks, gone_through) for one in controls]


def _drawing(
    followed: Followed, networks: dict[str, list[Path]], pictures: Callable[[Followed], Iterator[np.ndarray]]
) -> Drawn | None:
    if followed.control.kind == DEPTH:
        depth = DepthNetwork(*networks[DEPTH])
        depths = Depths([depth(picture) for picture in pictures(followed)])
        return lambda place, frame: depths.picture(place, frame.shape[1], frame.shape[0])
    if followed.control.kind == POSE:
        pose = PoseNetwork(*networks[POSE])
        poses = [pose(picture) for picture in pictures(followed)]
        return lambda place, frame: poses[place].picture()
    return None
