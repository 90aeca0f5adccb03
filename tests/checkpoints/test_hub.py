"""The hub is asked only for what the cache does not have, and what it answers is said in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from kadr.checkpoints import hub
from kadr.errors import CheckpointError

REPO, FILE = "Lightricks/LTX-Video", "ltxv-2b-0.9.6-dev-04-25.safetensors"
PATTERNS = ["text_encoder/*", "tokenizer/*"]


ANSWER: Any = SimpleNamespace(status_code=404, headers={}, request=None)  # what the library's errors are made from


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, instead of this machine's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(cache: Path, repo: str, files: dict[str, str]) -> Path:
    """Files in the cache, laid out as the library does."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        file = home / "snapshots" / ("0" * 40) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return home / "snapshots" / ("0" * 40)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The hub, replaced: it has every file, of 5 bytes each, and remembers what was taken."""
    taken: list[Any] = []

    def file(repo: str, name: str, **more: Any) -> str:
        taken.append((repo, name))
        return "/taken/" + name

    def snapshot(repo: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not here")
        taken.append((repo, allow_patterns))
        return "/taken"

    files = [SimpleNamespace(rfilename=name, size=5) for name in (FILE, "text_encoder/a", "tokenizer/b", "c")]
    info = SimpleNamespace(siblings=files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=lambda repo, **more: info))
    return taken


def test_a_file_in_the_cache_is_found_without_asking(cache: Path, asked: list[Any]) -> None:
    there = put(cache, REPO, {FILE: "x"}) / FILE
    assert hub.on_disk(REPO, FILE) == hub.fetch(REPO, FILE) == there
    assert asked == []


def test_a_file_that_is_not_in_the_cache_is_fetched(cache: Path, asked: list[Any]) -> None:
    assert hub.on_disk(REPO, FILE) is None
    assert hub.fetch(REPO, FILE) == Path("/taken") / FILE
    assert asked == [(REPO, FILE)]


def test_a_part_of_a_repository_is_fetched(cache: Path, asked: list[Any]) -> None:
    assert hub.fetch_folder(REPO, PATTERNS) == Path("/taken")
    assert asked == [(REPO, PATTERNS)]


INDEX = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})


@pytest.mark.parametrize(
    ("files", "whole"),
    [
        (["text_encoder/model.safetensors", "tokenizer/spiece.model"], True),
        (["text_encoder/model.safetensors"], False),
        (["text_encoder/1.safetensors", "text_encoder/x.index.json", "tokenizer/spiece.model"], False),
        (
            ["text_encoder/1.safetensors", "text_encoder/2.safetensors", "text_encoder/x.index.json", "tokenizer/t"],
            True,
        ),
    ],
)
def test_a_part_of_a_repository_counts_as_here_when_all_of_it_is(
    cache: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any], files: list[str], whole: bool
) -> None:
    folder = put(cache, REPO, {name: INDEX if name.endswith(".json") else "x" for name in files})
    fresh = huggingface_hub.snapshot_download

    def snapshot(repo: str, *, local_files_only: bool = False, **more: Any) -> str:
        return str(folder) if local_files_only else fresh(repo, **more)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert (hub.fetch_folder(REPO, PATTERNS) == folder) is whole
    assert (asked == []) is whole


def test_without_a_network_it_is_said_what_was_looked_for_and_where(cache: Path) -> None:
    for call in (lambda: hub.fetch(REPO, FILE), lambda: hub.fetch_folder(REPO, [FILE])):
        with pytest.raises(CheckpointError) as caught:
            call()
        said = str(caught.value)
        assert all(part in said for part in (REPO, FILE, str(cache), "give its path"))


@pytest.mark.parametrize("size", [None, 10**15])
def test_a_full_disk_is_noticed_before_anything_is_fetched(
    cache: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    free = hub.SPARE if size is None else 10**14
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(CheckpointError, match=r"takes .* GB free.*set HF_HOME"):
        hub.fetch(REPO, FILE, size_bytes=size)
    assert asked == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.GatedRepoError("no", response=ANSWER), "asks for its licence to be accepted.*hf auth login"),
        (errors.RepositoryNotFoundError("no", response=ANSWER), "there is no repository Lightricks/LTX-Video"),
        (errors.RemoteEntryNotFoundError("no", response=ANSWER), f"has no {FILE}"),
        (ConnectionError("the cable is cut"), "could not be fetched: the cable is cut. Try again"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
    ids=["gated", "no repository", "no file", "no network", "disk"],
)
def test_what_the_hub_answers_is_said_in_words(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(*args: Any, **more: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=said) as caught:
        hub.fetch(REPO, FILE, size_bytes=5)
    assert caught.value.__cause__ is error
