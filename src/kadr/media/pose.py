"""Where people's joints are, found by DWPose through rtmlib and drawn as OpenPose does: body, hands and face."""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from kadr.errors import MediaError
from kadr.media.control_maps import import_optional

CANVAS_SIDE = (
    512  # the shorter side that skeletons are drawn at, of the released workflow: it decides how thick they are
)
SCORE_THRESHOLD = 0.3  # people and joints that a network is less sure of are left out
PERSON_CLASS = 0  # of the things that YOLOX knows
LINE_WIDTH, LIMB_BRIGHTNESS = 4, 0.6  # half the width of a limb, and how bright it is
BODY_LIMBS = 17  # of a body; the links after those are of hands


@dataclass(frozen=True)
class Poses:
    """The people of one picture.

    Args:
        keypoints: (P, 134, 2) pixels right and down.
        scores: (P, 134) how sure the network is, 0 to 1.
        width, height: of the picture.
    """

    keypoints: np.ndarray
    scores: np.ndarray
    width: int
    height: int

    def render(self) -> np.ndarray:
        """Their skeletons on black, uint8 (h, w, 3) RGB, the shorter side 512."""
        draw = import_optional("rtmlib.visualization.draw", "pose").draw_openpose
        points, links = _palette()
        scale = CANVAS_SIDE / min(self.width, self.height)
        canvas = np.zeros((round(self.height * scale), round(self.width * scale), 3), np.uint8)
        for joints, scores in zip(self.keypoints * scale, self.scores, strict=True):
            canvas = draw(canvas, joints, scores, points, links, SCORE_THRESHOLD, line_width=LINE_WIDTH)
        return canvas


class PoseEstimator:
    """Two networks: one finds people, the other their joints.

    Args:
        detector_path, pose_path: paths of YOLOX (640x640) and of DWPose (288x384) in ONNX.

    Raises:
        RequestError: rtmlib is not installed.
        MediaError: a file is no such network.
    """

    def __init__(self, detector_path: Path, pose_path: Path) -> None:
        rtmlib = import_optional("rtmlib", "pose")
        try:
            with redirect_stdout(StringIO()):  # it tells what it loads, and stdout is for data
                self.detector = rtmlib.YOLOX(
                    str(detector_path), model_input_size=(640, 640), det_mode="multiclass", score_thr=SCORE_THRESHOLD
                )
                self.pose_model = rtmlib.RTMPose(str(pose_path), model_input_size=(288, 384), to_openpose=True)
        except Exception as error:  # onnxruntime has a class of its own for every way to fail
            raise MediaError(
                f"{detector_path} and {pose_path} cannot be read as networks for poses: {error}"
            ) from error

    def __call__(self, image: np.ndarray) -> Poses:
        """The people in a picture, uint8 (H, W, 3) RGB."""
        height, width, _ = image.shape
        swapped = np.ascontiguousarray(image[..., ::-1])  # the library takes pictures as OpenCV reads them
        boxes, kinds = self.detector(swapped)
        boxes = boxes[kinds == PERSON_CLASS]
        if not len(boxes):  # or it would look for one person in all of the picture
            return Poses(np.zeros((0, 134, 2)), np.zeros((0, 134)), width, height)
        joints, scores = self.pose_model(swapped, bboxes=boxes)
        return Poses(joints, scores, width, height)


def _palette() -> tuple[dict[int, Any], dict[int, Any]]:
    """The library's joints and links in OpenPose's colours, RGB: it has those of joints the other way round, and draws
    limbs as bright as joints."""
    skeleton = import_optional("rtmlib.visualization.skeleton", "pose").openpose134
    points = {i: {**point, "color": point["color"][::-1]} for i, point in skeleton["keypoint_info"].items()}
    links = {
        i: {**link, "color": [round(LIMB_BRIGHTNESS * level) for level in link["color"]]} if i < BODY_LIMBS else link
        for i, link in skeleton["skeleton_info"].items()
    }
    return points, links
