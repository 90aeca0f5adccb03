"""The scene of the self-test: a circle that moves over a plain background, drawn and described."""

from __future__ import annotations

import torch
from torch import Tensor

from kadr.shapes import Size

PROMPT = "a red circle moving right on a black background"
OTHER_PROMPT = "a blue square growing on a gray background"
REARRANGED_PROMPT = "a black circle moving right on a red background"
NO_PROMPT = ""
# Colours of circle and background, RGB in [0, 255]; the first pair is that of the prompt.
COLOURS = (
    ((215, 25, 35), (10, 10, 12)),
    ((40, 85, 245), (95, 95, 95)),
    ((245, 245, 245), (15, 20, 85)),
    ((250, 230, 45), (85, 48, 18)),
)
RADIUS, FIRST_X, LAST_X = 0.17, 0.35, 0.65  # radius over the shorter side; centre over the width


def draw_circle_clip(size: Size, frames: int, colours: tuple[tuple[int, ...], tuple[int, ...]] = COLOURS[0]) -> Tensor:
    """Draws a circle that moves right: pixels (1, 3, F, H, W) in [-1, 1], fp32, with edges a pixel wide."""
    circle, background = (torch.tensor(colour)[:, None, None] / 127.5 - 1 for colour in colours)
    side = min(size.width, size.height)
    y, x = torch.meshgrid(torch.arange(size.height) + 0.5, torch.arange(size.width) + 0.5, indexing="ij")
    images = []
    for frame in range(frames):
        centre = (FIRST_X + (LAST_X - FIRST_X) * frame / max(1, frames - 1)) * size.width
        distance = ((x - centre).square() + (y - size.height / 2).square()).sqrt()
        inside = (RADIUS * side - distance + 0.5).clamp(0, 1)
        images.append(background + (circle - background) * inside)
    return torch.stack(images, 1)[None]
