"""Clips go through the encoder piece by piece: nothing of them is held, and the latents are those of the whole."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kadr import Condition, Engine, Request, Size
from kadr.errors import MediaError
from kadr.media import clip
from kadr.media.image import prepare_image
from kadr.media.writer import VideoWriter
from kadr.models.vae.encoder import Encoder
from kadr.pipeline.generation import Generation
from kadr.pipeline.stages import prepared_conditions
from kadr.pipeline.stages.encode import Media
from kadr.pipeline.stages.prepared_conditions import PreparedFrames
from kadr.request.resolved_conditions import open_input_video

# Without H.264, which takes longer than all the rest.
REQUEST = Request(prompt="a red circle", size=Size(64, 32), frames=33, fps=24, sigmas=(0.5,), guidance=1.0, image_crf=0)
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33 frames of noise that moves."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (48, 200, 3), dtype=np.uint8)
    with VideoWriter(path, Size(80, 48), 24) as writer:
        writer.write(np.stack([noise[:, 2 * start : 2 * start + 80] for start in range(33)]))
    return path


class Living:
    """Counts how many of some objects there are at once."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def note(self, thing: Any) -> Any:
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(thing, self._gone)
        return thing

    def _gone(self) -> None:
        self.now -= 1


@pytest.fixture
def living(monkeypatch: pytest.MonkeyPatch) -> dict[str, Living]:
    """Of decoded frames, of prepared ones, and of the chunks that the encoder is given."""
    kinds = {kind: Living() for kind in ("decoded", "prepared", "chunks")}
    to_rgb, prepare, forward = clip._to_rgb, prepare_image, Encoder.forward
    monkeypatch.setattr(clip, "_to_rgb", lambda frame: kinds["decoded"].note(to_rgb(frame)))
    monkeypatch.setattr(
        prepared_conditions, "prepare_image", lambda *a, **more: kinds["prepared"].note(prepare(*a, **more))
    )
    monkeypatch.setattr(Encoder, "forward", lambda self, x, stream: forward(self, kinds["chunks"].note(x), stream))
    return kinds


@pytest.mark.parametrize("part", [(0, 9), (0, 33)], ids=str)
@pytest.mark.parametrize("start", [False, True])
def test_of_a_clip_one_chunk_is_alive_at_a_time_however_long_it_is(
    part: tuple[int, int], start: bool, engine: Engine, film: Path, living: dict[str, Living]
) -> None:
    if start:
        request = replace(REQUEST, input_video=str(film), frames=part[1], denoise_strength=0.9)
    else:
        request = replace(REQUEST, conditions=(Condition(str(film), frame_range=part),))
    generation = engine._create_generation(request, lambda progress: None)
    generation.encode_media()
    assert living["chunks"].most == 1
    assert living["prepared"].most <= 2  # one is copied into its chunk while the next is made
    assert living["decoded"].most <= 3  # and the first of the file is kept, to tell what the others are like
    del generation
    assert {kind: each.now for kind, each in living.items()} == dict.fromkeys(living, 0)


def whole(pixels: PreparedFrames) -> Tensor:
    return torch.cat(list(pixels.chunks(8, **CPU)), dim=2)


@pytest.mark.parametrize(
    "condition",
    [{}, {"frame_range": (3, 28)}, {"frame_range": (-25, None), "frame": -1}, {"frame_range": (0, 17), "frame": 8}, {"box": (0, 0, 64, 32)}],
    ids=str,
)
def test_the_latents_of_a_clip_are_those_of_all_its_pixels_at_once(
    condition: dict[str, Any], engine: Engine, film: Path
) -> None:
    request = replace(REQUEST, conditions=(Condition(str(film), **condition),))
    generation = engine._create_generation(request, lambda progress: None)
    ((item, latents),) = generation.encode_media()[0].conditions
    pixels = whole(item.pixels)
    expected = [
        prepare_image(frame, item.pixels.size, item.pixels.crf, item.pixels.sampled_size)
        for frame in decoded(film, item)
    ]
    assert torch.equal(pixels, torch.cat(expected, dim=2))
    with engine.components.vae_encoder() as vae, torch.no_grad():
        assert torch.equal(latents, vae.encode(pixels, chunk_frames=8))
        torch.testing.assert_close(latents, vae.encode(pixels), rtol=1e-4, atol=1e-5)


def decoded(path: Path, item: prepared_conditions.PreparedCondition) -> Iterator[np.ndarray]:
    """The frames of a condition, from the whole clip in memory."""
    picks = item.resolved_condition.frames
    assert isinstance(picks, clip.ClipReader)
    return iter(clip.read_video(path).frames[list(picks.frame_indices)])


def test_of_a_video_to_start_from_the_first_pass_takes_what_it_makes(engine: Engine, film: Path) -> None:
    request = engine.resolve(replace(REQUEST, frames=20, input_video=str(film), denoise_strength=0.9))
    frames = clip.read_video(film).frames
    assert np.array_equal(np.stack(list(open_input_video(request))), frames[[*range(20), *[19] * 5]])
    generation = Generation(engine.components, request, lambda progress: None)
    plan = replace(generation.passes[0], fps=12.0, frames=17)  # as with a temporal upscaler
    pixels = Media(request, [plan]).pass_inputs[0].input_video
    assert pixels is not None
    assert isinstance(pixels.frames, clip.ClipReader)
    assert list(pixels.frames.frame_indices) == [*range(0, 20, 2), *[19] * 7]
    assert pixels.grid.video_frames == 17


def test_a_picture_is_read_once_before_anything_is_loaded(engine: Engine, image_condition: Condition, tmp_path: Path) -> None:
    own = tmp_path / "photo.png"
    own.write_bytes(Path(image_condition.media).read_bytes())
    expected = engine.encode_first_condition(replace(REQUEST, conditions=(image_condition,)))
    generation = engine._create_generation(replace(REQUEST, conditions=(Condition(str(own)),)), lambda progress: None)
    own.unlink()
    assert torch.equal(generation.encode_media()[0].conditions[0][1], expected)


def test_frames_in_memory_are_used_where_they_are(engine: Engine, film: Path) -> None:
    frames = list(clip.read_video(film, 9).frames)
    size = Size(64, 32)
    one, other = (
        PreparedFrames.from_frames(frames, size, 29, size),
        PreparedFrames.from_frames(clip.ClipReader.open(film, 9), size, 29, size),
    )
    assert one.frames is frames
    assert torch.equal(whole(one), whole(other))


def test_a_clip_too_small_for_the_size_is_refused_before_any_weight_is_loaded(
    engine_without_weights: Engine, tmp_path: Path
) -> None:
    path = tmp_path / "thin.mp4"
    with VideoWriter(path, Size(256, 2), 24) as writer:
        writer.write(np.zeros((9, 2, 256, 3), np.uint8))
    request = replace(REQUEST, size=Size(32, 64), conditions=(Condition(str(path)),))
    with pytest.raises(MediaError, match="at least 2x2 are needed"):
        engine_without_weights.denoise(request)


def test_a_clip_that_is_changed_while_it_is_used_is_named(film: Path, tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(film.read_bytes())
    opened = clip.ClipReader.open(path)
    with VideoWriter(path, Size(80, 48), 24) as writer:
        writer.write(np.zeros((9, 48, 80, 3), np.uint8))
    with pytest.raises(MediaError, match=r"film\.mp4 has fewer frames than when it was opened"):
        list(opened)
    path.unlink()
    with pytest.raises(MediaError, match=r"film\.mp4: there is no such file"):
        list(opened)


def test_the_frames_of_a_film_are_those_of_the_clip_whichever_are_chosen(film: Path) -> None:
    frames, opened = clip.read_video(film).frames, clip.ClipReader.open(film)
    assert len(opened) == len(frames) == 33
    for places in (range(33), range(3, 12), range(0, 33, 2), [0, 0, 5, 5, 5, 32], [32], []):
        chosen = opened.select(places)
        for _ in range(2):
            made = list(chosen)
            assert len(made) == len(chosen) == len(list(places))
            assert all(np.array_equal(picture, frames[place]) for picture, place in zip(made, places, strict=True))
    assert len(clip.ClipReader.open(film, 4)) == 4
    assert [*opened.select(range(10, 30)).select([0, 9]).frame_indices] == [10, 19]
