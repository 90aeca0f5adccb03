"""diffusers' own modules, and its pipeline, on kadr's weights: the same memory, adopted by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXConditionPipeline
from diffusers.utils import logging
from torch import Tensor, nn

from kadr.bench.cases import DECODE, DIT, END_TO_END, FPS, SCHEDULES, WAYS
from kadr.bench.runner import Absent, Contender
from kadr.bench.stage_case import NEGATIVE, PROMPT, SEED, Work, stored_bytes
from kadr.media.postprocess import to_uint8
from kadr.pipeline.progress import ignore_progress
from kadr.pipeline.stages.text import PromptEncoder
from kadr.sampling.noise import NoiseStreams
from tests.oracles import diffusers_transformer, diffusers_vae

NAME = "diffusers"
logging.set_verbosity_error()  # it wonders at noise levels that are given
Change = Callable[[nn.Module], nn.Module]


def enter(work: Work, stack: ExitStack) -> Iterator[Contender | Absent]:
    yield from contenders(work, NAME, lambda module: module)


def contenders(work: Work, name: str, change: Change) -> Iterator[Contender | Absent]:
    """Args: change: what is done to the transformer, the decoder and the encoder before they run."""
    if work.stage != DIT and work.checkpoint.info.vae_family is None:
        yield Absent(name, "has no VAE of this shape; that of the demo is of no released family")
        return
    if work.stage == END_TO_END and SCHEDULES[work.schedule or "8"].guidance.stg_scale:
        yield Absent(name, "has no STG")
        return
    dtype = str(work.dtype).removeprefix("torch.")
    if work.stage == DIT:
        module = change(transformer(work))
        yield Contender(name=name, run=velocity(work, module), dtype=dtype, weights=stored_bytes(module))
    elif work.stage == END_TO_END:
        yield Contender(name=name, run=whole(work, change), dtype=dtype)
    else:
        model = vae(work, change)
        half = model.decoder if work.stage == DECODE else model.encoder
        run = decoded(work, model) if work.stage == DECODE else encoded(work, model)
        yield Contender(name=name, run=run, dtype=dtype, weights=stored_bytes(half))


def transformer(work: Work) -> nn.Module:
    return diffusers_transformer(work.checkpoint.load_transformer(work.dtype)).to(work.device)


def vae(work: Work, change: Change) -> AutoencoderKLLTXVideo:
    family = work.checkpoint.info.vae_family
    assert family is not None
    made = diffusers_vae(work.checkpoint.load_vae(work.dtype), family).to(work.device)
    made.encoder, made.decoder = change(made.encoder), change(made.decoder)
    return made


def velocity(work: Work, module: nn.Module) -> Callable[[], Tensor]:
    """One evaluation, called as `LTXConditionPipeline` does."""
    given, dtype = work.given, work.dtype
    arguments = {
        "hidden_states": given["tokens"].to(dtype),
        "encoder_hidden_states": given["text"].to(dtype),
        "timestep": given["level"] * 1000,
        "encoder_attention_mask": given["mask"].to(dtype),
        "video_coords": given["positions"],
    }
    return lambda: module(**arguments, return_dict=False)[0]


def decoded(work: Work, model: AutoencoderKLLTXVideo) -> Callable[[], Tensor]:
    latents = _shaped(model.latents_std) * work.given["latents"].to(work.dtype) + _shaped(model.latents_mean)
    level = work.given["level"] if work.vae.timestep_conditioning else None
    return lambda: model.decode(latents, level, return_dict=False)[0]


def encoded(work: Work, model: AutoencoderKLLTXVideo) -> Callable[[], Tensor]:
    pixels = work.given["pixels"].to(work.dtype)
    mean, deviation = _shaped(model.latents_mean), _shaped(model.latents_std)
    return lambda: (model.encode(pixels).latent_dist.mean - mean) / deviation


def _shaped(row: Tensor) -> Tensor:
    return row[None, :, None, None, None]


def whole(work: Work, change: Change) -> Callable[[], Tensor]:
    """The pipeline, from encoded prompts to frames, with kadr's noise and noise levels."""
    engine = work.engine(WAYS["auto"])
    texts = PromptEncoder(engine.components, [PROMPT, NEGATIVE]).encode(ignore_progress)
    (plan,) = engine.resolve_passes(work.request)
    pipeline = LTXConditionPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(work, change),
        text_encoder=None,
        tokenizer=None,
        transformer=change(transformer(work)),
    )
    pipeline.set_progress_bar_config(disable=True)
    _give_noise(pipeline, NoiseStreams(SEED).draw("initial", (1, work.transformer.in_channels, *_sides(work))))
    prompt, negative = (text.embeddings.to(work.dtype) for text in texts)
    settings = {
        "prompt_embeds": prompt,
        "prompt_attention_mask": texts[0].mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": texts[1].mask,
        "width": work.clip.size.width,
        "height": work.clip.size.height,
        "num_frames": work.clip.frames,
        "frame_rate": FPS,
        "timesteps": (plan.sigmas * 1000).tolist(),
        "guidance_scale": plan.step_guidance[0].cfg_scale,
        "decode_timestep": work.request.decode_timestep,
        "decode_noise_scale": 0.0,
        "output_type": "pt",
    }
    return lambda: to_uint8(pipeline(**settings).frames[0].movedim(0, 1)).cpu()


def _sides(work: Work) -> tuple[int, int, int]:
    return work.clip.grid.frames, work.clip.grid.height, work.clip.grid.width


def _give_noise(pipeline: LTXConditionPipeline, noise: Tensor) -> None:
    """Have the pipeline begin with this noise: it takes none from outside."""
    prepare = pipeline.prepare_latents

    def prepared(*given: Any, **more: Any) -> tuple[Any, ...]:
        latents, *rest = prepare(*given, **more)
        return (pipeline._pack_latents(noise).to(latents), *rest)

    pipeline.prepare_latents = prepared
