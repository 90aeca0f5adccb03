"""The long-video pipeline of diffusers with kadr's model, request and noise: windows, positions and blending.

Prompts and images are encoded by kadr, because other tests compare those.
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
from tests.oracles import diffusers_transformer


class _ConditionedTransformer:
    """Transformer that gives conditioned tokens kadr's sigmas, and steps them by those.

    diffusers passes the network sigma · (1 - strength) and mixes the clean latents in twice at every step, which
    matches neither that sigma nor the official package. Appended tokens are discarded afterwards, so it is enough to
    keep those tokens here and to feed the network these instead.
    """

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        self.transformer, self.scheduler, self.tokens = transformer, scheduler, None
        self.config, self.dtype = transformer.config, torch.float32
        self.sigma = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transformer, name)

    def __call__(self, *, hidden_states: Tensor, timestep: Tensor, **rest: Any) -> Any:
        index = self.scheduler._step_index or 0
        sigma, mask = self.scheduler.sigmas[index], timestep[..., 0] / (1000 * self.scheduler.sigmas[index])
        is_conditioned = (mask < 1 - 1e-4)[..., None]
        self.tokens = hidden_states if index == 0 else torch.where(is_conditioned, self.tokens, hidden_states)
        self.sigma = torch.minimum(sigma, mask)
        return self.transformer(hidden_states=self.tokens, timestep=1000 * self.sigma[..., None], **rest)

    def step(self, velocity: Tensor) -> None:
        """Steps the conditioned tokens."""
        assert self.tokens is not None
        sigmas = self.scheduler.sigmas[None, None]
        token_sigma = self.sigma[: len(velocity), :, None]
        next_sigma = torch.where(sigmas < token_sigma - 1e-6, sigmas, 0.0).amax(dim=-1, keepdim=True)
        sigma = self.scheduler.sigmas[self.scheduler._step_index - 1]
        stepped = self.tokens[: len(velocity)] - (token_sigma - next_sigma) * velocity
        stepped = torch.where(sigma - 1e-6 < token_sigma, stepped, self.tokens[: len(velocity)])
        self.tokens = torch.cat([stepped] * (len(self.tokens) // len(stepped)))


def run_diffusers_long(engine: Engine, request: Request, *, is_unpatched: bool = False) -> Tensor:
    """Returns normalised latents (1, C, f, h, w) of a request with explicit sigmas.

    Args:
        is_unpatched: keep the sigmas that diffusers gives conditioned tokens.
    """
    resolved = engine.resolve(request)
    request, windows, size = resolved.request, resolved.windows, resolved.size
    assert windows is not None
    assert isinstance(request.guidance, Guidance)
    length, overlap = windows.latent_frames
    with engine.start(resolved) as generation, generation.modules.transformer() as kadr_transformer:
        transformer = diffusers_transformer(kadr_transformer)
        scheduler = LTXEulerAncestralRFScheduler(eta=0.0)
        prompt_embeddings = generation.prompt_encoder.encode(generation.modules, lambda progress: None)
        conditions = generation.encode_media()[0].conditions
        image_latents = conditions[0][1] if conditions else None
        wrapped = transformer if is_unpatched else _ConditionedTransformer(transformer, scheduler)
        vae = SimpleNamespace(
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
            dtype=torch.float32,
            encode=lambda pixels: SimpleNamespace(latents=image_latents),
            latents_mean=torch.zeros(1),
            latents_std=torch.ones(1),
            config=SimpleNamespace(scaling_factor=1.0),
        )
        pipeline = _build_pipeline(wrapped, scheduler, vae)
        pipeline.encode_prompt = lambda prompt, **rest: _prompt_embeds(generation, prompt_embeddings, prompt[0])
        if not is_unpatched:
            scheduler_step = scheduler.step

            def step(velocity: Tensor, *args: Any, **kwargs: Any) -> Any:
                result = scheduler_step(velocity, *args, **kwargs)
                wrapped.step(velocity)
                return result

            scheduler.step = step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                long_module, "randn_tensor", _WindowNoise(request, length, overlap, image_latents is not None)
            )
            return pipeline(
                prompt="|".join(request.prompts),
                height=size.height,
                width=size.width,
                num_frames=request.frames,
                frame_rate=request.fps,
                guidance_scale=request.guidance.cfg_scale,
                sigmas=[*(float(sigma) for sigma in resolved.window_passes[0].sigmas), 0.0],
                cond_image=None if image_latents is None else torch.zeros(1, 3, size.height, size.width),
                cond_strength=1.0 if image_latents is not None else 0.0,
                temporal_tile_size=8 * length,
                temporal_overlap=8 * overlap,
                temporal_overlap_cond_strength=windows.overlap_strength,
                adain_factor=windows.adain,
                negative_index_strength=windows.anchor_strength,
                output_type="latent",
            ).frames


def _build_pipeline(transformer: Any, scheduler: Any, vae: Any) -> LTXI2VLongMultiPromptPipeline:
    """Builds the pipeline from components that it did not load."""
    components = dict.fromkeys(("vae", "text_encoder", "tokenizer", "transformer"))
    pipeline = LTXI2VLongMultiPromptPipeline(scheduler=scheduler, **components)
    pipeline.transformer, pipeline.vae = transformer, vae
    pipeline.video_processor = SimpleNamespace(preprocess=lambda image, **rest: image)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _prompt_embeds(generation: Any, prompt_embeddings: Any, prompt: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = generation.prompt_encoder.prompts.index(prompt)
    cond, uncond = prompt_embeddings[index], prompt_embeddings[-1]
    return cond.embeddings, cond.mask, uncond.embeddings, uncond.mask


class _WindowNoise:
    """Noise in the order in which diffusers draws it: once per window, for all its tokens."""

    def __init__(self, request: Request, length: int, overlap: int, has_image: bool) -> None:
        self.streams, self.overlap, self.has_image, self.window = NoiseStreams(request.seed), overlap, has_image, 0

    def __call__(self, shape: torch.Size, **rest: Any) -> Tensor:
        window, self.window = self.window, self.window + 1
        prefix, (batch, channels, frames, *plane) = f"window {window + 1} " if window else "", shape
        overlap, anchor = self.overlap * (window > 0), int(self.has_image)
        stream_frames = (("initial", frames - overlap - anchor), ("overlap", overlap), ("remembered", anchor))
        noise = [self.streams.draw(prefix + name, (batch, channels, n, *plane)) for name, n in stream_frames if n]
        return torch.cat(noise, dim=2)
