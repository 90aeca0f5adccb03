"""The second-order sampler on the demo's own flow: nearer to its solution than Euler for as many evaluations."""

from __future__ import annotations

import pytest

from benchmarks.samplers import SHIFTED, fit_steps, measure_errors


@pytest.mark.parametrize(
    "sampler, evaluations, fitted", [("euler", 16, (16, 16)), ("res_2s", 16, (8, 15)), ("res_2s", 4, (2, 3))]
)
def test_steps_fit_into_a_number_of_evaluations(sampler: str, evaluations: int, fitted: tuple[int, int]) -> None:
    assert fit_steps(sampler, evaluations) == fitted


@pytest.mark.slow
def test_res_2s_is_nearer_to_200_euler_steps_than_euler() -> None:
    """On a schedule whose last sigma is small, from 16 evaluations on; docs/guides/samplers.md has the other cases."""
    errors = measure_errors(1, schedules=(SHIFTED,), evaluations=(16, 32))
    for count, ratio in ((16, 1.0), (32, 0.85)):
        (euler,), (res_2s,) = errors[SHIFTED, "euler"][count], errors[SHIFTED, "res_2s"][count]
        assert res_2s < ratio * euler
