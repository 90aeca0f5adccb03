"""The stage that samples: a pass, or a window of a long video, from noise to latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kadr.models.transformer import TextKVCache, Transformer
from kadr.nn.rope import Rope
from kadr.pipeline.components import Components
from kadr.pipeline.finite_check import FiniteCheck
from kadr.pipeline.longvideo.sampling import Guide
from kadr.pipeline.progress import StageProgress, Watch
from kadr.pipeline.retry import retry_in_fp32, retry_on_oom
from kadr.pipeline.stages.encode import Encoded
from kadr.pipeline.stages.prepared_conditions import apply_condition
from kadr.request.passes import ResolvedPass, noise_stream_name
from kadr.request.request import Request
from kadr.sampling.conditioning import add_image_noise
from kadr.sampling.guidance import Denoiser, Perturbation, PromptEmbeddings, guided_denoiser
from kadr.sampling.noise import NoiseStreams
from kadr.sampling.positions import token_positions
from kadr.sampling.reference_tokens import ReferenceTokens
from kadr.sampling.samplers import denoise
from kadr.sampling.state import LatentState
from kadr.sampling.step_cache import PassCache
from kadr.sampling.steps import euler_step, stochastic_step
from kadr.spec.model import PASS_STAGES


@dataclass(frozen=True)
class Denoising:
    """What the passes of one request are sampled with.

    Args:
        request: nothing in it is open that has a default.
        downscale: how many times smaller than the video its references are.
    """

    components: Components
    request: Request
    noise: NoiseStreams
    watch: Watch
    downscale: int = 1

    def sampled(
        self,
        plan: ResolvedPass,
        begun: Tensor,
        media: Encoded,
        texts: Sequence[PromptEmbeddings],
        guides: Sequence[Guide] = (),
    ) -> Tensor:
        """The latents at the end of a pass or window, from those at its first level.

        Args:
            begun: (1, C, f, h, w).
            texts: of the prompt and, where guidance needs it, the negative prompt.
            guides: of a window.
        """
        state, stage = self._conditioned(plan, begun, media, guides), PASS_STAGES[plan.number - 1]
        run = retry_on_oom(
            self.components, stage, partial(self._denoised, plan, state, self._context(plan, media), texts)
        )
        return retry_in_fp32(stage, self.components.stage_dtype(stage), run).latents()

    def _causal(self, plan: ResolvedPass) -> bool:
        return self.components.transformer_config_of(plan.number - 1).causal_temporal_positioning

    def _conditioned(self, plan: ResolvedPass, latents: Tensor, media: Encoded, guides: Sequence[Guide]) -> LatentState:
        causal = self._causal(plan)
        state = LatentState.from_latents(latents, token_positions(plan.grid, fps=plan.fps, causal=causal), plan.grid)
        for index, (item, held) in enumerate(media.items):
            name = noise_stream_name(plan, f"keyframe {index}")
            state = apply_condition(state, item, held, plan, causal=causal, draw_noise=partial(self.noise.draw, name))
        for guide in guides:
            draw = partial(self.noise.draw, noise_stream_name(plan, guide.name))
            state = guide.shown(state, plan, causal=causal, draw=draw)
        return state

    def _context(self, plan: ResolvedPass, media: Encoded) -> ReferenceTokens | None:
        if not media.references:
            return None
        return ReferenceTokens.from_latents(
            media.references, fps=plan.fps, causal=self._causal(plan), downscale=self.downscale
        )

    def _denoised(
        self,
        plan: ResolvedPass,
        state: LatentState,
        context: ReferenceTokens | None,
        texts: Sequence[PromptEmbeddings],
        dtype: torch.dtype | None,
    ) -> LatentState:
        number, count, device = plan.number - 1, len(plan.sigmas), self.components.device
        name, watchman = PASS_STAGES[number], FiniteCheck.for_device(device)
        own = dtype or self.components.stage_dtype(name)
        assert self.request.image_noise is not None
        with self.components.transformer(number, dtype, self.request.lora_strengths) as transformer:
            rope = transformer.compute_rope(_positions(state, context)[None].to(device))
            long = (plan.window_index + 1, plan.window_count) if plan.window_count > 1 else None
            stage = StageProgress(name, plan.total_steps or count, self.watch, plan.steps_before, long)

            def watch(index: int, now: Tensor, state: LatentState) -> None:
                place = f" of window {plan.window_index + 1}" if plan.window_count > 1 else ""
                watchman.check(state.tokens, f"step {index + 1} of {count}{place}")
                stage.report(index + 1, float(plan.sigmas[index]))  # not `now`, which lies on the device

            read = [text._replace(embeddings=text.embeddings.to(own)) for text in texts]
            state = denoise(
                self._estimate(plan, transformer, rope, context, read),
                state,
                plan.sigmas.to(device),
                step=stochastic_step(self._step_noise(plan, "stochastic")) if plan.settings.stochastic else euler_step,
                prepare=add_image_noise(self.request.image_noise, self._step_noise(plan, "condition")),
                watch=watch,
            )
            watchman.synchronize()
        return state

    def _estimate(
        self,
        plan: ResolvedPass,
        transformer: Transformer,
        rope: Rope,
        context: ReferenceTokens | None,
        texts: Sequence[PromptEmbeddings],
    ) -> Denoiser:
        dtype = texts[0].embeddings.dtype
        caching = self.request.step_cache
        cached = None if caching is None else PassCache(caching, plan.step_guidance)
        readings: dict[int, TextKVCache] = {}  # by the identity of texts, which are there as long as the steps are

        def model(
            tokens: Tensor, level: Tensor, text: PromptEmbeddings, disturb: Perturbation | None = None
        ) -> tuple[Tensor, Tensor | None]:
            if id(text) not in readings:
                readings[id(text)] = transformer.project_text(*text)
            count = tokens.shape[1]
            if context is not None:
                tokens, level = context.append_to(tokens, level)
            arguments = (tokens.to(dtype), rope, readings[id(text)], None, level)
            how: dict[str, Any] = {} if cached is None else {"cache": cached.residual_cache(id(text))}
            if disturb is None:
                return transformer(*arguments, **how)[:, :count], None
            said, disturbed = transformer.forward_with_perturbed(*arguments, **disturb._asdict() | how)
            return said[:, :count], disturbed[:, :count]

        text, negative = (*texts, None)[:2]
        assert text is not None
        together = self.request.guidance_batch
        estimate = guided_denoiser(
            model, text, negative, plan.settings.guidance, plan.step_guidance, guidance_batch=together
        )
        return estimate if cached is None else cached.wrap(estimate)

    def _step_noise(self, plan: ResolvedPass, name: str) -> StepNoise:
        return StepNoise(self.noise, noise_stream_name(plan, name))


@dataclass(frozen=True)
class StepNoise:
    """Noise for each step of a sampling, one stream each."""

    noise: NoiseStreams
    name: str

    def __call__(self, index: int, shape: torch.Size) -> Tensor:
        return self.noise.draw(f"{self.name} {index}", shape)


def _positions(state: LatentState, context: ReferenceTokens | None) -> Tensor:
    """Of all that the network sees, (3, N+M)."""
    if context is None:
        return state.positions
    return torch.cat([state.positions, context.positions.to(state.positions)], dim=1)
