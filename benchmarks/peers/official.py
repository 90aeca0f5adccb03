"""The official package's modules on kadr's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

from torch import Tensor

from kadr.bench.cases import DECODE, DIT
from kadr.bench.runner import Absent, Contender
from kadr.bench.stage_case import Work, stored_bytes
from tests.oracles import official_transformer, official_vae

NAME = "official"


def enter(work: Work, stack: ExitStack) -> Iterator[Contender | Absent]:
    dtype = str(work.dtype).removeprefix("torch.")
    if work.stage == DIT:
        run, weights = velocity(work)
    else:
        run, weights = decoded(work) if work.stage == DECODE else encoded(work)
    yield Contender(name=NAME, run=run, dtype=dtype, weights=weights)


def velocity(work: Work) -> tuple[Callable[[], Tensor], int]:
    """One evaluation, called as `LTXVideoPipeline` does."""
    module = official_transformer(work.checkpoint.load_transformer(work.dtype)).to(work.device)
    given = work.given
    tokens, text, mask = given["tokens"].to(work.dtype), given["text"].to(work.dtype), given["mask"].long()

    def run() -> Tensor:
        return module(
            tokens,
            indices_grid=given["positions"],
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=given["level"],
            return_dict=False,
        )[0]

    return run, stored_bytes(module)


def decoded(work: Work) -> tuple[Callable[[], Tensor], int]:
    ours = work.checkpoint.load_vae(work.dtype)
    module = official_vae(ours).to(work.device)
    latents = ours.statistics.to(work.device).denormalise(work.given["latents"].to(work.dtype))
    level = work.given["level"] if work.vae.timestep_conditioning else None
    shape = (1, 3, work.clip.frames, work.clip.size.height, work.clip.size.width)
    return lambda: module.decode(latents, target_shape=shape, timestep=level).sample, stored_bytes(module.decoder)


def encoded(work: Work) -> tuple[Callable[[], Tensor], int]:
    ours = work.checkpoint.load_vae(work.dtype)
    module = official_vae(ours).to(work.device)
    statistics, pixels = ours.statistics.to(work.device), work.given["pixels"].to(work.dtype)
    return lambda: statistics.normalise(module.encode(pixels).latent_dist.mean), stored_bytes(module.encoder)
