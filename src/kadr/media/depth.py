"""How near things are, guessed from single pictures by a network in ONNX such as Depth Anything V2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kadr.errors import MediaError
from kadr.media.control_maps import import_optional

INPUT_SIDE, PATCH_SIZE = 518, 14  # the side that the network was trained with, and that of its patches
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class DepthEstimator:
    """A network that takes pixel_values (1, 3, h, w) and gives one number a pixel, the larger the nearer.

    Sizes and scaling follow preprocessor_config.json of depth-anything/Depth-Anything-V2-Small-hf.

    Args:
        path: of its .onnx.

    Raises:
        RequestError: onnxruntime is not installed.
        MediaError: it is no such network.
    """

    def __init__(self, path: Path) -> None:
        runtime = import_optional("onnxruntime", "depth")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library has a class of its own for every way to fail
            raise MediaError(f"{path} cannot be read as a network for depth: {error}") from error
        self.path, self.input = path, self.session.get_inputs()[0]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) RGB -> float16 (h, w), at a size of the network's own.

        Raises:
            MediaError: the network gives something else.
        """
        given = Image.fromarray(image).resize(self._input_size(*image.shape[:2]), Image.Resampling.BICUBIC)
        mean, deviation = (np.asarray(numbers, np.float32) for numbers in (MEAN, STD))
        scaled = (np.asarray(given, np.float32) / 255 - mean) / deviation
        (made, *_) = self.session.run(None, {self.input.name: scaled.transpose(2, 0, 1)[None]})
        with np.errstate(over="ignore"):
            found = np.squeeze(made).astype(np.float16)
        if found.ndim != 2 or not np.isfinite(found).all():
            raise MediaError(f"{self.path} gives {made.shape}, not a finite number for every pixel. Fetch it again.")
        return found

    def _input_size(self, height: int, width: int) -> tuple[int, int]:
        """Width and height that a picture is given at: its aspect, in whole patches; or what the file fixes."""
        fixed = self.input.shape[2:]
        if all(isinstance(side, int) for side in fixed):
            return fixed[1], fixed[0]
        scale = min((INPUT_SIDE / height, INPUT_SIDE / width), key=lambda scale: abs(1 - scale))
        down, across = (max(PATCH_SIZE, round(side * scale / PATCH_SIZE) * PATCH_SIZE) for side in (height, width))
        return across, down


class DepthMaps:
    """What a network found in the frames of one clip, as pictures: black is the farthest in it, white the nearest.

    Args:
        maps: float16 (h, w) for each frame.
    """

    def __init__(self, maps: Sequence[np.ndarray]) -> None:
        self.maps = maps
        self.minimum = min(float(one.min()) for one in maps)
        self.value_range = max(float(one.max()) for one in maps) - self.minimum

    def render(self, frame_index: int, width: int, height: int) -> np.ndarray:
        """The `frame_index`-th frame, uint8 (height, width, 3)."""
        unit = (self.maps[frame_index].astype(np.float32) - self.minimum) / (self.value_range or 1.0)
        grey = Image.fromarray(unit).resize((width, height), Image.Resampling.BILINEAR)
        levels = np.asarray(grey) * 255
        return np.repeat(levels.round().astype(np.uint8)[..., None], 3, axis=2)
