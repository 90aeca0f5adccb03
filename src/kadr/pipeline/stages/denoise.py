"""Denoise stage: samples one pass, or one window of a long video, from noise to latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kadr.models.block_inputs import TextKVCache
from kadr.models.transformer import Transformer
from kadr.nn.rope import Rope
from kadr.pipeline.finite_check import FiniteCheck
from kadr.pipeline.longvideo.sampling import Guide
from kadr.pipeline.modules import Modules
from kadr.pipeline.progress import StageProgress, Watch
from kadr.pipeline.retry import retry_in_fp32, retry_on_oom
from kadr.pipeline.stages.conditions import apply_condition
from kadr.pipeline.stages.encode import EncodedInputs
from kadr.pipeline.stages.overrides import NO_OVERRIDES, Overrides
from kadr.pipeline.stages.preview import PreviewMap
from kadr.request.passes import ResolvedPass, noise_stream_name
from kadr.request.resolved_request import ResolvedRequest
from kadr.sampling.conditioning import add_image_noise
from kadr.sampling.guidance import Perturbation, PromptEmbeddings, guided_denoiser
from kadr.sampling.noise import NoiseSource, move_noise
from kadr.sampling.positions import token_positions
from kadr.sampling.reference_tokens import ReferenceTokens
from kadr.sampling.samplers import EULER, SAMPLERS, Denoiser, StopSampling, keep_state
from kadr.sampling.sigma_groups import SigmaGroups
from kadr.sampling.state import LatentState
from kadr.sampling.step_cache import PassCache
from kadr.shapes import LatentGrid
from kadr.spec.model import PASS_STAGES


@dataclass(frozen=True)
class DenoiseStage:
    """Sampling of the passes of one request.

    Args:
        request: a resolved request.
        preview_map: for the previews of each step; None for none.
        overrides: what takes the place of the sampling's own positions, guidance and steps.
    """

    modules: Modules
    request: ResolvedRequest
    noise_streams: NoiseSource
    watch: Watch
    preview_map: PreviewMap | None = None
    overrides: Overrides = NO_OVERRIDES

    def denoise_pass(
        self,
        resolved_pass: ResolvedPass,
        noisy_latents: Tensor,
        encoded_inputs: EncodedInputs,
        prompt_embeddings: Sequence[PromptEmbeddings],
        guides: Sequence[Guide] = (),
    ) -> Tensor:
        """Denoises a pass, or a window with `guides`, from latents (1, C, f, h, w) at its first sigma to clean ones.

        Args:
            prompt_embeddings: embeddings of the prompt and, if CFG needs it, the negative prompt.
        """
        state = self._build_state(resolved_pass, noisy_latents, encoded_inputs, guides)
        stage = PASS_STAGES[resolved_pass.number - 1]
        reference_tokens = self._build_reference_tokens(resolved_pass, encoded_inputs)
        sample = partial(self._denoise, resolved_pass, state, reference_tokens, prompt_embeddings)
        return retry_in_fp32(self.modules, stage, retry_on_oom(self.modules, stage, sample)).latents()

    def _has_causal_positions(self, resolved_pass: ResolvedPass) -> bool:
        if self.overrides.causal_positions is not None:
            return self.overrides.causal_positions
        return self.modules.spec.transformer_config_of(resolved_pass.number - 1).causal_temporal_positioning

    def _build_state(
        self, resolved_pass: ResolvedPass, latents: Tensor, encoded_inputs: EncodedInputs, guides: Sequence[Guide]
    ) -> LatentState:
        causal = self._has_causal_positions(resolved_pass)
        state = LatentState.from_latents(
            latents, token_positions(resolved_pass.grid, fps=resolved_pass.fps, causal=causal), resolved_pass.grid
        )
        for index, (condition, condition_latents) in enumerate(encoded_inputs.conditions):
            draw_noise = partial(self.noise_streams.draw, noise_stream_name(resolved_pass, f"keyframe {index}"))
            state = apply_condition(
                state, condition, condition_latents, resolved_pass, causal=causal, draw_noise=draw_noise
            )
        for guide in guides:
            draw = partial(self.noise_streams.draw, noise_stream_name(resolved_pass, guide.name))
            state = guide.append_to(state, resolved_pass, causal=causal, draw=draw)
        return state

    def _build_reference_tokens(
        self, resolved_pass: ResolvedPass, encoded_inputs: EncodedInputs
    ) -> ReferenceTokens | None:
        if not encoded_inputs.reference_latents:
            return None
        return ReferenceTokens.from_latents(
            encoded_inputs.reference_latents,
            fps=resolved_pass.fps,
            causal=self._has_causal_positions(resolved_pass),
            downscale=self.request.reference_downscale,
        )

    def _denoise(
        self,
        resolved_pass: ResolvedPass,
        state: LatentState,
        reference_tokens: ReferenceTokens | None,
        prompt_embeddings: Sequence[PromptEmbeddings],
        dtype: torch.dtype | None,
    ) -> LatentState:
        pass_index, count, device = resolved_pass.number - 1, len(resolved_pass.sigmas), self.modules.device
        stage, finite_check = PASS_STAGES[pass_index], FiniteCheck.for_device(device)
        stage_dtype = dtype or self.modules.stage_dtype(stage)
        strengths = self.request.lora_strengths[pass_index]
        with self.modules.transformer(pass_index, dtype, strengths) as transformer:
            rope = transformer.compute_rope(_all_positions(state, reference_tokens)[None].to(device))
            is_window = resolved_pass.window_count > 1
            progress = StageProgress(
                stage,
                resolved_pass.total_steps or count,
                self.watch,
                resolved_pass.steps_before,
                (resolved_pass.window_index + 1, resolved_pass.window_count) if is_window else None,
            )

            embeddings = [item._replace(embeddings=item.embeddings.to(stage_dtype)) for item in prompt_embeddings]
            groups = SigmaGroups.from_mask(
                state.conditioning_mask, _num_references(reference_tokens), like=state.tokens
            )
            denoiser = self._build_denoiser(resolved_pass, transformer, rope, reference_tokens, groups, embeddings)
            preview = None if self.preview_map is None else StepPreview(self.preview_map, denoiser, resolved_pass.grid)

            def watch(index: int, sigma: float, state: LatentState) -> None:
                location = f" of window {resolved_pass.window_index + 1}" if is_window else ""
                finite_check.check(state.tokens, f"step {index + 1} of {count}{location}")
                progress.report(index + 1, sigma, None if preview is None else preview.render)

            try:
                state = SAMPLERS[resolved_pass.settings.sampler or EULER].sample(
                    denoiser if preview is None else preview,
                    state,
                    torch.tensor(resolved_pass.sigmas, dtype=torch.float32, device=device),
                    noise=self._step_noise(resolved_pass, "stochastic"),
                    prepare=add_image_noise(self.request.image_noise, self._step_noise(resolved_pass, "condition")),
                    finish=self.overrides.finish_step or keep_state,
                    watch=watch,
                )
            except StopSampling as stop:
                state = stop.state
            finite_check.synchronize()
        return state

    def _build_denoiser(
        self,
        resolved_pass: ResolvedPass,
        transformer: Transformer,
        rope: Rope,
        reference_tokens: ReferenceTokens | None,
        sigma_groups: SigmaGroups | None,
        prompt_embeddings: Sequence[PromptEmbeddings],
    ) -> Denoiser:
        dtype = prompt_embeddings[0].embeddings.dtype
        step_cache = self.request.step_cache
        pass_cache = None if step_cache is None else PassCache(step_cache, resolved_pass.step_guidance)
        text_caches: dict[int, TextKVCache] = {}  # by id of the prompt embeddings, which outlive all steps

        def evaluate(
            tokens: Tensor, sigma: Tensor, prompt_embeddings: PromptEmbeddings, perturbation: Perturbation | None = None
        ) -> tuple[Tensor, Tensor | None]:
            key, count = id(prompt_embeddings), tokens.shape[1]
            if reference_tokens is not None:
                tokens, sigma = reference_tokens.append_to(tokens, sigma)
            if key not in text_caches:
                text_caches[key] = transformer.project_text(*prompt_embeddings, num_tokens=tokens.shape[:2].numel())
            arguments = (tokens.to(dtype), rope, text_caches[key], None, sigma)
            options: dict[str, Any] = {} if sigma_groups is None else {"sigma_groups": sigma_groups}
            if pass_cache is not None:
                options["residual_cache"] = pass_cache.residual_cache(key)
            if perturbation is None:
                return transformer(*arguments, **options)[:, :count], None
            velocity, perturbed = transformer.forward_with_perturbed(*arguments, **perturbation._asdict() | options)
            return velocity[:, :count], perturbed[:, :count]

        cond, uncond = (*prompt_embeddings, None)[:2]
        assert cond is not None
        denoiser = guided_denoiser(
            evaluate,
            cond,
            uncond,
            resolved_pass.settings.guidance,
            guidance_batch=self.request.guidance_batch,
            combine_predictions=self.overrides.combine_predictions,
        )
        return denoiser if pass_cache is None else pass_cache.wrap(denoiser)

    def _step_noise(self, resolved_pass: ResolvedPass, name: str) -> StepNoise:
        return StepNoise(self.noise_streams, noise_stream_name(resolved_pass, name), self.modules.device)


class StepPreview:
    """A denoiser that remembers its last prediction, to show what the clean video would be.

    Args:
        grid: of the video, whose tokens come first.
    """

    def __init__(self, preview_map: PreviewMap, denoiser: Denoiser, grid: LatentGrid) -> None:
        self._preview_map, self._denoiser, self._grid = preview_map, denoiser, grid
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, level: float, tokens: Tensor, token_sigmas: Tensor) -> Tensor:
        velocity = self._denoiser(level, tokens, token_sigmas)
        self._last = tokens, velocity, token_sigmas
        return velocity

    def render(self) -> np.ndarray:
        """Returns frames, as `PreviewMap.render`, of the last prediction."""
        assert self._last is not None  # a step begins with one
        tokens, velocity, token_sigmas = (tensor[0, : self._grid.num_tokens] for tensor in self._last)
        return self._preview_map.render(tokens - token_sigmas[:, None] * velocity.to(tokens.dtype), self._grid)


@dataclass(frozen=True)
class StepNoise:
    """Noise for each step of a pass, one stream per step, on a device."""

    noise_streams: NoiseSource
    stream_name: str
    device: torch.device

    def __call__(self, index: int, shape: torch.Size) -> Tensor:
        return move_noise(self.noise_streams.draw(f"{self.stream_name} {index}", shape), self.device)


def _num_references(reference_tokens: ReferenceTokens | None) -> int:
    return 0 if reference_tokens is None else reference_tokens.tokens.shape[1]


def _all_positions(state: LatentState, reference_tokens: ReferenceTokens | None) -> Tensor:
    """Returns the positions of all tokens that the transformer sees, (3, N + M)."""
    if reference_tokens is None:
        return state.positions
    return torch.cat([state.positions, reference_tokens.positions.to(state.positions)], dim=1)
