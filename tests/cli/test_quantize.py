"""`kadr quantize`: writes a smaller file; its path goes to stdout and everything else to stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kadr.checkpoints import hub
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.source import Source
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.models.registry import DEFAULT_TEXT_ENCODER, TEXT_ENCODER_GGUF, find_release
from kadr.quant.mixes import MIX_NAMES
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
    assert lines[2] == f"the VAE is not in this file: give it with --vae {model_folder / tiny_models.MODEL_FILE}"


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
    assert "missing: vae (give a checkpoint with one as --vae)" in lines
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


def test_model_without_vae_asks_for_one(kadr: Run, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    kadr("quantize", model_folder / tiny_models.MODEL_FILE, out, "--type", "F16")
    args = ["generate", "a red circle", "--model", out, "--text-encoder", model_folder, "--output", tmp_path / "x.mp4"]
    for dry_run in ([], ["--dry-run"]):
        result = kadr(*args, *dry_run)
        assert result.code == 1
        assert f"{out} has no vae, only transformer. Give a checkpoint with a VAE as --vae, such as " in result.err
    assert kadr(*args, "--dry-run", "--vae", model_folder / tiny_models.MODEL_FILE).code == 0
