"""Networks that find the depth or the poses a control shows: fetched, and run over its frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kadr.checkpoints import hub
from kadr.errors import CheckpointError
from kadr.media.depth import DepthEstimator, DepthMaps
from kadr.media.pose import PoseEstimator
from kadr.pipeline.progress import StageProgress, Watch
from kadr.request.inputs import DEPTH, POSE
from kadr.request.resolved_controls import ResolvedControl

NETWORK_FILES = {  # repository and files on the hub
    DEPTH: ("onnx-community/depth-anything-v2-small", ("onnx/model.onnx",)),
    POSE: ("yzd-v/DWPose", ("yolox_l.onnx", "dw-ll_ucoco_384.onnx")),
}


MapRenderer = Callable[[int, np.ndarray], np.ndarray]  # place and frame -> the picture of it, uint8 (H, W, 3)


def fetch_networks(controls: Sequence[ResolvedControl]) -> dict[str, list[Path]]:
    """The networks that find what kinds of control show, brought to this machine.

    Raises:
        CheckpointError: one cannot be fetched.
    """
    kinds = {one.control.kind for one in controls} & NETWORK_FILES.keys()
    try:
        return {
            kind: [hub.fetch(NETWORK_FILES[kind][0], file) for file in NETWORK_FILES[kind][1]] for kind in sorted(kinds)
        }
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} A clip that shows the {' or '.join(sorted(kinds))} already needs none of this: give it with no "
            "kind in front of its path."
        ) from error


def build_map_renderers(
    controls: Sequence[ResolvedControl], networks: dict[str, list[Path]], watch: Watch
) -> list[MapRenderer | None]:
    """For each control what draws its frames, once a network has gone through all of them; None where none has to."""
    count = sum(len(one.frames) for one in controls if one.control.kind in networks)
    if not count:
        return [None] * len(controls)
    stage, done = StageProgress("control", count, watch), 0

    def gone_through(followed: ResolvedControl) -> Iterator[np.ndarray]:
        nonlocal done
        for picture in followed.read_frames():
            yield picture
            done += 1
            stage.report(done)

    return [_build_map_renderer(one, networks, gone_through) for one in controls]


def _build_map_renderer(
    control: ResolvedControl,
    networks: dict[str, list[Path]],
    read_frames: Callable[[ResolvedControl], Iterator[np.ndarray]],
) -> MapRenderer | None:
    if control.control.kind == DEPTH:
        depth = DepthEstimator(*networks[DEPTH])
        depths = DepthMaps([depth(picture) for picture in read_frames(control)])
        return lambda place, frame: depths.render(place, frame.shape[1], frame.shape[0])
    if control.control.kind == POSE:
        pose = PoseEstimator(*networks[POSE])
        poses = [pose(picture) for picture in read_frames(control)]
        return lambda place, frame: poses[place].render()
    return None
