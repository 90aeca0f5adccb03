"""VAE decode, the last stage: latents to frames, streamed chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kadr.media.postprocess import crop_margins, denormalize, resize_frames, to_float, to_uint8
from kadr.memory.host_copies import copy_to_host
from kadr.models.vae.decoder import CHUNK_FRAMES
from kadr.pipeline.finite_check import FiniteCheck
from kadr.pipeline.longvideo.sampling import WindowedLatents, rechunk
from kadr.pipeline.modules import Modules
from kadr.pipeline.progress import StageProgress, Watch
from kadr.pipeline.retry import retry_frames_in_fp32, retry_frames_on_oom
from kadr.request.passes import window_stream_name
from kadr.request.resolved_request import ResolvedRequest
from kadr.sampling.latents import tone_map
from kadr.sampling.noise import NoiseSource


@dataclass(frozen=True)
class DecodeStage:
    """Streamed VAE decode of one request.

    Args:
        request: a resolved request; the latents of its last pass are decoded.
    """

    modules: Modules
    request: ResolvedRequest
    noise_streams: NoiseSource
    watch: Watch
    as_float: bool = False

    def decode(self, latents: Tensor | WindowedLatents, noise: Tensor | None) -> Iterator[Tensor]:
        """Yields frames (n, H, W, 3) on the CPU, cropped and trimmed as requested, from latents (1, C, f, h, w).

        They are uint8, or with `as_float` float32 in [0, 1].

        Args:
            noise: decode noise in the shape of the latents, instead of the seed's, for decoders that take noise.
        """
        decode = retry_frames_on_oom(self.modules, "decode", partial(self._decode, latents, noise))
        yield from retry_frames_in_fp32(self.modules, "decode", decode)

    def _decode(
        self, latents: Tensor | WindowedLatents, noise: Tensor | None, dtype: torch.dtype | None
    ) -> Iterator[Tensor]:
        """Decodes as `decode` does, without its retries. dtype: dtype to compute in, instead of the plan's."""
        progress, frames_done = StageProgress("decode", self.request.frames, self.watch), 0
        for frames in copy_to_host(self._decode_on_device(latents, noise, dtype)):
            frames_done += len(frames)
            yield frames
            progress.report(frames_done)

    def _decode_on_device(
        self, latents: Tensor | WindowedLatents, noise: Tensor | None, dtype: torch.dtype | None
    ) -> Iterator[Tensor]:
        """Yields frames as `decode` does, on the device.

        Those on a GPU are known to be finite when the next ones come, or none: `copy_to_host` passes them on only then.
        """
        modules, request = self.modules, self.request
        finite_check = FiniteCheck.for_device(modules.device)
        sampled_size, frames_done = request.sampled_size, 0
        stage_dtype = dtype or modules.stage_dtype("decode")
        with modules.vae_decoder(dtype) as vae:
            takes_noise, injected_noise = vae.config.timestep_conditioning, _InjectedNoise(self.noise_streams)
            timestep = None
            if takes_noise:
                timestep = torch.full((1,), request.decode_timestep, device=modules.device)
            chunk_frames = modules.placement("decode").chunk_frames or CHUNK_FRAMES
            prepared = self._prepare_latents(latents, noise, add_noise=takes_noise)
            chunks = rechunk((window_latents.to(stage_dtype) for window_latents in prepared), chunk_frames)
            count = request.passes[-1].grid.frames
            for chunk in vae.decode_chunks(
                chunks, count, timestep=timestep, noise_source=injected_noise, chunk_frames=chunk_frames
            ):
                finite_check.check(chunk, f"frame {frames_done + 1} of {request.frames}")
                unit_range = crop_margins(resize_frames(denormalize(chunk[0]), sampled_size), request.size)
                frames = (to_float if self.as_float else to_uint8)(unit_range)[: request.frames - frames_done]
                frames_done += len(frames)
                if not frames.is_cuda:  # the next check would come too late
                    finite_check.synchronize()
                if len(frames):
                    yield frames
            finite_check.synchronize()

    def _prepare_latents(
        self, latents: Tensor | WindowedLatents, noise: Tensor | None, *, add_noise: bool
    ) -> Iterator[Tensor]:
        """Yields the latents window by window: decode noise mixed in if the decoder takes it, then tone mapped."""
        decode_noise, compression = self.request.decode_noise, self.request.passes[-1].settings.tone_map or 0.0
        windows = [latents] if isinstance(latents, Tensor) else latents
        for window_index, window_latents in enumerate(windows):
            window_latents = window_latents.to(self.modules.device)
            if add_noise:
                window_noise = self._window_noise(window_index, window_latents.shape, noise)
                window_latents = (1 - decode_noise) * window_latents + decode_noise * window_noise.to(window_latents)
            yield tone_map(window_latents, compression)

    def _window_noise(self, window_index: int, shape: torch.Size, noise: Tensor | None) -> Tensor:
        """Returns the decode noise of a window: its frames of `noise`, or drawn where that is None."""
        if noise is None:
            return self.noise_streams.draw(window_stream_name("decode", window_index), shape)
        if not self.request.spans:
            return noise
        start = self.request.spans[window_index].output_start
        return noise[:, :, start : start + shape[2]]


class _InjectedNoise:
    """Source of the noise that a 0.9.1 decoder injects: one stream per injection, in the order they occur."""

    def __init__(self, noise_streams: NoiseSource) -> None:
        self.noise_streams, self.count = noise_streams, 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.count += 1
        return self.noise_streams.draw(f"injection {self.count}", shape)
