"""How much memory the VAE takes at work, besides its weights: its stream, played through with sizes instead of numbers.

What a layer holds while it computes, what it keeps for the next chunk and what waits above it depends on how far the
stream is; at its end the frames in flight all come at once. So the stream is followed call by call, as `models.vae`
runs it, and its worst moment is the answer.

Below, `others` are the bytes that exist while something runs, its input among them, besides what layers keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import prod

from kadr.models.vae.config import Strides, VAEConfig
from kadr.models.vae.decoder import CHUNK_FRAMES
from kadr.nn.conv import KERNEL_SIZE
from kadr.planning import activations
from kadr.planning.vae_stages import DOWN, LAYERS, OUT, STRIDED, UP, WIDER, VAEStage, decoder_stages, encoder_stages
from kadr.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, LatentGrid

ENCODED = 8  # pixel frames that go through the encoder at a time
# Latent frames after which a stream has come into its stride: the deepest stage waits for 31 at most, and from there on
# the pattern repeats with every one. A longer stream has no worse moment.
SETTLED = 40
Plane = tuple[int, int]  # rows, columns


class _Ledger:
    """Bytes that layers keep from call to call, and the most that there were at any moment.

    winograd_frames: frames that packed convolutions of stride 1 make at a time; 0 where they are not packed.
    """

    def __init__(self, *, together: int) -> None:
        self.kept = self.peak = 0
        self.together = together

    def moment(self, others: int) -> None:
        self.peak = max(self.peak, self.kept + others)


class _Kept:
    """Frames that a layer keeps for the next chunk. frame: bytes of one."""

    def __init__(self, ledger: _Ledger, frame: int) -> None:
        self.ledger, self.frame, self.frames = ledger, frame, 0

    def joined(self, frames: int) -> int:
        """Bytes of one tensor of the kept frames and so many new ones; none is made where nothing is kept."""
        return (self.frames + frames) * self.frame if self.frames else 0

    def keep(self, frames: int, others: int) -> None:
        """Keep so many instead. The old ones go when the new ones have been copied."""
        self.ledger.moment(others + frames * self.frame)
        self.ledger.kept += (frames - self.frames) * self.frame
        self.frames = frames


class _Convolution:
    """A 3 x 3 x 3 convolution; see `nn.conv`.

    Args:
        channels: before and after.
        plane: rows and columns before.
        strides: over frames, rows and columns.
    """

    def __init__(
        self, ledger: _Ledger, channels: tuple[int, int], plane: Plane, size: int, strides: Strides, *, causal: bool
    ) -> None:
        self.ledger, self.channels, self.plane, self.size, self.causal = ledger, channels, plane, size, causal
        self.step, down, across = strides
        self.plane_after = (plane[0] // down, plane[1] // across)
        self.frame_in = channels[0] * prod(plane) * size
        self.frame = channels[1] * prod(self.plane_after) * size
        self.kept, self.begun = _Kept(ledger, self.frame_in), False

    def __call__(self, frames: int, others: int, last: bool) -> int:
        """Frames in -> frames out."""
        front = self.kept.frames if self.begun else (2 if self.causal else 1) * bool(frames)
        count = front + frames
        if last and not self.causal:  # the last frame is repeated, for which all are copied once more
            self.ledger.moment(others + (2 * count + 1) * self.frame_in)
            count += 1
        made, joined = max(0, (count - KERNEL_SIZE) // self.step + 1), count * self.frame_in
        self.ledger.moment(others + joined)
        if frames:
            self.begun = True
            if not last:
                self.kept.keep(count - made * self.step, others + joined)
        if made:
            before, after = (count, *self.plane), (made, *self.plane_after)
            if self.ledger.together and self.plane == self.plane_after and self.step == 1:
                besides = activations.packed_convolution_bytes(
                    self.channels, before, after, self.size, self.ledger.together
                )
            else:
                besides = activations.convolution_bytes(self.channels, before, after, self.size)
            self.ledger.moment(others + joined + made * self.frame + besides)
        return made


class _Stage:
    """A stage at work. A call takes frames and returns frames, and the bytes of the tensor that they lie in.

    Args:
        plane: rows and columns before it.
        size: bytes per number.
    """

    def __init__(self, ledger: _Ledger, stage: VAEStage, plane: Plane, size: int, *, causal: bool) -> None:
        self.ledger, self.stage, self.causal = ledger, stage, causal
        _, down, across = stage.strides
        grows = stage.kind == UP
        self.plane = (plane[0] * down, plane[1] * across) if grows else (plane[0] // down, plane[1] // across)
        self.frame_in, self.frame = stage.width_in * prod(plane) * size, stage.width * prod(self.plane) * size
        strides = stage.strides if stage.kind == STRIDED else (1, 1, 1)  # others fold what a plain one made
        self.convolutions = [
            _Convolution(ledger, channels, plane, size, strides, causal=causal) for channels in stage.convolutions
        ]
        self.skips = [_Kept(ledger, self.frame_in) for _ in self.convolutions[::2]]
        self.begun = False
        ways = {LAYERS: self._layers, WIDER: self._layers, UP: self._up, DOWN: self._down, OUT: self._end}
        self.run: Callable[[int, int, bool], tuple[int, int]] = ways.get(stage.kind, self._plain)

    def _plain(self, frames: int, others: int, last: bool) -> tuple[int, int]:
        made = self.convolutions[0](frames, others, last)
        return made, made * self.frame

    def _layers(self, frames: int, others: int, last: bool) -> tuple[int, int]:
        given = 0  # the input of the first layer is the caller's
        for skip, one, two in zip(self.skips, self.convolutions[::2], self.convolutions[1::2], strict=True):
            main = self._half(one, frames, others + given, last)
            made = self._half(two, main, others + given + main * one.frame, last)
            out, joined = made * self.frame, skip.joined(frames)
            if not last:
                skip.keep(skip.frames + frames - made, others + given + out + joined)
            if self.stage.kind == WIDER and made:
                # The norm copies what comes with other strides; its outcome goes through a convolution of its own.
                self.ledger.moment(others + given + joined + 2 * out + 2 * made * self.frame_in)
                joined = out
            self.ledger.moment(others + given + joined + 2 * out)
            frames, given = made, out
        return frames, given

    def _half(self, convolution: _Convolution, frames: int, others: int, last: bool) -> int:
        """Norm, bend and SiLU, then the convolution, then noise."""
        x = frames * convolution.frame_in
        self.ledger.moment(others + (3 if self.stage.level else 2) * x)
        made = convolution(frames, others + x, last)
        if self.stage.noise:
            self.ledger.moment(others + (2 * made + 1) * convolution.frame)
        return made

    def _up(self, frames: int, others: int, last: bool) -> tuple[int, int]:
        made = self.convolutions[0](frames, others, last)
        out = made * self.convolutions[0].frame
        self.ledger.moment(others + 2 * out)
        if self.stage.adds:
            skip, small = self.skips[0], made * self.frame_in
            joined = skip.joined(frames)
            if not last:
                skip.keep(skip.frames + frames - made, others + out + joined)
            self.ledger.moment(others + out + joined + small)
            self.ledger.moment(others + 2 * out + small)  # unfolded, the unfolded skip, and the sum
        time = self.stage.strides[0]
        dropped = time == 2 and made > 0 and not self.begun
        self.begun = self.begun or made > 0
        return made * time - dropped, out  # what is dropped is only hidden

    def _down(self, frames: int, others: int, last: bool) -> tuple[int, int]:
        time, waiting, convolution = self.stage.strides[0], self.skips[0], self.convolutions[0]
        if time == 2:
            doubled = bool(frames) and not self.begun
            copied = (frames + 1) * self.frame_in if doubled else waiting.joined(frames)
            self.ledger.moment(others + copied)
            count = waiting.frames + frames + doubled
            if not last:
                waiting.keep(count % 2, others + copied)
            self.begun, frames, others = True, count // 2 * 2, others + copied
        skip = frames // time * self.frame
        self.ledger.moment(others + frames * self.frame_in + skip)  # folded, and its mean
        made = convolution(frames, others + skip, last) // time
        self.ledger.moment(others + 3 * skip)  # before and after folding; then the sum
        return made, made * self.frame

    def _end(self, frames: int, others: int, last: bool) -> tuple[int, int]:
        """Norm, bend, SiLU and the convolution; of the decoder, then from patches to pixels."""
        x = frames * self.frame_in
        self.ledger.moment(others + (3 if self.stage.level else 2) * x)
        made = self.convolutions[0](frames, others + x, last)
        if not self.causal:
            self.ledger.moment(others + 2 * made * self.frame)
        return made, made * self.frame


def _set_up(ledger: _Ledger, stages: Sequence[VAEStage], plane: Plane, size: int, *, causal: bool) -> Iterator[_Stage]:
    for stage in stages:
        made = _Stage(ledger, stage, plane, size, causal=causal)
        plane = made.plane
        yield made


@cache
def decode_bytes(
    config: VAEConfig, grid: LatentGrid, size: int, *, handed: int = CHUNK_FRAMES, together: int = 0
) -> int:
    """The most that `VAE_KEYS.decode_stream` takes besides weights and latents.

    Args:
        size: bytes per number: 2 or 4.
        chunk_frames: frames that a stage hands on at a time, and latent frames that come in.
        winograd_frames: frames that packed convolutions make at a time; 0 where they are not packed.
    """
    ledger = _Ledger(together=together)
    stages = tuple(_set_up(ledger, decoder_stages(config), (grid.height, grid.width), size, causal=False))
    frames = min(grid.frames, SETTLED)
    # Whoever takes the pixels holds the last slice, and its bytes as a picture, while the next is made.
    taken = 3 * handed * prod((SPATIAL_COMPRESSION, SPATIAL_COMPRESSION, grid.height, grid.width)) * (size + 1)
    for start in range(0, frames, handed):
        _descend(ledger, stages, min(handed, frames - start), taken, handed, start + handed >= frames)
    return ledger.peak + activations.SCRATCH


def _descend(ledger: _Ledger, stages: tuple[_Stage, ...], frames: int, others: int, handed: int, last: bool) -> None:
    """Through all stages, slice by slice; what a stage made stays until all of it has come out below."""
    if not stages:
        return
    made, size = stages[0].run(frames, others, last)
    starts = range(0, made, handed) or range(1)
    for start in starts:
        part = min(handed, made - start)
        _descend(ledger, stages[1:], part, others + size, handed, last and start == starts[-1])


@cache
def encode_bytes(config: VAEConfig, grid: LatentGrid, size: int, *, chunk: int = ENCODED, together: int = 0) -> int:
    """The most that `VAE_KEYS.encode` takes besides weights and pixels.

    Args:
        grid: of the latents that come out.
        size: bytes per number: 2 or 4.
        chunk_frames: pixel frames that go through at a time.
        winograd_frames: frames that packed convolutions make at a time; 0 where they are not packed.
    """
    ledger = _Ledger(together=together)
    patches = SPATIAL_COMPRESSION // config.patch_size
    plane = (patches * grid.height, patches * grid.width)
    stages = tuple(_set_up(ledger, encoder_stages(config), plane, size, causal=True))
    frames = min(grid.video_frames, SETTLED * TEMPORAL_COMPRESSION)
    for start in range(0, frames, chunk):
        made = min(chunk, frames - start)
        given = made * stages[0].frame_in  # the patches
        for stage in stages:
            made, given = stage.run(made, given, start + chunk >= frames)
    return ledger.peak + activations.SCRATCH
