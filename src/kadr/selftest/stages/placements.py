"""Placements: the networks as they are placed give what their definitions give, and streamed blocks the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kadr.errors import PlanError
from kadr.kernels import mode
from kadr.nn.linear import uses_8bit_matmul
from kadr.selftest.result import Check
from kadr.selftest.stages.kernels import compare_rows
from kadr.selftest.subject import Subject
from kadr.shapes import SPATIAL_COMPRESSION
from kadr.spec.offload import OFFLOAD_BLOCKS, OFFLOAD_NONE

# The same kernels on the same weights: they are equal to the bit where kernels do not depend on a weight's address.
MAX_PLACEMENT_ERRORS = {torch.float32: 1e-4, torch.bfloat16: 0.03}
# Through a whole network errors add up: the demo has 0.015 in bfloat16, and 0.03 with 8-bit matmuls, whose kernels
# choose other codes; larger networks have more.
MAX_NETWORK_ERRORS = {torch.float32: 2e-3, torch.bfloat16: 0.15}
MAX_8BIT_NETWORK_ERROR = 0.15


def check_placements(subject: Subject) -> Iterator[Check]:
    """Compares transformer and decoder with themselves in other placements, row by row; each is in memory alone."""
    yield from _check_decoder(subject)
    yield from _check_transformer(subject)
    yield from _check_streaming(subject)


def _check_streaming(subject: Subject) -> Iterator[Check]:
    prompt, latents = subject.embeddings[0], subject.latents
    with subject.clip_denoiser() as model:
        dtype, is_streamed = model.dtype, model.placement.streamed_blocks > 0
        resident, _ = model.predict_clip(0.5, prompt, latents)
    subject.engine.unload()
    other = subject.second_engine(offload=OFFLOAD_NONE if is_streamed else OFFLOAD_BLOCKS)
    try:
        with subject.clip_denoiser(other) as model:
            streamed, _ = model.predict_clip(0.5, prompt, latents)
    except PlanError:
        yield Check("placements that do not fit in memory, and were not compared", 1)
        return
    finally:
        other.unload()
    yield compare_rows("streamed against resident blocks", streamed, resident, MAX_PLACEMENT_ERRORS[dtype])


def _check_transformer(subject: Subject) -> Iterator[Check]:
    """Compares the placed transformer with one that was loaded without fast kernels, token by token."""
    prompt, latents = subject.embeddings[0], subject.latents
    with subject.clip_denoiser() as model:
        fast, _ = model.predict_clip(0.5, prompt, latents)
        is_8bit = any(map(uses_8bit_matmul, model.module.modules()))
    subject.engine.unload()
    other = subject.second_engine()
    with mode.override(mode.REFERENCE), subject.clip_denoiser(other) as model:
        plain, _ = model.predict_clip(0.5, prompt, latents)
    other.unload()
    limit = MAX_8BIT_NETWORK_ERROR if is_8bit else MAX_NETWORK_ERRORS[model.dtype]
    yield compare_rows("transformer", fast, plain, limit)


def _check_decoder(subject: Subject) -> Iterator[Check]:
    """Compares the placed decoder with the plain one in float32, one row of 32 pixels at a time."""
    with subject.vae_decoder() as vae:
        fast = subject.decode(vae, subject.latents)
    loader = subject.engine.loader
    with mode.override(mode.REFERENCE):
        definition = loader.load_vae_decoder(torch.float32, keep_storage_dtype=False).to(subject.device)
        plain = subject.decode(definition, subject.latents, torch.float32)
    fast, plain = (pixels.unflatten(-1, (-1, SPATIAL_COMPRESSION)) for pixels in (fast, plain))
    yield compare_rows("VAE decoder", fast, plain, MAX_NETWORK_ERRORS[subject.spec.dtype])
