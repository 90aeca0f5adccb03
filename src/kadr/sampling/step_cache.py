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
from kadr.sampling.settings import Strengths

if TYPE_CHECKING:  # a request holds a StepCache, and must not wait for torch
    from torch import Tensor

FIRST_BLOCK, TAYLOR = "first-block", "taylor"
KINDS = (FIRST_BLOCK, TAYLOR)
THRESHOLD, INTERVAL, ORDER = 0.08, 3, 1
MAXIMUM_INTERVAL, MAXIMUM_ORDER = 16, 2
EARLY = 3  # steps at the front that are always computed: there the picture is laid out
LATE = 2  # and at the end, where nothing comes after them that could mend what they miss
SHORT = 10  # steps: a schedule of fewer has too little to skip, and its steps lie too far apart


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
        if self.kind not in KINDS:
            raise RequestError(
                f"the kind of step cache is {self.kind!r}; it must be one of {', '.join(KINDS)}; None is off."
            )
        # What is open is filled in at once, so that a video's record has it, whatever a later version takes.
        own = {"threshold": THRESHOLD} if self.kind == FIRST_BLOCK else {"interval": INTERVAL, "order": ORDER}
        for name in ("threshold", "interval", "order"):
            if name not in own and getattr(self, name) is not None:
                other = TAYLOR if self.kind == FIRST_BLOCK else FIRST_BLOCK
                raise RequestError(f"{name} is given, and belongs to the step cache {other!r}; this is {self.kind!r}.")
            if name in own and getattr(self, name) is None:
                object.__setattr__(self, name, own[name])
        _within("threshold", self.threshold, 0.0, 1.0)
        _within("interval", self.interval, 1, MAXIMUM_INTERVAL, whole=True)
        _within("order", self.order, 1, MAXIMUM_ORDER, whole=True)

    def __str__(self) -> str:
        if self.kind == FIRST_BLOCK:
            return f"{self.kind}, threshold {self.threshold:g}"
        return f"{self.kind}, every {self.interval} steps, order {self.order}"

    @property
    def points(self) -> int:
        """How many computed steps are remembered at once."""
        return 1 + (self.order or 0)

    @classmethod
    def of(cls, given: Any) -> StepCache | None:
        """A cache from itself, its kind, or what `dataclasses.asdict` made of it; None is off.

        Raises:
            RequestError: it is none of these.
            TypeError: a field that does not exist.
        """
        if given is None or isinstance(given, cls):
            return given
        if isinstance(given, dict):
            return cls(**given)
        if isinstance(given, str):
            return cls(given)
        raise RequestError(f"cache is {given!r}; it must be a StepCache, or its kind: {', '.join(KINDS)}.")


def _within(name: str, value: Any, least: float, most: float, *, whole: bool = False) -> None:
    if value is None:
        return
    kinds = int if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not isfinite(value):
        raise RequestError(
            f"the step cache's {name} is {value!r}; it must be a {'whole number' if whole else 'number'}."
        )
    if not least <= value <= most:
        raise RequestError(f"the step cache's {name} is {value}; it must lie between {least:g} and {most:g}.")


def change(now: Tensor, then: Tensor) -> float:
    """The L1 distance of two tensors, relative to the second's norm.

    As a sign that a step may be skipped: TeaCache (Liu et al. 2024, arXiv:2411.19108); of the first layer's residual,
    as here: the first block cache of ParaAttention.
    """
    return float((now - then).abs().mean() / then.abs().mean())


def weights(known: Sequence[int], wanted: int) -> list[float]:
    """What values at the steps `known` count for at `wanted`, on the polynomial through all of them (Lagrange).

    With equal distances this is the Taylor series whose derivatives are finite differences (TaylorSeer, Liu et al.
    2025, arXiv:2503.06923); forced steps make distances unequal, and this stays exact for polynomials.
    """
    return [prod((wanted - other) / (own - other) for other in known if other != own) for own in known]


class Stream:
    """What one evaluation of every step, such as that of the negative prompt, is remembered by."""

    def __init__(self, owner: PassCache) -> None:
        self._owner = owner
        self._known: list[tuple[int, tuple[Tensor, ...]]] = []

    def recall(self, before: Tensor, after: Tensor) -> tuple[Tensor, ...] | None:
        """What the later layers would add to each tensor of `keep`; None where they must run.

        Args:
            before, after: (B, N, D), on both sides of the first layer.
        """
        if not self._owner.skips(before, after) or not self._known:
            return None
        shares = weights([step for step, _ in self._known], self._owner.index)
        return tuple(_sum(shares, parts) for parts in zip(*(parts for _, parts in self._known), strict=True))

    def keep(self, starts: Sequence[Tensor], ends: Sequence[Tensor]) -> None:
        """Remember what the later layers added: ends minus starts, each (B, N, D)."""
        del self._known[: len(self._known) + 1 - self._owner.settings.points]  # first, so that never more is held
        parts = tuple(end - start for start, end in zip(starts, ends, strict=True))
        self._known.append((self._owner.index, parts))


def _sum(shares: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    made = tensors[0] * shares[0]
    for share, tensor in zip(shares[1:], tensors[1:], strict=True):
        made = made.add_(tensor, alpha=share)
    return made


class PassCache:
    """What is remembered over the steps of one pass of one request.

    A step is computed or skipped as a whole: guidance multiplies the difference of its evaluations, and would multiply
    their difference in age too. So the first evaluation decides for all; of a batch its first sample, which is that of
    the negative prompt whether prompts are evaluated together or not.

    Args:
        steps: the strengths of each. Where other evaluations are asked for than on the step before, or other blocks are
            disturbed, the step is computed and what was remembered is let go.
    """

    def __init__(self, settings: StepCache, steps: Sequence[Strengths]) -> None:
        self.settings, self.index = settings, 0
        self._asked = [(step.scale > 1, step.skip_blocks if step.stg > 0 else None) for step in steps]
        self._streams: dict[Hashable, Stream] = {}
        self._grown: Tensor | None = None  # what the first layer added on the last computed step (1, N, D)
        self._forced, self._computed = True, 0
        self._skips: bool | None = None  # this step; None until it is decided

    def over(self, estimate: Callable[[int, Tensor, Tensor], Tensor]) -> Callable[[int, Tensor, Tensor], Tensor]:
        """An estimate that tells the cache of each step before it is made."""

        def told(index: int, tokens: Tensor, level: Tensor) -> Tensor:
            self.begin(index)
            return estimate(index, tokens, level)

        return told

    def begin(self, index: int) -> None:
        """Step `index` comes."""
        self.index, self._skips = index, None
        anew = index == 0 or self._asked[index] != self._asked[index - 1]
        self._forced = anew or index < EARLY or index >= len(self._asked) - LATE
        if anew:
            self._streams.clear()

    def stream(self, name: Hashable) -> Stream:
        """That of an evaluation, which has the same name on every step."""
        return self._streams.setdefault(name, Stream(self))

    def skips(self, before: Tensor, after: Tensor) -> bool:
        """Whether this step's later layers are skipped. Arguments as for `Stream.recall`; the first call decides."""
        if self._skips is None:
            self._skips = not self._forced and self._near(before, after)
            if not self._skips:
                self._computed = self.index
                self._grown = after[:1] - before[:1] if self.settings.kind == FIRST_BLOCK else None
        return self._skips

    def _near(self, before: Tensor, after: Tensor) -> bool:
        """Whether the last computed step is near enough."""
        if self.settings.interval is not None:
            return self.index - self._computed < self.settings.interval
        assert self.settings.threshold is not None
        assert self._grown is not None
        return change(after[:1] - before[:1], self._grown) < self.settings.threshold  # false of NaN, too
