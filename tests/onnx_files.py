"""ONNX networks small enough to write in a test: one for depth, and two for poses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ANCHORS, CLASSES = 8400, 80  # of YOLOX at 640x640
JOINTS, POSE_WIDTH, POSE_HEIGHT = 133, 288, 384  # of DWPose, and the size of its input
OPSET = 17


def write_depth_model(path: Path, *, fixed_side: int | None = None, scale: float = 1.0) -> Path:
    """Writes a depth network that takes red for near.

    Args:
        fixed_side: fixed input side in pixels; None allows any size.
        scale: factor of its output.
    """
    sides = ["h", "w"] if fixed_side is None else [fixed_side, fixed_side]
    nodes = [
        helper.make_node("Gather", ["pixel_values", "red"], ["red_channel"], axis=1),
        helper.make_node("Mul", ["red_channel", "scale"], ["predicted_depth"]),
    ]
    constants = {"red": np.array(0), "scale": np.array(scale, np.float32)}
    return _write_model(path, nodes, constants, ["pixel_values", 1, 3, *sides], [["predicted_depth", 1, *sides]])


def write_person_detector(path: Path, boxes: list[tuple[float, float, float, float, int]]) -> Path:
    """Writes a network that detects the same boxes in every image: left, top, right, bottom of 640x640, and class."""
    detections = np.zeros((1, ANCHORS, 5 + CLASSES), np.float32)
    for anchor, (left, top, right, bottom, class_index) in enumerate(boxes):
        column, row = anchor % 80, anchor // 80  # the first anchors are 8 pixels apart, 80 in a row
        center = (left + right) / 16 - column, (top + bottom) / 16 - row
        detections[0, anchor, :5] = *center, math.log((right - left) / 8), math.log((bottom - top) / 8), 1
        detections[0, anchor, 5 + class_index] = 1
    return _write_constant(path, [("output", detections)], 640, 640)


def write_pose_model(path: Path, joint_positions: dict[int, tuple[float, float]]) -> Path:
    """Writes a network that finds joints, by COCO's indices, at the same positions of every person, in 288x384."""
    simcc_x = np.zeros((1, JOINTS, 2 * POSE_WIDTH), np.float32)
    simcc_y = np.zeros((1, JOINTS, 2 * POSE_HEIGHT), np.float32)
    for joint, (x, y) in joint_positions.items():
        simcc_x[0, joint, round(2 * x)] = simcc_y[0, joint, round(2 * y)] = 0.9
    return _write_constant(path, [("simcc_x", simcc_x), ("simcc_y", simcc_y)], POSE_WIDTH, POSE_HEIGHT)


def _write_constant(path: Path, outputs: list[tuple[str, np.ndarray]], width: int, height: int) -> Path:
    """Writes a network with constant outputs."""
    nodes = [helper.make_node("ReduceSum", ["input", "axes"], ["sum"], keepdims=0)]
    nodes.append(helper.make_node("Mul", ["sum", "zero_factor"], ["zero"]))
    constants = {"axes": np.arange(4), "zero_factor": np.array(0, np.float32)}
    for name, array in outputs:
        nodes.append(helper.make_node("Add", [f"constant {name}", "zero"], [name]))
        constants[f"constant {name}"] = array
    shapes = [[name, *array.shape] for name, array in outputs]
    return _write_model(path, nodes, constants, ["input", 1, 3, height, width], shapes)


def _write_model(
    path: Path, nodes: list, constants: dict[str, np.ndarray], input_shape: list, output_shapes: list[list]
) -> Path:
    def info(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    outputs = [info(*output_shape) for output_shape in output_shapes]
    graph = helper.make_graph(nodes, "network", [info(*input_shape)], outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
