"""Clips are encoded chunk by chunk: no frame is kept, and the latents equal those of the whole clip."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kadr import Condition, Engine, Request, Size
from kadr.errors import KadrWarning, MediaError
from kadr.media import clip
from kadr.media.prepare import prepare_image
from kadr.media.writer import VideoWriter
from kadr.models.vae.encoder import Encoder
from kadr.pipeline.stages import prepared_frames
from kadr.pipeline.stages.prepared_frames import OpenedMedia, PreparedFrames
from kadr.request.pass_media import pass_input_video

# Without H.264, which takes longer than all the rest.
REQUEST = Request(prompt="a red circle", size=Size(64, 32), frames=33, fps=24, sigmas=(0.5,), guidance=1.0, image_crf=0)
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def moving_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a clip of 33 frames of moving noise."""
    path = tmp_path_factory.mktemp("clip") / "moving.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (48, 200, 3), dtype=np.uint8)
    with VideoWriter(path, Size(80, 48), 24) as writer:
        writer.write(np.stack([noise[:, 2 * start : 2 * start + 80] for start in range(33)]))
    return path


class LiveCounter:
    """Counter of objects that are alive at once."""

    def __init__(self) -> None:
        self.count = self.max_count = 0

    def track(self, instance: Any) -> Any:
        self.count += 1
        self.max_count = max(self.max_count, self.count)
        weakref.finalize(instance, self._forget)
        return instance

    def _forget(self) -> None:
        self.count -= 1


@pytest.fixture
def live_counters(monkeypatch: pytest.MonkeyPatch) -> dict[str, LiveCounter]:
    """Counts decoded frames, prepared frames and chunks in the encoder."""
    counters = {kind: LiveCounter() for kind in ("decoded", "prepared", "chunks")}
    to_rgb, prepare, forward = clip._to_rgb, prepare_image, Encoder.forward
    monkeypatch.setattr(clip, "_to_rgb", lambda frame: counters["decoded"].track(to_rgb(frame)))
    monkeypatch.setattr(
        prepared_frames,
        "prepare_image",
        lambda *args, **kwargs: counters["prepared"].track(prepare(*args, **kwargs)),
    )
    monkeypatch.setattr(Encoder, "forward", lambda self, x, stream: forward(self, counters["chunks"].track(x), stream))
    return counters


@pytest.mark.parametrize("frame_range", [(0, 9), (0, 33)], ids=str)
@pytest.mark.parametrize("is_input_video", [False, True])
def test_one_chunk_of_a_clip_is_alive_at_a_time_at_any_length(
    frame_range: tuple[int, int],
    is_input_video: bool,
    engine: Engine,
    moving_clip: Path,
    live_counters: dict[str, LiveCounter],
) -> None:
    if is_input_video:
        request = replace(REQUEST, input_video=str(moving_clip), frames=frame_range[1], denoise_strength=0.9)
    else:
        request = replace(REQUEST, conditions=(Condition(str(moving_clip), frame_range=frame_range),))
    with engine.start(request, stages=("encode",)) as generation:
        generation.encode_media()
    assert live_counters["chunks"].max_count == 1
    assert live_counters["prepared"].max_count <= 2  # one is copied into its chunk while the next is prepared
    assert live_counters["decoded"].max_count <= 3  # the first frame of the file is kept, for size and format
    del generation
    assert {kind: counter.count for kind, counter in live_counters.items()} == dict.fromkeys(live_counters, 0)


def all_pixels(pixels: PreparedFrames) -> Tensor:
    return torch.cat(list(pixels.chunks(8, **CPU)), dim=2)


@pytest.mark.parametrize(
    "condition",
    [
        {},
        {"frame_range": (3, 28)},
        {"frame_range": (-25, None), "frame": -1},
        {"frame_range": (0, 17), "frame": 8},
        {"box": (0, 0, 64, 32)},
    ],
    ids=str,
)
def test_streamed_latents_of_a_clip_equal_those_of_all_pixels_at_once(
    condition: dict[str, Any], engine: Engine, moving_clip: Path
) -> None:
    request = replace(REQUEST, conditions=(Condition(str(moving_clip), **condition),))
    with engine.start(request, stages=("encode",)) as generation:
        ((item, latents),) = generation.encode_media()[0].conditions
        prepared = generation.media.prepared_frames[item.frames]
        pixels = all_pixels(prepared)
        expected = [
            prepare_image(frame, prepared.size, prepared.crf, prepared.sampled_size)
            for frame in clip.read_video(moving_clip).frames[list(item.resolved_condition.media.frame_indices)]
        ]
        assert torch.equal(pixels, torch.cat(expected, dim=2))
        with generation.modules.vae_encoder() as vae, torch.no_grad():
            assert torch.equal(latents, vae.encode(pixels, chunk_frames=8))
            torch.testing.assert_close(latents, vae.encode(pixels), rtol=1e-4, atol=1e-5)


def test_first_pass_reads_the_input_frames_that_it_samples(engine: Engine, moving_clip: Path) -> None:
    resolved = engine.resolve(replace(REQUEST, frames=20, input_video=str(moving_clip), denoise_strength=0.9))
    frames, media = clip.read_video(moving_clip).frames, resolved.input_video
    assert media is not None
    read = np.stack(list(OpenedMedia([media]).frames(media)))
    assert np.array_equal(read, frames[:25])
    half_rate_pass = replace(resolved.passes[0], fps=12.0, frames=17)  # as with a temporal upscaler
    pixels = pass_input_video(media, resolved.size, resolved.fps, half_rate_pass)
    assert pixels is not None
    assert list(pixels.media.frame_indices) == [*range(0, 25, 2), *[24] * 4]
    assert pixels.grid.video_frames == 17


def test_image_is_read_once_before_any_load(engine: Engine, image_condition: Condition, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(Path(image_condition.media).read_bytes())
    expected = engine.encode_first_condition(replace(REQUEST, conditions=(image_condition,)))
    request = replace(REQUEST, conditions=(Condition(str(path)),))
    with engine.start(request, stages=("encode",)) as generation:
        path.unlink()
        assert torch.equal(generation.encode_media()[0].conditions[0][1], expected)


def test_clip_too_small_for_the_size_is_refused_before_any_load(engine_without_weights: Engine, tmp_path: Path) -> None:
    path = tmp_path / "thin.mp4"
    with VideoWriter(path, Size(256, 2), 24) as writer:
        writer.write(np.zeros((9, 2, 256, 3), np.uint8))
    request = replace(REQUEST, size=Size(32, 64), conditions=(Condition(str(path)),))
    with pytest.raises(MediaError, match="at least 2x2 are needed"):
        engine_without_weights.denoise(request)


def test_clip_changed_after_opening_is_an_error_that_names_it(moving_clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "moving.mp4"
    path.write_bytes(moving_clip.read_bytes())
    opened = clip.ClipReader.open(path)
    with VideoWriter(path, Size(80, 48), 24) as writer:
        writer.write(np.zeros((9, 48, 80, 3), np.uint8))
    with pytest.raises(MediaError, match=r"moving\.mp4 has fewer frames than when it was opened"):
        list(opened)
    path.unlink()
    with pytest.raises(MediaError, match=r"moving\.mp4: there is no such file"):
        list(opened)


def test_clip_reader_returns_any_selection_of_frames(moving_clip: Path) -> None:
    frames, opened = clip.read_video(moving_clip).frames, clip.ClipReader.open(moving_clip)
    assert len(opened) == len(frames) == 33
    for indices in (range(33), range(3, 12), range(0, 33, 2), [0, 0, 5, 5, 5, 32], [32], []):
        selection = opened.select(indices)
        for _ in range(2):
            selected = list(selection)
            assert len(selected) == len(selection) == len(list(indices))
            assert all(np.array_equal(frame, frames[index]) for frame, index in zip(selected, indices, strict=True))
    assert len(clip.ClipReader.open(moving_clip, 4)) == 4
    assert [*opened.select(range(10, 30)).select([0, 9]).frame_indices] == [10, 19]


def test_what_changes_an_image_is_one_notice_of_the_generation(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "logo.png"
    Image.new("RGBA", (64, 64), (0, 0, 0, 40)).save(path)
    conditions = Condition(str(path), box=(0, 0, 64, 64)), Condition(str(path), frame=16)
    request = replace(REQUEST, size=Size(128, 64), conditions=conditions)
    with ExitStack() as stack:
        with pytest.warns(KadrWarning, match=r"logo\.png has transparent pixels; the video shows them on white"):
            generation = stack.enter_context(engine.start(request, stages=("encode",)))
        assert len(generation.media.prepared_frames) == 2
        assert generation.notices == (f"{path} has transparent pixels; the video shows them on white.",)
