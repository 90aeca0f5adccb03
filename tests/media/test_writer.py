"""Videos are read as they were written, and an incomplete file never appears."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from kadr.errors import MediaError
from kadr.media.clip import read_metadata, read_video
from kadr.media.encoders.formats import Encoding
from kadr.media.writer import VideoWriter
from kadr.shapes import Size

SIZE = Size(64, 48)
SRC = Path(__file__).parents[2] / "src"


def grey_frames(count: int, size: Size = SIZE) -> np.ndarray:
    """Returns uint8 (count, H, W, 3), every frame of its own grey."""
    grey_frames = np.linspace(10, 245, count).astype(np.uint8)
    return np.broadcast_to(grey_frames[:, None, None, None], (count, size.height, size.width, 3))


def noise_frames(count: int, size: Size) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size.height, size.width, 3), dtype=np.uint8)


def write_video(path: Path, frames: np.ndarray, fps: float | Fraction = 24, **options: object) -> Path:
    with VideoWriter(path, Size(frames.shape[2], frames.shape[1]), fps, **options) as writer:
        writer.write(frames)
    return path


def frames_on_disk(folder: Path) -> int:
    """Returns the number of complete H.264 frames in the hidden file of a folder."""
    content = b"".join(path.read_bytes() for path in folder.glob(".kadr-*"))
    offset, count = content.find(b"mdat") + 4, 0
    while 4 <= offset <= len(content) - 5:  # the length of a NAL unit, and the unit, whose first byte is its type
        unit_type, offset = content[offset + 4] & 31, offset + 4 + int.from_bytes(content[offset : offset + 4], "big")
        count += unit_type in (1, 5) and offset <= len(content)
    return count


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fps", "exact"), [(24, 24), (30, 30), (23.976, Fraction(24000, 1001)), (12.34, Fraction(617, 50)), (1, 1)]
)
@pytest.mark.parametrize("count", [1, 3, 9, 25])
def test_frame_count_rate_duration_and_order_survive_exactly(tmp_path, count, fps, exact):
    frames = grey_frames(count)
    path = write_video(tmp_path / "out.mp4", frames, fps)
    clip = read_video(path)
    assert clip.fps == exact
    assert clip.frames.shape == frames.shape
    assert clip.frames.dtype == np.uint8
    assert np.abs(clip.frames.astype(int) - frames).max() <= 3
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.frames == count
        assert stream.duration * stream.time_base == Fraction(count) / exact
        assert abs(Fraction(container.duration, 10**6) - Fraction(count) / exact) <= Fraction(1, 10**6)
        assert stream.start_time == 0


@pytest.mark.parametrize("fps", [Fraction(24000, 1001), 23.976])
def test_the_duration_stays_exact_where_the_encoder_reorders_frames(tmp_path, fps):
    # Three equal frames make x264 reorder, and mp4 then stores the duration once more, in units of the whole file.
    path = write_video(tmp_path / "out.mp4", np.full((3, 48, 64, 3), 99, np.uint8), fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.duration * stream.time_base == 3 / Fraction(24000, 1001)


@pytest.mark.parametrize("fps", [Fraction(24000, 1001), 24000 / 1001, Fraction(30000, 1001), 30000 / 1001])
def test_broadcast_rates_are_kept_exactly_as_ratio_or_as_float(tmp_path, fps):
    expected = Fraction(24000 if fps < 25 else 30000, 1001)
    assert read_video(write_video(tmp_path / "out.mp4", grey_frames(3), fps)).fps == expected


def test_chunks_of_any_length_make_the_same_file_as_one(tmp_path):
    frames = noise_frames(7, SIZE)
    whole = write_video(tmp_path / "whole.mp4", frames)
    with VideoWriter(tmp_path / "chunks.mp4", SIZE, 24) as writer:
        for chunk in (frames[:1], frames[1:1], frames[1:6], frames[6:]):
            writer.write(chunk)
    assert writer.frames_written == 7
    assert (tmp_path / "chunks.mp4").read_bytes() == whole.read_bytes()


def test_the_same_frames_make_the_same_file_each_time(tmp_path):
    _y, x = np.mgrid[0:192, 0:320]
    noise = np.random.default_rng(0).integers(0, 60, (192, 320, 3))
    waves = [128 + 60 * np.sin((x + 3 * index) / 17)[..., None] + np.roll(noise, index, 1) for index in range(25)]
    frames = np.stack(waves).clip(0, 255).astype(np.uint8)
    files = set()
    for _ in range(6):
        with VideoWriter(tmp_path / "clip.mp4", Size(320, 192), 24) as writer:
            writer.write(frames)
        files.add((tmp_path / "clip.mp4").read_bytes())
    assert len(files) == 1


def test_torch_frames_are_written_like_numpy_frames(tmp_path):
    torch = pytest.importorskip("torch")
    frames = noise_frames(2, SIZE)
    with VideoWriter(tmp_path / "torch.mp4", SIZE, 24) as writer:
        writer.write(torch.from_numpy(frames))
    assert (tmp_path / "torch.mp4").read_bytes() == write_video(tmp_path / "numpy.mp4", frames).read_bytes()


def test_reading_stops_at_the_limit(tmp_path):
    path = write_video(tmp_path / "out.mp4", grey_frames(9))
    assert len(read_video(path, max_frames=4).frames) == 4
    assert len(read_video(path, max_frames=99).frames) == 9


def test_the_index_comes_first_for_browsers(tmp_path):
    content = write_video(tmp_path / "out.mp4", grey_frames(9)).read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("side", [2, 16, 34])
def test_small_and_unaligned_even_sizes_survive(tmp_path, side):
    frames = grey_frames(2, Size(side, side + 2))
    assert read_video(write_video(tmp_path / "out.mp4", frames)).frames.shape == frames.shape


# --- colour ----------------------------------------------------------------------------------------------------------

COLOURS = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (17, 200, 90), (90, 60, 30)]


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_bt709_limited_in_the_file_and_full_rgb_on_read(tmp_path, colour):
    path = write_video(
        tmp_path / "out.mp4", np.broadcast_to(np.uint8(colour), (1, 48, 64, 3)), encoding=Encoding(crf=1)
    )
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
    red, green, blue = (value / 255 for value in colour)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = (16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748)
    planes = np.split(frame.to_ndarray(format="yuv420p").reshape(-1), [48 * 64, 60 * 64])
    assert [plane.mean() for plane in planes] == pytest.approx(expected, abs=1)
    assert np.abs(read_video(path).frames.astype(int) - colour).max() <= 2


def write_foreign_video(path: Path, rotation: int = 0, comment: str | None = None, **tags: int) -> Path:
    """Writes one frame, its upper left quarter white, as another program would."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 255
    with av.open(str(path), "w") as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi"])
def test_the_containers_of_the_official_script_are_read(tmp_path, suffix):
    clip = read_video(write_foreign_video(tmp_path / f"clip{suffix}"))
    assert (clip.fps, clip.frames.shape, clip.metadata) == (25, (1, 48, 64, 3), {})


def test_a_clip_a_phone_recorded_upright_is_read_upright(tmp_path):
    path = write_foreign_video(tmp_path / "phone.mp4", rotation=-90)
    # Phones write for portrait: the matrix (0 1; -1 0), a quarter turn clockwise for the viewer.
    start = path.read_bytes().index(b"tkhd") + 4 + 40
    assert np.frombuffer(path.read_bytes()[start : start + 20], ">i4").tolist() == [0, 1 << 16, 0, -1 << 16, 0]
    frame = read_video(path).frames[0]
    assert frame.shape == (64, 48, 3)
    assert frame[:28, 28:].min() > 200
    assert frame[36:].max() < 50


# --- the request travels with the file -------------------------------------------------------------------------------

REQUEST = {"prompt": 'красный круг 🎬 "quoted"\n\\', "size": [64, 48], "seed": 7, "guidance": None, "strength": 0.15}


def test_the_request_is_read_back_unchanged(tmp_path):
    path = write_video(tmp_path / "out.mp4", grey_frames(1), metadata=REQUEST)
    assert read_metadata(path) == REQUEST == read_video(path).metadata


def test_what_becomes_known_while_frames_are_written_is_in_the_file(tmp_path):
    known = {"notices": []}
    path, frames = tmp_path / "out.mp4", grey_frames(5)
    with VideoWriter(path, SIZE, 24, metadata=lambda: known) as writer:
        known["notices"] = ["first"]
        writer.write(frames[:3])
        known["notices"] = ["first", "second"]
        writer.write(frames[3:])
    assert read_metadata(path) == known
    plain = read_video(write_video(tmp_path / "plain.mp4", frames))
    again = read_video(path)
    assert np.array_equal(again.frames, plain.frames)
    assert again.fps == plain.fps
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.mp4", "plain.mp4"]


def test_a_long_prompt_and_one_that_is_not_valid_text_survive(tmp_path):
    request = {"prompt": "ш" * 100_000, "negative_prompt": "\udce9"}
    assert read_metadata(write_video(tmp_path / "out.mp4", grey_frames(1), metadata=request)) == request


def test_other_tools_see_the_request_in_the_comment_tag(tmp_path):
    path = write_video(tmp_path / "out.mp4", grey_frames(1), metadata=REQUEST)
    assert b"\xa9cmt" in path.read_bytes()
    with av.open(str(path)) as container:
        assert json.loads(container.metadata["comment"]) == {"kadr": REQUEST}


@pytest.mark.parametrize("comment", [None, "holiday", '{"prompt": "of another program"}', '["kadr"]', '{"kadr": 1}'])
def test_metadata_of_a_foreign_video_is_refused_by_name(tmp_path, comment):
    path = write_foreign_video(tmp_path / "foreign.mp4", comment=comment)
    with pytest.raises(MediaError, match=r"foreign\.mp4 contains no request"):
        read_metadata(path)
    assert read_video(path).metadata == {}


# --- refused before the first frame ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        (Size(705, 480), "704x480 or 706x480"),
        (Size(705, 481), "704x480 or 706x482"),
        (Size(64, 1), r"64x2\."),
    ],
)
def test_an_odd_size_is_refused_with_the_nearest_even_ones(tmp_path, size, nearest):
    with pytest.raises(MediaError, match=f"{size}.*{nearest}"):
        VideoWriter(tmp_path / "out.mp4", size, 24)


@pytest.mark.parametrize("fps", [0, -1, 1001, float("nan"), float("inf"), 1e-9, None])
def test_an_impossible_frame_rate_is_refused(tmp_path, fps):
    with pytest.raises(MediaError, match=f"fps is {fps}"):
        VideoWriter(tmp_path / "out.mp4", SIZE, fps)


def test_a_missing_folder_is_refused_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(MediaError, match=f"mkdir -p '{tmp_path}/new folder'"):
        VideoWriter(tmp_path / "new folder" / "out.mp4", SIZE, 24)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("here.mp4", "here.mp4 is a folder.*out.mp4"),
        ("out.avi", r"'.avi'; these can be written: .mp4,.*out.mp4"),
        ("out", r"'nothing'; these can be written"),
        ("file.txt/out.mp4", "file.txt is a file"),
    ],
)
def test_an_invalid_target_is_refused(tmp_path, name, complaint):
    (tmp_path / "here.mp4").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(MediaError, match=complaint):
        VideoWriter(tmp_path / name, SIZE, 24)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(MediaError, match="may not be written"):
        VideoWriter(tmp_path / "out.mp4", SIZE, 24)


@pytest.mark.parametrize("crf", [-1, 52])
def test_a_crf_out_of_range_is_refused(tmp_path, crf):
    with pytest.raises(MediaError, match=f"crf is {crf}.*51"):
        VideoWriter(tmp_path / "out.mp4", SIZE, 24, encoding=Encoding(crf=crf))


# --- all or nothing --------------------------------------------------------------------------------------------------


def test_frames_are_on_disk_long_before_the_last_one_comes(tmp_path):
    """The encoder only keeps its lookahead, so memory does not grow with the video."""
    frames_after_write = []
    with VideoWriter(tmp_path / "out.mp4", SIZE, 24) as writer:
        for frame in noise_frames(121, SIZE)[:, None]:
            writer.write(frame)
            frames_after_write.append(frames_on_disk(tmp_path))
    assert frames_after_write == sorted(frames_after_write)
    assert frames_after_write[45] > 0
    assert frames_after_write[-1] > 121 - 45
    assert all(after - before <= 4 for before, after in pairwise(frames_after_write[50:]))


def test_the_target_appears_only_when_the_block_ends(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_text("older")
    with VideoWriter(path, SIZE, 24) as writer:
        writer.write(grey_frames(9))
        assert path.read_text() == "older"
        assert all(other.name.startswith(".") for other in tmp_path.iterdir() if other != path)
    assert len(read_video(path).frames) == 9
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("count", [0, 9])
def test_an_interruption_leaves_only_the_older_file(tmp_path, exception, count):
    path = tmp_path / "out.mp4"
    path.write_text("older")

    def write_until_exception() -> None:
        with VideoWriter(path, SIZE, 24) as writer:
            writer.write(grey_frames(9)[:count])
            raise exception

    with pytest.raises(exception):
        write_until_exception()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "older"


def test_chunks_written_in_a_thread_make_the_same_file(tmp_path):
    frames, began, threads = noise_frames(9, SIZE), threading.Event(), set()

    class RecordingWriter(VideoWriter):
        def write(self, frames: np.ndarray) -> None:
            threads.add(threading.get_ident())
            began.set()
            super().write(frames)

    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, 9, 2):
            assert not start or began.wait(60)  # the previous chunk is being written now
            began.clear()
            yield frames[start : start + 2]

    with RecordingWriter(tmp_path / "threaded.mp4", SIZE, 24) as writer:
        writer.write_all(chunks())
    assert writer.frames_written == 9
    assert threads.isdisjoint({threading.get_ident()})
    assert (tmp_path / "threaded.mp4").read_bytes() == write_video(tmp_path / "plain.mp4", frames).read_bytes()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_error_in_the_writer_thread_is_raised_and_leaves_no_file(tmp_path, count):
    chunks = [noise_frames(2, SIZE)] * count
    chunks[-1] = chunks[-1][:, 1:]
    with pytest.raises(MediaError, match="frames are uint8"), VideoWriter(tmp_path / "out.mp4", SIZE, 24) as writer:
        writer.write_all(chunks)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frames", [grey_frames(1, Size(32, 48)), grey_frames(1).astype(np.float32), grey_frames(1)[0]])
def test_frames_of_another_shape_or_dtype_are_refused_and_leave_no_file(tmp_path, frames):
    with (
        pytest.raises(MediaError, match=r"uint8 \(F, 48, 64, 3\)"),
        VideoWriter(tmp_path / "out.mp4", SIZE, 24) as writer,
    ):
        writer.write(frames)
    assert not list(tmp_path.iterdir())


def test_a_video_without_frames_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(MediaError, match="no frames"), VideoWriter(tmp_path / "out.mp4", SIZE, 24):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [1_000, 200_000])
def test_a_file_size_limit_is_explained_and_leaves_no_file(tmp_path, limit):
    size = Size(320, 240)
    old_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old_limits[1]))
        with pytest.raises(MediaError, match=r"out.mp4 could not be written: .*\d+ bytes are free in"):
            write_video(tmp_path / "out.mp4", noise_frames(12, size), encoding=Encoding(crf=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)
    assert not list(tmp_path.iterdir())


ON_A_FULL_DISK = """
import sys, pathlib, numpy
from kadr.errors import MediaError
from kadr.media.encoders.formats import Encoding
from kadr.media.writer import VideoWriter
from kadr.shapes import Size
frames = numpy.random.default_rng(0).integers(0, 256, (12, 240, 320, 3), dtype=numpy.uint8)
folder = pathlib.Path(sys.argv[1])
try:
    with VideoWriter(folder / "out.mp4", Size(320, 240), 24, encoding=Encoding(crf=1)) as writer:
        writer.write(frames)
except MediaError as error:
    print(error, len(list(folder.iterdir())), sep="|")
"""


def test_a_full_disk_is_explained_with_the_free_bytes_and_no_file_is_left(tmp_path):
    # A private mount, visible to this one process: no root needed where the system allows user namespaces.
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=200k none "$0" && exec "$@"']
    if not shutil.which("unshare") or subprocess.run([*mount, tmp_path, "true"], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    command = [*mount, tmp_path, sys.executable, "-c", ON_A_FULL_DISK, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SRC)})
    message, file_count = done.stdout.strip().split("|")
    assert "out.mp4 could not be written: No space left on device" in message
    assert f"bytes are free in {tmp_path}" in message
    assert (file_count, done.stderr) == ("0", "")


# --- not a video -----------------------------------------------------------------------------------------------------


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_playlist(path: Path) -> Path:
    """Writes a playlist that FFmpeg would follow to the other file, which is a valid video."""
    write_foreign_video(path.with_name("other.mp4"))
    path.write_text("ffconcat version 1.0\nfile other.mp4\n")
    return path


def write_truncated(path: Path, keep: float) -> Path:
    content = write_video(path, noise_frames(9, SIZE)).read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


NOT_VIDEOS = {
    "absent": lambda path: path,
    "empty": lambda path: path.touch() or path,
    "text": lambda path: path.write_text("no video") and path,
    "folder": lambda path: path.mkdir() or path,
    "sound": write_audio,
    "cut in the frames": lambda path: write_truncated(path, 0.7),
    "cut in the index": lambda path: write_truncated(path, 0.01),
    "playlist": write_playlist,
}


@pytest.mark.parametrize("kind", NOT_VIDEOS)
def test_a_file_that_is_not_a_complete_video_is_refused_by_name(tmp_path, kind):
    path = NOT_VIDEOS[kind](tmp_path / "clip.mp4")
    with pytest.raises(MediaError) as caught:
        read_video(path)
    assert str(path) in str(caught.value)
    reasons = {"absent": "no such file", "folder": "Is a directory"}
    assert reasons.get(kind, ".mp4, .mov") in str(caught.value)
    if kind != "cut in the frames":
        with pytest.raises(MediaError):
            read_metadata(path)


def test_importing_the_writer_loads_neither_torch_nor_ffmpeg():
    code = "import sys, kadr.media.writer; print([m for m in ('torch', 'av') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(SRC)})
    assert done.stdout.strip() == "[]"


def test_without_pyav_a_writer_and_a_reader_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tmp_path / "in.mp4"
    clip.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r"PyAV, which cannot be imported.*pip install av"):
        VideoWriter(tmp_path / "out.mp4", Size(64, 64), fps=24)
    with pytest.raises(MediaError, match="pip install av"):
        read_video(clip)
