"""Two passes: size, frames and sigmas of each, the upscaling between them, and what is refused before any load."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kadr import Condition, Engine, KadrWarning, Progress, Request, Size
from kadr.checkpoints import hub
from kadr.checkpoints.save import write_single_file, write_text_encoder
from kadr.errors import CheckpointError, KadrError, RequestError
from kadr.media.writer import VideoWriter
from kadr.memory.module_cache import ModuleCache
from kadr.models.registry import DISTILLED_SIGMAS, RELEASES_BY_NAME
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE
from kadr.pipeline.metadata import video_metadata
from kadr.request.passes import warn_distilled_guidance
from kadr.sampling.latents import adain
from kadr.sampling.schedules import Schedule
from kadr.sampling.settings import Guidance, Pass
from kadr.shapes import snap_frames
from tests.tiny_models import (
    CHANNELS,
    LINEAR_QUADRATIC,
    MODEL_FILE,
    SHIFTED,
    build_random,
    sentencepiece_model,
    t5_config,
    transformer_config,
    vae_config,
    write_model,
    write_random_upscaler,
)

SIGMAS = (0.9, 0.4)
REQUEST = Request(
    prompt="a red circle",
    size=Size(128, 64),
    frames=17,
    fps=24,
    steps=2,
    guidance=1.0,
    multi_scale=True,
    second_pass=Pass(sigmas=SIGMAS, guidance=Guidance(cfg_scale=1.0)),
    image_noise=0.0,
)
DISTILLED = Schedule(sampler="LinearQuadratic", allowed_sigmas=DISTILLED_SIGMAS)
Opened = Callable[..., Engine]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = write_model(tmp_path_factory.mktemp("model"))
    write_random_upscaler(home / "spatial.safetensors")
    write_random_upscaler(home / "temporal.safetensors", upscales_space=False, upscales_time=True)
    write_random_upscaler(home / "both.safetensors", upscales_space=True, upscales_time=True)
    write_random_upscaler(home / "wide.safetensors", channels=12)
    return home


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same latents: three blocks, other weights, an older schedule and older positions."""
    return write_model(tmp_path_factory.mktemp("other"), num_layers=3, is_causal=False, schedule=SHIFTED, seed=20)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("distilled"), schedule=DISTILLED, seed=30)


@pytest.fixture(scope="module")
def opened(home: Path) -> Opened:
    """Opens engines by their upscalers, once each."""
    engines: dict[tuple[str, ...], Engine] = {}

    def open_engine(*upscalers: str) -> Engine:
        if upscalers not in engines:
            paths = [home / f"{name}.safetensors" for name in upscalers]
            engines[upscalers] = Engine.open(home / MODEL_FILE, upscaler=paths, device="cpu")
        return engines[upscalers]

    return open_engine


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that loads a weight."""

    def acquire(self: ModuleCache, name: str, load: Callable[[], nn.Module], **options: Any) -> Any:
        raise AssertionError(f"the {name} was loaded")

    monkeypatch.setattr(ModuleCache, "acquire", acquire)


@pytest.fixture
def no_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that fetches a file."""

    def refuse(*args: Any, **kwargs: Any) -> Path:
        raise AssertionError(f"something was fetched: {args}")

    monkeypatch.setattr(hub, "fetch", refuse)
    monkeypatch.setattr(hub, "fetch_folder", refuse)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def clip(photo: str) -> str:
    path = Path(photo).with_name("clip.mp4")
    with VideoWriter(path, Size(48, 48), 24) as writer:
        writer.write(np.stack([np.full((48, 48, 3), 20 + 20 * frame, np.uint8) for frame in range(9)]))
    return str(path)


def record_calls(
    monkeypatch: pytest.MonkeyPatch, cls: type[nn.Module], name: str = "forward"
) -> list[tuple[Any, Tensor]]:
    """Records the module and the first argument of every call of a method."""
    calls: list[tuple[Any, Tensor]] = []
    method = getattr(cls, name)

    def recording(self: nn.Module, tensor: Tensor, *args: Any) -> Any:
        calls.append((self, tensor))
        return method(self, tensor, *args)

    monkeypatch.setattr(cls, name, recording)
    return calls


def assert_refused(function: Callable[[], object], kind: type[KadrError], *expected_texts: str) -> None:
    with pytest.raises(kind) as caught:
        function()
    assert all(text in str(caught.value) for text in expected_texts), str(caught.value)


# --- sizes, lengths and rates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [Size(48, 48), Size(96, 64), Size(160, 97), Size(1216, 704), Size(50, 200)])
def test_first_pass_is_two_thirds_on_a_grid_of_32_and_second_twice_that(opened: Opened, size: Size) -> None:
    sampled_size = size.snap()
    first, second = opened("spatial").resolve(replace(REQUEST, size=size)).passes
    sides = [int(side * 0.6666666) // 32 * 32 for side in (sampled_size.width, sampled_size.height)]
    assert first.size == Size(*sides)
    assert second.size == Size(2 * sides[0], 2 * sides[1])
    assert (first.frames, second.frames, first.fps, second.fps) == (17, 17, 24, 24)


@pytest.mark.parametrize("frames", [1, 2, 9, 10, 17, 24, 25, 33, 97, 121, 257])
def test_temporal_upscaler_halves_frame_groups_and_rate_of_first_pass(opened: Opened, frames: int) -> None:
    first, second = opened("temporal").resolve(replace(REQUEST, frames=frames, fps=25)).passes
    groups = (snap_frames(frames) - 1) // 8
    assert first.frames == 8 * -(-groups // 2) + 1
    assert second.frames == 2 * first.frames - 1
    assert snap_frames(frames) <= second.frames <= snap_frames(frames) + 8
    assert (first.fps, second.fps) == (12.5, 25)
    assert first.size == second.size == Size(128, 64)
    # The upscaler turns the one grid into the other.
    assert 2 * first.grid.frames - 1 == second.grid.frames


@pytest.mark.parametrize("names", [("temporal", "spatial"), ("both",)])
def test_upscalers_of_both_kinds_halve_size_and_rate_of_first_pass(opened: Opened, names: tuple[str, ...]) -> None:
    first, second = opened(*names).resolve(REQUEST).passes
    assert (first.size, first.frames, first.fps) == (Size(64, 32), 9, 12)
    assert (second.size, second.frames, second.fps) == (Size(128, 64), 17, 24)


@pytest.mark.parametrize("names", [("spatial",), ("temporal",), ("temporal", "spatial")], ids=str)
def test_two_passes_give_the_requested_frames(opened: Opened, names: tuple[str, ...]) -> None:
    engine, stages = opened(*names), []
    request = replace(REQUEST, size=Size(50, 60), frames=10, sampler="euler_stochastic", tone_map=0.5)

    def watch(progress: Progress) -> None:
        stages.append((progress.stage, progress.step, progress.of))

    video = engine.generate(request, watch=watch)
    second = engine.resolve(request).passes[1].grid
    assert video.frames.shape == (10, 60, 50, 3)
    assert video.latents.shape == (CHANNELS, second.frames, second.height, second.width)
    assert list(dict.fromkeys(stage for stage, _, _ in stages)) == ["text", "denoise", "upscale", "refine", "decode"]
    upscaled = [(step, of) for stage, step, of in stages if stage == "upscale"]
    assert upscaled == [(step, len(names)) for step in range(len(names) + 1)]
    assert len(video.frames) > 1
    assert (video.frames[0] != video.frames[-1]).any()


def test_spatial_upscaler_runs_before_temporal_in_any_order(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch, LatentUpscaler)
    results = [opened(*names).denoise(REQUEST) for names in (("spatial", "temporal"), ("temporal", "spatial"))]
    assert torch.equal(*results)
    assert [(module.config.kind, tuple(latents.shape[2:])) for module, latents in calls] == [
        ("spatial upscaler", (2, 1, 2)),
        ("temporal upscaler", (2, 2, 4)),
    ] * 2


def test_second_pass_begins_with_noised_upscaled_latents_of_first(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened("spatial", "temporal")
    upscaler_calls = record_calls(monkeypatch, LatentUpscaler)
    transformer_calls = record_calls(monkeypatch, Transformer)
    engine.denoise(REQUEST)
    with engine.start(REQUEST) as generation, generation.modules.latent_statistics() as vae, torch.no_grad():
        first = vae.statistics.normalise(upscaler_calls[0][1])
        upscaled = upscaler_calls[0][1]
        for kind in ("spatial", "temporal"):
            with generation.modules.upscaler(kind) as upscaler:
                upscaled = upscaler(upscaled)
        expected = adain(vae.statistics.normalise(upscaled), first)
    init_latents = transformer_calls[2][1].transpose(1, 2).reshape(expected.shape)  # after two steps of the first pass
    noise = (init_latents - 0.1 * expected) / 0.9
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    assert noise.mean().item() == pytest.approx(0, abs=0.1)
    stacked = torch.stack([noise.flatten(), expected.flatten()])
    assert abs(torch.corrcoef(stacked)[0, 1].item()) < 0.1


# --- conditions at half the rate -----------------------------------------------------------------------------------


def test_image_keeps_its_second_in_a_pass_at_half_the_rate(
    opened: Opened, photo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_calls(monkeypatch, Transformer, "compute_rope")
    conditions = tuple(Condition(photo, frame=frame) for frame in (0, 10, -1))
    opened("temporal").denoise(replace(REQUEST, conditions=conditions, fps=12))
    for (_, positions), latents, rate, frames in zip(calls, (2, 3), (6, 12), ([5, 8], [10, 16]), strict=True):
        assert positions.shape == (1, 3, (latents + 2) * 8)
        seconds = positions[0, 0, latents * 8 :].view(2, 8)
        torch.testing.assert_close(seconds, (torch.tensor(frames) / rate)[:, None].expand(2, 8))


def test_clip_is_refused_in_a_pass_at_half_the_rate(opened: Opened, clip: str, no_weights: None) -> None:
    for fields in ({}, {"frame": 8}, {"frame": -1}):
        request = replace(REQUEST, conditions=(Condition(clip, **fields),))
        for names in (("temporal",), ("spatial", "temporal"), ("both",)):
            assert_refused(
                lambda: opened(*names).denoise(request),  # noqa: B023
                RequestError,
                f"{clip} is a clip",
                "every second frame",
                "Give images, or leave out the temporal upscaler",
            )
    assert opened("spatial").resolve(request).passes


def test_clip_of_one_frame_is_an_image(opened: Opened, clip: str) -> None:
    request = replace(REQUEST, conditions=(Condition(clip, frame_range=(4, 5), frame=10),))
    assert opened("temporal").denoise(request).isfinite().all()


def test_two_images_on_one_frame_of_the_first_pass_are_refused(opened: Opened, photo: str, no_weights: None) -> None:
    request = replace(REQUEST, conditions=(Condition(photo, frame=10), Condition(photo, frame=11)))
    expected_texts = ("(frame 10)", "(frame 11)", "every second frame", "Move one of them")
    assert_refused(lambda: opened("temporal").denoise(request), RequestError, *expected_texts)


# --- input video, boxes and sizes ----------------------------------------------------------------------------------


def test_input_video_is_for_the_first_pass(opened: Opened, clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[tuple[int, ...]] = []
    encode = VAE.encode_stream

    def recording(self: VAE, chunks: Iterator[Tensor], *arguments: Any, **options: Any) -> Tensor:
        pixels = torch.cat(list(chunks), dim=2)
        encoded.append(tuple(pixels.shape))
        return encode(self, iter([pixels]), *arguments, **options)

    monkeypatch.setattr(VAE, "encode_stream", recording)
    request = replace(REQUEST, steps=8, frames=9, input_video=clip, denoise_strength=0.9)
    opened("spatial").denoise(request)
    opened("temporal").denoise(request)
    assert encoded == [(1, 3, 9, 32, 64), (1, 3, 9, 64, 128)]
    first, second = opened("spatial").resolve(request).passes
    assert float(first.sigmas[0]) <= 0.9
    assert list(second.sigmas) == pytest.approx(SIGMAS)


def test_box_too_small_for_first_pass_is_refused_with_one_that_works(
    opened: Opened, photo: str, no_weights: None
) -> None:
    request = replace(REQUEST, size=Size(384, 384), frames=1)
    engine = opened("spatial")
    small = replace(request, conditions=(Condition(photo, box=(100, 100, 96, 96)),))
    with pytest.raises(RequestError, match=r"a pass at 224x224.*Give at least (\d+) pixels") as caught:
        engine.denoise(small)
    least = int(re.findall(r"at least (\d+)", str(caught.value))[0])
    assert least == 165  # the first pass has 7 latents across, of 384 / 7 pixels each
    for x in (60, 100, 111, 150):
        wide = replace(request, conditions=(Condition(photo, box=(x, x, least, least)),))
        with pytest.raises(AssertionError, match="was loaded"):
            engine.denoise(wide)


@pytest.mark.parametrize("size", [Size(32, 96), Size(96, 20)])
def test_size_too_small_for_two_passes_is_refused(opened: Opened, size: Size, no_weights: None, tmp_path: Path) -> None:
    request = replace(REQUEST, size=size)
    small = "0x32" if size.width == 32 else "32x0"
    expected_texts = (f"{size} is too small for two passes", small, "or for a single pass (multi_scale=False)")
    assert_refused(lambda: opened("spatial").generate(request), RequestError, *expected_texts)
    assert_refused(lambda: opened("both").write(request, tmp_path / "a.mp4"), RequestError, *expected_texts)
    assert list(tmp_path.iterdir()) == []
    assert opened("temporal").resolve(request).passes[0].size == size.snap()  # both passes have that size


# --- upscalers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected_texts"),
    [
        (["wide"], ("wide.safetensors", "12 channels", "have 8", "`kadr models`")),
        (["spatial", "spatial"], ("spatial.safetensors is a second spatial upscaler", "one of each kind")),
        (["temporal", "temporal"], ("temporal.safetensors is a second temporal upscaler",)),
        (["both", "temporal"], ("temporal.safetensors is a second temporal upscaler",)),
        (["temporal", "both"], ("both.safetensors is a second temporal upscaler",)),
        (["both", "spatial"], ("spatial.safetensors is a second spatial upscaler",)),
        (["model"], ("model.safetensors is not a latent upscaler", "`kadr models`")),
        (["gone"], ("the upscaler", "gone.safetensors does not exist")),
    ],
    ids=str,
)
def test_unfit_upscalers_are_refused_before_a_text_encoder_is_fetched(
    names: list[str], expected_texts: tuple[str, ...], home: Path, tmp_path: Path, no_fetch: None
) -> None:
    without_text_encoder = tmp_path / MODEL_FILE
    without_text_encoder.symlink_to(home / MODEL_FILE)
    upscalers = [home / f"{name}.safetensors" for name in names]
    for model in (home / MODEL_FILE, without_text_encoder):
        assert_refused(
            lambda: Engine.open(model, upscaler=upscalers, device="cpu"),  # noqa: B023
            CheckpointError,
            *expected_texts,
        )


def test_options_for_a_second_pass_warn_in_a_single_pass(home: Path) -> None:
    request = replace(REQUEST, multi_scale=False, second_pass=None)
    upscaler = home / "spatial.safetensors"
    options = {"the upscaler": {"upscaler": upscaler}, "the upscaler and the model": {"upscaler": upscaler}}
    options["the upscaler and the model"]["second_model"] = home / MODEL_FILE
    for names, arguments in options.items():
        engine = Engine.open(home / MODEL_FILE, **arguments)
        with pytest.warns(KadrWarning, match=f"a single pass is run, and {names} given for a second is not used"):
            engine.dry_run(request)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine.dry_run(REQUEST)


def test_dry_run_refuses_an_upscaler_for_other_latents(home: Path) -> None:
    upscaler = home / "wide.safetensors"
    expected_texts = ("wide.safetensors", "12 channels", "have 8")
    assert_refused(lambda: Engine.open(home / MODEL_FILE, upscaler=upscaler), CheckpointError, *expected_texts)


@pytest.mark.parametrize("name", ["ltxv-2b-0.9.5", "t5-v1.1-xxl"])
def test_name_that_is_not_an_upscaler_is_refused(name: str, home: Path, no_fetch: None) -> None:
    assert_refused(
        lambda: Engine.open(home / MODEL_FILE, upscaler=name, device="cpu"),
        RequestError,
        name,
        "for the upscaler give a path",
    )


def test_two_passes_without_an_upscaler_are_refused(
    opened: Opened, no_weights: None, no_fetch: None, tmp_path: Path
) -> None:
    expected_texts = ("two passes need a latent upscaler", "upscaler", "single pass")
    assert_refused(lambda: opened().generate(REQUEST), CheckpointError, *expected_texts)
    assert_refused(lambda: opened().write(REQUEST, tmp_path / "a.mp4"), CheckpointError, *expected_texts)
    assert_refused(lambda: opened().resolve(REQUEST).passes, CheckpointError, *expected_texts)
    assert list(tmp_path.iterdir()) == []


def test_upscalers_change_nothing_in_a_single_pass(opened: Opened) -> None:
    single = replace(REQUEST, multi_scale=False, second_pass=None)
    assert torch.equal(opened("spatial", "temporal").denoise(single), opened().denoise(single))


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        (("temporal",), {"conditions": "clip"}),
        (("spatial",), {"conditions": "box"}),
        (("spatial",), {"size": Size(32, 32)}),
        ((), {}),
        (("spatial",), {"skip_initial": 1}),
        (("spatial",), {"guidance": Guidance(stg_scale=1.0, skip_blocks=(2,))}),
    ],
    ids=str,
)
def test_dry_run_refuses_with_the_message_of_a_generation(
    names: tuple[str, ...], fields: dict[str, Any], home: Path, opened: Opened, photo: str, clip: str, no_weights: None
) -> None:
    conditions = {"clip": Condition(clip), "box": Condition(photo, box=(0, 0, 32, 64))}
    fields = {key: (conditions[value],) if key == "conditions" else value for key, value in fields.items()}
    request = replace(REQUEST, **fields)
    with pytest.raises(KadrError) as caught:
        opened(*names).denoise(request)
    with pytest.raises(type(caught.value), match=re.escape(str(caught.value))):
        Engine.open(home / MODEL_FILE, upscaler=[home / f"{name}.safetensors" for name in names]).dry_run(request)


def test_dry_run_refuses_two_upscalers_of_one_kind(home: Path) -> None:
    for names, expected in ((("temporal", "both"), "second temporal"), (("spatial", "spatial"), "second spatial")):
        with pytest.raises(CheckpointError, match=expected):
            Engine.open(home / MODEL_FILE, upscaler=[home / f"{name}.safetensors" for name in names])


# --- another model for the second pass -----------------------------------------------------------------------------


def open_two_models(home: Path, second: Path) -> Engine:
    return Engine.open(
        home / MODEL_FILE, second_model=second / MODEL_FILE, upscaler=home / "spatial.safetensors", device="cpu"
    )


def test_second_pass_has_weights_positions_and_schedule_of_its_model(
    home: Path, other: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_two_models(home, other)
    request = replace(REQUEST, second_pass=Pass(steps=4, skip_initial=2, guidance=Guidance(cfg_scale=1.0)))
    first, second = engine.resolve(request).passes
    assert list(first.sigmas) == LINEAR_QUADRATIC.get_sigmas(2, tokens=first.grid.num_tokens).tolist()
    assert list(second.sigmas) == SHIFTED.get_sigmas(4, tokens=second.grid.num_tokens, skip_initial=2).tolist()
    steps = record_calls(monkeypatch, Transformer)
    rope_calls = record_calls(monkeypatch, Transformer, "compute_rope")
    latents = engine.denoise(request)
    assert [len(module.blocks) for module, _ in steps] == [2, 2, 3, 3]
    weights, single = {}, replace(REQUEST, multi_scale=False, second_pass=None)
    for folder in (home, other):
        with (
            Engine.open(folder / MODEL_FILE, device="cpu").start(single) as generation,
            generation.modules.transformer() as transformer,
        ):
            weights[folder] = transformer.state_dict()
    for (module, _), folder in zip(steps, (home, home, other, other), strict=True):
        assert all(torch.equal(weight, weights[folder][name]) for name, weight in module.state_dict().items())
    (_, first_positions), (_, second_positions) = rope_calls
    torch.testing.assert_close(first_positions[0, 0].unique() * 24, torch.tensor([0.0, 1.0, 9.0]))  # causal
    torch.testing.assert_close(second_positions[0, 0].unique() * 24, torch.tensor([0.0, 8.0, 16.0]))
    assert not torch.equal(latents, opened("spatial").denoise(replace(request, second_pass=Pass(sigmas=second.sigmas))))


def test_second_model_leaves_first_pass_unchanged(
    home: Path, other: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_calls(monkeypatch, LatentUpscaler)
    two_models, one_model = open_two_models(home, other).denoise(REQUEST), opened("spatial").denoise(REQUEST)
    assert torch.equal(calls[0][1], calls[1][1])
    assert not torch.equal(two_models, one_model)


def test_same_model_twice_equals_that_model(home: Path, opened: Opened) -> None:
    assert torch.equal(open_two_models(home, home).denoise(REQUEST), opened("spatial").denoise(REQUEST))


def test_metadata_names_the_second_model_and_the_upscalers(home: Path, other: Path) -> None:
    engine = open_two_models(home, other)
    metadata = video_metadata(engine.spec, engine.resolve(REQUEST))
    assert metadata["second_model"] == str(other / MODEL_FILE)
    assert metadata["spatial_upscaler"] == str(home / "spatial.safetensors")
    assert Request.from_json(metadata["request"]) == engine.resolve(REQUEST).request


def test_second_model_of_other_latents_is_refused_before_any_fetch(home: Path, tmp_path: Path, no_fetch: None) -> None:
    without_text_encoder, wide = tmp_path / MODEL_FILE, tmp_path / "wide.safetensors"
    without_text_encoder.symlink_to(home / MODEL_FILE)
    config = replace(transformer_config(), in_channels=12)
    vae = replace(vae_config("0.9.5"), latent_channels=12)
    write_single_file(
        wide,
        transformer=build_random(lambda: Transformer(config)),
        vae=build_random(lambda: VAE(vae)),
        schedule=LINEAR_QUADRATIC,
        dtype=torch.float32,
    )
    expected_texts = ("8 latent channels", str(wide), "12", "same release")
    for model in (home / MODEL_FILE, without_text_encoder):
        assert_refused(
            lambda: Engine.open(model, second_model=wide, device="cpu"),  # noqa: B023
            CheckpointError,
            *expected_texts,
        )


def test_text_encoder_of_another_width_is_refused(home: Path, other: Path, tmp_path: Path, no_weights: None) -> None:
    spiece = tmp_path / "spiece.model"
    spiece.write_bytes(sentencepiece_model())
    narrow = build_random(lambda: T5Encoder(replace(t5_config(), d_model=16)))
    write_text_encoder(tmp_path, narrow, spiece, dtype=torch.float32)
    expected_texts = ("width 16", "prompt embeddings of width 24", "text_encoder", str(home))
    assert_refused(
        lambda: Engine.open(home / MODEL_FILE, text_encoder=tmp_path, device="cpu"), CheckpointError, *expected_texts
    )
    assert Engine.open(home / MODEL_FILE, second_model=other / MODEL_FILE, device="cpu")


# --- guidance ------------------------------------------------------------------------------------------------------


def stg_guidance(block: int, stg: float) -> Guidance:
    return Guidance(cfg_scale=1.0, stg_scale=stg, skip_blocks=(block,))


def test_skipped_block_past_the_last_is_refused(opened: Opened, no_weights: None) -> None:
    single = replace(REQUEST, multi_scale=False, second_pass=None)
    for stg, blocks in ((1.0, (2,)), (0.5, (0, 42))):
        request = replace(single, guidance=Guidance(stg_scale=stg, skip_blocks=blocks))
        assert_refused(lambda: opened().denoise(request), RequestError, str(blocks[-1]), "2 blocks, 0 to 1")  # noqa: B023
    second = replace(REQUEST, second_pass=Pass(sigmas=SIGMAS, guidance=stg_guidance(2, 1.0)))
    assert_refused(lambda: opened("spatial").denoise(second), RequestError, "skip_blocks has 2", "2 blocks, 0 to 1")
    late = Guidance(cfg_scale=1.0, stg_scale=(0.0, 1.0), skip_blocks=((7,), (3,)), sigmas=(1.0, 0.5))
    assert_refused(
        lambda: opened().denoise(replace(single, steps=None, sigmas=(1.0, 0.4), guidance=late)),
        RequestError,
        "skip_blocks has 3;",  # and not 7, which would not be skipped
    )


def test_skipped_block_past_the_last_is_allowed_where_stg_is_off(opened: Opened) -> None:
    single = replace(REQUEST, multi_scale=False, second_pass=None, steps=1)
    latents = opened().denoise(replace(single, guidance=stg_guidance(42, 0.0)))
    assert torch.equal(latents, opened().denoise(single))
    early = Guidance(cfg_scale=1.0, stg_scale=(0.0, 1.0), skip_blocks=((7,), (0,)), sigmas=(1.0, 0.5))
    assert opened().resolve(replace(single, steps=None, sigmas=(1.0, 0.4), guidance=early)).passes


def test_skipped_blocks_are_checked_against_the_model_of_the_pass(home: Path, other: Path) -> None:
    engine = open_two_models(home, other)  # two blocks, and three
    assert engine.resolve(replace(REQUEST, second_pass=Pass(sigmas=SIGMAS, guidance=stg_guidance(2, 1.0))))
    assert_refused(
        lambda: engine.resolve(replace(REQUEST, guidance=stg_guidance(2, 1.0))).passes, RequestError, "2 blocks, 0 to 1"
    )
    beyond = replace(REQUEST, second_pass=Pass(sigmas=SIGMAS, guidance=stg_guidance(3, 1.0)))
    assert_refused(lambda: engine.resolve(beyond).passes, RequestError, "3 blocks, 0 to 2")


FEW_STEPS = replace(REQUEST, steps=None, sigmas=DISTILLED_SIGMAS[:2], second_pass=Pass(sigmas=DISTILLED_SIGMAS[-2:]))


def test_guidance_of_a_distilled_model_warns_for_each_pass(home: Path, distilled: Path) -> None:
    name = str(distilled / MODEL_FILE)
    engine = Engine.open(name, upscaler=home / "spatial.safetensors", device="cpu")
    guided = Pass(sigmas=DISTILLED_SIGMAS[-2:], guidance=Guidance(cfg_scale=2.0))
    for request, times in (
        (replace(FEW_STEPS, multi_scale=False, second_pass=None, guidance=3.0), 1),
        (replace(FEW_STEPS, guidance=3.0), 1),
        (replace(FEW_STEPS, guidance=1.0, second_pass=guided), 1),
        (replace(FEW_STEPS, guidance=3.0, second_pass=guided), 2),
    ):
        with pytest.warns(KadrWarning, match="distilled.*Leave it out") as caught:
            engine.resolve(request)
        assert [name in str(warning.message) for warning in caught] == [True] * times


def test_distilled_model_without_guidance_gives_no_warning(home: Path, distilled: Path) -> None:
    engine = Engine.open(distilled / MODEL_FILE, upscaler=home / "spatial.safetensors", device="cpu")
    stg = Guidance(cfg_scale=1.0, stg_scale=1.0, skip_blocks=(0,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for guidance in (1.0, stg, Guidance(cfg_scale=(1.0, 3.0), sigmas=(0.9, 0.1))):
            assert engine.resolve(replace(FEW_STEPS, guidance=guidance)).passes


def test_warning_names_the_distilled_one_of_two_models(home: Path, distilled: Path) -> None:
    second = Pass(sigmas=DISTILLED_SIGMAS[-2:], guidance=Guidance(cfg_scale=2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_two_models(home, distilled).resolve(replace(FEW_STEPS, guidance=3.0)).passes
        assert (
            open_two_models(add_upscaler(distilled, home), home)
            .resolve(replace(FEW_STEPS, guidance=1.0, second_pass=second))
            .passes
        )
    for engine, request in (
        (open_two_models(home, distilled), replace(FEW_STEPS, guidance=1.0, second_pass=second)),
        (open_two_models(add_upscaler(distilled, home), home), replace(FEW_STEPS, guidance=3.0)),
    ):
        with pytest.warns(KadrWarning) as caught:
            engine.resolve(request)
        (message,) = [str(warning.message) for warning in caught]
        assert f"{distilled / MODEL_FILE} is distilled" in message


def add_upscaler(distilled: Path, home: Path) -> Path:
    """Returns the distilled model's folder, with an upscaler in it."""
    path = distilled / "spatial.safetensors"
    if not path.exists():
        path.symlink_to(home / "spatial.safetensors")
    return distilled


def test_model_is_distilled_by_its_sigmas_or_by_its_release(opened: Opened) -> None:
    (resolved_pass,) = opened().resolve(replace(REQUEST, multi_scale=False, second_pass=None, guidance=3.0)).passes
    for schedule, release in ((DISTILLED, None), (LINEAR_QUADRATIC, RELEASES_BY_NAME["ltxv-2b-0.9.6-distilled"])):
        with pytest.warns(KadrWarning, match="it was made to run without"):
            warn_distilled_guidance(resolved_pass, "this", release, schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_distilled_guidance(resolved_pass, "this", RELEASES_BY_NAME["ltxv-2b-0.9.6-dev"], LINEAR_QUADRATIC)
