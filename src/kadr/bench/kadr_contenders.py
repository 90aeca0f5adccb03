"""Kadr's own ways to do the work of a stage, as a user would have them: opened, planned and lent by the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kadr.bench.cases import DECODE, DIT, ENCODE, END_TO_END, TEXT, VARIANTS, Variant
from kadr.bench.runner import Contender, SkippedContender
from kadr.bench.stage_case import ContenderFactory, StageCase
from kadr.errors import RequestError
from kadr.pipeline.engine import Engine
from kadr.pipeline.stages.encode import ENCODE_CHUNK_FRAMES
from kadr.planning.vae_stages import vae_encoder_parameters

PLAN_STAGES = {TEXT: "text", DIT: "denoise", DECODE: "decode"}  # what plans call these stages


def kadr_contenders(variants: Iterable[str]) -> ContenderFactory:
    """Kadr, in these ways; those that do the same in a stage as the first run once."""

    def enter(work: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
        seen: set[tuple[torch.dtype, str | None, bool]] = set()
        for way in (VARIANTS[name] for name in variants):
            if work.stage not in way.stages:
                continue
            try:
                engine = work.open_engine(way)
            except RequestError as error:  # not on this device
                yield SkippedContender(f"kadr {way.name}", str(error))
                continue
            kind = engine.components.dtype, way.quant, way.compile
            if kind not in seen:
                seen.add(kind)
                yield kadr_contender(work, way, engine, stack)

    return enter


def kadr_contender(stage_case: StageCase, variant: Variant, engine: Engine, stack: ExitStack) -> Contender:
    """Kadr in one way; its module is lent until the stack closes."""
    run, plan = _create_task(stage_case, engine, stack), engine.components.plan
    notes = plan.reasons() if plan is not None else []
    if variant.quant not in (None, engine.components.quant):
        notes.append(f"weights are stored as {engine.components.quant}: this machine is slow at {variant.quant}")
    return Contender(
        name=f"kadr {variant.name}",
        run=run,
        dtype=str(engine.components.dtype).removeprefix("torch."),
        weight_bytes=_weight_bytes(stage_case, engine),
        note="; ".join(notes),
        is_kadr=True,
    )


def _create_task(stage_case: StageCase, engine: Engine, stack: ExitStack) -> Callable[[], Tensor]:
    """What does the work."""
    parts, given = engine.components, stage_case.inputs
    if stage_case.stage == END_TO_END:
        return lambda: torch.from_numpy(engine.generate(stage_case.request).frames)
    parts.apply_plan(engine.plan(stage_case.request))
    dtype = parts.dtype
    if stage_case.stage == TEXT:
        encoder = stack.enter_context(parts.text_encoder())
        return lambda: encoder(given["ids"], given["mask"])[given["mask"]]
    if stage_case.stage == DIT:
        module = stack.enter_context(parts.transformer())
        tokens, text = given["tokens"].to(dtype), given["text"].to(dtype)
        rope = module.compute_rope(given["positions"])
        return lambda: module(tokens, rope, text, given["mask"], given["level"])
    if stage_case.stage == ENCODE:
        vae = stack.enter_context(parts.vae_encoder())
        pixels = given["pixels"].to(dtype)
        return lambda: vae.encode(pixels, chunk_frames=ENCODE_CHUNK_FRAMES)
    return _create_decode_task(stack.enter_context(parts.vae_decoder()), stage_case, dtype)


def _weight_bytes(stage_case: StageCase, engine: Engine) -> int | None:
    """Bytes in memory at once, as the plan has them; pages of files that others share among them."""
    if stage_case.stage == ENCODE:  # not in the plan of a request without pictures
        return engine.components.dtype.itemsize * vae_encoder_parameters(stage_case.vae_config).total
    plan, stage = engine.components.plan, PLAN_STAGES.get(stage_case.stage)
    if plan is None or stage is None:
        return None
    choice = plan.stage(stage).placement
    return choice.mapped_bytes + choice.private_bytes


def _create_decode_task(vae: Any, stage_case: StageCase, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Frames are put where they belong as they come, as they go into a file: no second copy of the clip is made."""
    latents, clip = stage_case.inputs["latents"].to(dtype), stage_case.shape
    level = stage_case.inputs["level"] if stage_case.vae_config.timestep_conditioning else None

    def run() -> Tensor:
        made = torch.empty(1, 3, clip.frames, clip.size.height, clip.size.width, dtype=dtype, device=stage_case.device)
        done = 0
        for chunk in vae.decode_stream(latents, timestep=level, noise_source=torch.randn):
            made[:, :, done : done + chunk.shape[2]] = chunk
            done += chunk.shape[2]
        return made

    return run
