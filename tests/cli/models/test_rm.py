"""`kadr models rm`: what was fetched for a model goes, what others need and what is not in the cache stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kadr.checkpoints import hub
from kadr.errors import CheckpointError
from kadr.models.registry import Release, find_release, required_releases
from tests.checkpoints.test_hub import cache, write_cache
from tests.cli.conftest import CommandResult

Kadr = Callable[..., CommandResult]
__all__ = ["cache"]  # the fixture
NAME = "ltxv-2b-0.9.5"


def store(cache: Path, release: Release) -> list[Path]:
    """Writes the files of a release into the cache, as links to blobs, as huggingface_hub does."""
    names = [pattern.replace("*", "model.bin") for pattern in release.file_patterns]
    folder = write_cache(cache, str(release.repo), {name: name.encode() for name in names})
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir(exist_ok=True)
    for name in names:
        blob = blobs / name.replace("/", "-")
        (folder / name).replace(blob)
        (folder / name).symlink_to(blob)
    return [folder / name for name in names]


def test_files_and_blobs_of_a_model_are_removed(kadr: Kadr, cache: Path) -> None:
    paths = [path for entry in required_releases(find_release(NAME)) for path in store(cache, entry)]
    (other,) = store(cache, find_release("ltxv-spatial-upscaler-0.9.8"))  # another file of the same repository
    blobs, size = [path.resolve() for path in paths], sum(path.stat().st_size for path in paths)
    result = kadr("models", "rm", NAME, "--yes", "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) == {"name": NAME, "bytes": size, "removed": sorted(map(str, paths))}
    assert not [path for path in (*paths, *blobs) if path.is_symlink() or path.exists()]
    assert other.read_bytes()


def test_a_component_that_another_model_on_disk_needs_stays(kadr: Kadr, cache: Path) -> None:
    model, *components = required_releases(find_release(NAME))
    other = find_release("ltxv-2b-0.9.1")
    (path,), (other_path,) = store(cache, model), store(cache, other)
    shared = [file for entry in components for file in store(cache, entry)]
    result = kadr("models", "rm", NAME, "--yes")
    assert result.out.split() == [str(path)]
    assert f"stays: {other.name} needs it" in result.err
    assert all(file.exists() for file in (other_path, *shared))


def test_nothing_is_removed_unasked(kadr: Kadr, cache: Path) -> None:
    (path,) = store(cache, find_release(NAME))
    result = kadr("models", "rm", NAME)
    assert (result.code, result.out) == (1, "")
    assert "--yes" in result.err
    assert path.exists()


@pytest.mark.parametrize(("name", "reason"), [("demo", "comes with kadr"), (NAME, "nothing of ltxv-2b-0.9.5 is in")])
def test_what_is_not_in_the_cache_is_said(kadr: Kadr, cache: Path, name: str, reason: str) -> None:
    result = kadr("models", "rm", name, "--yes")
    assert (result.code, reason in result.err) == (1, True)


def test_a_file_outside_of_the_cache_is_refused(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    mine = tmp_path_factory.mktemp("mine") / "model.safetensors"
    mine.touch()
    with pytest.raises(CheckpointError, match="is not in the cache"):
        hub.remove_stored([mine])
    assert mine.exists()


def test_a_link_out_of_the_cache_loses_the_link_alone(
    kadr: Kadr, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mine = tmp_path_factory.mktemp("mine") / "model.safetensors"
    mine.write_bytes(b"mine")
    (path,) = store(cache, find_release(NAME))
    path.unlink()
    path.symlink_to(mine)
    assert kadr("models", "rm", NAME, "--yes").code == 0
    assert (path.is_symlink(), mine.read_bytes()) == (False, b"mine")
