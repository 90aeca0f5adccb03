"""Pictures and clips in a video: where they come to stand, and what is refused before it costs anything."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ltx_video.pipelines.pipeline_ltx_video import ConditioningItem, LTXVideoPipeline
from PIL import Image
from torch import Tensor

from kadr import Condition, Engine, KadrWarning, Request, Size
from kadr.errors import KadrError, MediaError, RequestError
from kadr.media.clip import read_video
from kadr.media.writer import VideoWriter
from kadr.models.transformer import Transformer
from kadr.pipeline.stages.prepared_conditions import (
    PreparedCondition,
    PreparedFrames,
    apply_condition,
    place_in_pass,
    prepare_condition,
)
from kadr.request.passes import ResolvedPass
from kadr.request.resolved_conditions import ResolvedCondition, open_input_video, resolve_conditions
from kadr.sampling.positions import token_positions
from kadr.sampling.settings import Pass
from kadr.sampling.state import LatentState, to_latents
from kadr.shapes import LatentGrid
from tests.oracles import randn
from tests.tiny_models import CHANNELS, MODEL_FILE, write_random_upscaler

REQUEST = Request(prompt="a red circle", size=Size(64, 64), frames=25, fps=24, steps=3, guidance=1.0)


@dataclass(frozen=True)
class Shown:
    """A condition whose medium is named: "photo", "clip 9" for one of nine frames, or a file of its own."""

    name: str
    fields: dict[str, Any]


def photo(**fields: Any) -> Shown:
    return Shown("photo", fields)


def clip(frames: int, **fields: Any) -> Shown:
    return Shown(f"clip {frames}", fields)


class Media:
    """Writes what is named, once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        kind, _, frames = name.partition(" ")
        path = self.folder / {"photo": "photo.png", "clip": f"clip{frames}.mp4"}.get(kind, name)
        if not path.exists():
            if kind == "photo":
                Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(path)
            elif kind == "clip":
                self._film(path, int(frames))
        return path

    def _film(self, path: Path, frames: int) -> None:
        """A clip that gets brighter from frame to frame, at 20 a second."""
        with VideoWriter(path, Size(48, 48), 20) as writer:
            writer.write(np.stack([np.full((48, 48, 3), 5 * frame + 40, np.uint8) for frame in range(frames)]))

    def conditions(self, *shown: Shown) -> tuple[Condition, ...]:
        return tuple(Condition(media=str(self.path(one.name)), **one.fields) for one in shown)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    return Media(tmp_path_factory.mktemp("media"))


def placed(media: Media, *shown: Shown, **fields: Any) -> list[ResolvedCondition]:
    return resolve_conditions(replace(REQUEST, conditions=media.conditions(*shown), **fields))


def brightness(item: ResolvedCondition) -> list[int]:
    """Which frames of its clip were taken, told by how bright they are."""
    return [round((float(np.mean(frame)) - 40) / 5) for frame in item.frames]


# --- what is refused -----------------------------------------------------------------------------------------------


def refused_by_all(engine: Engine, request: Request, output_folder: Path, says: Sequence[str], kind: type[KadrError]) -> None:
    """In making frames, latents and a file, of which nothing is left."""
    for make in (engine.generate, engine.denoise, lambda request: engine.write(request, output_folder / "a.mp4")):
        with pytest.raises(kind) as caught:
            make(request)
        assert all(what in str(caught.value) for what in says), str(caught.value)
    assert list(output_folder.iterdir()) == []


BETWEEN = "Give 0 to 24, or more frames"
PLACES: dict[str, tuple[Shown, list[str]]] = {
    "a picture past the end": (photo(frame=25), ["photo.png", "frame 25", "a video of 25 frames", BETWEEN]),
    "a picture before the beginning": (photo(frame=-26), ["frame -26", "a video of 25 frames", BETWEEN]),
    "a clip past the end": (clip(9, frame=32), ["clip9.mp4", "frame 32", "a video of 25 frames", BETWEEN]),
    "a clip that ends before the beginning": (clip(9, frame=-26), ["frame -26", "25 frames", BETWEEN]),
    "a clip off the groups of eight": (clip(9, frame=5), ["clip9.mp4", "frame 5", "multiple of 8", "0 or 8"]),
    "a clip off them, by its end": (clip(9, frame=-5), ["frame 12", "multiple of 8", "8 or 16"]),
    "no part": (clip(9, frame_range=(4, 4)), ["part 4:4", "clip9.mp4", "has 9 frames"]),
    "a part that ends at 0": (clip(9, frame_range=(None, 0)), ["part :0", "has 9 frames"]),
    "a part that ends before it begins": (clip(9, frame_range=(5, 3)), ["part 5:3", "has 9 frames"]),
    "a part past the end": (clip(9, frame_range=(9, None)), ["part 9:", "has 9 frames"]),
    "a part past the end, with an end": (clip(9, frame_range=(20, 30)), ["part 20:30", "has 9 frames"]),
    "a part that ends before it begins, from the end": (clip(9, frame_range=(-3, -5)), ["part -3:-5", "has 9 frames"]),
    "a box outside": (photo(box=(32, 0, 64, 64)), ["(32, 0, 64, 64)", "outside the video", "64x64"]),
    "a box below": (photo(box=(0, 1, 64, 64)), ["(0, 1, 64, 64)", "outside the video", "64x64"]),
    "a box of which nothing is left": (photo(box=(0, 0, 32, 64)), ["(0, 0, 32, 64)", "nothing is left", "96 pixels"]),
    "a box smaller than a latent": (photo(box=(50, 0, 5, 64)), ["(50, 0, 5, 64)", "nothing is left", "96 pixels"]),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_condition_that_has_no_place_is_refused_before_any_weight_is_loaded(
    case: str, engine_without_weights: Engine, media: Media, output_folder: Path
) -> None:
    shown, says = PLACES[case]
    refused_by_all(engine_without_weights, replace(REQUEST, conditions=media.conditions(shown)), output_folder, says, RequestError)


@pytest.mark.parametrize(
    "shown", [clip(9, frame=24), clip(9, frame_range=(0, 1), frame=-1)], ids=["by its front", "by its end"]
)
def test_a_clip_that_would_begin_where_frames_are_trimmed_is_refused(
    shown: Shown, engine_without_weights: Engine, media: Media, output_folder: Path
) -> None:
    """18 frames are made as 25, and the last seven are not shown."""
    request = replace(REQUEST, frames=18, conditions=media.conditions(shown))
    says = [f"frame {shown.fields['frame']}", "a video of 18 frames", "0 to 17"]
    refused_by_all(engine_without_weights, request, output_folder, says, RequestError)


OVERLAPPING: dict[str, tuple[list[Shown], list[str]]] = {
    "two pictures": ([photo(), photo()], ["photo.png (frame 0)"]),
    "two pictures, one from the end": ([photo(frame=24), photo(frame=-1)], ["photo.png (frame 24)"]),
    "a keyframe in a clip": ([clip(9), photo(frame=8)], ["clip9.mp4 (frames 0 to 8)", "photo.png (frame 8)"]),
    "a keyframe in a later clip": ([photo(frame=12), clip(9, frame=8)], ["(frames 8 to 16)", "(frame 12)"]),
    "two clips": ([clip(9), clip(17, frame=8)], ["(frames 0 to 8)", "(frames 8 to 24)"]),
    "two clips, one from the end": ([clip(17), clip(17, frame=-1)], ["(frames 0 to 16)", "(frames 8 to 24)"]),
    "the same clip twice": ([clip(9, frame=16), clip(9, frame=-1)], ["(frames 16 to 24)"]),
    "a box in a picture": ([photo(), photo(box=(0, 0, 64, 64))], ["photo.png (frame 0)"]),
    "two boxes": ([photo(box=(0, 0, 64, 64)), photo(box=(63, 0, 65, 128))], ["photo.png (frame 0)"]),
    "a clip in a box, and a keyframe": ([clip(9, box=(0, 0, 64, 64)), photo(frame=5)], ["(frame 5)"]),
}


@pytest.mark.parametrize("case", OVERLAPPING)
def test_two_conditions_over_each_other_are_refused_by_name_and_place(
    case: str, engine_without_weights: Engine, media: Media, output_folder: Path
) -> None:
    shown, says = OVERLAPPING[case]
    request = replace(REQUEST, size=Size(128, 128), conditions=media.conditions(*shown))
    advice = ["lie over each other", "Leave one out, or move it"]
    refused_by_all(engine_without_weights, request, output_folder, [*says, *advice], RequestError)


BESIDE: dict[str, list[Shown]] = {
    "frames beside each other": [photo(), photo(frame=1), photo(frame=24)],
    "a clip and the frame after it": [clip(9), photo(frame=9), photo(frame=15), clip(9, frame=16)],
    "boxes beside each other": [photo(box=(0, 0, 64, 128)), photo(box=(64, 0, 64, 128))],
    "boxes above each other, one of them a clip": [photo(box=(0, 0, 128, 64)), clip(9, box=(0, 64, 128, 64))],
    "boxes that touch at a corner": [photo(box=(0, 0, 64, 64)), photo(box=(64, 64, 64, 64))],
}


@pytest.mark.parametrize("case", BESIDE)
def test_conditions_beside_each_other_are_all_kept(case: str, media: Media) -> None:
    made = placed(media, *BESIDE[case], size=Size(128, 128))
    assert [item.condition.box for item in made] == [shown.fields.get("box") for shown in BESIDE[case]]
    assert len(made) == len(BESIDE[case])


def test_a_box_is_for_frame_0_alone() -> None:
    with pytest.raises(RequestError, match=r"box is given at frame 8; only at frame 0"):
        Condition(media="photo.png", frame=8, box=(0, 0, 64, 64))


def damaged(media: Media, how: str) -> Path:
    whole = media.path("clip 25").read_bytes()
    contents = {
        "cut.mp4": whole[: len(whole) * 2 // 3],
        "text.mp4": b"no clip",
        "empty.mp4": b"",
        "overwritten.mp4": whole[: len(whole) // 2] + b"\xff" * (len(whole) - len(whole) // 2),
        "picture.mp4": media.path("photo").read_bytes(),
    }
    path = media.folder / how
    if how in contents:
        path.write_bytes(contents[how])
    return path


@pytest.mark.parametrize("how", ["cut.mp4", "text.mp4", "empty.mp4", "overwritten.mp4", "picture.mp4", "gone.mp4"])
def test_a_damaged_clip_is_refused_by_name_before_any_weight_is_loaded(
    how: str, engine_without_weights: Engine, media: Media, output_folder: Path
) -> None:
    path = damaged(media, how)
    shown = replace(REQUEST, conditions=(Condition(media=str(path)),))
    begun = replace(REQUEST, input_video=str(path), denoise_strength=0.75)
    for request in (shown, begun, replace(begun, frames=None, fps=None)):
        refused_by_all(engine_without_weights, request, output_folder, [str(path)], MediaError)


def test_a_clip_whose_tags_are_not_unicode_is_read(media: Media) -> None:
    """FFmpeg hands on what is there; a tag of another program is no reason to refuse its pictures."""
    path = media.folder / "latin.mp4"
    with VideoWriter(path, Size(48, 48), 20, metadata={"author": "XXXXXX"}) as writer:
        writer.write(np.zeros((9, 48, 48, 3), np.uint8))
    path.write_bytes(path.read_bytes().replace(b"XXXXXX", b"M\xfcller"))
    assert read_video(path).frames.shape == (9, 48, 48, 3)


# --- a video to start from -----------------------------------------------------------------------------------------


VIDEO_REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "it is too short": ({"frames": 17}, ["clip9.mp4 has 9 frames", "17 are to be made", "Ask for 9 or fewer"]),
    "nothing below its strength": ({"frames": 9, "denoise_strength": 0.1}, ["video_strength is 0.1", "least is"]),
    "the levels given begin at 1": (
        {"frames": 9, "steps": None, "sigmas": (1.0,), "denoise_strength": 0.9999},
        ["video_strength is 0.9999", "least is 1"],
    ),
}


@pytest.mark.parametrize("case", VIDEO_REFUSED)
def test_a_video_that_cannot_be_started_from_is_refused_before_any_weight_is_loaded(
    case: str, engine_without_weights: Engine, media: Media, output_folder: Path
) -> None:
    fields, says = VIDEO_REFUSED[case]
    request = replace(REQUEST, input_video=str(media.path("clip 9")), **fields)
    refused_by_all(engine_without_weights, request, output_folder, says, RequestError)


@pytest.mark.parametrize("steps", [3, 7, 11, 40])
def test_the_least_strength_that_is_named_is_one_that_works(engine: Engine, media: Media, steps: int) -> None:
    request = replace(REQUEST, frames=9, steps=steps, input_video=str(media.path("clip 9")), denoise_strength=0.001)
    with pytest.raises(RequestError) as caught:
        engine.resolve_passes(request)
    named = re.search(r"the least is ([0-9.]+[0-9])", str(caught.value))
    assert named
    assert len(engine.resolve_passes(replace(request, denoise_strength=float(named[1])))[0].sigmas) == 1


@pytest.mark.parametrize("fields", [{"skip_initial": 2}, {"skip_initial": 1, "skip_final": 1}])
def test_levels_left_out_at_the_front_need_something_to_start_from(
    engine_without_weights: Engine, output_folder: Path, fields: dict[str, int]
) -> None:
    says = [f"skip_initial is {fields['skip_initial']}", "nothing to start from", "a video"]
    refused_by_all(engine_without_weights, replace(REQUEST, **fields), output_folder, says, RequestError)


def test_length_and_rate_are_those_of_the_video_unless_the_request_says_otherwise(engine: Engine, media: Media) -> None:
    begun = replace(REQUEST, frames=None, fps=None, input_video=str(media.path("clip 9")))
    made = engine.resolve(begun)
    assert (made.frames, made.fps, made.denoise_strength) == (9, 20.0, 0.75)
    said = engine.resolve(replace(begun, frames=4, fps=30, denoise_strength=0.5))
    assert (said.frames, said.fps, said.denoise_strength) == (4, 30, 0.5)


def test_a_level_named_by_its_place_leaves_the_strength_alone(engine: Engine, media: Media) -> None:
    begun = replace(REQUEST, input_video=str(media.path("clip 25")))
    assert engine.resolve(replace(begun, skip_initial=1)).denoise_strength is None
    assert engine.resolve(replace(begun, steps=None, sigmas=(0.9, 0.5))).denoise_strength is None
    assert engine.resolve(replace(begun, steps=None, sigmas=(1.0, 0.5))).denoise_strength == 0.75


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.75, 0.9])
def test_the_sampling_begins_at_the_nearest_level_that_is_not_above_the_strength(
    engine: Engine, media: Media, strength: float
) -> None:
    plain = replace(REQUEST, steps=30, input_video=None)
    every = engine.resolve_passes(plain)[0].sigmas
    begun = engine.resolve_passes(replace(plain, input_video=str(media.path("clip 25")), denoise_strength=strength))[
        0
    ].sigmas
    assert begun.tolist() == [level for level in every.tolist() if level <= strength]
    assert 0 < len(begun) < len(every)


def test_the_last_frame_of_a_video_to_start_from_fills_the_last_group_of_eight(media: Media) -> None:
    begun = replace(REQUEST, frames=12, input_video=str(media.path("clip 25")))
    frames = [round((float(np.mean(frame)) - 40) / 5) for frame in open_input_video(begun)]
    assert frames == [*range(12), *[11] * 5]


@pytest.mark.parametrize("strength", [0.3, 0.95])
def test_a_video_to_start_from_is_mixed_with_as_much_noise_as_the_first_level_says(
    strength: float, engine: Engine, media: Media, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(REQUEST, frames=9, steps=12, input_video=str(media.path("clip 9")), denoise_strength=strength)
    encoded = engine.encode_first_condition(replace(REQUEST, frames=9, conditions=media.conditions(clip(9))))
    noise = randn(*encoded.shape, seed=7)
    seen: list[Tensor] = []
    forward = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda *given: (seen.append(given[1]), forward(*given))[1])
    engine.denoise(request, noise=noise)
    (plan,) = engine.resolve_passes(request)
    level = float(plan.sigmas[0])
    torch.testing.assert_close(to_latents(seen[0], plan.grid), (1 - level) * encoded + level * noise)


# --- lengths and places of clips -----------------------------------------------------------------------------------


CUT: dict[str, tuple[Shown, int, tuple[int, list[int]], tuple[int, int]]] = {
    # condition, frames of the video, (where it begins, which of its frames), (frames it had, frames it could have)
    "one too few": (clip(8), 25, (0, [0]), (8, 25)),
    "one too many": (clip(10), 25, (0, [*range(9)]), (10, 25)),
    "seven too many": (clip(16), 25, (0, [*range(9)]), (16, 25)),
    "longer than the video": (clip(33), 25, (0, [*range(25)]), (33, 25)),
    "longer than what is left": (clip(17, frame=16), 25, (16, [*range(9)]), (17, 9)),
    "room for one frame": (clip(9, frame=24), 25, (24, [0]), (9, 1)),
    "one too many, by its end": (clip(10, frame=-1), 25, (16, [*range(1, 10)]), (10, 25)),
    "longer than the video, by its end": (clip(33, frame=-1), 25, (0, [*range(8, 33)]), (33, 25)),
    "longer than what is left before its end": (clip(25, frame=-9), 25, (0, [*range(8, 25)]), (25, 17)),
    "a part": (clip(33, frame_range=(3, 14)), 25, (0, [*range(3, 12)]), (11, 25)),
    "a part, by its end": (clip(33, frame_range=(3, 14), frame=-1), 25, (16, [*range(5, 14)]), (11, 25)),
}


@pytest.mark.parametrize("case", CUT)
def test_a_clip_is_cut_to_whole_groups_with_a_warning_that_names_the_counts(case: str, media: Media) -> None:
    shown, frames, (start, taken), (had, room) = CUT[case]
    with pytest.warns(KadrWarning) as told:
        (item,) = placed(media, shown, frames=frames)
    assert (item.start_frame, brightness(item)) == (start, taken)
    which = "last" if shown.fields.get("frame", 0) < 0 else "first"
    (message,) = [str(warning.message) for warning in told]
    assert f"has {had} frames for {room};" in message
    assert f"{which} {len(taken)} are" in message


WHOLE: dict[str, tuple[Shown, int, tuple[int, list[int]]]] = {
    "at the front": (clip(9), 25, (0, [*range(9)])),
    "in the middle": (clip(9, frame=8), 25, (8, [*range(9)])),
    "all of it": (clip(25), 25, (0, [*range(25)])),
    "in what is trimmed": (clip(9, frame=16), 18, (16, [*range(9)])),
    "by its end": (clip(9, frame=-1), 25, (16, [*range(9)])),
    "by its end, before the last group": (clip(9, frame=-9), 25, (8, [*range(9)])),
    "by its end, from the beginning": (clip(25, frame=-1), 25, (0, [*range(25)])),
    "by its end, at frame 0": (clip(9, frame_range=(0, 1), frame=-25), 25, (0, [0])),
    "one frame anywhere": (clip(9, frame_range=(4, 5), frame=13), 25, (13, [4])),
    "a part": (clip(33, frame_range=(4, 21)), 25, (0, [*range(4, 21)])),
    "an open part": (clip(33, frame_range=(24, None)), 25, (0, [*range(24, 33)])),
    "a part open at the front": (clip(33, frame_range=(None, 17)), 25, (0, [*range(17)])),
    "the last nine": (clip(33, frame_range=(-9, None)), 25, (0, [*range(24, 33)])),
    "all but the last 16": (clip(33, frame_range=(None, -16)), 25, (0, [*range(17)])),
    "from a negative to a positive": (clip(33, frame_range=(-30, 12)), 25, (0, [*range(3, 12)])),
    "more than there is": (clip(9, frame_range=(0, 100)), 25, (0, [*range(9)])),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_clip_of_whole_groups_stands_where_it_is_put_and_nothing_is_said(case: str, media: Media) -> None:
    shown, frames, expected = WHOLE[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (item,) = placed(media, shown, frames=frames)
    assert (item.start_frame, brightness(item)) == expected


def test_a_clip_that_ends_where_frames_are_trimmed_is_told_with_the_length_that_shows_it(media: Media) -> None:
    with pytest.warns(KadrWarning, match=r"ends at frame 24.*after 18 frames.*last 7 are not shown.*Ask for 25"):
        (item,) = placed(media, clip(9, frame=-1), frames=18)
    assert item.start_frame == 16


def test_a_picture_is_counted_from_the_end_of_what_is_shown(media: Media) -> None:
    for frames in (1, 17, 18, 25):
        items = placed(media, photo(frame=-1), frames=frames)
        assert items[0].start_frame == frames - 1
    assert placed(media, photo(frame=-18), frames=18)[0].start_frame == 0


@pytest.mark.parametrize(
    ("shown", "counted"), [(photo(frame=24), photo(frame=-1)), (clip(9, frame=16), clip(9, frame=-1))]
)
def test_a_place_counted_from_the_end_gives_the_same_video(
    shown: Shown, counted: Shown, engine: Engine, media: Media
) -> None:
    one, other = (
        engine.denoise(replace(REQUEST, steps=1, conditions=media.conditions(item))) for item in (shown, counted)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_warning_is_given_once(passes: int, home: Path, media: Media) -> None:
    opened = Engine.open(
        home / MODEL_FILE, device="cpu", upscaler=write_random_upscaler(media.folder / "up.safetensors")
    )
    two = {"multi_scale": True, "second_pass": Pass(sigmas=(0.5,))} if passes == 2 else {}
    with pytest.warns(KadrWarning) as told:
        opened.denoise(replace(REQUEST, frames=9, steps=1, conditions=media.conditions(clip(10)), **two))
    assert len(told) == 1


# --- positions of keyframes ----------------------------------------------------------------------------------------


def plan_of(request: Request) -> ResolvedPass:
    size, frames = request.size, request.frames
    assert isinstance(size, Size)
    assert frames is not None
    grid = LatentGrid.for_video(size, frames)
    return ResolvedPass(1, Pass(), grid.video_size, grid.video_frames, float(request.fps or 0), torch.ones(1), ())


def state_with(item: ResolvedCondition, *, causal: bool, request: Request = REQUEST) -> LatentState:
    """A video of noise with one condition, of random latents, in it."""
    plan = plan_of(request)
    grid = plan.grid
    state = LatentState.from_latents(
        randn(1, CHANNELS, grid.frames, grid.height, grid.width),
        token_positions(grid, fps=plan.fps, causal=causal),
        grid,
    )
    latents = randn(1, CHANNELS, (len(item.frames) - 1) // 8 + 1, grid.height, grid.width, seed=2)
    pixels = PreparedFrames(item.frames, plan.size, 0, plan.size)
    return apply_condition(
        state,
        PreparedCondition(item, pixels),
        latents,
        plan,
        causal=causal,
        draw_noise=lambda shape: randn(*shape, seed=3),
    )


@pytest.mark.parametrize("fps", [24.0, 12.5])
@pytest.mark.parametrize(
    ("shown", "causal", "frames"),
    [
        (photo(frame=13), True, [13]),
        (photo(frame=13), False, [13]),
        (photo(frame=-1), True, [24]),
        (clip(9, frame=8), True, [8, 9]),
        (clip(9, frame=8), False, [8, 16]),
        (clip(17, frame=-1), True, [8, 9]),
        (clip(9, frame_range=(3, 4), frame=5), True, [5]),
    ],
)
def test_tokens_of_their_own_stand_at_the_second_of_their_frame_and_over_the_whole_picture(
    shown: Shown, causal: bool, frames: list[int], fps: float, media: Media
) -> None:
    request = replace(REQUEST, size=Size(96, 64), fps=fps)
    (item,) = placed(media, shown, size=request.size, fps=fps)
    state = state_with(item, causal=causal, request=request)
    own = state.positions[:, state.grid.num_tokens :]
    assert state.conditioning_mask is not None
    assert own.shape == (3, len(frames) * 6)
    seconds = torch.tensor(frames, dtype=torch.float64).repeat_interleave(6) / fps
    torch.testing.assert_close(own[0].double(), seconds, rtol=1e-6, atol=0)
    assert own[1].tolist() == [0.0, 0.0, 0.0, 32.0, 32.0, 32.0] * len(frames)
    assert own[2].tolist() == [0.0, 32.0, 64.0] * 2 * len(frames)
    assert state.conditioning_mask[:, state.grid.num_tokens :].unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("shown", "held"), [(photo(), [0]), (clip(17), [0, 1, 2]), (clip(9, frame=8), []), (clip(25, frame=8), [3, 4])]
)
def test_a_clip_holds_the_latents_of_the_video_that_do_not_know_of_its_beginning(
    shown: Shown, held: list[int], media: Media
) -> None:
    request = replace(REQUEST, frames=33)
    (item,) = placed(media, shown, frames=33)
    state = state_with(item, causal=True, request=request)
    assert state.conditioning_mask is not None
    kept = state.conditioning_mask[0, : state.grid.num_tokens].view(state.grid.frames, -1)
    assert [frame for frame in range(state.grid.frames) if bool((kept[frame] == 1).all())] == held
    assert set(kept.unique().tolist()) <= {0.0, 1.0}


def test_the_transformer_is_told_these_positions(engine: Engine, media: Media, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Tensor] = []
    rope = Transformer.compute_rope
    monkeypatch.setattr(Transformer, "compute_rope", lambda self, where: (told.append(where), rope(self, where))[1])
    shown = media.conditions(photo(frame=-1), clip(9, frame=8), photo())
    engine.denoise(replace(REQUEST, steps=1, fps=12.5, conditions=shown))
    (where,) = told
    assert where.shape == (1, 3, 4 * 4 + 4 + 8)
    seconds = where[0, 0, 16:].view(3, 4)
    torch.testing.assert_close(seconds, torch.tensor([24.0, 8.0, 9.0])[:, None].expand(3, 4) / 12.5)


# --- boxes ---------------------------------------------------------------------------------------------------------


def in_box(box: tuple[int, int, int, int], size: Size, media: Media) -> tuple[LatentState, Tensor, PreparedCondition]:
    """A video of noise, with random latents in a box of it; those latents; and how the picture was fitted."""
    request = replace(REQUEST, size=size, frames=1, image_crf=0)
    plan = plan_of(request)
    (condition,) = media.conditions(photo(box=box))
    (item,) = place_in_pass(resolve_conditions(replace(request, conditions=(condition,))), request, plan)
    fit = prepare_condition(item, request, plan)
    latents = randn(1, CHANNELS, fit.grid.frames, fit.grid.height, fit.grid.width, seed=5)
    grid = plan.grid
    noise = randn(1, CHANNELS, 1, grid.height, grid.width, seed=6)
    state = LatentState.from_latents(noise, token_positions(grid, fps=plan.fps, causal=True), grid)
    return (
        apply_condition(state, fit, latents, plan, causal=True, draw_noise=lambda shape: torch.zeros(shape)),
        latents,
        fit,
    )


def held_in(state: LatentState) -> Tensor:
    """(h, w), true where a latent is held."""
    assert state.conditioning_mask is not None
    return state.conditioning_mask.view(state.grid.height, state.grid.width) == 1


def test_a_box_holds_what_the_official_pipeline_holds_wherever_it_lies_on_the_grid(media: Media) -> None:
    """_get_latent_spatial_position: a row is cut off on every side that is not at the edge of the video."""
    size, across, down = Size(160, 128), 5, 4
    edges = [(x, y) for x in combinations(range(across + 1), 2) for y in combinations(range(down + 1), 2)]
    empty = 0
    for (left, right), (top, bottom) in edges:
        pixels = torch.zeros(1, 3, 1, 32 * (bottom - top), 32 * (right - left))
        official = ConditioningItem(pixels, 0, 1.0, media_x=32 * left, media_y=32 * top)
        box = (32 * left, 32 * top, 32 * (right - left), 32 * (bottom - top))
        given = randn(1, CHANNELS, 1, bottom - top, right - left, seed=5)
        kept, column, row = LTXVideoPipeline._get_latent_spatial_position(
            SimpleNamespace(vae_scale_factor=32), given, official, size.height, size.width, strip_latent_border=True
        )
        if not kept.numel():
            empty += 1
            with pytest.raises(RequestError, match="nothing is left"):
                in_box(box, size, media)
            continue
        state, latents, fit = in_box(box, size, media)
        assert fit.pixels.sampled_size == Size(pixels.shape[-1], pixels.shape[-2])
        assert torch.equal(latents, given)
        rows, columns = slice(row, row + kept.shape[-2]), slice(column, column + kept.shape[-1])
        expected = torch.zeros(down, across, dtype=torch.bool)
        expected[rows, columns] = True
        assert torch.equal(held_in(state), expected), box
        assert torch.equal(state.latents()[..., rows, columns], kept)
        engine_without_weights = state.latents()[0, :, 0, ~expected]
        assert torch.equal(engine_without_weights, randn(1, CHANNELS, 1, down, across, seed=6)[0, :, 0, ~expected])
    assert len(edges) - empty == 8 * 5  # of 15 widths and 10 heights, those that are more than what is cut off


def test_a_box_moves_with_its_place_and_keeps_its_size(media: Media) -> None:
    """Off the grid too, where halves go up: three latents, of which one is cut off on each side within the video."""
    for x in range(0, 97, 8):
        state, _, fit = in_box((x, 0, 96, 64), Size(192, 64), media)
        assert fit.pixels.sampled_size == Size(96, 64), x
        column = (x + 16) // 32
        first, end = column + (column > 0), column + 3 - (column + 3 < 6)
        assert held_in(state).tolist() == [[first <= at < end for at in range(6)]] * 2, x


@pytest.mark.parametrize("side", [1, 31, 33, 49, 64, 65, 97, 127, 129])
def test_a_box_of_the_whole_video_holds_all_of_it(side: int, media: Media) -> None:
    size = Size(side, 130 - side)
    state, _, fit = in_box((0, 0, size.width, size.height), size, media)
    assert fit.pixels.sampled_size == size.snap()
    assert held_in(state).all()


def test_a_picture_in_a_box_is_there_and_nowhere_else(engine: Engine, media: Media) -> None:
    shown = media.conditions(photo(box=(0, 0, 96, 96)))
    request = replace(REQUEST, size=Size(128, 96), frames=9, steps=1, image_noise=0.0, conditions=shown)
    encoded, made = engine.encode_first_condition(request), engine.denoise(request)
    assert encoded.shape[-2:] == (3, 3)
    assert torch.equal(made[:, :, :1, :, :2], encoded[..., :2])
    assert not torch.isclose(made[:, :, :1, :, 2], encoded[..., 2]).any(dim=1).all()
    whole = engine.encode_first_condition(replace(request, conditions=media.conditions(photo())))
    assert not torch.allclose(encoded, whole[..., :3])  # the picture is in the box, not behind it


def test_two_pictures_side_by_side_are_both_held(engine: Engine, media: Media) -> None:
    request = replace(REQUEST, size=Size(128, 64), frames=1, steps=1, image_noise=0.0)
    left, right = media.conditions(photo(box=(0, 0, 64, 64)), clip(9, frame_range=(8, 9), box=(64, 0, 64, 64)))
    made = engine.denoise(replace(request, conditions=(left, right)))
    for condition, columns, kept in ((left, slice(0, 1), slice(0, 1)), (right, slice(3, 4), slice(1, 2))):
        encoded = engine.encode_first_condition(replace(request, conditions=(condition,)))
        assert torch.equal(made[..., columns], encoded[..., kept])
