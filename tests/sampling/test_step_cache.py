"""Step caching on plain tensors: which steps are skipped, and the residuals that replace them."""

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
WITH_CFG_AND_STG = Guidance(cfg_scale=3.0, stg_scale=1.0, skip_blocks=(1,)).at_sigma(0.5)
UNGUIDED = Guidance().at_sigma(0.5)
ZEROS = torch.zeros(1, 4, 3)
ONES = torch.ones(1, 4, 3)
StepTensor = Callable[[int], Tensor]  # step index -> (1, 4, 3)


def run(
    cache: PassCache,
    *,
    block_output: StepTensor = lambda index: ONES,
    residual: StepTensor = lambda index: ONES,
    name: str = "prompt",
    steps: Sequence[int] = range(STEPS),
) -> dict[int, Tensor]:
    """Runs one evaluation through the cache, and returns the predicted residuals of the skipped steps.

    Args:
        block_output: of the first block, whose input is 0.
        residual: of the later blocks.
    """
    skipped = {}
    for index in steps:
        cache.begin_step(index)
        residual_cache = cache.residual_cache(name)
        if (predicted := residual_cache.predict(ZEROS, block_output(index))) is None:
            residual_cache.store([ZEROS], [residual(index)])
        else:
            (skipped[index],) = predicted
    return skipped


def pass_cache(kind: str, steps: Sequence[StepGuidance] = (UNGUIDED,) * STEPS, **settings: Any) -> PassCache:
    return PassCache(StepCache(kind, **settings), steps)


@pytest.mark.parametrize("steps", [(4, 5), (2, 7), (0, 1, 2), (2, 5, 11)])
def test_lagrange_weights_extrapolate_polynomials_exactly(steps: tuple[int, ...]) -> None:
    for target in (8, 12, 13):
        weights = lagrange_weights(steps, target)
        for power in range(len(steps)):
            value = sum(weight * step**power for weight, step in zip(weights, steps, strict=True))
            assert value == pytest.approx(target**power)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("interval", [2, 3, 5])
def test_a_residual_of_the_cache_s_order_is_extrapolated_exactly(order: int, interval: int) -> None:
    def residual(index: int) -> Tensor:
        return (torch.arange(12.0) - 5).reshape(1, 4, 3) * index**order + 7

    skipped = run(pass_cache("taylor", interval=interval, order=order), residual=residual)
    assert skipped
    for index, value in skipped.items():
        torch.testing.assert_close(value, residual(index), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["first-block", "taylor"])
def test_first_and_last_steps_are_always_computed(kind: str) -> None:
    settings: dict[str, Any] = {"interval": 16} if kind == "taylor" else {}
    assert list(run(pass_cache(kind, **settings))) == list(range(WARMUP_STEPS, STEPS - COOLDOWN_STEPS))


@pytest.mark.parametrize("settings", [{"kind": "first-block", "threshold": 0}, {"kind": "taylor", "interval": 1}])
def test_threshold_0_and_interval_1_compute_every_step(settings: dict[str, Any]) -> None:
    assert run(pass_cache(**settings)) == {}


def test_taylor_computes_every_nth_step_between() -> None:
    skipped = run(pass_cache("taylor", interval=4))
    assert [index for index in range(STEPS) if index not in skipped] == [0, 1, 2, 6, 10, 14, 18, 19]


def test_small_changes_add_up_until_a_step_is_computed() -> None:
    """Each step is compared with the last computed one, not with the previous one: four changes of 3 % make 12 %."""
    skipped = run(pass_cache("first-block", threshold=0.1), block_output=lambda index: ONES * (1 + 0.03 * index))
    assert [index for index in range(STEPS) if index not in skipped] == [0, 1, 2, 6, 10, 15, 18, 19]


def test_first_block_adds_what_the_last_computed_step_added() -> None:
    skipped = run(pass_cache("first-block", threshold=0.1), residual=lambda index: ONES * index)
    assert all(torch.equal(value, ONES * (WARMUP_STEPS - 1)) for value in skipped.values())


def test_first_block_never_skips_on_nan() -> None:
    assert run(pass_cache("first-block", threshold=1.0), block_output=lambda index: ONES * float("nan")) == {}


@pytest.mark.parametrize("kind", ["first-block", "taylor"])
def test_the_first_evaluation_decides_for_all_of_a_step(kind: str) -> None:
    cache, computed = pass_cache(kind), []
    for index in range(STEPS):
        cache.begin_step(index)
        for name, block_output in (("negative", ONES), ("prompt", ONES * 2**index)):
            residual_cache = cache.residual_cache(name)
            if residual_cache.predict(ZEROS, block_output) is None:
                residual_cache.store([ZEROS], [ONES])
                computed.append((index, name))
    assert len(computed) % 2 == 0
    assert len(computed) < 2 * STEPS
    assert [name for _, name in computed] == ["negative", "prompt"] * (len(computed) // 2)


@pytest.mark.parametrize("kind", ["first-block", "taylor"])
def test_evaluations_have_separate_residuals(kind: str) -> None:
    cache, separate_caches = pass_cache(kind), {name: pass_cache(kind) for name in ("negative", "prompt")}
    for index in range(STEPS):
        cache.begin_step(index)
        for value, name in enumerate(separate_caches, 1):
            separate = run(
                separate_caches[name], residual=lambda step, v=value: ONES * v * step**2, name=name, steps=[index]
            )
            residual_cache = cache.residual_cache(name)
            if (predicted := residual_cache.predict(ZEROS, ONES)) is None:
                assert separate == {}
                residual_cache.store([ZEROS], [ONES * value * index**2])
            else:
                assert torch.equal(predicted[0], separate[index])


@pytest.mark.parametrize("kind", ["first-block", "taylor"])
def test_the_cache_restarts_where_the_evaluations_change(kind: str) -> None:
    steps = [WITH_CFG_AND_STG] * 10 + [UNGUIDED] * 10
    skipped = run(pass_cache(kind, steps), residual=lambda index: ONES * index)
    assert 9 in skipped
    assert 10 not in skipped
    assert torch.equal(skipped[11], ONES * 10)  # nothing from before the change


@pytest.mark.parametrize(
    ("fields", "message"),
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
def test_invalid_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        StepCache(**fields)


def test_defaults_are_filled_in_at_construction() -> None:
    assert StepCache("first-block") == StepCache("first-block", threshold=0.08)
    assert StepCache.parse("taylor") == StepCache("taylor", interval=3, order=1)
