"""Measures what a clip of the demo scenes shows, by fixed rules: nothing here is learned.

The background is the colour of the border, the ink is the colour that differs most from it, and everything else follows
from the coverage of each pixel by ink. The measures average over many pixels and frames, so the blur and the noise of a
small VAE do not affect them.
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

SAMPLED_FRAMES = 13  # evenly spaced; more would cost time and change nothing
MAX_BACKGROUND_SPREAD = 30.0  # median distance of the border's pixels from their median colour, in RGB of 0 to 255
MIN_INK_DISTANCE = 45.0  # distance from the background, in RGB of 0 to 255; the closest true pair is 100 apart
MAX_COLOUR_DISTANCE, MAX_BACKGROUND_DISTANCE = 35.0, 25.0  # in CIELAB units; a colour farther from all names has none
MIN_BLOB_AREA = 60.0  # area in scene pixels; the smallest true shape has 240
MIN_PRESENCE = 0.6  # share of the frames that must show the shape
MIN_TRAVEL = 8.0  # displacement in scene pixels that counts as moving
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
    """The scene that a clip shows, in the order of `scenes.SceneKey`, so that the two compare; None if unnamed."""

    colour: str | None
    shape: str | None
    background: str | None
    motion: str | None


class Blob(NamedTuple):
    """The shape in one frame, in pixels of the frame."""

    frame: int
    x: float
    y: float
    area: float
    bounds: tuple[slice, slice]  # its rows and columns


def name_scene(frames: np.ndarray) -> Verdict:
    """Names what a clip shows. frames: uint8 (F, H, W, 3), RGB, F at least 17 to tell growth."""
    scale = min(frames.shape[1:3]) / SCENE_SIDE
    sampled = np.linspace(0, len(frames) - 1, min(len(frames), SAMPLED_FRAMES)).round().astype(int)
    pixels = smooth(frames[sampled].astype(np.float32))
    border = border_pixels(pixels, width=max(1, round(4 * scale)))
    background_rgb = np.median(border, axis=0)
    if np.median(np.linalg.norm(border - background_rgb, axis=-1)) > MAX_BACKGROUND_SPREAD:
        return Verdict(None, None, None, None)
    background = _nearest_colour(background_rgb, BACKGROUNDS, MAX_BACKGROUND_DISTANCE)
    distance = np.linalg.norm(pixels - background_rgb, axis=-1)
    strongest = np.percentile(distance, 99.5)
    if strongest < MIN_INK_DISTANCE:
        return Verdict(None, None, background, None)
    ink_rgb = np.median(pixels[distance > 0.8 * strongest], axis=0)
    coverage = distance / np.linalg.norm(ink_rgb - background_rgb)
    coverage = np.clip((coverage - 0.15) / 0.7, 0, 1)  # removes noise at both ends
    frame_blobs = map(_find_blob, range(len(coverage)), coverage)
    blobs = [blob for blob in frame_blobs if blob and blob.area > MIN_BLOB_AREA * scale**2]
    colour = _nearest_colour(ink_rgb, COLOURS, MAX_COLOUR_DISTANCE)
    if len(blobs) < MIN_PRESENCE * len(sampled):
        return Verdict(colour, None, background, None)
    return Verdict(colour, _shape(blobs, coverage), background, _motion(blobs, scale))


def track_shape(frames: np.ndarray) -> np.ndarray:
    """Tracks the shape: float64 (F, 3), x, y and radius of a disc of its area in every frame, in scene pixels.

    NaN for frames without a shape. frames: uint8 (F, H, W, 3).
    """
    scale = min(frames.shape[1:3]) / SCENE_SIDE
    pixels = smooth(frames.astype(np.float32))
    background_rgb = np.median(border_pixels(pixels, width=max(1, round(4 * scale))), axis=0)
    distance = np.linalg.norm(pixels - background_rgb, axis=-1)
    strongest = np.percentile(distance, 99.5)
    track = np.full((len(frames), 3), np.nan)
    if strongest < MIN_INK_DISTANCE:
        return track
    ink_rgb = np.median(pixels[distance > 0.8 * strongest], axis=0)
    coverage = np.clip((distance / np.linalg.norm(ink_rgb - background_rgb) - 0.15) / 0.7, 0, 1)
    for frame, blob in enumerate(map(_find_blob, range(len(coverage)), coverage)):
        if blob and blob.area > MIN_BLOB_AREA * scale**2:
            track[frame] = blob.x / scale, blob.y / scale, math.sqrt(blob.area / math.pi) / scale
    return track


def smooth(pixels: np.ndarray) -> np.ndarray:
    """Averages over 3 x 3 pixels, which removes two thirds of the noise. float32 (F, H, W, 3)."""
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9


# Colour


def border_pixels(pixels: np.ndarray, width: int) -> np.ndarray:
    """Returns the pixels along the border of all frames, (N, 3)."""
    rows = np.concatenate((pixels[:, :width], pixels[:, -width:]), axis=1)
    columns = np.concatenate((pixels[:, :, :width], pixels[:, :, -width:]), axis=2)
    return np.concatenate((rows.reshape(-1, 3), columns.reshape(-1, 3)))


def _nearest_colour(colour: np.ndarray, names: dict[str, tuple[int, int, int]], limit: float) -> str | None:
    """Returns the name of the most similar colour, or None if even that one is farther than `limit`."""
    distances = np.linalg.norm(_lab(np.array(list(names.values()))) - _lab(colour), axis=-1)
    return list(names)[distances.argmin()] if distances.min() < limit else None


def _lab(rgb: np.ndarray) -> np.ndarray:
    """Converts sRGB from 0 to 255, (..., 3), to CIELAB (D65): equal distances look about equally different."""
    rgb = rgb / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = np.array(((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)))
    ratio = linear @ to_xyz.T / to_xyz.sum(1)
    x, y, z = np.moveaxis(np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29), -1, 0)
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -1)


# Position


def _find_blob(frame: int, coverage: np.ndarray) -> Blob | None:
    """Finds the largest connected component of ink in one frame. coverage: (H, W) in [0, 1]."""
    window = _largest_component(coverage > 0.5)
    if window is None:
        return None
    weights = coverage[window]
    area = float(weights.sum())
    rows, columns = (np.arange(span.start, span.stop) + 0.5 for span in window)
    return Blob(frame, float(weights.sum(0) @ columns) / area, float(weights.sum(1) @ rows) / area, area, window)


def _largest_component(mask: np.ndarray) -> tuple[slice, slice] | None:
    """Returns the rows and columns of the largest connected component, padded by two for its soft edge.

    Components are built from the horizontal runs of each row: a run joins every component that it touches in the row
    above.

    Args:
        mask: bool (H, W).
    """
    padded = np.pad(mask, ((0, 0), (1, 1)))
    rows, columns = (index.tolist() for index in np.nonzero(padded[:, 1:] != padded[:, :-1]))
    components: list[list[tuple[int, int, int]]] = []  # runs (row, start, stop) from the top down
    for row, start, stop in zip(rows[::2], columns[::2], columns[1::2], strict=True):
        joined, others = [(row, start, stop)], []
        for component in components:
            lowest = component[bisect_left(component, (row - 1,)) :]
            if any(a < stop and start < b for _, a, b in lowest):
                joined = sorted(component + joined)
            else:
                others.append(component)
        components = [*others, joined]
    if not components:
        return None
    largest = max(components, key=lambda component: sum(stop - start for _, start, stop in component))
    rows, starts, stops = zip(*largest, strict=True)
    height, width = mask.shape
    return (
        slice(max(0, min(rows) - 2), min(height, max(rows) + 3)),
        slice(max(0, min(starts) - 2), min(width, max(stops) + 2)),
    )


# Shape and motion


def _shape(blobs: list[Blob], coverage: np.ndarray) -> str | None:
    """Returns the shape whose template fits best in the frames with the largest blobs. coverage: (F, H, W)."""
    largest = sorted(blobs, key=lambda blob: blob.area)[-TEMPLATE_FRAMES:]
    overlaps = {shape: np.mean([_template_overlap(shape, blob, coverage) for blob in largest]) for shape in SHAPES}
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] > MIN_OVERLAP else None


def _template_overlap(shape: str, blob: Blob, coverage: np.ndarray) -> float:
    """Computes the overlap of a blob with a shape of its position and area: IoU of soft masks, from 0 to 1."""
    height, width = coverage.shape[1:]
    x = torch.arange(width).view(1, 1, -1) + 0.5 - blob.x
    y = torch.arange(height).view(1, -1, 1) + 0.5 - blob.y
    radius = torch.tensor(math.sqrt(blob.area / UNIT_AREA[shape])).view(1, 1, 1)
    template = (0.5 - signed_distance(shape, x, y, radius)).clamp(0, 1)[0].numpy()
    mask = np.zeros_like(template)
    mask[blob.bounds] = coverage[blob.frame][blob.bounds]
    return float(np.minimum(mask, template).sum() / np.maximum(mask, template).sum())


def _motion(blobs: list[Blob], scale: float) -> str:
    """Names the motion from lines fitted to the positions and sizes of all blobs. Travel has precedence over growth."""
    time = np.array([blob.frame for blob in blobs])
    x, y, size = (
        np.polynomial.Polynomial.fit(time, values, 1)(time[[0, -1]])
        for values in ([blob.x for blob in blobs], [blob.y for blob in blobs], [math.sqrt(blob.area) for blob in blobs])
    )
    dx, dy, ratio = x[1] - x[0], y[1] - y[0], size[1] / size[0]
    if max(abs(dx), abs(dy)) > MIN_TRAVEL * scale:
        if abs(dx) > abs(dy):
            return "moving right" if dx > 0 else "moving left"
        return "moving down" if dy > 0 else "moving up"
    if ratio > MIN_GROWTH:
        return "growing"
    return "shrinking" if ratio < 1 / MIN_GROWTH else "standing still"
