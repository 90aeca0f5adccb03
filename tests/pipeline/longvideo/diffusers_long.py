"""The long pipeline of diffusers on a model, a request and the noise of kadr: its windows, positions and seams.

Prompts and pictures are encoded by kadr, as other tests compare these.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import LTXEulerAncestralRFScheduler, LTXI2VLongMultiPromptPipeline
from diffusers.pipelines.ltx import pipeline_ltx_i2v_long_multi_prompt as long_module
from torch import Tensor, nn

from kadr import Engine, Request
from kadr.sampling.noise import NoiseStreams
from kadr.sampling.settings import Guidance
from kadr.shapes import Size
from tests.oracles import diffusers_transformer


class _ConditionedTransformer:
    """Gives held tokens the levels that kadr gives them, and steps them by those.

    diffusers tells the network level · (1 - strength) and mixes the given latents in twice at every step, which is
    neither the level told nor that of the official package. What is appended is thrown away afterwards, so it is
    enough to keep those tokens here, and to show the network these instead.
    """

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        self.transformer, self.scheduler, self.tokens = transformer, scheduler, None
        self.config, self.dtype = transformer.config, torch.float32
        self.sigma = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transformer, name)

    def __call__(self, *, hidden_states: Tensor, timestep: Tensor, **rest: Any) -> Any:
        index = self.scheduler._step_index or 0
        now, mask = self.scheduler.sigmas[index], timestep[..., 0] / (1000 * self.scheduler.sigmas[index])
        held = (mask < 1 - 1e-4)[..., None]
        self.tokens = hidden_states if index == 0 else torch.where(held, self.tokens, hidden_states)
        self.sigma = torch.minimum(now, mask)
        return self.transformer(hidden_states=self.tokens, timestep=1000 * self.sigma[..., None], **rest)

    def step(self, velocity: Tensor) -> None:
        """Move the held tokens."""
        assert self.tokens is not None
        below = self.scheduler.sigmas[None, None]
        level = self.sigma[: len(velocity), :, None]
        then = torch.where(below < level - 1e-6, below, 0.0).amax(dim=-1, keepdim=True)
        now = self.scheduler.sigmas[self.scheduler._step_index - 1]
        moved = self.tokens[: len(velocity)] - (level - then) * velocity
        moved = torch.where(now - 1e-6 < level, moved, self.tokens[: len(velocity)])
        self.tokens = torch.cat([moved] * (len(self.tokens) // len(moved)))


def run_diffusers_long(engine: Engine, request: Request, *, is_unpatched: bool = False) -> Tensor:
    """Normalised latents (1, C, f, h, w) of a request whose levels are given.

    Args:
        is_unpatched: with the levels that diffusers gives held tokens.
    """
    request = engine.resolve(request)
    windows, size = request.windows, request.size
    assert windows is not None
    assert isinstance(size, Size)
    assert isinstance(request.guidance, Guidance)
    length, overlap = windows.latent_frames
    generation = engine._create_generation(request, lambda progress: None)
    with engine.components.transformer() as ours:
        transformer = diffusers_transformer(ours)
        scheduler = LTXEulerAncestralRFScheduler(eta=0.0)
        texts = generation.prompt_encoder.encode(lambda progress: None)
        items = generation.encode_media()[0].conditions
        picture = items[0][1] if items else None
        steps = transformer if is_unpatched else _ConditionedTransformer(transformer, scheduler)
        vae = SimpleNamespace(
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
            dtype=torch.float32,
            encode=lambda pixels: SimpleNamespace(latents=picture),
            latents_mean=torch.zeros(1),
            latents_std=torch.ones(1),
            config=SimpleNamespace(scaling_factor=1.0),
        )
        pipeline = _build_pipeline(steps, scheduler, vae)
        pipeline.encode_prompt = lambda prompt, **rest: _prompt_embeds(generation, texts, prompt[0])
        if not is_unpatched:
            plain = scheduler.step

            def step(velocity: Tensor, *given: Any, **more: Any) -> Any:
                out = plain(velocity, *given, **more)
                steps.step(velocity)
                return out

            scheduler.step = step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(long_module, "randn_tensor", _WindowNoise(request, length, overlap, picture is not None))
            return pipeline(
                prompt="|".join(request.prompts),
                height=size.height,
                width=size.width,
                num_frames=request.frames,
                frame_rate=request.fps,
                guidance_scale=request.guidance.cfg_scale,
                sigmas=[*(float(level) for level in generation.window_passes[0].sigmas), 0.0],
                cond_image=None if picture is None else torch.zeros(1, 3, size.height, size.width),
                cond_strength=1.0 if picture is not None else 0.0,
                temporal_tile_size=8 * length,
                temporal_overlap=8 * overlap,
                temporal_overlap_cond_strength=windows.overlap_strength,
                adain_factor=windows.adain,
                negative_index_strength=windows.anchor_strength,
                output_type="latent",
            ).frames


def _build_pipeline(transformer: Any, scheduler: Any, vae: Any) -> LTXI2VLongMultiPromptPipeline:
    """The pipeline with parts that are no files of its own."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "transformer"))
    pipeline = LTXI2VLongMultiPromptPipeline(scheduler=scheduler, **parts)
    pipeline.transformer, pipeline.vae = transformer, vae
    pipeline.video_processor = SimpleNamespace(preprocess=lambda image, **rest: image)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _prompt_embeds(generation: Any, texts: Any, prompt: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    text, negative = texts[generation.prompt_encoder.prompts.index(prompt)], texts[-1]
    return text.embeddings, text.mask, negative.embeddings, negative.mask


class _WindowNoise:
    """In the order in which diffusers draws it: once for each window, of all its tokens."""

    def __init__(self, request: Request, length: int, overlap: int, has_image: bool) -> None:
        self.streams, self.overlap, self.has_image, self.window = NoiseStreams(request.seed), overlap, has_image, 0

    def __call__(self, shape: torch.Size, **rest: Any) -> Tensor:
        window, self.window = self.window, self.window + 1
        before, (batch, channels, frames, *plane) = f"window {window + 1} " if window else "", shape
        overlap, picture = self.overlap * (window > 0), int(self.has_image)
        named = (("initial", frames - overlap - picture), ("overlap", overlap), ("remembered", picture))
        drawn = [self.streams.draw(before + name, (batch, channels, n, *plane)) for name, n in named if n]
        return torch.cat(drawn, dim=2)
