"""Placements: the transformer with streamed blocks predicts what it does in the placement of the plan."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kadr.errors import PlanError
from kadr.selftest import figures
from kadr.selftest.result import Check, NotRun, at_most
from kadr.selftest.subject import Subject
from kadr.spec.offload import OFFLOAD_BLOCKS, OFFLOAD_NONE

# The same kernels on the same weights: they are equal to the bit where kernels do not depend on a weight's address.
MAX_PLACEMENT_ERRORS = {torch.float32: 1e-4, torch.bfloat16: 0.03}


def check_placements(subject: Subject) -> Iterator[Check]:
    """Compares a velocity of both placements, token by token; each is in memory alone."""
    prompt, latents = subject.embeddings[0], subject.latents
    with subject.clip_denoiser() as model:
        dtype, is_streamed = model.dtype, _is_streamed(subject)
        resident, _ = model.predict_clip(0.5, prompt, latents)
    subject.engine.unload()
    other = subject.second_engine(offload=OFFLOAD_NONE if is_streamed else OFFLOAD_BLOCKS)
    try:
        with subject.clip_denoiser(other) as model:
            streamed, _ = model.predict_clip(0.5, prompt, latents)
    except PlanError as refusal:
        raise NotRun("the whole transformer does not fit in memory") from refusal
    finally:
        other.unload()
    error, row = figures.worst_row(streamed, resident)
    yield at_most(
        "streamed against resident blocks: error of the worst token", error, MAX_PLACEMENT_ERRORS[dtype], f"token {row}"
    )


def _is_streamed(subject: Subject) -> bool:
    return subject.engine.plan(subject.request).stage("denoise").placement.streamed_blocks > 0
