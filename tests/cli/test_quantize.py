"""`kadr quantize`: writes a smaller file; its path goes to stdout and everything else to stderr."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kadr import Engine
from kadr.checkpoints import hub
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.gguf.convert import transformer_to_gguf
from kadr.checkpoints.gguf.origins import VAE_FIELD, ComponentOrigin
from kadr.checkpoints.source import Source
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError
from kadr.models.registry import DEFAULT_TEXT_ENCODER, TEXT_ENCODER_GGUF, find_release
from kadr.quant.mixes import MIX_NAMES, find_mix
from kadr.schema import GGUF
from kadr.spec.locate import MODEL, PACKAGE_ROOT, locate, locate_text_encoder
from tests import tiny_models
from tests.cli.conftest import CommandResult

Run = Callable[..., CommandResult]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> list[tuple[str, ...]]:
    """The fetched files, from a fake hub that has the tiny model under every name."""
    fetched: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        hub, "fetch", lambda repo, file: fetched.append((repo, file)) or model_folder / tiny_models.MODEL_FILE
    )
    monkeypatch.setattr(hub, "fetch_folder", lambda repo, patterns: fetched.append((repo, *patterns)) or model_folder)
    return fetched


def test_a_model_is_written_and_its_path_printed(kadr: Run, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    result = kadr("quantize", model_folder / tiny_models.MODEL_FILE, out, "--type", "q8_0")
    assert (result.code, result.out) == (0, f"{out}\n"), result.err
    official, ours = Checkpoint.open(model_folder / tiny_models.MODEL_FILE), Checkpoint.open(out)
    assert ours.info.transformer == official.info.transformer
    assert list(ours.sources) == ["transformer"]
    lines = result.err.splitlines()
    assert lines[0].startswith(f"quantize: {len(ours.sources['transformer'].infos)} of ")
    assert "bytes before, " in lines[1]
    assert "Q8_0 (" in lines[1]
    assert lines[2] == (
        f"the VAE is not in this file, which remembers it: {model_folder / tiny_models.MODEL_FILE}; and its text "
        f"encoder: {model_folder}"
    )


def test_inspect_describes_the_quantized_file(kadr: Run, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    kadr("quantize", model_folder / tiny_models.MODEL_FILE, out, "--type", "Q8_0")
    result = kadr("inspect", out)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("LTX-Video ")
    assert lines[0].endswith(", GGUF")
    assert "Q8_0 (" in lines[3]
    assert "float32 (" in lines[3]
    assert f"missing: vae (taken from {model_folder / tiny_models.MODEL_FILE})" in lines
    assert f"missing: text encoder (taken from {model_folder})" in lines
    description = json.loads(kadr("inspect", out, "--json").out)
    (component,) = description["components"]
    assert (description["layout"], component["type_counts"]) == ("GGUF", Source.open(out).type_counts)
    assert component["dtype"] == next(iter(component["type_counts"]))
    assert sum(component["type_counts"].values()) == component["num_tensors"]


@pytest.mark.parametrize("source", [".", "text_encoder"])
def test_a_text_encoder_is_written_with_its_tokenizer(
    kadr: Run, model_folder: Path, tmp_path: Path, source: str
) -> None:
    out = tmp_path / "t5.gguf"
    result = kadr("quantize", model_folder / source, out, "--type", "BF16")
    assert (result.code, result.out) == (0, f"{out}\n"), result.err
    assert "VAE" not in result.err
    assert (
        TextEncoderCheckpoint.open(out).load_tokenizer().vocab_size
        == TextEncoderCheckpoint.open(model_folder).load_tokenizer().vocab_size
    )
    inspected = kadr("inspect", out)
    assert inspected.out.splitlines()[0] == "T5 text encoder"
    assert json.loads(kadr("inspect", out, "--json").out)["family"] == "T5"


def test_registry_name_fetches_only_the_model_file(kadr: Run, fetched: list[tuple[str, ...]], tmp_path: Path) -> None:
    name = "ltxv-2b-0.9.6-dev"
    result = kadr("quantize", name, tmp_path / "x.gguf", "--type", "Q8_0")
    # The tiny model is not the named release, so the command fails; but only that file was fetched.
    assert result.code == 1
    assert f"is not {name}: layers: 2, not 28" in result.err
    assert fetched == [(find_release(name).repo, find_release(name).file)]


def test_text_encoder_name_fetches_its_folder(kadr: Run, fetched: list[tuple[str, ...]], tmp_path: Path) -> None:
    result = kadr("quantize", DEFAULT_TEXT_ENCODER, tmp_path / "t5.gguf", "--type", "Q8_0")
    assert result.code == 0, result.err
    assert fetched == [(find_release(DEFAULT_TEXT_ENCODER).repo, *find_release(DEFAULT_TEXT_ENCODER).file_patterns)]


def test_quantized_demo_stores_its_registry_name(kadr: Run, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    assert kadr("quantize", "demo-distilled", out, "--type", "BF16").code == 0
    assert json.loads(kadr("inspect", out, "--json").out)["registry_name"] == "demo-distilled"


@pytest.mark.parametrize(
    "source, message",
    [
        ("ltxv-spatial-upscaler-0.9.8", "is a spatial upscaler"),
        ("ltxv-13b-0.9.7-ic-lora-canny", "is a LoRA"),
        (
            TEXT_ENCODER_GGUF,
            f"quantized already; quantizing it again loses precision twice. Use {DEFAULT_TEXT_ENCODER}",
        ),
        ("ltxv-2b-0.9.55", "there is no model named"),
        ("absent.safetensors", "does not exist"),
    ],
)
def test_bad_input_is_refused_before_anything_is_fetched(
    kadr: Run, fetched: list[tuple[str, ...]], tmp_path: Path, source: str, message: str
) -> None:
    result = kadr("quantize", source, tmp_path / "x.gguf", "--type", "Q8_0")
    assert (result.code, result.out, len(result.err.splitlines())) == (1, "", 1)
    assert message in result.err
    assert fetched == []
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "args, message",
    [
        (["--type", "IQ4_XS"], "'IQ4_XS' is not one of F32, F16, BF16, Q8_0"),
        ([], "--type"),
        (["more", "--type", "Q8_0"], "more"),
    ],
)
def test_bad_usage_ends_with_2_and_is_explained(
    kadr: Run, model_folder: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    result = kadr("quantize", model_folder / tiny_models.MODEL_FILE, tmp_path / "x.gguf", *args)
    assert result.code == 2
    assert message in result.err


def test_other_suffixes_are_bad_usage(kadr: Run, model_folder: Path, tmp_path: Path) -> None:
    result = kadr("quantize", model_folder / tiny_models.MODEL_FILE, tmp_path / "x.safetensors", "--type", "Q8_0")
    assert result.code == 2
    assert "must end in .gguf" in result.err


def test_help_names_every_type(kadr: Run) -> None:
    help_text = " ".join(kadr("quantize", "--help").out.split())
    assert ", ".join(MIX_NAMES) in help_text


def test_existing_output_is_replaced_only_with_force(kadr: Run, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_text("older")
    result = kadr("quantize", model_folder / tiny_models.MODEL_FILE, out, "--type", "Q8_0")
    assert result.code == 1
    assert "exists already. Pass --force" in result.err
    assert out.read_text() == "older"
    assert kadr("quantize", model_folder / tiny_models.MODEL_FILE, out, "--type", "Q8_0", "--force").code == 0
    assert Checkpoint.open(out).info.layout == "GGUF"


@pytest.mark.parametrize("kind", ["itself", "symbolic link", "hard link"])
def test_output_that_is_the_input_is_refused_before_quantizing(
    kadr: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = tmp_path / "x.gguf"
    assert kadr("quantize", model_folder / tiny_models.MODEL_FILE, source, "--type", "F16").code == 0
    content, out = source.read_bytes(), tmp_path / "y.gguf"
    if kind == "itself":
        out = source
    elif kind == "symbolic link":
        out.symlink_to(source)
    else:
        os.link(source, out)
    monkeypatch.setattr("kadr.checkpoints.gguf.convert.write_gguf", None)
    for force in ([], ["--force"]):
        result = kadr("quantize", source, out, "--type", "Q8_0", *force)
        assert (result.code, result.out, len(result.err.splitlines())) == (1, "", 1)
        assert f"{out} is {'the input' if out == source else f'a link to the input {source}'}" in result.err
    assert source.read_bytes() == content


def test_cancelling_leaves_no_file(
    kadr: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kadr.checkpoints.gguf.writer.release_pages", interrupt)
    result = kadr("quantize", model_folder / tiny_models.MODEL_FILE, tmp_path / "x.gguf", "--type", "Q8_0")
    assert (result.code, result.out) == (130, "")
    assert "cancelled" in result.err
    assert os.listdir(tmp_path) == []


def printed_command(result: CommandResult) -> list[str]:
    """Returns the arguments of the command that `kadr quantize` ended by printing, for a shell."""
    name, *args = shlex.split(result.err.splitlines()[-1].removeprefix("use it: "))
    assert name == "kadr"
    return args


@pytest.mark.parametrize("model", ["demo", "demo-distilled"])
def test_printed_command_makes_a_video(kadr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my models").mkdir()
    args = printed_command(kadr("quantize", model, "my models/x.gguf", "--type", "Q8_0"))
    result = kadr(*args, "--steps", "1", "--single-pass", "--size", "64x64", "--frames", "9")
    assert (result.code, result.out) == (0, "out.mp4\n"), result.err


def test_printed_command_for_a_text_encoder_makes_a_video(
    kadr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = printed_command(kadr("quantize", PACKAGE_ROOT / "assets" / "demo", "t5.gguf", "--type", "Q8_0"))
    assert args[-4:] == ["--model", "demo", "--text-encoder", "t5.gguf"]
    result = kadr(*args, "--steps", "1", "--size", "64x64", "--frames", "9")
    assert (result.code, result.out) == (0, "out.mp4\n"), result.err


def quantized(kadr: Run, model: Path, out: Path) -> Path:
    result = kadr("quantize", model, out, "--type", "F16")
    assert result.code == 0, result.err
    return out


def test_remembered_files_are_found_wherever_the_gguf_is(kadr: Run, model_folder: Path, tmp_path: Path) -> None:
    out = quantized(kadr, model_folder / tiny_models.MODEL_FILE, tmp_path / "x.gguf")
    (tmp_path / "elsewhere").mkdir()
    moved = out.rename(tmp_path / "elsewhere" / "y.gguf")
    spec = Engine.open(moved, device="cpu").spec
    assert spec.vae_checkpoint.path == model_folder / tiny_models.MODEL_FILE
    assert spec.text_encoder_checkpoint.tokenizer_root == model_folder
    again = quantized(kadr, moved, tmp_path / "z.gguf")  # carried over
    assert Engine.open(again, device="cpu").spec.vae_checkpoint.path == model_folder / tiny_models.MODEL_FILE


def test_files_that_moved_beside_the_gguf_are_found(kadr: Run, tmp_path: Path) -> None:
    old = tiny_models.write_model(tmp_path / "old")
    out = quantized(kadr, old / tiny_models.MODEL_FILE, old / "x.gguf")
    new = old.rename(tmp_path / "new")
    spec = Engine.open(new / out.name, device="cpu").spec
    assert spec.vae_checkpoint.path == new / tiny_models.MODEL_FILE
    assert spec.text_encoder_checkpoint.tokenizer_root == new


@pytest.mark.parametrize("role, flag", [("VAE", "--vae"), ("text encoder", "--text-encoder")])
def test_error_names_what_the_file_wanted_and_the_flag(kadr: Run, tmp_path: Path, role: str, flag: str) -> None:
    model = tiny_models.write_model(tmp_path / "old")
    out = quantized(kadr, model / tiny_models.MODEL_FILE, tmp_path / "x.gguf")
    vae = tmp_path / "vae.safetensors"
    shutil.copy(model / tiny_models.MODEL_FILE, vae)
    shutil.rmtree(model)
    options = {"--text-encoder": ["--vae", vae], "--vae": []}[flag]
    result = kadr("generate", "a red circle", "--model", out, "--dry-run", *options)
    wanted = model / tiny_models.MODEL_FILE if flag == "--vae" else model
    assert result.code == 1
    assert (
        f"{out} takes its {role} from {wanted}, which is not there. Put it back, or give one with {flag}." in result.err
    )


def test_file_of_an_older_schema_remembers_nothing(kadr: Run, model_folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(model_folder / tiny_models.MODEL_FILE)
    transformer_to_gguf(checkpoint, tmp_path / "x.gguf", find_mix("F16"))
    assert Checkpoint.open(tmp_path / "x.gguf").describe().origins == {}
    assert GGUF.upgrade({"kadr.schema": 1, "config": "{}"}) == {"kadr.schema": 2, "config": "{}"}


@pytest.mark.parametrize("name", ["no-such-release", "demo-lora-teal", "demo-upscaler"])
def test_remembered_name_that_is_no_model_is_refused(model_folder: Path, tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(model_folder / tiny_models.MODEL_FILE)
    origins = {VAE_FIELD: ComponentOrigin(name=name)}
    transformer_to_gguf(checkpoint, tmp_path / "x.gguf", find_mix("F16"), origins=origins)
    with pytest.raises(CheckpointError, match=f"takes its VAE from {name}, which this kadr does not know"):
        Engine.open(tmp_path / "x.gguf", text_encoder=model_folder, device="cpu")


@pytest.mark.parametrize("path", ["//server/share/x.safetensors", "\\\\server\\x.safetensors", "pipe", "/dev/zero"])
def test_remembered_path_is_only_a_local_file_or_folder(model_folder: Path, tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    checkpoint = Checkpoint.open(model_folder / tiny_models.MODEL_FILE)
    origins = {VAE_FIELD: ComponentOrigin(path=path)}
    transformer_to_gguf(checkpoint, tmp_path / "x.gguf", find_mix("F16"), origins=origins)
    with pytest.raises(CheckpointError, match=r"takes its VAE from .*, which is not there"):
        Engine.open(tmp_path / "x.gguf", text_encoder=model_folder, device="cpu")


@pytest.mark.parametrize("name, encoder", [("demo", "demo"), ("ltxv-2b-0.9.6-dev", DEFAULT_TEXT_ENCODER)])
def test_text_encoder_takes_the_name_of_a_model(name: str, encoder: str) -> None:
    component = locate_text_encoder(name, locate("demo-distilled", MODEL), None)
    assert component.name == encoder
    assert component.path == (PACKAGE_ROOT / "assets" / "demo" if name == "demo" else None)


def test_model_without_vae_asks_for_one(kadr: Run, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    checkpoint = Checkpoint.open(model_folder / tiny_models.MODEL_FILE)
    transformer_to_gguf(checkpoint, out, find_mix("F16"))
    args = ["generate", "a red circle", "--model", out, "--text-encoder", model_folder, "--output", tmp_path / "x.mp4"]
    for dry_run in ([], ["--dry-run"]):
        result = kadr(*args, *dry_run)
        assert result.code == 1
        assert f"{out} has no vae, only transformer. Give a checkpoint with a VAE as --vae, such as " in result.err
    assert kadr(*args, "--dry-run", "--vae", model_folder / tiny_models.MODEL_FILE).code == 0
