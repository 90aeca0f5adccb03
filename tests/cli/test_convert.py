"""`kadr convert`: prints the path of what it wrote; refusals are one line."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kadr.checkpoints.checkpoint import Checkpoint
from tests import tiny_models
from tests.cli.conftest import CommandResult

FULL_DEVICE = Path("/dev/full")
Run = Callable[..., CommandResult]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model(tmp_path_factory.mktemp("tiny"))


def test_file_becomes_a_folder_that_makes_a_video(
    kadr: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = kadr("convert", home / tiny_models.MODEL_FILE, "folder", "--dtype", "bfloat16")
    assert (result.code, result.out) == (0, "folder\n"), result.err
    assert "bytes before, " in result.err
    assert Checkpoint.open("folder").info.dtype == torch.bfloat16
    args = ["--steps", "1", "--size", "64x64", "--frames", "9", "--text-encoder", home, "--output", "x.mp4"]
    made = kadr("generate", "a red circle", "--model", "folder", *args)
    assert (made.code, made.out) == (0, "x.mp4\n"), made.err


def test_folder_becomes_a_file_with_the_same_bits(kadr: Run, home: Path, tmp_path: Path) -> None:
    original, folder, back = home / tiny_models.MODEL_FILE, tmp_path / "folder", tmp_path / "x.safetensors"
    assert kadr("convert", original, folder).code == 0
    assert kadr("convert", folder, back).out == f"{back}\n"
    tensors, returned = load_file(original), load_file(back)
    assert tensors.keys() == returned.keys()
    assert all(torch.equal(tensors[key], returned[key]) for key in tensors)


def test_existing_output_is_replaced_only_with_force(kadr: Run, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    out.write_text("older")
    result = kadr("convert", home / tiny_models.MODEL_FILE, out)
    assert (result.code, len(result.err.splitlines())) == (1, 1)
    assert "exists already. Pass --force" in result.err
    assert out.read_text() == "older"
    assert kadr("convert", home / tiny_models.MODEL_FILE, out, "--force").code == 0


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_link_to_the_input_is_refused_before_converting(
    kadr: Run, home: Path, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    shutil.copy(home / tiny_models.MODEL_FILE, source)
    link(source, out)
    result = kadr("convert", source, out, "--force")
    assert (result.code, len(result.err.splitlines())) == (1, 1)
    assert f"{out} is a link to the input {source}. Write to another path" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]


def test_file_of_the_input_folder_is_not_replaced(kadr: Run, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert kadr("convert", home / tiny_models.MODEL_FILE, folder).code == 0
    part = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content = part.read_bytes()
    result = kadr("convert", folder, part, "--force")
    assert result.code == 1
    assert f"{part} is the input" in result.err
    assert part.read_bytes() == content


def test_output_that_is_a_link_to_itself_is_no_bug(kadr: Run, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    out.symlink_to(out)
    assert kadr("convert", home / tiny_models.MODEL_FILE, out, "--force").code == 0
    assert load_file(out)


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="the system has no /dev/full")
def test_full_stdout_says_that_the_model_is_written(
    kadr: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.safetensors"
    with FULL_DEVICE.open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        result = kadr("convert", home / tiny_models.MODEL_FILE, out)
    assert result.code == 1
    assert f"{out} is written, but its path could not be printed: stdout cannot be written" in result.err


@pytest.mark.parametrize(
    "source, message",
    [
        ("demo", "built as none of 0.9, 0.9.1 and 0.9.5"),
        ("demo-lora-teal", "is a LoRA, which needs no conversion"),
        ("t5-v1.1-xxl", "is a text encoder, which needs no conversion"),
        ("ltxv-2b-0.9.8-distilled-fp8", "is quantized. Convert ltxv-2b-0.9.8-distilled, its bfloat16 file"),
        ("no-such", "there is no model named"),
        ("absent.safetensors", "does not exist"),
    ],
)
def test_input_without_another_layout_is_refused(kadr: Run, tmp_path: Path, source: str, message: str) -> None:
    result = kadr("convert", source, tmp_path / "out")
    assert (result.code, result.out) == (1, "")
    assert message in result.err
    assert list(tmp_path.iterdir()) == []


def test_text_encoder_folder_and_bad_dtype_are_refused(kadr: Run, home: Path, tmp_path: Path) -> None:
    result = kadr("convert", home / "text_encoder", tmp_path / "out")
    assert (result.code, "is a text encoder" in result.err) == (1, True)
    assert kadr("convert", home / tiny_models.MODEL_FILE, tmp_path / "out", "--dtype", "int8").code == 2
