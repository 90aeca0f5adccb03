"""Sigmas and timesteps as diffusers' pipelines compute them, which is not always as the official package does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.sampling.schedules import (
    SHIFT_HIGH,
    SHIFT_LOW,
    Schedule,
    linear_quadratic_schedule,
    stretch_to_terminal,
)
from kadr.sampling.settings import MAX_STEPS
from kadr.validation import check_range, is_number

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Timesteps:
    """The steps of a call.

    Args:
        sigmas: fp32 values, decreasing. The last may be 0: that step only takes the noise off clean images again.
        timesteps: what a callback is given for each of them, fp32.
    """

    sigmas: tuple[float, ...]
    timesteps: torch.Tensor


def shifted_timesteps(schedule: Schedule, steps: int, tokens: int) -> Timesteps:
    """Returns the steps of the text and image pipelines: uniform, shifted if the scheduler's config says so.

    A model whose official schedule is linear-quadratic gets plain uniform sigmas, as in diffusers.

    Source: FlowMatchEulerDiscreteScheduler.set_timesteps, given uniform sigmas and the shift of the number of tokens.
    """
    check_range("num_inference_steps", steps, 1, MAX_STEPS, is_whole=True)
    sigmas = torch.from_numpy(np.linspace(1.0, 1 / steps, steps).astype(np.float32))
    if schedule.shifting is not None:
        (low, base), (high, top) = SHIFT_LOW, SHIFT_HIGH
        shift = math.exp(tokens * (top - base) / (high - low) + base - (top - base) / (high - low) * low)
        sigmas = shift / (shift + (1 / sigmas - 1))
        if schedule.shift_terminal:
            sigmas = stretch_to_terminal(sigmas, schedule.shift_terminal)
    return _from_sigmas(sigmas)


def linear_quadratic_timesteps(steps: int) -> Timesteps:
    """Returns the steps of the condition pipeline: linear-quadratic for every model, never shifted."""
    check_range("num_inference_steps", steps, 1, MAX_STEPS, is_whole=True)
    return _from_sigmas(linear_quadratic_schedule(steps) * TRAIN_TIMESTEPS / TRAIN_TIMESTEPS)


def parse_timesteps(timesteps: Any) -> Timesteps:
    """Returns the steps of timesteps that a script gives, from at most 1000 down to at least 0.

    Raises:
        RequestError: they are not numbers, or do not decrease.
    """
    values = timesteps.tolist() if isinstance(timesteps, torch.Tensor | np.ndarray) else timesteps
    if not isinstance(values, Sequence) or not values or not all(is_number(value) for value in values):
        raise RequestError(
            f"timesteps are {quote(timesteps)}; they must be a list of numbers, such as [1000, 900, 700]."
        )
    steps = torch.tensor(values, dtype=torch.float32)
    if bool((steps.diff() >= 0).any()) or steps[0] > TRAIN_TIMESTEPS or steps[-1] < 0 or steps[0] == 0:
        raise RequestError(
            f"timesteps are {quote(values)}; they must decrease, from at most {TRAIN_TIMESTEPS} to at least 0."
        )
    return Timesteps(tuple((steps / TRAIN_TIMESTEPS).tolist()), steps)


def skip_to_strength(timesteps: Timesteps, denoise_strength: float) -> Timesteps:
    """Returns the last `denoise_strength` of the steps, rounded down.

    Raises:
        RequestError: no step is left.
    """
    count = len(timesteps.timesteps)
    remaining = min(int(count * denoise_strength), count)
    if remaining < 1:
        raise RequestError(
            f"denoise_strength is {denoise_strength}, which leaves none of {count} steps. Give at least {1 / count:g}, "
            "or more steps."
        )
    start = count - remaining
    return Timesteps(timesteps.sigmas[start:], timesteps.timesteps[start:])


def _from_sigmas(sigmas: torch.Tensor) -> Timesteps:
    return Timesteps(tuple(sigmas.float().tolist()), sigmas.float() * TRAIN_TIMESTEPS)
