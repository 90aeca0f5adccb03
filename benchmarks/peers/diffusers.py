"""Contenders of diffusers: its modules and its pipeline, sharing kadr's weights by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXConditionPipeline
from diffusers.utils import logging
from torch import Tensor, nn

from kadr.bench.cases import DECODE, DIT, END_TO_END, FPS, SCHEDULES, VARIANTS
from kadr.bench.runner import Contender, SkippedContender
from kadr.bench.stage_case import NEGATIVE_PROMPT, PROMPT, SEED, StageCase, stored_bytes
from kadr.media.postprocess import to_uint8
from kadr.pipeline.progress import ignore_progress
from kadr.sampling.noise import NoiseStreams
from tests.oracles import diffusers_transformer, diffusers_vae

NAME = "diffusers"
NO_VAE = "has no VAE of this shape; the demo's VAE is of no released family"
logging.set_verbosity_error()  # it warns of custom sigmas
ModuleTransform = Callable[[nn.Module], nn.Module]


def create_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
    yield from create_transformed_contenders(stage_case, NAME, lambda module: module)


def create_transformed_contenders(
    stage_case: StageCase, name: str, transform: ModuleTransform
) -> Iterator[Contender | SkippedContender]:
    """Yields contenders. Args: transform: applied to the transformer, the decoder and the encoder before they run."""
    if stage_case.stage != DIT and stage_case.checkpoint.info.vae_family is None:
        yield SkippedContender(name, NO_VAE)
        return
    if stage_case.stage == END_TO_END and SCHEDULES[stage_case.schedule or "8"].guidance.stg_scale:
        yield SkippedContender(name, "has no STG")
        return
    dtype = str(stage_case.dtype).removeprefix("torch.")
    if stage_case.stage == DIT:
        module = transform(load_transformer(stage_case))
        yield Contender(
            name=name, run=create_transformer_task(stage_case, module), dtype=dtype, weight_bytes=stored_bytes(module)
        )
    elif stage_case.stage == END_TO_END:
        yield Contender(name=name, run=create_pipeline_task(stage_case, transform), dtype=dtype)
    else:
        model = load_vae(stage_case, transform)
        half = model.decoder if stage_case.stage == DECODE else model.encoder
        run = (
            create_decode_task(stage_case, model)
            if stage_case.stage == DECODE
            else create_encode_task(stage_case, model)
        )
        yield Contender(name=name, run=run, dtype=dtype, weight_bytes=stored_bytes(half))


def load_transformer(stage_case: StageCase) -> nn.Module:
    return diffusers_transformer(stage_case.checkpoint.load_transformer(stage_case.dtype)).to(stage_case.device)


def load_vae(stage_case: StageCase, transform: ModuleTransform) -> AutoencoderKLLTXVideo:
    family = stage_case.checkpoint.info.vae_family
    assert family is not None
    vae = diffusers_vae(stage_case.checkpoint.load_vae(stage_case.dtype), family).to(stage_case.device)
    vae.encoder, vae.decoder = transform(vae.encoder), transform(vae.decoder)
    return vae


def create_transformer_task(stage_case: StageCase, module: nn.Module) -> Callable[[], Tensor]:
    """Returns one model evaluation, called as `LTXConditionPipeline` does."""
    inputs, dtype = stage_case.inputs, stage_case.dtype
    arguments = {
        "hidden_states": inputs["tokens"].to(dtype),
        "encoder_hidden_states": inputs["prompt_embeds"].to(dtype),
        "timestep": inputs["sigma"] * 1000,
        "encoder_attention_mask": inputs["prompt_attention_mask"].to(dtype),
        "video_coords": inputs["positions"],
    }
    return lambda: module(**arguments, return_dict=False)[0]


def create_decode_task(stage_case: StageCase, model: AutoencoderKLLTXVideo) -> Callable[[], Tensor]:
    mean, deviation = _broadcast_channels(model.latents_mean), _broadcast_channels(model.latents_std)
    latents = deviation * stage_case.inputs["latents"].to(stage_case.dtype) + mean
    timestep = stage_case.inputs["decode_timestep"] if stage_case.vae_config.timestep_conditioning else None
    return lambda: model.decode(latents, timestep, return_dict=False)[0]


def create_encode_task(stage_case: StageCase, model: AutoencoderKLLTXVideo) -> Callable[[], Tensor]:
    pixels = stage_case.inputs["pixels"].to(stage_case.dtype)
    mean, deviation = _broadcast_channels(model.latents_mean), _broadcast_channels(model.latents_std)
    return lambda: (model.encode(pixels).latent_dist.mean - mean) / deviation


def _broadcast_channels(row: Tensor) -> Tensor:
    return row[None, :, None, None, None]


def create_pipeline_task(stage_case: StageCase, transform: ModuleTransform) -> Callable[[], Tensor]:
    """Returns the pipeline from prompt embeddings to frames, with kadr's noise and sigmas."""
    engine = stage_case.open_engine(VARIANTS["auto"])
    with engine.start(stage_case.request, stages=("text",), prompts=[PROMPT, NEGATIVE_PROMPT]) as generation:
        prompt_embeds = generation.prompt_encoder.encode(generation.modules, ignore_progress)
    (resolved_pass,) = engine.resolve(stage_case.request).passes
    pipeline = LTXConditionPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=load_vae(stage_case, transform),
        text_encoder=None,
        tokenizer=None,
        transformer=transform(load_transformer(stage_case)),
    )
    pipeline.set_progress_bar_config(disable=True)
    _set_initial_noise(
        pipeline,
        NoiseStreams(SEED).draw("initial", (1, stage_case.transformer_config.in_channels, *_latent_shape(stage_case))),
    )
    prompt, negative = (encoded.embeddings.to(stage_case.dtype) for encoded in prompt_embeds)
    settings = {
        "prompt_embeds": prompt,
        "prompt_attention_mask": prompt_embeds[0].mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": prompt_embeds[1].mask,
        "width": stage_case.shape.size.width,
        "height": stage_case.shape.size.height,
        "num_frames": stage_case.shape.frames,
        "frame_rate": FPS,
        "timesteps": [1000 * sigma for sigma in resolved_pass.sigmas],
        "guidance_scale": resolved_pass.step_guidance[0].cfg_scale,
        "decode_timestep": stage_case.request.decode_timestep,
        "decode_noise_scale": 0.0,
        "output_type": "pt",
    }
    return lambda: to_uint8(pipeline(**settings).frames[0].movedim(0, 1)).cpu()


def _latent_shape(stage_case: StageCase) -> tuple[int, int, int]:
    return stage_case.shape.grid.frames, stage_case.shape.grid.height, stage_case.shape.grid.width


def _set_initial_noise(pipeline: LTXConditionPipeline, noise: Tensor) -> None:
    """Makes the pipeline start from this noise; it has no argument for it."""
    prepare_latents = pipeline.prepare_latents

    def prepare_with_noise(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        latents, *rest = prepare_latents(*args, **kwargs)
        return (pipeline._pack_latents(noise).to(latents), *rest)

    pipeline.prepare_latents = prepare_with_noise
