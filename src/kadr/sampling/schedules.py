"""Which noise levels a sampling visits.

A schedule is a list of levels t in (0, 1], falling; the last step goes from its last level to 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kadr.errors import CheckpointError, RequestError

SAMPLERS = ("Uniform", "LinearQuadratic")
SHIFTINGS = (None, "SD3")
THRESHOLD_NOISE = 0.025  # how far from pure noise the first, linear half of a linear-quadratic schedule goes
SHIFT_LOW, SHIFT_HIGH = (1024, 0.95), (4096, 2.05)  # tokens and shift: the two points that SD3's line goes through


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a model's levels are made, as its header says.

    Args:
        sampler: "Uniform" or "LinearQuadratic".
        shifting: "SD3" moves the levels towards noise, the more the more tokens there are; None leaves them.
        shift_terminal: stretch a shifted list so that it ends at this level.
        allowed_sigmas: the only levels the model was distilled for, rounded to four digits; None where any will do.
    """

    sampler: str = "Uniform"
    shifting: str | None = None
    shift_terminal: float | None = None
    allowed_sigmas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise CheckpointError(f"the scheduler's sampler is {self.sampler!r}; kadr knows {', '.join(SAMPLERS)}.")
        if self.shifting not in SHIFTINGS:
            raise CheckpointError(f"the scheduler's shifting is {self.shifting!r}; kadr knows SD3 and none.")

    @classmethod
    def from_header(cls, header: Mapping[str, Any], allowed_sigmas: Sequence[float] | None = None) -> Schedule:
        """Read the "scheduler" entry of an official header, and its "allowed_inference_steps" beside it."""
        return cls(
            sampler=header.get("sampler") or "Uniform",
            shifting=header.get("shifting"),
            shift_terminal=header.get("target_shift_terminal"),
            allowed_sigmas=None if allowed_sigmas is None else tuple(float(level) for level in allowed_sigmas),
        )

    def to_header(self) -> dict[str, Any]:
        """The "scheduler" entry of an official header."""
        return {
            "_class_name": "RectifiedFlowScheduler",
            "num_train_timesteps": 1000,
            "sampler": self.sampler,
            "shifting": self.shifting,
            "base_resolution": None,
            "target_shift_terminal": self.shift_terminal,
        }

    def get_sigmas(self, steps: int, *, tokens: int, skip_initial: int = 0, skip_final: int = 0) -> Tensor:
        """The levels of `steps` steps, fp32.

        Args:
            tokens: latent positions of the video itself; extra conditioning tokens do not count.
            skip_initial, skip_final: leave out so many levels at the front and at the back. What follows the
                last kept level is 0 all the same.

        Raises:
            RequestError: too few steps are left, or a level is outside `allowed`.
        """
        if steps < 1:
            raise RequestError(f"steps is {steps}; at least 1 is needed.")
        if min(skip_initial, skip_final) < 0 or skip_initial + skip_final >= steps:
            raise RequestError(
                f"{steps} steps, less {skip_initial} at the front and {skip_final} at the back, are none."
            )
        made = uniform_schedule(steps) if self.sampler == "Uniform" else linear_quadratic_schedule(steps)
        if self.shifting == "SD3":
            made = sd3_shift(made, tokens)
            if self.shift_terminal:
                made = stretch_to_terminal(made, self.shift_terminal)
        return self.check_allowed(made[skip_initial : steps - skip_final])

    def check_allowed(self, sigmas: Tensor) -> Tensor:
        """The same levels, if the model allows each of them."""
        if self.allowed_sigmas is not None:
            known = {round(level, 4) for level in self.allowed_sigmas}
            strange = [level for level in sigmas.tolist() if round(level, 4) not in known]
            if strange:
                raise RequestError(
                    f"this model was distilled for the noise levels {', '.join(map(str, self.allowed_sigmas))}; "
                    f"the schedule has {', '.join(f'{level:.4f}' for level in strange)}. "
                    "Leave out --steps, or give levels of that list."
                )
        return sigmas


def explicit_sigmas(sigmas: Sequence[float]) -> Tensor:
    """A list given by hand: used as it is, never shifted.

    Raises:
        RequestError: it is empty, leaves (0, 1], or does not fall.
    """
    made = torch.tensor(list(sigmas), dtype=torch.float32)
    if not len(made) or not bool(((made > 0) & (made <= 1)).all()) or bool((made.diff() >= 0).any()):
        raise RequestError(f"the noise levels are {list(sigmas)}; they must fall, between 1 and 0, without 0 itself.")
    return made


def uniform_schedule(steps: int) -> Tensor:
    """1, 1 - 1/n, ..., 1/n."""
    return torch.linspace(1, 1 / steps, steps)


def linear_quadratic_schedule(steps: int) -> Tensor:
    """Tiny equal steps over the first half, then a parabola that meets them with the same slope and ends at 0."""
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
    """t -> e^m / (e^m + 1/t - 1), with m linear in the number of tokens and not clamped (SD3, arXiv:2403.03206)."""
    (low, base), (high, top) = SHIFT_LOW, SHIFT_HIGH
    shift = base + (tokens - low) * (top - base) / (high - low)
    return math.exp(shift) / (math.exp(shift) + (1 / sigmas - 1))


def stretch_to_terminal(sigmas: Tensor, shift_terminal: float) -> Tensor:
    """Scale the distances from 1 so that the last level is `shift_terminal`. A list of pure noise alone stays."""
    distance = 1 - sigmas
    if distance[-1] == 0:
        return sigmas
    return 1 - distance / (distance[-1] / (1 - shift_terminal))
