"""Networks that estimate depth or poses for control maps: fetched from the hub and run over a control's frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kadr.checkpoints import hub
from kadr.errors import CheckpointError
from kadr.media.depth import DepthEstimator, DepthMaps
from kadr.media.image import load_image
from kadr.media.pose import PoseEstimator
from kadr.pipeline.progress import StageProgress, Watch
from kadr.pipeline.stages.prepared_frames import Frames
from kadr.request.inputs import DEPTH, POSE
from kadr.request.resolved_controls import ResolvedControl

NETWORK_FILES = {  # repository and files on the hub
    DEPTH: ("onnx-community/depth-anything-v2-small", ("onnx/model.onnx",)),
    POSE: ("yzd-v/DWPose", ("yolox_l.onnx", "dw-ll_ucoco_384.onnx")),
}
NETWORK_FILE_BYTES = {"onnx/model.onnx": 99_000_000, "yolox_l.onnx": 217_000_000, "dw-ll_ucoco_384.onnx": 134_000_000}

MapRenderer = Callable[[int, np.ndarray], np.ndarray]  # frame index and frame -> its control map, uint8 (H, W, 3)


def networks_to_fetch(controls: Sequence[ResolvedControl]) -> list[tuple[str, int]]:
    """Returns the files that the networks of the controls' kinds need and that are not on disk.

    Each as repository/file and its bytes.
    """
    return [
        (f"{repository}/{file}", NETWORK_FILE_BYTES[file])
        for kind in sorted({control.control.kind for control in controls} & NETWORK_FILES.keys())
        for repository, file in ((NETWORK_FILES[kind][0], file) for file in NETWORK_FILES[kind][1])
        if hub.cached_file(repository, file) is None
    ]


def fetch_networks(controls: Sequence[ResolvedControl]) -> dict[str, list[Path]]:
    """Fetches the networks that the controls' kinds need, and returns their files by kind.

    Raises:
        CheckpointError: a file cannot be fetched.
    """
    kinds = {control.control.kind for control in controls} & NETWORK_FILES.keys()
    try:
        return {
            kind: [hub.fetch(NETWORK_FILES[kind][0], file) for file in NETWORK_FILES[kind][1]] for kind in sorted(kinds)
        }
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} A clip that already shows the {' or '.join(sorted(kinds))} needs no network: give it with no "
            "kind in front of its path."
        ) from error


def build_map_renderers(
    controls: Sequence[ResolvedControl], frames: Sequence[Frames], networks: dict[str, list[Path]], watch: Watch
) -> list[MapRenderer | None]:
    """Runs the networks over all frames; returns a map renderer for each control, None if it needs no network.

    Args:
        frames: of each control.
    """
    kinds = [control.control.kind for control in controls]
    count = sum(len(item) for kind, item in zip(kinds, frames, strict=True) if kind in networks)
    if not count:
        return [None] * len(controls)
    progress, done = StageProgress("control", count, watch), 0

    def read(item: Frames) -> Iterator[np.ndarray]:
        nonlocal done
        for frame in item:
            yield frame if isinstance(frame, np.ndarray) else np.asarray(load_image(frame))
            done += 1
            progress.report(done)

    return [_build_map_renderer(kind, networks, read(item)) for kind, item in zip(kinds, frames, strict=True)]


def _build_map_renderer(kind: str, networks: dict[str, list[Path]], frames: Iterator[np.ndarray]) -> MapRenderer | None:
    if kind == DEPTH:
        estimate_depth = DepthEstimator(*networks[DEPTH])
        depth_maps = DepthMaps([estimate_depth(frame) for frame in frames])
        return lambda frame_index, frame: depth_maps.render(frame_index, frame.shape[1], frame.shape[0])
    if kind == POSE:
        estimate_poses = PoseEstimator(*networks[POSE])
        poses = [estimate_poses(frame) for frame in frames]
        return lambda frame_index, frame: poses[frame_index].render()
    return None
