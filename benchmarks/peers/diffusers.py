"""diffusers' own modules, and its pipeline, on kadr's weights: the same memory, adopted by name."""

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
from kadr.pipeline.stages.text import PromptEncoder
from kadr.sampling.noise import NoiseStreams
from tests.oracles import diffusers_transformer, diffusers_vae

NAME = "diffusers"
logging.set_verbosity_error()  # it wonders at noise levels that are given
ModuleTransform = Callable[[nn.Module], nn.Module]


def create_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
    yield from create_transformed_contenders(stage_case, NAME, lambda module: module)


def create_transformed_contenders(
    stage_case: StageCase, name: str, transform: ModuleTransform
) -> Iterator[Contender | SkippedContender]:
    """Args: change: what is done to the transformer, the decoder and the encoder before they run."""
    if stage_case.stage != DIT and stage_case.checkpoint.info.vae_family is None:
        yield SkippedContender(name, "has no VAE of this shape; that of the demo is of no released family")
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
    made = diffusers_vae(stage_case.checkpoint.load_vae(stage_case.dtype), family).to(stage_case.device)
    made.encoder, made.decoder = transform(made.encoder), transform(made.decoder)
    return made


def create_transformer_task(stage_case: StageCase, module: nn.Module) -> Callable[[], Tensor]:
    """One evaluation, called as `LTXConditionPipeline` does."""
    given, dtype = stage_case.inputs, stage_case.dtype
    arguments = {
        "hidden_states": given["tokens"].to(dtype),
        "encoder_hidden_states": given["text"].to(dtype),
        "timestep": given["level"] * 1000,
        "encoder_attention_mask": given["mask"].to(dtype),
        "video_coords": given["positions"],
    }
    return lambda: module(**arguments, return_dict=False)[0]


def create_decode_task(stage_case: StageCase, model: AutoencoderKLLTXVideo) -> Callable[[], Tensor]:
    latents = _broadcast_channels(model.latents_std) * stage_case.inputs["latents"].to(
        stage_case.dtype
    ) + _broadcast_channels(model.latents_mean)
    level = stage_case.inputs["level"] if stage_case.vae_config.timestep_conditioning else None
    return lambda: model.decode(latents, level, return_dict=False)[0]


def create_encode_task(stage_case: StageCase, model: AutoencoderKLLTXVideo) -> Callable[[], Tensor]:
    pixels = stage_case.inputs["pixels"].to(stage_case.dtype)
    mean, deviation = _broadcast_channels(model.latents_mean), _broadcast_channels(model.latents_std)
    return lambda: (model.encode(pixels).latent_dist.mean - mean) / deviation


def _broadcast_channels(row: Tensor) -> Tensor:
    return row[None, :, None, None, None]


def create_pipeline_task(stage_case: StageCase, transform: ModuleTransform) -> Callable[[], Tensor]:
    """The pipeline, from encoded prompts to frames, with kadr's noise and noise levels."""
    engine = stage_case.open_engine(VARIANTS["auto"])
    texts = PromptEncoder(engine.components, [PROMPT, NEGATIVE_PROMPT]).encode(ignore_progress)
    (plan,) = engine.resolve_passes(stage_case.request)
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
    prompt, negative = (text.embeddings.to(stage_case.dtype) for text in texts)
    settings = {
        "prompt_embeds": prompt,
        "prompt_attention_mask": texts[0].mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": texts[1].mask,
        "width": stage_case.shape.size.width,
        "height": stage_case.shape.size.height,
        "num_frames": stage_case.shape.frames,
        "frame_rate": FPS,
        "timesteps": (plan.sigmas * 1000).tolist(),
        "guidance_scale": plan.step_guidance[0].cfg_scale,
        "decode_timestep": stage_case.request.decode_timestep,
        "decode_noise_scale": 0.0,
        "output_type": "pt",
    }
    return lambda: to_uint8(pipeline(**settings).frames[0].movedim(0, 1)).cpu()


def _latent_shape(stage_case: StageCase) -> tuple[int, int, int]:
    return stage_case.shape.grid.frames, stage_case.shape.grid.height, stage_case.shape.grid.width


def _set_initial_noise(pipeline: LTXConditionPipeline, noise: Tensor) -> None:
    """Have the pipeline begin with this noise: it takes none from outside."""
    prepare = pipeline.prepare_latents

    def prepared(*given: Any, **more: Any) -> tuple[Any, ...]:
        latents, *rest = prepare(*given, **more)
        return (pipeline._pack_latents(noise).to(latents), *rest)

    pipeline.prepare_latents = prepared
