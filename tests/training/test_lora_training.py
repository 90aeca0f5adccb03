"""A whole training of a tiny model: the files it writes, resuming, and what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LTXPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kadr import Engine, Request
from kadr.checkpoints.lora.file import LoraFile
from kadr.errors import CheckpointError, KadrError, KadrWarning, MediaError, PlanError, RequestError
from kadr.media.clip import read_metadata, read_video
from kadr.media.control_maps import normalize_image
from kadr.media.image import crop_to_aspect, load_image
from kadr.models.lora_layers import attach_loras, set_lora_strengths
from kadr.pipeline.longvideo.folder_lock import lock_folder
from kadr.pipeline.progress import Progress
from kadr.schema import TRAINING_STATE
from kadr.shapes import Size
from kadr.training import example_cache, lora_training, memory_check
from kadr.training.dataset import read_dataset
from kadr.training.example_cache import encode_examples, example_request
from kadr.training.lora_training import LoRATraining
from kadr.training.memory_check import required_bytes
from kadr.training.settings import CANNY, FILES, TrainingSettings
from kadr.training.trainable_lora import enable_gradient_checkpointing
from kadr.training.trainer import LoRATrainer
from tests.models.test_transformer import Inputs, run_diffusers, velocity
from tests.oracles import diffusers_transformer, relative_error
from tests.stored_files import STORED_FILES
from tests.tiny_models import MODEL_FILE
from tests.training.conftest import FRAMES, SIZE

SETTINGS = TrainingSettings(
    size=SIZE,
    frames=FRAMES,
    rank=3,
    steps=4,
    batch_size=2,
    learning_rate=1e-2,
    warmup_steps=1,
    first_frame_conditioning_p=0.5,
)
REQUEST = Request(prompt="a red circle", size=SIZE, frames=FRAMES, steps=2, guidance=1.0)


class Interrupted(Exception):
    """The power fails."""


def training(engine: Engine, folder: Path, output: Path, **options: Any) -> LoRATraining:
    settings = replace(SETTINGS, **{name: options.pop(name) for name in list(options) if hasattr(SETTINGS, name)})
    return LoRATraining(engine, folder, output, settings, **options)


def interrupt_at(step: int) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        if progress.stage == "train" and progress.step == step:
            raise Interrupted

    return watch


def test_trained_lora_opens_and_changes_the_video(engine: Engine, folder: Path, home: Path, tmp_path: Path) -> None:
    output = tmp_path / "lora.safetensors"
    result = training(engine, folder, output).run()
    assert (result.path, result.steps, result.num_examples) == (output, 4, 4)
    described = LoraFile.open(output).describe()
    assert (described.key_format, described.num_adapted_layers, described.ranks, described.unexpected_keys) == (
        "Comfy",
        16,
        (3,),
        (),
    )
    assert (described.metadata["kadr_steps"], described.reference_downscale) == ("4", None)
    with_lora = Engine.open(home / MODEL_FILE, device="cpu", prompt_cache=False, loras=[output])
    without_lora = engine.denoise(REQUEST)
    assert not torch.equal(with_lora.denoise(REQUEST), without_lora)
    assert torch.equal(with_lora.denoise(replace(REQUEST, lora_strengths=(0.0,))), without_lora)


def test_trained_lora_gives_the_same_velocity_in_diffusers(engine: Engine, folder: Path, tmp_path: Path) -> None:
    result = training(engine, folder, tmp_path / "lora.safetensors", target_modules="attention+feed-forward").run()
    module = engine.load_transformer()
    inputs, pipeline = Inputs.random(module.config), LTXPipeline(None, None, None, None, diffusers_transformer(module))
    with torch.no_grad():
        base_velocity = velocity(module, inputs)
        pipeline.load_lora_weights(result.path, adapter_name="lora")
        pipeline.set_adapters(["lora"], [0.7])
        diffusers_velocity = run_diffusers(pipeline.transformer, inputs)
        attach_loras(module, [LoraFile.open(result.path).load()], torch.float32)
        set_lora_strengths(module, [0.7], torch.device("cpu"))
        assert relative_error(diffusers_velocity, base_velocity) > 1e-3
        assert relative_error(velocity(module, inputs), diffusers_velocity) <= 1e-5


def test_resumed_run_ends_in_the_same_lora(engine: Engine, folder: Path, tmp_path: Path) -> None:
    uninterrupted = training(engine, folder, tmp_path / "whole.safetensors").run()
    interrupted = training(engine, folder, tmp_path / "interrupted.safetensors", save_every=2)
    state, saved, interrupt = interrupted.work_folder / "state.safetensors", [], interrupt_at(3)

    def watch(progress: Progress) -> None:
        if (progress.stage, progress.step) == ("train", 2):
            saved.append(state.read_bytes())
        interrupt(progress)

    with pytest.raises(Interrupted):
        interrupted.run(watch)
    state.write_bytes(saved[-1])  # the third step is done but not saved: a power failure runs no handlers
    assert not interrupted.output.exists()
    result = interrupted.run()
    resumed, expected = load_file(result.path), load_file(uninterrupted.path)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())
    losses = uninterrupted.first_loss, uninterrupted.last_loss
    assert (result.first_loss, result.last_loss) == pytest.approx(losses, rel=1e-4)
    rows = list(csv.DictReader((interrupted.work_folder / "log.csv").read_text("utf-8").splitlines()))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]


def test_stopped_run_saves_every_step_done(engine: Engine, folder: Path, tmp_path: Path) -> None:
    uninterrupted = training(engine, folder, tmp_path / "whole.safetensors").run()
    stopped = training(engine, folder, tmp_path / "stopped.safetensors", save_every=100)
    with pytest.raises(Interrupted):
        stopped.run(interrupt_at(3))
    steps: list[int] = []
    result = stopped.run(lambda progress: steps.append(progress.step) if progress.stage == "train" else None)
    assert steps == [3, 4]
    assert (result.start_step, result.steps) == (3, 4)
    actual, expected = load_file(result.path), load_file(uninterrupted.path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def test_run_stopped_inside_an_update_keeps_the_last_saved_state(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = training(engine, folder, tmp_path / "stopped.safetensors", save_every=2)
    step, calls = torch.optim.AdamW.step, []

    def step_and_interrupt(self: torch.optim.AdamW) -> None:
        step(self)
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    with safe_open(stopped.work_folder / "state.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["kadr_training"])["step"] == 2


def test_extended_training_equals_a_longer_one(engine: Engine, folder: Path, tmp_path: Path) -> None:
    longer = training(engine, folder, tmp_path / "longer.safetensors", steps=4).run()
    training(engine, folder, tmp_path / "more.safetensors", steps=2).run()
    more = training(engine, folder, tmp_path / "more.safetensors", steps=4).run()
    actual, expected = load_file(more.path), load_file(longer.path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def test_other_training_with_the_same_output_is_refused_without_loss(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "lora.safetensors"
    training(engine, folder, output, steps=1).run()
    before = output.read_bytes()
    with pytest.raises(CheckpointError, match=r"holds a training with rank = 3, not 4"):
        training(engine, folder, output, steps=1, rank=4).run()
    (output.with_suffix(".training") / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read as a training state"):
        training(engine, folder, output, steps=1).run()
    assert output.read_bytes() == before


def test_other_training_is_refused_before_encoding(
    engine: Engine, folder: Path, tmp_path: Path, make_clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "lora.safetensors"
    first = training(engine, folder, output, steps=2).run()
    before = output.read_bytes()
    monkeypatch.setattr(lora_training, "encode_examples", lambda *args: pytest.fail("something was encoded"))
    with pytest.raises(CheckpointError, match="holds a training with size = 64x32, not 96x32"):
        training(engine, folder, output, steps=2, size=Size(96, 32)).run()
    with pytest.raises(RequestError, match="has done 2 steps, more than the 1 requested"):
        training(engine, folder, output, steps=1).run()
    (folder / "2.txt").write_text("birds fly")
    (folder / "still.png").unlink()
    make_clip(folder / "3.mp4", seed=3)
    make_clip(folder / "4.mp4", seed=4)
    with pytest.raises(CheckpointError) as caught:
        training(engine, folder, output, steps=2).run()
    assert "other clips or captions: still.png missing, 3.mp4 and 1 more new, 2.mp4 changed." in str(caught.value)
    assert (first.start_step, output.read_bytes()) == (0, before)


def test_training_resumes_after_its_dataset_folder_moved(engine: Engine, folder: Path, tmp_path: Path) -> None:
    longer = training(engine, folder, tmp_path / "longer.safetensors").run()
    training(engine, folder, tmp_path / "more.safetensors", steps=2).run()
    more = training(engine, folder.rename(tmp_path / "elsewhere"), tmp_path / "more.safetensors").run()
    assert more.start_step == 2
    actual, expected = load_file(more.path), load_file(longer.path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def test_bad_validation_prompts_and_outputs_are_refused_at_the_start(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_training, "read_dataset", lambda *args, **kwargs: pytest.fail("the folder was read"))
    output = tmp_path / "lora.safetensors"
    with pytest.raises(RequestError, match="the prompt is 5"):
        training(engine, folder, output, validation_prompts=("a red circle", 5)).run()
    with pytest.raises(KadrError, match="63x31"):
        training(engine, folder, output, validation_prompts=("a red circle",), size=Size(63, 31)).run()
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(MediaError, match=r"folder\.safetensors already exists"):
        training(engine, folder, tmp_path / "folder.safetensors").run()


def test_failed_validation_video_at_the_end_costs_no_lora(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise MediaError("no room")

    monkeypatch.setattr(Engine, "write", fail)
    attempt = training(engine, folder, tmp_path / "lora.safetensors", validation_prompts=("a blue sea",))
    with pytest.raises(MediaError, match="no room"):
        attempt.run()
    assert LoraFile.open(attempt.output).describe().metadata["kadr_steps"] == "4"


def test_every_validation_keeps_its_lora(engine: Engine, folder: Path, tmp_path: Path) -> None:
    attempt = training(engine, folder, tmp_path / "lora.safetensors", steps=5, validate_every=2)
    attempt.run()
    snapshots = sorted(attempt.work_folder.glob("step-*.safetensors"))
    assert [path.name for path in snapshots] == [f"step-00000{step}.safetensors" for step in (2, 4, 5)]
    shorter = training(engine, folder, tmp_path / "shorter.safetensors", steps=4).run()
    actual, expected = load_file(snapshots[1]), load_file(shorter.path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def test_rising_loss_is_warned_of(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter((0.5, 0.75))
    monkeypatch.setattr(LoRATrainer, "validation_loss", lambda self: next(losses))
    with pytest.warns(KadrWarning, match=r"rose from 0\.5000 to 0\.7500: the LoRA has learned nothing"):
        training(engine, folder, tmp_path / "lora.safetensors", steps=1).run()


def test_two_runs_do_not_train_in_one_folder(engine: Engine, folder: Path, tmp_path: Path) -> None:
    attempt = training(engine, folder, tmp_path / "lora.safetensors", steps=1)
    with lock_folder(attempt.work_folder), pytest.raises(RequestError, match="another process is writing to"):
        attempt.run()
    attempt.run()


@pytest.mark.parametrize(
    "text", ["", "step;loss\n1;2\n", "step,loss,validation_loss,seconds\n0,,9.5,\n1,x,,\nrubbish,1", "\0\xff"]
)
def test_unreadable_log_stops_no_training(text: str, engine: Engine, folder: Path, tmp_path: Path) -> None:
    attempt = training(engine, folder, tmp_path / "lora.safetensors", steps=2)
    attempt.run()
    (attempt.work_folder / "log.csv").write_text(text, "latin-1")
    result = training(engine, folder, attempt.output, steps=3).run()
    assert result.first_loss == (9.5 if "9.5" in text else None)
    rows = list(csv.DictReader((attempt.work_folder / "log.csv").read_text("utf-8").splitlines()))
    assert rows[-1]["step"] == "3"
    (attempt.work_folder / "log.csv").unlink()
    (attempt.work_folder / "log.csv").mkdir()
    with pytest.raises(MediaError, match=r"log\.csv cannot be used as the log"):
        training(engine, folder, attempt.output, steps=4).run()


def test_training_reduces_the_loss(engine: Engine, folder: Path, tmp_path: Path) -> None:
    result = training(
        engine, folder, tmp_path / "lora.safetensors", steps=30, batch_size=4, learning_rate=3e-2, rank=8
    ).run()
    assert result.last_loss < 0.8 * result.first_loss


def test_examples_are_encoded_once_and_again_when_they_change(
    engine: Engine, folder: Path, tmp_path: Path, make_clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    encode = Engine.encode_media
    monkeypatch.setattr(
        Engine, "encode_media", lambda *args, **kwargs: (calls.append(args[1].prompt), encode(*args, **kwargs))[1]
    )

    def encoded_prompts() -> list[str]:
        calls.clear()
        encode_examples(engine, read_dataset(folder, FRAMES), SETTINGS, tmp_path / "cache", lambda progress: None)
        return list(calls)

    assert len(encoded_prompts()) == 4
    assert encoded_prompts() == []
    make_clip(folder / "1.mp4", seed=77, caption="a blue sea")
    assert encoded_prompts() == ["a blue sea"]
    (folder / "2.txt").write_text("birds fly")
    assert encoded_prompts() == ["birds fly"]


def test_another_number_of_the_cache_is_another_file(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, cache = read_dataset(folder, FRAMES)[:1], tmp_path / "cache"
    encode_examples(engine, examples, SETTINGS, cache, lambda progress: None)
    (first,) = cache.iterdir()
    for number in (example_cache.EXAMPLE_CACHE_NUMBER - 1, example_cache.EXAMPLE_CACHE_NUMBER + 1):
        monkeypatch.setattr(example_cache, "EXAMPLE_CACHE_NUMBER", number)
        (cached,) = encode_examples(engine, examples, SETTINGS, cache, lambda progress: None)
        assert cached.file != first
    assert len(list(cache.iterdir())) == 3


def copy_stored_state(output: Path, **header: Any) -> Path:
    """Copies a state that kadr wrote before schema numbers beside the output, and changes entries of its header."""
    path = output.with_suffix(".training") / "state.safetensors"
    path.parent.mkdir()
    with safe_open(STORED_FILES / "state.safetensors", framework="pt") as file:
        stored = json.loads(file.metadata()["kadr_training"])
    assert "schema" not in stored
    metadata = {"kadr_training": json.dumps({**stored, **header})}
    save_file(load_file(STORED_FILES / "state.safetensors"), path, metadata=metadata)
    return path


def test_state_from_before_schema_numbers_is_resumed(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "lora.safetensors"
    path = copy_stored_state(output)
    settings = LoRATraining(engine, folder, output, SETTINGS).settings.to_json()
    monkeypatch.setattr(LoRATraining, "_identity", lambda *args: settings)  # other paths: the model and the clips
    result = training(engine, folder, output).run()
    assert (result.start_step, result.steps) == (2, 4)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["kadr_training"])["schema"] == TRAINING_STATE.number


def test_state_of_a_newer_kadr_is_refused_by_name(engine: Engine, folder: Path, tmp_path: Path) -> None:
    newer = TRAINING_STATE.number + 1
    path = copy_stored_state(tmp_path / "lora.safetensors", schema=newer)
    with pytest.raises(CheckpointError, match=rf"the training state in .* has the schema number {newer}; .* update"):
        training(engine, folder, tmp_path / "lora.safetensors").run()
    assert path.exists()


def test_cached_tensors_are_the_clip_itself_and_its_prompt_embeddings(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    """Neither blurred nor compressed, as the images of conditions are; resized with antialiasing."""
    examples = read_dataset(folder, FRAMES)
    cached_examples = encode_examples(engine, examples, SETTINGS, tmp_path / "cache", lambda progress: None)
    for example, cached in zip(examples, cached_examples, strict=True):
        tensors = cached.load_tensors()
        frames = [load_image(example.media)] if example.fps is None else read_video(example.media, FRAMES).frames
        pixels = [
            normalize_image(np.asarray(crop_to_aspect(load_image(frame), SIZE).resize((64, 32)))) for frame in frames
        ]
        vae = engine.spec.vae_checkpoint.load_vae(torch.float32, with_decoder=False)
        with torch.no_grad():
            expected = vae.encode(torch.stack(pixels, dim=1)[None])
        assert relative_error(tensors["latents"], expected) <= 1e-5
        assert tensors["latents"].shape[2:] == (cached.grid.frames, cached.grid.height, cached.grid.width)
        (embeds,) = engine.encode_prompts(example_request(example, SETTINGS), [example.caption])
        assert torch.equal(tensors["prompt_embeds"], embeds.float())
        assert "reference" not in tensors


@pytest.mark.parametrize("references", [FILES, CANNY])
def test_in_context_lora_encodes_references_and_declares_itself(
    references: str, engine: Engine, folder: Path, tmp_path: Path, make_clip: Callable[..., Path]
) -> None:
    for name in ("0", "1", "2"):
        make_clip(folder / f"{name}.reference.mp4", seed=50, caption=None)
    (folder / "still.reference.png").write_bytes((folder / "still.png").read_bytes())
    attempt = training(engine, folder, tmp_path / "lora.safetensors", steps=2, references=references)
    result = attempt.run()
    assert LoraFile.open(result.path).reference_downscale == 1
    cache_files = [load_file(path) for path in (attempt.work_folder / "cache").iterdir()]
    assert all(each["reference"].shape == each["latents"].shape for each in cache_files)
    assert not any(
        torch.equal(each["reference"], each["latents"]) for each in cache_files if each["latents"].shape[2] > 1
    )


def test_validation_videos_use_the_lora_as_of_their_step(engine: Engine, folder: Path, tmp_path: Path) -> None:
    attempt = training(
        engine, folder, tmp_path / "lora.safetensors", validation_prompts=("a blue sea",), validate_every=2
    )
    attempt.run()
    assert sorted(path.name for path in attempt.work_folder.glob("*.mp4")) == ["step-000002-1.mp4", "step-000004-1.mp4"]
    assert read_metadata(attempt.work_folder / "step-000004-1.mp4")["request"]["prompt"] == "a blue sea"
    early, late = ((attempt.work_folder / f"step-00000{step}-1.mp4").read_bytes() for step in (2, 4))
    assert early != late
    for step in (2, 4):
        (described,) = read_metadata(attempt.work_folder / f"step-00000{step}-1.mp4")["loras"]
        assert described["path"] == str(attempt.work_folder / f"step-00000{step}.safetensors")
        assert described["sha256"] == LoraFile.open(described["path"]).sha256


def test_caption_dropout_changes_the_lora(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_captions = training(engine, folder, tmp_path / "plain.safetensors", steps=2).run()
    without_captions = training(engine, folder, tmp_path / "never.safetensors", steps=2, caption_dropout_p=1.0).run()
    actual, expected = load_file(without_captions.path), load_file(with_captions.path)
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in actual.items())


@pytest.mark.parametrize("quant", ["int8-weights", "Q8_0"])
def test_lora_trains_beside_a_quantized_base(quant: str, home: Path, folder: Path, tmp_path: Path) -> None:
    engine = Engine.open(home / MODEL_FILE, device="cpu", prompt_cache=False, quant=quant)
    result = training(engine, folder, tmp_path / "lora.safetensors", steps=6, batch_size=4, learning_rate=3e-2).run()
    assert result.last_loss < result.first_loss


def test_training_that_does_not_fit_is_refused_before_encoding(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 1_000_000)
    attempt = training(engine, folder, tmp_path / "lora.safetensors")
    with pytest.raises(
        PlanError, match=r"training takes about .* and 0\.0 GB are free on cpu\. Use a smaller --batch-size"
    ):
        attempt.run()
    assert not attempt.work_folder.exists()


def test_gradient_checkpointing_is_used_when_tight_and_changes_no_bit(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_file(training(engine, folder, tmp_path / "a.safetensors", steps=2).run().path)
    attempt = training(engine, folder, tmp_path / "b.safetensors", steps=2)
    examples = read_dataset(folder, FRAMES)
    roomy, tight = (
        required_bytes(engine, attempt.settings, examples, gradient_checkpointing=checkpointing).total
        for checkpointing in (False, True)
    )
    assert tight < roomy
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: roomy)
    calls: list[object] = []
    monkeypatch.setattr(
        lora_training,
        "enable_gradient_checkpointing",
        lambda blocks: (calls.append(blocks), enable_gradient_checkpointing(blocks)),
    )
    actual = load_file(attempt.run().path)
    assert calls
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def test_untrainable_engines_and_outputs_are_refused(engine: Engine, home: Path, folder: Path, tmp_path: Path) -> None:
    result = training(engine, folder, tmp_path / "a.safetensors", steps=1).run()
    opened = Engine.open(home / MODEL_FILE, device="cpu", prompt_cache=False, loras=[result.path])
    with pytest.raises(RequestError, match="was opened with LoRAs"):
        training(opened, folder, tmp_path / "b.safetensors").run()
    with pytest.raises(MediaError, match=r"does not end in \.safetensors"):
        training(engine, folder, tmp_path / "b.pt").run()
    with pytest.raises(MediaError, match="does not exist or cannot be written"):
        training(engine, folder, tmp_path / "none" / "b.safetensors").run()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", 0, "rank is 0; it must lie between 1 and 1024"),
        ("rank", 1.5, "must be a whole number"),
        ("learning_rate", 2, "between 1e-08 and 1"),
        ("first_frame_conditioning_p", -0.1, "between 0 and 1"),
        ("sigma_sampling", "even", "must be one of shifted-logit-normal, uniform"),
        ("target_modules", "heads", "must be one of attention"),
        ("references", "depth", "must be one of off, files, canny"),
        ("frames", 10, "training takes 8k[+]1 frames of a clip, such as 9"),
    ],
)
def test_out_of_range_settings_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        replace(SETTINGS, **{field: value})


def test_model_that_is_not_on_disk_is_fetched_before_anything_is_encoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_training, "needs_gradient_checkpointing", lambda *args: True)  # whatever fits here
    engine = Engine.open("ltxv-2b-0.9.8-distilled", device="cpu")
    settings = TrainingSettings(size=SIZE, frames=FRAMES, steps=1)
    with pytest.raises(CheckpointError, match=r"ltxv-2b-0\.9\.8-distilled\.safetensors .* could not be fetched"):
        LoRATraining(engine, folder, tmp_path / "mine.safetensors", settings).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips"]
