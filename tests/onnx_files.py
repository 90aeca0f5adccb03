"""Networks in ONNX that are small enough to write in a test: one for depth, and two for poses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ANCHORS, CLASSES = 8400, 80  # of YOLOX at 640x640
JOINTS, POSE_WIDTH, POSE_HEIGHT = 133, 288, 384  # of DWPose, and the size it is given people at
OPSET = 17


def write_depth_model(path: Path, *, fixed_side: int | None = None, scale: float = 1.0) -> Path:
    """A network for depth that takes whatever is red for near.

    Args:
        fixed_side: that its file fixes; None: any.
        scale: of its answer.
    """
    sides = ["h", "w"] if fixed_side is None else [fixed_side, fixed_side]
    nodes = [
        helper.make_node("Gather", ["pixel_values", "red"], ["one"], axis=1),
        helper.make_node("Mul", ["one", "scale"], ["predicted_depth"]),
    ]
    constants = {"red": np.array(0), "scale": np.array(scale, np.float32)}
    return _write_model(path, nodes, constants, ["pixel_values", 1, 3, *sides], [["predicted_depth", 1, *sides]])


def write_person_detector(path: Path, boxes: list[tuple[float, float, float, float, int]]) -> Path:
    """A network that finds the same things in every picture: (left, top, right, bottom) of 640x640, and which thing."""
    found = np.zeros((1, ANCHORS, 5 + CLASSES), np.float32)
    for anchor, (left, top, right, bottom, thing) in enumerate(boxes):
        column, row = anchor % 80, anchor // 80  # the first anchors lie 8 pixels apart, 80 in a row
        middle = (left + right) / 16 - column, (top + bottom) / 16 - row
        found[0, anchor, :5] = *middle, math.log((right - left) / 8), math.log((bottom - top) / 8), 1
        found[0, anchor, 5 + thing] = 1
    return _write_constant(path, [("output", found)], 640, 640)


def write_pose_model(path: Path, joint_positions: dict[int, tuple[float, float]]) -> Path:
    """A network that finds some joints, by COCO's numbers, at the same places of every person: pixels of 288x384."""
    across, down = np.zeros((1, JOINTS, 2 * POSE_WIDTH), np.float32), np.zeros((1, JOINTS, 2 * POSE_HEIGHT), np.float32)
    for joint, (x, y) in joint_positions.items():
        across[0, joint, round(2 * x)] = down[0, joint, round(2 * y)] = 0.9
    return _write_constant(path, [("simcc_x", across), ("simcc_y", down)], POSE_WIDTH, POSE_HEIGHT)


def _write_constant(path: Path, outputs: list[tuple[str, np.ndarray]], width: int, height: int) -> Path:
    """A network that gives the same numbers for whatever it is shown."""
    nodes = [helper.make_node("ReduceSum", ["input", "axes"], ["sum"], keepdims=0)]
    nodes.append(helper.make_node("Mul", ["sum", "nothing"], ["zero"]))
    constants = {"axes": np.arange(4), "nothing": np.array(0, np.float32)}
    for name, array in outputs:
        nodes.append(helper.make_node("Add", [f"of {name}", "zero"], [name]))
        constants[f"of {name}"] = array
    shapes = [[name, *array.shape] for name, array in outputs]
    return _write_model(path, nodes, constants, ["input", 1, 3, height, width], shapes)


def _write_model(
    path: Path, nodes: list, constants: dict[str, np.ndarray], input_shape: list, output_shapes: list[list]
) -> Path:
    def info(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "network", [info(*input_shape)], [info(*one) for one in output_shapes], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
