"""A folder of clips and pictures with captions beside them: looked into, and what cannot be used is named."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from kadr.checkpoints.digest import SHA256_HEX_DIGITS, compute_digest
from kadr.errors import KadrError, KadrWarning, MediaError, RequestError
from kadr.media.clip import ClipReader, probe_video
from kadr.media.image import load_image
from kadr.request.inputs import CLIP_SUFFIXES

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
REFERENCE_SUFFIX = ".reference"  # before the ending of a clip's reference: walk.mp4 has walk.reference.mp4
CAPTION_SUFFIX = ".txt"
MAX_LISTED_EXAMPLES = 10  # of what cannot be used


@dataclass(frozen=True)
class Example:
    """One thing to learn from.

    Args:
        media: a clip or a picture.
        frames: that are learned, the first ones of a clip; 1 of a picture.
        fps: of the clip; None of a picture.
        reference: a clip or picture beside it; None where none is learned to be followed.
    """

    media: Path
    caption: str
    frames: int
    fps: Fraction | None
    reference: Path | None = None

    def content_hash(self) -> str:
        """What tells it from another of its name, wherever the folder is: a checksum of caption and files."""
        files = [
            compute_digest(path, like="0" * SHA256_HEX_DIGITS)
            for path in (self.media, self.reference)
            if path is not None
        ]
        return hashlib.sha256(json.dumps([self.caption, files]).encode()).hexdigest()[:16]


def read_dataset(
    dataset_folder: Path, frames: int, *, references: bool = False, skip_broken: bool = False
) -> list[Example]:
    """The examples of a folder, by their names. Every clip is decoded once.

    Args:
        frames: that are learned of a clip, 8k+1. A clip must have as many; a picture is learned as one frame.
        references: each has a reference beside it, such as walk.reference.mp4 for walk.mp4.
        skip_broken: leave out what cannot be used, with a warning.

    Raises:
        MediaError: some cannot be used, with their names and why; or there is nothing to learn from.
    """
    if not dataset_folder.is_dir():
        raise MediaError(f"there is no folder {dataset_folder}. Give one with clips, and a caption beside each (.txt).")
    media = [
        path
        for path in sorted(dataset_folder.iterdir())
        if _is_media_file(path) and not path.stem.endswith(REFERENCE_SUFFIX)
    ]
    _warn_of_subfolders(dataset_folder)
    made, broken = [], []
    for path in media:
        try:
            made.append(_read_example(path, frames, references=references))
        except KadrError as error:
            broken.append(str(error))
    if broken and not skip_broken:
        raise MediaError(
            f"{len(broken)} of the {len(media)} clips and pictures of {dataset_folder} cannot be used:{_bullet_list(broken)}\n"
            "Mend or remove them, or leave them out with --skip-broken."
        )
    if broken:
        told = f"{len(broken)} of the {len(media)} clips and pictures of {dataset_folder} are left out:{_bullet_list(broken)}"
        warnings.warn(told, KadrWarning, stacklevel=2)
    if not made:
        endings = ", ".join((*CLIP_SUFFIXES, *IMAGE_SUFFIXES))
        raise MediaError(
            f"{dataset_folder} has nothing to learn from: clips or pictures ({endings}), each with a caption."
        )
    return made


def _is_media_file(path: Path) -> bool:
    """Hidden files are none: systems put files of their own beside others, under names that end alike."""
    return path.suffix.lower() in (*CLIP_SUFFIXES, *IMAGE_SUFFIXES) and not path.name.startswith(".")


def _warn_of_subfolders(folder: Path) -> None:
    """Say where clips lie in folders inside of the folder."""
    inner = [path for path in folder.rglob("*") if path.parent != folder and _is_media_file(path)]
    if inner:
        warnings.warn(
            f"{len(inner)} clips and pictures in folders inside of {folder}, such as {inner[0].relative_to(folder)}, "
            "are not read: only those in the folder itself are.",
            KadrWarning,
            stacklevel=3,
        )


def _bullet_list(broken: Sequence[str]) -> str:
    """A line for each."""
    more = [f"and {len(broken) - MAX_LISTED_EXAMPLES} more"] if len(broken) > MAX_LISTED_EXAMPLES else []
    return "".join(f"\n  {one}" for one in [*broken[:MAX_LISTED_EXAMPLES], *more])


def _read_example(path: Path, frames: int, *, references: bool) -> Example:
    caption = _read_caption(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        load_image(path)
        return Example(path, caption, 1, None, _find_reference(path, 1) if references else None)
    count, fps = probe_video(path)
    _require_length(path, count, frames)
    return Example(path, caption, frames, fps, _find_reference(path, frames) if references else None)


def _read_caption(path: Path) -> str:
    beside = path.with_suffix(CAPTION_SUFFIX)
    try:
        caption = " ".join(beside.read_text("utf-8-sig").split())
    except FileNotFoundError:
        raise RequestError(f"{path.name} has no caption: write what it shows into {beside.name}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the caption {beside.name} cannot be read as UTF-8 text: {error}.") from error
    if not caption:
        raise RequestError(f"the caption {beside.name} is empty; write what {path.name} shows.")
    return caption


def _require_length(path: Path, count: int, frames: int) -> None:
    """Decode what is learned, so that what is damaged is known before anything is computed."""
    if count < frames:
        raise RequestError(f"{path.name} has {count} frames, and {frames} of each clip are learned (--frames).")
    readable = len(ClipReader.open(path, frames))
    if readable < frames:
        raise MediaError(f"{path.name} says it has {count} frames, and {readable} can be read.")


def _find_reference(path: Path, frames: int) -> Path:
    found = [
        beside
        for end in (*CLIP_SUFFIXES, *IMAGE_SUFFIXES)
        if (beside := path.with_suffix(REFERENCE_SUFFIX + end)).is_file()
    ]
    if not found:
        raise RequestError(
            f"{path.name} has no reference: put one beside it as {path.stem}{REFERENCE_SUFFIX}{path.suffix}."
        )
    reference = found[0]
    if reference.suffix.lower() in IMAGE_SUFFIXES:
        load_image(reference)
        if frames > 1:
            raise RequestError(f"{reference.name} is a picture, and {path.name} a clip; give a clip of as many frames.")
    else:
        _require_length(reference, probe_video(reference)[0], frames)
    return reference
