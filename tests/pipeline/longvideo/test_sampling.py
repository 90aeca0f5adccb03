"""Long videos: windows against the pipeline of diffusers, and the laws that hold whatever a model makes."""

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
from kadr.pipeline.longvideo.sampling import conditions_in_window
from kadr.pipeline.progress import Progress
from kadr.planning import planner
from kadr.planning.plan import Placement
from kadr.request.passes import resolve_window_passes
from kadr.request.windows import Windows
from kadr.sampling.noise import NoiseStreams
from kadr.sampling.schedules import Schedule
from kadr.sampling.settings import Guidance, Pass
from kadr.shapes import LatentGrid, Size, snap_frames
from tests.oracles import relative_error
from tests.pipeline.longvideo import diffusers_long
from tests.tiny_models import CHANNELS, MODEL_FILE

LATENTS = 1e-5  # relative error; asked were 1e-4
PROMPTS = "a red circle | birds fly slowly | blue sea"
LEVELS = (1.0, 0.95, 0.7, 0.4, 0.2)


def asked(**fields: Any) -> Request:
    """A long video of few tokens."""
    given: dict[str, Any] = {
        "prompt": PROMPTS,
        "negative_prompt": "evening",
        "size": Size(64, 96),
        "frames": 97,
        "fps": 24.0,
        "seed": 5,
        "sigmas": LEVELS,
        "guidance": Guidance(cfg_scale=3.0, stg_scale=0.0),
        "stochastic": False,
        "image_noise": 0.0,
        "windows": Windows(frames=41, overlap=24, overlap_strength=1.0, adain=0.25),
    }
    return Request(**{**given, **fields})


CASES: dict[str, dict[str, Any]] = {
    "windows": {},
    "windows, held half": {"windows": Windows(frames=41, overlap=24, overlap_strength=0.5, adain=0.25)},
    "windows, all the statistics of the first": {
        "windows": Windows(frames=41, overlap=32, overlap_strength=1.0, adain=1.0)
    },
    "windows, no statistics": {"windows": Windows(frames=41, overlap=24, overlap_strength=0.8, adain=0.0)},
    "windows, one latent of overlap": {"windows": Windows(frames=33, overlap=8, overlap_strength=1.0)},
    "windows, no guidance": {"guidance": Guidance(cfg_scale=1.0), "prompt": "birds fly"},
    "windows, a shorter last one": {"frames": 89},
    "windows with a picture": {"picture": True},
    "windows with a picture remembered half": {
        "picture": True,
        "windows": Windows(frames=41, overlap=24, overlap_strength=0.5, anchor_strength=0.5),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_long_video_has_the_latents_of_diffusers(
    name: str, engine: Engine, image_condition: Condition, parity: Callable[[str, str, str, float], float]
) -> None:
    fields = dict(CASES[name])
    request = asked(conditions=[image_condition] * fields.pop("picture", False), **fields)
    expected = diffusers_long.run_diffusers_long(engine, request)
    made = engine.denoise(request)
    assert made.shape == expected.shape
    assert parity("long video", "0.9.5", "diffusers", relative_error(made, expected)) <= LATENTS


def test_at_full_strength_diffusers_as_it_is_agrees_and_below_it_tells_the_network_other_levels(
    engine: Engine,
) -> None:
    request = asked(prompt="birds fly", guidance=Guidance(cfg_scale=1.0))
    assert (
        relative_error(engine.denoise(request), diffusers_long.run_diffusers_long(engine, request, is_unpatched=True))
        <= LATENTS
    )
    half = asked(prompt="birds fly", guidance=Guidance(cfg_scale=1.0), windows=Windows(frames=41, overlap_strength=0.5))
    assert (
        relative_error(engine.denoise(half), diffusers_long.run_diffusers_long(engine, half, is_unpatched=True)) > 1e-3
    )


def test_diffusers_makes_a_latent_too_many_at_every_seam_of_two_and_kadr_crosses_over(engine: Engine) -> None:
    request = asked(windows=Windows(frames=41, overlap=16, overlap_strength=1.0, adain=0.0), frames=97)
    spans = request.windows.spans(97) if request.windows else ()
    made, theirs = engine.denoise(request), diffusers_long.run_diffusers_long(engine, request)
    assert made.shape[2] == 13
    assert theirs.shape[2] == 13 + len(spans) - 1
    assert relative_error(made[:, :, :5], theirs[:, :, :5]) <= LATENTS
    one, other = theirs[:, :, 5], theirs[:, :, 6]  # the last of the first window, and what the second has there
    assert relative_error(made[:, :, 5], (one + other) / 2) <= LATENTS


# Laws


def short(**fields: Any) -> Request:
    """Three windows in a second or so."""
    usual: dict[str, Any] = {"sigmas": (1.0, 0.7, 0.4), "guidance": Guidance(cfg_scale=1.0), "size": Size(64, 64)}
    windows = Windows(frames=25, overlap=16)
    return asked(**{**usual, "frames": 57, "prompt": "birds fly", "image_noise": 0.15, "windows": windows, **fields})


@pytest.mark.parametrize("frames", [1, 17, 25])
def test_a_video_that_one_window_holds_is_the_one_made_without(engine: Engine, frames: int) -> None:
    request = short(frames=frames)
    own, plain = engine.generate(request), engine.generate(replace(request, windows=None))
    assert own.latents.equal(plain.latents)
    assert (own.frames == plain.frames).all()
    assert own.request == plain.request


def test_a_long_video_begins_as_the_video_of_one_window(engine: Engine) -> None:
    request = short()
    long, plain = engine.denoise(request), engine.denoise(replace(request, windows=None, frames=25))
    assert long.shape[2] == 8
    assert long[:, :, :3].equal(plain[:, :, :3])


@pytest.mark.parametrize(("length", "overlap"), [(2, 1), (4, 1), (4, 2), (4, 3), (10, 3), (16, 3), (16, 15), (40, 7)])
@pytest.mark.parametrize("frames", [1, 9, 25, 26, 57, 121, 1441, 20000])
def test_windows_make_every_latent_once_and_share_what_overlaps(frames: int, length: int, overlap: int) -> None:
    windows = Windows(frames=8 * (length - 1) + 1, overlap=8 * overlap)
    spans = windows.spans(frames)
    assert spans[0].start == 0
    assert spans[-1].end == LatentGrid.for_video(Size(32, 32), frames).frames
    for one, other in pairwise(spans):
        assert one.end - one.start == length
        assert one.end - other.start == overlap
        assert other.end > one.end
    if len(spans) > 1:
        assert len(windows.spans(windows.total_frames(len(spans)))) == len(spans)
        assert windows.total_frames(len(spans) - 1) < snap_frames(frames) <= windows.total_frames(len(spans))


def test_the_seed_is_that_of_every_window_and_no_two_have_the_same_noise(engine: Engine) -> None:
    request = short()
    one = engine.denoise(request)
    assert one.equal(engine.denoise(request))
    other = engine.denoise(replace(request, seed=6))
    assert all(relative_error(other[:, :, i], one[:, :, i]) > 0.1 for i in range(8))
    streams = NoiseStreams(request.seed)
    drawn = [streams.draw(name, (1, CHANNELS, 4, 2, 2)) for name in ("initial", "window 2 initial", "window 3 initial")]
    whole = torch.cat([drawn[0][:, :, :2], drawn[1][:, :, :2], drawn[2]], dim=2)
    given_noise = engine.denoise(request, noise=whole)
    assert given_noise.shape == one.shape
    assert relative_error(given_noise, one) > 1e-3  # windows share the noise where they overlap


def test_each_window_has_its_own_prompt_and_the_last_one_holds_for_the_rest(engine: Engine) -> None:
    one = engine.denoise(short(prompt="birds fly | blue sea", frames=73))
    other = engine.denoise(short(prompt="birds fly | golden light", frames=73))
    same = engine.denoise(short(prompt="birds fly|blue sea| blue sea |blue sea", frames=73))
    assert one.equal(same)
    assert one[:, :, :3].equal(other[:, :, :3])
    assert all(relative_error(one[:, :, i], other[:, :, i]) > 1e-4 for i in range(3, 10))


def test_several_prompts_without_a_length_make_a_window_each(engine: Engine) -> None:
    request = replace(short(prompt="birds fly|blue sea|golden light"), frames=None)
    assert engine.resolve(request).frames == 57


def test_a_picture_is_remembered_by_every_window(engine: Engine, image_condition: Condition) -> None:
    request = short(conditions=(image_condition,), frames=73)
    made = {
        share: engine.denoise(replace(request, windows=Windows(frames=25, overlap=16, anchor_strength=share)))
        for share in (None, 1.0, 0.4, 0.0)
    }
    assert made[None].equal(made[1.0])
    for share in (0.4, 0.0):
        assert all(relative_error(made[share][:, :, i], made[1.0][:, :, i]) > 1e-3 for i in range(1, 10))


def test_a_picture_counted_from_the_end_that_stands_first_is_remembered(engine: Engine, image_condition: Condition) -> None:
    front = engine.denoise(short(conditions=(image_condition,)))
    assert engine.denoise(short(conditions=(replace(image_condition, frame=-57),))).equal(front)


def test_a_picture_stands_in_the_windows_that_its_frame_is_in(engine: Engine, image_condition: Condition) -> None:
    generation = engine._create_generation(
        short(conditions=(replace(image_condition, frame=30),), frames=73), lambda progress: None
    )
    places = [
        [
            item.resolved_condition.start_frame
            for item in conditions_in_window(generation.media.prepared_conditions[0], span)
        ]
        for span in generation.spans
    ]
    assert places == [[], [14], [], []]
    assert [span.first_frame for span in generation.spans] == [0, 16, 32, 48]
    with_it = engine.denoise(generation.request)
    without = engine.denoise(replace(generation.request, conditions=()))
    assert with_it[:, :, :3].equal(without[:, :, :3])
    assert relative_error(with_it[:, :, 4], without[:, :, 4]) > 1e-3


def test_a_clip_over_the_end_of_a_window_is_refused_and_one_inside_is_shown(engine: Engine, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    with VideoWriter(clip, Size(64, 64), 24) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8))
    with pytest.raises(
        RequestError, match=r"clip.mp4 \(frames 16 to 32\) does not lie inside one window.*0 to 24, 17 to 40"
    ):
        engine.denoise(short(conditions=(Condition(str(clip), frame=16),)))
    made = engine.denoise(short(conditions=(Condition(str(clip), frame=24),)))
    assert relative_error(made, engine.denoise(short())) > 1e-2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"multi_scale": True}, "3 windows are asked for, and two passes"),
        ({"prompt": "a|b|c|d"}, "4 prompts are given, one for each window, and the video has 3 windows"),
        ({"prompt": "a||c"}, "prompt 2 of 3 is empty"),
        ({"windows": Windows(anchor_strength=0.5)}, "there is no picture at frame 0 to be remembered"),
        ({"windows": {"frames": 25, "overlap": 32}}, "the overlap is 32 frames, and a window has 25"),
        ({"windows": {"overlap": 12}}, "it must be a multiple of 8, such as 8"),
        ({"windows": {"overlap": "24"}}, "it must be a whole number of frames"),
        ({"windows": {"frames": 1}}, "a window has 1 frames; it must have between 9 and 4097"),
        ({"windows": {"frames": 0}}, "a window has 0 frames; it must have between 9 and 4097"),
        ({"windows": {"frames": -5}}, "a window has -5 frames; it must have between 9 and 4097"),
        ({"windows": {"frames": 24.5}}, "a window has 24.5 frames; it must be a whole number"),
        ({"windows": {"overlap_strength": 0}}, "windows would know nothing of each other"),
        ({"windows": {"adain": 1.5}}, "adain of windows is 1.5; it must be a number between 0 and 1"),
        ({"windows": 121}, "windows is 121; it must be a Windows"),
        ({"windows": None, "frames": 5000}, "at once a video has at most 4097"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_made_in_windows_is_refused(engine_without_weights: Engine, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=re.escape(said)):
        engine_without_weights.generate(short(**fields))


def test_latents_to_start_from_are_refused(engine_without_weights: Engine) -> None:
    with pytest.raises(RequestError, match="a long video starts from noise or from an input video"):
        engine_without_weights.denoise(short(), init_latents=torch.zeros(1, CHANNELS, 8, 2, 2))


def test_a_request_with_windows_survives_json(engine: Engine) -> None:
    request = engine.resolve(short(prompt="birds fly|blue sea"))
    assert request.windows == Windows(frames=25, overlap=16, anchor_strength=0.0)
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request
    assert engine.resolve(request) == request
    with pytest.raises(RequestError, match="cannot be read"):
        Request.from_json({"prompt": "a", "windows": {"tiles": 3}})


@pytest.mark.parametrize(("frames", "overlap"), [(121, 24), (25, 16), (33, 16), (9, 8)])
def test_the_overlap_is_24_frames_or_less_where_a_window_is_short(frames: int, overlap: int) -> None:
    assert Windows().with_defaults(frames, has_anchor_image=False).overlap == overlap


def test_two_passes_of_a_recipe_give_way_to_windows_with_a_warning(home: Path) -> None:
    recipe = Recipe(
        first_pass=Pass(steps=2), second_pass=Pass(sigmas=(0.5,)), single_pass=Pass(steps=3), multi_scale=True
    )
    engine = Engine.open(home / MODEL_FILE, device="cpu", recipe=recipe)
    request = replace(short(), sigmas=None, guidance=None)
    with pytest.warns(KadrWarning, match="recipe has two passes, and windows are made in one"):
        (plan,) = engine.resolve_passes(request)
    assert (len(plan.sigmas), plan.window_count) == (3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KadrWarning)
        engine.resolve_passes(replace(request, multi_scale=False))


# The plan and the progress


def test_more_windows_take_more_time_and_no_more_memory(engine: Engine) -> None:
    two, four, many = (engine.plan(short(frames=25 + 16 * more)).stage("denoise").placement for more in (1, 3, 80))
    assert (two.window_count, four.window_count, many.window_count) == (2, 4, 81)
    assert two.device_bytes == four.device_bytes == many.device_bytes
    assert (many.seconds - two.seconds) / (four.seconds - two.seconds) == pytest.approx(79 / 2, rel=0.01)


def test_a_window_takes_the_memory_of_its_own_tokens_and_those_it_is_shown(engine: Engine) -> None:
    long = engine.plan(short()).stage("denoise").placement
    plain = {
        frames: engine.plan(replace(short(), windows=None, frames=frames)).stage("denoise").placement
        for frames in (25, 41)
    }
    assert (
        plain[25].workspace_bytes < long.workspace_bytes <= 1.05 * plain[41].workspace_bytes
    )  # 4 latents of its own, 2 of the overlap


def test_progress_counts_the_steps_of_all_windows(engine: Engine) -> None:
    seen: list[Progress] = []
    engine.denoise(short(), watch=seen.append)
    steps = [progress for progress in seen if progress.stage == "denoise"]
    assert {progress.of for progress in steps} == {9}
    assert [progress.step for progress in steps] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9]
    assert [progress.window for progress in steps] == [(number, 3) for number in (1, 2, 3) for _ in range(4)]
    assert steps[-1].eta == 0


def test_steps_are_those_of_each_window_where_they_differ(engine: Engine) -> None:
    """Levels that depend on tokens: the last window is shorter, and has others up to a strength."""
    windows = Windows(frames=97, overlap=24)
    long = short(size=Size(704, 480), input_video="clip.mp4", denoise_strength=0.5, sigmas=None, steps=40, windows=windows)
    request = replace(long, frames=129, fps=24.0)
    plans = resolve_window_passes(request, Schedule(sampler="Uniform", shifting="SD3", shift_terminal=0.1))
    one, other = (len(plan.sigmas) for plan in plans)
    assert one < other
    assert [(plan.steps_before, plan.total_steps) for plan in plans] == [(0, one + other), (one, one + other)]


@pytest.mark.parametrize(("free", "said"), [(60, "--window "), (12, "--size ")])
def test_a_window_that_does_not_fit_is_refused_with_a_shorter_one_or_a_size_that_does(
    free: int, said: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(request: Request) -> Placement:
        return (
            engine._plan_generation(engine._create_generation(request, lambda progress: None), request, ("denoise",))
            .stages[0]
            .placement
        )

    request = short(size=Size(768, 768), frames=1441, windows=Windows(frames=121))
    monkeypatch.setattr(planner, "free_bytes", lambda device: free * 10**6)
    with pytest.raises(PlanError, match=said) as caught:
        planned(request)
    value = str(caught.value).partition(said)[2].partition(" ")[0].rstrip(".")
    fitting = {"windows": Windows(frames=int(value))} if "window" in said else {"size": Size.parse(value)}
    assert planned(replace(request, **fitting)).window_count > 1
