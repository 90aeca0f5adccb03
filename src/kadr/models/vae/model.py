"""The video VAE: pixels (B, 3, 8k+1, 32h, 32w) to latents (B, C, k+1, h, w) and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kadr.models.vae.config import VAEConfig
from kadr.models.vae.decoder import SLICE, Decoder
from kadr.models.vae.encoder import Encoder
from kadr.nn.temporal_cache import NoiseSource, Stream
from kadr.shapes import TEMPORAL


@dataclass(frozen=True)
class Moments:
    """What the encoder says of a video: mean (B, C, f, h, w) and one log variance per position (B, 1, f, h, w)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """A latent drawn with the given standard normal noise, shaped as the mean."""
        return self.mean + (0.5 * self.log_variance.clamp(-30.0, 20.0)).exp() * noise


class Statistics(nn.Module):
    """Mean and standard deviation of each latent channel over the training set."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))

    def normalise(self, latents: Tensor) -> Tensor:
        return (latents - self._shaped(self.mean, latents)) / self._shaped(self.deviation, latents)

    def restore(self, latents: Tensor) -> Tensor:
        return latents * self._shaped(self.deviation, latents) + self._shaped(self.mean, latents)

    @staticmethod
    def _shaped(row: Tensor, latents: Tensor) -> Tensor:
        return row.to(latents)[None, :, None, None, None]


class VAE(nn.Module):
    """Encoder, decoder and latent statistics. Latents are normalised unless said otherwise."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.statistics = Statistics(config.latent_channels)

    def moments(self, pixels: Tensor, *, chunk: int | None = None) -> Moments:
        """pixels (B, 3, 8k+1, 32h, 32w) in [-1, 1] -> moments, not normalised. `chunk` frames go through at a time."""
        frames = pixels.shape[2]
        return self.moments_stream(iter(pixels.split(chunk or frames, dim=2)), frames)

    def moments_stream(self, chunks: Iterator[Tensor], frames: int) -> Moments:
        """As `moments`, of pixels (B, 3, n, 32h, 32w) that come one chunk after the other, `frames` of them in all.

        The moments are the same; no chunk is held while the next one is made.

        Raises:
            ValueError: the frames are not 8k+1, or not as many come.
        """
        if frames % TEMPORAL != 1:
            raise ValueError(f"{frames} frames; the encoder takes {TEMPORAL}k+1, and what is over would be lost")
        stream, done, made = Stream(), 0, []
        for part in chunks:
            done += part.shape[2]
            stream.last = done >= frames
            made.append(self.encoder(part, stream))
            del part
        if done != frames:
            raise ValueError(f"{done} frames came, and {frames} were to come")
        joined = torch.cat(made, dim=2)
        return Moments(joined[:, :-1], joined[:, -1:])

    def encode(self, pixels: Tensor, *, noise: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """pixels -> normalised latents (B, C, f, h, w): the mean, or with `noise` (shaped as the latents) a sample."""
        moments = self.moments(pixels, chunk=chunk)
        return self.statistics.normalise(moments.mean if noise is None else moments.sample(noise))

    def encode_stream(self, chunks: Iterator[Tensor], frames: int) -> Tensor:
        """As `encode`, the mean, of pixels that come in chunks; see `moments_stream`."""
        return self.statistics.normalise(self.moments_stream(chunks, frames).mean)

    def decode(self, latents: Tensor, *, level: Tensor | None = None, noise: NoiseSource | None = None) -> Tensor:
        """Normalised latents (B, C, f, h, w) -> pixels (B, 3, 8(f-1)+1, 32h, 32w), about [-1, 1].

        Args:
            level: (B) the decode timestep in [0, 1], for decoders conditioned on it.
            noise: source of injected noise, for decoders that inject it (0.9.1).
        """
        return self.decoder(self.statistics.restore(latents), Stream.whole(noise), level)

    def decode_stream(
        self,
        latents: Tensor,
        *,
        level: Tensor | None = None,
        noise: NoiseSource | None = None,
        chunk: int | None = None,
        handed: int = SLICE,
    ) -> Iterator[Tensor]:
        """As `decode`, `chunk` latent frames at a time: yields pixels (B, 3, n, H, W) as they are ready.

        The pixels are the same; the memory does not grow with the number of frames.

        Args:
            chunk: as many as are handed on, unless told otherwise.
            handed: see `Decoder.pieces`.
        """
        chunks = latents.split(chunk or handed, dim=2)
        yield from self.decode_chunks(chunks, latents.shape[2], level=level, noise=noise, handed=handed)

    def decode_chunks(
        self,
        chunks: Iterable[Tensor],
        frames: int,
        *,
        level: Tensor | None = None,
        noise: NoiseSource | None = None,
        handed: int = SLICE,
    ) -> Iterator[Tensor]:
        """As `decode_stream`, of latents (B, C, n, h, w) that come in chunks, `frames` of them in all."""
        stream, done = Stream(noise=noise), 0
        for part in chunks:
            done += part.shape[2]
            stream.last = done >= frames
            yield from self.decoder.pieces(self.statistics.restore(part), stream, level, handed=handed)
