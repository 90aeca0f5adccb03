"""Step caching: on some steps of a long schedule, reuses a cached residual instead of running the later blocks.

The transformer blocks after the first add a residual to the first block's output. Over a long schedule that residual
changes little and smoothly from step to step, so it can be reused or extrapolated. This changes the video;
docs/guides/step-caching.md says by how much. This module knows no network: it sees tensors (B, N, D) before and after
the first block, and after the last.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import prod
from typing import TYPE_CHECKING, Any

from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.sampling.settings import StepGuidance
from kadr.validation import check_fields, check_range

if TYPE_CHECKING:  # a request has a StepCache, and must not wait for torch
    from torch import Tensor

    from kadr.sampling.samplers import Denoiser

FIRST_BLOCK, TAYLOR = "first-block", "taylor"
CACHE_KINDS = (FIRST_BLOCK, TAYLOR)
DEFAULT_THRESHOLD, DEFAULT_INTERVAL, DEFAULT_ORDER = 0.08, 3, 1
MAX_INTERVAL, MAX_ORDER = 16, 2
WARMUP_STEPS = 3  # first steps, always computed: they lay out the video
COOLDOWN_STEPS = 2  # last steps, always computed: no later step could correct their error
MIN_STEPS = 10  # a shorter schedule has too little to skip, and its steps lie too far apart


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """Settings of step caching: which steps are not computed in full, and what replaces them. Lossy.

    Args:
        kind: "first-block": a step whose first block adds nearly what it added on the last computed step reuses the
            residual of that step. "taylor": every `interval`-th step is computed, and on the others the residual is
            extrapolated from the last computed ones.
        threshold: of "first-block": relative L1 change below which a step is not computed; 0 computes all.
        interval: of "taylor": 1 computes all.
        order: of "taylor": 1 extrapolates a line through the last two, 2 a parabola through the last three.
    """

    kind: str = field(kw_only=False)
    threshold: float | None = None
    interval: int | None = None
    order: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in CACHE_KINDS:
            kinds = ", ".join(CACHE_KINDS)
            raise RequestError(f"the kind of step cache is {quote(self.kind)}; it must be one of {kinds}; None is off.")
        # Defaults are filled in at once, so that a video's record has them, whatever a later version takes.
        defaults = (
            {"threshold": DEFAULT_THRESHOLD}
            if self.kind == FIRST_BLOCK
            else {"interval": DEFAULT_INTERVAL, "order": DEFAULT_ORDER}
        )
        for name in ("threshold", "interval", "order"):
            if name not in defaults and getattr(self, name) is not None:
                other = TAYLOR if self.kind == FIRST_BLOCK else FIRST_BLOCK
                raise RequestError(f"{name} belongs to the step cache {quote(other)}; this one is {quote(self.kind)}.")
            if name in defaults and getattr(self, name) is None:
                object.__setattr__(self, name, defaults[name])
        if self.kind == FIRST_BLOCK:
            check_range("the step cache's threshold", self.threshold, 0.0, 1.0)
        else:
            check_range("the step cache's interval", self.interval, 1, MAX_INTERVAL, is_whole=True)
            check_range("the step cache's order", self.order, 1, MAX_ORDER, is_whole=True)

    def __str__(self) -> str:
        if self.kind == FIRST_BLOCK:
            return f"{self.kind}, threshold {self.threshold:g}"
        return f"{self.kind}, every {self.interval} steps, order {self.order}"

    @property
    def cached_steps(self) -> int:
        """Number of computed steps whose residuals are cached at once."""
        return 1 + (self.order or 0)

    @classmethod
    def parse(cls, value: Any) -> StepCache | None:
        """Returns a cache from itself, its kind, or the result of `dataclasses.asdict`; None is off.

        Raises:
            RequestError: it is none of these, or a field does not exist.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, dict):
            return cls(**check_fields(cls, value, "cache"))
        if isinstance(value, str):
            return cls(value)
        raise RequestError(f"cache is {quote(value)}; it must be a StepCache, or its kind: {', '.join(CACHE_KINDS)}.")


def relative_l1(current: Tensor, previous: Tensor) -> float:
    """Returns the L1 distance of two tensors, relative to the norm of the second.

    As a sign that a step may be skipped: TeaCache (Liu et al. 2024, arXiv:2411.19108); applied to the first block's
    residual, as here: the first block cache of ParaAttention.
    """
    return float((current - previous).abs().mean() / previous.abs().mean())


def lagrange_weights(steps: Sequence[int], target_step: int) -> list[float]:
    """Returns weights that extrapolate values at `steps` to `target_step` by the polynomial through them (Lagrange).

    With equal distances this is the Taylor series whose derivatives are finite differences (TaylorSeer, Liu et al.
    2025, arXiv:2503.06923); forced steps make distances unequal, and this stays exact for polynomials.
    """
    return [prod((target_step - other) / (step - other) for other in steps if other != step) for step in steps]


class ResidualCache:
    """Residuals of the later blocks in one of a step's evaluations, such as the unconditional one, over past steps."""

    def __init__(self, pass_cache: PassCache) -> None:
        self._pass_cache = pass_cache
        self._history: list[tuple[int, tuple[Tensor, ...]]] = []

    def predict(self, block_input: Tensor, block_output: Tensor) -> tuple[Tensor, ...] | None:
        """Returns the predicted residual of each tensor given to `store`; None if the later blocks must run.

        Args:
            block_input, block_output: (B, N, D), of the first block.
        """
        if not self._pass_cache.should_skip(block_input, block_output) or not self._history:
            return None
        weights = lagrange_weights([step for step, _ in self._history], self._pass_cache.step_index)
        by_tensor = zip(*(residuals for _, residuals in self._history), strict=True)
        return tuple(_weighted_sum(weights, residuals) for residuals in by_tensor)

    def store(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Stores the residuals of the later blocks: outputs minus inputs, each (B, N, D)."""
        # The oldest goes first, so that there are never more than `cached_steps`.
        del self._history[: len(self._history) + 1 - self._pass_cache.settings.cached_steps]
        residuals = tuple(output - start for start, output in zip(inputs, outputs, strict=True))
        self._history.append((self._pass_cache.step_index, residuals))


def _weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    total = tensors[0] * weights[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total.add_(tensor, alpha=weight)
    return total


class PassCache:
    """The step cache of one pass of one request.

    A step is computed or skipped as a whole: guidance multiplies the difference of its predictions, and would multiply
    their difference in age too. So the first evaluation decides for all; of a batch its first sample, which is that of
    the negative prompt whether both prompts are evaluated in one batch or not.

    Args:
        step_guidance: one for each step. Where a step evaluates other predictions or perturbs other blocks than the
            step before, it is computed and the cached residuals are dropped.
    """

    def __init__(self, settings: StepCache, step_guidance: Sequence[StepGuidance]) -> None:
        self.settings, self.step_index = settings, 0
        self._evaluations = [
            (step.cfg_scale > 1, step.skip_blocks if step.stg_scale > 0 else None) for step in step_guidance
        ]
        self._residual_caches: dict[Hashable, ResidualCache] = {}
        self._first_block_residual: Tensor | None = None  # of the last computed step, (1, N, D)
        self._must_compute, self._last_computed = True, 0
        self._is_skipped: bool | None = None  # this step; None until it is decided

    def wrap(self, denoiser: Denoiser) -> Denoiser:
        """Returns a denoiser that begins the next step of the pass with each call."""
        steps = count()

        def cached_denoiser(sigma: float, tokens: Tensor, token_sigmas: Tensor) -> Tensor:
            self.begin_step(next(steps))
            return denoiser(sigma, tokens, token_sigmas)

        return cached_denoiser

    def begin_step(self, step_index: int) -> None:
        """Begins step `step_index`."""
        self.step_index, self._is_skipped = step_index, None
        restarts = step_index == 0 or self._evaluations[step_index] != self._evaluations[step_index - 1]
        is_end = step_index < WARMUP_STEPS or step_index >= len(self._evaluations) - COOLDOWN_STEPS
        self._must_compute = restarts or is_end
        if restarts:
            self._residual_caches.clear()

    def residual_cache(self, name: Hashable) -> ResidualCache:
        """Returns the cache of an evaluation, which has the same name on every step."""
        return self._residual_caches.setdefault(name, ResidualCache(self))

    def should_skip(self, block_input: Tensor, block_output: Tensor) -> bool:
        """Tells if this step's later blocks are skipped; the first call of a step decides.

        Args:
            block_input, block_output: (B, N, D), of the first block.
        """
        if self._is_skipped is None:
            self._is_skipped = not self._must_compute and self._is_near(block_input, block_output)
            if not self._is_skipped:
                self._last_computed = self.step_index
                self._first_block_residual = (
                    block_output[:1] - block_input[:1] if self.settings.kind == FIRST_BLOCK else None
                )
        return self._is_skipped

    def _is_near(self, block_input: Tensor, block_output: Tensor) -> bool:
        """Tells if the last computed step is near enough."""
        if self.settings.interval is not None:
            return self.step_index - self._last_computed < self.settings.interval
        assert self.settings.threshold is not None
        assert self._first_block_residual is not None
        change = relative_l1(block_output[:1] - block_input[:1], self._first_block_residual)
        return change < self.settings.threshold  # False for NaN, too
