"""`kadr train-lora`: trains a LoRA on a folder of clips, and reports it in text or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kadr.checkpoints.lora.file import LoraFile
from kadr.training.trainer import LoRATrainer
from tests import tiny_models
from tests.cli.conftest import CommandResult, FakeEngine
from tests.training.conftest import write_clip

Run = Callable[..., CommandResult]
SMALL_FLAGS = ["--size", "64x32", "--frames", "9", "--rank", "2", "--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model(tmp_path_factory.mktemp("tiny")) / tiny_models.MODEL_FILE


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(2):
        write_clip(folder / f"{number}.mp4", seed=number)
    return folder


def test_a_lora_is_trained_and_its_path_printed(kadr: Run, model: Path, clips: Path, tmp_path: Path) -> None:
    output = tmp_path / "lora-out.safetensors"
    result = kadr("train-lora", clips, "--model", model, "--output", output, *SMALL_FLAGS)
    assert (result.code, result.out) == (0, f"{output}\n"), result.err
    assert "2 steps on 2 clips, in 0:0" in result.err
    assert LoraFile.open(output).describe().ranks == (2,)
    report = json.loads(kadr("train-lora", clips, "--model", model, "--output", output, *SMALL_FLAGS, "--json").out)
    assert (report["path"], report["steps"], report["num_examples"]) == (str(output), 2, 2)  # no step was left
    assert report["start_step"] == 2
    assert set(report) == {"path", "steps", "start_step", "num_examples", "first_loss", "last_loss", "seconds"}


def test_flags_reach_the_training(kadr: Run, model: Path, clips: Path, tmp_path: Path) -> None:
    args = (
        "--target-modules attention+feed-forward --batch-size 2 --learning-rate 0.01 --sigma-sampling uniform "
        "--first-frame-conditioning-p 0 --seed 3"
    )
    output = tmp_path / "lora-out.safetensors"
    result = kadr(
        "train-lora", clips, "--model", model, "--output", output, *SMALL_FLAGS, *args.split(), "--references", "canny"
    )
    assert result.code == 0, result.err
    description = LoraFile.open(output).describe()
    settings = json.loads(description.metadata["kadr_settings"])
    expected = {
        "target_modules": "attention+feed-forward",
        "batch_size": 2,
        "learning_rate": 0.01,
        "sigma_sampling": "uniform",
        "seed": 3,
    }
    assert expected.items() <= settings.items()
    assert (settings["first_frame_conditioning_p"], settings["references"], description.num_adapted_layers) == (
        0,
        "canny",
        20,
    )


def test_broken_clip_is_named_and_skipped_with_skip_broken(kadr: Run, model: Path, clips: Path, tmp_path: Path) -> None:
    (clips / "torn.mp4").write_bytes(b"torn")
    (clips / "torn.txt").write_text("torn")
    args = ("train-lora", clips, "--model", model, "--output", tmp_path / "lora-out.safetensors", *SMALL_FLAGS)
    result = kadr(*args)
    assert (result.code, "torn.mp4 cannot be read" in result.err, "--skip-broken" in result.err) == (1, True, True)
    result = kadr(*args, "--skip-broken")
    assert (result.code, "1 of the 3 clips and images" in result.err) == (0, True)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ("--rank 0", 1, "rank is 0; it must lie between 1 and 1024"),
        ("--frames 10", 1, "training takes 8k+1 frames of a clip"),
        ("--save-every 0", 2, "0 is below 1"),
        ("--size big", 2, "--size"),
        ("--output lora.pt", 1, "does not end in .safetensors"),
        ("--target-modules heads", 1, "must be one of attention"),
    ],
)
def test_bad_settings_are_refused(kadr: Run, model: Path, clips: Path, args: str, code: int, message: str) -> None:
    result = kadr("train-lora", clips, "--model", model, "--device", "cpu", *args.split())
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_foreign_output_is_never_overwritten(
    kadr: Run, model: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lora.safetensors").write_bytes(b"precious")
    result = kadr("train-lora", clips, "--model", model, *SMALL_FLAGS)
    assert (result.code, "lora.safetensors already exists, and no training" in result.err) == (1, True)
    assert Path("lora.safetensors").read_bytes() == b"precious"


def test_zero_frames_are_refused_not_replaced_by_the_recipe(
    kadr: Run, model: Path, clips: Path, tmp_path: Path
) -> None:
    result = kadr("train-lora", clips, "--model", model, "--output", tmp_path / "a.safetensors", "--frames", "0")
    assert (result.code, "frames is 0" in result.err) == (1, True)


def test_missing_folder_is_named_before_the_model_is_opened(kadr: Run, engine: FakeEngine) -> None:
    result = kadr("train-lora", "nowhere")
    assert (result.code, "there is no folder nowhere" in result.err, engine.open_calls) == (1, True, [])


def test_interrupted_training_says_how_to_resume(
    kadr: Run, model: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: LoRATrainer, number: int) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(LoRATrainer, "step", step)
    output = tmp_path / "lora-out.safetensors"
    result = kadr("train-lora", clips, "--model", model, "--output", output, *SMALL_FLAGS)
    assert result.code == 130
    assert "run the same command again to resume it" in result.err
    assert not output.exists()
