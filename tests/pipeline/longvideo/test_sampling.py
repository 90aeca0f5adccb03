"""Long videos: windows against the pipeline of diffusers, and laws that hold for any weights."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kadr import Condition, Engine, Request
from kadr.errors import KadrWarning, PlanError, RequestError
from kadr.media.writer import VideoWriter
from kadr.models.registry import Recipe
from kadr.pipeline.progress import Progress
from kadr.planning import planner
from kadr.planning.placement import Placement
from kadr.request.passes import resolve_window_passes
from kadr.request.windows import Windows
from kadr.sampling.noise import NoiseStreams
from kadr.sampling.schedules import Schedule
from kadr.sampling.settings import Guidance, Pass
from kadr.shapes import LatentGrid, Size, snap_frames
from tests.oracles import relative_error
from tests.pipeline.longvideo import diffusers_long
from tests.tiny_models import CHANNELS, MODEL_FILE

LATENTS = 1e-5  # relative error; the goal was 1e-4
PROMPTS = "a red circle | birds fly slowly | blue sea"
SIGMAS = (1.0, 0.95, 0.7, 0.4, 0.2)


def build_request(**fields: Any) -> Request:
    """Returns the request of a long video with few tokens."""
    defaults: dict[str, Any] = {
        "prompt": PROMPTS,
        "negative_prompt": "evening",
        "size": Size(64, 96),
        "frames": 97,
        "fps": 24.0,
        "seed": 5,
        "sigmas": SIGMAS,
        "guidance": Guidance(cfg_scale=3.0, stg_scale=0.0),
        "sampler": "euler",
        "image_noise": 0.0,
        "windows": Windows(frames=41, overlap=24, overlap_strength=1.0, adain=0.25),
    }
    return Request(**{**defaults, **fields})


CASES: dict[str, dict[str, Any]] = {
    "windows": {},
    "windows, half overlap strength": {"windows": Windows(frames=41, overlap=24, overlap_strength=0.5, adain=0.25)},
    "windows, full adain": {"windows": Windows(frames=41, overlap=32, overlap_strength=1.0, adain=1.0)},
    "windows, no adain": {"windows": Windows(frames=41, overlap=24, overlap_strength=0.8, adain=0.0)},
    "windows, one latent of overlap": {"windows": Windows(frames=33, overlap=8, overlap_strength=1.0)},
    "windows, no guidance": {"guidance": Guidance(cfg_scale=1.0), "prompt": "birds fly"},
    "windows, a shorter last one": {"frames": 89},
    "windows with an image": {"image": True},
    "windows with an image at half anchor strength": {
        "image": True,
        "windows": Windows(frames=41, overlap=24, overlap_strength=0.5, anchor_strength=0.5),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_long_video_latents_equal_those_of_diffusers(
    name: str, engine: Engine, image_condition: Condition, parity: Callable[[str, str, str, float], float]
) -> None:
    fields = dict(CASES[name])
    request = build_request(conditions=[image_condition] * fields.pop("image", False), **fields)
    expected = diffusers_long.run_diffusers_long(engine, request)
    latents = engine.denoise(request)
    assert latents.shape == expected.shape
    assert parity("long video", "0.9.5", "diffusers", relative_error(latents, expected)) <= LATENTS


def test_unpatched_diffusers_agrees_only_at_full_overlap_strength(
    engine: Engine,
) -> None:
    request = build_request(prompt="birds fly", guidance=Guidance(cfg_scale=1.0))
    assert (
        relative_error(engine.denoise(request), diffusers_long.run_diffusers_long(engine, request, is_unpatched=True))
        <= LATENTS
    )
    half = build_request(
        prompt="birds fly", guidance=Guidance(cfg_scale=1.0), windows=Windows(frames=41, overlap_strength=0.5)
    )
    assert (
        relative_error(engine.denoise(half), diffusers_long.run_diffusers_long(engine, half, is_unpatched=True)) > 1e-3
    )


def test_overlap_of_two_is_blended_where_diffusers_adds_a_latent(engine: Engine) -> None:
    request = build_request(windows=Windows(frames=41, overlap=16, overlap_strength=1.0, adain=0.0), frames=97)
    spans = request.windows.spans(97) if request.windows else ()
    latents, theirs = engine.denoise(request), diffusers_long.run_diffusers_long(engine, request)
    assert latents.shape[2] == 13
    assert theirs.shape[2] == 13 + len(spans) - 1
    assert relative_error(latents[:, :, :5], theirs[:, :, :5]) <= LATENTS
    first, second = theirs[:, :, 5], theirs[:, :, 6]  # the last of the first window, and the second window's own
    assert relative_error(latents[:, :, 5], (first + second) / 2) <= LATENTS


# Laws


def short_request(**fields: Any) -> Request:
    """Returns the request of a video of three windows, sampled in about a second."""
    defaults: dict[str, Any] = {"sigmas": (1.0, 0.7, 0.4), "guidance": Guidance(cfg_scale=1.0), "size": Size(64, 64)}
    windows = Windows(frames=25, overlap=16)
    return build_request(
        **{**defaults, "frames": 57, "prompt": "birds fly", "image_noise": 0.15, "windows": windows, **fields}
    )


@pytest.mark.parametrize("frames", [1, 17, 25])
def test_video_that_fits_one_window_equals_one_without_windows(engine: Engine, frames: int) -> None:
    request = short_request(frames=frames)
    windowed, plain = engine.generate(request), engine.generate(replace(request, windows=None))
    assert windowed.latents.equal(plain.latents)
    assert (windowed.frames == plain.frames).all()
    assert windowed.request == plain.request


def test_long_video_starts_like_the_video_of_one_window(engine: Engine) -> None:
    request = short_request()
    long, plain = engine.denoise(request), engine.denoise(replace(request, windows=None, frames=25))
    assert long.shape[2] == 8
    assert long[:, :, :3].equal(plain[:, :, :3])


@pytest.mark.parametrize(("length", "overlap"), [(2, 1), (4, 1), (4, 2), (4, 3), (10, 3), (16, 3), (16, 15), (40, 7)])
@pytest.mark.parametrize("frames", [1, 9, 25, 26, 57, 121, 1441, 20000])
def test_windows_cover_every_latent_and_overlap_as_set(frames: int, length: int, overlap: int) -> None:
    windows = Windows(frames=8 * (length - 1) + 1, overlap=8 * overlap)
    spans = windows.spans(frames)
    assert spans[0].start == 0
    assert spans[-1].end == LatentGrid.for_video(Size(32, 32), frames).frames
    for span, next_span in pairwise(spans):
        assert span.end - span.start == length
        assert span.end - next_span.start == overlap
        assert next_span.end > span.end
    if len(spans) > 1:
        assert len(windows.spans(windows.total_frames(len(spans)))) == len(spans)
        assert windows.total_frames(len(spans) - 1) < snap_frames(frames) <= windows.total_frames(len(spans))


def test_seed_covers_every_window_and_each_has_its_own_noise(engine: Engine) -> None:
    request = short_request()
    latents = engine.denoise(request)
    assert latents.equal(engine.denoise(request))
    other_seed = engine.denoise(replace(request, seed=6))
    assert all(relative_error(other_seed[:, :, i], latents[:, :, i]) > 0.1 for i in range(8))
    streams = NoiseStreams(request.seed)
    noise = [streams.draw(name, (1, CHANNELS, 4, 2, 2)) for name in ("initial", "window 2 initial", "window 3 initial")]
    whole = torch.cat([noise[0][:, :, :2], noise[1][:, :, :2], noise[2]], dim=2)
    from_whole_noise = engine.denoise(request, noise=whole)
    assert from_whole_noise.shape == latents.shape
    assert relative_error(from_whole_noise, latents) > 1e-3  # windows share the noise where they overlap


def test_each_window_has_its_prompt_and_the_last_covers_the_rest(engine: Engine) -> None:
    two_prompts = engine.denoise(short_request(prompt="birds fly | blue sea", frames=73))
    other_second_prompt = engine.denoise(short_request(prompt="birds fly | golden light", frames=73))
    repeated = engine.denoise(short_request(prompt="birds fly|blue sea| blue sea |blue sea", frames=73))
    assert two_prompts.equal(repeated)
    assert two_prompts[:, :, :3].equal(other_second_prompt[:, :, :3])
    assert all(relative_error(two_prompts[:, :, i], other_second_prompt[:, :, i]) > 1e-4 for i in range(3, 10))


def test_prompts_without_a_length_give_one_window_each(engine: Engine) -> None:
    request = replace(short_request(prompt="birds fly|blue sea|golden light"), frames=None)
    assert engine.resolve(request).frames == 57


def test_anchor_image_changes_every_window(engine: Engine, image_condition: Condition) -> None:
    request = short_request(conditions=(image_condition,), frames=73)
    latents = {
        strength: engine.denoise(replace(request, windows=Windows(frames=25, overlap=16, anchor_strength=strength)))
        for strength in (None, 1.0, 0.4, 0.0)
    }
    assert latents[None].equal(latents[1.0])
    for strength in (0.4, 0.0):
        assert all(relative_error(latents[strength][:, :, i], latents[1.0][:, :, i]) > 1e-3 for i in range(1, 10))


def test_image_at_frame_0_counted_from_the_end_is_the_anchor(engine: Engine, image_condition: Condition) -> None:
    at_frame_0 = engine.denoise(short_request(conditions=(image_condition,)))
    assert engine.denoise(short_request(conditions=(replace(image_condition, frame=-57),))).equal(at_frame_0)


def test_image_conditions_the_windows_that_contain_its_frame(engine: Engine, image_condition: Condition) -> None:
    resolved = engine.resolve(short_request(conditions=(replace(image_condition, frame=30),), frames=73))
    start_frames = [[item.resolved_condition.start_frame for item in media.conditions] for media in resolved.media]
    assert start_frames == [[], [14], [], []]
    assert [span.first_frame for span in resolved.spans] == [0, 16, 32, 48]
    with_image = engine.denoise(resolved.request)
    without = engine.denoise(replace(resolved.request, conditions=()))
    assert with_image[:, :, :3].equal(without[:, :, :3])
    assert relative_error(with_image[:, :, 4], without[:, :, 4]) > 1e-3


def test_clip_across_a_window_end_is_refused_and_one_inside_is_used(engine: Engine, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    with VideoWriter(clip, Size(64, 64), 24) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8))
    with pytest.raises(
        RequestError, match=r"clip.mp4 \(frames 16 to 32\) does not lie inside one window.*0 to 24, 17 to 40"
    ):
        engine.denoise(short_request(conditions=(Condition(str(clip), frame=16),)))
    latents = engine.denoise(short_request(conditions=(Condition(str(clip), frame=24),)))
    assert relative_error(latents, engine.denoise(short_request())) > 1e-2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"multi_scale": True}, "3 windows and two passes are requested"),
        ({"prompt": "a|b|c|d"}, "4 prompts are given, one for each window, but the video has 3 windows"),
        ({"prompt": "a||c"}, "prompt 2 of 3 is empty"),
        ({"windows": Windows(anchor_strength=0.5)}, "there is no image at frame 0"),
        ({"windows": {"frames": 25, "overlap": 32}}, "the overlap is 32 frames, and a window has 25"),
        ({"windows": {"overlap": 12}}, "it must be a multiple of 8, such as 8"),
        ({"windows": {"overlap": "24"}}, "it must be a whole number of frames"),
        ({"windows": {"frames": 1}}, "a window has 1 frames; it must have between 9 and 4097"),
        ({"windows": {"frames": 0}}, "a window has 0 frames; it must have between 9 and 4097"),
        ({"windows": {"frames": -5}}, "a window has -5 frames; it must have between 9 and 4097"),
        ({"windows": {"frames": 24.5}}, "a window has 24.5 frames; it must be a whole number"),
        ({"windows": {"overlap_strength": 0}}, "windows would be independent of each other"),
        ({"windows": {"adain": 1.5}}, "adain of windows is 1.5; it must lie between 0 and 1"),
        ({"windows": 121}, "windows is 121; it must be a Windows"),
        ({"windows": None, "frames": 5000}, "a video sampled at once has at most 4097"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_requests_that_windows_cannot_serve_are_refused(
    engine_without_weights: Engine, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        engine_without_weights.generate(short_request(**fields))


def test_init_latents_with_windows_are_refused(engine_without_weights: Engine) -> None:
    with pytest.raises(RequestError, match="a long video starts from noise or from an input video"):
        engine_without_weights.denoise(short_request(), init_latents=torch.zeros(1, CHANNELS, 8, 2, 2))


def test_request_with_windows_survives_json(engine: Engine) -> None:
    request = engine.resolve(short_request(prompt="birds fly|blue sea")).request
    assert request.windows == Windows(frames=25, overlap=16, anchor_strength=0.0)
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request
    assert engine.resolve(request).request == request
    with pytest.raises(RequestError, match="unknown to this version"):
        Request.from_json({"prompt": "a", "windows": {"tiles": 3}})


@pytest.mark.parametrize(("frames", "overlap"), [(121, 24), (25, 16), (33, 16), (9, 8)])
def test_default_overlap_is_24_frames_or_less_in_a_short_window(frames: int, overlap: int) -> None:
    assert Windows().with_defaults(frames, has_anchor_image=False).overlap == overlap


def test_windows_replace_a_recipe_s_two_passes_with_a_warning(home: Path) -> None:
    recipe = Recipe(
        first_pass=Pass(steps=2), second_pass=Pass(sigmas=(0.5,)), single_pass=Pass(steps=3), multi_scale=True
    )
    engine = Engine.open(home / MODEL_FILE, device="cpu", recipe=recipe)
    request = replace(short_request(), sigmas=None, guidance=None)
    with pytest.warns(KadrWarning, match="recipe has two passes, but windows are sampled in one"):
        (resolved_pass,) = engine.resolve(request).passes
    assert (len(resolved_pass.sigmas), resolved_pass.window_count) == (3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KadrWarning)
        engine.resolve(replace(request, multi_scale=False))


# Plan and progress


def test_more_windows_take_more_time_and_no_more_memory(engine: Engine) -> None:
    two, four, many = (
        engine.plan(short_request(frames=25 + 16 * more)).stage("denoise").placement for more in (1, 3, 80)
    )
    assert (two.window_count, four.window_count, many.window_count) == (2, 4, 81)
    assert two.device_bytes == four.device_bytes == many.device_bytes
    assert (many.seconds - two.seconds) / (four.seconds - two.seconds) == pytest.approx(79 / 2, rel=0.01)


def test_window_memory_counts_its_own_tokens_and_its_guides(engine: Engine) -> None:
    long = engine.plan(short_request()).stage("denoise").placement
    plain = {
        frames: engine.plan(replace(short_request(), windows=None, frames=frames)).stage("denoise").placement
        for frames in (25, 41)
    }
    assert (
        plain[25].workspace_bytes < long.workspace_bytes <= 1.05 * plain[41].workspace_bytes
    )  # 4 latents of its own, 2 of the overlap guide


def test_progress_counts_the_steps_of_all_windows(engine: Engine) -> None:
    reports: list[Progress] = []
    engine.denoise(short_request(), watch=reports.append)
    steps = [progress for progress in reports if progress.stage == "denoise"]
    assert {progress.of for progress in steps} == {9}
    assert [progress.step for progress in steps] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9]
    assert [progress.window for progress in steps] == [(number, 3) for number in (1, 2, 3) for _ in range(4)]
    assert steps[-1].eta == 0


def test_progress_counts_each_window_s_own_number_of_steps(engine: Engine) -> None:
    """Sigmas depend on the number of tokens: the last window is shorter, so another number lies below the strength."""
    windows = Windows(frames=97, overlap=24)
    long = short_request(
        size=Size(704, 480), input_video="clip.mp4", denoise_strength=0.5, sigmas=None, steps=40, windows=windows
    )
    request = replace(long, frames=129, fps=24.0)
    window_passes = resolve_window_passes(request, Schedule(sampler="Uniform", shifting="SD3", shift_terminal=0.1))
    first, second = (len(window_pass.sigmas) for window_pass in window_passes)
    assert first < second
    steps = [(window_pass.steps_before, window_pass.total_steps) for window_pass in window_passes]
    assert steps == [(0, first + second), (first, first + second)]


@pytest.mark.parametrize(("free_megabytes", "flag"), [(60, "windows="), (12, "size=")])
def test_window_that_does_not_fit_suggests_a_length_or_size_that_does(
    free_megabytes: int, flag: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan_denoising(request: Request) -> Placement:
        with engine.start(request, stages=("denoise",)) as generation:
            return generation.plan.stages[0].placement

    request = short_request(size=Size(768, 768), frames=1441, windows=Windows(frames=121))
    monkeypatch.setattr(planner, "free_bytes", lambda device: free_megabytes * 10**6)
    with pytest.raises(PlanError, match=flag) as caught:
        plan_denoising(request)
    value = str(caught.value).partition(flag)[2].partition(" ")[0].rstrip(".")
    smaller = {"windows": Windows(frames=int(value))} if "window" in flag else {"size": Size.parse(value)}
    assert plan_denoising(replace(request, **smaller)).window_count > 1
