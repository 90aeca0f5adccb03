"""`kadr inspect`: what is in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kadr.checkpoints.save import write_upscaler
from kadr.cli.terminal.table import format_columns, format_si
from kadr.media.writer import VideoWriter
from kadr.models.upscaler import LatentUpscaler, UpscalerConfig
from kadr.shapes import Size
from tests import lora_files, tiny_models
from tests.cli.conftest import CommandResult

Run = Callable[..., CommandResult]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model(tmp_path_factory.mktemp("tiny"))


def test_checkpoint_is_described_in_words(kadr: Run, home: Path) -> None:
    ended = kadr("inspect", home / tiny_models.MODEL_FILE)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0].startswith("LTX-Video 0.9.5")
    assert "LinearQuadratic" in lines[1]
    assert [line.split("  ")[0] for line in lines[2:]] == ["component", "transformer", "vae", "text encoder"]
    assert "float32" in lines[3]


def test_checkpoint_is_described_in_json(kadr: Run, home: Path) -> None:
    told = json.loads(kadr("inspect", home / tiny_models.MODEL_FILE, "--json").out)
    assert (told["family"], told["layout"], told["vae_family"]) == ("LTX-Video", "single file", "0.9.5")
    components = {component["name"]: component for component in told["components"]}
    assert components["transformer"]["sizes"]["num_layers"] == 2
    assert components["text encoder"]["sizes"]["vocab_size"] == tiny_models.t5_config().vocab_size
    whole = (home / tiny_models.MODEL_FILE).stat().st_size
    assert 0.9 * whole < components["transformer"]["size_bytes"] + components["vae"]["size_bytes"] < whole


def test_missing_part_is_named_with_the_way_out(kadr: Run, home: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.symlink_to(home / tiny_models.MODEL_FILE)
    assert "missing: text encoder (" in kadr("inspect", alone).out
    assert json.loads(kadr("inspect", alone, "--json").out)["missing_components"] == ["text encoder"]


@pytest.mark.parametrize("folder", [".", "text_encoder"])
def test_text_encoder_is_described(kadr: Run, home: Path, folder: str) -> None:
    ended = kadr("inspect", home / folder)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[0] == "T5 text encoder"
    assert json.loads(kadr("inspect", home / folder, "--json").out)["family"] == "T5"


def test_a_lora_is_described_with_its_layers_and_unexpected_keys(kadr: Run, tmp_path: Path) -> None:
    halves = lora_files.block_pairs(("attn1.to_q", "ff.net.2"), width=2048)
    more = {"diffusion_model.head.lora_A.weight": torch.ones(4, 64)}
    metadata = {"reference_downscale_factor": "2", "made_by": "somebody"}
    path = lora_files.write_lora_file(
        tmp_path / "l.safetensors", halves, alpha=2.0, extra_tensors=more, metadata=metadata
    )
    ended = kadr("inspect", path)
    assert ended.code == 0, ended.err
    for line in (
        "LTX-Video LoRA for 2B, key format: Comfy",
        "rank 4, alpha 2; scale 0.5 at strength 1",
        "in-context LoRA: its control has the size of the video divided by 2",
        "unexpected key: diffusion_model.head.lora_A.weight",
    ):
        assert line in ended.out.splitlines()
    assert "self_attention.q   2" in ended.out
    assert "somebody" in ended.out
    told = json.loads(kadr("inspect", path, "--json").out)
    assert (told["kind"], told["model_size"]) == ("LoRA", "2B")
    assert (told["num_adapted_layers"], told["num_adapted_blocks"]) == (4, 2)


def test_a_name_that_is_on_disk_is_inspected(kadr: Run) -> None:
    ended = kadr("inspect", "demo-ic-lora-canny")
    assert ended.code == 0, ended.err
    assert "in-context LoRA: its control has the size of the video" in ended.out
    assert "kadr models" in kadr("inspect", "demo-lora-tael").err


def test_upscaler_is_described_and_misses_nothing(kadr: Run, tmp_path: Path) -> None:
    upsampler = LatentUpscaler(
        UpscalerConfig(
            in_channels=8, mid_channels=32, num_blocks_per_stage=1, spatial_upsample=False, temporal_upsample=True
        )
    )
    write_upscaler(tmp_path / "u.safetensors", upsampler)
    ended = kadr("inspect", tmp_path / "u.safetensors")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[:2] == ["LTX-Video unreleased temporal upscaler, single file", "for --upscaler, beside a model"]
    assert [line.split("  ")[0] for line in lines[2:]] == ["component", "upscaler"]
    told = json.loads(kadr("inspect", tmp_path / "u.safetensors", "--json").out)
    assert (told["kind"], told["missing_components"]) == ("temporal upscaler", [])


def test_video_shows_its_request(kadr: Run, tmp_path: Path) -> None:
    record = {"version": "0.1.0", "request": {"prompt": "a red circle", "frames": 9, "fps": None}}
    with VideoWriter(tmp_path / "v.mp4", Size(64, 64), 24, metadata=record) as writer:
        writer.write(np.zeros((1, 64, 64, 3), np.uint8))
    assert json.loads(kadr("inspect", tmp_path / "v.mp4", "--json").out) == record
    lines = kadr("inspect", tmp_path / "v.mp4").out.splitlines()
    assert lines == ["version  0.1.0", "request", "  prompt  a red circle", "  frames  9"]


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.mp4", "note.txt", "other.mp4", "."])
def test_file_that_is_no_model_is_explained(
    kadr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("note.txt").write_text("not a model")
    with VideoWriter("other.mp4", Size(64, 64), 24) as writer:
        writer.write(np.zeros((1, 64, 64, 3), np.uint8))
    ended = kadr("inspect", name)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: ")
    assert len(ended.err.splitlines()) == 1


def test_columns_line_up() -> None:
    assert list(format_columns([("a", "long"), ("bcd", "e")])) == ["a    long", "bcd  e"]


@pytest.mark.parametrize("number, words", [(7, "7"), (1500, "1.5 k"), (6_341_000_000, "6.34 G"), (419e6, "419 M")])
def test_large_numbers_are_short(number: int, words: str) -> None:
    assert format_si(number) == words
