"""The video VAE: pixels (B, 3, 8k+1, 32h, 32w) to latents (B, C, k+1, h, w) and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    """What the encoder says of a video: mean (B, C, f, h, w) and one log variance per position (B, 1, f, h, w)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """A latent drawn with the given standard normal noise, shaped as the mean."""
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
    """Encoder, decoder and latent statistics. Latents are normalised unless said otherwise."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.statistics = LatentStatistics(config.latent_channels)

    def encode_moments(self, pixels: Tensor, *, chunk_frames: int | None = None) -> Moments:
        """pixels (B, 3, 8k+1, 32h, 32w) in [-1, 1] -> moments, not normalised. `chunk_frames` frames go through at a time."""
        frames = pixels.shape[2]
        return self.encode_moments_stream(iter(pixels.split(chunk_frames or frames, dim=2)), frames)

    def encode_moments_stream(self, chunks: Iterator[Tensor], frames: int) -> Moments:
        """As `moments`, of pixels (B, 3, n, 32h, 32w) that come one chunk after the other, `frames` of them in all.

        The moments are the same; no chunk is held while the next one is made.

        Raises:
            ValueError: the frames are not 8k+1, or not as many come.
        """
        if frames % TEMPORAL_COMPRESSION != 1:
            raise ValueError(
                f"{frames} frames; the encoder takes {TEMPORAL_COMPRESSION}k+1, and what is over would be lost"
            )
        stream, done, made = TemporalCache(), 0, []
        for part in chunks:
            done += part.shape[2]
            stream.is_last_chunk = done >= frames
            made.append(self.encoder(part, stream))
            del part
        if done != frames:
            raise ValueError(f"{done} frames came, and {frames} were to come")
        joined = torch.cat(made, dim=2)
        return Moments(joined[:, :-1], joined[:, -1:])

    def encode(self, pixels: Tensor, *, noise: Tensor | None = None, chunk_frames: int | None = None) -> Tensor:
        """pixels -> normalised latents (B, C, f, h, w): the mean, or with `noise` (shaped as the latents) a sample."""
        moments = self.encode_moments(pixels, chunk_frames=chunk_frames)
        return self.statistics.normalise(moments.mean if noise is None else moments.sample(noise))

    def encode_stream(self, chunks: Iterator[Tensor], frames: int) -> Tensor:
        """As `encode`, the mean, of pixels that come in chunks; see `moments_stream`."""
        return self.statistics.normalise(self.encode_moments_stream(chunks, frames).mean)

    def decode(
        self, latents: Tensor, *, timestep: Tensor | None = None, noise_source: NoiseSource | None = None
    ) -> Tensor:
        """Normalised latents (B, C, f, h, w) -> pixels (B, 3, 8(f-1)+1, 32h, 32w), about [-1, 1].

        Args:
            timestep: (B) the decode timestep in [0, 1], for decoders conditioned on it.
            noise_source: source of injected noise, for decoders that inject it (0.9.1).
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
        """As `decode`, `input_chunk_frames` latent frames at a time: yields pixels (B, 3, n, H, W) as they are ready.

        The pixels are the same; the memory does not grow with the number of frames.

        Args:
            input_chunk_frames: as many as are handed on, unless told otherwise.
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
        """As `decode_stream`, of latents (B, C, n, h, w) that come in chunks, `frames` of them in all."""
        stream, done = TemporalCache(noise_source=noise_source), 0
        for part in chunks:
            done += part.shape[2]
            stream.is_last_chunk = done >= frames
            yield from self.decoder.forward_chunks(
                self.statistics.denormalise(part), stream, timestep, chunk_frames=chunk_frames
            )
