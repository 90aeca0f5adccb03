"""Every error that names a flag or a way out is followed: what it says works, and leads nowhere else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kadr.checkpoints.gguf import convert
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B
from kadr.models.vae.config import VAE_0_9_5
from tests.checkpoints import text_encoder_files as files
from tests.checkpoints.checkpoint_files import official_metadata, single_file_shapes, write_sparse
from tests.cli.conftest import CommandResult
from tests.tiny_models import MODEL_FILE, build_random, t5_config, write_model

Run = Callable[..., CommandResult]


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny")


def refused(result: CommandResult, text: str) -> str:
    """Returns the error line of a command that failed with this text."""
    assert result.code == 1
    assert re.search(text, result.err), result.err
    return result.err


def dry_run(kadr: Run, *args: str | Path) -> CommandResult:
    return kadr("generate", "a fox", "--device", "cpu", "--dry-run", *args)


def release_names(error: str) -> list[str]:
    return re.findall(r"ltxv-[\w.]*\w(?:-[\w.]*\w)*", error)


def headerless_2b(path: Path) -> Path:
    return write_sparse(path, single_file_shapes(TRANSFORMER_2B))


def renamed_13b(path: Path) -> Path:
    shapes = single_file_shapes(TRANSFORMER_13B, VAE_0_9_5)
    return write_sparse(path, shapes, metadata=official_metadata(TRANSFORMER_13B, VAE_0_9_5))


def test_every_release_that_the_question_lists_is_an_answer(kadr: Run, tmp_path: Path) -> None:
    path = renamed_13b(tmp_path / "mine.safetensors")
    names = release_names(refused(dry_run(kadr, "--model", path), "--release NAME"))
    assert len(names) == 4
    for name in names:
        result = dry_run(kadr, "--model", path, "--release", name)
        assert result.code == 0, result.err
        assert f"mine.safetensors, release {name}" in result.out
    assert (
        f"release: {names[0]}" in kadr("plan", "a fox", "--model", path, "--release", names[0], "--size", "64x64").out
    )


def test_inspect_asks_for_the_release_and_takes_it(kadr: Run, tmp_path: Path) -> None:
    open_release = kadr("inspect", renamed_13b(tmp_path / "mine.safetensors"))
    line = next(line for line in open_release.out.splitlines() if line.startswith("release: one of"))
    assert "--release" in line
    for name in release_names(line):
        assert f"({name})" in kadr("inspect", "mine.safetensors", "--release", name).out
    error = refused(kadr("inspect", headerless_2b(tmp_path / "old.safetensors")), "--release NAME")
    for name in release_names(error):
        assert f"({name})" in kadr("inspect", "old.safetensors", "--release", name).out


def test_quantize_takes_the_release_that_it_asks_for(
    kadr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = []

    def record(checkpoint: object, path: Path, *args: object, **options: object) -> convert.ConversionResult:
        converted.append(checkpoint)
        return convert.ConversionResult(1, 1, {"Q8_0": 1})

    monkeypatch.setattr(convert, "transformer_to_gguf", record)
    command = ("quantize", headerless_2b(tmp_path / "old.safetensors"), "old.gguf", "--type", "Q8_0")
    name = release_names(refused(kadr(*command), "--release NAME"))[-1]
    assert kadr(*command, "--release", name).code == 0
    assert [checkpoint.info.release.name for checkpoint in converted] == [name]


def test_a_release_that_contradicts_the_weights_lists_those_that_do_not(kadr: Run, tmp_path: Path) -> None:
    path = renamed_13b(tmp_path / "mine.safetensors")
    error = refused(dry_run(kadr, "--model", path, "--release", "ltxv-2b-0.9.5"), "layers: 48, not 28")
    fitting = release_names(error.partition("may be")[2])
    assert len(fitting) == 8
    assert all(dry_run(kadr, "--model", path, "--release", name).code == 0 for name in fitting[:2])


def test_the_release_of_a_named_model_is_left_out_as_told(kadr: Run) -> None:
    command = ("--model", "demo", "--release", "demo-distilled")
    refused(dry_run(kadr, *command), "is a release itself.*leave it out")
    assert dry_run(kadr, *command[:2]).code == 0


def test_an_unknown_release_lists_names_that_work(kadr: Run, tmp_path: Path) -> None:
    path = renamed_13b(tmp_path / "mine.safetensors")
    error = refused(dry_run(kadr, "--model", path, "--release", "0.9.8"), "one of demo, ")
    assert "ltxv-13b-0.9.8-dev" in release_names(error)
    assert dry_run(kadr, "--model", path, "--release", "ltxv-13b-0.9.8-dev").code == 0


def test_a_text_encoder_as_model_goes_to_the_flag_it_names(kadr: Run, home: Path, tmp_path: Path) -> None:
    encoder = build_random(lambda: T5Encoder(t5_config()))
    path = files.write(tmp_path / "te" / "t5xxl_fp16.safetensors", files.in_fp16(files.encoder_tensors(encoder)))
    shutil.copy(home / "tokenizer" / "spiece.model", path.parent)
    refused(dry_run(kadr, "--model", path), "is a T5 text encoder, not a model.*--text-encoder")
    result = dry_run(kadr, "--model", home / MODEL_FILE, "--text-encoder", path)
    assert (result.code, "t5xxl_fp16.safetensors" in result.out) == (0, True)
    error = refused(dry_run(kadr, "--model", home / MODEL_FILE, "--text-encoder", path.parent), "one of those in it")
    named = path.parent / error.strip().rpartition(": ")[2].rstrip(".")
    assert dry_run(kadr, "--model", home / MODEL_FILE, "--text-encoder", named).code == 0
    assert kadr("inspect", path).out.startswith("T5 text encoder")
    assert kadr("quantize", path, "t5.gguf", "--type", "BF16").code == 0
    assert dry_run(kadr, "--model", home / MODEL_FILE, "--text-encoder", "t5.gguf").code == 0


def test_a_model_as_text_encoder_is_sent_to_names_that_work(kadr: Run, tmp_path: Path) -> None:
    path = renamed_13b(tmp_path / "ltxv-13b-0.9.8-dev.safetensors")
    error = refused(dry_run(kadr, "--model", path, "--text-encoder", path), "has no T5 text encoder in it")
    names = re.findall(r"t5-[\w.]+(?:-[\w]+)*", error)
    assert len(names) == 2
    for name in names:
        assert dry_run(kadr, "--model", path, "--text-encoder", name).code == 0


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_a_transformer_alone_is_sent_to_a_vae_that_fits(kadr: Run, tmp_path: Path, prefix: str) -> None:
    shapes = single_file_shapes(TRANSFORMER_13B, without_prefix=True)
    path = write_sparse(tmp_path / "ltxv-13b-0.9.8-distilled.safetensors", {prefix + k: v for k, v in shapes.items()})
    error = refused(dry_run(kadr, "--model", path), "--vae, such as")
    assert dry_run(kadr, "--model", path, "--vae", release_names(error.partition("such as")[2])[0]).code == 0


def test_a_lora_as_model_goes_to_the_flag_it_names(kadr: Run) -> None:
    refused(dry_run(kadr, "--model", "demo-lora-teal"), r"Give it as --lora")
    assert dry_run(kadr, "--model", "demo", "--lora", "demo-lora-teal").code == 0


def test_a_tokenizer_as_model_is_sent_to_the_list_of_models(kadr: Run) -> None:
    refused(dry_run(kadr, "--model", "t5-v1.1-tokenizer"), "is a tokenizer, not a model.*kadr models")
    assert "ltxv-2b-0.9.5" in kadr("models").out


def test_an_unread_precision_sends_to_a_file_that_opens(kadr: Run, home: Path, tmp_path: Path) -> None:
    stored = files.encoder_tensors(build_random(lambda: T5Encoder(t5_config())))
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    marked = stored | {f"{layer}.comfy_quant": files.mark(format="nvfp4"), f"{layer}.weight_scale": torch.ones(())}
    shutil.copy(home / "tokenizer" / "spiece.model", tmp_path)
    path = files.write(tmp_path / "nvfp4.safetensors", marked)
    arguments = ("--model", home / MODEL_FILE, "--text-encoder")
    refused(dry_run(kadr, *arguments, path), r"'nvfp4'.*Use the bf16 file of the same model")
    bf16 = {name: tensor.bfloat16() for name, tensor in stored.items()}
    assert dry_run(kadr, *arguments, files.write(tmp_path / "bf16.safetensors", bf16)).code == 0


def test_a_video_of_a_model_of_unknown_release_can_be_made_again(
    kadr: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--model", home / MODEL_FILE, "--size", "64x64", "--frames", "9", "--steps", "1", "--device", "cpu")
    assert kadr("generate", "a fox", *flags, "--output", "x.mp4").code == 0
    assert kadr("rerun", "x.mp4", "--output", "y.mp4").code == 0
    assert Path("x.mp4").stat().st_size == Path("y.mp4").stat().st_size
