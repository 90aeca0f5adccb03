"""`kadr models`: lists, fetches and verifies releases. The hub is a server on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kadr.checkpoints import hub
from kadr.cli.commands.models import pull, verify
from kadr.models.registry import (
    DEFAULT_TEXT_ENCODER,
    LTX_VIDEO_REPO,
    RELEASES,
    TEXT_ENCODER_GGUF,
    TEXT_ENCODER_REPO,
    TOKENIZER,
    find_release,
)
from tests import tiny_models
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


def corrupt(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")


@pytest.mark.parametrize("args", [["models"], ["models", "list"]])
def test_list_has_every_name_with_its_kind(kadr: Run, args: list[str]) -> None:
    result = kadr(*args)
    assert result.code == 0, result.err
    header, *rows = result.out.splitlines()
    assert header.split() == ["name", "kind", "version", "bytes", "on", "disk", "licence"]
    assert [row.split()[0] for row in rows] == [release.name for release in RELEASES]
    assert all(release.kind in row for release, row in zip(RELEASES, rows, strict=True))
    assert "kadr models pull NAME" in result.err
    assert "kadr generate --model" in result.err


def test_list_shows_sizes_of_what_is_on_disk(kadr: Run, remote: FakeHub) -> None:
    kadr("models", "pull", NAME)
    for args in (["models", "--json"], ["models", "list", "--json"]):
        entries = {entry["name"]: entry for entry in json.loads(kadr(*args).out)}
        on_disk = {name for name, entry in entries.items() if entry["on_disk"] and entry["repo"]}
        assert on_disk == {NAME, UPSCALER, DEFAULT_TEXT_ENCODER, TOKENIZER}
        assert entries[NAME]["bytes"] == len(FILES[MODEL_FILE])
        assert entries[DEFAULT_TEXT_ENCODER]["bytes"] == sum(map(len, TEXT_FILES.values()))
        assert (entries[UPSCALER]["kind"], entries[UPSCALER]["repo"]) == ("spatial upscaler", LTX_VIDEO_REPO)
        assert entries["ltxv-13b-0.9.8-dev"]["bytes"] == 28_579_000_000


def test_list_marks_a_file_of_the_wrong_size(kadr: Run, remote: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_state() -> str:
        row = next(row for row in kadr("models").out.splitlines() if row.startswith(f"{NAME} "))
        return row[row.index("model") :]

    assert " no " in disk_state()
    kadr("models", "pull", NAME)
    assert " wrong size " in disk_state()
    monkeypatch.setattr(verify, "has_wrong_size", lambda entry, size: False)
    assert " yes " in disk_state()


@pytest.mark.parametrize("share, is_wrong", [(0.5, True), (0.98, True), (0.995, False), (1.005, False), (1.02, True)])
def test_sizes_may_differ_by_one_percent(share: float, is_wrong: bool) -> None:
    entry = find_release(NAME)
    assert verify.has_wrong_size(entry, round(share * (entry.size_bytes or 0))) is is_wrong
    assert not verify.has_wrong_size(find_release("demo"), 1)


def test_pull_fetches_all_a_model_needs_and_prints_paths(kadr: Run, remote: FakeHub) -> None:
    result = kadr("models", "pull", NAME)
    assert result.code == 0, result.err
    model, upscaler, text_encoder = map(Path, result.out.splitlines())
    assert model.read_bytes() == FILES[MODEL_FILE]
    assert upscaler.read_bytes() == FILES[f"{UPSCALER}.safetensors"]
    assert {name: (text_encoder / name).read_bytes() for name in TEXT_FILES} == TEXT_FILES
    assert sorted(name for name, _ in remote.sent_files) == sorted([MODEL_FILE, f"{UPSCALER}.safetensors", *TEXT_FILES])
    # Printed before: licences, files to fetch, and their total size.
    lines = result.err.splitlines()
    assert f"licence of {NAME}, {UPSCALER}: {find_release(NAME).licence}" in lines
    assert f"licence of {DEFAULT_TEXT_ENCODER}: Apache-2.0" in lines
    assert f"{NAME} is to be fetched: 3.5 k bytes" in lines
    assert "total: 6.31 k bytes" in lines


def test_pull_fetches_nothing_that_is_on_disk(kadr: Run, remote: FakeHub, offline: Callable[[], None]) -> None:
    first = kadr("models", "pull", NAME)
    remote.sent_files.clear()
    offline()
    second = kadr("models", "pull", NAME)
    assert (second.code, second.out) == (0, first.out)
    assert remote.sent_files == []
    assert f"{DEFAULT_TEXT_ENCODER} is on disk already" in second.err


def test_pull_fetches_only_missing_components(kadr: Run, remote: FakeHub) -> None:
    assert kadr("models", "pull", DEFAULT_TEXT_ENCODER).code == 0
    remote.sent_files.clear()
    report = json.loads(kadr("models", "pull", NAME, "--json").out)
    assert [(file["name"], file["kind"], file["fetched"]) for file in report["files"]] == [
        (NAME, "model", True),
        (UPSCALER, "spatial upscaler", True),
        (DEFAULT_TEXT_ENCODER, "text encoder", False),
    ]
    assert all(Path(file["path"]).exists() for file in report["files"])
    assert [name for name, _ in remote.sent_files] == [MODEL_FILE, f"{UPSCALER}.safetensors"]


@pytest.mark.parametrize("name", [UPSCALER, TEXT_ENCODER_GGUF])
def test_pull_fetches_a_single_component(kadr: Run, remote: FakeHub, name: str) -> None:
    entry = find_release(name)
    remote.repos.setdefault(entry.repo or "", {})[entry.file] = b"content"
    result = kadr("models", "pull", name)
    assert result.code == 0, result.err
    assert Path(result.out.strip()).read_bytes() == b"content"
    assert remote.sent_files == [(entry.file, 0)]
    assert kadr("models", "verify", name).code == 0


def test_pull_resumes_an_interrupted_download(kadr: Run, remote: FakeHub) -> None:
    remote.truncations[MODEL_FILE], remote.hangs_after_cut = 1, True
    result = kadr("models", "pull", NAME)
    assert (result.code, result.out) == (1, "")
    assert f"error: {MODEL_FILE} of {LTX_VIDEO_REPO} is not in the cache" in result.err
    remote.revive()
    resumed = kadr("models", "pull", NAME)
    assert resumed.code == 0, resumed.err
    assert f"{NAME} is to be fetched: 3.5 k bytes, 1.54 k of which are on disk already" in resumed.err
    assert [offset for name, offset in remote.sent_files if name == MODEL_FILE] == [0, 1536]
    assert Path(resumed.out.splitlines()[0]).read_bytes() == FILES[MODEL_FILE]


def test_pull_refuses_a_damaged_download(kadr: Run, remote: FakeHub) -> None:
    remote.corrupted_files[MODEL_FILE] = bytes(len(FILES[MODEL_FILE]))
    result = kadr("models", "pull", NAME)
    assert (result.code, result.out) == (1, "")
    assert f"{MODEL_FILE} of {LTX_VIDEO_REPO} arrived damaged" in result.err
    assert hub.cached_file(LTX_VIDEO_REPO, MODEL_FILE) is None


def test_pull_refuses_a_damaged_file_on_disk(kadr: Run, remote: FakeHub) -> None:
    model = Path(kadr("models", "pull", NAME).out.splitlines()[0])
    corrupt(model)
    result = kadr("models", "pull", NAME)
    assert result.code == 1
    assert f"Delete {model.resolve()} and run `kadr models pull {NAME}`." in result.err
    model.resolve().unlink()
    assert kadr("models", "pull", NAME).code == 0
    assert model.read_bytes() == FILES[MODEL_FILE]


def test_pull_checks_disk_space_before_it_fetches(kadr: Run, remote: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    kadr("models", "pull", DEFAULT_TEXT_ENCODER)
    remote.sent_files.clear()
    checked_bytes: list[int] = []
    monkeypatch.setattr(pull.hub, "check_disk_space", lambda what, needed: checked_bytes.append(needed))
    assert kadr("models", "pull", NAME).code == 0
    assert checked_bytes[0] == len(FILES[MODEL_FILE]) + len(FILES[f"{UPSCALER}.safetensors"])


def test_pull_without_a_network_is_explained(kadr: Run, remote: FakeHub, offline: Callable[[], None]) -> None:
    offline()
    result = kadr("models", "pull", NAME)
    assert (result.code, result.out) == (1, "")
    assert len(result.err.splitlines()) == 1
    assert "could not be fetched" in result.err
    assert "give its path instead of a name" in result.err


def test_pull_from_a_repository_that_is_gone_is_explained(kadr: Run, remote: FakeHub) -> None:
    del remote.repos[TEXT_ENCODER_REPO]
    result = kadr("models", "pull", NAME)
    assert result.code == 1
    assert f"there is no repository {TEXT_ENCODER_REPO} on the hub" in result.err
    assert remote.sent_files == []


@pytest.mark.parametrize("verb", ["pull", "verify"])
def test_unknown_name_gets_a_suggestion(kadr: Run, verb: str) -> None:
    result = kadr("models", verb, "ltxv-2b-0.9.8-distiled")
    assert (result.code, result.out) == (1, "")
    assert f"Did you mean {NAME}" in result.err


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
    result = kadr("models", "verify", NAME)
    assert (result.code, result.err) == (0, "")
    rows = [row.split() for row in result.out.splitlines()]
    assert rows[0] == ["file", "of", "state"]
    assert [(file, name, state) for file, name, state in rows[1:]] == [
        (MODEL_FILE, NAME, "ok"),
        (f"{UPSCALER}.safetensors", UPSCALER, "ok"),
        *((file, DEFAULT_TEXT_ENCODER, "ok") for file in TEXT_FILES),
    ]


def test_verify_names_a_damaged_file_with_checksums_and_remedy(kadr: Run, remote: FakeHub) -> None:
    text_encoder = Path(kadr("models", "pull", NAME).out.splitlines()[2])
    damaged = text_encoder / "text_encoder/model.safetensors"
    corrupt(damaged)
    expected, actual = (
        digest(damaged.name, TEXT_FILES["text_encoder/model.safetensors"]),
        digest(damaged.name, damaged.read_bytes()),
    )
    result = kadr("models", "verify", NAME)
    assert result.code == 1
    assert "damaged" in next(row for row in result.out.splitlines() if row.startswith("text_encoder/model.safetensors"))
    (line,) = result.err.splitlines()
    assert line.startswith(f"error: {damaged} is damaged: its checksum is {actual}, and the hub's is {expected}.")
    assert line.endswith(f"Delete {damaged.resolve()} and run `kadr models pull {DEFAULT_TEXT_ENCODER}`.")
    report = json.loads(kadr("models", "verify", NAME, "--json").out)
    (file,) = [file for file in report["files"] if file["state"] == "damaged"]
    assert (file["of"], file["path"]) == (DEFAULT_TEXT_ENCODER, str(damaged))
    assert (file["expected_digest"], file["actual_digest"]) == (expected, actual)


def test_verify_reports_a_truncated_file(kadr: Run, remote: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(kadr("models", "pull", NAME).out.splitlines()[0])
    entry = replace(find_release(NAME), size_bytes=len(FILES[MODEL_FILE]))
    monkeypatch.setitem(verify.find_release.__globals__["RELEASES_BY_NAME"], NAME, entry)
    assert kadr("models", "verify", NAME).code == 0
    model.resolve().write_bytes(FILES[MODEL_FILE][:1000])
    result = kadr("models", "verify", NAME)
    assert result.code == 1
    assert f"{model} is damaged, cut short to 1 k of 3.5 k bytes: " in result.err


def test_verify_requires_the_model_but_not_its_components(kadr: Run, remote: FakeHub) -> None:
    result = kadr("models", "verify", NAME)
    assert result.code == 1
    assert [row.split()[0] for row in result.out.splitlines()[1:]] == [
        MODEL_FILE,
        f"{UPSCALER}.safetensors",
        "text_encoder/*",
        "tokenizer/*",
    ]
    assert f"`kadr models pull {NAME}` fetches it" in result.err
    hub.fetch(LTX_VIDEO_REPO, MODEL_FILE)
    result = kadr("models", "verify", NAME)  # the text encoder may be a path of the user's
    assert (result.code, result.err) == (0, "")
    assert result.out.count("not on disk") == 3


def test_verify_without_links_and_network_is_explained(
    kadr: Run, remote: FakeHub, offline: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda cache_dir=None: False)
    assert kadr("models", "pull", UPSCALER).code == 0
    assert kadr("models", "verify", UPSCALER).code == 0
    offline()
    result = kadr("models", "verify", UPSCALER)
    assert result.code == 1
    assert "not verified" in result.out
    assert "is not what it should be: cut short to 800 of 505 M bytes" in result.err
    monkeypatch.setattr(verify, "has_wrong_size", lambda entry, size: False)
    assert "has the right size" in (err := kadr("models", "verify", UPSCALER).err)
    assert "Try again with a network." in err


def test_help_of_models_names_every_verb(kadr: Run) -> None:
    result = kadr("models", "--help")
    assert result.code == 0
    assert all(verb in result.out for verb in ("list", "pull", "verify"))
    assert kadr("models", "pull").code == 2


def test_list_shows_models_in_folders_and_goes_on_after_broken_ones(kadr: Run, tmp_path: Path) -> None:
    tiny_models.write_model(tmp_path / "checkpoints" / "sub")
    broken = tmp_path / "loras" / "a\x1b[31m.safetensors"
    broken.parent.mkdir()
    broken.write_bytes(b"")
    (tmp_path / "loras" / "b.safetensors").write_bytes(b"no header")
    for args in (["models"], ["models", "list"]):
        result = kadr(*args, "--models-dir", tmp_path)
        assert result.code == 0, result.err
        assert "\x1b" not in result.out
        rows = result.out.split("\n\n")[1].splitlines()
        assert [row.split()[:2] for row in rows[1:]] == [
            ["sub/model.safetensors", "checkpoints"],
            ["sub/text_encoder", "checkpoints"],
            ["a\\x1b[31m.safetensors", "loras"],
            ["b.safetensors", "loras"],
        ]
        assert "is not a safetensors file" in rows[-1]
    entries = json.loads(kadr("models", "--models-dir", tmp_path, "--json").out)[len(RELEASES) :]
    assert [(entry["name"], entry["dtype"], bool(entry["problem"])) for entry in entries] == [
        ("sub/model.safetensors", "float32", False),
        ("sub/text_encoder", None, True),  # it belongs into a folder of encoders
        ("a\x1b[31m.safetensors", None, True),
        ("b.safetensors", None, True),
    ]


def test_configured_folder_that_is_gone_is_a_warning(kadr: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KADR_MODELS", "/nowhere")
    result = kadr("models")
    assert result.code == 0
    assert "warning: /nowhere is configured as a folder of models, and has none in it now" in result.err
