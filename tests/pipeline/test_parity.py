"""The whole path, text and picture to latents and pixels, against the official pipeline with its weights and noise.

Weights are random and tiny, numbers are float32. What differs is the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kadr import Condition, Engine, Request
from kadr.errors import RequestError
from kadr.media.postprocess import denormalize
from kadr.media.writer import VideoWriter
from kadr.models.registry import DISTILLED_SIGMAS
from kadr.pipeline.stages import decode
from kadr.sampling.noise import NoiseStreams
from kadr.sampling.schedules import Schedule
from kadr.sampling.settings import Guidance, Pass
from kadr.shapes import Size
from tests.oracles import relative_error
from tests.pipeline import official_pipeline
from tests.tiny_models import CHANNELS, LINEAR_QUADRATIC, MODEL_FILE, SHIFTED, write_model, write_random_upscaler

LATENTS, PIXELS = 5e-6, 1e-5  # relative errors; found were 6e-7 and 1e-6, ten times what one rounding makes
UPSCALER = "upscaler.safetensors"
DISTILLED = Schedule(sampler="LinearQuadratic", allowed_sigmas=DISTILLED_SIGMAS)
MODELS: dict[str, dict[str, Any]] = {
    "0.9": {"family": "0.9", "is_causal": False, "schedule": SHIFTED},
    "0.9.1": {"family": "0.9.1", "is_causal": False, "schedule": SHIFTED},
    "0.9.5": {"family": "0.9.5", "is_causal": True, "schedule": LINEAR_QUADRATIC},
    "0.9.8 distilled": {"family": "0.9.5", "is_causal": True, "schedule": DISTILLED},
}
PLAIN: dict[str, Any] = {
    "prompt": "a red circle moving right",
    "negative_prompt": "blue sea , evening",
    "size": Size(64, 96),
    "frames": 17,
    "fps": 24.0,
    "seed": 5,
    "steps": 4,
    "guidance": 3.0,
    "stochastic": False,
    "image_noise": 0.15,
    "image_crf": 29,
    "decode_timestep": 0.05,
    "decode_noise": 0.025,
}


GUIDED: dict[str, Any] = {"cfg_scale": 3.0, "stg_scale": 1.5, "rescale": 0.7, "skip_blocks": (1,)}


def guidance(**values: Any) -> Guidance:
    return Guidance(**{**GUIDED, **values})


@dataclass(frozen=True)
class Case:
    """A model, what its request has of its own, and its conditions: kind, frame and strength of each."""

    model: str
    conditions: tuple[tuple[str, int, float], ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)


def case(model: str, strength: float | None = None, **fields: Any) -> Case:
    """With a picture at frame 0 of that strength."""
    return Case(model, () if strength is None else (("picture", 0, strength),), fields)


def given(*conditions: tuple[str, int, float], model: str = "0.9.5", **fields: Any) -> Case:
    return Case(model, conditions, {"steps": 3, "frames": 25, "size": Size(64, 64), **fields})


LEVELS = (0.9094, 0.725, 0.4219)
MULTI_SCALE: dict[str, Any] = {
    "multi_scale": True,
    "size": Size(100, 70),
    "frames": 9,
    "steps": None,
    "sigmas": (1.0, 0.95, 0.7),
    "guidance": guidance(),
    "tone_map": 0.3,  # of the first pass, which decodes nothing
    "second_pass": Pass(sigmas=LEVELS, guidance=Guidance(cfg_scale=1.0, stg_scale=1.0, skip_blocks=(0,)), tone_map=0.6),
}


ODD = {"size": Size(50, 71), "frames": 12}
CASES = {
    "text, linear-quadratic, causal": case("0.9.5"),
    "text, SD3, not causal": case("0.9", steps=5),
    "text, SD3, injected noise": case("0.9.1"),
    "text, one step": case("0.9.5", steps=1),
    "text, no guidance": case("0.9.5", guidance=1.0, fps=30.0),
    "text, no negative prompt, space around the prompt": case("0.9.5", prompt="  birds fly \n", negative_prompt=""),
    "text, the last two levels skipped": case("0.9.5", steps=6, skip_final=2),
    "text, the last level of SD3 skipped": case("0.9", steps=4, skip_final=1),
    "text, stochastic": case("0.9.5", guidance=1.0, stochastic=True),
    "text, the levels of the distilled": case("0.9.8 distilled", steps=None, sigmas=DISTILLED_SIGMAS[:7], guidance=1.0),
    "text, the steps of the distilled": case("0.9.8 distilled", steps=8, guidance=1.0),
    "text, any levels": case("0.9.1", steps=None, sigmas=(0.9, 0.55, 0.2)),
    "text, another decoder level": case("0.9.5", steps=2, decode_timestep=0.3, decode_noise=0.5),
    "text, no decoder noise": case("0.9.5", steps=2, decode_timestep=0.0, decode_noise=0.0),
    "text, one frame": case("0.9.5", frames=1),
    "text, an odd size": case("0.9.5", steps=2, **ODD),
    "picture, SD3, not causal": case("0.9", 1.0),
    "picture, SD3, injected noise": case("0.9.1", 1.0),
    "picture, linear-quadratic, causal": case("0.9.5", 1.0),
    "picture, without noise on it": case("0.9.5", 1.0, image_noise=0.0),
    "picture at 0.6, SD3": case("0.9", 0.6),
    "picture at 0.6, linear-quadratic": case("0.9.5", 0.6, steps=8),
    "picture at a strength that is a level": case("0.9.5", 0.0375, steps=6),
    "picture at 0.3, the distilled's levels": case(
        "0.9.8 distilled", 0.3, steps=None, sigmas=DISTILLED_SIGMAS, guidance=1.0
    ),
    "picture, stochastic": case("0.9.5", 1.0, stochastic=True, guidance=1.0),
    "picture at 0.6, stochastic": case("0.9.1", 0.6, stochastic=True),
    "picture, uncompressed": case("0.9.5", 1.0, image_crf=0, steps=2),
    "picture, an odd size": case("0.9.5", 1.0, steps=2, **ODD),
    "stg, attention values": case("0.9.5", guidance=guidance(rescale=1.0)),
    "stg, attention skip": case("0.9.5", guidance=guidance(stg_mode="attention_skip")),
    "stg, whole blocks": case("0.9.5", guidance=guidance(stg_mode="transformer_block", skip_blocks=(0,))),
    "stg, both blocks, without guidance": case("0.9.5", guidance=guidance(cfg_scale=1.0, skip_blocks=(0, 1))),
    "stg, no block": case("0.9.5", guidance=guidance(skip_blocks=())),
    "cfg-star": case("0.9.5", guidance=guidance(cfg_star=True)),
    "guidance by level": case(
        "0.9.5",
        steps=6,
        guidance=Guidance(
            cfg_scale=(1.0, 4.0, 6.0, 1.0),
            stg_scale=(0.0, 0.0, 2.0, 1.0),
            rescale=(1.0, 1.0, 0.5, 0.5),
            skip_blocks=((), (0,), (0, 1), (1,)),
            sigmas=(1.0, 0.985, 0.9, 0.3),
            cfg_star=True,
        ),
    ),
    "guidance and stg with a picture": case("0.9.5", 0.8, guidance=guidance(cfg_star=True)),
    "clip at 0": given(("clip", 0, 1.0)),
    "clip at 0, strength 0.6, stochastic": given(("clip", 0, 0.6), stochastic=True),
    "keyframe": given(("picture", 13, 1.0)),
    "keyframe, strength 0.5, not causal": given(("picture", 13, 0.5), model="0.9"),
    "keyframe, stochastic": given(("picture", 24, 0.7), stochastic=True),
    "sequence": given(("long clip", 8, 1.0)),
    "sequence, strength 0.7": given(("long clip", 8, 0.7), guidance=guidance()),
    "sequence of the first two latents alone": given(("clip", 16, 1.0)),
    "picture and keyframe": given(("picture", 0, 1.0), ("picture", 20, 0.9)),
    "keyframe, then picture, then clip": given(("picture", 12, 0.8), ("picture", 0, 0.6), ("clip", 16, 1.0)),
    "clip at both ends": given(("clip", 0, 1.0), ("clip", 16, 1.0), image_noise=0.0),
    "conditions of an odd size": given(("clip", 0, 1.0), ("picture", 11, 0.9), size=Size(71, 50), frames=18),
    "video to video": given(input_video="moved", steps=6, skip_initial=4),
    "video to video by levels, with a picture": given(
        ("picture", 0, 1.0), model="0.9.8 distilled", input_video="moved", steps=None, sigmas=LEVELS, guidance=1.0
    ),
    "video to video of an odd size": given(input_video="moved", steps=6, skip_initial=4, size=Size(71, 50), frames=14),
    "two passes": case("0.9.5", **MULTI_SCALE),
    "two passes, distilled": case(
        "0.9.8 distilled",
        **{
            **MULTI_SCALE,
            "sigmas": (1.0, 0.9812, 0.725),
            "guidance": 1.0,
            "second_pass": Pass(sigmas=LEVELS, guidance=Guidance(cfg_scale=1.0), tone_map=0.6),
        },
    ),
    "two passes, steps of each": case(
        "0.9.5",
        **{
            **MULTI_SCALE,
            "sigmas": None,
            "steps": 5,
            "skip_final": 1,
            "second_pass": Pass(steps=6, skip_initial=4, guidance=guidance(), stochastic=True, tone_map=0.0),
        },
    ),
    "two passes with a picture and a keyframe": given(
        ("picture", 0, 0.9), ("picture", 20, 0.8), **MULTI_SCALE | {"frames": 25}
    ),
    "two passes with a clip": given(("clip", 0, 1.0), **MULTI_SCALE | {"frames": 17}),
    "two passes, not conditioned decoder": case("0.9", **MULTI_SCALE),
}
# What a case is an example of, by the first of these that its name begins with.
GROUPS = {
    "text": "text to video",
    "picture and": "several conditions",
    "picture": "picture to video",
    "stg, attention skip": "STG by attention_skip",
    "stg, whole blocks": "STG by transformer_block",
    "stg": "STG by attention_values",
    "cfg-star": "CFG-star",
    "guidance": "guidance by level",
    "clip at both": "several conditions",
    "clip": "clip at frame 0",
    "keyframe, then": "several conditions",
    "keyframe": "keyframe",
    "sequence": "sequence",
    "conditions": "several conditions",
    "video to video": "video to video",
    "two passes": "two passes",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    written: dict[str, Path] = {}

    def find(model: str) -> Path:
        if model not in written:
            written[model] = write_model(root / model, **MODELS[model])
        return written[model]

    return find


@pytest.fixture(scope="module")
def engine(home: Callable[[str], Path]) -> Callable[[str], Engine]:
    opened: dict[str, Engine] = {}

    def find(model: str) -> Engine:
        if model not in opened:
            upscaler = write_random_upscaler(home(model) / UPSCALER)
            opened[model] = Engine.open(home(model) / MODEL_FILE, upscaler=upscaler, device="cpu")
        return opened[model]

    return find


@pytest.fixture(scope="module")
def oracle(home: Callable[[str], Path]) -> Callable[[str], Any]:
    opened: dict[str, Any] = {}

    def find(model: str) -> Any:
        if model not in opened:
            opened[model] = official_pipeline.open_pipeline(home(model))
        return opened[model]

    return find


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    rows, columns = np.mgrid[:120, :100]
    picture = np.stack([columns * 2, rows * 2, 128 + 100 * np.sin((rows + columns) / 9)], axis=-1)
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def media(photo: Path) -> dict[str, Path]:
    """A picture, and clips of 9, 17 and 25 frames in which it moves."""
    with Image.open(photo) as picture:
        pixels = np.asarray(picture)
    made = {"picture": photo}
    for name, frames in (("clip", 9), ("long clip", 17), ("moved", 25)):
        made[name] = photo.with_name(f"{name}.mp4")
        with VideoWriter(made[name], Size(100, 120), 24.0) as writer:
            writer.write(np.stack([np.roll(pixels, (3 * frame, 2 * frame), (0, 1)) for frame in range(frames)]))
    return made


def asked(given: Case, media: dict[str, Path]) -> Request:
    conditions = tuple(
        Condition(media=str(media[kind]), frame=frame, strength=strength) for kind, frame, strength in given.conditions
    )
    fields = {**PLAIN, "conditions": conditions, **given.fields}
    if "input_video" in fields:
        fields["input_video"] = str(media[fields["input_video"]])
    return Request(**fields)


def decoded(
    engine: Engine, latents: Tensor, request: Request, noise: Tensor, patch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Pixels (3, F, H, W) as they are decoded, with their margins, and the frames."""
    kept: list[Tensor] = []
    patch.setattr(decode, "denormalize", lambda pixels: (kept.append(pixels), denormalize(pixels))[1])
    frames = engine.decode(latents, request, noise=noise)
    return torch.cat(kept, dim=1), frames


def _asked_shape(request: Request) -> tuple[int, int, int]:
    assert isinstance(request.size, Size)
    assert request.frames is not None
    return request.frames, request.size.height, request.size.width


@pytest.mark.parametrize("name", CASES)
def test_latents_pixels_and_frames_are_the_official_ones(
    name: str,
    home: Callable[[str], Path],
    engine: Callable[[str], Engine],
    oracle: Callable[[str], Any],
    media: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    parity: Callable[[str, str, str, float], float],
) -> None:
    given = CASES[name]
    request = asked(given, media)
    ours = engine(given.model)  # which writes the upscaler
    upsampler = official_pipeline.open_upsampler(home(given.model) / UPSCALER) if request.multi_scale else None
    expected = official_pipeline.run_official(oracle(given.model), request, upsampler=upsampler)
    latents = ours.denoise(request)
    noise = NoiseStreams(request.seed).draw("decode", latents.shape)
    pixels, frames = decoded(ours, latents, request, noise, monkeypatch)
    error = relative_error(latents, expected.latents), relative_error(pixels, expected.pixels[0])
    group = next(group for start, group in GROUPS.items() if name.startswith(start))
    parity(group, given.model, "official", max(error))
    assert error[0] <= LATENTS
    assert error[1] <= PIXELS
    off = (frames.int() - expected.frames.int()).abs()  # official frames are cut off, not rounded: a hair moves them
    assert frames.shape == expected.frames.shape == (*_asked_shape(request), 3)
    assert off.max() <= 1
    assert off.float().mean() < 1e-3


@pytest.mark.parametrize(
    "given",
    [
        case("0.9.5", steps=6, skip_initial=4),
        case("0.9", 1.0, steps=6, skip_initial=3, skip_final=1),
        case("0.9.8 distilled", 0.6, steps=None, sigmas=(0.9094, 0.725, 0.4219), guidance=1.0),
    ],
    ids=["linear-quadratic", "SD3, with a picture", "levels, with a picture at 0.6"],
)
def test_latents_to_start_from_are_mixed_with_noise_as_the_official_pipeline_does(
    given: Case, engine: Callable[[str], Engine], oracle: Callable[[str], Any], media: dict[str, Path], parity: Any
) -> None:
    request = asked(given, media)
    start = NoiseStreams(99).draw("start", (1, CHANNELS, 3, 3, 2))
    made = engine(given.model).denoise(request, init_latents=start)
    error = relative_error(made, official_pipeline.run_official(oracle(given.model), request, start).latents)
    assert parity("video from latents", given.model, "official", error) <= LATENTS
    assert relative_error(made, engine(given.model).denoise(request, init_latents=-start)) > 0.1


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("text, linear-quadratic, causal", ["initial", "decode"]),
        ("text, stochastic", ["initial", *(f"stochastic {i}" for i in range(4)), "decode"]),
        ("picture, linear-quadratic, causal", ["initial", *(f"condition {i}" for i in range(4)), "decode"]),
        ("text, SD3, not causal", ["initial"]),
        ("text, SD3, injected noise", ["initial", "decode", *(f"injection {i}" for i in range(1, 7))]),
    ],
)
def test_kadr_draws_a_stream_wherever_the_official_pipeline_draws_noise(
    name: str,
    drawn: list[str],
    engine: Callable[[str], Engine],
    oracle: Callable[[str], Any],
    media: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which also shows that the comparison above has fed every noise."""
    given = CASES[name]
    request = asked(given, media)
    assert list(official_pipeline.run_official(oracle(given.model), request).noise_names) == drawn
    ours: list[str] = []
    draw = NoiseStreams.draw
    monkeypatch.setattr(NoiseStreams, "draw", lambda self, name, shape: (ours.append(name), draw(self, name, shape))[1])
    engine(given.model).generate(request)
    assert ours == drawn


def test_the_comparison_would_notice_another_frame_rate_position_or_noise(
    engine: Callable[[str], Engine], oracle: Callable[[str], Any], media: dict[str, Path]
) -> None:
    given = CASES["picture, linear-quadratic, causal"]
    request = asked(given, media)
    expected = official_pipeline.run_official(oracle(given.model), request).latents
    for change in (
        {"fps": 23.0},
        {"guidance": 3.1},
        {"image_noise": 0.16},
        {"seed": 6},
        {"negative_prompt": ""},
        {"image_crf": 0},
    ):
        made = engine(given.model).denoise(replace(request, **change))
        assert relative_error(made, expected) > 100 * LATENTS, change


def test_a_distilled_model_refuses_what_the_official_pipeline_refuses(
    engine: Callable[[str], Engine], oracle: Callable[[str], Any], media: dict[str, Path]
) -> None:
    request = asked(case("0.9.8 distilled", steps=6), media)
    with pytest.raises(AssertionError, match="Invalid inference timestep"):
        official_pipeline.run_official(oracle("0.9.8 distilled"), request)
    with pytest.raises(RequestError, match="distilled for the noise levels"):
        engine("0.9.8 distilled").denoise(request)
