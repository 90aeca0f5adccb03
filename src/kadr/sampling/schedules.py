"""Schedules: the sigmas that a sampler visits, from 1, pure noise, towards 0, the clean video.

A schedule is a list of decreasing sigmas in (0, 1]; the last step goes from its last sigma to 0. The
official package calls a sigma a timestep; here a timestep is only what a network takes as input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kadr.errors import CheckpointError, RequestError
from kadr.quoting import quote
from kadr.validation import is_number

SCHEDULE_SAMPLERS = ("Uniform", "LinearQuadratic")
SHIFTINGS = (None, "SD3")
THRESHOLD_NOISE = 0.025  # how far from pure noise the first, linear half of a linear-quadratic schedule goes
SHIFT_LOW, SHIFT_HIGH = (1024, 0.95), (4096, 2.05)  # (tokens, shift): the two points that SD3's line goes through


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The scheduler of a model, as its header says: how sigmas are computed from a number of steps.

    Args:
        sampler: "Uniform" or "LinearQuadratic".
        shifting: "SD3" shifts the sigmas towards noise, the more the more tokens there are; None does not.
        shift_terminal: stretch a shifted schedule so that it ends at this sigma.
        allowed_sigmas: the only sigmas the model was distilled for, rounded to four digits; None where any will do.
    """

    sampler: str = "Uniform"
    shifting: str | None = None
    shift_terminal: float | None = None
    allowed_sigmas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SCHEDULE_SAMPLERS:
            raise CheckpointError(
                f"the scheduler's sampler is {quote(self.sampler)}; kadr knows {', '.join(SCHEDULE_SAMPLERS)}."
            )
        if self.shifting not in SHIFTINGS:
            raise CheckpointError(f"the scheduler's shifting is {quote(self.shifting)}; kadr knows SD3 and none.")

        if self.shift_terminal is not None and not (is_number(self.shift_terminal) and 0 <= self.shift_terminal < 1):
            raise CheckpointError(
                f"the scheduler's target_shift_terminal is {quote(self.shift_terminal)}; it must be a number from 0 to "
                "less than 1."
            )
        for sigma in self.allowed_sigmas or ():
            if not (is_number(sigma) and 0 <= sigma <= 1):
                raise CheckpointError(
                    f"the allowed_inference_steps have {quote(sigma)}; they must lie between 0 and 1."
                )

    @classmethod
    def from_header(cls, header: Mapping[str, Any], allowed_sigmas: Sequence[float] | None = None) -> Schedule:
        """Reads the "scheduler" entry of an official header, and its "allowed_inference_steps" beside it."""
        return cls(
            sampler=header.get("sampler") or "Uniform",
            shifting=header.get("shifting"),
            shift_terminal=header.get("target_shift_terminal"),
            allowed_sigmas=None if allowed_sigmas is None else tuple(allowed_sigmas),
        )

    def to_header(self) -> dict[str, Any]:
        """Returns the "scheduler" entry of an official header."""
        return {
            "_class_name": "RectifiedFlowScheduler",
            "num_train_timesteps": 1000,
            "sampler": self.sampler,
            "shifting": self.shifting,
            "base_resolution": None,
            "target_shift_terminal": self.shift_terminal,
        }

    def get_sigmas(self, steps: int, *, tokens: int, skip_initial: int = 0, skip_final: int = 0) -> Tensor:
        """Returns the sigmas of `steps` steps, fp32 (steps - skip_initial - skip_final).

        Args:
            tokens: latent tokens of the video itself; extra conditioning tokens do not count.
            skip_initial, skip_final: sigmas left out at the front and at the back. The last step goes to 0 all the
                same.

        Raises:
            RequestError: no step is left, or a sigma is not in `allowed_sigmas`.
        """
        _check_steps(steps, skip_initial, skip_final)
        sigmas = uniform_schedule(steps) if self.sampler == "Uniform" else linear_quadratic_schedule(steps)
        if self.shifting == "SD3":
            sigmas = sd3_shift(sigmas, tokens)
            if self.shift_terminal:
                sigmas = stretch_to_terminal(sigmas, self.shift_terminal)
        return self.check_allowed(sigmas[skip_initial : steps - skip_final])

    def check_allowed(self, sigmas: Tensor) -> Tensor:
        """Returns the sigmas, if the model was distilled for each of them.

        Raises:
            RequestError: one is not in `allowed_sigmas`.
        """
        if self.allowed_sigmas is not None:
            allowed = {round(sigma, 4) for sigma in self.allowed_sigmas}
            refused = [sigma for sigma in sigmas.tolist() if round(sigma, 4) not in allowed]
            if refused:
                raise RequestError(
                    f"this model was distilled for the sigmas {', '.join(map(str, self.allowed_sigmas))}; "
                    f"the schedule has {', '.join(f'{sigma:.4f}' for sigma in refused)}. "
                    "Leave out --steps, or give sigmas of that list."
                )
        return sigmas


def _check_steps(steps: int, skip_initial: int, skip_final: int) -> None:
    if steps < 1:
        raise RequestError(f"steps is {steps}; at least 1 is needed.")
    if min(skip_initial, skip_final) < 0 or skip_initial + skip_final >= steps:
        raise RequestError(
            f"skip_initial is {skip_initial} and skip_final is {skip_final}; both must be at least 0, and leave "
            f"at least one of the {steps} steps."
        )


def explicit_sigmas(sigmas: Sequence[float]) -> Tensor:
    """Returns sigmas from the user as fp32: used as they are, never shifted.

    Raises:
        RequestError: there are none, one is not in (0, 1], or they do not decrease.
    """
    schedule = torch.tensor(list(sigmas), dtype=torch.float32)
    if not len(schedule) or not bool(((schedule > 0) & (schedule <= 1)).all()) or bool((schedule.diff() >= 0).any()):
        raise RequestError(f"the sigmas are {list(sigmas)}; they must decrease, from at most 1, and stay above 0.")
    return schedule


def uniform_schedule(steps: int) -> Tensor:
    """Returns 1, 1 - 1/n, ..., 1/n."""
    return torch.linspace(1, 1 / steps, steps)


def linear_quadratic_schedule(steps: int) -> Tensor:
    """Returns tiny equal steps in the first half, then a parabola that continues their slope and ends at 0."""
    if steps == 1:
        return torch.ones(1)
    linear = steps // 2
    left = steps - linear
    excess = linear - THRESHOLD_NOISE * steps
    square = excess / (linear * left**2)
    slope = THRESHOLD_NOISE / linear - 2 * excess / left**2
    offset = square * linear**2
    down = [i * THRESHOLD_NOISE / linear for i in range(linear)]
    down += [square * i**2 + slope * i + offset for i in range(linear, steps)]
    return torch.tensor([1 - u for u in down], dtype=torch.float32)


def sd3_shift(sigmas: Tensor, tokens: int) -> Tensor:
    """Shifts sigmas towards noise: s -> e^m / (e^m + 1/s - 1), with m linear in the number of tokens and not clamped.

    Source: SD3, arXiv:2403.03206.
    """
    (low, base), (high, top) = SHIFT_LOW, SHIFT_HIGH
    shift = base + (tokens - low) * (top - base) / (high - low)
    return math.exp(shift) / (math.exp(shift) + (1 / sigmas - 1))


def stretch_to_terminal(sigmas: Tensor, shift_terminal: float) -> Tensor:
    """Scales the distances from 1 so that the last sigma is `shift_terminal`. A schedule of 1 alone stays."""
    distance = 1 - sigmas
    if distance[-1] == 0:
        return sigmas
    return 1 - distance / (distance[-1] / (1 - shift_terminal))
