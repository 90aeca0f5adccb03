"""The hub is used only for files that the cache lacks, and its errors are explained."""

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
from tests.fuzz.command import Case, run_command

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


def write_cache(cache: Path, repo: str, files: dict[str, bytes]) -> Path:
    """Writes files into the cache, laid out like huggingface_hub."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        file = home / "snapshots" / COMMIT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return home / "snapshots" / COMMIT


def blob_names(cache: Path) -> set[str]:
    """Returns the names of the blobs in the cache."""
    return {path.name for path in cache.glob("models--*/blobs/*")}


def disable_symlinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda cache_dir=None: False)


def test_a_cached_file_needs_no_network(cache: Path) -> None:
    path = write_cache(cache, REPO, {FILE: b"x"}) / FILE
    assert hub.cached_file(REPO, FILE) == hub.fetch(REPO, FILE) == path


def test_a_file_that_is_not_in_the_cache_is_fetched(cache: Path, remote: FakeHub) -> None:
    assert hub.cached_file(REPO, FILE) is None
    path = hub.fetch(REPO, FILE)
    assert path == hub.cached_file(REPO, FILE) == hub.fetch(REPO, FILE)
    assert path.read_bytes() == WEIGHTS
    assert remote.sent_files == [(FILE, 0)]
    assert blob_names(cache) == {digest(FILE, WEIGHTS)}


def test_only_matching_files_of_a_repository_are_fetched(cache: Path, remote: FakeHub) -> None:
    assert hub.cached_folder(REPO, PATTERNS) is None
    folder = hub.fetch_folder(REPO, PATTERNS)
    assert {name: (folder / name).read_bytes() for name in TEXT} == TEXT
    assert hub.cached_file(REPO, FILE) is hub.cached_file(REPO, "README.md") is None
    assert sorted(remote.sent_files) == sorted((name, 0) for name in TEXT)
    assert hub.fetch_folder(REPO, PATTERNS) == hub.cached_folder(REPO, PATTERNS) == folder
    assert len(remote.sent_files) == len(TEXT)


@pytest.mark.parametrize(
    ("files", "is_complete"),
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
def test_a_folder_counts_as_cached_only_when_complete(cache: Path, files: list[str], is_complete: bool) -> None:
    folder = write_cache(cache, REPO, {name: INDEX if name.endswith(".json") else b"x" for name in files})
    assert hub.cached_folder(REPO, PATTERNS) == (folder if is_complete else None)


def test_deleted_files_of_a_cached_folder_are_fetched_again(cache: Path, remote: FakeHub) -> None:
    folder = hub.fetch_folder(REPO, PATTERNS)
    for name in ("text_encoder/config.json", "text_encoder/2.safetensors"):
        (folder / name).resolve().unlink()
    remote.sent_files.clear()
    assert hub.cached_folder(REPO, PATTERNS) is None
    assert hub.fetch_folder(REPO, PATTERNS) == folder
    assert {name: (folder / name).read_bytes() for name in TEXT} == TEXT
    assert sorted(remote.sent_files) == [("text_encoder/2.safetensors", 0), ("text_encoder/config.json", 0)]


def test_a_cut_download_resumes_in_the_same_call(cache: Path, remote: FakeHub) -> None:
    remote.truncations[FILE] = 2
    assert hub.fetch(REPO, FILE).read_bytes() == WEIGHTS
    size = len(WEIGHTS)
    assert remote.sent_files == [(FILE, 0), (FILE, size // 2), (FILE, size // 2 + size // 4)]


def test_an_interrupted_download_resumes_in_the_next_call(cache: Path, remote: FakeHub) -> None:
    remote.truncations[FILE], remote.hangs_after_cut = 1, True
    with pytest.raises(CheckpointError, match=rf"{FILE} of {REPO}.*could not be fetched.*Try again"):
        hub.fetch(REPO, FILE)
    assert blob_names(cache) == {f"{digest(FILE, WEIGHTS)}.incomplete"}
    remote.revive()
    (file,) = hub.list_missing(REPO, [FILE])
    assert (file.size, file.remaining_bytes) == (len(WEIGHTS), len(WEIGHTS) // 2)
    assert hub.fetch(REPO, FILE).read_bytes() == WEIGHTS
    assert remote.sent_files == [(FILE, 0), (FILE, len(WEIGHTS) // 2)]
    assert blob_names(cache) == {digest(FILE, WEIGHTS)}


def test_an_incomplete_file_larger_than_the_download_is_discarded(cache: Path, remote: FakeHub) -> None:
    incomplete = hub.list_missing(REPO, [FILE])[0].incomplete_path
    incomplete.parent.mkdir(parents=True)
    incomplete.write_bytes(bytes(len(WEIGHTS) + 1))
    assert hub.fetch(REPO, FILE).read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", [FILE, "README.md"], ids=["large", "small"])
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_damaged_download_is_deleted(
    cache: Path, remote: FakeHub, monkeypatch: pytest.MonkeyPatch, name: str, links: bool
) -> None:
    if not links:
        disable_symlinks(monkeypatch)
    content = remote.repos[REPO][name]
    remote.corrupted_files[name] = bytes(len(content))
    expected, actual = digest(name, content), digest(name, bytes(len(content)))
    with pytest.raises(CheckpointError, match=f"{name} of {REPO} arrived damaged.* {actual}.* {expected}.*try again"):
        hub.fetch(REPO, name)
    assert hub.cached_file(REPO, name) is None
    assert blob_names(cache) == set()
    remote.corrupted_files.clear()
    assert hub.fetch(REPO, name).read_bytes() == content


def test_a_cache_without_links_stores_every_file_once(
    cache: Path, remote: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    disable_symlinks(monkeypatch)
    path = hub.fetch(REPO, FILE)
    assert path.read_bytes() == WEIGHTS
    assert not path.is_symlink()
    assert blob_names(cache) == set()


def test_without_a_network_the_error_names_file_and_cache(cache: Path) -> None:
    for call in (hub.fetch, lambda repo, file: hub.fetch_folder(repo, [file])):
        with pytest.raises(CheckpointError) as error:
            call(REPO, FILE)
        message = str(error.value)
        assert all(text in message for text in (REPO, FILE, str(cache), "HF_HUB_OFFLINE is set. Try", "give its path"))


def test_a_full_disk_is_refused_before_fetching(cache: Path, remote: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    free = hub.RESERVED_BYTES + len(WEIGHTS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free - 1))
    with pytest.raises(CheckpointError, match=r"takes .* GB free.*set HF_HOME"):
        hub.fetch(REPO, FILE)
    assert remote.sent_files == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    hub.fetch(REPO, FILE)


@pytest.mark.parametrize(
    ("http_error", "error"),
    [
        ((403, "GatedRepo"), "requires you to accept its licence.*hf auth login"),
        ((404, "RepoNotFound"), "there is no repository Lightricks/LTX-Video"),
        ((401, "RepoNotFound"), "there is no repository Lightricks/LTX-Video on the hub, or it is private"),
        ((500, ""), "could not be fetched: .*500.*Try again"),
    ],
    ids=["gated", "no repository", "private", "server"],
)
def test_an_http_error_of_the_hub_is_explained(remote: FakeHub, http_error: tuple[int, str], error: str) -> None:
    remote.http_error = http_error
    with pytest.raises(CheckpointError, match=error):
        hub.fetch(REPO, FILE)


def test_an_error_names_a_file_that_the_repository_lacks(remote: FakeHub) -> None:
    with pytest.raises(CheckpointError, match=f"{REPO} has no nothing.safetensors. .*/tree/main lists its files"):
        hub.fetch(REPO, "nothing.safetensors")
    with pytest.raises(CheckpointError, match="has no vae/"):
        hub.fetch_folder(REPO, ["tokenizer/*", "vae/*"])
    assert remote.sent_files == []


@pytest.mark.parametrize("error", [ConnectionError("the cable is cut"), OSError(28, "No space left on device")])
def test_a_connection_or_disk_error_is_explained(
    remote: FakeHub, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=r"could not be fetched: .*(cut|No space left)") as raised:
        hub.fetch(REPO, FILE)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("content", [b"\xff\xfe", bytes(40), b"", b"a/../../b", b"x" * 300])
def test_damaged_name_of_the_cached_commit_means_not_cached(cache: Path, content: bytes) -> None:
    folder = cache / f"models--{REPO.replace('/', '--')}" / "refs"
    folder.mkdir(parents=True)
    (folder / "main").write_bytes(content)
    assert hub.cached_file(REPO, FILE) is None
    assert hub.cached_folder(REPO, PATTERNS) is None
    assert hub.list_cached(REPO, PATTERNS) == {}


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HF_HUB_ETAG_TIMEOUT", "soon"), ("HF_ENDPOINT", "http://[::1"), ("HF_HUB_CACHE", "~nobody-x/y")],
)
def test_variable_that_the_hub_library_refuses_is_explained(variable: str, value: str) -> None:
    outcome = run_command(Case(("models",), environment={variable: value}))
    assert (outcome.code, outcome.out, list(outcome.complaints())) == (1, "", [])
    assert "Correct the environment variables whose names begin with HF_" in outcome.err
