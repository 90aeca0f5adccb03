"""Poses of people, estimated by DWPose through rtmlib and drawn as OpenPose does: body, hands and face."""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from kadr.cancellation import check_cancelled
from kadr.errors import MediaError
from kadr.media.control_maps import import_optional

# The shorter side that skeletons are drawn at, of the released workflow: it decides how thick they are.
CANVAS_SIDE = 512
SCORE_THRESHOLD = 0.3  # people and keypoints with a lower score are left out
PERSON_CLASS = 0  # among the classes of YOLOX
LINE_WIDTH, LIMB_BRIGHTNESS = 4, 0.6  # half the width of a limb, and its brightness
BODY_LIMBS = 17  # links of the body; the later ones are of hands


@dataclass(frozen=True)
class Poses:
    """The people of one image.

    Args:
        keypoints: (P, 134, 2) pixels right and down.
        scores: (P, 134) confidence of the network, 0 to 1.
        width, height: of the image.
    """

    keypoints: np.ndarray
    scores: np.ndarray
    width: int
    height: int

    def render(self) -> np.ndarray:
        """Draws the skeletons on black: uint8 (h, w, 3) RGB, the shorter side 512."""
        draw = import_optional("rtmlib.visualization.draw", "pose").draw_openpose
        points, links = _palette()
        scale = CANVAS_SIDE / min(self.width, self.height)
        canvas = np.zeros((round(self.height * scale), round(self.width * scale), 3), np.uint8)
        for keypoints, scores in zip(self.keypoints * scale, self.scores, strict=True):
            canvas = draw(canvas, keypoints, scores, points, links, SCORE_THRESHOLD, line_width=LINE_WIDTH)
        return canvas


class PoseEstimator:
    """Two networks: a detector of people, and an estimator of their keypoints.

    Args:
        detector_path, pose_path: paths of YOLOX (640x640) and of DWPose (288x384) in ONNX.

    Raises:
        RequestError: rtmlib is not installed.
        MediaError: a file is not such a network.
    """

    def __init__(self, detector_path: Path, pose_path: Path) -> None:
        rtmlib = import_optional("rtmlib", "pose")
        try:
            with redirect_stdout(StringIO()):  # it prints what it loads, and stdout is for data
                self.detector = rtmlib.YOLOX(
                    str(detector_path), model_input_size=(640, 640), det_mode="multiclass", score_thr=SCORE_THRESHOLD
                )
                self.pose_model = rtmlib.RTMPose(str(pose_path), model_input_size=(288, 384), to_openpose=True)
        except Exception as error:  # onnxruntime has its own exception class for every kind of failure
            raise MediaError(f"{detector_path} and {pose_path} cannot be read as pose networks: {error}") from error

    def __call__(self, image: np.ndarray) -> Poses:
        """Estimates the poses of the people in an image, uint8 (H, W, 3) RGB."""
        height, width, _ = image.shape
        bgr = np.ascontiguousarray(image[..., ::-1])  # the library takes images as OpenCV reads them
        check_cancelled()
        boxes, classes = self.detector(bgr)
        boxes = boxes[classes == PERSON_CLASS]
        if not len(boxes):  # or it would look for one person in the whole image
            return Poses(np.zeros((0, 134, 2)), np.zeros((0, 134)), width, height)
        check_cancelled()
        keypoints, scores = self.pose_model(bgr, bboxes=boxes)
        return Poses(keypoints, scores, width, height)


def _palette() -> tuple[dict[int, Any], dict[int, Any]]:
    """Returns the library's keypoints and links in OpenPose's colours, RGB.

    The library has the colours of keypoints in BGR order, and draws limbs as bright as keypoints.
    """
    skeleton = import_optional("rtmlib.visualization.skeleton", "pose").openpose134
    points = {i: {**point, "color": point["color"][::-1]} for i, point in skeleton["keypoint_info"].items()}
    links = {
        i: {**link, "color": [round(LIMB_BRIGHTNESS * value) for value in link["color"]]} if i < BODY_LIMBS else link
        for i, link in skeleton["skeleton_info"].items()
    }
    return points, links
