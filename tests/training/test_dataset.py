"""Reading a folder of clips: which examples it has, and which files are refused by name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kadr.errors import KadrWarning, MediaError
from kadr.training.dataset import read_dataset

MakeClip = Callable[..., Path]


def test_examples_are_sorted_by_name_with_captions_and_frame_rates(folder: Path) -> None:
    examples = read_dataset(folder, 9)
    assert [example.media.name for example in examples] == ["0.mp4", "1.mp4", "2.mp4", "still.png"]
    assert examples[1].caption == "a red circle moving right"
    assert [(example.frames, example.fps) for example in examples[2:]] == [(9, Fraction(24)), (1, None)]


def test_hidden_files_are_skipped_and_a_byte_order_mark_is_stripped(folder: Path) -> None:
    (folder / "._0.mp4").write_bytes(b"of the system")
    (folder / "1.txt").write_text("a red circle", "utf-8-sig")
    examples = read_dataset(folder, 9)
    assert [example.media.name for example in examples] == ["0.mp4", "1.mp4", "2.mp4", "still.png"]
    assert examples[1].caption == "a red circle"


def test_clips_in_subfolders_are_warned_of(folder: Path, make_clip: MakeClip) -> None:
    (folder / "more").mkdir()
    make_clip(folder / "more" / "9.mp4")
    with pytest.warns(KadrWarning, match=r"clips and images in subfolders of .*, such as more/9\.mp4, are not"):
        assert len(read_dataset(folder, 9)) == 4


def test_only_one_folder_down_is_searched_for_clips(folder: Path, make_clip: MakeClip) -> None:
    (folder / "more" / "deeper").mkdir(parents=True)
    make_clip(folder / "more" / "deeper" / "9.mp4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_dataset(folder, 9)) == 4  # the folder may be the whole disk


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_caption_that_is_a_named_pipe_is_refused(folder: Path) -> None:
    (folder / "1.txt").unlink()
    os.mkfifo(folder / "1.txt")
    with pytest.raises(MediaError, match=r"1\.txt cannot be read as UTF-8 text: it is a named pipe"):
        read_dataset(folder, 9)


def test_a_reference_is_not_an_example(folder: Path, make_clip: MakeClip) -> None:
    for name in ("0", "1", "2"):
        make_clip(folder / f"{name}.reference.mp4", frames=12, caption=None)
    (folder / "still.reference.png").write_bytes((folder / "still.png").read_bytes())
    examples = read_dataset(folder, 9, references=True)
    assert [example.reference.name for example in examples if example.reference] == [
        "0.reference.mp4",
        "1.reference.mp4",
        "2.reference.mp4",
        "still.reference.png",
    ]
    assert all(example.reference is None for example in read_dataset(folder, 9))


def add_broken_clips(folder: Path, make_clip: MakeClip) -> dict[str, str]:
    """Adds five clips that cannot be used. Returns the file that an error must name for each, and its reason."""
    (folder / "torn.mp4").write_bytes((folder / "0.mp4").read_bytes()[:900])
    (folder / "torn.txt").write_text("torn")
    make_clip(folder / "mute.mp4", caption=None)
    make_clip(folder / "empty.mp4", caption=" \n")
    make_clip(folder / "short.mp4", frames=8)
    make_clip(folder / "latin.mp4").with_suffix(".txt").write_bytes(b"caf\xe9")
    return {
        "torn.mp4": "contains no frames",
        "mute.mp4": "has no caption: describe it in mute.txt",
        "empty.txt": "is empty; describe empty.mp4 in it",
        "short.mp4": "has 8 frames, and training needs 9 of each clip",
        "latin.txt": "cannot be read as UTF-8 text",
    }


def test_every_unusable_clip_is_named_at_once(folder: Path, make_clip: MakeClip) -> None:
    reasons = add_broken_clips(folder, make_clip)
    with pytest.raises(MediaError) as caught:
        read_dataset(folder, 9)
    message = str(caught.value)
    assert message.startswith(f"5 of the 9 clips and images of {folder} cannot be used:\n")
    for name, reason in reasons.items():
        assert f"{name} {reason}" in message
    assert message.endswith("Fix or remove them, or skip them with --skip-broken.")


def test_skip_broken_skips_unusable_clips_with_a_warning(folder: Path, make_clip: MakeClip) -> None:
    usable = read_dataset(folder, 9)
    add_broken_clips(folder, make_clip)
    with pytest.warns(KadrWarning, match=r"5 of the 9 clips .* are skipped:[\s\S]*mute\.mp4"):
        assert read_dataset(folder, 9, skip_broken=True) == usable


def test_missing_short_and_still_references_are_named(folder: Path, make_clip: MakeClip) -> None:
    make_clip(folder / "1.reference.mp4", frames=8, caption=None)
    (folder / "2.reference.png").write_bytes((folder / "still.png").read_bytes())
    with pytest.raises(MediaError) as caught:
        read_dataset(folder, 9, references=True)
    for message in (
        "0.mp4 has no reference: put one beside it as 0.reference.mp4",
        "1.reference.mp4 has 8 frames, and training needs 9",
        "2.reference.png is an image, and 2.mp4 a clip",
        "still.png has no reference",
    ):
        assert message in str(caught.value)


def test_a_folder_without_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="there is no folder"):
        read_dataset(tmp_path / "none", 9)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(MediaError, match="nothing to train on"):
        read_dataset(tmp_path, 9)


def test_content_hash_sees_changed_files_and_ignores_their_folder(folder: Path, tmp_path: Path) -> None:
    before = {example.media.name: example.content_hash() for example in read_dataset(folder, 9)}
    image = folder / "still.png"
    size = image.stat().st_size
    Image.fromarray(np.random.default_rng(10).integers(0, 256, (40, 72, 3), dtype=np.uint8)).save(image)
    assert image.stat().st_size == size
    moved = folder.rename(tmp_path / "elsewhere")
    after = {example.media.name: example.content_hash() for example in read_dataset(moved, 9)}
    assert {name for name in after if after[name] != before[name]} == {"still.png"}
