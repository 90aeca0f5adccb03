"""A whole training, of a tiny model: what it writes, how it goes on, and what it refuses."""

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
from safetensors.torch import load_file

from kadr import Engine, Request
from kadr.checkpoints.lora.file import LoraFile
from kadr.errors import CheckpointError, KadrError, KadrWarning, MediaError, PlanError, RequestError
from kadr.media.clip import read_metadata, read_video
from kadr.media.control_maps import normalize_image
from kadr.media.image import crop_to_aspect, load_image
from kadr.models.lora_layers import attach_loras, set_lora_strengths
from kadr.pipeline.longvideo.folder_lock import lock_folder
from kadr.pipeline.progress import Progress
from kadr.shapes import Size
from kadr.training import lora_training, memory_check
from kadr.training.dataset import read_dataset
from kadr.training.example_cache import encode_examples, example_request
from kadr.training.lora_training import LoRATraining
from kadr.training.memory_check import required_bytes
from kadr.training.settings import CANNY, FILES, TrainingSettings
from kadr.training.trainable_lora import enable_gradient_checkpointing
from kadr.training.trainer import LoRATrainer
from tests.models.test_transformer import Inputs, asked_of_diffusers, velocity
from tests.oracles import diffusers_transformer, relative_error
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


class Cut(Exception):
    """Somebody pulled the plug."""


def training(engine: Engine, folder: Path, output: Path, **more: Any) -> LoRATraining:
    settings = replace(SETTINGS, **{name: more.pop(name) for name in list(more) if hasattr(SETTINGS, name)})
    return LoRATraining(engine, folder, output, settings, **more)


def cut_at(step: int) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        if progress.stage == "train" and progress.step == step:
            raise Cut

    return watch


def test_what_is_trained_is_a_lora_that_opens_and_acts(
    engine: Engine, folder: Path, home: Path, tmp_path: Path
) -> None:
    output = tmp_path / "lora.safetensors"
    made = training(engine, folder, output).run()
    assert (made.path, made.steps, made.num_examples) == (output, 4, 4)
    told = LoraFile.open(output).describe()
    assert (told.key_format, told.num_adapted_layers, told.ranks, told.unexpected_keys) == ("Comfy", 16, (3,), ())
    assert (told.metadata["kadr_steps"], told.reference_downscale) == ("4", None)
    with_it = Engine.open(home / MODEL_FILE, device="cpu", prompt_cache=False, loras=[output])
    plain = engine.denoise(REQUEST)
    assert not torch.equal(with_it.denoise(REQUEST), plain)
    assert torch.equal(with_it.denoise(replace(REQUEST, lora_strengths=(0.0,))), plain)


def test_what_is_trained_gives_the_same_velocity_in_diffusers(engine: Engine, folder: Path, tmp_path: Path) -> None:
    made = training(engine, folder, tmp_path / "lora.safetensors", targets="attention+feed-forward").run()
    module = engine.components.load_transformer(0, torch.float32, as_stored=False)
    given, pipeline = Inputs.of(module.config), LTXPipeline(None, None, None, None, diffusers_transformer(module))
    with torch.no_grad():
        without = velocity(module, given)
        pipeline.load_lora_weights(made.path, adapter_name="ours")
        pipeline.set_adapters(["ours"], [0.7])
        theirs = asked_of_diffusers(pipeline.transformer, given)
        attach_loras(module, [LoraFile.open(made.path).load()], torch.float32)
        set_lora_strengths(module, [0.7], torch.device("cpu"))
        assert relative_error(theirs, without) > 1e-3
        assert relative_error(velocity(module, given), theirs) <= 1e-5


def test_a_broken_run_goes_on_to_the_same_lora(engine: Engine, folder: Path, tmp_path: Path) -> None:
    whole = training(engine, folder, tmp_path / "whole.safetensors").run()
    broken = training(engine, folder, tmp_path / "broken.safetensors", save_every=2)
    state, kept, cut = broken.work_folder / "state.safetensors", [], cut_at(3)

    def watch(progress: Progress) -> None:
        if (progress.stage, progress.step) == ("train", 2):
            kept.append(state.read_bytes())
        cut(progress)

    with pytest.raises(Cut):
        broken.run(watch)
    state.write_bytes(kept[-1])  # the third step is done, and not saved: nothing runs any more when the power fails
    assert not broken.output.exists()
    made = broken.run()
    ours, right = load_file(made.path), load_file(whole.path)
    assert ours.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in ours.items())
    assert (made.first_loss, made.last_loss) == pytest.approx((whole.first_loss, whole.last_loss), rel=1e-4)
    rows = list(csv.DictReader((broken.work_folder / "log.csv").read_text("utf-8").splitlines()))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]


def test_a_run_that_is_stopped_keeps_every_step_that_is_done(engine: Engine, folder: Path, tmp_path: Path) -> None:
    whole = training(engine, folder, tmp_path / "whole.safetensors").run()
    stopped = training(engine, folder, tmp_path / "stopped.safetensors", save_every=100)
    with pytest.raises(Cut):
        stopped.run(cut_at(3))
    seen: list[int] = []
    made = stopped.run(lambda progress: seen.append(progress.step) if progress.stage == "train" else None)
    assert seen == [3, 4]
    assert (made.start_step, made.steps) == (3, 4)
    ours, right = load_file(made.path), load_file(whole.path)
    assert all(torch.equal(tensor, right[name]) for name, tensor in ours.items())


def test_a_run_that_is_stopped_inside_of_an_update_keeps_what_was_saved_before(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = training(engine, folder, tmp_path / "stopped.safetensors", save_every=2)
    step, calls = torch.optim.AdamW.step, []

    def half(self: torch.optim.AdamW) -> None:
        step(self)
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    with safe_open(stopped.work_folder / "state.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["kadr_training"])["step"] == 2


def test_a_finished_training_goes_on_with_more_steps_as_if_it_had_been_longer(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    longer = training(engine, folder, tmp_path / "longer.safetensors", steps=4).run()
    training(engine, folder, tmp_path / "more.safetensors", steps=2).run()
    more = training(engine, folder, tmp_path / "more.safetensors", steps=4).run()
    ours, right = load_file(more.path), load_file(longer.path)
    assert all(torch.equal(tensor, right[name]) for name, tensor in ours.items())


def test_another_training_in_the_same_place_is_refused_and_nothing_is_lost(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "lora.safetensors"
    training(engine, folder, output, steps=1).run()
    before = output.read_bytes()
    with pytest.raises(CheckpointError, match=r"holds a training with rank = 3, and now it is 4"):
        training(engine, folder, output, steps=1, rank=4).run()
    (output.with_suffix(".training") / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read as a training"):
        training(engine, folder, output, steps=1).run()
    assert output.read_bytes() == before


def test_another_training_is_refused_before_anything_is_encoded(
    engine: Engine, folder: Path, tmp_path: Path, make_clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "lora.safetensors"
    first = training(engine, folder, output, steps=2).run()
    before = output.read_bytes()
    monkeypatch.setattr(lora_training, "encode_examples", lambda *given: pytest.fail("something was encoded"))
    with pytest.raises(CheckpointError, match="holds a training with size = 64x32, and now it is 96x32"):
        training(engine, folder, output, steps=2, size=Size(96, 32)).run()
    with pytest.raises(RequestError, match="has done 2 steps, and 1 are asked for"):
        training(engine, folder, output, steps=1).run()
    (folder / "2.txt").write_text("birds fly")
    (folder / "still.png").unlink()
    make_clip(folder / "3.mp4", seed=3)
    make_clip(folder / "4.mp4", seed=4)
    with pytest.raises(CheckpointError) as refused:
        training(engine, folder, output, steps=2).run()
    assert "other clips or captions: still.png gone, 3.mp4 and 1 more new, 2.mp4 changed." in str(refused.value)
    assert (first.start_step, output.read_bytes()) == (0, before)


def test_a_training_goes_on_where_its_folder_was_moved_to(engine: Engine, folder: Path, tmp_path: Path) -> None:
    longer = training(engine, folder, tmp_path / "longer.safetensors").run()
    training(engine, folder, tmp_path / "more.safetensors", steps=2).run()
    more = training(engine, folder.rename(tmp_path / "elsewhere"), tmp_path / "more.safetensors").run()
    assert more.start_step == 2
    ours, right = load_file(more.path), load_file(longer.path)
    assert all(torch.equal(tensor, right[name]) for name, tensor in ours.items())


def test_what_cannot_be_made_on_the_way_is_refused_before_anything_is_computed(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_training, "read_dataset", lambda *given, **more: pytest.fail("the folder was read"))
    output = tmp_path / "lora.safetensors"
    with pytest.raises(RequestError, match="the prompt is empty"):
        training(engine, folder, output, prompts=("a red circle", "")).run()
    with pytest.raises(KadrError, match="63x31"):
        training(engine, folder, output, prompts=("a red circle",), size=Size(63, 31)).run()
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(MediaError, match=r"folder\.safetensors is there"):
        training(engine, folder, tmp_path / "folder.safetensors").run()


def test_a_clip_that_fails_at_the_end_costs_no_lora(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **more: Any) -> None:
        raise MediaError("no room")

    monkeypatch.setattr(Engine, "write", fail)
    wanted = training(engine, folder, tmp_path / "lora.safetensors", prompts=("a blue sea",))
    with pytest.raises(MediaError, match="no room"):
        wanted.run()
    assert LoraFile.open(wanted.output).describe().metadata["kadr_steps"] == "4"


def test_the_lora_of_every_measurement_is_kept(engine: Engine, folder: Path, tmp_path: Path) -> None:
    wanted = training(engine, folder, tmp_path / "lora.safetensors", steps=5, every=2)
    wanted.run()
    kept = sorted(wanted.work_folder.glob("step-*.safetensors"))
    assert [path.name for path in kept] == [f"step-00000{step}.safetensors" for step in (2, 4, 5)]
    shorter = training(engine, folder, tmp_path / "shorter.safetensors", steps=4).run()
    ours, right = load_file(kept[1]), load_file(shorter.path)
    assert all(torch.equal(tensor, right[name]) for name, tensor in ours.items())


def test_a_loss_that_goes_up_is_warned_of(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter((0.5, 0.75))
    monkeypatch.setattr(LoRATrainer, "validation_loss", lambda self: next(losses))
    with pytest.warns(KadrWarning, match=r"went up, from 0\.5000 to 0\.7500: nothing was learned"):
        training(engine, folder, tmp_path / "lora.safetensors", steps=1).run()


def test_two_runs_do_not_train_in_one_place(engine: Engine, folder: Path, tmp_path: Path) -> None:
    wanted = training(engine, folder, tmp_path / "lora.safetensors", steps=1)
    with lock_folder(wanted.work_folder), pytest.raises(RequestError, match="another run works in"):
        wanted.run()
    wanted.run()


@pytest.mark.parametrize(
    "text", ["", "step;loss\n1;2\n", "step,loss,held,seconds\n0,,9.5,\n1,x,,\nrubbish,1", "\0\xff"]
)
def test_a_log_that_cannot_be_read_stops_no_training(text: str, engine: Engine, folder: Path, tmp_path: Path) -> None:
    wanted = training(engine, folder, tmp_path / "lora.safetensors", steps=2)
    wanted.run()
    (wanted.work_folder / "log.csv").write_text(text, "latin-1")
    made = training(engine, folder, wanted.output, steps=3).run()
    assert made.first_loss == (9.5 if "9.5" in text else None)
    rows = list(csv.DictReader((wanted.work_folder / "log.csv").read_text("utf-8").splitlines()))
    assert rows[-1]["step"] == "3"
    (wanted.work_folder / "log.csv").unlink()
    (wanted.work_folder / "log.csv").mkdir()
    with pytest.raises(MediaError, match=r"log\.csv cannot be used as the log"):
        training(engine, folder, wanted.output, steps=4).run()


def test_it_learns_what_it_is_shown(engine: Engine, folder: Path, tmp_path: Path) -> None:
    made = training(engine, folder, tmp_path / "lora.safetensors", steps=30, batch=4, rate=3e-2, rank=8).run()
    assert made.last_loss < 0.8 * made.first_loss


def test_clips_are_encoded_once_and_again_when_they_change(
    engine: Engine, folder: Path, tmp_path: Path, make_clip: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    encode = Engine.encode_media
    monkeypatch.setattr(
        Engine, "encode_media", lambda *given, **more: (asked.append(given[1].prompt), encode(*given, **more))[1]
    )

    def look() -> list[str]:
        asked.clear()
        encode_examples(engine, read_dataset(folder, FRAMES), SETTINGS, tmp_path / "cache", lambda progress: None)
        return list(asked)

    assert len(look()) == 4
    assert look() == []
    make_clip(folder / "1.mp4", seed=77, caption="a blue sea")
    assert look() == ["a blue sea"]
    (folder / "2.txt").write_text("birds fly")
    assert look() == ["birds fly"]


def test_what_is_learned_is_the_clip_itself_and_the_text_that_a_generation_reads(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    """Neither blurred nor compressed, as pictures are that a video shows; made smaller with regard to every pixel."""
    examples = read_dataset(folder, FRAMES)
    made = encode_examples(engine, examples, SETTINGS, tmp_path / "cache", lambda progress: None)
    for example, known in zip(examples, made, strict=True):
        read = known.load_tensors()
        frames = [load_image(example.media)] if example.fps is None else read_video(example.media, FRAMES).frames
        shown = [normalize_image(np.asarray(crop_to_aspect(load_image(one), SIZE).resize((64, 32)))) for one in frames]
        with engine.components.vae_encoder() as vae, torch.no_grad():
            expected = vae.encode(torch.stack(shown, dim=1)[None])
        assert relative_error(read["latents"], expected) <= 1e-5
        assert read["latents"].shape[2:] == (known.grid.frames, known.grid.height, known.grid.width)
        (text,) = engine.encode_prompts(example_request(example, SETTINGS), [example.caption])
        assert torch.equal(read["text"], text.float())
        assert "reference" not in read


@pytest.mark.parametrize("references", [FILES, CANNY])
def test_in_context_a_reference_is_encoded_and_the_file_says_so(
    references: str, engine: Engine, folder: Path, tmp_path: Path, make_clip: Callable[..., Path]
) -> None:
    for name in ("0", "1", "2"):
        make_clip(folder / f"{name}.reference.mp4", seed=50, caption=None)
    (folder / "still.reference.png").write_bytes((folder / "still.png").read_bytes())
    wanted = training(engine, folder, tmp_path / "lora.safetensors", steps=2, references=references)
    made = wanted.run()
    assert LoraFile.open(made.path).reference_downscale == 1
    read = [load_file(path) for path in (wanted.work_folder / "cache").iterdir()]
    assert all(each["reference"].shape == each["latents"].shape for each in read)
    assert not any(torch.equal(each["reference"], each["latents"]) for each in read if each["latents"].shape[2] > 1)


def test_clips_are_made_on_the_way_with_what_is_learned_by_then(engine: Engine, folder: Path, tmp_path: Path) -> None:
    wanted = training(engine, folder, tmp_path / "lora.safetensors", prompts=("a blue sea",), every=2)
    wanted.run()
    assert sorted(path.name for path in wanted.work_folder.glob("*.mp4")) == ["step-000002-1.mp4", "step-000004-1.mp4"]
    assert read_metadata(wanted.work_folder / "step-000004-1.mp4")["request"]["prompt"] == "a blue sea"
    early, late = ((wanted.work_folder / f"step-00000{step}-1.mp4").read_bytes() for step in (2, 4))
    assert early != late
    assert engine.components.transformer_override is None
    for step in (2, 4):
        (noted,) = read_metadata(wanted.work_folder / f"step-00000{step}-1.mp4")["loras"]
        assert noted["path"] == str(wanted.work_folder / f"step-00000{step}.safetensors")
        assert noted["sha256"] == LoraFile.open(noted["path"]).sha256


def test_captions_are_left_out_as_often_as_was_asked_for(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = training(engine, folder, tmp_path / "plain.safetensors", steps=2).run()
    never = training(engine, folder, tmp_path / "never.safetensors", steps=2, caption_dropout=1.0).run()
    ours, right = load_file(never.path), load_file(plain.path)
    assert any(not torch.equal(tensor, right[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("quant", ["int8-weights", "Q8_0"])
def test_a_base_in_fewer_bits_is_trained_beside(quant: str, home: Path, folder: Path, tmp_path: Path) -> None:
    engine = Engine.open(home / MODEL_FILE, device="cpu", prompt_cache=False, quant=quant)
    made = training(engine, folder, tmp_path / "lora.safetensors", steps=6, batch=4, rate=3e-2).run()
    assert made.last_loss < made.first_loss


def test_what_does_not_fit_is_refused_before_anything_is_encoded(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 1_000_000)
    wanted = training(engine, folder, tmp_path / "lora.safetensors")
    with pytest.raises(
        PlanError, match=r"training takes about .* and 0\.0 are free on cpu\. Take a smaller --batch-size"
    ):
        wanted.run()
    assert not wanted.work_folder.exists()


def test_layers_are_computed_twice_where_memory_asks_for_it_and_it_comes_to_the_same(
    engine: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = load_file(training(engine, folder, tmp_path / "a.safetensors", steps=2).run().path)
    wanted = training(engine, folder, tmp_path / "b.safetensors", steps=2)
    found = read_dataset(folder, FRAMES)
    roomy, tight = (
        required_bytes(engine, wanted.settings, found, gradient_checkpointing=twice).total for twice in (False, True)
    )
    assert tight < roomy
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: roomy)
    asked: list[object] = []
    monkeypatch.setattr(
        lora_training,
        "enable_gradient_checkpointing",
        lambda blocks: (asked.append(blocks), enable_gradient_checkpointing(blocks)),
    )
    ours = load_file(wanted.run().path)
    assert asked
    assert all(torch.equal(tensor, right[name]) for name, tensor in ours.items())


def test_what_cannot_be_trained_is_refused(engine: Engine, home: Path, folder: Path, tmp_path: Path) -> None:
    made = training(engine, folder, tmp_path / "a.safetensors", steps=1).run()
    opened = Engine.open(home / MODEL_FILE, device="cpu", prompt_cache=False, loras=[made.path])
    with pytest.raises(RequestError, match="opened with LoRAs"):
        training(opened, folder, tmp_path / "b.safetensors").run()
    with pytest.raises(MediaError, match=r"does not end in \.safetensors"):
        training(engine, folder, tmp_path / "b.pt").run()
    with pytest.raises(MediaError, match="does not exist or cannot be written"):
        training(engine, folder, tmp_path / "none" / "b.safetensors").run()


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("rank", 0, "rank is 0; it must lie between 1 and 1024"),
        ("rank", 1.5, "must be a whole number"),
        ("rate", 2, "between 1e-08 and 1"),
        ("first_frame", -0.1, "between 0 and 1"),
        ("levels", "even", "must be one of shifted, uniform"),
        ("targets", "heads", "must be one of attention"),
        ("references", "depth", "must be one of off, files, canny"),
        ("frames", 10, "clips are learned in 8k[+]1, such as 9"),
    ],
)
def test_settings_out_of_their_range_are_refused(field: str, value: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        replace(SETTINGS, **{field: value})
