"""Makes the README's image, eight videos of the demo model: `python -m train.readme_image`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from kadr import Engine, Request

CAPTIONS = (
    "a red circle moving right on a black background",
    "a blue square moving left on a gray background",
    "a yellow triangle moving up on a navy background",
    "a white ring moving down on a brown background",
    "a green circle growing on a black background",
    "a purple square shrinking on a gray background",
    "a cyan triangle standing still on a brown background",
    "an orange ring moving right on a navy background",
)
COLUMNS = 4
GAP = 4  # pixels between the videos
LAST_FRAME_MS = 600  # milliseconds


def arrange_grid(videos: list[np.ndarray]) -> np.ndarray:
    """Arranges videos, each uint8 (F, H, W, 3), as one video in rows of four, with white gaps."""
    padded = [np.pad(video, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255) for video in videos]
    rows = [np.concatenate(padded[i : i + COLUMNS], axis=2) for i in range(0, len(padded), COLUMNS)]
    return np.concatenate(rows, axis=1)[:, :-GAP, :-GAP]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.readme_image", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/images/demo.gif"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    engine = Engine.open("demo")
    videos = [engine.generate(Request(prompt=caption, seed=options.seed)).frames for caption in CAPTIONS]
    frames = [Image.fromarray(frame).quantize(96, dither=Image.Dither.NONE) for frame in arrange_grid(videos)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    durations = [1000 // 24] * (len(frames) - 1) + [LAST_FRAME_MS]
    frames[0].save(options.output, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    print(options.output)


if __name__ == "__main__":
    main()
