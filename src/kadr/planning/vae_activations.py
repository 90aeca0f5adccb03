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
from kadr.planning.vae_stages import (
    CONV_OUT,
    DEPTH_TO_SPACE,
    RES_X,
    RES_X_Y,
    SPACE_TO_DEPTH,
    STRIDED_CONV,
    VAEStage,
    decoder_stages,
    encoder_stages,
)
from kadr.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, LatentGrid

ENCODE_CHUNK_FRAMES = 8  # pixel frames that go through the encoder at a time
# Latent frames after which a stream has come into its stride: the deepest stage waits for 31 at most, and from there on
# the pattern repeats with every one. A longer stream has no worse moment.
STEADY_STATE_FRAMES = 40
Plane = tuple[int, int]  # rows, columns


class _Ledger:
    """Bytes that layers keep from call to call, and the most that there were at any moment.

    winograd_frames: frames that packed convolutions of stride 1 make at a time; 0 where they are not packed.
    """

    def __init__(self, *, winograd_frames: int) -> None:
        self.cached_bytes = self.peak_bytes = 0
        self.winograd_frames = winograd_frames

    def record(self, other_bytes: int) -> None:
        self.peak_bytes = max(self.peak_bytes, self.cached_bytes + other_bytes)


class _FrameCache:
    """Frames that a layer keeps for the next chunk. frame: bytes of one."""

    def __init__(self, ledger: _Ledger, frame_bytes: int) -> None:
        self.ledger, self.frame_bytes, self.frames = ledger, frame_bytes, 0

    def concatenated_bytes(self, frames: int) -> int:
        """Bytes of one tensor of the kept frames and so many new ones; none is made where nothing is kept."""
        return (self.frames + frames) * self.frame_bytes if self.frames else 0

    def store(self, frames: int, other_bytes: int) -> None:
        """Keep so many instead. The old ones go when the new ones have been copied."""
        self.ledger.record(other_bytes + frames * self.frame_bytes)
        self.ledger.cached_bytes += (frames - self.frames) * self.frame_bytes
        self.frames = frames


class _Conv:
    """A 3 x 3 x 3 convolution; see `nn.conv`.

    Args:
        channels: before and after.
        plane: rows and columns before.
        strides: over frames, rows and columns.
    """

    def __init__(
        self, ledger: _Ledger, channels: tuple[int, int], plane: Plane, itemsize: int, strides: Strides, *, causal: bool
    ) -> None:
        self.ledger, self.channels, self.plane, self.itemsize, self.causal = ledger, channels, plane, itemsize, causal
        self.temporal_stride, down, across = strides
        self.out_plane = (plane[0] // down, plane[1] // across)
        self.in_frame_bytes = channels[0] * prod(plane) * itemsize
        self.out_frame_bytes = channels[1] * prod(self.out_plane) * itemsize
        self.cache, self.has_started = _FrameCache(ledger, self.in_frame_bytes), False

    def __call__(self, frames: int, other_bytes: int, is_last: bool) -> int:
        """Frames in -> frames out."""
        front = self.cache.frames if self.has_started else (2 if self.causal else 1) * bool(frames)
        count = front + frames
        if is_last and not self.causal:  # the last frame is repeated, for which all are copied once more
            self.ledger.record(other_bytes + (2 * count + 1) * self.in_frame_bytes)
            count += 1
        made, joined = max(0, (count - KERNEL_SIZE) // self.temporal_stride + 1), count * self.in_frame_bytes
        self.ledger.record(other_bytes + joined)
        if frames:
            self.has_started = True
            if not is_last:
                self.cache.store(count - made * self.temporal_stride, other_bytes + joined)
        if made:
            before, after = (count, *self.plane), (made, *self.out_plane)
            if self.ledger.winograd_frames and self.plane == self.out_plane and self.temporal_stride == 1:
                besides = activations.winograd_workspace_bytes(
                    self.channels, before, after, self.itemsize, self.ledger.winograd_frames
                )
            else:
                besides = activations.conv_workspace_bytes(self.channels, before, after, self.itemsize)
            self.ledger.record(other_bytes + joined + made * self.out_frame_bytes + besides)
        return made


class _Stage:
    """A stage at work. A call takes frames and returns frames, and the bytes of the tensor that they lie in.

    Args:
        plane: rows and columns before it.
        itemsize: bytes per number.
    """

    def __init__(self, ledger: _Ledger, stage: VAEStage, plane: Plane, itemsize: int, *, causal: bool) -> None:
        self.ledger, self.stage, self.causal = ledger, stage, causal
        _, down, across = stage.strides
        grows = stage.kind == DEPTH_TO_SPACE
        self.plane = (plane[0] * down, plane[1] * across) if grows else (plane[0] // down, plane[1] // across)
        self.in_frame_bytes, self.out_frame_bytes = (
            stage.in_channels * prod(plane) * itemsize,
            stage.out_channels * prod(self.plane) * itemsize,
        )
        strides = stage.strides if stage.kind == STRIDED_CONV else (1, 1, 1)  # others fold what a plain one made
        self.convs = [
            _Conv(ledger, channels, plane, itemsize, strides, causal=causal) for channels in stage.conv_channels
        ]
        self.skip_caches = [_FrameCache(ledger, self.in_frame_bytes) for _ in self.convs[::2]]
        self.has_started = False
        ways = {
            RES_X: self._run_res_blocks,
            RES_X_Y: self._run_res_blocks,
            DEPTH_TO_SPACE: self._run_depth_to_space,
            SPACE_TO_DEPTH: self._run_space_to_depth,
            CONV_OUT: self._run_conv_out,
        }
        self.run: Callable[[int, int, bool], tuple[int, int]] = ways.get(stage.kind, self._run_conv)

    def _run_conv(self, frames: int, other_bytes: int, is_last: bool) -> tuple[int, int]:
        made = self.convs[0](frames, other_bytes, is_last)
        return made, made * self.out_frame_bytes

    def _run_res_blocks(self, frames: int, other_bytes: int, is_last: bool) -> tuple[int, int]:
        given = 0  # the input of the first layer is the caller's
        for skip, one, two in zip(self.skip_caches, self.convs[::2], self.convs[1::2], strict=True):
            main = self._run_norm_act_conv(one, frames, other_bytes + given, is_last)
            made = self._run_norm_act_conv(two, main, other_bytes + given + main * one.out_frame_bytes, is_last)
            out, joined = made * self.out_frame_bytes, skip.concatenated_bytes(frames)
            if not is_last:
                skip.store(skip.frames + frames - made, other_bytes + given + out + joined)
            if self.stage.kind == RES_X_Y and made:
                # The norm copies what comes with other strides; its outcome goes through a convolution of its own.
                self.ledger.record(other_bytes + given + joined + 2 * out + 2 * made * self.in_frame_bytes)
                joined = out
            self.ledger.record(other_bytes + given + joined + 2 * out)
            frames, given = made, out
        return frames, given

    def _run_norm_act_conv(self, conv: _Conv, frames: int, other_bytes: int, is_last: bool) -> int:
        """Norm, bend and SiLU, then the convolution, then noise."""
        x = frames * conv.in_frame_bytes
        self.ledger.record(other_bytes + (3 if self.stage.timestep_conditioning else 2) * x)
        made = conv(frames, other_bytes + x, is_last)
        if self.stage.inject_noise:
            self.ledger.record(other_bytes + (2 * made + 1) * conv.out_frame_bytes)
        return made

    def _run_depth_to_space(self, frames: int, other_bytes: int, is_last: bool) -> tuple[int, int]:
        made = self.convs[0](frames, other_bytes, is_last)
        out = made * self.convs[0].out_frame_bytes
        self.ledger.record(other_bytes + 2 * out)
        if self.stage.residual:
            skip, small = self.skip_caches[0], made * self.in_frame_bytes
            joined = skip.concatenated_bytes(frames)
            if not is_last:
                skip.store(skip.frames + frames - made, other_bytes + out + joined)
            self.ledger.record(other_bytes + out + joined + small)
            self.ledger.record(other_bytes + 2 * out + small)  # unfolded, the unfolded skip, and the sum
        time = self.stage.strides[0]
        dropped = time == 2 and made > 0 and not self.has_started
        self.has_started = self.has_started or made > 0
        return made * time - dropped, out  # what is dropped is only hidden

    def _run_space_to_depth(self, frames: int, other_bytes: int, is_last: bool) -> tuple[int, int]:
        time, waiting, convolution = self.stage.strides[0], self.skip_caches[0], self.convs[0]
        if time == 2:
            doubled = bool(frames) and not self.has_started
            copied = (frames + 1) * self.in_frame_bytes if doubled else waiting.concatenated_bytes(frames)
            self.ledger.record(other_bytes + copied)
            count = waiting.frames + frames + doubled
            if not is_last:
                waiting.store(count % 2, other_bytes + copied)
            self.has_started, frames, other_bytes = True, count // 2 * 2, other_bytes + copied
        skip = frames // time * self.out_frame_bytes
        self.ledger.record(other_bytes + frames * self.in_frame_bytes + skip)  # folded, and its mean
        made = convolution(frames, other_bytes + skip, is_last) // time
        self.ledger.record(other_bytes + 3 * skip)  # before and after folding; then the sum
        return made, made * self.out_frame_bytes

    def _run_conv_out(self, frames: int, other_bytes: int, is_last: bool) -> tuple[int, int]:
        """Norm, bend, SiLU and the convolution; of the decoder, then from patches to pixels."""
        x = frames * self.in_frame_bytes
        self.ledger.record(other_bytes + (3 if self.stage.timestep_conditioning else 2) * x)
        made = self.convs[0](frames, other_bytes + x, is_last)
        if not self.causal:
            self.ledger.record(other_bytes + 2 * made * self.out_frame_bytes)
        return made, made * self.out_frame_bytes


def _build_stages(
    ledger: _Ledger, stages: Sequence[VAEStage], plane: Plane, itemsize: int, *, causal: bool
) -> Iterator[_Stage]:
    for stage in stages:
        made = _Stage(ledger, stage, plane, itemsize, causal=causal)
        plane = made.plane
        yield made


@cache
def vae_decode_activation_bytes(
    config: VAEConfig, grid: LatentGrid, itemsize: int, *, chunk_frames: int = CHUNK_FRAMES, winograd_frames: int = 0
) -> int:
    """The most that `VAE_KEYS.decode_stream` takes besides weights and latents.

    Args:
        itemsize: bytes per number: 2 or 4.
        chunk_frames: frames that a stage hands on at a time, and latent frames that come in.
        winograd_frames: frames that packed convolutions make at a time; 0 where they are not packed.
    """
    ledger = _Ledger(winograd_frames=winograd_frames)
    stages = tuple(_build_stages(ledger, decoder_stages(config), (grid.height, grid.width), itemsize, causal=False))
    frames = min(grid.frames, STEADY_STATE_FRAMES)
    # Whoever takes the pixels holds the last slice, and its bytes as a picture, while the next is made.
    taken = (
        3 * chunk_frames * prod((SPATIAL_COMPRESSION, SPATIAL_COMPRESSION, grid.height, grid.width)) * (itemsize + 1)
    )
    for start in range(0, frames, chunk_frames):
        _run_stages(
            ledger, stages, min(chunk_frames, frames - start), taken, chunk_frames, start + chunk_frames >= frames
        )
    return ledger.peak_bytes + activations.KERNEL_WORKSPACE_BYTES


def _run_stages(
    ledger: _Ledger, stages: tuple[_Stage, ...], frames: int, other_bytes: int, chunk_frames: int, is_last: bool
) -> None:
    """Through all stages, slice by slice; what a stage made stays until all of it has come out below."""
    if not stages:
        return
    made, size = stages[0].run(frames, other_bytes, is_last)
    starts = range(0, made, chunk_frames) or range(1)
    for start in starts:
        part = min(chunk_frames, made - start)
        _run_stages(ledger, stages[1:], part, other_bytes + size, chunk_frames, is_last and start == starts[-1])


@cache
def vae_encode_activation_bytes(
    config: VAEConfig,
    grid: LatentGrid,
    itemsize: int,
    *,
    chunk_frames: int = ENCODE_CHUNK_FRAMES,
    winograd_frames: int = 0,
) -> int:
    """The most that `VAE_KEYS.encode` takes besides weights and pixels.

    Args:
        grid: of the latents that come out.
        itemsize: bytes per number: 2 or 4.
        chunk_frames: pixel frames that go through at a time.
        winograd_frames: frames that packed convolutions make at a time; 0 where they are not packed.
    """
    ledger = _Ledger(winograd_frames=winograd_frames)
    patches = SPATIAL_COMPRESSION // config.patch_size
    plane = (patches * grid.height, patches * grid.width)
    stages = tuple(_build_stages(ledger, encoder_stages(config), plane, itemsize, causal=True))
    frames = min(grid.video_frames, STEADY_STATE_FRAMES * TEMPORAL_COMPRESSION)
    for start in range(0, frames, chunk_frames):
        made = min(chunk_frames, frames - start)
        given = made * stages[0].in_frame_bytes  # the patches
        for stage in stages:
            made, given = stage.run(made, given, start + chunk_frames >= frames)
    return ledger.peak_bytes + activations.KERNEL_WORKSPACE_BYTES
