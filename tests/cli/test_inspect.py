"""`kadr inspect`: describes a file from its header."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kadr.checkpoints.save import write_upscaler
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.cli.terminal.table import format_columns, format_si
from kadr.media.clip import read_metadata
from kadr.media.writer import VideoWriter
from kadr.models.upscaler import LatentUpscaler, UpscalerConfig
from kadr.schema import REQUEST, VIDEO_METADATA, Schema
from kadr.shapes import Size
from kadr.version import __version__
from tests import lora_files, tiny_models
from tests.checkpoints.text_encoder_files import encoder_tensors, with_prefix, write
from tests.cli.conftest import CommandResult
from tests.stored_files import STORED_FILES

Run = Callable[..., CommandResult]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model(tmp_path_factory.mktemp("tiny"))


def test_checkpoint_is_described_as_text(kadr: Run, model_folder: Path) -> None:
    result = kadr("inspect", model_folder / tiny_models.MODEL_FILE)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("LTX-Video 0.9.5")
    assert "LinearQuadratic" in lines[1]
    assert [line.split("  ")[0] for line in lines[2:]] == ["component", "transformer", "vae", "text encoder"]
    assert "float32" in lines[3]


def test_checkpoint_is_described_in_json(kadr: Run, model_folder: Path) -> None:
    description = json.loads(kadr("inspect", model_folder / tiny_models.MODEL_FILE, "--json").out)
    assert (description["family"], description["layout"], description["vae_family"]) == (
        "LTX-Video",
        "single file",
        "0.9.5",
    )
    components = {component["name"]: component for component in description["components"]}
    assert components["transformer"]["sizes"]["num_layers"] == 2
    assert components["text encoder"]["sizes"]["vocab_size"] == tiny_models.t5_config().vocab_size
    file_bytes = (model_folder / tiny_models.MODEL_FILE).stat().st_size
    assert 0.9 * file_bytes < components["transformer"]["size_bytes"] + components["vae"]["size_bytes"] < file_bytes


def test_text_encoder_in_the_models_file_is_a_component(kadr: Run, model_folder: Path, tmp_path: Path) -> None:
    encoder = encoder_tensors(TextEncoderCheckpoint.open(model_folder).load(torch.float32))
    prefixed = with_prefix("text_encoders.t5xxl.transformer.", encoder)
    with safe_open(model_folder / tiny_models.MODEL_FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(model_folder / tiny_models.MODEL_FILE) | prefixed
    lines = kadr("inspect", write(tmp_path / "all.safetensors", tensors, metadata)).out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["component", "transformer", "vae", "text encoder"]


def test_missing_component_is_named_with_its_remedy(kadr: Run, model_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "alone.safetensors"
    model.symlink_to(model_folder / tiny_models.MODEL_FILE)
    assert "missing: text encoder (" in kadr("inspect", model).out
    assert json.loads(kadr("inspect", model, "--json").out)["missing_components"] == ["text encoder"]


@pytest.mark.parametrize("folder", [".", "text_encoder"])
def test_text_encoder_is_described(kadr: Run, model_folder: Path, folder: str) -> None:
    result = kadr("inspect", model_folder / folder)
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == "T5 text encoder"
    assert json.loads(kadr("inspect", model_folder / folder, "--json").out)["family"] == "T5"


def test_a_lora_is_described_with_its_layers_and_unexpected_keys(kadr: Run, tmp_path: Path) -> None:
    pairs = lora_files.block_pairs(("attn1.to_q", "ff.net.2"), width=2048)
    unexpected = {"diffusion_model.head.lora_A.weight": torch.ones(4, 64)}
    metadata = {"reference_downscale_factor": "2", "made_by": "somebody"}
    path = lora_files.write_lora_file(
        tmp_path / "l.safetensors", pairs, alpha=2.0, extra_tensors=unexpected, metadata=metadata
    )
    result = kadr("inspect", path)
    assert result.code == 0, result.err
    for line in (
        "LTX-Video LoRA for 2B, key format: Comfy",
        "rank 4, alpha 2; scale 0.5 at strength 1",
        "in-context LoRA: its control has the size of the video divided by 2",
        "unexpected key: diffusion_model.head.lora_A.weight",
    ):
        assert line in result.out.splitlines()
    assert "self_attention.q   2" in result.out
    assert "somebody" in result.out
    description = json.loads(kadr("inspect", path, "--json").out)
    assert (description["kind"], description["model_size"]) == ("LoRA", "2B")
    assert (description["num_adapted_layers"], description["num_adapted_blocks"]) == (4, 2)


def test_registry_name_on_disk_is_inspected(kadr: Run) -> None:
    result = kadr("inspect", "demo-ic-lora-canny")
    assert result.code == 0, result.err
    assert "in-context LoRA: its control has the size of the video" in result.out
    assert "Did you mean demo-lora-teal" in kadr("inspect", "demo-lora-tael").err


def test_upscaler_is_described_without_missing_components(kadr: Run, tmp_path: Path) -> None:
    upscaler = LatentUpscaler(
        UpscalerConfig(
            in_channels=8, mid_channels=32, num_blocks_per_stage=1, spatial_upsample=False, temporal_upsample=True
        )
    )
    write_upscaler(tmp_path / "u.safetensors", upscaler)
    result = kadr("inspect", tmp_path / "u.safetensors")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[:2] == ["LTX-Video unreleased temporal upscaler, single file", "for --upscaler, beside a model"]
    assert [line.split("  ")[0] for line in lines[2:]] == ["component", "upscaler"]
    description = json.loads(kadr("inspect", tmp_path / "u.safetensors", "--json").out)
    assert (description["kind"], description["missing_components"]) == ("temporal upscaler", [])


def test_video_shows_its_request(kadr: Run, tmp_path: Path) -> None:
    record = {"version": "0.1.0", "request": {"prompt": "a red circle", "frames": 9, "fps": None}}
    with VideoWriter(tmp_path / "v.mp4", Size(64, 64), 24, metadata=record) as writer:
        writer.write(np.zeros((1, 64, 64, 3), np.uint8))
    assert json.loads(kadr("inspect", tmp_path / "v.mp4", "--json").out) == {"schema": 1, **record}
    lines = kadr("inspect", tmp_path / "v.mp4").out.splitlines()
    assert lines == ["schema   1", "version  0.1.0", "request", "  prompt  a red circle", "  frames  9"]


def test_video_from_before_schema_numbers_has_number_1(kadr: Run) -> None:
    description = json.loads(kadr("inspect", STORED_FILES / "video.mp4", "--json").out)
    assert description == {"schema": 1, **read_metadata(STORED_FILES / "video.mp4")}
    assert kadr("inspect", STORED_FILES / "video.mp4").out.startswith("schema ")


@pytest.mark.parametrize("schema", [VIDEO_METADATA, REQUEST], ids=lambda schema: schema.kind)
def test_video_of_a_newer_kadr_is_refused_by_name(kadr: Run, tmp_path: Path, schema: Schema) -> None:
    newer = {"schema": schema.number + 1}
    record = newer if schema is VIDEO_METADATA else {"request": newer}
    with VideoWriter(tmp_path / "v.mp4", Size(64, 64), 24, metadata=record) as writer:
        writer.write(np.zeros((1, 64, 64, 3), np.uint8))
    result = kadr("inspect", tmp_path / "v.mp4")
    assert (result.code, result.out) == (1, "")
    assert f"the {schema.kind} in {tmp_path / 'v.mp4'} has the schema number {schema.number + 1}; " in result.err
    assert f"; kadr {__version__} reads numbers up to {schema.number}. " in result.err
    assert "update kadr" in result.err


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.mp4", "note.txt", "other.mp4", "."])
def test_file_that_is_not_a_model_is_explained(
    kadr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("note.txt").write_text("not a model")
    with VideoWriter("other.mp4", Size(64, 64), 24) as writer:
        writer.write(np.zeros((1, 64, 64, 3), np.uint8))
    result = kadr("inspect", name)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert len(result.err.splitlines()) == 1


def test_columns_line_up() -> None:
    assert list(format_columns([("a", "long"), ("bcd", "e")])) == ["a    long", "bcd  e"]


@pytest.mark.parametrize("number, text", [(7, "7"), (1500, "1.5 k"), (6_341_000_000, "6.34 G"), (419e6, "419 M")])
def test_large_numbers_are_short(number: int, text: str) -> None:
    assert format_si(number) == text
