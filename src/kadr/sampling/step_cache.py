"""Step caching: on some steps of a long schedule, what the later layers added before takes the place of running them.

The layers after the first add a residual to what it gives. Over a long schedule that residual changes little from one
step to the next, and smoothly, so it can be added again or extrapolated. This changes the picture; docs/guides has by
how much. Nothing here knows a network: it sees tensors (B, N, D) before and after a first layer, and after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from kadr.errors import RequestError
from kadr.sampling.settings import StepGuidance

if TYPE_CHECKING:  # a request holds a StepCache, and must not wait for torch
    from torch import Tensor

FIRST_BLOCK, TAYLOR = "first-block", "taylor"
CACHE_KINDS = (FIRST_BLOCK, TAYLOR)
DEFAULT_THRESHOLD, DEFAULT_INTERVAL, DEFAULT_ORDER = 0.08, 3, 1
MAX_INTERVAL, MAX_ORDER = 16, 2
WARMUP_STEPS = 3  # steps at the front that are always computed: there the picture is laid out
COOLDOWN_STEPS = 2  # and at the end, where nothing comes after them that could mend what they miss
MIN_STEPS = 10  # steps: a schedule of fewer has too little to skip, and its steps lie too far apart


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """Which steps are not computed in full, and what is done instead. Lossy.

    Args:
        kind: "first-block": a step whose first layer adds nearly what it added on the last computed step has the later
            layers' residual of that step added again. "taylor": every `interval`-th step is computed, and on the others
            the residual is extrapolated from the last computed ones.
        threshold: of "first-block": relative change, in L1, below which a step is not computed; 0 computes all.
        interval: of "taylor": 1 computes all.
        order: of "taylor": 1 extrapolates a line through the last two, 2 a parabola through the last three.
    """

    kind: str = field(kw_only=False)
    threshold: float | None = None
    interval: int | None = None
    order: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in CACHE_KINDS:
            raise RequestError(
                f"the kind of step cache is {self.kind!r}; it must be one of {', '.join(CACHE_KINDS)}; None is off."
            )
        # What is open is filled in at once, so that a video's record has it, whatever a later version takes.
        own = (
            {"threshold": DEFAULT_THRESHOLD}
            if self.kind == FIRST_BLOCK
            else {"interval": DEFAULT_INTERVAL, "order": DEFAULT_ORDER}
        )
        for name in ("threshold", "interval", "order"):
            if name not in own and getattr(self, name) is not None:
                other = TAYLOR if self.kind == FIRST_BLOCK else FIRST_BLOCK
                raise RequestError(f"{name} is given, and belongs to the step cache {other!r}; this is {self.kind!r}.")
            if name in own and getattr(self, name) is None:
                object.__setattr__(self, name, own[name])
        _check_range("threshold", self.threshold, 0.0, 1.0)
        _check_range("interval", self.interval, 1, MAX_INTERVAL, is_whole=True)
        _check_range("order", self.order, 1, MAX_ORDER, is_whole=True)

    def __str__(self) -> str:
        if self.kind == FIRST_BLOCK:
            return f"{self.kind}, threshold {self.threshold:g}"
        return f"{self.kind}, every {self.interval} steps, order {self.order}"

    @property
    def cached_steps(self) -> int:
        """How many computed steps are remembered at once."""
        return 1 + (self.order or 0)

    @classmethod
    def parse(cls, value: Any) -> StepCache | None:
        """A cache from itself, its kind, or what `dataclasses.asdict` made of it; None is off.

        Raises:
            RequestError: it is none of these.
            TypeError: a field that does not exist.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, dict):
            return cls(**value)
        if isinstance(value, str):
            return cls(value)
        raise RequestError(f"cache is {value!r}; it must be a StepCache, or its kind: {', '.join(CACHE_KINDS)}.")


def _check_range(name: str, value: Any, minimum: float, maximum: float, *, is_whole: bool = False) -> None:
    if value is None:
        return
    kinds = int if is_whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not isfinite(value):
        raise RequestError(
            f"the step cache's {name} is {value!r}; it must be a {'whole number' if is_whole else 'number'}."
        )
    if not minimum <= value <= maximum:
        raise RequestError(f"the step cache's {name} is {value}; it must lie between {minimum:g} and {maximum:g}.")


def relative_l1(current: Tensor, previous: Tensor) -> float:
    """The L1 distance of two tensors, relative to the second's norm.

    As a sign that a step may be skipped: TeaCache (Liu et al. 2024, arXiv:2411.19108); of the first layer's residual,
    as here: the first block cache of ParaAttention.
    """
    return float((current - previous).abs().mean() / previous.abs().mean())


def lagrange_weights(steps: Sequence[int], target_step: int) -> list[float]:
    """What values at the steps `steps` count for at `target_step`, on the polynomial through all of them (Lagrange).

    With equal distances this is the Taylor series whose derivatives are finite differences (TaylorSeer, Liu et al.
    2025, arXiv:2503.06923); forced steps make distances unequal, and this stays exact for polynomials.
    """
    return [prod((target_step - other) / (own - other) for other in steps if other != own) for own in steps]


class ResidualCache:
    """What one evaluation of every step, such as that of the negative prompt, is remembered by."""

    def __init__(self, pass_cache: PassCache) -> None:
        self._pass_cache = pass_cache
        self._history: list[tuple[int, tuple[Tensor, ...]]] = []

    def predict(self, block_input: Tensor, block_output: Tensor) -> tuple[Tensor, ...] | None:
        """What the later layers would add to each tensor of `keep`; None where they must run.

        Args:
            block_input, block_output: (B, N, D), on both sides of the first layer.
        """
        if not self._pass_cache.should_skip(block_input, block_output) or not self._history:
            return None
        shares = lagrange_weights([step for step, _ in self._history], self._pass_cache.step_index)
        return tuple(_weighted_sum(shares, parts) for parts in zip(*(parts for _, parts in self._history), strict=True))

    def store(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Remember what the later layers added: ends minus starts, each (B, N, D)."""
        del self._history[
            : len(self._history) + 1 - self._pass_cache.settings.cached_steps
        ]  # first, so that never more is held
        parts = tuple(end - start for start, end in zip(inputs, outputs, strict=True))
        self._history.append((self._pass_cache.step_index, parts))


def _weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    made = tensors[0] * weights[0]
    for share, tensor in zip(weights[1:], tensors[1:], strict=True):
        made = made.add_(tensor, alpha=share)
    return made


class PassCache:
    """What is remembered over the steps of one pass of one request.

    A step is computed or skipped as a whole: guidance multiplies the difference of its evaluations, and would multiply
    their difference in age too. So the first evaluation decides for all; of a batch its first sample, which is that of
    the negative prompt whether prompts are evaluated together or not.

    Args:
        step_guidance: the strengths of each. Where other evaluations are asked for than on the step before, or other blocks are
            disturbed, the step is computed and what was remembered is let go.
    """

    def __init__(self, settings: StepCache, step_guidance: Sequence[StepGuidance]) -> None:
        self.settings, self.step_index = settings, 0
        self._evaluations = [
            (step.cfg_scale > 1, step.skip_blocks if step.stg_scale > 0 else None) for step in step_guidance
        ]
        self._residual_caches: dict[Hashable, ResidualCache] = {}
        self._first_block_residual: Tensor | None = (
            None  # what the first layer added on the last computed step (1, N, D)
        )
        self._must_compute, self._last_computed = True, 0
        self._is_skipped: bool | None = None  # this step; None until it is decided

    def wrap(self, denoiser: Callable[[int, Tensor, Tensor], Tensor]) -> Callable[[int, Tensor, Tensor], Tensor]:
        """An estimate that tells the cache of each step before it is made."""

        def told(index: int, tokens: Tensor, level: Tensor) -> Tensor:
            self.begin_step(index)
            return denoiser(index, tokens, level)

        return told

    def begin_step(self, step_index: int) -> None:
        """Step `step_index` comes."""
        self.step_index, self._is_skipped = step_index, None
        anew = step_index == 0 or self._evaluations[step_index] != self._evaluations[step_index - 1]
        self._must_compute = anew or step_index < WARMUP_STEPS or step_index >= len(self._evaluations) - COOLDOWN_STEPS
        if anew:
            self._residual_caches.clear()

    def residual_cache(self, name: Hashable) -> ResidualCache:
        """That of an evaluation, which has the same name on every step."""
        return self._residual_caches.setdefault(name, ResidualCache(self))

    def should_skip(self, block_input: Tensor, block_output: Tensor) -> bool:
        """Whether this step's later layers are skipped. Arguments as for `ResidualCache.predict`; the first call decides."""
        if self._is_skipped is None:
            self._is_skipped = not self._must_compute and self._is_near(block_input, block_output)
            if not self._is_skipped:
                self._last_computed = self.step_index
                self._first_block_residual = (
                    block_output[:1] - block_input[:1] if self.settings.kind == FIRST_BLOCK else None
                )
        return self._is_skipped

    def _is_near(self, block_input: Tensor, block_output: Tensor) -> bool:
        """Whether the last computed step is near enough."""
        if self.settings.interval is not None:
            return self.step_index - self._last_computed < self.settings.interval
        assert self.settings.threshold is not None
        assert self._first_block_residual is not None
        return (
            relative_l1(block_output[:1] - block_input[:1], self._first_block_residual) < self.settings.threshold
        )  # false of NaN, too
