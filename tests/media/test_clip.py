"""A film gives the frames of its file, wherever it begins to read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from kadr.media import clip

FRAMES, APART = 100, 20  # of a file; between the frames that decoding can begin at
FILES = {
    "closed.mp4": ("libx264", {"g": str(APART), "bf": "3"}),
    "open.mp4": ("libx264", {"x264-params": f"keyint={APART}:open-gop=1:bframes=3"}),
    "refreshed.mkv": ("libx264", {"x264-params": f"intra-refresh=1:keyint={APART}"}),  # it has one entry: the front
    "vp9.webm": ("libvpx-vp9", {"g": str(APART)}),
    "mpeg4.avi": ("mpeg4", {"g": str(APART)}),
    "b-frames.avi": ("libx264", {"g": str(APART), "bf": "3"}),
    "vp9.mkv": ("libvpx-vp9", {"g": str(APART)}),
    "intra.mkv": ("mjpeg", {}),
}


def written(path: Path, rate: int = 24) -> Path:
    codec, options = FILES[path.name]
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(noise, number, axis=1), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", FILES)
def test_frames_from_the_middle_equal_those_of_a_full_decode(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name)
    whole, film = clip.read_video(path).frames, clip.ClipReader.open(path)
    assert len(film) == FRAMES
    for first in (0, 1, APART - 1, APART, APART + 1, 3 * APART - 2, FRAMES - 9):
        made = np.stack(list(film.select(range(first, first + 9))))
        assert np.array_equal(made, whole[first : first + 9]), first


def test_only_the_wanted_part_of_a_long_file_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film, seen, decoded = clip.ClipReader.open(written(tmp_path / "closed.mp4")), [], clip._decode_frames

    def noted(container: object) -> object:
        for frame in decoded(container):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(clip, "_decode_frames", noted)
    list(film.select(range(70, 79)))
    assert len(seen) <= APART + 9


@pytest.mark.parametrize("change", [{"pts": 20481}, {"digest": b"another"}, {"pts": 10**12}])
def test_a_wrong_seek_point_falls_back_to_decoding_from_the_front(change: dict, tmp_path: Path) -> None:
    path = written(tmp_path / "closed.mp4")
    film, whole = clip.ClipReader.open(path), clip.read_video(path).frames
    moved = replace(film.select(range(50, 55)), seek_points=[entry._replace(**change) for entry in film.seek_points])
    assert np.array_equal(np.stack(list(moved)), whole[50:55])


@pytest.mark.parametrize("name", ["mpeg4.avi", "b-frames.avi"])
def test_a_file_without_an_index_gives_the_frames_of_a_full_decode(name: str, tmp_path: Path) -> None:
    """Time stamps are counted then from wherever reading begins."""
    path = written(tmp_path / name)
    path.write_bytes(path.read_bytes().replace(b"idx1", b"JUNK"))
    whole, film = clip.read_video(path).frames, clip.ClipReader.open(path)
    for first in (0, APART, 30, 50, FRAMES - 20):
        assert np.array_equal(np.stack(list(film.select(range(first, first + 9)))), whole[first : first + 9])


@pytest.mark.parametrize("name", ["vp9.mkv", "intra.mkv"])
def test_frames_with_equal_timestamps_are_distinguished(name: str, tmp_path: Path) -> None:
    """As a file of so many frames a second has them, that two fall on one unit of its time."""
    path = written(tmp_path / name, rate=2400)
    whole, film = clip.read_video(path).frames, clip.ClipReader.open(path)
    for first in range(0, FRAMES - 9, 7):
        assert np.array_equal(np.stack(list(film.select(range(first, first + 9)))), whole[first : first + 9]), first


def test_frames_that_an_edit_list_leaves_out_are_not_counted(tmp_path: Path) -> None:
    """As a phone or a cut without encoding writes it: the header counts all that is in the file."""
    path, cut = written(tmp_path / "closed.mp4"), tmp_path / "cut.mp4"
    with av.open(str(path)) as source, av.open(str(cut), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        shift = int(APART / 24 / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                container.mux(packet)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == FRAMES
    assert clip.probe_video(cut)[0] == FRAMES - APART == len(clip.ClipReader.open(cut))
    assert np.array_equal(clip.read_video(cut).frames, clip.read_video(path).frames[APART:])
