"""The model under test: its engine, its fixed request, and what several stages need of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from kadr.memory.device import DTYPES
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.pipeline.engine import Engine
from kadr.pipeline.loading.module_placement import place_module
from kadr.planning.placement import Placement
from kadr.request.request import Request
from kadr.sampling.noise import NoiseStreams
from kadr.sampling.positions import token_positions
from kadr.selftest.scene import NO_PROMPT, OTHER_PROMPT, PROMPT, draw_circle_clip
from kadr.shapes import LatentGrid, Size
from kadr.spec.model import ModelSpec

MAX_TEST_SIDE, MAX_TEST_FRAMES = 512, 25  # enough tokens to fill a GPU, few enough for a CPU
NOISE = NoiseStreams(0)


class Subject:
    """A model under test.

    Args:
        engine: of the model; without a prompt cache, so that the text encoder runs.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def spec(self) -> ModelSpec:
        """The model, known from headers."""
        return self.engine.spec

    @property
    def device(self) -> torch.device:
        """Device that the modules run on."""
        return self.spec.device

    @cached_property
    def size(self) -> Size:
        """Size of a clip: the recipe's for a first pass, at most `MAX_TEST_SIDE` each way."""
        recipe = self.spec.recipe
        factor = recipe.downscale_factor if recipe.multi_scale else 1.0
        sides = (min(MAX_TEST_SIDE, int(side * factor) // 32 * 32) for side in (recipe.size.width, recipe.size.height))
        return Size(*(max(64, side) for side in sides))

    @cached_property
    def frames(self) -> int:
        """Frames of a clip, 8k+1."""
        return min(MAX_TEST_FRAMES, self.spec.recipe.frames)

    @cached_property
    def request(self) -> Request:
        """The fixed request: one pass of the prompt, with seed 0."""
        return Request(prompt=PROMPT, size=self.size, frames=self.frames, seed=0, multi_scale=False)

    @cached_property
    def grid(self) -> LatentGrid:
        """Latent grid of a clip."""
        return LatentGrid.for_video(self.size, self.frames)

    @cached_property
    def embeddings(self) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt embeddings (n, D), on the CPU, of the prompt, of another one and of an empty one."""
        first, second, third = self.engine.encode_prompts(self.request, [PROMPT, OTHER_PROMPT, NO_PROMPT])
        return first, second, third

    @cached_property
    def latents(self) -> Tensor:
        """Normalised latents (1, C, f, h, w) of the drawn clip, fp32, on the CPU."""
        with self.vae_encoder() as vae:
            return self.encode(vae, draw_circle_clip(self.size, self.frames))

    @contextmanager
    def vae_encoder(self) -> Iterator[VAE]:
        """Loads the VAE's encoder as a generation would place it: a plan has no such stage without media."""
        dtype = self.spec.dtype
        module = self.engine.loader.load_vae_encoder(dtype, keep_storage_dtype=False)
        placed = place_module(module, Placement(dtype=_dtype_name(dtype)), self.device)
        assert isinstance(placed, VAE)
        yield placed

    def encode(self, vae: VAE, pixels: Tensor) -> Tensor:
        """Encodes pixels (1, 3, F, H, W) in [-1, 1] to normalised latents, fp32, on the CPU."""
        return vae.encode(pixels.to(self.device, self.spec.dtype)).float().cpu()

    @contextmanager
    def vae_decoder(self) -> Iterator[VAE]:
        """Acquires the VAE's decoder in its planned placement."""
        with self.engine.start(self.request, stages=("decode",)) as generation, generation.modules.vae_decoder() as vae:
            yield vae

    def decode(self, vae: VAE, latents: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Decodes normalised latents to pixels (1, 3, F, H, W), fp32, on the CPU; without decode noise."""
        timestep = None
        if vae.config.timestep_conditioning:
            timestep = torch.full((1,), self.spec.recipe.decode_timestep, device=self.device)
        counts = iter(range(1 << 30))
        chunks = vae.decode_stream(
            latents.to(self.device, dtype or self.spec.dtype),
            timestep=timestep,
            noise_source=lambda shape: NOISE.draw(f"injection {next(counts)}", shape),
        )
        return torch.cat([chunk.float().cpu() for chunk in chunks], 2)

    @contextmanager
    def clip_denoiser(
        self, engine: Engine | None = None, lora_strengths: Sequence[float] | None = None
    ) -> Iterator[ClipDenoiser]:
        """Acquires the transformer in its planned placement, with LoRAs off unless strengths are given.

        Args:
            engine: of the same model in another placement.
        """
        engine = engine or self.engine
        loras = self.spec.loras
        strengths = None if loras.is_merged else lora_strengths or [0.0] * len(loras.entries)
        with (
            engine.start(self.request, stages=("denoise",)) as generation,
            generation.modules.transformer(0, None, strengths) as module,
        ):
            yield ClipDenoiser(self, module, generation.modules.placement("denoise"))

    def second_engine(self, *, offload: str | None = None) -> Engine:
        """Returns another engine of the same model, with nothing loaded.

        Args:
            offload: see `Engine.open`; None for the same.
        """
        return Engine(replace(self.spec, offload=offload or self.spec.offload), prompt_cache=False)


class ClipDenoiser:
    """The transformer of a subject, as a function of latents, sigma and a prompt."""

    def __init__(self, subject: Subject, module: Transformer, placement: Placement) -> None:
        self.subject, self.module, self.placement = subject, module, placement
        self.dtype = DTYPES[placement.dtype]
        spec = subject.spec
        positions = token_positions(
            subject.grid, fps=spec.recipe.fps, causal=spec.transformer_config.causal_temporal_positioning
        )
        self._rope = module.compute_rope(positions[None].to(subject.device))

    def predict(self, latents: Tensor, sigma: float, embeddings: Tensor) -> Tensor:
        """Predicts the velocity of latents (1, C, f, h, w): tokens (N, C), fp32, on the CPU."""
        device = self.subject.device
        tokens = latents.flatten(2).transpose(1, 2).to(device, self.dtype)
        text = embeddings[None].to(device, self.dtype)
        sigmas = torch.full((1, 1), sigma, device=device)
        return self.module(tokens, self._rope, text, None, sigmas)[0].float().cpu()

    def predict_clip(self, sigma: float, embeddings: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the velocity predicted of latents mixed with fixed noise, and the true one, (N, C) each."""
        noise = self.noise(latents)
        predicted = self.predict((1 - sigma) * latents + sigma * noise, sigma, embeddings)
        return predicted, (noise - latents)[0].flatten(1).T

    @staticmethod
    def noise(latents: Tensor) -> Tensor:
        """Returns the fixed noise, fp32, in the shape of latents."""
        return NOISE.draw("initial", latents.shape)


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)
