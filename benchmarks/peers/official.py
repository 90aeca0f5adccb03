"""Contenders of the official package: its modules on kadr's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

from torch import Tensor

from kadr.bench.cases import DECODE, DIT
from kadr.bench.runner import Contender, SkippedContender
from kadr.bench.stage_case import StageCase, stored_bytes
from tests.oracles import official_transformer, official_vae

NAME = "official"


def create_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
    dtype = str(stage_case.dtype).removeprefix("torch.")
    if stage_case.stage == DIT:
        run, weights = create_transformer_task(stage_case)
    else:
        run, weights = create_decode_task(stage_case) if stage_case.stage == DECODE else create_encode_task(stage_case)
    yield Contender(name=NAME, run=run, dtype=dtype, weight_bytes=weights)


def create_transformer_task(stage_case: StageCase) -> tuple[Callable[[], Tensor], int]:
    """Returns one model evaluation, called as `LTXVideoPipeline` does, and the bytes of the weights."""
    module = official_transformer(stage_case.checkpoint.load_transformer(stage_case.dtype)).to(stage_case.device)
    inputs, dtype = stage_case.inputs, stage_case.dtype
    tokens, prompt_embeds = inputs["tokens"].to(dtype), inputs["prompt_embeds"].to(dtype)
    mask = inputs["prompt_attention_mask"].long()

    def run() -> Tensor:
        return module(
            tokens,
            indices_grid=inputs["positions"],
            encoder_hidden_states=prompt_embeds,
            encoder_attention_mask=mask,
            timestep=inputs["sigma"],
            return_dict=False,
        )[0]

    return run, stored_bytes(module)


def create_decode_task(stage_case: StageCase) -> tuple[Callable[[], Tensor], int]:
    ours = stage_case.checkpoint.load_vae(stage_case.dtype)
    module = official_vae(ours).to(stage_case.device)
    latents = ours.statistics.to(stage_case.device).denormalise(stage_case.inputs["latents"].to(stage_case.dtype))
    timestep = stage_case.inputs["decode_timestep"] if stage_case.vae_config.timestep_conditioning else None
    shape = (1, 3, stage_case.shape.frames, stage_case.shape.size.height, stage_case.shape.size.width)
    return (
        lambda: module.decode(latents, target_shape=shape, timestep=timestep).sample,
        stored_bytes(module.decoder),
    )


def create_encode_task(stage_case: StageCase) -> tuple[Callable[[], Tensor], int]:
    ours = stage_case.checkpoint.load_vae(stage_case.dtype)
    module = official_vae(ours).to(stage_case.device)
    statistics, pixels = ours.statistics.to(stage_case.device), stage_case.inputs["pixels"].to(stage_case.dtype)
    return lambda: statistics.normalise(module.encode(pixels).latent_dist.mean), stored_bytes(module.encoder)
