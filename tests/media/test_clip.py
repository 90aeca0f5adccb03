"""A clip reader gives the frames of its file, wherever it begins to decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation

from kadr.errors import MediaError
from kadr.media import clip
from kadr.media.writer import VideoWriter
from kadr.shapes import Size
from tests.oracles import relative_error

FRAMES, KEYFRAME_INTERVAL = 100, 20  # of a file; between its keyframes
FILES = {
    "closed.mp4": ("libx264", {"g": str(KEYFRAME_INTERVAL), "bf": "3"}),
    "open.mp4": ("libx264", {"x264-params": f"keyint={KEYFRAME_INTERVAL}:open-gop=1:bframes=3"}),
    "refreshed.mkv": (
        "libx264",
        {"x264-params": f"intra-refresh=1:keyint={KEYFRAME_INTERVAL}"},
    ),  # it has no seek point
    "vp9.webm": ("libvpx-vp9", {"g": str(KEYFRAME_INTERVAL)}),
    "mpeg4.avi": ("mpeg4", {"g": str(KEYFRAME_INTERVAL)}),
    "b-frames.avi": ("libx264", {"g": str(KEYFRAME_INTERVAL), "bf": "3"}),
    "vp9.mkv": ("libvpx-vp9", {"g": str(KEYFRAME_INTERVAL)}),
    "intra.mkv": ("mjpeg", {}),
}


def write_clip(path: Path, rate: int = 24) -> Path:
    codec, options = FILES[path.name]
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(noise, index, axis=1), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", FILES)
def test_frames_from_the_middle_equal_those_of_a_full_decode(name: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / name)
    whole, reader = clip.read_video(path).frames, clip.ClipReader.open(path)
    assert len(reader) == FRAMES
    for first in (
        0,
        1,
        KEYFRAME_INTERVAL - 1,
        KEYFRAME_INTERVAL,
        KEYFRAME_INTERVAL + 1,
        3 * KEYFRAME_INTERVAL - 2,
        FRAMES - 9,
    ):
        frames = np.stack(list(reader.select(range(first, first + 9))))
        assert np.array_equal(frames, whole[first : first + 9]), first


def test_only_the_wanted_part_of_a_long_file_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, decoded, decode_frames = clip.ClipReader.open(write_clip(tmp_path / "closed.mp4")), [], clip._decode_frames

    def record_frames(container: object) -> object:
        for frame in decode_frames(container):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(clip, "_decode_frames", record_frames)
    list(reader.select(range(70, 79)))
    assert len(decoded) <= KEYFRAME_INTERVAL + 9


@pytest.mark.parametrize("change", [{"pts": 20481}, {"digest": b"another"}, {"pts": 10**12}])
def test_a_wrong_seek_point_falls_back_to_decoding_from_the_front(change: dict, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "closed.mp4")
    reader, whole = clip.ClipReader.open(path), clip.read_video(path).frames
    seek_points = [point._replace(**change) for point in reader.seek_points]
    changed = replace(reader.select(range(50, 55)), seek_points=seek_points)
    assert np.array_equal(np.stack(list(changed)), whole[50:55])


@pytest.mark.parametrize("name", ["mpeg4.avi", "b-frames.avi"])
def test_a_file_without_an_index_gives_the_frames_of_a_full_decode(name: str, tmp_path: Path) -> None:
    """Without an index, timestamps are counted from wherever decoding begins."""
    path = write_clip(tmp_path / name)
    path.write_bytes(path.read_bytes().replace(b"idx1", b"JUNK"))
    whole, reader = clip.read_video(path).frames, clip.ClipReader.open(path)
    for first in (0, KEYFRAME_INTERVAL, 30, 50, FRAMES - 20):
        assert np.array_equal(np.stack(list(reader.select(range(first, first + 9)))), whole[first : first + 9])


@pytest.mark.parametrize("name", ["vp9.mkv", "intra.mkv"])
def test_frames_with_equal_timestamps_are_distinguished(name: str, tmp_path: Path) -> None:
    """A file of very high frame rate has them: two frames fall on one unit of its time base."""
    path = write_clip(tmp_path / name, rate=2400)
    whole, reader = clip.read_video(path).frames, clip.ClipReader.open(path)
    for first in range(0, FRAMES - 9, 7):
        assert np.array_equal(np.stack(list(reader.select(range(first, first + 9)))), whole[first : first + 9]), first


def test_frames_that_an_edit_list_leaves_out_are_not_counted(tmp_path: Path) -> None:
    """Phones and lossless cutters write such files, whose header counts all frames."""
    path, cut = write_clip(tmp_path / "closed.mp4"), tmp_path / "cut.mp4"
    with av.open(str(path)) as source, av.open(str(cut), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        shift = int(KEYFRAME_INTERVAL / 24 / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                container.mux(packet)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == FRAMES
    assert clip.probe_video(cut)[0] == FRAMES - KEYFRAME_INTERVAL == len(clip.ClipReader.open(cut))
    assert np.array_equal(clip.read_video(cut).frames, clip.read_video(path).frames[KEYFRAME_INTERVAL:])


def coloured_discs() -> np.ndarray:
    """Returns frames (9, 96, 128, 3) of three discs in pure colours that fade at the rim, moving over a grey ramp."""
    y, x = np.mgrid[:96, :128]
    frames = np.repeat(np.linspace(40, 200, 128)[None, None, :, None], 96, 1) * np.ones((9, 1, 1, 3))
    for index, frame in enumerate(frames):
        for channel, (row, column) in enumerate([(30, 30), (60, 70), (40, 100)]):
            inside = np.clip(1 - np.hypot(y - row - index, x - column + 2 * index) / 24, 0, 1)[..., None]
            frame[:] = inside * 255 * np.eye(3)[channel] + (1 - inside) * frame
    return frames.round().astype(np.uint8)


def test_chroma_is_read_closer_to_the_truth_than_by_the_official_reader(
    tmp_path: Path, parity: Callable[[str, str, str, float], float]
) -> None:
    """imageio has FFmpeg convert with its default flags, which repeat each chroma sample; it was bit-equal to this."""
    path, truth = tmp_path / "discs.mp4", coloured_discs()
    with VideoWriter(path, Size(128, 96), 24) as writer:
        writer.write(truth)
    with av.open(str(path)) as container:
        decoded = container.decode(video=0)
        official = [frame.reformat(format="rgb24", interpolation=Interpolation.BICUBIC) for frame in decoded]
    readings = clip.read_video(path).frames, [frame.to_ndarray() for frame in official], truth
    ours, theirs, exact = (torch.from_numpy(np.stack(frames)).float() for frames in readings)
    assert relative_error(ours, exact) < 0.8 * relative_error(theirs, exact)
    assert 1e-3 < parity("clip", "4:2:0, chroma interpolated", "official", relative_error(ours, theirs)) <= 1e-1


@pytest.mark.parametrize("name", ["closed.mp4", "mpeg4.avi"])
def test_one_frame_is_that_of_a_full_decode(name: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / name)
    frames = clip.read_video(path).frames
    for index in (0, 1, 37, FRAMES - 1, -1, -63, -FRAMES):
        assert (clip.read_frame(path, index) == frames[index]).all()
    assert (clip.read_frame(path, FRAMES, or_last=True) == frames[-1]).all()
    for index in (FRAMES, -FRAMES - 1):
        with pytest.raises(MediaError, match=r"has 100 frames, and none is frame .* Give -100 to 99"):
            clip.read_frame(path, index)
