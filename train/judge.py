"""What a clip of the demo world shows, measured: no learning, so that the verdict on a model cannot be learned either.

The background is the colour of the border, the ink is the colour that differs most from it, and everything else follows
from how much ink each pixel holds. The measures average over many pixels and frames, so the blur and the noise of a
small VAE do not disturb them.
"""

import math
from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import torch

from train.scenes import (
    BACKGROUNDS,
    COLOURS,
    RING_HOLE,
    SCENE_SIDE,
    SHAPES,
    SQUARE_SIDE,
    TRIANGLE_EXTENT,
    signed_distance,
)

SAMPLED_FRAMES = 13  # frames, evenly spaced: more would cost time and tell nothing new
MAX_BACKGROUND_SPREAD = 30.0  # usual distance of the border's pixels from their middle colour, in RGB of 0 to 255
MIN_INK_DISTANCE = 45.0  # distance from the background, in RGB of 0 to 255; the closest true pair is 100 apart
MAX_COLOUR_DISTANCE, MAX_BACKGROUND_DISTANCE = 35.0, 25.0  # in CIELAB units; beyond, a colour has no name here
MIN_BLOB_AREA = 60.0  # area in pixels of the stage; the smallest true shape has 240
MIN_PRESENCE = 0.6  # share of the frames that must show the shape
MIN_TRAVEL = 8.0  # displacement in pixels of the stage that counts as moving
MIN_GROWTH = 1.2  # ratio of sizes that counts as growing
MIN_OVERLAP = 0.65  # overlap with the best template below which a blob has no name
TEMPLATE_FRAMES = 7  # frames that are compared with templates

UNIT_AREA = {  # area of a shape of radius 1
    "circle": math.pi,
    "square": (2 * SQUARE_SIDE) ** 2,
    "triangle": TRIANGLE_EXTENT**2 * math.sqrt(27) / 4,
    "ring": math.pi * (1 - RING_HOLE**2),
}


class Verdict(NamedTuple):
    """What was seen; None where it has no name. In the order of `shapes.Key`, so that the two compare."""

    colour: str | None
    shape: str | None
    background: str | None
    motion: str | None


class Blob(NamedTuple):
    """The shape in one frame. Pixels of the picture."""

    frame: int
    x: float
    y: float
    area: float
    bounds: tuple[slice, slice]  # rows and columns that hold it


def name_scene(frames: np.ndarray) -> Verdict:
    """Name what a clip shows. frames: uint8 (F, H, W, 3), RGB, F at least 17 to tell growth."""
    scale = min(frames.shape[1:3]) / SCENE_SIDE
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), SAMPLED_FRAMES)).round().astype(int)
    pixels = smooth(frames[chosen].astype(np.float32))
    border = border_pixels(pixels, width=max(1, round(4 * scale)))
    paper = np.median(border, axis=0)
    if np.median(np.linalg.norm(border - paper, axis=-1)) > MAX_BACKGROUND_SPREAD:
        return Verdict(None, None, None, None)
    background = _nearest_colour(paper, BACKGROUNDS, MAX_BACKGROUND_DISTANCE)
    distance = np.linalg.norm(pixels - paper, axis=-1)
    strongest = np.percentile(distance, 99.5)
    if strongest < MIN_INK_DISTANCE:
        return Verdict(None, None, background, None)
    ink = np.median(pixels[distance > 0.8 * strongest], axis=0)
    coverage = distance / np.linalg.norm(ink - paper)
    coverage = np.clip((coverage - 0.15) / 0.7, 0, 1)  # leaves noise out at both ends
    found = map(_find_blob, range(len(coverage)), coverage)
    blobs = [blob for blob in found if blob and blob.area > MIN_BLOB_AREA * scale**2]
    colour = _nearest_colour(ink, COLOURS, MAX_COLOUR_DISTANCE)
    if len(blobs) < MIN_PRESENCE * len(chosen):
        return Verdict(colour, None, background, None)
    return Verdict(colour, _shape(blobs, coverage), background, _motion(blobs, scale))


def track_shape(frames: np.ndarray) -> np.ndarray:
    """Where the shape is in every frame: float64 (F, 3), x, y and radius of a disc of its area, in pixels of the stage.

    NaN where no shape is seen. frames: uint8 (F, H, W, 3).
    """
    scale = min(frames.shape[1:3]) / SCENE_SIDE
    pixels = smooth(frames.astype(np.float32))
    paper = np.median(border_pixels(pixels, width=max(1, round(4 * scale))), axis=0)
    distance = np.linalg.norm(pixels - paper, axis=-1)
    strongest = np.percentile(distance, 99.5)
    places = np.full((len(frames), 3), np.nan)
    if strongest < MIN_INK_DISTANCE:
        return places
    ink = np.median(pixels[distance > 0.8 * strongest], axis=0)
    coverage = np.clip((distance / np.linalg.norm(ink - paper) - 0.15) / 0.7, 0, 1)
    for frame, blob in enumerate(map(_find_blob, range(len(coverage)), coverage)):
        if blob and blob.area > MIN_BLOB_AREA * scale**2:
            places[frame] = blob.x / scale, blob.y / scale, math.sqrt(blob.area / math.pi) / scale
    return places


def smooth(pixels: np.ndarray) -> np.ndarray:
    """Mean over 3 x 3 pixels: takes two thirds of the noise away. float32 (F, H, W, 3)."""
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9


# Colour


def border_pixels(pixels: np.ndarray, width: int) -> np.ndarray:
    """The pixels along the edge of the picture, of all frames. (N, 3)"""
    across = np.concatenate((pixels[:, :width], pixels[:, -width:]), axis=1)
    along = np.concatenate((pixels[:, :, :width], pixels[:, :, -width:]), axis=2)
    return np.concatenate((across.reshape(-1, 3), along.reshape(-1, 3)))


def _nearest_colour(colour: np.ndarray, names: dict[str, tuple[int, int, int]], limit: float) -> str | None:
    """The name of the colour that looks most alike, unless even that one is far off."""
    distances = np.linalg.norm(_lab(np.array(list(names.values()))) - _lab(colour), axis=-1)
    return list(names)[distances.argmin()] if distances.min() < limit else None


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB from 0 to 255. (..., 3): equal distances look about equally different."""
    rgb = rgb / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = np.array(((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)))
    ratio = linear @ to_xyz.T / to_xyz.sum(1)
    x, y, z = np.moveaxis(np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29), -1, 0)
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -1)


# Place


def _find_blob(frame: int, coverage: np.ndarray) -> Blob | None:
    """The largest connected piece of ink in one frame. coverage (H, W) in [0, 1]."""
    window = _largest_component(coverage > 0.5)
    if window is None:
        return None
    weights = coverage[window]
    area = float(weights.sum())
    rows, columns = (np.arange(part.start, part.stop) + 0.5 for part in window)
    return Blob(frame, float(weights.sum(0) @ columns) / area, float(weights.sum(1) @ rows) / area, area, window)


def _largest_component(mask: np.ndarray) -> tuple[slice, slice] | None:
    """The rows and columns of the largest connected piece, and two more all around for its soft edge. mask bool (H, W).

    Pieces are built from the horizontal runs of each row: a run joins every piece that it touches in the row above.
    """
    framed = np.pad(mask, ((0, 0), (1, 1)))
    rows, columns = (index.tolist() for index in np.nonzero(framed[:, 1:] != framed[:, :-1]))
    pieces: list[list[tuple[int, int, int]]] = []  # runs (row, start, stop) from the top down
    for row, start, stop in zip(rows[::2], columns[::2], columns[1::2], strict=True):
        joined, apart = [(row, start, stop)], []
        for piece in pieces:
            lowest = piece[bisect_left(piece, (row - 1,)) :]
            if any(a < stop and start < b for _, a, b in lowest):
                joined = sorted(piece + joined)
            else:
                apart.append(piece)
        pieces = [*apart, joined]
    if not pieces:
        return None
    largest = max(pieces, key=lambda piece: sum(stop - start for _, start, stop in piece))
    rows, starts, stops = zip(*largest, strict=True)
    height, width = mask.shape
    return (
        slice(max(0, min(rows) - 2), min(height, max(rows) + 3)),
        slice(max(0, min(starts) - 2), min(width, max(stops) + 2)),
    )


# Shape and motion


def _shape(blobs: list[Blob], coverage: np.ndarray) -> str | None:
    """The shape whose outline fits best, over the frames in which it is largest. coverage (F, H, W)."""
    largest = sorted(blobs, key=lambda blob: blob.area)[-TEMPLATE_FRAMES:]
    likeness = {shape: np.mean([_template_overlap(shape, blob, coverage) for blob in largest]) for shape in SHAPES}
    best = max(likeness, key=likeness.__getitem__)
    return best if likeness[best] > MIN_OVERLAP else None


def _template_overlap(shape: str, blob: Blob, coverage: np.ndarray) -> float:
    """Overlap of a blob with a shape of its place and area: intersection over union of soft masks, from 0 to 1."""
    height, width = coverage.shape[1:]
    x = torch.arange(width).view(1, 1, -1) + 0.5 - blob.x
    y = torch.arange(height).view(1, -1, 1) + 0.5 - blob.y
    radius = torch.tensor(math.sqrt(blob.area / UNIT_AREA[shape])).view(1, 1, 1)
    template = (0.5 - signed_distance(shape, x, y, radius)).clamp(0, 1)[0].numpy()
    seen = np.zeros_like(template)
    seen[blob.bounds] = coverage[blob.frame][blob.bounds]
    return float(np.minimum(seen, template).sum() / np.maximum(seen, template).sum())


def _motion(blobs: list[Blob], scale: float) -> str:
    """From straight lines through the places and sizes of all frames. Travel wins over growth."""
    time = np.array([blob.frame for blob in blobs])
    across, along, size = (
        np.polynomial.Polynomial.fit(time, values, 1)(time[[0, -1]])
        for values in ([blob.x for blob in blobs], [blob.y for blob in blobs], [math.sqrt(blob.area) for blob in blobs])
    )
    dx, dy, ratio = across[1] - across[0], along[1] - along[0], size[1] / size[0]
    if max(abs(dx), abs(dy)) > MIN_TRAVEL * scale:
        if abs(dx) > abs(dy):
            return "moving right" if dx > 0 else "moving left"
        return "moving down" if dy > 0 else "moving up"
    if ratio > MIN_GROWTH:
        return "growing"
    return "shrinking" if ratio < 1 / MIN_GROWTH else "standing still"
