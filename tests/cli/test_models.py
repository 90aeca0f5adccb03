"""`kadr models`: what can be named, fetched and checked. The hub is a server on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kadr.checkpoints import hub
from kadr.cli.commands import pull, verify
from kadr.models.registry import (
    DEFAULT_TEXT_ENCODER,
    LTX_VIDEO_REPO,
    RELEASES,
    TEXT_ENCODER_GGUF,
    TEXT_ENCODER_REPO,
    find_release,
)
from tests.cli.conftest import CommandResult
from tests.fakehub import FakeHub, digest, serve_fake_hub

Run = Callable[..., CommandResult]
NAME, UPSCALER = "ltxv-2b-0.9.8-distilled", "ltxv-spatial-upscaler-0.9.8"
FILES = {f"{NAME}.safetensors": b"weights" * 500, f"{UPSCALER}.safetensors": b"upscaler" * 100, "README.md": b"read me"}
TEXT_FILES = {
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors": b"t5" * 1000,
    "tokenizer/spiece.model": b"pieces",
}
MODEL_FILE = f"{NAME}.safetensors"


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_fake_hub(monkeypatch, tmp_path / "hub") as server:
        server.repos[LTX_VIDEO_REPO] = dict(FILES)
        server.repos[TEXT_ENCODER_REPO] = {**TEXT_FILES, "transformer/model.safetensors": b"of another model"}
        yield server


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def spoil(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")


@pytest.mark.parametrize("words", [["models"], ["models", "list"]])
def test_list_has_every_name_with_its_kind(kadr: Run, words: list[str]) -> None:
    ended = kadr(*words)
    assert ended.code == 0, ended.err
    head, *rows = ended.out.splitlines()
    assert head.split() == ["name", "kind", "version", "bytes", "on", "disk", "licence"]
    assert [row.split()[0] for row in rows] == [released.name for released in RELEASES]
    assert all(released.kind in row for released, row in zip(RELEASES, rows, strict=True))
    assert "kadr models pull NAME" in ended.err
    assert "kadr generate --model" in ended.err


def test_list_says_what_is_on_disk_and_how_large_it_is(kadr: Run, remote: FakeHub) -> None:
    kadr("models", "pull", NAME)
    for words in (["models", "--json"], ["models", "list", "--json"]):
        entries = {entry["name"]: entry for entry in json.loads(kadr(*words).out)}
        here = {name for name, entry in entries.items() if entry["on_disk"] and entry["repo"]}
        assert here == {NAME, UPSCALER, DEFAULT_TEXT_ENCODER}
        assert entries[NAME]["bytes"] == len(FILES[MODEL_FILE])
        assert entries[DEFAULT_TEXT_ENCODER]["bytes"] == sum(map(len, TEXT_FILES.values()))
        assert (entries[UPSCALER]["kind"], entries[UPSCALER]["repo"]) == ("spatial upscaler", LTX_VIDEO_REPO)
        assert entries["ltxv-13b-0.9.8-dev"]["bytes"] == 28_579_000_000


def test_list_shows_a_file_of_another_size_than_the_registry_states(
    kadr: Run, remote: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cell() -> str:
        row = next(row for row in kadr("models").out.splitlines() if row.startswith(f"{NAME} "))
        return row[row.index("model") :]

    assert " no " in cell()
    kadr("models", "pull", NAME)
    assert " wrong size " in cell()
    monkeypatch.setattr(verify, "has_wrong_size", lambda entry, size: False)
    assert " yes " in cell()


@pytest.mark.parametrize("share, wrong", [(0.5, True), (0.98, True), (0.995, False), (1.005, False), (1.02, True)])
def test_sizes_are_right_to_within_a_percent(share: float, wrong: bool) -> None:
    entry = find_release(NAME)
    assert verify.has_wrong_size(entry, round(share * (entry.size_bytes or 0))) is wrong
    assert not verify.has_wrong_size(find_release("demo"), 1)


def test_pull_brings_all_that_a_model_needs_and_prints_where_it_lies(kadr: Run, remote: FakeHub) -> None:
    ended = kadr("models", "pull", NAME)
    assert ended.code == 0, ended.err
    model, upscaler, text = map(Path, ended.out.splitlines())
    assert model.read_bytes() == FILES[MODEL_FILE]
    assert upscaler.read_bytes() == FILES[f"{UPSCALER}.safetensors"]
    assert {name: (text / name).read_bytes() for name in TEXT_FILES} == TEXT_FILES
    assert sorted(name for name, _ in remote.sent_files) == sorted([MODEL_FILE, f"{UPSCALER}.safetensors", *TEXT_FILES])
    # Said before: licences, what is to come, and how much that is together.
    said = ended.err.splitlines()
    assert f"licence of {NAME}, {UPSCALER}: {find_release(NAME).licence}" in said
    assert f"licence of {DEFAULT_TEXT_ENCODER}: Apache-2.0" in said
    assert f"{NAME} is to be fetched: 3.5 k bytes" in said
    assert "together 6.31 k bytes" in said


def test_pull_leaves_alone_what_is_there(kadr: Run, remote: FakeHub, offline: Callable[[], None]) -> None:
    first = kadr("models", "pull", NAME)
    remote.sent_files.clear()
    offline()
    again = kadr("models", "pull", NAME)
    assert (again.code, again.out) == (0, first.out)
    assert remote.sent_files == []
    assert f"{DEFAULT_TEXT_ENCODER} is there already" in again.err


def test_pull_takes_only_what_is_missing(kadr: Run, remote: FakeHub) -> None:
    assert kadr("models", "pull", DEFAULT_TEXT_ENCODER).code == 0
    remote.sent_files.clear()
    told = json.loads(kadr("models", "pull", NAME, "--json").out)
    assert [(file["name"], file["kind"], file["fetched"]) for file in told["files"]] == [
        (NAME, "model", True),
        (UPSCALER, "spatial upscaler", True),
        (DEFAULT_TEXT_ENCODER, "text encoder", False),
    ]
    assert all(Path(file["path"]).exists() for file in told["files"])
    assert [name for name, _ in remote.sent_files] == [MODEL_FILE, f"{UPSCALER}.safetensors"]


@pytest.mark.parametrize("name", [UPSCALER, TEXT_ENCODER_GGUF])
def test_pull_brings_a_part_alone(kadr: Run, remote: FakeHub, name: str) -> None:
    entry = find_release(name)
    remote.repos.setdefault(entry.repo or "", {})[entry.file] = b"part"
    ended = kadr("models", "pull", name)
    assert ended.code == 0, ended.err
    assert Path(ended.out.strip()).read_bytes() == b"part"
    assert remote.sent_files == [(entry.file, 0)]
    assert kadr("models", "verify", name).code == 0


def test_pull_that_broke_off_says_what_came_before_and_goes_on(kadr: Run, remote: FakeHub) -> None:
    remote.truncations[MODEL_FILE], remote.hangs_after_cut = 1, True
    ended = kadr("models", "pull", NAME)
    assert (ended.code, ended.out) == (1, "")
    assert f"error: {MODEL_FILE} of {LTX_VIDEO_REPO} is not in the cache" in ended.err
    remote.revive()
    again = kadr("models", "pull", NAME)
    assert again.code == 0, again.err
    assert f"{NAME} is to be fetched: 3.5 k bytes, 1.54 k of which have come before" in again.err
    assert [begin for name, begin in remote.sent_files if name == MODEL_FILE] == [0, 1536]
    assert Path(again.out.splitlines()[0]).read_bytes() == FILES[MODEL_FILE]


def test_pull_refuses_what_comes_damaged(kadr: Run, remote: FakeHub) -> None:
    remote.corrupted_files[MODEL_FILE] = bytes(len(FILES[MODEL_FILE]))
    ended = kadr("models", "pull", NAME)
    assert (ended.code, ended.out) == (1, "")
    assert f"{MODEL_FILE} of {LTX_VIDEO_REPO} arrived damaged" in ended.err
    assert hub.cached_file(LTX_VIDEO_REPO, MODEL_FILE) is None


def test_pull_refuses_what_is_there_and_damaged(kadr: Run, remote: FakeHub) -> None:
    model = Path(kadr("models", "pull", NAME).out.splitlines()[0])
    spoil(model)
    ended = kadr("models", "pull", NAME)
    assert ended.code == 1
    assert f"Delete {model.resolve()} and run `kadr models pull {NAME}`." in ended.err
    model.resolve().unlink()
    assert kadr("models", "pull", NAME).code == 0
    assert model.read_bytes() == FILES[MODEL_FILE]


def test_pull_notices_a_full_disk_before_anything_comes(
    kadr: Run, remote: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    kadr("models", "pull", DEFAULT_TEXT_ENCODER)
    remote.sent_files.clear()
    room: list[int] = []
    monkeypatch.setattr(pull.hub, "check_disk_space", lambda what, needed: room.append(needed))
    assert kadr("models", "pull", NAME).code == 0
    assert room[0] == len(FILES[MODEL_FILE]) + len(FILES[f"{UPSCALER}.safetensors"])


def test_pull_without_a_network_is_explained(kadr: Run, remote: FakeHub, offline: Callable[[], None]) -> None:
    offline()
    ended = kadr("models", "pull", NAME)
    assert (ended.code, ended.out) == (1, "")
    assert len(ended.err.splitlines()) == 1
    assert "could not be fetched" in ended.err
    assert "give its path instead of a name" in ended.err


def test_pull_from_a_repository_that_is_gone_is_explained(kadr: Run, remote: FakeHub) -> None:
    del remote.repos[TEXT_ENCODER_REPO]
    ended = kadr("models", "pull", NAME)
    assert ended.code == 1
    assert f"there is no repository {TEXT_ENCODER_REPO} on the hub" in ended.err
    assert remote.sent_files == []


@pytest.mark.parametrize("verb", ["pull", "verify"])
def test_an_unknown_name_is_answered_with_the_nearest(kadr: Run, verb: str) -> None:
    ended = kadr("models", verb, "ltxv-2b-0.9.8-distiled")
    assert (ended.code, ended.out) == (1, "")
    assert f"Did you mean {NAME}" in ended.err


def test_demo_comes_with_kadr(kadr: Run) -> None:
    pulled = kadr("models", "pull", "demo")
    assert pulled.code == 0, pulled.err
    assert "demo comes with kadr" in pulled.err
    assert all(Path(line).is_file() for line in pulled.out.splitlines())
    verified = kadr("models", "verify", "demo")
    assert verified.code == 0, verified.err
    assert [row.split() for row in verified.out.splitlines()[1:]] == [
        ["demo.safetensors", "demo", "opens"],
        ["text_encoder/model.safetensors", "demo", "opens"],
        ["demo-upscaler.safetensors", "demo-upscaler", "opens"],
    ]


def test_verify_compares_every_file_without_a_network(kadr: Run, remote: FakeHub, offline: Callable[[], None]) -> None:
    kadr("models", "pull", NAME)
    offline()
    ended = kadr("models", "verify", NAME)
    assert (ended.code, ended.err) == (0, "")
    rows = [row.split() for row in ended.out.splitlines()]
    assert rows[0] == ["file", "of", "state"]
    assert [(file, name, state) for file, name, state in rows[1:]] == [
        (MODEL_FILE, NAME, "ok"),
        (f"{UPSCALER}.safetensors", UPSCALER, "ok"),
        *((file, DEFAULT_TEXT_ENCODER, "ok") for file in TEXT_FILES),
    ]


def test_verify_names_a_damaged_file_with_both_checksums_and_the_way_out(kadr: Run, remote: FakeHub) -> None:
    text = Path(kadr("models", "pull", NAME).out.splitlines()[2])
    bad = text / "text_encoder/model.safetensors"
    spoil(bad)
    expected, found = digest(bad.name, TEXT_FILES["text_encoder/model.safetensors"]), digest(bad.name, bad.read_bytes())
    ended = kadr("models", "verify", NAME)
    assert ended.code == 1
    assert "damaged" in next(row for row in ended.out.splitlines() if row.startswith("text_encoder/model.safetensors"))
    (line,) = ended.err.splitlines()
    assert line.startswith(f"error: {bad} is damaged: its checksum is {found}, and the hub's is {expected}.")
    assert line.endswith(f"Delete {bad.resolve()} and run `kadr models pull {DEFAULT_TEXT_ENCODER}`.")
    told = json.loads(kadr("models", "verify", NAME, "--json").out)
    (file,) = [file for file in told["files"] if file["state"] == "damaged"]
    assert (file["of"], file["path"]) == (DEFAULT_TEXT_ENCODER, str(bad))
    assert (file["expected_digest"], file["actual_digest"]) == (expected, found)


def test_verify_says_when_a_file_is_cut_short(kadr: Run, remote: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(kadr("models", "pull", NAME).out.splitlines()[0])
    entry = replace(find_release(NAME), size_bytes=len(FILES[MODEL_FILE]))
    monkeypatch.setitem(verify.find_release.__globals__["RELEASES_BY_NAME"], NAME, entry)
    assert kadr("models", "verify", NAME).code == 0
    model.resolve().write_bytes(FILES[MODEL_FILE][:1000])
    ended = kadr("models", "verify", NAME)
    assert ended.code == 1
    assert f"{model} is damaged, cut short to 1 k of 3.5 k bytes: " in ended.err


def test_verify_wants_the_model_itself_to_be_there(kadr: Run, remote: FakeHub) -> None:
    ended = kadr("models", "verify", NAME)
    assert ended.code == 1
    assert [row.split()[0] for row in ended.out.splitlines()[1:]] == [
        MODEL_FILE,
        f"{UPSCALER}.safetensors",
        "text_encoder/*",
        "tokenizer/*",
    ]
    assert f"`kadr models pull {NAME}` fetches it" in ended.err
    hub.fetch(LTX_VIDEO_REPO, MODEL_FILE)
    ended = kadr("models", "verify", NAME)  # a text encoder may be given by its path
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("not on disk") == 3


def test_verify_without_links_and_network_says_so(
    kadr: Run, remote: FakeHub, offline: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda cache_dir=None: False)
    assert kadr("models", "pull", UPSCALER).code == 0
    assert kadr("models", "verify", UPSCALER).code == 0
    offline()
    ended = kadr("models", "verify", UPSCALER)
    assert ended.code == 1
    assert "not verified" in ended.out
    assert "is not what it should be: cut short to 800 of 505 M bytes" in ended.err
    monkeypatch.setattr(verify, "has_wrong_size", lambda entry, size: False)
    assert "has the right size" in (err := kadr("models", "verify", UPSCALER).err)
    assert "Try again with a network." in err


def test_help_of_the_models_loads_nothing_heavy(kadr: Run) -> None:
    ended = kadr("models", "--help")
    assert ended.code == 0
    assert all(verb in ended.out for verb in ("list", "pull", "verify"))
    assert kadr("models", "pull").code == 2
