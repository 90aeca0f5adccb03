"""When a step is skipped, and what then takes its place: laws, on plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kadr.errors import RequestError
from kadr.sampling.settings import Guidance, StepGuidance
from kadr.sampling.step_cache import COOLDOWN_STEPS, WARMUP_STEPS, PassCache, StepCache, lagrange_weights

STEPS = 20
GUIDED = Guidance(cfg_scale=3.0, stg_scale=1.0, skip_blocks=(1,)).at_sigma(0.5)
PLAIN = Guidance().at_sigma(0.5)
NOTHING = torch.zeros(1, 4, 3)
ONE = torch.ones(1, 4, 3)
Grown = Callable[[int], Tensor]


def run(
    cache: PassCache,
    *,
    grown: Grown = lambda index: ONE,
    added: Grown = lambda index: ONE,
    name: str = "prompt",
    steps: Sequence[int] = range(STEPS),
) -> dict[int, Tensor]:
    """What the cache gives on the steps that it skips, for an evaluation whose layers add so much."""
    skipped = {}
    for index in steps:
        cache.begin_step(index)
        stream = cache.residual_cache(name)
        if (parts := stream.predict(NOTHING, grown(index))) is None:
            stream.store([NOTHING], [added(index)])
        else:
            (skipped[index],) = parts
    return skipped


def made(kind: str, asked: Sequence[StepGuidance] = (PLAIN,) * STEPS, **settings: Any) -> PassCache:
    return PassCache(StepCache(kind, **settings), asked)


@pytest.mark.parametrize("known", [(4, 5), (2, 7), (0, 1, 2), (2, 5, 11)])
def test_lagrange_weights_extrapolate_polynomials_exactly(known: tuple[int, ...]) -> None:
    for wanted in (8, 12, 13):
        for power in range(len(known)):
            value = sum(
                weight * step**power for weight, step in zip(lagrange_weights(known, wanted), known, strict=True)
            )
            assert value == pytest.approx(wanted**power)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_a_residual_of_the_cache_s_order_is_extrapolated_exactly(order: int, interval: int) -> None:
    def added(index: int) -> Tensor:
        return (torch.arange(12.0) - 5).reshape(1, 4, 3) * index**order + 7

    skipped = run(made("taylor", interval=interval, order=order), added=added)
    assert skipped
    for index, value in skipped.items():
        torch.testing.assert_close(value, added(index), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["first-block", "taylor"])
def test_first_and_last_steps_are_always_computed(kind: str) -> None:
    settings: dict[str, Any] = {"interval": 16} if kind == "taylor" else {}
    assert list(run(made(kind, **settings))) == list(range(WARMUP_STEPS, STEPS - COOLDOWN_STEPS))


@pytest.mark.parametrize("settings", [{"kind": "first-block", "threshold": 0}, {"kind": "taylor", "interval": 1}])
def test_threshold_0_and_interval_1_compute_every_step(settings: dict[str, Any]) -> None:
    assert run(made(**settings)) == {}


def test_taylor_computes_every_nth_step_between() -> None:
    skipped = run(made("taylor", interval=4))
    assert [index for index in range(STEPS) if index not in skipped] == [0, 1, 2, 6, 10, 14, 18, 19]


def test_small_changes_add_up_until_a_step_is_computed() -> None:
    """Each step is compared with the last computed one, not with the one before: by 3 % each, four come to 12 %."""
    skipped = run(made("first-block", threshold=0.1), grown=lambda index: ONE * (1 + 0.03 * index))
    assert [index for index in range(STEPS) if index not in skipped] == [0, 1, 2, 6, 10, 15, 18, 19]


def test_first_block_adds_what_the_last_computed_step_added() -> None:
    skipped = run(made("first-block", threshold=0.1), added=lambda index: ONE * index)
    assert all(torch.equal(value, ONE * (WARMUP_STEPS - 1)) for value in skipped.values())


def test_first_block_never_skips_on_nan() -> None:
    assert run(made("first-block", threshold=1.0), grown=lambda index: ONE * float("nan")) == {}


@pytest.mark.parametrize("kind", ["first-block", "taylor"])
def test_the_first_evaluation_decides_for_all_of_a_step(kind: str) -> None:
    cache, computed = made(kind), []
    for index in range(STEPS):
        cache.begin_step(index)
        for name, grown in (("negative", ONE), ("prompt", ONE * 2**index)):
            stream = cache.residual_cache(name)
            if stream.predict(NOTHING, grown) is None:
                stream.store([NOTHING], [ONE])
                computed.append((index, name))
    assert len(computed) % 2 == 0
    assert len(computed) < 2 * STEPS
    assert [name for _, name in computed] == ["negative", "prompt"] * (len(computed) // 2)


@pytest.mark.parametrize("kind", ["first-block", "taylor"])
def test_evaluations_have_separate_residuals(kind: str) -> None:
    cache, alone = made(kind), {name: made(kind) for name in ("negative", "prompt")}
    for index in range(STEPS):
        cache.begin_step(index)
        for value, name in enumerate(alone, 1):
            (own,) = [run(alone[name], added=lambda at, v=value: ONE * v * at**2, name=name, steps=[index])]
            stream = cache.residual_cache(name)
            if (parts := stream.predict(NOTHING, ONE)) is None:
                assert own == {}
                stream.store([NOTHING], [ONE * value * index**2])
            else:
                assert torch.equal(parts[0], own[index])


@pytest.mark.parametrize("kind", ["first-block", "taylor"])
def test_the_cache_restarts_where_the_evaluations_change(kind: str) -> None:
    asked = [GUIDED] * 10 + [PLAIN] * 10
    skipped = run(made(kind, asked), added=lambda index: ONE * index)
    assert 9 in skipped
    assert 10 not in skipped
    assert torch.equal(skipped[11], ONE * 10)  # nothing of before is in it


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kind": "teacache"}, "one of first-block, taylor"),
        ({"kind": "first-block", "threshold": 1.5}, "threshold is 1.5; it must lie between 0 and 1"),
        ({"kind": "first-block", "threshold": "high"}, "threshold is 'high'; it must be a number"),
        ({"kind": "first-block", "interval": 2}, "belongs to the step cache 'taylor'"),
        ({"kind": "taylor", "threshold": 0.1}, "belongs to the step cache 'first-block'"),
        ({"kind": "taylor", "interval": 0}, "interval is 0; it must lie between 1 and 16"),
        ({"kind": "taylor", "interval": 2.0}, "interval is 2.0; it must be a whole number"),
        ({"kind": "taylor", "order": 3}, "order is 3; it must lie between 1 and 2"),
        ({"kind": "taylor", "order": True}, "order is True; it must be a whole number"),
    ],
)
def test_invalid_settings_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        StepCache(**given)


def test_defaults_are_filled_in_at_construction() -> None:
    assert StepCache("first-block") == StepCache("first-block", threshold=0.08)
    assert StepCache.parse("taylor") == StepCache("taylor", interval=3, order=1)
