"""Depth maps of images, estimated by an ONNX network such as Depth Anything V2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kadr.cancellation import check_cancelled
from kadr.errors import MediaError
from kadr.media.control_maps import import_optional

INPUT_SIDE, PATCH_SIZE = 518, 14  # sides of the images and patches that the network was trained with
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class DepthEstimator:
    """A network from pixel_values (1, 3, h, w) to one number per pixel, larger where nearer.

    Sizes and scaling follow preprocessor_config.json of depth-anything/Depth-Anything-V2-Small-hf.

    Args:
        path: of its .onnx.

    Raises:
        RequestError: onnxruntime is not installed.
        MediaError: the file is not such a network.
    """

    def __init__(self, path: Path) -> None:
        runtime = import_optional("onnxruntime", "depth")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library has its own exception class for every kind of failure
            raise MediaError(f"{path} cannot be read as a depth network: {error}") from error
        self.path, self.input = path, self.session.get_inputs()[0]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Estimates the depth of an image: uint8 (H, W, 3) RGB -> float16 (h, w), at the network's own size.

        Raises:
            MediaError: the network's output has another shape, or is not finite.
        """
        check_cancelled()
        resized = Image.fromarray(image).resize(self._input_size(*image.shape[:2]), Image.Resampling.BICUBIC)
        mean, std = (np.asarray(values, np.float32) for values in (MEAN, STD))
        scaled = (np.asarray(resized, np.float32) / 255 - mean) / std
        (output, *_) = self.session.run(None, {self.input.name: scaled.transpose(2, 0, 1)[None]})
        with np.errstate(over="ignore"):
            depth = np.squeeze(output).astype(np.float16)
        if depth.ndim != 2 or not np.isfinite(depth).all():
            raise MediaError(f"{self.path} gives {output.shape}, not a finite number for every pixel. Fetch it again.")
        return depth

    def _input_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the width and height of the network's input: the image's aspect, in whole patches, unless fixed."""
        fixed = self.input.shape[2:]
        if all(isinstance(side, int) for side in fixed):
            return fixed[1], fixed[0]
        scale = min((INPUT_SIDE / height, INPUT_SIDE / width), key=lambda scale: abs(1 - scale))
        down, across = (max(PATCH_SIZE, round(side * scale / PATCH_SIZE) * PATCH_SIZE) for side in (height, width))
        return across, down


class DepthMaps:
    """Depth maps of the frames of one clip, as images: black is the farthest point of the clip, white the nearest.

    Args:
        maps: float16 (h, w) for each frame.
    """

    def __init__(self, maps: Sequence[np.ndarray]) -> None:
        self.maps = maps
        self.minimum = min(float(depth.min()) for depth in maps)
        self.value_range = max(float(depth.max()) for depth in maps) - self.minimum

    def render(self, frame_index: int, width: int, height: int) -> np.ndarray:
        """Returns the map of a frame as an image, uint8 (height, width, 3)."""
        unit = (self.maps[frame_index].astype(np.float32) - self.minimum) / (self.value_range or 1.0)
        resized = Image.fromarray(unit).resize((width, height), Image.Resampling.BILINEAR)
        grey = np.asarray(resized) * 255
        return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)
