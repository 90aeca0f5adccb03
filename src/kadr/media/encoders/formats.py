"""Formats of output files by their ending, and the codecs that each can hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kadr.errors import MediaError
from kadr.quoting import quote, show
from kadr.shapes import Size
from kadr.validation import is_whole_number

_FRAME_NUMBER = re.compile(r"%(?:0(\d))?d")  # of a frame, in the name of its file; FFmpeg's way to write it


@dataclass(frozen=True)
class Codec:
    """A video codec.

    Args:
        encoder: FFmpeg's name of the encoder.
        default_crf: visually lossless for most eyes; None for a lossless codec, which has no quality to choose.
        max_crf: the smallest file; 0 is the best.
        min_side: of a frame, in pixels.
        pix_fmt: FFmpeg's name of the pixel format: 4:2:0 colour, or RGB.
    """

    encoder: str
    default_crf: int | None
    max_crf: int
    min_side: int = 2
    pix_fmt: str = "yuv420p"

    @property
    def is_lossless(self) -> bool:
        """True if the decoded frames are the encoded ones."""
        return self.default_crf is None


CODECS = {
    "h264": Codec("libx264", 18, 51),
    "hevc": Codec("libx265", 20, 51, min_side=16),
    "av1": Codec("libsvtav1", 24, 63, min_side=64),
    "vp9": Codec("libvpx-vp9", 20, 63),
    "ffv1": Codec("ffv1", None, 0, min_side=1, pix_fmt="bgr0"),
}


@dataclass(frozen=True)
class OutputFormat:
    """A kind of output file.

    Args:
        suffixes: endings of its files, in lower case; the first is the usual one.
        codecs: of `CODECS`, the default first; () where there is nothing to choose.
        sound_encoder: FFmpeg's name of the encoder for sound; None where a file has none.
        max_fps: frames per second that it can say and that players keep.
        is_image: a file holds one frame, and a video is as many files.
    """

    name: str
    suffixes: tuple[str, ...]
    codecs: tuple[str, ...] = ()
    sound_encoder: str | None = None
    max_fps: int = 1000
    is_image: bool = False


MP4 = OutputFormat("mp4", (".mp4",), ("h264", "hevc", "av1"), "aac")
WEBM = OutputFormat("webm", (".webm",), ("vp9", "av1"), "libopus")
MKV = OutputFormat("matroska", (".mkv",), ("ffv1",), "libopus")
GIF = OutputFormat("gif", (".gif",), max_fps=50)  # players slow down what is faster
WEBP = OutputFormat("webp", (".webp",), max_fps=100)
PNG = OutputFormat("png", (".png",), is_image=True)
JPEG = OutputFormat("jpeg", (".jpg", ".jpeg"), is_image=True)
OUTPUT_FORMATS = (MP4, WEBM, MKV, GIF, WEBP, PNG, JPEG)
FORMATS_BY_SUFFIX = {suffix: form for form in OUTPUT_FORMATS for suffix in form.suffixes}


def find_format(path: Path) -> OutputFormat:
    """Returns the format that a file's ending asks for.

    Raises:
        MediaError: no format has that ending.
    """
    form = FORMATS_BY_SUFFIX.get(path.suffix.lower())
    if form is None:
        endings = ", ".join(suffix for suffix in FORMATS_BY_SUFFIX)
        raise MediaError(
            f"{path} ends in {quote(path.suffix or 'nothing')}; these can be written: {endings}. Name it "
            f"{path.stem}.mp4."
        )
    return form


@dataclass(frozen=True)
class Encoding:
    """Codec, quality and contents of a file that frames become.

    Args:
        codec: of `CODECS`; None is the format's default, and is nothing for a format without codecs.
        crf: quality, 0 (the best) to the codec's limit; None is the codec's default.
        keep_audio: with the sound of the input video, or of the clip that is a condition.
        with_metadata: with the request, for `kadr rerun`.

    Raises:
        MediaError: no such codec.
    """

    codec: str | None = None
    crf: int | None = None
    keep_audio: bool = False
    with_metadata: bool = True

    def __post_init__(self) -> None:
        if self.codec is not None and self.codec not in CODECS:
            raise MediaError(f"codec is {quote(show(self.codec))}; it must be one of {', '.join(CODECS)}.")

    def codec_for(self, form: OutputFormat) -> Codec | None:
        """Returns the codec for a file of that format; None where it has none to choose.

        Raises:
            MediaError: the format does not hold this codec, has no such quality or no sound.
        """
        name, ending = self.codec, form.suffixes[0]
        if not form.codecs:
            for field, value in (("codec", self.codec), ("crf", self.crf)):
                if value is not None:
                    raise MediaError(f"{field} is {value}, and {ending} has none to choose. Leave it out.")
        if self.keep_audio and form.sound_encoder is None:
            raise MediaError(f"a {ending} holds no sound. Write an .mp4, .webm or .mkv, or do not ask for it.")
        if name is not None and name not in form.codecs:
            raise MediaError(f"codec is {name}, which a {ending} does not hold. Choose {' or '.join(form.codecs)}.")
        codec = CODECS[name or form.codecs[0]] if form.codecs else None
        if codec is not None and codec.is_lossless and self.crf is not None:
            raise MediaError(f"crf is {show(self.crf)}, and a {ending} is lossless. Leave it out.")
        if codec is not None and not self._is_quality_of(codec):
            limits = f"for {name or form.codecs[0]} it must be a whole number from 0 (best) to {codec.max_crf}"
            raise MediaError(f"crf is {show(self.crf)}; {limits}.")
        return codec

    def _is_quality_of(self, codec: Codec) -> bool:
        return self.crf is None or (is_whole_number(self.crf) and 0 <= self.crf <= codec.max_crf)


DEFAULT_ENCODING = Encoding()


def check_size(form: OutputFormat, codec: Codec | None, size: Size) -> None:
    """Raises: MediaError: a file of this format cannot hold frames of this size."""
    if codec is None or codec.is_lossless:
        return
    if size.width % 2 or size.height % 2:  # 4:2:0 colour
        below = Size(max(2, size.width // 2 * 2), max(2, size.height // 2 * 2))
        above = Size(-(-size.width // 2) * 2, -(-size.height // 2) * 2)
        nearest = " or ".join(dict.fromkeys((str(below), str(above))))
        raise MediaError(f"size is {size}; a {form.suffixes[0]} needs even sides. The nearest: {nearest}.")
    if min(size.width, size.height) < codec.min_side:
        raise MediaError(f"size is {size}; {codec.encoder} takes sides of {codec.min_side} pixels and more.")


def is_pattern(path: Path) -> bool:
    """Returns whether a name stands for numbered files, such as frame-%04d.png."""
    return _FRAME_NUMBER.search(path.name) is not None


def check_pattern(path: Path) -> None:
    """Raises: MediaError: the name has more than one number."""
    if len(_FRAME_NUMBER.findall(path.name)) > 1:
        raise MediaError(f"{path} has more than one number for the frame. Keep one, such as frame-%04d{path.suffix}.")


def frame_path(path: Path, number: int) -> Path:
    """Returns the file of a frame; number: from 1."""
    return path.with_name(_FRAME_NUMBER.sub(lambda match: f"{number:0{match[1] or 1}d}", path.name))
