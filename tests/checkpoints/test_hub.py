"""The hub is asked only for what the cache does not have, and what it answers is said in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from kadr.checkpoints import hub
from kadr.errors import CheckpointError
from tests.fakehub import COMMIT, FakeHub, digest, serve_fake_hub

REPO, FILE = "Lightricks/LTX-Video", "ltxv-2b-0.9.6-dev-04-25.safetensors"
WEIGHTS = bytes(range(256)) * 40
PATTERNS = ["text_encoder/*", "tokenizer/*"]
INDEX = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}).encode()
TEXT = {
    "text_encoder/config.json": b"{}",
    "text_encoder/x.index.json": INDEX,
    "text_encoder/1.safetensors": WEIGHTS[1:],
    "text_encoder/2.safetensors": WEIGHTS[2:],
    "tokenizer/spiece.model": b"pieces",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, instead of this machine's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def remote(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_fake_hub(monkeypatch, cache) as server:
        server.repos[REPO] = {FILE: WEIGHTS, "README.md": b"read me", **TEXT}
        yield server


def put(cache: Path, repo: str, files: dict[str, bytes]) -> Path:
    """Files in the cache, laid out as the library does."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        file = home / "snapshots" / COMMIT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return home / "snapshots" / COMMIT


def kept(cache: Path) -> set[str]:
    """The names of the bytes in the cache."""
    return {path.name for path in cache.glob("models--*/blobs/*")}


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda cache_dir=None: False)


def test_a_file_in_the_cache_is_found_without_asking(cache: Path) -> None:
    there = put(cache, REPO, {FILE: b"x"}) / FILE
    assert hub.cached_file(REPO, FILE) == hub.fetch(REPO, FILE) == there


def test_a_file_that_is_not_in_the_cache_is_fetched(cache: Path, remote: FakeHub) -> None:
    assert hub.cached_file(REPO, FILE) is None
    path = hub.fetch(REPO, FILE)
    assert path == hub.cached_file(REPO, FILE) == hub.fetch(REPO, FILE)
    assert path.read_bytes() == WEIGHTS
    assert remote.sent_files == [(FILE, 0)]
    assert kept(cache) == {digest(FILE, WEIGHTS)}


def test_a_part_of_a_repository_is_fetched_and_the_rest_is_not(cache: Path, remote: FakeHub) -> None:
    assert hub.cached_folder(REPO, PATTERNS) is None
    folder = hub.fetch_folder(REPO, PATTERNS)
    assert {name: (folder / name).read_bytes() for name in TEXT} == TEXT
    assert hub.cached_file(REPO, FILE) is hub.cached_file(REPO, "README.md") is None
    assert sorted(remote.sent_files) == sorted((name, 0) for name in TEXT)
    assert hub.fetch_folder(REPO, PATTERNS) == hub.cached_folder(REPO, PATTERNS) == folder
    assert len(remote.sent_files) == len(TEXT)


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
def test_a_part_of_a_repository_counts_as_here_when_all_of_it_is(cache: Path, files: list[str], whole: bool) -> None:
    folder = put(cache, REPO, {name: INDEX if name.endswith(".json") else b"x" for name in files})
    assert hub.cached_folder(REPO, PATTERNS) == (folder if whole else None)


def test_a_part_of_a_repository_of_which_something_was_deleted_is_completed(cache: Path, remote: FakeHub) -> None:
    folder = hub.fetch_folder(REPO, PATTERNS)
    for name in ("text_encoder/config.json", "text_encoder/2.safetensors"):
        (folder / name).resolve().unlink()
    remote.sent_files.clear()
    assert hub.cached_folder(REPO, PATTERNS) is None
    assert hub.fetch_folder(REPO, PATTERNS) == folder
    assert {name: (folder / name).read_bytes() for name in TEXT} == TEXT
    assert sorted(remote.sent_files) == [("text_encoder/2.safetensors", 0), ("text_encoder/config.json", 0)]


def test_a_download_that_is_cut_goes_on_where_it_was(cache: Path, remote: FakeHub) -> None:
    remote.truncations[FILE] = 2
    assert hub.fetch(REPO, FILE).read_bytes() == WEIGHTS
    whole = len(WEIGHTS)
    assert remote.sent_files == [(FILE, 0), (FILE, whole // 2), (FILE, whole // 2 + whole // 4)]


def test_a_download_that_broke_off_goes_on_the_next_time(cache: Path, remote: FakeHub) -> None:
    remote.truncations[FILE], remote.hangs_after_cut = 1, True
    with pytest.raises(CheckpointError, match=rf"{FILE} of {REPO}.*could not be fetched.*Try again"):
        hub.fetch(REPO, FILE)
    assert kept(cache) == {f"{digest(FILE, WEIGHTS)}.incomplete"}
    remote.revive()
    (file,) = hub.list_missing(REPO, [FILE])
    assert (file.size, file.remaining_bytes) == (len(WEIGHTS), len(WEIGHTS) // 2)
    assert hub.fetch(REPO, FILE).read_bytes() == WEIGHTS
    assert remote.sent_files == [(FILE, 0), (FILE, len(WEIGHTS) // 2)]
    assert kept(cache) == {digest(FILE, WEIGHTS)}


def test_what_is_left_of_another_file_is_not_taken_for_a_beginning(cache: Path, remote: FakeHub) -> None:
    part = hub.list_missing(REPO, [FILE])[0].incomplete_path
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(len(WEIGHTS) + 1))
    assert hub.fetch(REPO, FILE).read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", [FILE, "README.md"], ids=["large", "small"])
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_what_comes_damaged_is_thrown_away(
    cache: Path, remote: FakeHub, monkeypatch: pytest.MonkeyPatch, name: str, links: bool
) -> None:
    if not links:
        without_links(monkeypatch)
    whole = remote.repos[REPO][name]
    remote.corrupted_files[name] = bytes(len(whole))
    expected, found = digest(name, whole), digest(name, bytes(len(whole)))
    with pytest.raises(CheckpointError, match=f"{name} of {REPO} came damaged.* {found}.* {expected}.*try again"):
        hub.fetch(REPO, name)
    assert hub.cached_file(REPO, name) is None
    assert kept(cache) == set()
    remote.corrupted_files.clear()
    assert hub.fetch(REPO, name).read_bytes() == whole


def test_a_cache_without_links_holds_every_file_once(
    cache: Path, remote: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_links(monkeypatch)
    path = hub.fetch(REPO, FILE)
    assert path.read_bytes() == WEIGHTS
    assert not path.is_symlink()
    assert kept(cache) == set()


def test_without_a_network_it_is_said_what_was_looked_for_and_where(cache: Path) -> None:
    for call in (hub.fetch, lambda repo, file: hub.fetch_folder(repo, [file])):
        with pytest.raises(CheckpointError) as caught:
            call(REPO, FILE)
        said = str(caught.value)
        assert all(part in said for part in (REPO, FILE, str(cache), "HF_HUB_OFFLINE", "give its path"))


def test_a_full_disk_is_noticed_before_anything_is_fetched(
    cache: Path, remote: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = hub.RESERVED_BYTES + len(WEIGHTS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    with pytest.raises(CheckpointError, match=r"takes .* GB free.*set HF_HOME"):
        hub.fetch(REPO, FILE)
    assert remote.sent_files == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    hub.fetch(REPO, FILE)


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((403, "GatedRepo"), "asks for its licence to be accepted.*hf auth login"),
        ((404, "RepoNotFound"), "there is no repository Lightricks/LTX-Video"),
        ((401, "RepoNotFound"), "there is no repository Lightricks/LTX-Video on the hub, or it is private"),
        ((500, ""), "could not be fetched: .*500.*Try again"),
    ],
    ids=["gated", "no repository", "private", "server"],
)
def test_what_the_hub_answers_is_said_in_words(remote: FakeHub, refusal: tuple[int, str], said: str) -> None:
    remote.http_error = refusal
    with pytest.raises(CheckpointError, match=said):
        hub.fetch(REPO, FILE)


def test_what_a_repository_does_not_have_is_named(remote: FakeHub) -> None:
    with pytest.raises(CheckpointError, match=f"{REPO} has no nothing.safetensors. .*/tree/main shows what it has"):
        hub.fetch(REPO, "nothing.safetensors")
    with pytest.raises(CheckpointError, match="has no vae/"):
        hub.fetch_folder(REPO, ["tokenizer/*", "vae/*"])
    assert remote.sent_files == []


@pytest.mark.parametrize("error", [ConnectionError("the cable is cut"), OSError(28, "No space left on device")])
def test_what_breaks_on_the_way_is_said_in_words(
    remote: FakeHub, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def fail(*args: Any, **more: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=r"could not be fetched: .*(cut|No space left)") as caught:
        hub.fetch(REPO, FILE)
    assert caught.value.__cause__ is error
