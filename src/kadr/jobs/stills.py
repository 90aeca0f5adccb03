"""Small images of a finished video: a thumbnail and a spritesheet."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from kadr.media.clip import ClipReader
from kadr.media.image import fit_within

THUMBNAIL_SIDE = 512  # pixels, at most
SPRITE_SIDE, SPRITE_COLUMNS, MAX_SPRITES = 160, 5, 25
_JPEG_QUALITY = 85


def write_stills(video: Path, thumbnail: Path, spritesheet: Path) -> None:
    """Writes a thumbnail and a spritesheet, both JPEG; the sheet has 5 columns, and up to 25 frames evenly spaced.

    Raises:
        MediaError: the video cannot be read.
        OSError: a still cannot be written.
    """
    reader = ClipReader.open(video)
    num_frames = len(reader.frame_indices)
    count = min(num_frames, MAX_SPRITES)
    wanted = {index * (num_frames - 1) // max(count - 1, 1) for index in range(count)}
    sprites = []
    for index, frame in enumerate(reader):
        if index == 0:
            fit_within(Image.fromarray(frame), THUMBNAIL_SIDE).save(thumbnail, "JPEG", quality=_JPEG_QUALITY)
        if index in wanted:
            sprites.append(fit_within(Image.fromarray(frame), SPRITE_SIDE))
    width, height = sprites[0].size
    columns, rows = min(len(sprites), SPRITE_COLUMNS), -(-len(sprites) // SPRITE_COLUMNS)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for place, sprite in enumerate(sprites):
        sheet.paste(sprite, (place % SPRITE_COLUMNS * width, place // SPRITE_COLUMNS * height))
    sheet.save(spritesheet, "JPEG", quality=_JPEG_QUALITY)
