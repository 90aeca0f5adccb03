"""Conditions in a video: their positions, and what is refused before any computation."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from types import ModuleType, SimpleNamespace
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
from kadr.pipeline.stages.conditions import apply_condition
from kadr.pipeline.stages.prepared_frames import OpenedMedia
from kadr.request.pass_media import PassCondition, PassFrames, pass_conditions
from kadr.request.passes import ResolvedPass, known
from kadr.request.resolved_conditions import ResolvedCondition, resolve_conditions
from kadr.request.resolved_media import resolve_input_video
from kadr.sampling.positions import token_positions
from kadr.sampling.settings import Pass
from kadr.sampling.state import LatentState, to_latents
from kadr.shapes import LatentGrid, snap_frames
from tests.oracles import randn
from tests.tiny_models import CHANNELS, MODEL_FILE, write_random_upscaler

REQUEST = Request(prompt="a red circle", size=Size(64, 64), frames=25, fps=24, steps=3, guidance=1.0)


@dataclass(frozen=True)
class ConditionSpec:
    """A condition whose media file is named: "photo", "clip 9" for a clip of nine frames, or a file name."""

    name: str
    fields: dict[str, Any]


def photo(**fields: Any) -> ConditionSpec:
    return ConditionSpec("photo", fields)


def clip(frames: int, **fields: Any) -> ConditionSpec:
    return ConditionSpec(f"clip {frames}", fields)


class Media:
    """Writes media files by name, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        kind, _, frames = name.partition(" ")
        path = self.folder / {"photo": "photo.png", "clip": f"clip{frames}.mp4"}.get(kind, name)
        if not path.exists():
            if kind == "photo":
                Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(path)
            elif kind == "clip":
                self._write_clip(path, int(frames))
        return path

    def _write_clip(self, path: Path, frames: int) -> None:
        """Writes a clip that gets brighter from frame to frame, at 20 fps."""
        with VideoWriter(path, Size(48, 48), 20) as writer:
            writer.write(np.stack([np.full((48, 48, 3), 5 * frame + 40, np.uint8) for frame in range(frames)]))

    def conditions(self, *specs: ConditionSpec) -> tuple[Condition, ...]:
        return tuple(Condition(media=str(self.path(spec.name)), **spec.fields) for spec in specs)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    return Media(tmp_path_factory.mktemp("media"))


def resolve_specs(media: Media, *specs: ConditionSpec, **fields: Any) -> list[ResolvedCondition]:
    request = replace(REQUEST, conditions=media.conditions(*specs), **fields)
    return list(resolve_conditions(request.conditions, known(request.frames)))


def source_indices(item: ResolvedCondition) -> list[int]:
    """Returns the indices of the frames taken from the clip, from their brightness."""
    return [round((float(np.mean(frame)) - 40) / 5) for frame in OpenedMedia([item.media]).frames(item.media)]


# --- refusals ------------------------------------------------------------------------------------------------------


def assert_all_refuse(
    engine: Engine, request: Request, output_folder: Path, expected_texts: Sequence[str], kind: type[KadrError]
) -> None:
    """Checks that generate, denoise and write all refuse the request, and that no file is left."""
    for method in (engine.generate, engine.denoise, lambda request: engine.write(request, output_folder / "a.mp4")):
        with pytest.raises(kind) as caught:
            method(request)
        assert all(text in str(caught.value) for text in expected_texts), str(caught.value)
    assert list(output_folder.iterdir()) == []


FRAME_ADVICE = "Give 0 to 24, or more frames"
OUTSIDE: dict[str, tuple[ConditionSpec, list[str]]] = {
    "an image past the end": (photo(frame=25), ["photo.png", "frame 25", "a video of 25 frames", FRAME_ADVICE]),
    "an image before the beginning": (photo(frame=-26), ["frame -26", "a video of 25 frames", FRAME_ADVICE]),
    "a clip past the end": (clip(9, frame=32), ["clip9.mp4", "frame 32", "a video of 25 frames", FRAME_ADVICE]),
    "a clip that ends before the beginning": (clip(9, frame=-26), ["frame -26", "25 frames", FRAME_ADVICE]),
    "a clip whose start is not a multiple of 8": (
        clip(9, frame=5),
        ["clip9.mp4", "frame 5", "multiple of 8", "0 or 8"],
    ),
    "a clip by its end, with such a start": (clip(9, frame=-5), ["frame 12", "multiple of 8", "8 or 16"]),
    "an empty range": (clip(9, frame_range=(4, 4)), ["range 4:4", "clip9.mp4", "has 9 frames"]),
    "a range that ends at 0": (clip(9, frame_range=(None, 0)), ["range :0", "has 9 frames"]),
    "a range that ends before it starts": (clip(9, frame_range=(5, 3)), ["range 5:3", "has 9 frames"]),
    "a range past the end": (clip(9, frame_range=(9, None)), ["range 9:", "has 9 frames"]),
    "a range past the end, with an end": (clip(9, frame_range=(20, 30)), ["range 20:30", "has 9 frames"]),
    "a range that ends before it starts, from the end": (
        clip(9, frame_range=(-3, -5)),
        ["range -3:-5", "has 9 frames"],
    ),
    "a box outside": (photo(box=(32, 0, 64, 64)), ["(32, 0, 64, 64)", "outside the video", "64x64"]),
    "a box below": (photo(box=(0, 1, 64, 64)), ["(0, 1, 64, 64)", "outside the video", "64x64"]),
    "a box that its margins use up": (photo(box=(0, 0, 32, 64)), ["(0, 0, 32, 64)", "nothing is left", "96 pixels"]),
    "a box smaller than a latent": (photo(box=(50, 0, 5, 64)), ["(50, 0, 5, 64)", "nothing is left", "96 pixels"]),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_condition_outside_the_video_is_refused_before_any_load(
    case: str, engine_without_weights: Engine, media: Media, output_folder: Path
) -> None:
    spec, expected_texts = OUTSIDE[case]
    assert_all_refuse(
        engine_without_weights,
        replace(REQUEST, conditions=media.conditions(spec)),
        output_folder,
        expected_texts,
        RequestError,
    )


@pytest.mark.parametrize(
    "spec", [clip(9, frame=24), clip(9, frame_range=(0, 1), frame=-1)], ids=["by its front", "by its end"]
)
def test_clip_that_starts_in_trimmed_frames_is_refused(
    spec: ConditionSpec, engine_without_weights: Engine, media: Media, output_folder: Path
) -> None:
    """18 frames are sampled as 25, and the last seven are trimmed."""
    request = replace(REQUEST, frames=18, conditions=media.conditions(spec))
    expected_texts = [f"frame {spec.fields['frame']}", "a video of 18 frames", "0 to 17"]
    assert_all_refuse(engine_without_weights, request, output_folder, expected_texts, RequestError)


OVERLAPPING: dict[str, tuple[list[ConditionSpec], list[str]]] = {
    "two images": ([photo(), photo()], ["photo.png (frame 0)"]),
    "two images, one from the end": ([photo(frame=24), photo(frame=-1)], ["photo.png (frame 24)"]),
    "a keyframe in a clip": ([clip(9), photo(frame=8)], ["clip9.mp4 (frames 0 to 8)", "photo.png (frame 8)"]),
    "a keyframe in a later clip": ([photo(frame=12), clip(9, frame=8)], ["(frames 8 to 16)", "(frame 12)"]),
    "two clips": ([clip(9), clip(17, frame=8)], ["(frames 0 to 8)", "(frames 8 to 24)"]),
    "two clips, one from the end": ([clip(17), clip(17, frame=-1)], ["(frames 0 to 16)", "(frames 8 to 24)"]),
    "the same clip twice": ([clip(9, frame=16), clip(9, frame=-1)], ["(frames 16 to 24)"]),
    "a box in an image": ([photo(), photo(box=(0, 0, 64, 64))], ["photo.png (frame 0)"]),
    "two boxes": ([photo(box=(0, 0, 64, 64)), photo(box=(63, 0, 65, 128))], ["photo.png (frame 0)"]),
    "a clip in a box, and a keyframe": ([clip(9, box=(0, 0, 64, 64)), photo(frame=5)], ["(frame 5)"]),
}


@pytest.mark.parametrize("case", OVERLAPPING)
def test_overlapping_conditions_are_refused_by_name_and_frames(
    case: str, engine_without_weights: Engine, media: Media, output_folder: Path
) -> None:
    specs, expected_texts = OVERLAPPING[case]
    request = replace(REQUEST, size=Size(128, 128), conditions=media.conditions(*specs))
    advice = ["two conditions overlap", "Leave one out, or move it"]
    assert_all_refuse(engine_without_weights, request, output_folder, [*expected_texts, *advice], RequestError)


ADJACENT: dict[str, list[ConditionSpec]] = {
    "adjacent frames": [photo(), photo(frame=1), photo(frame=24)],
    "a clip and the frame after it": [clip(9), photo(frame=9), photo(frame=15), clip(9, frame=16)],
    "adjacent boxes": [photo(box=(0, 0, 64, 128)), photo(box=(64, 0, 64, 128))],
    "boxes above each other, one of them a clip": [photo(box=(0, 0, 128, 64)), clip(9, box=(0, 64, 128, 64))],
    "boxes that touch at a corner": [photo(box=(0, 0, 64, 64)), photo(box=(64, 64, 64, 64))],
}


@pytest.mark.parametrize("case", ADJACENT)
def test_adjacent_conditions_are_all_accepted(case: str, media: Media) -> None:
    resolved = resolve_specs(media, *ADJACENT[case], size=Size(128, 128))
    assert [item.condition.box for item in resolved] == [spec.fields.get("box") for spec in ADJACENT[case]]
    assert len(resolved) == len(ADJACENT[case])


def test_box_is_allowed_at_frame_0_only() -> None:
    with pytest.raises(RequestError, match=r"box is given at frame 8; only a condition at frame 0"):
        Condition(media="photo.png", frame=8, box=(0, 0, 64, 64))


def write_damaged(media: Media, name: str) -> Path:
    whole = media.path("clip 25").read_bytes()
    contents = {
        "cut.mp4": whole[: len(whole) * 2 // 3],
        "text.mp4": b"no clip",
        "empty.mp4": b"",
        "overwritten.mp4": whole[: len(whole) // 2] + b"\xff" * (len(whole) - len(whole) // 2),
        "image.mp4": media.path("photo").read_bytes(),
    }
    path = media.folder / name
    if name in contents:
        path.write_bytes(contents[name])
    return path


@pytest.mark.parametrize("name", ["cut.mp4", "text.mp4", "empty.mp4", "overwritten.mp4", "image.mp4", "gone.mp4"])
def test_damaged_clip_is_refused_by_name_before_any_load(
    name: str, engine_without_weights: Engine, media: Media, output_folder: Path
) -> None:
    path = write_damaged(media, name)
    as_condition = replace(REQUEST, conditions=(Condition(media=str(path)),))
    as_input = replace(REQUEST, input_video=str(path), denoise_strength=0.75)
    for request in (as_condition, as_input, replace(as_input, frames=None, fps=None)):
        assert_all_refuse(engine_without_weights, request, output_folder, [str(path)], MediaError)


def test_clip_with_tags_that_are_not_unicode_is_read(media: Media) -> None:
    """FFmpeg passes tags on as they are; a tag of another program is no reason to refuse the clip."""
    path = media.folder / "latin.mp4"
    with VideoWriter(path, Size(48, 48), 20, metadata={"author": "XXXXXX"}) as writer:
        writer.write(np.zeros((9, 48, 48, 3), np.uint8))
    path.write_bytes(path.read_bytes().replace(b"XXXXXX", b"M\xfcller"))
    assert read_video(path).frames.shape == (9, 48, 48, 3)


# --- input video --------------------------------------------------------------------------------------------------


VIDEO_REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "too short": ({"frames": 17}, ["clip9.mp4 has 9 frames", "fewer than the 17 of the video", "Ask for 9 or fewer"]),
    "no sigma below its strength": ({"frames": 9, "denoise_strength": 0.1}, ["denoise_strength is 0.1", "lowest is"]),
    "all sigmas above its strength": (
        {"frames": 9, "steps": None, "sigmas": (1.0,), "denoise_strength": 0.9999},
        ["denoise_strength is 0.9999", "lowest is 1"],
    ),
}


@pytest.mark.parametrize("case", VIDEO_REFUSED)
def test_unusable_input_video_is_refused_before_any_load(
    case: str, engine_without_weights: Engine, media: Media, output_folder: Path
) -> None:
    fields, expected_texts = VIDEO_REFUSED[case]
    request = replace(REQUEST, input_video=str(media.path("clip 9")), **fields)
    assert_all_refuse(engine_without_weights, request, output_folder, expected_texts, RequestError)


@pytest.mark.parametrize("steps", [3, 7, 11, 40])
def test_minimum_denoise_strength_in_the_error_works(engine: Engine, media: Media, steps: int) -> None:
    request = replace(REQUEST, frames=9, steps=steps, input_video=str(media.path("clip 9")), denoise_strength=0.001)
    with pytest.raises(RequestError) as caught:
        engine.resolve(request)
    named = re.search(r"the lowest is ([0-9.]+[0-9])", str(caught.value))
    assert named
    assert len(engine.resolve(replace(request, denoise_strength=float(named[1]))).passes[0].sigmas) == 1


@pytest.mark.parametrize("fields", [{"skip_initial": 2}, {"skip_initial": 1, "skip_final": 1}])
def test_skipped_initial_sigmas_need_an_input_to_start_from(
    engine_without_weights: Engine, output_folder: Path, fields: dict[str, int]
) -> None:
    expected_texts = [f"skip_initial is {fields['skip_initial']}", "nothing to start from", "an input video"]
    assert_all_refuse(engine_without_weights, replace(REQUEST, **fields), output_folder, expected_texts, RequestError)


def test_length_and_rate_default_to_those_of_the_input_video(engine: Engine, media: Media) -> None:
    request = replace(REQUEST, frames=None, fps=None, input_video=str(media.path("clip 9")))
    resolved = engine.resolve(request)
    assert (resolved.frames, resolved.fps, resolved.request.denoise_strength) == (9, 20.0, 0.75)
    explicit = engine.resolve(replace(request, frames=4, fps=30, denoise_strength=0.8))
    assert (explicit.frames, explicit.fps, explicit.request.denoise_strength) == (4, 30, 0.8)


def test_explicit_first_sigma_leaves_denoise_strength_unset(engine: Engine, media: Media) -> None:
    request = replace(REQUEST, input_video=str(media.path("clip 25")))
    assert engine.resolve(replace(request, skip_initial=1)).request.denoise_strength is None
    assert engine.resolve(replace(request, steps=None, sigmas=(0.9, 0.5))).request.denoise_strength is None
    assert engine.resolve(replace(request, steps=None, sigmas=(1.0, 0.5))).request.denoise_strength == 0.75


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.75, 0.9])
def test_sampling_starts_at_the_nearest_sigma_not_above_the_strength(
    engine: Engine, media: Media, strength: float
) -> None:
    without_input = replace(REQUEST, steps=30, input_video=None)
    with_input = replace(without_input, input_video=str(media.path("clip 25")), denoise_strength=strength)
    all_sigmas = engine.resolve(without_input).passes[0].sigmas
    sigmas = engine.resolve(with_input).passes[0].sigmas
    assert list(sigmas) == [sigma for sigma in all_sigmas if sigma <= strength]
    assert 0 < len(sigmas) < len(all_sigmas)


@pytest.mark.parametrize(("length", "expected"), [(12, [*range(12), *[11] * 5]), (14, [*range(14), *[13] * 3])])
def test_last_frame_of_a_short_input_video_is_repeated(length: int, expected: list[int], media: Media) -> None:
    assert input_frames(media, f"clip {length}", 12) == expected


def test_input_video_gives_the_frames_that_are_sampled_and_not_shown(media: Media) -> None:
    assert input_frames(media, "clip 25", 12) == [*range(17)]


def input_frames(media: Media, name: str, frames: int) -> list[int]:
    """Returns the indices of the frames that an input video gives, from their brightness."""
    input_video = resolve_input_video(str(media.path(name)), frames, snap_frames(frames))
    return [round((float(np.mean(frame)) - 40) / 5) for frame in OpenedMedia([input_video]).frames(input_video)]


@pytest.mark.parametrize("strength", [0.3, 0.95])
def test_input_video_is_noised_by_the_first_sigma(
    strength: float, engine: Engine, media: Media, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(REQUEST, frames=9, steps=12, input_video=str(media.path("clip 9")), denoise_strength=strength)
    encoded = engine.encode_first_condition(replace(REQUEST, frames=9, conditions=media.conditions(clip(9))))
    noise = randn(*encoded.shape, seed=7)
    inputs: list[Tensor] = []
    forward = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda *args: (inputs.append(args[1]), forward(*args))[1])
    engine.denoise(request, noise=noise)
    (resolved_pass,) = engine.resolve(request).passes
    sigma = float(resolved_pass.sigmas[0])
    torch.testing.assert_close(to_latents(inputs[0], resolved_pass.grid), (1 - sigma) * encoded + sigma * noise)


# --- lengths and positions of clips--------------------------------------------------------------------------------


TRIMMED: dict[str, tuple[ConditionSpec, int, tuple[int, list[int]], tuple[int, int]]] = {
    # condition, frames of the video, (start frame, indices of its frames), (frames it has, frames that fit)
    "one too few": (clip(8), 25, (0, [0]), (8, 25)),
    "one too many": (clip(10), 25, (0, [*range(9)]), (10, 25)),
    "seven too many": (clip(16), 25, (0, [*range(9)]), (16, 25)),
    "longer than the video": (clip(33), 25, (0, [*range(25)]), (33, 25)),
    "longer than the rest": (clip(17, frame=16), 25, (16, [*range(9)]), (17, 9)),
    "room for one frame": (clip(9, frame=24), 25, (24, [0]), (9, 1)),
    "of a length that is not 8k+1": (clip(25), 20, (0, [*range(17)]), (25, 20)),
    "a group that is not shown whole": (clip(9, frame=16), 18, (16, [0]), (9, 2)),
    "one too many, by its end": (clip(10, frame=-1), 25, (16, [*range(1, 10)]), (10, 25)),
    "longer than the video, by its end": (clip(33, frame=-1), 25, (0, [*range(8, 33)]), (33, 25)),
    "longer than the frames before its end": (clip(25, frame=-9), 25, (0, [*range(8, 25)]), (25, 17)),
    "a range": (clip(33, frame_range=(3, 14)), 25, (0, [*range(3, 12)]), (11, 25)),
    "a range, by its end": (clip(33, frame_range=(3, 14), frame=-1), 25, (16, [*range(5, 14)]), (11, 25)),
}


@pytest.mark.parametrize("case", TRIMMED)
def test_clip_is_trimmed_to_8k_plus_1_with_a_warning_naming_counts(case: str, media: Media) -> None:
    spec, frames, (start, indices), (length, room) = TRIMMED[case]
    with pytest.warns(KadrWarning) as caught:
        (item,) = resolve_specs(media, spec, frames=frames)
    assert (item.start_frame, source_indices(item)) == (start, indices)
    which = "last" if spec.fields.get("frame", 0) < 0 else "first"
    (message,) = [str(warning.message) for warning in caught]
    assert f"has {length} frames and {room} fit;" in message
    assert f"{which} {len(indices)} are" in message


WHOLE: dict[str, tuple[ConditionSpec, int, tuple[int, list[int]]]] = {
    "at the front": (clip(9), 25, (0, [*range(9)])),
    "in the middle": (clip(9, frame=8), 25, (8, [*range(9)])),
    "all of it": (clip(25), 25, (0, [*range(25)])),
    "by its end": (clip(9, frame=-1), 25, (16, [*range(9)])),
    "by its end, before the last group": (clip(9, frame=-9), 25, (8, [*range(9)])),
    "by its end, from the beginning": (clip(25, frame=-1), 25, (0, [*range(25)])),
    "by its end, at frame 0": (clip(9, frame_range=(0, 1), frame=-25), 25, (0, [0])),
    "one frame anywhere": (clip(9, frame_range=(4, 5), frame=13), 25, (13, [4])),
    "a range": (clip(33, frame_range=(4, 21)), 25, (0, [*range(4, 21)])),
    "a range with an open end": (clip(33, frame_range=(24, None)), 25, (0, [*range(24, 33)])),
    "a range with an open start": (clip(33, frame_range=(None, 17)), 25, (0, [*range(17)])),
    "the last nine": (clip(33, frame_range=(-9, None)), 25, (0, [*range(24, 33)])),
    "all but the last 16": (clip(33, frame_range=(None, -16)), 25, (0, [*range(17)])),
    "from a negative to a positive": (clip(33, frame_range=(-30, 12)), 25, (0, [*range(3, 12)])),
    "a range longer than the clip": (clip(9, frame_range=(0, 100)), 25, (0, [*range(9)])),
}


@pytest.mark.parametrize("case", WHOLE)
def test_clip_of_8k_plus_1_frames_keeps_its_position_without_warning(case: str, media: Media) -> None:
    spec, frames, expected = WHOLE[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (item,) = resolve_specs(media, spec, frames=frames)
    assert (item.start_frame, source_indices(item)) == expected


class OfficialReader:
    """Reads a clip for the official script, in place of imageio's reader."""

    def __init__(self, path: str) -> None:
        self.frames = read_video(path).frames

    def count_frames(self) -> int:
        return len(self.frames)

    def get_data(self, index: int) -> np.ndarray:
        return self.frames[index]

    def close(self) -> None:
        pass


def as_official_pixels(image: Any, height: int, width: int, just_crop: bool) -> Tensor:
    """Converts a PIL image to (1, 3, 1, H, W) in [-1, 1]: the size does not decide which frames are read."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None, :, None] / 127.5 - 1


@pytest.fixture
def official_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports the official script, without imageio and torchvision, by which it reads and resizes frames."""
    name, transforms = "ltx_video.inference", "torchvision.transforms.functional"
    for absent in ("imageio", "torchvision", "torchvision.transforms", transforms, name):
        monkeypatch.setitem(sys.modules, absent, ModuleType(absent))
    monkeypatch.setattr(sys.modules["torchvision"], "transforms", sys.modules["torchvision.transforms"], raising=False)
    monkeypatch.setattr(sys.modules["torchvision.transforms"], "functional", sys.modules[transforms], raising=False)
    monkeypatch.setattr(sys.modules["imageio"], "get_reader", OfficialReader, raising=False)
    del sys.modules[name]
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "load_image_to_tensor_with_resize_and_crop", as_official_pixels)
    return script


def shown_indices(pixels: Tensor) -> list[int]:
    """Returns which frames of a clip of `Media` these pixels (1, 3, F, H, W) in [-1, 1] are."""
    return [round(((float(frame.mean()) + 1) * 127.5 - 40) / 5) for frame in pixels[0].unbind(1)]


@pytest.mark.filterwarnings("ignore::kadr.KadrWarning")
@pytest.mark.parametrize(("length", "start"), [(25, 0), (17, 0), (9, 8), (10, 8), (9, 16)])
@pytest.mark.parametrize("frames", [17, 18, 20, 24, 25])
def test_long_clip_is_cut_where_the_official_script_cuts_it(
    frames: int, length: int, start: int, media: Media, official_script: ModuleType
) -> None:
    path = str(media.path(f"clip {length}"))
    trim = partial(LTXVideoPipeline.trim_conditioning_sequence, SimpleNamespace(video_scale_factor=8))
    pipeline = SimpleNamespace(trim_conditioning_sequence=trim)
    (official,) = official_script.prepare_conditioning([path], [1.0], [start], 48, 48, frames, (0,) * 4, pipeline)
    (item,) = resolve_specs(media, clip(length, frame=start), frames=frames)
    assert source_indices(item) == shown_indices(official.media_item)
    assert item.start_frame == official.media_frame_number


@pytest.mark.parametrize("frames", [9, 12, 17, 20])
def test_input_video_gives_the_frames_that_the_official_script_reads(
    frames: int, media: Media, official_script: ModuleType
) -> None:
    path, padded = str(media.path("clip 25")), ((frames - 2) // 8 + 1) * 8 + 1  # as in its infer()
    official = official_script.load_media_file(path, 48, 48, padded, (0,) * 4)
    assert input_frames(media, "clip 25", frames) == shown_indices(official)


def test_clip_ending_in_trimmed_frames_warns_with_the_length_to_ask_for(media: Media) -> None:
    with pytest.warns(KadrWarning, match=r"ends at frame 24.*has 18 frames.*last 7 are not shown.*Ask for 25"):
        (item,) = resolve_specs(media, clip(9, frame=-1), frames=18)
    assert item.start_frame == 16


def test_negative_image_frame_counts_from_the_requested_end(media: Media) -> None:
    for frames in (1, 17, 18, 25):
        items = resolve_specs(media, photo(frame=-1), frames=frames)
        assert items[0].start_frame == frames - 1
    assert resolve_specs(media, photo(frame=-18), frames=18)[0].start_frame == 0


@pytest.mark.parametrize(
    ("spec", "spec_from_end"), [(photo(frame=24), photo(frame=-1)), (clip(9, frame=16), clip(9, frame=-1))]
)
def test_negative_and_positive_frame_give_the_same_latents(
    spec: ConditionSpec, spec_from_end: ConditionSpec, engine: Engine, media: Media
) -> None:
    first, second = (
        engine.denoise(replace(REQUEST, steps=1, conditions=media.conditions(item))) for item in (spec, spec_from_end)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("passes", [1, 2])
def test_trim_warning_is_given_once(passes: int, home: Path, media: Media) -> None:
    opened = Engine.open(
        home / MODEL_FILE, device="cpu", upscaler=write_random_upscaler(media.folder / "up.safetensors")
    )
    second_pass = {"multi_scale": True, "second_pass": Pass(sigmas=(0.5,))} if passes == 2 else {}
    with pytest.warns(KadrWarning) as caught:
        opened.denoise(replace(REQUEST, frames=9, steps=1, conditions=media.conditions(clip(10)), **second_pass))
    assert len(caught) == 1


# --- positions of keyframes ----------------------------------------------------------------------------------------


def single_pass(request: Request) -> ResolvedPass:
    size, frames = request.size, request.frames
    assert isinstance(size, Size)
    assert frames is not None
    grid = LatentGrid.for_video(size, frames)
    return ResolvedPass(1, Pass(), grid.video_size, grid.video_frames, float(request.fps or 0), (1.0,), ())


def state_with(item: ResolvedCondition, *, causal: bool, request: Request = REQUEST) -> LatentState:
    """Returns the state of a noise video with one condition of random latents."""
    resolved_pass = single_pass(request)
    grid = resolved_pass.grid
    state = LatentState.from_latents(
        randn(1, CHANNELS, grid.frames, grid.height, grid.width),
        token_positions(grid, fps=resolved_pass.fps, causal=causal),
        grid,
    )
    latents = randn(1, CHANNELS, (len(item.media) - 1) // 8 + 1, grid.height, grid.width, seed=2)
    frames = PassFrames(item.media, resolved_pass.size, resolved_pass.size)
    return apply_condition(
        state,
        PassCondition(item, frames),
        latents,
        resolved_pass,
        causal=causal,
        draw_noise=lambda shape: randn(*shape, seed=3),
    )


@pytest.mark.parametrize("fps", [24.0, 12.5])
@pytest.mark.parametrize(
    ("spec", "causal", "frames"),
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
def test_appended_tokens_have_their_frame_time_and_cover_the_image(
    spec: ConditionSpec, causal: bool, frames: list[int], fps: float, media: Media
) -> None:
    request = replace(REQUEST, size=Size(96, 64), fps=fps)
    (item,) = resolve_specs(media, spec, size=request.size, fps=fps)
    state = state_with(item, causal=causal, request=request)
    appended = state.positions[:, state.grid.num_tokens :]
    assert state.conditioning_mask is not None
    assert appended.shape == (3, len(frames) * 6)
    seconds = torch.tensor(frames, dtype=torch.float64).repeat_interleave(6) / fps
    torch.testing.assert_close(appended[0].double(), seconds, rtol=1e-6, atol=0)
    assert appended[1].tolist() == [0.0, 0.0, 0.0, 32.0, 32.0, 32.0] * len(frames)
    assert appended[2].tolist() == [0.0, 32.0, 64.0] * 2 * len(frames)
    assert state.conditioning_mask[:, state.grid.num_tokens :].unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("spec", "conditioned"),
    [(photo(), [0]), (clip(17), [0, 1, 2]), (clip(9, frame=8), []), (clip(25, frame=8), [3, 4])],
)
def test_clip_conditions_the_latents_beyond_its_prefix(
    spec: ConditionSpec, conditioned: list[int], media: Media
) -> None:
    request = replace(REQUEST, frames=33)
    (item,) = resolve_specs(media, spec, frames=33)
    state = state_with(item, causal=True, request=request)
    assert state.conditioning_mask is not None
    mask = state.conditioning_mask[0, : state.grid.num_tokens].view(state.grid.frames, -1)
    assert [frame for frame in range(state.grid.frames) if bool((mask[frame] == 1).all())] == conditioned
    assert set(mask.unique().tolist()) <= {0.0, 1.0}


def test_transformer_receives_these_positions(engine: Engine, media: Media, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Tensor] = []
    rope = Transformer.compute_rope
    monkeypatch.setattr(
        Transformer, "compute_rope", lambda self, positions: (received.append(positions), rope(self, positions))[1]
    )
    conditions = media.conditions(photo(frame=-1), clip(9, frame=8), photo())
    engine.denoise(replace(REQUEST, steps=1, fps=12.5, conditions=conditions))
    (positions,) = received
    assert positions.shape == (1, 3, 4 * 4 + 4 + 8)
    seconds = positions[0, 0, 16:].view(3, 4)
    torch.testing.assert_close(seconds, torch.tensor([24.0, 8.0, 9.0])[:, None].expand(3, 4) / 12.5)


# --- boxes ---------------------------------------------------------------------------------------------------------


def apply_in_box(box: tuple[int, int, int, int], size: Size, media: Media) -> tuple[LatentState, Tensor, PassCondition]:
    """Returns the state of a noise video with random latents in a box, those latents, and the prepared condition."""
    request = replace(REQUEST, size=size, frames=1, image_crf=0)
    resolved_pass = single_pass(request)
    (condition,) = media.conditions(photo(box=box))
    (prepared,) = pass_conditions(resolve_conditions((condition,), 1), size, 24.0, resolved_pass)
    latents = randn(1, CHANNELS, prepared.grid.frames, prepared.grid.height, prepared.grid.width, seed=5)
    grid = resolved_pass.grid
    noise = randn(1, CHANNELS, 1, grid.height, grid.width, seed=6)
    state = LatentState.from_latents(noise, token_positions(grid, fps=resolved_pass.fps, causal=True), grid)
    state = apply_condition(
        state, prepared, latents, resolved_pass, causal=True, draw_noise=lambda shape: torch.zeros(shape)
    )
    return state, latents, prepared


def conditioned_latents(state: LatentState) -> Tensor:
    """Returns a mask (h, w), true where a latent is conditioned."""
    assert state.conditioning_mask is not None
    return state.conditioning_mask.view(state.grid.height, state.grid.width) == 1


def test_box_conditions_the_official_latents_anywhere_on_the_grid(media: Media) -> None:
    """See _get_latent_spatial_position: a row is cropped on every side that is not at the edge of the video."""
    size, across, down = Size(160, 128), 5, 4
    edges = [(x, y) for x in combinations(range(across + 1), 2) for y in combinations(range(down + 1), 2)]
    empty = 0
    for (left, right), (top, bottom) in edges:
        pixels = torch.zeros(1, 3, 1, 32 * (bottom - top), 32 * (right - left))
        official = ConditioningItem(pixels, 0, 1.0, media_x=32 * left, media_y=32 * top)
        box = (32 * left, 32 * top, 32 * (right - left), 32 * (bottom - top))
        box_latents = randn(1, CHANNELS, 1, bottom - top, right - left, seed=5)
        cropped, column, row = LTXVideoPipeline._get_latent_spatial_position(
            SimpleNamespace(vae_scale_factor=32),
            box_latents,
            official,
            size.height,
            size.width,
            strip_latent_border=True,
        )
        if not cropped.numel():
            empty += 1
            with pytest.raises(RequestError, match="nothing is left"):
                apply_in_box(box, size, media)
            continue
        state, latents, prepared = apply_in_box(box, size, media)
        assert prepared.frames.sampled_size == Size(pixels.shape[-1], pixels.shape[-2])
        assert torch.equal(latents, box_latents)
        rows, columns = slice(row, row + cropped.shape[-2]), slice(column, column + cropped.shape[-1])
        expected = torch.zeros(down, across, dtype=torch.bool)
        expected[rows, columns] = True
        assert torch.equal(conditioned_latents(state), expected), box
        assert torch.equal(state.latents()[..., rows, columns], cropped)
        outside = state.latents()[0, :, 0, ~expected]
        assert torch.equal(outside, randn(1, CHANNELS, 1, down, across, seed=6)[0, :, 0, ~expected])
    assert len(edges) - empty == 8 * 5  # of 15 widths and 10 heights, those larger than the crop


def test_box_keeps_its_size_at_every_position(media: Media) -> None:
    """Off the grid too, where halves round up: three latents, with one cropped on each side inside the video."""
    for x in range(0, 97, 8):
        state, _, prepared = apply_in_box((x, 0, 96, 64), Size(192, 64), media)
        assert prepared.frames.sampled_size == Size(96, 64), x
        column = (x + 16) // 32
        first, end = column + (column > 0), column + 3 - (column + 3 < 6)
        assert conditioned_latents(state).tolist() == [[first <= index < end for index in range(6)]] * 2, x


@pytest.mark.parametrize("side", [1, 31, 33, 49, 64, 65, 97, 127, 129])
def test_box_of_the_whole_video_conditions_all_of_it(side: int, media: Media) -> None:
    size = Size(side, 130 - side)
    state, _, prepared = apply_in_box((0, 0, size.width, size.height), size, media)
    assert prepared.frames.sampled_size == size.snap()
    assert conditioned_latents(state).all()


def test_image_in_a_box_conditions_only_the_box(engine: Engine, media: Media) -> None:
    conditions = media.conditions(photo(box=(0, 0, 96, 96)))
    request = replace(REQUEST, size=Size(128, 96), frames=9, steps=1, image_noise=0.0, conditions=conditions)
    encoded, latents = engine.encode_first_condition(request), engine.denoise(request)
    assert encoded.shape[-2:] == (3, 3)
    assert torch.equal(latents[:, :, :1, :, :2], encoded[..., :2])
    assert not torch.isclose(latents[:, :, :1, :, 2], encoded[..., 2]).any(dim=1).all()
    whole = engine.encode_first_condition(replace(request, conditions=media.conditions(photo())))
    assert not torch.allclose(encoded, whole[..., :3])  # the image is fitted to the box, not cropped by it


def test_two_images_side_by_side_are_both_conditioned(engine: Engine, media: Media) -> None:
    request = replace(REQUEST, size=Size(128, 64), frames=1, steps=1, image_noise=0.0)
    left, right = media.conditions(photo(box=(0, 0, 64, 64)), clip(9, frame_range=(8, 9), box=(64, 0, 64, 64)))
    latents = engine.denoise(replace(request, conditions=(left, right)))
    for condition, columns, encoded_columns in ((left, slice(0, 1), slice(0, 1)), (right, slice(3, 4), slice(1, 2))):
        encoded = engine.encode_first_condition(replace(request, conditions=(condition,)))
        assert torch.equal(latents[..., columns], encoded[..., encoded_columns])
