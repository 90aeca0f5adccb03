"""Output files of every format, opened by readers that kadr does not use for them: ffprobe and Pillow."""

from __future__ import annotations

import json
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from kadr.errors import MediaError
from kadr.media.clip import read_metadata, read_video
from kadr.media.encoders.formats import CODECS, OUTPUT_FORMATS, Encoding, frame_path
from kadr.media.encoders.sound import Sound, has_sound
from kadr.media.writer import VideoWriter
from kadr.shapes import Size

SIZE, FPS = Size(96, 64), 24
REQUEST = {"prompt": 'красный круг 🎬 "quoted"\n\\', "size": [64, 48], "seed": 7, "long": "x" * 70_000}
needs_ffprobe = pytest.mark.skipif(shutil.which("ffprobe") is None, reason="ffprobe is not installed")


def moving_frames(count: int, size: Size = SIZE) -> np.ndarray:
    """Returns frames with smooth colours that move: neither flat nor noise, as videos are."""
    rows, columns = np.mgrid[0 : size.height, 0 : size.width]
    frames = np.empty((count, size.height, size.width, 3), np.uint8)
    for index in range(count):
        for channel, (down, right) in enumerate(((0.03, 0.05), (0.05, -0.02), (0.02, 0.07))):
            frames[index, ..., channel] = 128 + 100 * np.sin(down * rows + right * (columns + 2 * index) + channel)
    return frames


def write(path: Path, pixels: np.ndarray, fps: Any = FPS, **options: Any) -> Path:
    size = Size(pixels.shape[2], pixels.shape[1])
    with VideoWriter(path, size, fps, **options) as writer:
        writer.write_all([pixels[:3], pixels[3:]])
    return path


def probe(path: Path) -> dict[str, Any]:
    """Returns what ffprobe says of the first video stream, with the number of frames that it decodes."""
    command = ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-show_format", "-of", "json", str(path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    stream: dict[str, Any] = next(item for item in found["streams"] if item["codec_type"] == "video")
    return stream | {"others": [item for item in found["streams"] if item is not stream], "file": found["format"]}


def decode_with_ffmpeg(path: Path) -> np.ndarray:
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-sws_flags", "accurate_rnd+full_chroma_int+full_chroma_inp", "-"]
    raw = subprocess.run(command, check=True, capture_output=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, SIZE.height, SIZE.width, 3)


def decode_with_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        frames = []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


def psnr(decoded: np.ndarray, frames: np.ndarray) -> float:
    assert decoded.shape == frames.shape
    error = np.mean((decoded.astype(np.float64) - frames) ** 2)
    return float("inf") if not error else 10 * np.log10(255**2 / error)


CODEC_CASES = [("out.mp4", "h264", 39), ("out.mp4", "hevc", 39), ("out.mp4", "av1", 39), ("out.webm", "vp9", 39)]
CODEC_CASES += [("out.webm", "av1", 39)]


@needs_ffprobe
@pytest.mark.parametrize(("name", "codec", "least"), CODEC_CASES)
def test_a_video_has_the_codec_frames_rate_and_colours_asked_for(tmp_path, name, codec, least):
    frames = moving_frames(13)
    path = write(tmp_path / name, frames, Fraction(24000, 1001), encoding=Encoding(codec=codec), metadata=REQUEST)
    found = probe(path)
    assert (found["codec_name"], found["nb_read_frames"], found["avg_frame_rate"]) == (codec, "13", "24000/1001")
    assert (found["width"], found["height"], found["pix_fmt"]) == (96, 64, "yuv420p")
    colours = [found[name] for name in ("color_space", "color_primaries", "color_transfer", "color_range")]
    assert colours == ["bt709", "bt709", "bt709", "tv"]
    assert float(found["file"]["duration"]) == pytest.approx(13 * 1001 / 24000, abs=0.001)
    assert found["codec_tag_string"] == {"hevc": "hvc1", "h264": "avc1"}.get(codec, found["codec_tag_string"])
    assert psnr(decode_with_ffmpeg(path), frames) >= least
    assert read_metadata(path) == REQUEST


@needs_ffprobe
def test_an_mkv_gives_back_every_bit_of_frames_of_any_size(tmp_path):
    frames = moving_frames(13)
    path = write(tmp_path / "out.mkv", frames, Fraction(24000, 1001), metadata=REQUEST)
    found = probe(path)
    assert (found["codec_name"], found["nb_read_frames"], found["avg_frame_rate"]) == ("ffv1", "13", "24000/1001")
    assert (found["pix_fmt"], found["color_space"], found["color_range"]) == ("bgr0", "gbr", "pc")
    assert np.array_equal(decode_with_ffmpeg(path), frames)
    assert read_metadata(path) == REQUEST
    noise = np.random.default_rng(0)
    for width, height in ((1, 1), (33, 47)):
        pixels = noise.integers(0, 256, (3, height, width, 3)).astype(np.uint8)
        assert np.array_equal(read_video(write(tmp_path / "out.mkv", pixels)).frames, pixels)


@pytest.mark.parametrize(("name", "least"), [("out.gif", 28), ("out.webp", 37)])
def test_an_animation_has_all_frames_at_their_rate_and_repeats(tmp_path, name, least):
    frames = moving_frames(13)
    path = write(tmp_path / name, frames, metadata=REQUEST)
    with Image.open(path) as image:
        assert (image.n_frames, image.info["loop"], image.size) == (13, 0, (96, 64))
        durations = []
        for index in range(13):
            image.seek(index)
            image.load()
            durations.append(image.info["duration"])
    assert sum(durations[:12]) == pytest.approx(12 * 1000 / FPS, abs=10)  # each begins at its time, in its unit
    assert max(durations) - min(durations) <= 10
    assert psnr(decode_with_pillow(path), frames) >= least
    assert read_metadata(path) == REQUEST


@pytest.mark.parametrize(("name", "least"), [("frame-%04d.png", float("inf")), ("frame-%d.jpg", 38)])
def test_numbered_images_hold_one_frame_each(tmp_path, name, least):
    frames = moving_frames(11)
    path = write(tmp_path / name, frames, metadata=REQUEST, frames=11)
    paths = [frame_path(path, number) for number in range(1, 12)]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert paths[8].stem in {"frame-0009", "frame-9"}
    assert psnr(np.concatenate([decode_with_pillow(item) for item in paths]), frames) >= least
    assert all(read_metadata(item) == REQUEST for item in paths)


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.gif", "out.webp"])
def test_a_single_frame_is_one_image(tmp_path, name):
    frames = moving_frames(1)
    path = write(tmp_path / name, frames, metadata=REQUEST, frames=1)
    assert list(tmp_path.iterdir()) == [path]
    assert psnr(decode_with_pillow(path), frames) >= 28
    assert read_metadata(path) == REQUEST


def test_several_frames_in_one_image_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(MediaError, match=r"out\.png holds one frame.* 9\. .*out-%04d\.png"):
        VideoWriter(tmp_path / "out.png", SIZE, FPS, frames=9)
    with pytest.raises(MediaError, match=r"out\.png holds one frame"):
        write(tmp_path / "out.png", moving_frames(2))
    with pytest.raises(MediaError, match="more than one number"):
        VideoWriter(tmp_path / "a-%d-%d.png", SIZE, FPS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.mkv", "out.gif", "out.webp", "f-%d.png", "f-%d.jpg"])
def test_without_metadata_a_file_says_nothing_of_the_request(tmp_path, name):
    write(tmp_path / name, moving_frames(2), metadata={"prompt": "a secret"}, encoding=Encoding(with_metadata=False))
    for path in tmp_path.iterdir():
        assert b"a secret" not in path.read_bytes()
        with pytest.raises(MediaError, match="no request of kadr"):
            read_metadata(path)


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.mkv", "out.gif", "out.webp", "f-%d.png"])
def test_what_is_known_only_at_the_end_is_in_the_file(tmp_path, name):
    notices: list[str] = []
    with VideoWriter(tmp_path / name, SIZE, FPS, metadata=lambda: {"notices": list(notices)}) as writer:
        writer.write(moving_frames(2))
        notices.append("degraded")
    assert all(read_metadata(path) == {"notices": ["degraded"]} for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.webm", "out.gif", "out.webp", "f-%d.png"])
def test_an_interrupted_file_leaves_nothing_and_keeps_the_old_one(tmp_path, name):
    old = frame_path(tmp_path / name, 1)
    old.write_bytes(b"old")

    def frames():
        yield moving_frames(2)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"), VideoWriter(tmp_path / name, SIZE, FPS) as writer:
        writer.write_all(frames())
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "encoding", "message"),
    [
        ("out.webm", {"codec": "h264"}, "codec is h264, which a .webm does not hold. Choose vp9 or av1"),
        ("out.mp4", {"codec": "vp9"}, "codec is vp9, which a .mp4 does not hold. Choose h264 or hevc or av1"),
        ("out.gif", {"codec": "h264"}, "codec is h264, and .gif has none to choose"),
        ("out.webp", {"crf": 5}, "crf is 5, and .webp has none to choose"),
        ("out.mp4", {"crf": 52}, r"crf is 52; for h264 it must be a whole number from 0 \(best\) to 51"),
        ("out.mkv", {"crf": 5}, r"crf is 5, and a \.mkv is lossless\. Leave it out"),
        ("out.mkv", {"codec": "h264"}, r"codec is h264, which a \.mkv does not hold. Choose ffv1"),
        ("out.gif", {"keep_audio": True}, "a .gif holds no sound"),
        ("out.mp4", {"codec": "divx"}, "codec is 'divx'; it must be one of h264, hevc, av1, vp9, ffv1"),
    ],
)
def test_what_a_format_cannot_do_is_refused(tmp_path, name, encoding, message):
    with pytest.raises(MediaError, match=message):
        VideoWriter(tmp_path / name, SIZE, FPS, encoding=Encoding(**encoding))


def test_rates_and_sizes_beyond_a_format_are_refused(tmp_path):
    with pytest.raises(MediaError, match=r"fps is 60; .* at most 50"):
        VideoWriter(tmp_path / "out.gif", SIZE, 60)
    with pytest.raises(MediaError, match="size is 32x32; libsvtav1 takes sides of 64"):
        VideoWriter(tmp_path / "out.mp4", Size(32, 32), FPS, encoding=Encoding(codec="av1"))
    odd = moving_frames(2, Size(33, 47))
    assert decode_with_pillow(write(tmp_path / "odd.gif", odd)).shape == odd.shape


def test_every_codec_and_format_is_tested_here():
    assert {codec for _, codec, _ in CODEC_CASES} | {"ffv1"} == set(CODECS)
    assert {suffix for form in OUTPUT_FORMATS for suffix in form.suffixes} == {
        *(".mp4", ".webm", ".mkv", ".gif", ".webp", ".png", ".jpg"),
        ".jpeg",  # another name of .jpg
    }


RATE = 44_100


def write_clip_with_sound(path: Path, seconds: float) -> Path:
    """Writes a video of 24 frames per second whose sound is 440 Hz in its first half and 880 Hz in its second."""
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=24), container.add_stream("aac", rate=RATE)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        audio.layout = "mono"
        for _ in range(round(seconds * 24)):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8), format="rgb24")))
        container.mux(video.encode(None))
        time = np.arange(round(seconds * RATE)) / RATE
        wave = 0.5 * np.sin(2 * np.pi * np.where(time < seconds / 2, 440, 880) * time).astype(np.float32)
        for start in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return path


def loudest_pitch(path: Path, start: float, seconds: float) -> float | None:
    """Returns the strongest frequency in a part of a file's sound, by ffmpeg; None where it is silent."""
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "f32le", "-ac", "1", "-ar", "8000", "-"]
    samples = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.float32)
    part = samples[int(start * 8000) : int((start + seconds) * 8000)]
    if np.abs(part).max() < 0.01:
        return None
    spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part))))
    return float(np.argmax(spectrum) * 8000 / len(part))


@needs_ffprobe
@pytest.mark.parametrize(("name", "codec"), [("out.mp4", "aac"), ("out.webm", "opus"), ("out.mkv", "opus")])
def test_sound_of_a_clip_begins_and_ends_with_its_frames(tmp_path, name, codec):
    clip = write_clip_with_sound(tmp_path / "clip.mp4", 4.0)
    sound = Sound(clip, start=Fraction(1), delay=Fraction(1, 2), duration=Fraction(72, 24))
    path = write(tmp_path / name, moving_frames(72), sound=sound, metadata=REQUEST)
    found = probe(path)
    (audio,) = found["others"]
    assert (audio["codec_name"], audio["sample_rate"], found["nb_read_frames"]) == (codec, "48000", "72")
    assert float(found["file"]["duration"]) == pytest.approx(3.0, abs=0.05)
    assert loudest_pitch(path, 0.05, 0.4) is None  # half a second of silence, then what follows the first second
    assert loudest_pitch(path, 0.6, 0.8) == pytest.approx(440, abs=5)
    assert loudest_pitch(path, 1.6, 1.2) == pytest.approx(880, abs=5)
    assert (read_video(path).frames.shape[0], read_metadata(path)) == (72, REQUEST)
    assert has_sound(path)


def test_sound_that_is_shorter_than_the_video_ends_before_it(tmp_path):
    clip = write_clip_with_sound(tmp_path / "clip.mp4", 1.0)
    sound = Sound(clip, Fraction(0), Fraction(0), Fraction(2))
    path = write(tmp_path / "out.mp4", moving_frames(48), sound=sound)
    assert read_video(path).frames.shape[0] == 48
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        assert float(stream.duration * stream.time_base) == pytest.approx(1.0, abs=0.05)
