"""Kadr's own ways to do the work of a stage, as a user would have them: opened, planned and lent by the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kadr.bench.cases import DECODE, DIT, ENCODE, END_TO_END, TEXT, WAYS, Way
from kadr.bench.runner import Absent, Contender
from kadr.bench.stage_case import Entrants, Work
from kadr.errors import RequestError
from kadr.pipeline.engine import Engine
from kadr.pipeline.stages.encode import ENCODE_CHUNK_FRAMES
from kadr.planning.vae_stages import vae_encoder_parameters

PLANNED = {TEXT: "text", DIT: "denoise", DECODE: "decode"}  # what plans call these stages


def ways(names: Iterable[str]) -> Entrants:
    """Kadr, in these ways; those that do the same in a stage as the first run once."""

    def enter(work: Work, stack: ExitStack) -> Iterator[Contender | Absent]:
        seen: set[tuple[torch.dtype, str | None, bool]] = set()
        for way in (WAYS[name] for name in names):
            if work.stage not in way.stages:
                continue
            try:
                engine = work.engine(way)
            except RequestError as error:  # not on this device
                yield Absent(f"kadr {way.name}", str(error))
                continue
            kind = engine.components.dtype, way.quant, way.compiled
            if kind not in seen:
                seen.add(kind)
                yield own(work, way, engine, stack)

    return enter


def own(work: Work, way: Way, engine: Engine, stack: ExitStack) -> Contender:
    """Kadr in one way; its module is lent until the stack closes."""
    run, plan = _run(work, engine, stack), engine.components.plan
    notes = plan.reasons() if plan is not None else []
    if way.quant not in (None, engine.components.quant):
        notes.append(f"weights are stored as {engine.components.quant}: this machine is slow at {way.quant}")
    return Contender(
        name=f"kadr {way.name}",
        run=run,
        dtype=str(engine.components.dtype).removeprefix("torch."),
        weights=_weights(work, engine),
        note="; ".join(notes),
        own=True,
    )


def _run(work: Work, engine: Engine, stack: ExitStack) -> Callable[[], Tensor]:
    """What does the work."""
    parts, given = engine.components, work.given
    if work.stage == END_TO_END:
        return lambda: torch.from_numpy(engine.generate(work.request).frames)
    parts.apply_plan(engine.plan(work.request))
    dtype = parts.dtype
    if work.stage == TEXT:
        encoder = stack.enter_context(parts.text_encoder())
        return lambda: encoder(given["ids"], given["mask"])[given["mask"]]
    if work.stage == DIT:
        module = stack.enter_context(parts.transformer())
        tokens, text = given["tokens"].to(dtype), given["text"].to(dtype)
        rope = module.compute_rope(given["positions"])
        return lambda: module(tokens, rope, text, given["mask"], given["level"])
    if work.stage == ENCODE:
        vae = stack.enter_context(parts.vae_encoder())
        pixels = given["pixels"].to(dtype)
        return lambda: vae.encode(pixels, chunk_frames=ENCODE_CHUNK_FRAMES)
    return _decode(stack.enter_context(parts.vae_decoder()), work, dtype)


def _weights(work: Work, engine: Engine) -> int | None:
    """Bytes in memory at once, as the plan has them; pages of files that others share among them."""
    if work.stage == ENCODE:  # not in the plan of a request without pictures
        return engine.components.dtype.itemsize * vae_encoder_parameters(work.vae).total
    plan, stage = engine.components.plan, PLANNED.get(work.stage)
    if plan is None or stage is None:
        return None
    choice = plan.stage(stage).placement
    return choice.mapped_bytes + choice.private_bytes


def _decode(vae: Any, work: Work, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Frames are put where they belong as they come, as they go into a file: no second copy of the clip is made."""
    latents, clip = work.given["latents"].to(dtype), work.clip
    level = work.given["level"] if work.vae.timestep_conditioning else None

    def run() -> Tensor:
        made = torch.empty(1, 3, clip.frames, clip.size.height, clip.size.width, dtype=dtype, device=work.device)
        done = 0
        for chunk in vae.decode_stream(latents, level=level, noise=torch.randn):
            made[:, :, done : done + chunk.shape[2]] = chunk
            done += chunk.shape[2]
        return made

    return run
