"""Whole pipeline, from prompt and image to latents and pixels, against the official one with equal weights and noise.

Weights are random and tiny, in float32. Only the order of sums differs.
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

LATENTS, PIXELS = 5e-6, 1e-5  # relative errors; measured: 6e-7 and 1e-6, ten times that of one rounding
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
    "sampler": "euler",
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
    """A model, the conditions of its request (kind, frame and strength), and fields that differ from `PLAIN`."""

    model: str
    conditions: tuple[tuple[str, int, float], ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)


def make_case(model: str, strength: float | None = None, **fields: Any) -> Case:
    """Returns a case with an image of that strength at frame 0, if a strength is given."""
    return Case(model, () if strength is None else (("image", 0, strength),), fields)


def conditioned(*conditions: tuple[str, int, float], model: str = "0.9.5", **fields: Any) -> Case:
    return Case(model, conditions, {"steps": 3, "frames": 25, "size": Size(64, 64), **fields})


SIGMAS = (0.9094, 0.725, 0.4219)
MULTI_SCALE: dict[str, Any] = {
    "multi_scale": True,
    "size": Size(100, 70),
    "frames": 9,
    "steps": None,
    "sigmas": (1.0, 0.95, 0.7),
    "guidance": guidance(),
    "tone_map": 0.3,  # of the first pass, whose latents are not decoded
    "second_pass": Pass(sigmas=SIGMAS, guidance=Guidance(cfg_scale=1.0, stg_scale=1.0, skip_blocks=(0,)), tone_map=0.6),
}


ODD = {"size": Size(50, 71), "frames": 12}
CASES = {
    "text, linear-quadratic, causal": make_case("0.9.5"),
    "text, SD3, not causal": make_case("0.9", steps=5),
    "text, SD3, injected noise": make_case("0.9.1"),
    "text, one step": make_case("0.9.5", steps=1),
    "text, no guidance": make_case("0.9.5", guidance=1.0, fps=30.0),
    "text, no negative prompt, whitespace around the prompt": make_case(
        "0.9.5", prompt="  birds fly \n", negative_prompt=""
    ),
    "text, an empty prompt": make_case("0.9.5", prompt="", steps=2),
    "text, an empty prompt without guidance": make_case("0.9.5", prompt=" \n", steps=2, guidance=1.0),
    "text, the last two sigmas skipped": make_case("0.9.5", steps=6, skip_final=2),
    "text, the last sigma of SD3 skipped": make_case("0.9", steps=4, skip_final=1),
    "text, stochastic": make_case("0.9.5", guidance=1.0, sampler="euler_stochastic"),
    "text, the sigmas of the distilled": make_case(
        "0.9.8 distilled", steps=None, sigmas=DISTILLED_SIGMAS[:7], guidance=1.0
    ),
    "text, the steps of the distilled": make_case("0.9.8 distilled", steps=8, guidance=1.0),
    "text, any sigmas": make_case("0.9.1", steps=None, sigmas=(0.9, 0.55, 0.2)),
    "text, another decode timestep": make_case("0.9.5", steps=2, decode_timestep=0.3, decode_noise=0.5),
    "text, no decoder noise": make_case("0.9.5", steps=2, decode_timestep=0.0, decode_noise=0.0),
    "text, one frame": make_case("0.9.5", frames=1),
    "text, an odd size": make_case("0.9.5", steps=2, **ODD),
    "image, SD3, not causal": make_case("0.9", 1.0),
    "image, SD3, injected noise": make_case("0.9.1", 1.0),
    "image, linear-quadratic, causal": make_case("0.9.5", 1.0),
    "image, no image noise": make_case("0.9.5", 1.0, image_noise=0.0),
    "image at 0.6, SD3": make_case("0.9", 0.6),
    "image at 0.6, linear-quadratic": make_case("0.9.5", 0.6, steps=8),
    "image at a strength that is a sigma": make_case("0.9.5", 0.0375, steps=6),
    "image at 0.3, the distilled's sigmas": make_case(
        "0.9.8 distilled", 0.3, steps=None, sigmas=DISTILLED_SIGMAS, guidance=1.0
    ),
    "image, stochastic": make_case("0.9.5", 1.0, sampler="euler_stochastic", guidance=1.0),
    "image at 0.6, stochastic": make_case("0.9.1", 0.6, sampler="euler_stochastic"),
    "image, uncompressed": make_case("0.9.5", 1.0, image_crf=0, steps=2),
    "image, an odd size": make_case("0.9.5", 1.0, steps=2, **ODD),
    "stg, attention values": make_case("0.9.5", guidance=guidance(rescale=1.0)),
    "stg, attention skip": make_case("0.9.5", guidance=guidance(stg_mode="attention_skip")),
    "stg, whole blocks": make_case("0.9.5", guidance=guidance(stg_mode="transformer_block", skip_blocks=(0,))),
    "stg, both blocks, without guidance": make_case("0.9.5", guidance=guidance(cfg_scale=1.0, skip_blocks=(0, 1))),
    "stg, no block": make_case("0.9.5", guidance=guidance(skip_blocks=())),
    "cfg-star": make_case("0.9.5", guidance=guidance(cfg_star=True)),
    "guidance by sigma": make_case(
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
    "guidance and stg with an image": make_case("0.9.5", 0.8, guidance=guidance(cfg_star=True)),
    "clip at 0": conditioned(("clip", 0, 1.0)),
    "clip at 0, strength 0.6, stochastic": conditioned(("clip", 0, 0.6), sampler="euler_stochastic"),
    "keyframe": conditioned(("image", 13, 1.0)),
    "keyframe, strength 0.5, not causal": conditioned(("image", 13, 0.5), model="0.9"),
    "keyframe, stochastic": conditioned(("image", 24, 0.7), sampler="euler_stochastic"),
    "sequence": conditioned(("long clip", 8, 1.0)),
    "sequence, strength 0.7": conditioned(("long clip", 8, 0.7), guidance=guidance()),
    "sequence of the first two latents alone": conditioned(("clip", 16, 1.0)),
    "image and keyframe": conditioned(("image", 0, 1.0), ("image", 20, 0.9)),
    "keyframe, then image, then clip": conditioned(("image", 12, 0.8), ("image", 0, 0.6), ("clip", 16, 1.0)),
    "clip at both ends": conditioned(("clip", 0, 1.0), ("clip", 16, 1.0), image_noise=0.0),
    "conditions of an odd size": conditioned(("clip", 0, 1.0), ("image", 11, 0.9), size=Size(71, 50), frames=18),
    "video to video": conditioned(input_video="moved", steps=6, skip_initial=4),
    "video to video by sigmas, with an image": conditioned(
        ("image", 0, 1.0), model="0.9.8 distilled", input_video="moved", steps=None, sigmas=SIGMAS, guidance=1.0
    ),
    "video to video of an odd size": conditioned(
        input_video="moved", steps=6, skip_initial=4, size=Size(71, 50), frames=14
    ),
    "two passes": make_case("0.9.5", **MULTI_SCALE),
    "two passes, distilled": make_case(
        "0.9.8 distilled",
        **{
            **MULTI_SCALE,
            "sigmas": (1.0, 0.9812, 0.725),
            "guidance": 1.0,
            "second_pass": Pass(sigmas=SIGMAS, guidance=Guidance(cfg_scale=1.0), tone_map=0.6),
        },
    ),
    "two passes, steps of each": make_case(
        "0.9.5",
        **{
            **MULTI_SCALE,
            "sigmas": None,
            "steps": 5,
            "skip_final": 1,
            "second_pass": Pass(steps=6, skip_initial=4, guidance=guidance(), sampler="euler_stochastic", tone_map=0.0),
        },
    ),
    "two passes with an image and a keyframe": conditioned(
        ("image", 0, 0.9), ("image", 20, 0.8), **MULTI_SCALE | {"frames": 25}
    ),
    "two passes with a clip": conditioned(("clip", 0, 1.0), **MULTI_SCALE | {"frames": 17}),
    "two passes, decoder without timestep": make_case("0.9", **MULTI_SCALE),
}
# Parity stage of a case, by the first of these prefixes that its name starts with.
STAGES_BY_PREFIX = {
    "text": "text to video",
    "image and": "multiple conditions",
    "image": "image to video",
    "stg, attention skip": "STG by attention_skip",
    "stg, whole blocks": "STG by transformer_block",
    "stg": "STG by attention_values",
    "cfg-star": "CFG-star",
    "guidance": "guidance by sigma",
    "clip at both": "multiple conditions",
    "clip": "clip at frame 0",
    "keyframe, then": "multiple conditions",
    "keyframe": "keyframe",
    "sequence": "sequence",
    "conditions": "multiple conditions",
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
    image = np.stack([columns * 2, rows * 2, 128 + 100 * np.sin((rows + columns) / 9)], axis=-1)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def media(photo: Path) -> dict[str, Path]:
    """An image, and clips of 9, 17 and 25 frames in which it moves."""
    with Image.open(photo) as image:
        pixels = np.asarray(image)
    paths = {"image": photo}
    for name, frames in (("clip", 9), ("long clip", 17), ("moved", 25)):
        paths[name] = photo.with_name(f"{name}.mp4")
        with VideoWriter(paths[name], Size(100, 120), 24.0) as writer:
            writer.write(np.stack([np.roll(pixels, (3 * frame, 2 * frame), (0, 1)) for frame in range(frames)]))
    return paths


def build_request(case: Case, media: dict[str, Path]) -> Request:
    conditions = tuple(
        Condition(media=str(media[kind]), frame=frame, strength=strength) for kind, frame, strength in case.conditions
    )
    fields = {**PLAIN, "conditions": conditions, **case.fields}
    if "input_video" in fields:
        fields["input_video"] = str(media[fields["input_video"]])
    return Request(**fields)


def decode_with_pixels(
    engine: Engine, latents: Tensor, request: Request, noise: Tensor, patch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Decodes latents: pixels (3, F, H, W) as the decoder returns them, with their margins, and the frames."""
    chunks: list[Tensor] = []
    patch.setattr(decode, "denormalize", lambda pixels: (chunks.append(pixels), denormalize(pixels))[1])
    frames = engine.decode(latents, request, noise=noise)
    return torch.cat(chunks, dim=1), frames


def _requested_shape(request: Request) -> tuple[int, int, int]:
    assert isinstance(request.size, Size)
    assert request.frames is not None
    return request.frames, request.size.height, request.size.width


@pytest.mark.parametrize("name", CASES)
def test_latents_pixels_and_frames_equal_the_official_ones(
    name: str,
    home: Callable[[str], Path],
    engine: Callable[[str], Engine],
    oracle: Callable[[str], Any],
    media: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    parity: Callable[[str, str, str, float], float],
) -> None:
    case = CASES[name]
    request = build_request(case, media)
    ours = engine(case.model)  # writes the upscaler file
    upsampler = official_pipeline.open_upsampler(home(case.model) / UPSCALER) if request.multi_scale else None
    expected = official_pipeline.run_official(oracle(case.model), request, upsampler=upsampler)
    latents = ours.denoise(request)
    noise = NoiseStreams(request.seed).draw("decode", latents.shape)
    pixels, frames = decode_with_pixels(ours, latents, request, noise, monkeypatch)
    error = relative_error(latents, expected.latents), relative_error(pixels, expected.pixels[0])
    stage = next(stage for prefix, stage in STAGES_BY_PREFIX.items() if name.startswith(prefix))
    parity(stage, case.model, "official", max(error))
    assert error[0] <= LATENTS
    assert error[1] <= PIXELS
    # Truncation to uint8 may turn a tiny error into a difference of 1.
    difference = (frames.int() - expected.frames.int()).abs()
    assert frames.shape == expected.frames.shape == (*_requested_shape(request), 3)
    assert difference.max() <= 1
    assert difference.float().mean() < 1e-3


@pytest.mark.parametrize(
    "case",
    [
        make_case("0.9.5", steps=6, skip_initial=4),
        make_case("0.9", 1.0, steps=6, skip_initial=3, skip_final=1),
        make_case("0.9.8 distilled", 0.6, steps=None, sigmas=(0.9094, 0.725, 0.4219), guidance=1.0),
    ],
    ids=["linear-quadratic", "SD3, with an image", "sigmas, with an image at 0.6"],
)
def test_init_latents_are_noised_as_in_the_official_pipeline(
    case: Case, engine: Callable[[str], Engine], oracle: Callable[[str], Any], media: dict[str, Path], parity: Any
) -> None:
    request = build_request(case, media)
    init_latents = NoiseStreams(99).draw("start", (1, CHANNELS, 3, 3, 2))
    latents = engine(case.model).denoise(request, init_latents=init_latents)
    error = relative_error(latents, official_pipeline.run_official(oracle(case.model), request, init_latents).latents)
    assert parity("video from latents", case.model, "official", error) <= LATENTS
    assert relative_error(latents, engine(case.model).denoise(request, init_latents=-init_latents)) > 0.1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("text, linear-quadratic, causal", ["initial", "decode"]),
        ("text, stochastic", ["initial", *(f"stochastic {i}" for i in range(4)), "decode"]),
        ("image, linear-quadratic, causal", ["initial", *(f"condition {i}" for i in range(4)), "decode"]),
        ("text, SD3, not causal", ["initial"]),
        ("text, SD3, injected noise", ["initial", "decode", *(f"injection {i}" for i in range(1, 7))]),
    ],
)
def test_kadr_draws_a_stream_wherever_the_official_code_draws_noise(
    name: str,
    expected: list[str],
    engine: Callable[[str], Engine],
    oracle: Callable[[str], Any],
    media: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also shows that the comparison above replaces all noise of the official code."""
    case = CASES[name]
    request = build_request(case, media)
    assert list(official_pipeline.run_official(oracle(case.model), request).noise_names) == expected
    drawn: list[str] = []
    draw = NoiseStreams.draw
    monkeypatch.setattr(
        NoiseStreams, "draw", lambda self, name, shape: (drawn.append(name), draw(self, name, shape))[1]
    )
    engine(case.model).generate(request)
    assert drawn == expected


def test_comparison_detects_another_frame_rate_guidance_or_noise(
    engine: Callable[[str], Engine], oracle: Callable[[str], Any], media: dict[str, Path]
) -> None:
    case = CASES["image, linear-quadratic, causal"]
    request = build_request(case, media)
    expected = official_pipeline.run_official(oracle(case.model), request).latents
    for change in (
        {"fps": 23.0},
        {"guidance": 3.1},
        {"image_noise": 0.16},
        {"seed": 6},
        {"negative_prompt": ""},
        {"image_crf": 0},
    ):
        latents = engine(case.model).denoise(replace(request, **change))
        assert relative_error(latents, expected) > 100 * LATENTS, change


def test_distilled_model_refuses_steps_that_the_official_code_refuses(
    engine: Callable[[str], Engine], oracle: Callable[[str], Any], media: dict[str, Path]
) -> None:
    request = build_request(make_case("0.9.8 distilled", steps=6), media)
    with pytest.raises(AssertionError, match="Invalid inference timestep"):
        official_pipeline.run_official(oracle("0.9.8 distilled"), request)
    with pytest.raises(RequestError, match="distilled for the sigmas"):
        engine("0.9.8 distilled").denoise(request)
