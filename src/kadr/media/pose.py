"""Where people's joints are, found by DWPose through rtmlib and drawn as OpenPose does: body, hands and face."""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from kadr.errors import MediaError
from kadr.media.control_maps import library

SIDE = 512  # the shorter side that skeletons are drawn at, of the released workflow: it decides how thick they are
SURE = 0.3  # people and joints that a network is less sure of are left out
PERSON = 0  # of the things that YOLOX knows
THICK, DIM = 4, 0.6  # half the width of a limb, and how bright it is
LIMBS = 17  # of a body; the links after those are of hands


@dataclass(frozen=True)
class Poses:
    """The people of one picture.

    Args:
        joints: (P, 134, 2) pixels right and down.
        scores: (P, 134) how sure the network is, 0 to 1.
        width, height: of the picture.
    """

    joints: np.ndarray
    scores: np.ndarray
    width: int
    height: int

    def picture(self) -> np.ndarray:
        """Their skeletons on black, uint8 (h, w, 3) RGB, the shorter side 512."""
        draw = library("rtmlib.visualization.draw", "pose").draw_openpose
        points, links = _palette()
        scale = SIDE / min(self.width, self.height)
        canvas = np.zeros((round(self.height * scale), round(self.width * scale), 3), np.uint8)
        for joints, scores in zip(self.joints * scale, self.scores, strict=True):
            canvas = draw(canvas, joints, scores, points, links, SURE, line_width=THICK)
        return canvas


class PoseNetwork:
    """Two networks: one finds people, the other their joints.

    Args:
        people, joints: paths of YOLOX (640x640) and of DWPose (288x384) in ONNX.

    Raises:
        RequestError: rtmlib is not installed.
        MediaError: a file is no such network.
    """

    def __init__(self, people: Path, joints: Path) -> None:
        rtmlib = library("rtmlib", "pose")
        try:
            with redirect_stdout(StringIO()):  # it tells what it loads, and stdout is for data
                self.things = rtmlib.YOLOX(
                    str(people), model_input_size=(640, 640), det_mode="multiclass", score_thr=SURE
                )
                self.joints = rtmlib.RTMPose(str(joints), model_input_size=(288, 384), to_openpose=True)
        except Exception as error:  # onnxruntime has a class of its own for every way to fail
            raise MediaError(f"{people} and {joints} cannot be read as networks for poses: {error}") from error

    def __call__(self, picture: np.ndarray) -> Poses:
        """The people in a picture, uint8 (H, W, 3) RGB."""
        height, width, _ = picture.shape
        swapped = np.ascontiguousarray(picture[..., ::-1])  # the library takes pictures as OpenCV reads them
        boxes, kinds = self.things(swapped)
        boxes = boxes[kinds == PERSON]
        if not len(boxes):  # or it would look for one person in all of the picture
            return Poses(np.zeros((0, 134, 2)), np.zeros((0, 134)), width, height)
        joints, scores = self.joints(swapped, bboxes=boxes)
        return Poses(joints, scores, width, height)


def _palette() -> tuple[dict[int, Any], dict[int, Any]]:
    """The library's joints and links in OpenPose's colours, RGB: it has those of joints the other way round, and draws
    limbs as bright as joints."""
    skeleton = library("rtmlib.visualization.skeleton", "pose").openpose134
    points = {i: {**point, "color": point["color"][::-1]} for i, point in skeleton["keypoint_info"].items()}
    links = {
        i: {**link, "color": [round(DIM * level) for level in link["color"]]} if i < LIMBS else link
        for i, link in skeleton["skeleton_info"].items()
    }
    return points, links
