"""mp4, webm and mkv: frames go through a codec into a container as they come, with sound if there is some.

Files in 4:2:0 colour use BT.709, limited range, and say so, which is what players assume for videos of these sizes. An
mkv keeps RGB, full range.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kadr.cancellation import check_cancelled
from kadr.file_names import replace_file
from kadr.media.encoders.encoder import FrameEncoder, Target
from kadr.media.encoders.formats import MP4
from kadr.media.encoders.sound import SoundTrack

if TYPE_CHECKING:
    import av

_BT709 = 1  # the same number in FFmpeg's enums of matrices, primaries and transfer curves
_NO_MATRIX = 0  # in FFmpeg's enum of matrices: RGB
_LIMITED_RANGE, _FULL_RANGE = 1, 2


class ContainerEncoder(FrameEncoder):
    """Encodes by FFmpeg's libraries.

    Args:
        sound: is encoded beside the frames; None: the file has none.
    """

    def __init__(self, target: Target, sound: SoundTrack | None = None) -> None:
        super().__init__(target)
        self._sound, self._frames_encoded = sound, 0
        self._comment: str | None = None
        self._container: Any = None

    def open(self) -> None:
        """See `FrameEncoder.open`."""
        import av

        target = self.target
        assert target.codec is not None
        path = str(target.partial.absolute())
        self._container = av.open(path, "w", format=target.form.name, options=self._container_options())
        quality = {} if target.crf is None else {"crf": str(target.crf)}
        options = quality | _encoder_options(target.codec.encoder)
        self._stream = self._container.add_stream(target.codec.encoder, rate=target.fps, options=options)
        self._stream.width, self._stream.height = target.size.width, target.size.height
        self._stream.pix_fmt = target.codec.pix_fmt
        codec = self._stream.codec_context
        codec.color_primaries = codec.color_trc = _BT709
        codec.colorspace = _NO_MATRIX if target.codec.is_lossless else _BT709
        codec.color_range = _FULL_RANGE if target.codec.is_lossless else _LIMITED_RANGE
        if target.codec.encoder == "libx265":
            codec.codec_tag = "hvc1"  # Apple's players take no other
        if self._sound is not None:
            assert target.form.sound_encoder is not None
            self._sound.open(self._container, target.form.sound_encoder)

    def set_comment(self, comment: str) -> None:
        """See `FrameEncoder.set_comment`. The container writes its header with the first packet."""
        self._comment = comment
        self._container.metadata["comment"] = comment

    def encode(self, pixels: np.ndarray) -> None:
        """See `FrameEncoder.encode`."""
        self._container.mux(self._stream.encode(self._convert(pixels)))
        self._frames_encoded += 1
        if self._sound is not None:
            self._sound.mux_until(self._frames_encoded / self.target.fps)

    def _convert(self, pixels: np.ndarray) -> av.VideoFrame:
        import av

        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        assert self.target.codec is not None
        if self.target.codec.is_lossless:
            frame = frame.reformat(format=self.target.codec.pix_fmt)
        else:
            frame = frame.reformat(
                format=self.target.codec.pix_fmt,
                dst_colorspace=_BT709,
                src_color_range=_FULL_RANGE,
                dst_color_range=_LIMITED_RANGE,
                interpolation=swscale_flags(),
            )
        frame.pts, frame.time_base = self._frames_encoded, 1 / self.target.fps
        return frame

    def finish(self, comment: str | None) -> None:
        """See `FrameEncoder.finish`."""
        for packet in self._stream.codec_context.encode_lazy():  # the frames of the lookahead
            check_cancelled()
            packet.stream = self._stream
            self._container.mux(packet)
        if self._sound is not None:
            self._sound.finish()
        self._container.close()
        if comment is not None and comment != self._comment:
            self._replace_comment(comment)

    def _replace_comment(self, comment: str) -> None:
        """Copies the finished file with another comment tag; no frame is encoded again."""
        import av

        partial = self.target.partial
        copy = partial.with_name(f"{partial.name[: -len(partial.suffix)]}-{secrets.token_hex(3)}{partial.suffix}")
        form = self.target.form.name
        try:
            with (
                av.open(str(partial.absolute())) as source,
                av.open(str(copy.absolute()), "w", format=form, options=self._container_options()) as target,
            ):
                target.metadata["comment"] = comment
                streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
                for packet in source.demux():
                    if packet.dts is not None:
                        packet.stream = streams[packet.stream.index]
                        target.mux(packet)
            replace_file(copy, partial)
        finally:
            copy.unlink(missing_ok=True)

    def _container_options(self) -> dict[str, str]:
        if self.target.form is not MP4:
            return {"fflags": "+bitexact"}  # no random numbers: the same frames give the same file
        # By default mp4 counts a file's duration in 1/1000 s, which no frame rate over 1001 divides, and buffers 32 KiB
        # of frames.
        return {"movflags": "+faststart", "movie_timescale": str(self.target.fps.numerator), "flush_packets": "1"}

    def close(self) -> None:
        """See `FrameEncoder.close`."""
        if self._sound is not None:
            self._sound.close()
        if self._container is not None:
            with suppress(Exception):  # closing writes the index, which fails again where the disk is full
                self._container.close()
        _remove(self.target.partial)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _encoder_options(encoder: str) -> dict[str, str]:
    """Returns options with which the same frames give the same file, at a speed that decoding hides.

    With AVX-512, the rate control of x264 (its macroblock tree) gives other bits each time: of the 8 files made of the
    same 25 frames at 704x480, 7 differed. Its AVX2 code is as fast there, and repeats itself.
    """
    import torch  # loaded already by whoever has frames to write

    if encoder == "libx264":
        return {"x264-params": "asm=avx2"} if torch.cpu._is_avx512_supported() else {}
    if encoder == "libx265":
        return {"x265-params": "log-level=none"}
    if encoder == "libvpx-vp9":
        return {"b": "0", "deadline": "good", "cpu-used": "3", "row-mt": "1"}
    return {"preset": "8"} if encoder == "libsvtav1" else {}


def swscale_flags() -> int:
    """Returns flags for resampling colour. FFmpeg's default repeats samples: five times the mean error on a ramp."""
    from av.video.reformatter import Interpolation

    full_chroma = Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
    return Interpolation.BILINEAR | Interpolation.ACCURATE_RND | full_chroma
