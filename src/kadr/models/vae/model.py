"""The video VAE: encodes pixels (B, 3, 8k+1, 32h, 32w) to latents (B, C, k+1, h, w), and decodes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kadr.models.vae.config import VAEConfig
from kadr.models.vae.decoder import CHUNK_FRAMES, Decoder
from kadr.models.vae.encoder import Encoder
from kadr.nn.temporal_cache import NoiseSource, TemporalCache
from kadr.shapes import TEMPORAL_COMPRESSION


@dataclass(frozen=True)
class Moments:
    """The encoder's output: mean (B, C, f, h, w) and one log variance per position (B, 1, f, h, w)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Samples latents with standard normal noise, shaped as the mean."""
        return self.mean + (0.5 * self.log_variance.clamp(-30.0, 20.0)).exp() * noise


class LatentStatistics(nn.Module):
    """Mean and standard deviation of each latent channel over the training set."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def normalise(self, latents: Tensor) -> Tensor:
        return (latents - self._per_channel(self.mean, latents)) / self._per_channel(self.std, latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents * self._per_channel(self.std, latents) + self._per_channel(self.mean, latents)

    @staticmethod
    def _per_channel(row: Tensor, latents: Tensor) -> Tensor:
        return row.to(latents)[None, :, None, None, None]


class VAE(nn.Module):
    """Encoder, decoder and latent statistics. Latents are normalised unless a docstring says otherwise."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.statistics = LatentStatistics(config.latent_channels)

    def encode_moments(self, pixels: Tensor, *, chunk_frames: int | None = None) -> Moments:
        """Encodes pixels (B, 3, 8k+1, 32h, 32w) in [-1, 1], `chunk_frames` at a time, to moments, not normalised."""
        frames = pixels.shape[2]
        return self.encode_moments_stream(iter(pixels.split(chunk_frames or frames, dim=2)), frames)

    def encode_moments_stream(self, chunks: Iterator[Tensor], frames: int) -> Moments:
        """Encodes pixels that come in chunks (B, 3, n, 32h, 32w), with `frames` frames in all, to the same moments.

        Each chunk is released before the next one is taken from `chunks`.

        Raises:
            ValueError: `frames` is not of the form 8k+1, or the chunks have another number of frames.
        """
        _check_frames(frames)
        cache, frames_done, outputs = TemporalCache(), 0, []
        for chunk in chunks:
            frames_done += chunk.shape[2]
            cache.is_last_chunk = frames_done >= frames
            outputs.append(self.encoder(chunk, cache))
            del chunk
        if frames_done != frames:
            raise ValueError(f"the chunks have {frames_done} frames, not {frames}")
        moments = torch.cat(outputs, dim=2)
        return Moments(moments[:, :-1], moments[:, -1:])

    def encode(self, pixels: Tensor, *, noise: Tensor | None = None, chunk_frames: int | None = None) -> Tensor:
        """Encodes pixels to normalised latents (B, C, f, h, w): the mean, or with `noise` of that shape a sample."""
        moments = self.encode_moments(pixels, chunk_frames=chunk_frames)
        return self.statistics.normalise(moments.mean if noise is None else moments.sample(noise))

    def encode_stream(
        self, chunks: Iterator[Tensor], frames: int, draw_noise: Callable[[torch.Size], Tensor] | None = None
    ) -> Tensor:
        """Encodes pixels that come in chunks to normalised latents: the mean, or a sample; see `encode_moments_stream`.

        Args:
            draw_noise: draws the noise of a sample, in the shape of the mean; None for the mean.
        """
        moments = self.encode_moments_stream(chunks, frames)
        noise = None if draw_noise is None else draw_noise(moments.mean.shape).to(moments.mean)
        return self.statistics.normalise(moments.mean if noise is None else moments.sample(noise))

    def decode(
        self, latents: Tensor, *, timestep: Tensor | None = None, noise_source: NoiseSource | None = None
    ) -> Tensor:
        """Decodes normalised latents (B, C, f, h, w) to pixels (B, 3, 8(f-1)+1, 32h, 32w), about [-1, 1].

        Args:
            timestep: (B) the decode timestep in [0, 1], for decoders with timestep conditioning.
            noise_source: draws the injected noise, for decoders that inject it (0.9.1).
        """
        return self.decoder(self.statistics.denormalise(latents), TemporalCache.single_chunk(noise_source), timestep)

    def decode_stream(
        self,
        latents: Tensor,
        *,
        timestep: Tensor | None = None,
        noise_source: NoiseSource | None = None,
        input_chunk_frames: int | None = None,
        chunk_frames: int = CHUNK_FRAMES,
    ) -> Iterator[Tensor]:
        """Yields the pixels of `decode` chunk by chunk, (B, 3, n, H, W), in memory that does not grow with the frames.

        Args:
            input_chunk_frames: latent frames taken at a time; None: `chunk_frames`.
            chunk_frames: see `Decoder.forward_chunks`.
        """
        chunks = latents.split(input_chunk_frames or chunk_frames, dim=2)
        yield from self.decode_chunks(
            chunks, latents.shape[2], timestep=timestep, noise_source=noise_source, chunk_frames=chunk_frames
        )

    def decode_chunks(
        self,
        chunks: Iterable[Tensor],
        frames: int,
        *,
        timestep: Tensor | None = None,
        noise_source: NoiseSource | None = None,
        chunk_frames: int = CHUNK_FRAMES,
    ) -> Iterator[Tensor]:
        """Decodes like `decode_stream`, from latents in chunks (B, C, n, h, w), with `frames` latent frames in all."""
        cache, frames_done = TemporalCache(noise_source=noise_source), 0
        for chunk in chunks:
            frames_done += chunk.shape[2]
            cache.is_last_chunk = frames_done >= frames
            yield from self.decoder.forward_chunks(
                self.statistics.denormalise(chunk), cache, timestep, chunk_frames=chunk_frames
            )


def _check_frames(frames: int) -> None:
    if frames % TEMPORAL_COMPRESSION != 1:
        raise ValueError(f"{frames} frames; the encoder takes {TEMPORAL_COMPRESSION}k+1 and would lose those beyond")
