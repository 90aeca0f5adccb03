"""The last stage: latents to frames, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kadr.media.postprocess import crop_margins, denormalize, resize_frames, to_uint8
from kadr.models.vae.decoder import CHUNK_FRAMES
from kadr.pipeline.components import Components
from kadr.pipeline.finite_check import FiniteCheck
from kadr.pipeline.longvideo.sampling import WindowedLatents, rechunk
from kadr.pipeline.progress import StageProgress, Watch
from kadr.pipeline.retry import retry_frames_in_fp32, retry_frames_on_oom
from kadr.request.passes import ResolvedPass, window_stream_name
from kadr.request.request import Request
from kadr.request.windows import Span
from kadr.sampling.latents import tone_map
from kadr.sampling.noise import NoiseStreams
from kadr.shapes import LatentGrid, Size


@dataclass(frozen=True)
class DecodeStage:
    """What the frames of one request are made with.

    Args:
        request: nothing in it is open that has a default.
        last_pass: of the last pass.
        spans: the windows of a long video; () of any other.
    """

    components: Components
    request: Request
    last_pass: ResolvedPass
    spans: tuple[Span, ...]
    noise_streams: NoiseStreams
    watch: Watch

    def decode(self, latents: Tensor | WindowedLatents, noise: Tensor | None) -> Iterator[Tensor]:
        """uint8 (n, H, W, 3) on the CPU, cropped and trimmed as asked, of latents (1, C, f, h, w).

        Args:
            noise: shaped as the latents, instead of the seed's, for decoders that take noise.
        """
        run = retry_frames_on_oom(self.components, "decode", partial(self._decode, latents, noise))
        yield from retry_frames_in_fp32("decode", self.components.stage_dtype("decode"), run)

    def _decode(
        self, latents: Tensor | WindowedLatents, noise: Tensor | None, dtype: torch.dtype | None
    ) -> Iterator[Tensor]:
        """As `frames`; dtype: to compute in, instead of the plan's."""
        components, request = self.components, self.request
        assert isinstance(request.size, Size)
        assert request.frames is not None
        stage, watchman = StageProgress("decode", request.frames, self.watch), FiniteCheck.for_device(components.device)
        made, done = request.size.snap(), 0
        own = dtype or components.stage_dtype("decode")
        with components.vae_decoder(dtype) as vae:
            conditioned, injected = vae.config.timestep_conditioning, _InjectedNoise(self.noise_streams)
            level = None
            if conditioned:
                assert request.decode_timestep is not None
                level = torch.full((1,), request.decode_timestep, device=components.device)
            handed = components.placement("decode").chunk_frames or CHUNK_FRAMES
            chunks = rechunk(
                (part.to(own) for part in self._prepare_latents(latents, noise, add_noise=conditioned)), handed
            )
            count = LatentGrid.for_video(self.last_pass.size, self.last_pass.frames).frames
            for chunk in vae.decode_chunks(chunks, count, timestep=level, noise_source=injected, chunk_frames=handed):
                watchman.check(chunk, f"frame {done + 1} of {request.frames}")
                unit = crop_margins(resize_frames(denormalize(chunk[0]), made), request.size)
                frames = to_uint8(unit)[: request.frames - done].cpu()
                watchman.synchronize()  # the frames have come, so the answer has
                done += len(frames)
                if len(frames):
                    yield frames
                    stage.report(done)

    def _prepare_latents(
        self, latents: Tensor | WindowedLatents, noise: Tensor | None, *, add_noise: bool
    ) -> Iterator[Tensor]:
        """The latents, tone mapped, with the noise mixed in that the decoder may expect; those of each window apart."""
        share, pressed = self.request.decode_noise, self.last_pass.settings.tone_map
        assert share is not None
        assert pressed is not None
        for number, part in enumerate([latents] if isinstance(latents, Tensor) else latents):
            part = part.to(self.components.device)
            if add_noise:
                own = (
                    self.noise_streams.draw(window_stream_name("decode", number), part.shape)
                    if noise is None
                    else noise
                )
                if noise is not None and self.spans:
                    own = noise[:, :, (start := self.spans[number].output_start) : start + part.shape[2]]
                part = (1 - share) * part + share * own.to(part)
            yield tone_map(part, pressed)


class _InjectedNoise:
    """Noise for the places where a decoder injects it, one stream each, in the order they come up."""

    def __init__(self, noise_streams: NoiseStreams) -> None:
        self.noise_streams, self.count = noise_streams, 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.count += 1
        return self.noise_streams.draw(f"injection {self.count}", shape)
