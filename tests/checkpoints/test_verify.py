"""A cached file is verified against the hub's checksum, which is the name of its blob."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kadr.checkpoints import hub
from kadr.checkpoints.digest import compute_digest, is_digest
from kadr.checkpoints.verify import ABSENT, DAMAGED, OK, UNVERIFIED, verify_files
from tests.fakehub import COMMIT, FakeHub, digest, git_sha1, serve_fake_hub, sha256

REPO = "some/text-encoder"
FILES = {
    "text_encoder/config.json": b"{}",
    "text_encoder/x.index.json": b'{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}',
    "text_encoder/1.safetensors": b"one" * 1000,
    "text_encoder/2.safetensors": b"two" * 1000,
    "tokenizer/spiece.model": b"pieces",
}
PATTERNS = ("text_encoder/*", "tokenizer/*")


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_fake_hub(monkeypatch, tmp_path) as server:
        server.repos[REPO] = dict(FILES)
        yield server


@pytest.fixture
def folder(remote: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all files cached; afterwards there is no network."""
    folder = hub.fetch_folder(REPO, PATTERNS)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


def states() -> dict[str, str]:
    return {result.name: result.state for result in verify_files(REPO, PATTERNS)}


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("content", [b"", b"hello\n", bytes(5_000_000)], ids=len)
def test_checksums_are_those_of_sha256_and_git(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    read_sizes: list[int] = []
    assert compute_digest(tmp_path / "file", like="0" * 64, watch=read_sizes.append) == sha256(content)
    assert compute_digest(tmp_path / "file", like="0" * 40) == git_sha1(content)
    assert sum(read_sizes) == len(content)


def test_git_agrees_about_its_own_checksum(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello\n")
    expected = "ce013625030ba8dba906f756967f9e9ca394464a"  # printf 'hello\n' | git hash-object --stdin
    assert compute_digest(tmp_path / "file", like="0" * 40) == expected


@pytest.mark.parametrize("text", ["", "main", "0" * 39, "0" * 41, "0" * 64 + ".incomplete", "G" * 64, "../" + "0" * 61])
def test_other_names_are_not_checksums(text: str) -> None:
    assert not is_digest(text)
    assert is_digest("0" * 40)
    assert is_digest("a" * 64)


def test_complete_downloads_verify_without_a_network(folder: Path) -> None:
    assert states() == dict.fromkeys(FILES, OK)


@pytest.mark.parametrize("name", ["text_encoder/1.safetensors", "text_encoder/config.json"], ids=["large", "small"])
def test_a_changed_byte_is_reported_with_both_checksums(folder: Path, name: str) -> None:
    corrupt(folder / name)
    assert states() == {**dict.fromkeys(FILES, OK), name: DAMAGED}
    (damaged,) = [result for result in verify_files(REPO, PATTERNS) if result.state == DAMAGED]
    assert damaged.path == folder / name
    assert (damaged.expected_digest, damaged.actual_digest) == (
        digest(name, FILES[name]),
        digest(name, (folder / name).read_bytes()),
    )


def test_files_shared_between_repositories_verify_by_their_first_link(folder: Path, tmp_path: Path) -> None:
    blob = (folder / "text_encoder/1.safetensors").resolve()
    shared = tmp_path / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    assert states() == dict.fromkeys(FILES, OK)


def test_deleted_files_are_reported_as_absent(folder: Path) -> None:
    (folder / "text_encoder/1.safetensors").unlink()  # the index still names it
    (folder / "tokenizer/spiece.model").resolve().unlink()  # the link is left
    absent = dict.fromkeys(["text_encoder/1.safetensors", "tokenizer/spiece.model"], ABSENT)
    assert states() == {**dict.fromkeys(FILES, OK), **absent}


def test_a_damaged_index_is_reported_as_damaged(folder: Path) -> None:
    (folder / "text_encoder/x.index.json").write_bytes(b"not json")
    assert states()["text_encoder/x.index.json"] == DAMAGED


def test_an_empty_cache_reports_the_patterns_as_absent(remote: FakeHub) -> None:
    assert states() == dict.fromkeys(PATTERNS, ABSENT)


def test_without_links_the_hub_gives_the_checksums_of_that_revision(
    remote: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda cache_dir=None: False)
    folder = hub.fetch_folder(REPO, PATTERNS)
    assert folder.name == COMMIT
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert states() == dict.fromkeys(FILES, OK)
    corrupt(folder / "text_encoder/2.safetensors")
    assert states() == {**dict.fromkeys(FILES, OK), "text_encoder/2.safetensors": DAMAGED}
    remote.http_error = (500, "")
    assert states() == dict.fromkeys(FILES, UNVERIFIED)
