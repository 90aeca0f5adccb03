"""Kadr's own contenders for a stage, as users run it: modules opened, planned and acquired by the engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kadr.bench.cases import DECODE, DIT, ENCODE, END_TO_END, TEXT, VARIANTS, Variant
from kadr.bench.own_process import contenders_in_own_process
from kadr.bench.runner import Contender, SkippedContender
from kadr.bench.stage_case import ContenderFactory, StageCase
from kadr.errors import RequestError
from kadr.kernels.mode import ZENTORCH_VARIABLE
from kadr.pipeline.engine import Engine
from kadr.pipeline.loading.module_placement import place_module
from kadr.planning.costs.vae_activations import ENCODE_CHUNK_FRAMES
from kadr.planning.costs.vae_stages import vae_encoder_parameters
from kadr.planning.placement import Placement
from kadr.planning.plan import Plan

PLAN_STAGES = {TEXT: "text", DIT: "denoise", DECODE: "decode"}  # the names of these stages in a plan


def kadr_contenders(variants: Iterable[str]) -> ContenderFactory:
    """Returns a factory of kadr's variants. A variant that equals an earlier one in a stage is left out there."""

    def create_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
        configurations: set[tuple[torch.dtype, str | None, bool, bool]] = set()
        for variant in (VARIANTS[name] for name in variants):
            if stage_case.stage not in variant.stages:
                continue
            if variant.zentorch and find_spec("zentorch") is None:
                yield SkippedContender(f"kadr {variant.name}", "not installed: zentorch")
                continue
            try:
                engine = stage_case.open_engine(variant)
            except RequestError as error:  # not on this device
                yield SkippedContender(f"kadr {variant.name}", str(error))
                continue
            configuration = engine.spec.dtype, variant.quant, variant.compile, has_zentorch(variant)
            if configuration not in configurations:
                configurations.add(configuration)
                yield from _contenders_of(variant, engine, stage_case, stack)

    return create_contenders


def has_zentorch(variant: Variant) -> bool:
    """Returns whether zentorch's operators are within reach of a variant."""
    value = variant.environment.get(ZENTORCH_VARIABLE, os.environ.get(ZENTORCH_VARIABLE, "1"))
    return value != "0" and find_spec("zentorch") is not None


def _contenders_of(
    variant: Variant, engine: Engine, stage_case: StageCase, stack: ExitStack
) -> Iterator[Contender | SkippedContender]:
    """Yields the contender of a variant, from a process of its own where this one's environment is another."""
    if all(os.environ.get(name) == value for name, value in variant.environment.items()):
        yield kadr_contender(stage_case, variant, engine, stack)
    else:
        command = [sys.executable, "-m", "kadr.bench.variant_process", variant.name]
        yield from contenders_in_own_process(command, variant.environment, stage_case, stack)


def kadr_contender(stage_case: StageCase, variant: Variant, engine: Engine, stack: ExitStack) -> Contender:
    """Returns the contender of one variant. It holds its module until the stack closes."""
    plan = engine.plan(stage_case.request)
    run, notes = _create_task(stage_case, engine, stack), plan.reasons()
    if variant.quant not in (None, engine.spec.quant):
        notes.append(f"weights are stored as {engine.spec.quant}: this machine is slow at {variant.quant}")
    return Contender(
        name=f"kadr {variant.name}",
        run=run,
        dtype=str(engine.spec.dtype).removeprefix("torch."),
        weight_bytes=_weight_bytes(stage_case, engine.spec.dtype, plan),
        note="; ".join(notes),
        is_kadr=True,
        products="int8" if engine.spec.quant == "int8" else "",
    )


def _create_task(stage_case: StageCase, engine: Engine, stack: ExitStack) -> Callable[[], Tensor]:
    """Returns the callable that runs the stage."""
    inputs, dtype = stage_case.inputs, engine.spec.dtype
    if stage_case.stage == END_TO_END:
        return lambda: torch.from_numpy(engine.generate(stage_case.request).frames)
    modules = stack.enter_context(engine.start(stage_case.request)).modules
    mask = inputs["prompt_attention_mask"]
    if stage_case.stage == TEXT:
        encoder = stack.enter_context(modules.text_encoder())
        return lambda: encoder(inputs["input_ids"], mask)[mask]
    if stage_case.stage == DIT:
        return _create_transformer_task(stack.enter_context(modules.transformer()), inputs, dtype)
    if stage_case.stage == ENCODE:
        placement = Placement(dtype=str(dtype).removeprefix("torch."))  # the request's plan has no such stage
        loaded = modules.loader.load_vae_encoder(dtype, keep_storage_dtype=False).eval().requires_grad_(False)
        vae = place_module(loaded, placement, modules.device)
        pixels = inputs["pixels"].to(dtype)
        return lambda: vae.encode(pixels, chunk_frames=ENCODE_CHUNK_FRAMES)
    return _create_decode_task(stack.enter_context(modules.vae_decoder()), stage_case, dtype)


def _weight_bytes(stage_case: StageCase, dtype: torch.dtype, plan: Plan) -> int | None:
    """Returns the bytes of weights in memory at once, by the plan, including pages of files shared with others."""
    if stage_case.stage == ENCODE:  # not in the plan of a request without conditions
        return dtype.itemsize * vae_encoder_parameters(stage_case.vae_config).total
    stage = PLAN_STAGES.get(stage_case.stage)
    if stage is None:
        return None
    placement = plan.stage(stage).placement
    return placement.mapped_bytes + placement.private_bytes


def _create_transformer_task(module: Any, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    tokens, prompt_embeds = inputs["tokens"].to(dtype), inputs["prompt_embeds"].to(dtype)
    mask, sigma = inputs["prompt_attention_mask"], inputs["sigma"]
    rope = module.compute_rope(inputs["positions"])
    return lambda: module(tokens, rope, prompt_embeds, mask, sigma)


def _create_decode_task(vae: Any, stage_case: StageCase, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Returns a task that copies each decoded chunk into place, as into a file: the video is in memory once."""
    latents, shape = stage_case.inputs["latents"].to(dtype), stage_case.shape
    timestep = stage_case.inputs["decode_timestep"] if stage_case.vae_config.timestep_conditioning else None

    def run() -> Tensor:
        size = shape.size.height, shape.size.width
        video = torch.empty(1, 3, shape.frames, *size, dtype=dtype, device=stage_case.device)
        done = 0
        for chunk in vae.decode_stream(latents, timestep=timestep, noise_source=torch.randn):
            video[:, :, done : done + chunk.shape[2]] = chunk
            done += chunk.shape[2]
        return video

    return run
