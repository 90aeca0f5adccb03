"""The output of a pipeline, in the form that a script asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kadr.errors import RequestError
from kadr.quoting import quote

LATENT = "latent"
OUTPUT_TYPES = ("pil", "np", "pt", LATENT)


@dataclass
class LTXPipelineOutput:
    """Videos of a pipeline.

    Args:
        frames: by output type: "pil" a list of Pillow images for each video; "np" float32 (B, F, H, W, 3) and "pt"
            float32 (B, F, 3, H, W), in [0, 1]; "latent" the normalised latents.
    """

    frames: Any

    def __iter__(self) -> Iterator[str]:
        return iter(("frames",))

    def __getitem__(self, key: int | str) -> Any:
        if key in (0, "frames"):
            return self.frames
        raise KeyError(key)


def check_output_type(output_type: Any) -> None:
    """Refuses an unknown output type.

    Raises:
        RequestError: it is not one of `OUTPUT_TYPES`.
    """
    if output_type not in OUTPUT_TYPES:
        raise RequestError(f"output_type is {quote(output_type)}; it must be one of {', '.join(OUTPUT_TYPES)}.")


def format_videos(videos: Sequence[Tensor], output_type: str) -> Any:
    """Returns videos, each float32 (F, H, W, 3) in [0, 1], in an output type; see `LTXPipelineOutput`."""
    if output_type == "pil":
        # Rounded, as diffusers does; kadr's own frames are truncated, as in the official package.
        return [[Image.fromarray(frame) for frame in _to_uint8(video)] for video in videos]
    batch = torch.stack(list(videos))
    return batch.numpy() if output_type == "np" else batch.permute(0, 1, 4, 2, 3).contiguous()


def _to_uint8(video: Tensor) -> np.ndarray:
    return (video.numpy() * 255).round().astype(np.uint8)
