"""What holds of every generation, whatever the weights: on a tiny model of random numbers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kadr import Condition, Engine, KadrWarning, Progress, Request, Size, Video
from kadr.errors import Cancelled
from kadr.media.clip import read_metadata, read_video
from kadr.media.postprocess import crop_margins, denormalize, to_uint8
from kadr.media.writer import VideoWriter
from kadr.memory.module_cache import ModuleCache
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.sampling.noise import NoiseStreams
from tests.tiny_models import CHANNELS, MODEL_FILE, SENTENCE, write_model

REQUEST = Request(prompt="a red circle", size=Size(64, 32), frames=9, fps=24, seed=7, steps=3, guidance=3.0)
SHAPE = (1, CHANNELS, 2, 1, 2)


@pytest.fixture(scope="module")
def injecting(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """With a decoder that injects noise."""
    return Engine.open(
        write_model(tmp_path_factory.mktemp("0.9.1"), family="0.9.1", is_causal=False) / MODEL_FILE,
        device="cpu",
        prompt_cache=False,
    )


def same(one: Video, other: Video) -> bool:
    return np.array_equal(one.frames, other.frames) and torch.equal(one.latents, other.latents)


# --- seeds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"stochastic": True}, {"guidance": 1.0}], ids=str)
def test_the_same_seed_gives_the_same_video_bit_for_bit(
    engine: Engine, injecting: Engine, image_condition: Condition, change: dict[str, Any]
) -> None:
    for opened in (engine, injecting):
        request = replace(REQUEST, conditions=(image_condition,), **change)
        torch.manual_seed(1)
        one = opened.generate(request)
        torch.manual_seed(2)  # what others do to torch's own generator changes nothing
        torch.randn(3)
        assert same(one, opened.generate(request))


def test_another_engine_on_the_same_files_gives_the_same_video(home: Path, engine: Engine) -> None:
    assert same(engine.generate(REQUEST), Engine.open(home / MODEL_FILE, device="cpu").generate(REQUEST))


def test_another_seed_gives_another_video(engine: Engine) -> None:
    one, other = engine.generate(REQUEST), engine.generate(replace(REQUEST, seed=8))
    assert not np.array_equal(one.frames, other.frames)
    assert (one.latents - other.latents).std() > 0.1


def test_what_the_seed_would_draw_can_be_given(engine: Engine) -> None:
    streams = NoiseStreams(8)
    latents = engine.denoise(REQUEST, noise=streams.draw("initial", SHAPE))
    assert torch.equal(latents, engine.denoise(replace(REQUEST, seed=8)))
    assert not torch.equal(latents, engine.denoise(REQUEST))
    frames = engine.decode(latents, REQUEST, noise=streams.draw("decode", SHAPE))
    assert torch.equal(frames, engine.decode(latents, replace(REQUEST, seed=8)))
    assert not torch.equal(frames, engine.decode(latents, REQUEST))


def test_generating_is_denoising_and_decoding(engine: Engine, injecting: Engine, image_condition: Condition) -> None:
    for opened in (engine, injecting):
        request = replace(REQUEST, conditions=(image_condition,))
        video = opened.generate(request)
        latents = opened.denoise(request)
        assert torch.equal(video.latents, latents[0])
        assert np.array_equal(video.frames, opened.decode(latents, request).numpy())


def test_encoding_gives_the_latents_that_a_held_picture_starts_from(engine: Engine, image_condition: Condition) -> None:
    request = replace(REQUEST, conditions=(image_condition,), image_noise=0.0)
    assert torch.equal(engine.encode_first_condition(request), engine.denoise(request)[:, :, :1])


def test_bfloat16_gives_nearly_the_video_of_float32(home: Path, engine: Engine, image_condition: Condition) -> None:
    narrow = Engine.open(home / MODEL_FILE, device="cpu", dtype="bfloat16")
    request = replace(REQUEST, conditions=(image_condition,))
    one, other = engine.generate(request), narrow.generate(request)
    assert narrow.metadata(request)["dtype"] == "bfloat16"
    assert other.latents.dtype == torch.float32
    assert ((one.latents - other.latents).norm() / one.latents.norm()).item() < 0.03
    assert not torch.equal(one.latents, other.latents)
    assert np.abs(one.frames.astype(int) - other.frames).mean() < 6


# --- guidance and text --------------------------------------------------------------------------------------------


def test_guidance_in_one_batch_gives_the_same_video(engine: Engine, image_condition: Condition) -> None:
    for request in (REQUEST, replace(REQUEST, conditions=(replace(image_condition, strength=0.7),), steps=6)):
        one, other = engine.denoise(request), engine.denoise(replace(request, guidance_batch=True))
        assert ((one - other).norm() / one.norm()).item() <= 1e-5


@pytest.mark.parametrize(("guidance", "prompts"), [(1.0, 1), (1.5, 2), (3.0, 2)])
@pytest.mark.parametrize("together", [False, True])
def test_the_negative_prompt_is_encoded_only_where_guidance_needs_it(
    engine: Engine, guidance: float, prompts: int, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Tensor] = []
    batches: list[int] = []
    encode, forward = T5Encoder.forward, Transformer.forward
    monkeypatch.setattr(T5Encoder, "forward", lambda *given: (encoded.append(given[1]), encode(*given))[1])
    monkeypatch.setattr(Transformer, "forward", lambda *given: (batches.append(len(given[1])), forward(*given))[1])
    request = replace(REQUEST, guidance=guidance, guidance_batch=together, negative_prompt="blue sea")
    engine.denoise(request)
    tokenizer = engine.components.tokenizer
    expected = [tokenizer.encode(text).ids for text in ("a red circle", "blue sea")][:prompts]
    assert [ids.tolist() for ids in encoded] == [ids.tolist() for ids in expected]
    assert batches == ([prompts] * 3 if together else [1] * 3 * prompts)


def test_without_guidance_the_negative_prompt_changes_nothing(engine: Engine) -> None:
    request = replace(REQUEST, guidance=1.0)
    assert torch.equal(engine.denoise(request), engine.denoise(replace(request, negative_prompt="blue sea")))
    assert not torch.equal(engine.denoise(REQUEST), engine.denoise(replace(REQUEST, negative_prompt="blue sea")))


def test_space_around_a_prompt_changes_nothing(engine: Engine) -> None:
    assert torch.equal(engine.denoise(REQUEST), engine.denoise(replace(REQUEST, prompt="  a red circle \n")))


def test_a_prompt_that_is_too_long_is_cut_with_a_warning_that_says_what(engine: Engine) -> None:
    words = (SENTENCE + " ") * 60
    request = replace(REQUEST, prompt=words + "the very end", guidance=1.0)
    with pytest.warns(KadrWarning, match=r"256 tokens.*the very end") as told:
        one = engine.generate(request)
    assert len(told) == 1
    with pytest.warns(KadrWarning):
        other = engine.generate(replace(request, prompt=words + "another end"))
    assert same(one, other)


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "frames"), [(Size(64, 32), 9), (Size(50, 21), 4), (Size(33, 31), 1), (Size(1, 1), 2), (Size(64, 63), 16)]
)
@pytest.mark.parametrize("held", [False, True])
def test_a_video_is_made_larger_and_then_cropped_and_trimmed(
    engine: Engine, image_condition: Condition, size: Size, frames: int, held: bool
) -> None:
    request = replace(REQUEST, size=size, frames=frames, steps=1, conditions=(image_condition,) if held else ())
    made, length = size.snap(), (frames + 6) // 8 * 8 + 1
    video = engine.generate(request)
    assert video.frames.shape == (frames, size.height, size.width, 3)
    assert video.frames.dtype == np.uint8
    assert video.latents.shape == (CHANNELS, (length - 1) // 8 + 1, made.height // 32, made.width // 32)
    assert video.latents.dtype == torch.float32
    assert video.size == size
    whole = engine.decode(video.latents[None], replace(request, size=made, frames=length, conditions=()))
    assert whole.shape == (length, made.height, made.width, 3)
    cut = crop_margins(whole.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)[:frames]
    assert np.array_equal(video.frames, cut.numpy())


def test_frames_that_are_trimmed_do_not_change_those_that_stay(engine: Engine) -> None:
    assert torch.equal(engine.denoise(replace(REQUEST, frames=4)), engine.denoise(REQUEST))


def test_decoding_as_a_stream_is_decoding_at_once(engine: Engine, injecting: Engine) -> None:
    for opened in (engine, injecting):
        request = replace(REQUEST, frames=33, steps=1, decode_noise=0.0)
        video = opened.generate(request)
        streams = NoiseStreams(request.seed)
        counted = iter(range(1, 100))
        with opened.components.vae_decoder() as vae, torch.no_grad():
            level = torch.tensor([opened.recipe.decode_timestep])
            whole = vae.decode(
                video.latents[None],
                timestep=level,
                noise_source=lambda shape: streams.draw(f"injection {next(counted)}", shape),  # noqa: B023
            )
        off = (torch.from_numpy(video.frames).int() - to_uint8(denormalize(whole[0])).int()).abs()
        assert off.max() <= 1  # a hair on either side of a whole number
        assert off.float().mean() < 1e-3


# --- files --------------------------------------------------------------------------------------------------------


def test_frames_that_go_straight_to_a_file_are_those_of_generate(
    engine: Engine, image_condition: Condition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[np.ndarray] = []
    put = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames: (written.append(frames), put(self, frames))[1])
    request = replace(REQUEST, frames=70, steps=1, size=Size(50, 32), conditions=(image_condition,))
    made = engine.write(request, tmp_path / "out.mp4")
    video = engine.generate(request)
    assert len(written) > 1, "frames came as they were decoded"
    assert np.array_equal(np.concatenate(written), video.frames)
    assert torch.equal(made.latents, video.latents)
    assert (made.path, made.frames, made.size, made.fps) == (tmp_path / "out.mp4", 70, Size(50, 32), 24.0)
    assert made.request == video.request
    clip = read_video(made.path)
    assert clip.frames.shape == video.frames.shape
    assert clip.fps == 24
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_the_first_frames_are_on_disk_before_the_last_are_decoded(engine: Engine, output_folder: Path) -> None:
    sizes: dict[int, int] = {}

    def watch(progress: Progress) -> None:
        if progress.stage == "decode":
            sizes[progress.step] = sum(path.stat().st_size for path in output_folder.glob(".kadr-*"))

    made = engine.write(
        replace(REQUEST, size=Size(32, 32), frames=121, steps=1, guidance=1.0), output_folder / "a.mp4", watch=watch
    )
    early = [size for frames, size in sizes.items() if 60 <= frames < 121]
    assert early[0] > 1000, "a header and first frames"
    assert all(one < other for one, other in pairwise(early)), "and more with every piece"
    assert early[-1] > made.path.stat().st_size / 4


def test_a_file_remembers_a_request_that_makes_the_same_video_again(
    engine: Engine, image_condition: Condition, tmp_path: Path
) -> None:
    made = engine.write(
        Request(prompt="a red circle", size=(64, 32), frames=9, steps=2, conditions=(image_condition,)), tmp_path / "a.mp4"
    )
    record = read_metadata(made.path)
    again = Request.from_json(record["request"])
    assert again == made.request
    assert record["model"] == str(engine.components.checkpoint.path.resolve())
    assert torch.equal(engine.denoise(again)[0], made.latents)
    video = engine.generate(again)
    assert video.metadata == record
    assert read_metadata(video.save(tmp_path / "b.mp4")) == record


# --- what a request leaves out ------------------------------------------------------------------------------------


def test_what_a_request_leaves_out_comes_from_the_model_s_recipe(engine: Engine) -> None:
    made = engine.resolve(Request(prompt="a red circle"))
    recipe = engine.recipe
    assert (made.size, made.frames, made.fps) == (recipe.size, recipe.frames, recipe.fps)
    assert made.first_pass() == replace(recipe.first_pass, stochastic=False, tone_map=0.0)
    assert (made.negative_prompt, made.image_noise) == (recipe.negative_prompt, recipe.image_noise)
    assert (made.multi_scale, made.second_pass) == (False, None)
    assert (made.decode_timestep, made.decode_noise, made.image_crf) == (
        recipe.decode_timestep,
        recipe.decode_noise,
        29,
    )


def test_a_request_that_leaves_out_the_steps_makes_as_many_as_the_recipe(engine: Engine) -> None:
    seen: list[Progress] = []
    engine.denoise(Request(prompt="a red circle", size=(32, 32), frames=1, guidance=1), watch=seen.append)
    assert max(report.of for report in seen if report.stage == "denoise") == engine.recipe.first_pass.steps


# --- what is in memory, and when -----------------------------------------------------------------------------------


class Seen(ModuleCache):
    """A shelf that notes when modules come and go."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), release_pages=lambda tensors: None)
        self.events: list[str] = []
        self.alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @property
    def names_to_keep(self) -> frozenset[str]:
        """Nothing stays, whatever the plan says."""
        return frozenset()

    @names_to_keep.setter
    def names_to_keep(self, names: object) -> None: ...

    @contextmanager
    def acquire(self, name: str, load: Callable[[], Any], *, configuration: Any = None) -> Iterator[Any]:
        def noted() -> nn.Module:
            self.events.append(f"{name}, with {len(self.alive)} others")
            module = load()
            self.alive.add(module)
            weakref.finalize(module, self.events.append, f"{name} gone")
            return module

        with super().acquire(name, noted, configuration=configuration) as module:
            yield module


@pytest.fixture
def seen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    shelf = Seen()
    monkeypatch.setattr(engine.components, "module_cache", shelf)
    gc.freeze()  # what is already there, so that looking for what is not takes no time
    gc.disable()  # a module must go when the last one looks away, not when Python next tidies up
    yield shelf
    gc.enable()
    gc.unfreeze()


ORDER = [
    f"{name}{what}"
    for name in ("text encoder", "VAE encoder", "transformer", "VAE decoder")
    for what in (", with 0 others", " gone")
]


def test_each_module_is_gone_before_the_next_is_loaded_and_none_stays(
    engine: Engine, image_condition: Condition, seen: Seen, tmp_path: Path
) -> None:
    request = replace(REQUEST, conditions=(image_condition,))
    engine.generate(request)
    assert seen.events == ORDER
    assert not seen.alive
    seen.events.clear()
    engine.write(request, tmp_path / "out.mp4")
    assert seen.events == ORDER
    assert not seen.alive


def test_without_a_picture_no_encoder_is_loaded(engine: Engine, seen: Seen) -> None:
    engine.generate(REQUEST)
    assert seen.events == [event for event in ORDER if not event.startswith("VAE encoder")]


def test_encoder_and_decoder_are_loaded_without_each_other(engine: Engine, image_condition: Condition) -> None:
    with engine.components.vae_encoder() as vae:
        assert vae.decoder is None
        assert vae.encoder is not None
    with engine.components.vae_decoder() as vae:
        assert vae.encoder is None
        assert vae.decoder is not None


def test_opening_loads_no_weights(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: nn.Module, *given: Any, **more: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(nn.Module, "load_state_dict", refuse)
    engine = Engine.open(home / MODEL_FILE, device="cpu")
    assert engine.components.transformer_config.in_channels == CHANNELS


# --- progress and cancelling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("write_file", [False, True])
def test_progress_counts_every_stage_from_0_to_its_end(
    engine: Engine, image_condition: Condition, write_file: bool, tmp_path: Path
) -> None:
    reports: list[Progress] = []
    request = replace(REQUEST, frames=20, conditions=(image_condition,))
    if write_file:
        engine.write(request, tmp_path / "out.mp4", watch=reports.append)
    else:
        engine.generate(request, watch=reports.append)
    stages = list(dict.fromkeys(report.stage for report in reports))
    assert stages == ["text", "encode", "denoise", "decode"]
    for stage, of in (("text", 2), ("encode", 1), ("denoise", 3), ("decode", 20)):
        mine = [report for report in reports if report.stage == stage]
        assert {report.of for report in mine} == {of}
        assert (mine[0].step, mine[-1].step) == (0, of)
        assert all(one.step < other.step for one, other in pairwise(mine))
        assert mine[0].eta is None
        assert all(report.eta is not None and report.eta >= 0 for report in mine[1:])
        assert mine[-1].eta == 0
    assert [report.stage for report in reports] == sorted((r.stage for r in reports), key=stages.index)
    sigmas = [report.sigma for report in reports if report.stage == "denoise"]
    assert sigmas == [None, *engine.components.schedules[0].get_sigmas(3, tokens=6).tolist()]
    assert all(report.sigma is None for report in reports if report.stage != "denoise")


def test_watching_changes_nothing(engine: Engine) -> None:
    assert same(engine.generate(REQUEST), engine.generate(REQUEST, watch=lambda progress: None))


class Enough(Exception):
    """What a watcher may raise."""


@pytest.mark.parametrize("stage", ["text", "encode", "denoise", "decode"])
@pytest.mark.parametrize("step", [0, 1])
def test_a_watcher_that_raises_cancels_and_leaves_neither_file_nor_weights(
    engine: Engine, image_condition: Condition, stage: str, step: int, seen: Seen, tmp_path: Path
) -> None:
    reason = Enough("no more")

    def watch(progress: Progress) -> None:
        if progress.stage == stage and progress.step >= step:
            raise reason

    with pytest.raises(Cancelled, match=f"{stage} .* of") as caught:
        engine.write(replace(REQUEST, conditions=(image_condition,)), tmp_path / "out.mp4", watch=watch)
    assert caught.value.__cause__ is reason
    assert list(tmp_path.iterdir()) == []
    reason.__traceback__ = None
    del caught
    gc.collect()
    assert not seen.alive


def test_a_cancelled_generation_leaves_an_older_file_as_it_was(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"older")

    def watch(progress: Progress) -> None:
        if progress.stage == "decode" and progress.step:
            raise Enough

    with pytest.raises(Cancelled):
        engine.write(REQUEST, path, watch=watch)
    assert path.read_bytes() == b"older"
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]


def test_ctrl_c_is_not_swallowed_and_leaves_no_file(engine: Engine, tmp_path: Path) -> None:
    def watch(progress: Progress) -> None:
        if progress.stage == "denoise" and progress.step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.write(REQUEST, tmp_path / "out.mp4", watch=watch)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_goes_on_after_a_cancelled_generation(engine: Engine) -> None:
    def watch(progress: Progress) -> None:
        raise Enough

    before = engine.generate(REQUEST)
    with pytest.raises(Cancelled):
        engine.generate(REQUEST, watch=watch)
    assert same(before, engine.generate(REQUEST))
