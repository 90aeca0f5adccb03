"""Reads a folder of clips and images with captions beside them, and names every file that cannot be used."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

from kadr.checkpoints.digest import SHA256_HEX_DIGITS, compute_digest
from kadr.errors import KadrError, KadrWarning, MediaError, RequestError
from kadr.media.clip import ClipReader, probe_video
from kadr.media.image import load_image
from kadr.regular_file import read_text
from kadr.request.inputs import CLIP_SUFFIXES

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
REFERENCE_SUFFIX = ".reference"  # before the ending of a clip's reference: walk.mp4 has walk.reference.mp4
CAPTION_SUFFIX, MAX_CAPTION_BYTES = ".txt", 1 << 16
MAX_SUBFOLDER_ENTRIES = 10_000  # that are looked at for a warning: the folder may be the whole disk
MAX_LISTED_EXAMPLES = 10  # unusable files that an error or warning names


@dataclass(frozen=True)
class Example:
    """A clip or image to train on, with its caption.

    Args:
        media: the clip or the image.
        frames: frames to train on, the first ones of a clip; 1 for an image.
        fps: frame rate of the clip; None for an image.
        reference: a clip or image that an in-context LoRA learns to follow; None without one.
    """

    media: Path
    caption: str
    frames: int
    fps: Fraction | None
    reference: Path | None = None

    def content_hash(self) -> str:
        """Returns a checksum of the caption and the files, wherever the folder is.

        It tells the example from another of the same name.
        """
        digests = [
            compute_digest(path, like="0" * SHA256_HEX_DIGITS)
            for path in (self.media, self.reference)
            if path is not None
        ]
        return hashlib.sha256(json.dumps([self.caption, digests]).encode()).hexdigest()[:16]


def read_dataset(
    dataset_folder: Path, frames: int, *, references: bool = False, skip_broken: bool = False
) -> list[Example]:
    """Reads the examples of a folder, sorted by name. Decodes every clip once, to find damaged ones.

    Args:
        frames: frames to train on from each clip, 8k+1. A clip must have that many; an image counts as one frame.
        references: every example needs a reference beside it, such as walk.reference.mp4 for walk.mp4.
        skip_broken: skip files that cannot be used, with a warning.

    Raises:
        MediaError: some files cannot be used, with their names and the reasons; or the folder has no examples.
    """
    if not dataset_folder.is_dir():
        raise MediaError(
            f"there is no folder {dataset_folder}. Name one that has clips, each with a caption beside it (.txt)."
        )
    media = [
        path
        for path in sorted(dataset_folder.iterdir())
        if _is_media_file(path) and not path.stem.endswith(REFERENCE_SUFFIX)
    ]
    _warn_of_subfolders(dataset_folder)
    examples, problems = [], []
    for path in media:
        try:
            examples.append(_read_example(path, frames, references=references))
        except KadrError as error:
            problems.append(str(error))
    count = f"{len(problems)} of the {len(media)} clips and images of {dataset_folder}"
    if problems and not skip_broken:
        way_out = "Fix or remove them, or skip them with --skip-broken."
        raise MediaError(f"{count} cannot be used:", details=[*_list_first(problems), way_out])
    if problems:
        warnings.warn(KadrWarning(f"{count} are skipped:", details=_list_first(problems)), stacklevel=2)
    if not examples:
        suffixes = ", ".join((*CLIP_SUFFIXES, *IMAGE_SUFFIXES))
        raise MediaError(
            f"{dataset_folder} has nothing to train on. Put clips or images ({suffixes}) there, each with a caption."
        )
    return examples


def _is_media_file(path: Path) -> bool:
    """Returns true for clips and images that are not hidden.

    Systems put hidden files of their own beside others, under names that end alike.
    """
    return path.suffix.lower() in (*CLIP_SUFFIXES, *IMAGE_SUFFIXES) and not path.name.startswith(".")


def _warn_of_subfolders(folder: Path) -> None:
    """Warns of clips one folder down, which are not read."""
    entries = islice(folder.glob("*/*"), MAX_SUBFOLDER_ENTRIES)
    nested = next((path.relative_to(folder) for path in entries if _is_media_file(path)), None)
    if nested is not None:
        warnings.warn(
            f"clips and images in subfolders of {folder}, such as {nested}, are not read: only files in the folder "
            "itself are.",
            KadrWarning,
            stacklevel=3,
        )


def _list_first(problems: Sequence[str]) -> list[str]:
    """Returns the first `MAX_LISTED_EXAMPLES` problems, and how many more there are."""
    rest = len(problems) - MAX_LISTED_EXAMPLES
    return [*problems[:MAX_LISTED_EXAMPLES], *([f"and {rest} more"] if rest > 0 else [])]


def _read_example(path: Path, frames: int, *, references: bool) -> Example:
    caption = _read_caption(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        load_image(path)
        return Example(path, caption, 1, None, _find_reference(path, 1) if references else None)
    count, fps = probe_video(path)[:2]
    _require_length(path, count, frames)
    return Example(path, caption, frames, fps, _find_reference(path, frames) if references else None)


def _read_caption(path: Path) -> str:
    caption_path = path.with_suffix(CAPTION_SUFFIX)
    try:
        caption = " ".join(read_text(caption_path, "utf-8-sig", max_bytes=MAX_CAPTION_BYTES).split())
    except FileNotFoundError:
        raise RequestError(f"{path.name} has no caption: describe it in {caption_path.name}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the caption {caption_path.name} cannot be read as UTF-8 text: {error}.") from error
    if not caption:
        raise RequestError(f"the caption {caption_path.name} is empty; describe {path.name} in it.")
    return caption


def _require_length(path: Path, count: int, frames: int) -> None:
    """Refuses a clip with too few frames. Decodes them, to find damage before anything is computed."""
    if count < frames:
        raise RequestError(f"{path.name} has {count} frames, and training needs {frames} of each clip (--frames).")
    readable = len(ClipReader.open(path, frames))
    if readable < frames:
        raise MediaError(f"the header of {path.name} says {count} frames, and only {readable} can be decoded.")


def _find_reference(path: Path, frames: int) -> Path:
    paths = [path.with_suffix(REFERENCE_SUFFIX + suffix) for suffix in (*CLIP_SUFFIXES, *IMAGE_SUFFIXES)]
    candidates = [candidate for candidate in paths if candidate.is_file()]
    if not candidates:
        raise RequestError(
            f"{path.name} has no reference: put one beside it as {path.stem}{REFERENCE_SUFFIX}{path.suffix}."
        )
    reference = candidates[0]
    if reference.suffix.lower() in IMAGE_SUFFIXES:
        load_image(reference)
        if frames > 1:
            raise RequestError(
                f"{reference.name} is an image, and {path.name} a clip; the reference must be a clip of as many frames."
            )
    else:
        _require_length(reference, probe_video(reference)[0], frames)
    return reference
