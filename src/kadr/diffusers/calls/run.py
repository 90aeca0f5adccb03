"""Runs a call: makes its videos one by one through `Engine.start`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kadr.diffusers.base import LTXBasePipeline
from kadr.diffusers.calls.call import Call, Medium
from kadr.diffusers.calls.noise import DECODE, INITIAL, KEYFRAME, GeneratorNoise, check_generators, video_noise
from kadr.diffusers.outputs import LATENT, LTXPipelineOutput, format_videos
from kadr.errors import RequestError
from kadr.pipeline.display.progress_bar import ProgressBar
from kadr.pipeline.engine import Engine
from kadr.pipeline.generation import Generation
from kadr.pipeline.progress import Watch, ignore_progress
from kadr.pipeline.stages.overrides import Overrides
from kadr.request.inputs import Condition
from kadr.request.pass_media import PassCondition, PassFrames, PassMedia
from kadr.request.passes import Evaluation
from kadr.request.request import Request
from kadr.request.resolved_conditions import ResolvedCondition
from kadr.request.resolved_media import ResolvedMedia
from kadr.request.resolved_request import ResolvedRequest
from kadr.sampling.conditioning import PREFIX_LATENT_FRAMES
from kadr.sampling.guidance import Predictions
from kadr.sampling.samplers import EULER
from kadr.sampling.settings import Guidance, StepGuidance
from kadr.sampling.state import to_tokens
from kadr.shapes import Size

SEED_LIMIT = 1 << 62


def run(pipeline: LTXBasePipeline, call: Call) -> Any:
    """Makes the videos of a call, and returns them as the script asks for."""
    pipeline._interrupt, pipeline._guidance_scale, pipeline._guidance_rescale = (
        False,
        float(call.guidance_scale),
        float(call.guidance_rescale),
    )
    pipeline._num_timesteps, pipeline._attention_kwargs = len(call.timesteps.timesteps), call.attention_kwargs
    engine, batch = pipeline.engine, call.prompts.num_videos
    generators = check_generators(call.generator, batch)
    noise = GeneratorNoise(generators, batch, engine.spec.dtype) if generators else None
    # torch.manual_seed repeats a video without a generator.
    seed = generators[0].initial_seed() if generators else int(torch.randint(SEED_LIMIT, ()))
    call.callback.check_batch(batch)
    if noise is not None:
        _reserve(noise, call, engine.spec.transformer_config.in_channels)
    outputs = []
    for index in range(batch):
        source = video_noise(noise, index, call.grid.num_tokens, seed)
        outputs.append(_VideoRun(pipeline, engine, call, index, source).run())
    if call.output_type == LATENT:
        latents = torch.cat(outputs)
        videos: Any = to_tokens(latents) if call.packs_latents else latents
    else:
        videos = format_videos(outputs, call.output_type)
    return LTXPipelineOutput(videos) if call.return_dict else (videos,)


def _reserve(noise: GeneratorNoise, call: Call, channels: int) -> None:
    """Draws what diffusers draws before the first step, in its order."""
    grid, batch = call.grid, call.prompts.num_videos
    shape = (1, channels, grid.frames, grid.height, grid.width)

    def reserve_media() -> None:
        for index, media in enumerate(call.media):
            for number, medium in enumerate(media):
                latents_shape = (1, channels, medium.latent_frames, grid.height, grid.width)
                noise.reserve(medium.name, latents_shape, 1, index if call.draws_media_first else None)
                if medium.frame:
                    prefix = (1, channels, min(medium.latent_frames, PREFIX_LATENT_FRAMES), grid.height, grid.width)
                    noise.reserve(f"{KEYFRAME}{number}", prefix, 1)

    if call.draws_media_first:
        reserve_media()
    if call.initial_latents is None:
        noise.reserve(INITIAL, shape, batch)
    if not call.draws_media_first:
        reserve_media()


@dataclass(frozen=True)
class _VideoRun:
    """One video of a call."""

    pipeline: LTXBasePipeline
    engine: Engine
    call: Call
    index: int
    noise_source: Any

    def run(self) -> Tensor:
        """Returns latents (1, C, f, h, w), or frames float32 (F, H, W, 3) in [0, 1], on the CPU."""
        call, uses_cfg = self.call, self.pipeline.do_classifier_free_guidance
        resolved = self._resolve()
        embeddings = call.prompts.embeddings_of(self.index, uses_cfg)
        stages = {"encode", "denoise"} | ({"text"} if not embeddings else set())
        stages |= {"decode"} if call.output_type != LATENT else set()
        overrides = Overrides(
            noise_source=self.noise_source,
            prompt_embeddings=embeddings,
            prompt_length=call.prompts.max_length,
            attends_padding=call.attends_padding,
            pixels={medium.name: medium.pixels for medium in call.media_of(self.index)},
            draw_media_noise=self.noise_source.draw,
            causal_positions=call.causal_positions,
            combine_predictions=self._combine,
            finish_step=call.callback.bind(self.pipeline, call.timesteps, call.grid.num_tokens),
        )
        watch: Watch = ProgressBar() if self.pipeline._shows_progress else ignore_progress
        with self.engine.start(resolved, stages=stages, overrides=overrides, watch=watch) as generation:
            call.callback.watch_embeddings(generation, uses_cfg)
            latents = self._denoise(generation)
            return latents.cpu() if call.output_type == LATENT else self._decode(generation, latents)

    def _denoise(self, generation: Generation) -> Tensor:
        call = self.call
        noise, init = (
            None if item is None else item[self.index : self.index + 1] if len(item) > 1 else item
            for item in (call.initial_latents, call.clean_latents)
        )
        return generation.denoise(noise, init_latents=init)

    def _decode(self, generation: Generation, latents: Tensor) -> Tensor:
        noise = None
        if generation.spec.vae_config.timestep_conditioning:
            noise = self.noise_source.draw(DECODE, latents.shape).to(latents)
            with generation.modules.latent_statistics() as vae:
                # diffusers mixes noise in after the latents are denormalised, kadr before.
                noise = vae.statistics.normalise(noise)
        return torch.cat(list(generation.decode(latents, noise, as_float=True)))

    def _resolve(self) -> ResolvedRequest:
        """Returns the resolved request, with diffusers' sigmas, and its media in memory."""
        call, uses_cfg = self.call, self.pipeline.do_classifier_free_guidance
        prompt, negative_prompt = call.prompts.texts_of(self.index)
        # Rounded to the model's dtype, in which diffusers keeps them.
        timestep, noise_scale = torch.tensor(call.decode_settings()[self.index], dtype=self.engine.spec.dtype).tolist()
        request = Request(
            prompt,
            negative_prompt=negative_prompt,
            size=call.size,
            frames=call.frames,
            fps=call.frame_rate,
            multi_scale=False,
            sampler=EULER,
            tone_map=0.0,
            guidance=Guidance(
                cfg_scale=max(1.0, call.guidance_scale), stg_scale=0.0, rescale=1.0, cfg_star=False, apg=-1.0
            ),
            image_noise=call.image_noise,
            decode_timestep=timestep,
            decode_noise=noise_scale,
            lora_strengths=self.pipeline.lora_strengths(call.attention_kwargs),
        )
        self.engine.prepare(request)
        resolved = self.engine.resolve(request)
        (only_pass,) = resolved.passes
        guidance = StepGuidance(call.guidance_scale if uses_cfg else 1.0, 0.0, 1.0, ())
        evaluations = tuple((Evaluation(sigma, guidance),) for sigma in call.timesteps.sigmas)
        only_pass = replace(only_pass, sigmas=call.timesteps.sigmas, evaluations=evaluations)
        conditions = tuple(_pass_condition(medium, call.size) for medium in call.media_of(self.index))
        return replace(
            resolved,
            passes=(only_pass,),
            conditions=tuple(item.resolved_condition for item in conditions),
            conditions_by_pass=(conditions,),
            media=(PassMedia(conditions),),
        )

    def _combine(
        self, predictions: Predictions, step: StepGuidance, guidance: Guidance, tokens: Tensor, sigma: Tensor
    ) -> Tensor:
        """Computes CFG with diffusers' rescaling; the pipeline's scales may change from step to step."""
        cond, uncond, _ = predictions
        scale, rescale = self.pipeline._guidance_scale, self.pipeline._guidance_rescale
        if self.call.float_guidance:
            cond, uncond = cond.float(), None if uncond is None else uncond.float()
        if scale <= 1:
            return cond
        if uncond is None:
            raise RequestError(
                f"the callback set guidance_scale to {scale:g}, and the call began at 1 or less, without the negative "
                "prompt. Call the pipeline with a guidance_scale above 1."
            )
        velocity = uncond + scale * (cond - uncond)
        if rescale > 0:
            ratio = (cond.flatten(1).std(1) / velocity.flatten(1).std(1))[:, None, None]
            velocity = rescale * (velocity * ratio) + (1 - rescale) * velocity
        return velocity


def _pass_condition(medium: Medium, size: Size) -> PassCondition:
    frames = medium.pixels.shape[2]
    condition = Condition(medium.name, frame=medium.frame, strength=medium.strength, is_clip=frames > 1)
    media = ResolvedMedia(medium.name, size.width, size.height, tuple(range(frames)), is_clip=frames > 1)
    return PassCondition(ResolvedCondition(condition, media, medium.frame), PassFrames(media, size, size))
