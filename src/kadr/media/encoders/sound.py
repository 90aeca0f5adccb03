"""Sound of a clip, encoded beside the frames that were made from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kadr.errors import MediaError
from kadr.media.pyav import check_pyav
from kadr.quoting import quote

SAMPLE_RATE = 48_000  # the only one of Opus that needs no resampling in players
CHANNELS, LAYOUT = 2, "stereo"
DEFAULT_FRAME_SAMPLES = 960  # for encoders that take any number


class Sound(NamedTuple):
    """A part of a file's sound.

    Args:
        start: seconds into the file where it begins.
        delay: seconds of silence before it.
        duration: seconds, with the silence; what the file lacks at its end is left out.
    """

    path: Path
    start: Fraction
    delay: Fraction
    duration: Fraction


def has_sound(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file has sound that can be decoded.

    Raises:
        MediaError: the file cannot be read.
    """
    check_pyav()
    import av

    try:
        with av.open(str(Path(path).absolute()), metadata_errors="replace") as container:
            return bool(container.streams.audio)
    except (OSError, av.error.FFmpegError) as error:
        raise MediaError(f"the sound of {path} cannot be read: {error}.") from error


class SoundTrack:
    """Encodes sound into a container, as far as its frames have come."""

    def __init__(self, sound: Sound) -> None:
        self.sound = sound
        self._samples_encoded = 0
        self._input: Any = None
        self._rest = np.zeros((CHANNELS, 0), np.float32)  # decoded, and not encoded yet
        self._is_over = False

    def open(self, container: Any, encoder: str) -> None:
        """Adds a stream to a container that is open for writing."""
        import av

        self._container = container
        self._stream = container.add_stream(encoder, rate=SAMPLE_RATE)
        self._stream.layout = LAYOUT
        self._input = av.open(str(self.sound.path.absolute()), metadata_errors="replace")
        self._chunks = self._decode()

    def mux_until(self, seconds: Fraction) -> None:
        """Encodes what is heard before that moment of the video."""
        count = self._stream.codec_context.frame_size or DEFAULT_FRAME_SAMPLES
        last = int(min(seconds, self.sound.duration) * SAMPLE_RATE)
        while not self._is_over and self._samples_encoded + count <= last:
            self._encode(count)

    def finish(self) -> None:
        """Encodes the rest, and what the encoder holds back."""
        self.mux_until(self.sound.duration)
        last = int(self.sound.duration * SAMPLE_RATE) - self._samples_encoded
        if not self._is_over and last > 0:
            self._encode(last)
        self._container.mux(self._stream.encode(None))

    def _encode(self, count: int) -> None:
        import av

        samples = self._take(count)
        if not samples.shape[1]:
            return
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=LAYOUT)
        frame.sample_rate, frame.pts = SAMPLE_RATE, self._samples_encoded
        frame.time_base = Fraction(1, SAMPLE_RATE)
        self._samples_encoded += samples.shape[1]
        self._container.mux(self._stream.encode(frame))

    def _take(self, count: int) -> np.ndarray:
        """Returns the next samples, fewer at the end."""
        while self._rest.shape[1] < count and not self._is_over:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._is_over = True
            else:
                self._rest = np.concatenate((self._rest, chunk), axis=1)
        taken, self._rest = self._rest[:, :count], self._rest[:, count:]
        return taken

    def _decode(self) -> Iterator[np.ndarray]:
        """Yields samples, fp32 (channels, n), from the silence on."""
        import av

        yield np.zeros((CHANNELS, int(self.sound.delay * SAMPLE_RATE)), np.float32)
        skipped = int(self.sound.start * SAMPLE_RATE)
        resampler = av.AudioResampler("fltp", LAYOUT, SAMPLE_RATE)
        try:
            for frame in self._input.decode(self._input.streams.audio[0]):
                for resampled in resampler.resample(frame):
                    samples = resampled.to_ndarray()
                    dropped = min(skipped, samples.shape[1])
                    skipped -= dropped
                    if dropped < samples.shape[1]:
                        yield samples[:, dropped:]
        except av.error.FFmpegError as error:
            raise MediaError(f"the sound of {quote(str(self.sound.path))} cannot be decoded: {error}.") from error

    def close(self) -> None:
        """Closes the file that the sound is from."""
        if self._input is not None:
            with suppress(Exception):
                self._input.close()
