"""Laws of every generation, whatever the weights: on a tiny model with random ones."""

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
from kadr.errors import Cancelled, RequestError
from kadr.media.clip import read_metadata, read_video
from kadr.media.postprocess import crop_margins, denormalize, to_uint8
from kadr.media.writer import VideoWriter
from kadr.memory.module_cache import ModuleCache
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.pipeline.metadata import video_metadata
from kadr.sampling.noise import NoiseStreams
from tests.tiny_models import CHANNELS, MODEL_FILE, SENTENCE, write_model

REQUEST = Request(prompt="a red circle", size=Size(64, 32), frames=9, fps=24, seed=7, steps=3, guidance=3.0)
SHAPE = (1, CHANNELS, 2, 1, 2)


@pytest.fixture(scope="module")
def noise_injecting_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Engine whose decoder injects noise."""
    return Engine.open(
        write_model(tmp_path_factory.mktemp("0.9.1"), family="0.9.1", is_causal=False) / MODEL_FILE,
        device="cpu",
        prompt_cache=False,
    )


def are_equal(first: Video, second: Video) -> bool:
    return np.array_equal(first.frames, second.frames) and torch.equal(first.latents, second.latents)


# --- seeds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"sampler": "euler_stochastic"}, {"guidance": 1.0}], ids=str)
def test_the_same_seed_gives_the_same_video_bit_for_bit(
    engine: Engine, noise_injecting_engine: Engine, image_condition: Condition, change: dict[str, Any]
) -> None:
    for opened in (engine, noise_injecting_engine):
        request = replace(REQUEST, conditions=(image_condition,), **change)
        torch.manual_seed(1)
        first = opened.generate(request)
        torch.manual_seed(2)  # the state of torch's global generator must not matter
        torch.randn(3)
        assert are_equal(first, opened.generate(request))


def test_another_engine_on_the_same_files_gives_the_same_video(home: Path, engine: Engine) -> None:
    assert are_equal(engine.generate(REQUEST), Engine.open(home / MODEL_FILE, device="cpu").generate(REQUEST))


def test_length_of_the_files_header_does_not_change_the_video(home: Path, engine: Engine, tmp_path: Path) -> None:
    """A longer header moves the weights, which lie in memory as in the file: in float32 they are used in place."""
    expected, content = engine.generate(REQUEST), (home / MODEL_FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    for spaces in (4, 8, 20):
        path = tmp_path / f"longer by {spaces}.safetensors"
        header = (length + spaces).to_bytes(8, "little") + content[8 : 8 + length] + b" " * spaces
        path.write_bytes(header + content[8 + length :])
        longer = Engine.open(path, text_encoder=home, device="cpu", prompt_cache=False)
        assert are_equal(longer.generate(REQUEST), expected)


def test_another_seed_gives_another_video(engine: Engine) -> None:
    first, second = engine.generate(REQUEST), engine.generate(replace(REQUEST, seed=8))
    assert not np.array_equal(first.frames, second.frames)
    assert (first.latents - second.latents).std() > 0.1


def test_noise_from_the_caller_replaces_that_of_the_seed(engine: Engine) -> None:
    streams = NoiseStreams(8)
    latents = engine.denoise(REQUEST, noise=streams.draw("initial", SHAPE))
    assert torch.equal(latents, engine.denoise(replace(REQUEST, seed=8)))
    assert not torch.equal(latents, engine.denoise(REQUEST))
    frames = engine.decode(latents, REQUEST, noise=streams.draw("decode", SHAPE))
    assert torch.equal(frames, engine.decode(latents, replace(REQUEST, seed=8)))
    assert not torch.equal(frames, engine.decode(latents, REQUEST))


def test_generate_equals_denoise_then_decode(
    engine: Engine, noise_injecting_engine: Engine, image_condition: Condition
) -> None:
    for opened in (engine, noise_injecting_engine):
        request = replace(REQUEST, conditions=(image_condition,))
        video = opened.generate(request)
        latents = opened.denoise(request)
        assert torch.equal(video.latents, latents[0])
        assert np.array_equal(video.frames, opened.decode(latents, request).numpy())


def test_encoded_image_equals_the_latents_kept_at_frame_0(engine: Engine, image_condition: Condition) -> None:
    request = replace(REQUEST, conditions=(image_condition,), image_noise=0.0)
    assert torch.equal(engine.encode_first_condition(request), engine.denoise(request)[:, :, :1])


def test_bfloat16_video_is_close_to_float32(home: Path, engine: Engine, image_condition: Condition) -> None:
    bfloat16_engine = Engine.open(home / MODEL_FILE, device="cpu", dtype="bfloat16")
    request = replace(REQUEST, conditions=(image_condition,))
    first, second = engine.generate(request), bfloat16_engine.generate(request)
    assert video_metadata(bfloat16_engine.spec, bfloat16_engine.resolve(request))["dtype"] == "bfloat16"
    assert second.latents.dtype == torch.float32
    assert ((first.latents - second.latents).norm() / first.latents.norm()).item() < 0.03
    assert not torch.equal(first.latents, second.latents)
    assert np.abs(first.frames.astype(int) - second.frames).mean() < 6


# --- guidance and text --------------------------------------------------------------------------------------------


def test_guidance_in_one_batch_gives_the_same_latents(engine: Engine, image_condition: Condition) -> None:
    for request in (REQUEST, replace(REQUEST, conditions=(replace(image_condition, strength=0.7),), steps=6)):
        first, second = engine.denoise(request), engine.denoise(replace(request, guidance_batch=True))
        assert ((first - second).norm() / first.norm()).item() <= 1e-5


@pytest.mark.parametrize(("guidance", "prompts"), [(1.0, 1), (1.5, 2), (3.0, 2)])
@pytest.mark.parametrize("guidance_batch", [False, True])
def test_negative_prompt_is_encoded_only_if_cfg_needs_it(
    engine: Engine, guidance: float, prompts: int, guidance_batch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Tensor] = []
    batches: list[int] = []
    encode, forward = T5Encoder.forward, Transformer.forward
    monkeypatch.setattr(T5Encoder, "forward", lambda *args: (encoded.append(args[1]), encode(*args))[1])
    monkeypatch.setattr(Transformer, "forward", lambda *args: (batches.append(len(args[1])), forward(*args))[1])
    request = replace(REQUEST, guidance=guidance, guidance_batch=guidance_batch, negative_prompt="blue sea")
    engine.denoise(request)
    tokenizer = engine.spec.tokenizer
    assert tokenizer is not None
    expected = [tokenizer.encode(prompt).ids for prompt in ("a red circle", "blue sea")][:prompts]
    assert [ids.tolist() for ids in encoded] == [ids.tolist() for ids in expected]
    assert batches == ([prompts] * 3 if guidance_batch else [1] * 3 * prompts)


def test_without_cfg_the_negative_prompt_changes_nothing(engine: Engine) -> None:
    request = replace(REQUEST, guidance=1.0)
    assert torch.equal(engine.denoise(request), engine.denoise(replace(request, negative_prompt="blue sea")))
    assert not torch.equal(engine.denoise(REQUEST), engine.denoise(replace(REQUEST, negative_prompt="blue sea")))


def test_space_around_a_prompt_changes_nothing(engine: Engine) -> None:
    assert torch.equal(engine.denoise(REQUEST), engine.denoise(replace(REQUEST, prompt="  a red circle \n")))


def test_long_prompt_is_truncated_with_a_warning_that_quotes_the_rest(engine: Engine) -> None:
    words = (SENTENCE + " ") * 60
    request = replace(REQUEST, prompt=words + "the very end", guidance=1.0)
    with pytest.warns(KadrWarning, match=r"256 tokens.*the very end") as caught:
        first = engine.generate(request)
    assert len(caught) == 1
    with pytest.warns(KadrWarning):
        second = engine.generate(replace(request, prompt=words + "another end"))
    assert are_equal(first, second)


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "frames"), [(Size(64, 32), 9), (Size(50, 21), 4), (Size(33, 31), 1), (Size(1, 1), 2), (Size(64, 63), 16)]
)
@pytest.mark.parametrize("has_condition", [False, True])
def test_video_is_sampled_larger_then_cropped_and_trimmed(
    engine: Engine, image_condition: Condition, size: Size, frames: int, has_condition: bool
) -> None:
    request = replace(
        REQUEST, size=size, frames=frames, steps=1, conditions=(image_condition,) if has_condition else ()
    )
    sampled_size, sampled_frames = size.snap(), (frames + 6) // 8 * 8 + 1
    video = engine.generate(request)
    assert video.frames.shape == (frames, size.height, size.width, 3)
    assert video.frames.dtype == np.uint8
    assert video.latents.shape == (
        CHANNELS,
        (sampled_frames - 1) // 8 + 1,
        sampled_size.height // 32,
        sampled_size.width // 32,
    )
    assert video.latents.dtype == torch.float32
    assert video.size == size
    whole_request = replace(request, size=sampled_size, frames=sampled_frames, conditions=())
    whole = engine.decode(video.latents[None], whole_request)
    assert whole.shape == (sampled_frames, sampled_size.height, sampled_size.width, 3)
    cropped = crop_margins(whole.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)[:frames]
    assert np.array_equal(video.frames, cropped.numpy())


def test_trimmed_frames_do_not_change_the_others(engine: Engine) -> None:
    assert torch.equal(engine.denoise(replace(REQUEST, frames=4)), engine.denoise(REQUEST))


def test_streamed_decode_equals_decode_at_once(engine: Engine, noise_injecting_engine: Engine) -> None:
    for opened in (engine, noise_injecting_engine):
        request = replace(REQUEST, frames=33, steps=1, decode_noise=0.0)
        video = opened.generate(request)
        streams = NoiseStreams(request.seed)
        injection_numbers = iter(range(1, 100))
        with opened.start(REQUEST) as generation, generation.modules.vae_decoder() as vae, torch.no_grad():
            timestep = torch.tensor([opened.spec.recipe.decode_timestep])
            whole = vae.decode(
                video.latents[None],
                timestep=timestep,
                noise_source=lambda shape: streams.draw(f"injection {next(injection_numbers)}", shape),  # noqa: B023
            )
        difference = (torch.from_numpy(video.frames).int() - to_uint8(denormalize(whole[0])).int()).abs()
        assert difference.max() <= 1  # truncation may turn a tiny error into 1
        assert difference.float().mean() < 1e-3


# --- files --------------------------------------------------------------------------------------------------------


def test_frames_written_while_decoding_equal_those_of_generate(
    engine: Engine, image_condition: Condition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[np.ndarray] = []
    write = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames: (written.append(frames), write(self, frames))[1])
    request = replace(REQUEST, frames=70, steps=1, size=Size(50, 32), conditions=(image_condition,))
    video_file = engine.write(request, tmp_path / "out.mp4")
    video = engine.generate(request)
    assert len(written) > 1, "frames are written as they are decoded"
    assert np.array_equal(np.concatenate(written), video.frames)
    assert torch.equal(video_file.latents, video.latents)
    assert (video_file.path, video_file.frames, video_file.size, video_file.fps) == (
        tmp_path / "out.mp4",
        70,
        Size(50, 32),
        24.0,
    )
    assert video_file.request == video.request
    clip = read_video(video_file.path)
    assert clip.frames.shape == video.frames.shape
    assert clip.fps == 24
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.alone
def test_the_first_frames_are_on_disk_before_the_last_are_decoded(engine: Engine, output_folder: Path) -> None:
    sizes: dict[int, int] = {}

    def watch(progress: Progress) -> None:
        if progress.stage == "decode":
            sizes[progress.step] = sum(path.stat().st_size for path in output_folder.glob(".kadr-*"))

    video_file = engine.write(
        replace(REQUEST, size=Size(32, 32), frames=121, steps=1, guidance=1.0), output_folder / "a.mp4", watch=watch
    )
    early = [size for frames, size in sizes.items() if 60 <= frames < 121]
    assert early[0] > 1000, "the header and the first frames"
    assert all(before < after for before, after in pairwise(early)), "more with every chunk"
    assert early[-1] > video_file.path.stat().st_size / 4


def test_request_stored_in_the_file_generates_the_same_video(
    engine: Engine, image_condition: Condition, tmp_path: Path
) -> None:
    video_file = engine.write(
        Request(prompt="a red circle", size=(64, 32), frames=9, steps=2, conditions=(image_condition,)),
        tmp_path / "a.mp4",
    )
    metadata = read_metadata(video_file.path)
    stored_request = Request.from_json(metadata["request"])
    assert stored_request == video_file.request
    assert metadata["model"] == str(engine.spec.checkpoint.path.resolve())
    assert torch.equal(engine.denoise(stored_request)[0], video_file.latents)
    video = engine.generate(stored_request)
    assert video.metadata == metadata
    assert read_metadata(video.save(tmp_path / "b.mp4")) == metadata


# --- defaults of a request ------------------------------------------------------------------------------------------


def test_fields_left_out_of_a_request_come_from_the_recipe(engine: Engine) -> None:
    resolved = engine.resolve(Request(prompt="a red circle")).request
    recipe = engine.spec.recipe
    assert (resolved.size, resolved.frames, resolved.fps) == (recipe.size, recipe.frames, recipe.fps)
    assert resolved.first_pass() == replace(recipe.first_pass, sampler="euler", tone_map=0.0)
    assert (resolved.negative_prompt, resolved.image_noise) == (recipe.negative_prompt, recipe.image_noise)
    assert (resolved.multi_scale, resolved.second_pass) == (False, None)
    assert (resolved.decode_timestep, resolved.decode_noise, resolved.image_crf) == (
        recipe.decode_timestep,
        recipe.decode_noise,
        29,
    )


def test_request_without_steps_takes_those_of_the_recipe(engine: Engine) -> None:
    reports: list[Progress] = []
    engine.denoise(Request(prompt="a red circle", size=(32, 32), frames=1, guidance=1), watch=reports.append)
    assert max(report.of for report in reports if report.stage == "denoise") == engine.spec.recipe.first_pass.steps


# --- which modules are in memory, and when -------------------------------------------------------------------------


class RecordingCache(ModuleCache):
    """Module cache that records when modules are loaded and freed."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.events: list[str] = []
        self.alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @property
    def names_to_keep(self) -> frozenset[str]:
        """No module stays, whatever the plan says."""
        return frozenset()

    @names_to_keep.setter
    def names_to_keep(self, names: object) -> None: ...

    @contextmanager
    def acquire(self, name: str, load: Callable[[], Any], **options: Any) -> Iterator[Any]:
        def load_and_record() -> nn.Module:
            self.events.append(f"{name}, with {len(self.alive)} others")
            module = load()
            self.alive.add(module)
            weakref.finalize(module, self.events.append, f"{name} freed")
            return module

        with super().acquire(name, load_and_record, **options) as module:
            yield module


@pytest.fixture
def recording_cache(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingCache]:
    cache = RecordingCache()
    monkeypatch.setattr(engine._model, "module_cache", cache)
    gc.freeze()  # existing objects, so that each collection is fast
    gc.disable()  # a module must be freed with its last reference, not at the next collection
    yield cache
    gc.enable()
    gc.unfreeze()


EXPECTED_EVENTS = [
    f"{name}{event}"
    for name in ("text encoder", "VAE encoder", "transformer", "VAE decoder")
    for event in (", with 0 others", " freed")
]


def test_each_module_is_freed_before_the_next_loads_and_none_stays(
    engine: Engine, image_condition: Condition, recording_cache: RecordingCache, tmp_path: Path
) -> None:
    request = replace(REQUEST, conditions=(image_condition,))
    engine.generate(request)
    assert recording_cache.events == EXPECTED_EVENTS
    assert not recording_cache.alive
    recording_cache.events.clear()
    engine.write(request, tmp_path / "out.mp4")
    assert recording_cache.events == EXPECTED_EVENTS
    assert not recording_cache.alive


def test_without_an_image_no_vae_encoder_is_loaded(engine: Engine, recording_cache: RecordingCache) -> None:
    engine.generate(REQUEST)
    assert recording_cache.events == [event for event in EXPECTED_EVENTS if not event.startswith("VAE encoder")]


def test_vae_encoder_and_decoder_load_without_each_other(engine: Engine, image_condition: Condition) -> None:
    request = replace(REQUEST, conditions=(image_condition,))
    with engine.start(request) as generation, generation.modules.vae_encoder() as vae:
        assert vae.decoder is None
        assert vae.encoder is not None
    with engine.start(request) as generation, generation.modules.vae_decoder() as vae:
        assert vae.encoder is None
        assert vae.decoder is not None


def test_opening_an_engine_loads_no_weights(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(nn.Module, "load_state_dict", refuse)
    engine = Engine.open(home / MODEL_FILE, device="cpu")
    assert engine.spec.transformer_config.in_channels == CHANNELS


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
    for stage, total in (("text", 2), ("encode", 1), ("denoise", 3), ("decode", 20)):
        stage_reports = [report for report in reports if report.stage == stage]
        assert {report.of for report in stage_reports} == {total}
        assert (stage_reports[0].step, stage_reports[-1].step) == (0, total)
        assert all(before.step < after.step for before, after in pairwise(stage_reports))
        assert stage_reports[0].eta is None
        assert all(report.eta is not None and report.eta >= 0 for report in stage_reports[1:])
        assert stage_reports[-1].eta == 0
    assert [report.stage for report in reports] == sorted((r.stage for r in reports), key=stages.index)
    sigmas = [report.sigma for report in reports if report.stage == "denoise"]
    assert sigmas == [None, *engine.spec.schedules[0].get_sigmas(3, tokens=6).tolist()]
    assert all(report.sigma is None for report in reports if report.stage != "denoise")


def test_watcher_does_not_change_the_video(engine: Engine) -> None:
    assert are_equal(engine.generate(REQUEST), engine.generate(REQUEST, watch=lambda progress: None))


class WatcherBug(Exception):
    """Exception that a watcher raises."""


@pytest.mark.parametrize("stage", ["text", "encode", "denoise", "decode"])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("exception", [Cancelled, WatcherBug, RequestError])
def test_exception_of_a_watcher_is_raised_and_leaves_no_file_or_weights(
    engine: Engine,
    image_condition: Condition,
    stage: str,
    step: int,
    exception: type[Exception],
    recording_cache: RecordingCache,
    tmp_path: Path,
) -> None:
    reason = exception("no more")

    def watch(progress: Progress) -> None:
        if progress.stage == stage and progress.step >= step:
            raise reason

    with pytest.raises(exception) as caught:
        engine.write(replace(REQUEST, conditions=(image_condition,)), tmp_path / "out.mp4", watch=watch)
    assert caught.value is reason
    assert list(tmp_path.iterdir()) == []
    reason.__traceback__ = None
    del caught
    gc.collect()
    assert not recording_cache.alive


def test_cancelled_generation_leaves_an_older_file_unchanged(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"older")

    def watch(progress: Progress) -> None:
        if progress.stage == "decode" and progress.step:
            raise Cancelled

    with pytest.raises(Cancelled):
        engine.write(REQUEST, path, watch=watch)
    assert path.read_bytes() == b"older"
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]


def test_ctrl_c_is_raised_and_leaves_no_file(engine: Engine, tmp_path: Path) -> None:
    def watch(progress: Progress) -> None:
        if progress.stage == "denoise" and progress.step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.write(REQUEST, tmp_path / "out.mp4", watch=watch)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize(
    "options, changes",
    [
        ({}, {}),
        ({"quant": "int8"}, {"steps": 12, "cache": "first-block"}),
        ({"offload": "blocks", "loras": ["demo-lora-teal"]}, {}),
        ({"model": "demo-distilled"}, {"multi_scale": True, "size": Size(64, 64), "steps": None}),
    ],
)
def test_weights_of_an_engine_are_freed_with_its_last_reference(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    references: list[weakref.ref[Any]] = []

    def acquire(cache: ModuleCache, *args: Any, **keywords: Any) -> Any:
        acquired = original(cache, *args, **keywords)

        @contextmanager
        def record() -> Iterator[nn.Module]:
            with acquired as module:
                references.extend(weakref.ref(item) for item in (cache, module, *module.parameters()))
                yield module

        return record()

    original = ModuleCache.acquire
    monkeypatch.setattr(ModuleCache, "acquire", acquire)
    monkeypatch.setattr("kadr.memory.module_cache.gc.collect", lambda: 0)
    engine = Engine.open(**{"model": "demo", "device": "cpu", "prompt_cache": False, **options})
    request = Request(**{"prompt": "a red circle", "size": Size(32, 32), "frames": 1, "steps": 2, **changes})
    engine.generate(request)
    references.append(weakref.ref(engine))
    del engine
    assert len(references) > 100
    assert not any(reference() is not None for reference in references)
