"""`kadr quantize`: a file in, a smaller file out, its path on stdout and everything else on stderr."""

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
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, home: Path) -> list[tuple[str, ...]]:
    """A hub that holds the tiny model, under every name."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(hub, "fetch", lambda repo, file: asked.append((repo, file)) or home / tiny_models.MODEL_FILE)
    monkeypatch.setattr(hub, "fetch_folder", lambda repo, patterns: asked.append((repo, *patterns)) or home)
    return asked


def test_a_model_is_written_and_its_path_printed(kadr: Run, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    ended = kadr("quantize", home / tiny_models.MODEL_FILE, out, "--type", "q8_0")
    assert (ended.code, ended.out) == (0, f"{out}\n"), ended.err
    official, ours = Checkpoint.open(home / tiny_models.MODEL_FILE), Checkpoint.open(out)
    assert ours.info.transformer == official.info.transformer
    assert list(ours.sources) == ["transformer"]
    lines = ended.err.splitlines()
    assert lines[0].startswith(f"quantize: {len(ours.sources['transformer'].infos)} of ")
    assert "bytes before, " in lines[1]
    assert "Q8_0 (" in lines[1]
    assert lines[2] == f"the VAE is not in this file: give it with --vae {home / tiny_models.MODEL_FILE}"


def test_the_file_is_what_inspect_says(kadr: Run, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    kadr("quantize", home / tiny_models.MODEL_FILE, out, "--type", "Q8_0")
    ended = kadr("inspect", out)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0].startswith("LTX-Video ")
    assert lines[0].endswith(", GGUF")
    assert "Q8_0 (" in lines[3]
    assert "float32 (" in lines[3]
    assert "missing: vae (give a checkpoint with one as --vae)" in lines
    told = json.loads(kadr("inspect", out, "--json").out)
    (component,) = told["components"]
    assert (told["layout"], component["type_counts"]) == ("GGUF", Source.open(out).type_counts)
    assert component["dtype"] == next(iter(component["type_counts"]))
    assert sum(component["type_counts"].values()) == component["num_tensors"]


@pytest.mark.parametrize("given", [".", "text_encoder"])
def test_a_text_encoder_is_written_with_its_tokenizer(kadr: Run, home: Path, tmp_path: Path, given: str) -> None:
    out = tmp_path / "t5.gguf"
    ended = kadr("quantize", home / given, out, "--type", "BF16")
    assert (ended.code, ended.out) == (0, f"{out}\n"), ended.err
    assert "VAE" not in ended.err
    assert (
        TextEncoderCheckpoint.open(out).load_tokenizer().vocab_size
        == TextEncoderCheckpoint.open(home).load_tokenizer().vocab_size
    )
    described = kadr("inspect", out)
    assert described.out.splitlines()[0] == "T5 text encoder"
    assert json.loads(kadr("inspect", out, "--json").out)["family"] == "T5"


def test_a_name_fetches_the_model_alone(kadr: Run, asked: list[tuple[str, ...]], tmp_path: Path) -> None:
    name = "ltxv-2b-0.9.6-dev"
    ended = kadr("quantize", name, tmp_path / "x.gguf", "--type", "Q8_0")
    # The tiny model is not the one that was asked for, which is noticed; but only that file was fetched.
    assert ended.code == 1
    assert f"is not {name}: layers: 2, not 28" in ended.err
    assert asked == [(find_release(name).repo, find_release(name).file)]


def test_the_name_of_a_text_encoder_fetches_it(kadr: Run, asked: list[tuple[str, ...]], tmp_path: Path) -> None:
    ended = kadr("quantize", DEFAULT_TEXT_ENCODER, tmp_path / "t5.gguf", "--type", "Q8_0")
    assert ended.code == 0, ended.err
    assert asked == [(find_release(DEFAULT_TEXT_ENCODER).repo, *find_release(DEFAULT_TEXT_ENCODER).file_patterns)]


def test_the_demo_remembers_its_name(kadr: Run, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    assert kadr("quantize", "demo-distilled", out, "--type", "BF16").code == 0
    assert json.loads(kadr("inspect", out, "--json").out)["registry_name"] == "demo-distilled"


@pytest.mark.parametrize(
    "given, said",
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
def test_what_cannot_be_quantized_is_refused_before_anything_is_fetched(
    kadr: Run, asked: list[tuple[str, ...]], tmp_path: Path, given: str, said: str
) -> None:
    ended = kadr("quantize", given, tmp_path / "x.gguf", "--type", "Q8_0")
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (1, "", 1)
    assert said in ended.err
    assert asked == []
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "words, said",
    [
        (["--type", "IQ4_XS"], "'IQ4_XS' is not one of F32, F16, BF16, Q8_0"),
        ([], "--type"),
        (["more", "--type", "Q8_0"], "more"),
    ],
)
def test_bad_usage_is_told(kadr: Run, home: Path, tmp_path: Path, words: list[str], said: str) -> None:
    ended = kadr("quantize", home / tiny_models.MODEL_FILE, tmp_path / "x.gguf", *words)
    assert ended.code == 2
    assert said in ended.err


def test_another_ending_is_bad_usage(kadr: Run, home: Path, tmp_path: Path) -> None:
    ended = kadr("quantize", home / tiny_models.MODEL_FILE, tmp_path / "x.safetensors", "--type", "Q8_0")
    assert ended.code == 2
    assert "must end in .gguf" in ended.err


def test_help_names_every_type(kadr: Run) -> None:
    told = " ".join(kadr("quantize", "--help").out.split())
    assert ", ".join(MIX_NAMES) in told


def test_what_is_there_is_replaced_only_by_force(kadr: Run, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_text("older")
    ended = kadr("quantize", home / tiny_models.MODEL_FILE, out, "--type", "Q8_0")
    assert ended.code == 1
    assert "exists already. Pass --force" in ended.err
    assert out.read_text() == "older"
    assert kadr("quantize", home / tiny_models.MODEL_FILE, out, "--type", "Q8_0", "--force").code == 0
    assert Checkpoint.open(out).info.layout == "GGUF"


def test_cancelling_leaves_nothing(kadr: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kadr.checkpoints.gguf.writer.release_pages", interrupt)
    ended = kadr("quantize", home / tiny_models.MODEL_FILE, tmp_path / "x.gguf", "--type", "Q8_0")
    assert (ended.code, ended.out) == (130, "")
    assert "cancelled" in ended.err
    assert os.listdir(tmp_path) == []


def test_a_model_without_its_vae_is_sent_for_one(kadr: Run, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    kadr("quantize", home / tiny_models.MODEL_FILE, out, "--type", "F16")
    words = ["generate", "a red circle", "--model", out, "--text-encoder", home, "--output", tmp_path / "x.mp4"]
    for dry in ([], ["--dry-run"]):
        ended = kadr(*words, *dry)
        assert ended.code == 1
        assert f"{out} has no vae, only transformer. Give a checkpoint with a VAE as --vae, such as " in ended.err
    assert kadr(*words, "--dry-run", "--vae", home / tiny_models.MODEL_FILE).code == 0
