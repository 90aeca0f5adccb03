"""`kadr train-lora`: a folder of clips in, a LoRA out, in words that scripts can read."""

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
SMALL = ["--size", "64x32", "--frames", "9", "--rank", "2", "--steps", "2", "--device", "cpu"]


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
    output = tmp_path / "made.safetensors"
    ended = kadr("train-lora", clips, "--model", model, "--output", output, *SMALL)
    assert (ended.code, ended.out) == (0, f"{output}\n"), ended.err
    assert "2 steps on 2 clips, in 0:0" in ended.err
    assert LoraFile.open(output).describe().ranks == (2,)
    told = json.loads(kadr("train-lora", clips, "--model", model, "--output", output, *SMALL, "--json").out)
    assert (told["path"], told["steps"], told["num_examples"]) == (str(output), 2, 2)  # nothing was left to do
    assert told["start_step"] == 2
    assert set(told) == {"path", "steps", "start_step", "num_examples", "first_loss", "last_loss", "seconds"}


def test_flags_reach_the_training(kadr: Run, model: Path, clips: Path, tmp_path: Path) -> None:
    words = (
        "--target-modules attention+feed-forward --batch-size 2 --learning-rate 0.01 --sigma-sampling uniform "
        "--first-frame-conditioning-p 0 --seed 3"
    )
    output = tmp_path / "made.safetensors"
    ended = kadr(
        "train-lora", clips, "--model", model, "--output", output, *SMALL, *words.split(), "--references", "canny"
    )
    assert ended.code == 0, ended.err
    told = LoraFile.open(output).describe()
    settings = json.loads(told.metadata["kadr_settings"])
    asked = {
        "target_modules": "attention+feed-forward",
        "batch_size": 2,
        "learning_rate": 0.01,
        "sigma_sampling": "uniform",
        "seed": 3,
    }
    assert asked.items() <= settings.items()
    assert (settings["first_frame_conditioning_p"], settings["references"], told.num_adapted_layers) == (0, "canny", 20)


def test_a_broken_clip_is_named_and_left_out_when_told_to(kadr: Run, model: Path, clips: Path, tmp_path: Path) -> None:
    (clips / "torn.mp4").write_bytes(b"torn")
    (clips / "torn.txt").write_text("torn")
    words = ("train-lora", clips, "--model", model, "--output", tmp_path / "made.safetensors", *SMALL)
    ended = kadr(*words)
    assert (ended.code, "torn.mp4 cannot be read" in ended.err, "--skip-broken" in ended.err) == (1, True, True)
    ended = kadr(*words, "--skip-broken")
    assert (ended.code, "1 of the 3 clips and images" in ended.err) == (0, True)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--rank 0", 1, "rank is 0; it must lie between 1 and 1024"),
        ("--frames 10", 1, "training takes 8k+1 frames of a clip"),
        ("--save-every 0", 2, "0 is below 1"),
        ("--size big", 2, "--size"),
        ("--output lora.pt", 1, "does not end in .safetensors"),
        ("--target-modules heads", 1, "must be one of attention"),
    ],
)
def test_what_cannot_be_is_refused(kadr: Run, model: Path, clips: Path, words: str, code: int, says: str) -> None:
    ended = kadr("train-lora", clips, "--model", model, "--device", "cpu", *words.split())
    assert (ended.code, ended.out) == (code, "")
    assert says in ended.err


def test_a_file_that_no_training_made_is_never_written_over(
    kadr: Run, model: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lora.safetensors").write_bytes(b"precious")
    ended = kadr("train-lora", clips, "--model", model, *SMALL)
    assert (ended.code, "lora.safetensors already exists, and no training" in ended.err) == (1, True)
    assert Path("lora.safetensors").read_bytes() == b"precious"


def test_no_frames_are_refused_and_not_taken_for_those_of_the_recipe(
    kadr: Run, model: Path, clips: Path, tmp_path: Path
) -> None:
    ended = kadr("train-lora", clips, "--model", model, "--output", tmp_path / "a.safetensors", "--frames", "0")
    assert (ended.code, "frames is 0" in ended.err) == (1, True)


def test_a_folder_that_is_not_there_is_told_before_the_model_is_opened(kadr: Run, engine: FakeEngine) -> None:
    ended = kadr("train-lora", "nowhere")
    assert (ended.code, "there is no folder nowhere" in ended.err, engine.open_calls) == (1, True, [])


def test_a_training_that_is_cut_off_says_how_to_go_on(
    kadr: Run, model: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: LoRATrainer, number: int) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(LoRATrainer, "step", step)
    output = tmp_path / "made.safetensors"
    ended = kadr("train-lora", clips, "--model", model, "--output", output, *SMALL)
    assert ended.code == 130
    assert "run the same command again to resume it" in ended.err
    assert not output.exists()
