"""A folder of clips: what is in it, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kadr.errors import KadrWarning, MediaError
from kadr.training.dataset import read_dataset

Clip = Callable[..., Path]


def test_clips_and_pictures_come_by_name_with_their_captions_and_rates(folder: Path) -> None:
    found = read_dataset(folder, 9)
    assert [example.media.name for example in found] == ["0.mp4", "1.mp4", "2.mp4", "still.png"]
    assert found[1].caption == "a red circle moving right"
    assert [(example.frames, example.fps) for example in found[2:]] == [(9, Fraction(24)), (1, None)]


def test_hidden_files_are_no_clips_and_a_mark_of_byte_order_is_no_word(folder: Path) -> None:
    (folder / "._0.mp4").write_bytes(b"of the system")
    (folder / "1.txt").write_text("a red circle", "utf-8-sig")
    found = read_dataset(folder, 9)
    assert [example.media.name for example in found] == ["0.mp4", "1.mp4", "2.mp4", "still.png"]
    assert found[1].caption == "a red circle"


def test_clips_in_folders_inside_are_pointed_out(folder: Path, make_clip: Clip) -> None:
    (folder / "more").mkdir()
    make_clip(folder / "more" / "9.mp4")
    with pytest.warns(KadrWarning, match=r"1 clips and pictures in folders inside of .*, such as more/9\.mp4, are not"):
        assert len(read_dataset(folder, 9)) == 4


def test_a_reference_is_no_clip_of_its_own(folder: Path, make_clip: Clip) -> None:
    for name in ("0", "1", "2"):
        make_clip(folder / f"{name}.reference.mp4", frames=12, caption=None)
    (folder / "still.reference.png").write_bytes((folder / "still.png").read_bytes())
    found = read_dataset(folder, 9, references=True)
    assert [example.reference.name for example in found if example.reference] == [
        "0.reference.mp4",
        "1.reference.mp4",
        "2.reference.mp4",
        "still.reference.png",
    ]
    assert all(example.reference is None for example in read_dataset(folder, 9))


def broken(folder: Path, make_clip: Clip) -> dict[str, str]:
    """Five more clips that cannot be used, and what is said of each."""
    (folder / "torn.mp4").write_bytes((folder / "0.mp4").read_bytes()[:900])
    (folder / "torn.txt").write_text("torn")
    make_clip(folder / "mute.mp4", caption=None)
    make_clip(folder / "empty.mp4", caption=" \n")
    make_clip(folder / "short.mp4", frames=8)
    make_clip(folder / "latin.mp4").with_suffix(".txt").write_bytes(b"caf\xe9")
    return {
        "torn.mp4": "holds no frames",
        "mute.mp4": "has no caption: write what it shows into mute.txt",
        "empty.txt": "is empty; write what empty.mp4 shows",
        "short.mp4": "has 8 frames, and 9 of each clip are learned",
        "latin.txt": "cannot be read as UTF-8 text",
    }


def test_all_that_cannot_be_used_is_named_at_once(folder: Path, make_clip: Clip) -> None:
    said = broken(folder, make_clip)
    with pytest.raises(MediaError) as refused:
        read_dataset(folder, 9)
    told = str(refused.value)
    assert told.startswith(f"5 of the 9 clips and pictures of {folder} cannot be used:\n")
    for name, reason in said.items():
        assert f"{name} {reason}" in told
    assert told.endswith("Mend or remove them, or leave them out with --skip-broken.")


def test_what_cannot_be_used_is_left_out_when_told_to(folder: Path, make_clip: Clip) -> None:
    usable = read_dataset(folder, 9)
    broken(folder, make_clip)
    with pytest.warns(KadrWarning, match=r"5 of the 9 clips .* are left out:[\s\S]*mute\.mp4"):
        assert read_dataset(folder, 9, skip_broken=True) == usable


def test_references_that_are_absent_short_or_still_are_named(folder: Path, make_clip: Clip) -> None:
    make_clip(folder / "1.reference.mp4", frames=8, caption=None)
    (folder / "2.reference.png").write_bytes((folder / "still.png").read_bytes())
    with pytest.raises(MediaError) as refused:
        read_dataset(folder, 9, references=True)
    for told in (
        "0.mp4 has no reference: put one beside it as 0.reference.mp4",
        "1.reference.mp4 has 8 frames, and 9",
        "2.reference.png is a picture, and 2.mp4 a clip",
        "still.png has no reference",
    ):
        assert told in str(refused.value)


def test_a_folder_without_anything_to_learn_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="there is no folder"):
        read_dataset(tmp_path / "none", 9)
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(MediaError, match="nothing to learn from"):
        read_dataset(tmp_path, 9)


def test_a_clip_is_told_from_another_of_its_name_and_size_and_not_by_its_place(folder: Path, tmp_path: Path) -> None:
    before = {example.media.name: example.content_hash() for example in read_dataset(folder, 9)}
    picture = folder / "still.png"
    size = picture.stat().st_size
    Image.fromarray(np.random.default_rng(10).integers(0, 256, (40, 72, 3), dtype=np.uint8)).save(picture)
    assert picture.stat().st_size == size
    moved = folder.rename(tmp_path / "elsewhere")
    after = {example.media.name: example.content_hash() for example in read_dataset(moved, 9)}
    assert {name for name in after if after[name] != before[name]} == {"still.png"}
