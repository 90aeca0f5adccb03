"""Schedules of sigmas, against the tables of the fact sheet and the official scheduler."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from ltx_video.pipelines.pipeline_ltx_video import retrieve_timesteps
from ltx_video.schedulers.rf import RectifiedFlowScheduler

from kadr.errors import CheckpointError, RequestError
from kadr.models.registry import DISTILLED_SIGMAS
from kadr.sampling.schedules import (
    Schedule,
    explicit_sigmas,
    linear_quadratic_schedule,
    sd3_shift,
    stretch_to_terminal,
    uniform_schedule,
)
from tests.oracles import relative_error

LINEAR_QUADRATIC = Schedule(sampler="LinearQuadratic")
SD3 = Schedule(sampler="Uniform", shifting="SD3", shift_terminal=0.1)
GRIDS = [(16, 22, 38), (13, 16, 24), (1, 1, 1), (4, 16, 16), (33, 22, 40)]
COUNTS = [*range(1, 26), 30, 40, 100, 1000]


def official(schedule: Schedule) -> RectifiedFlowScheduler:
    return RectifiedFlowScheduler(
        shifting=schedule.shifting, target_shift_terminal=schedule.shift_terminal, sampler=schedule.sampler
    )


def official_sigmas(schedule: Schedule, steps: int, grid: tuple[int, int, int], **skipped: int) -> torch.Tensor:
    names = {"skip_initial": "skip_initial_inference_steps", "skip_final": "skip_final_inference_steps"}
    sigmas, _ = retrieve_timesteps(
        official(schedule), steps, samples_shape=(1, 128, *grid), **{names[k]: v for k, v in skipped.items()}
    )
    return sigmas


def num_tokens(grid: tuple[int, int, int]) -> int:
    return grid[0] * grid[1] * grid[2]


def equal_steps(*parts: tuple[float, float, int]) -> list[float]:
    """Returns runs of equal steps, each (first, distance, count)."""
    return [first - distance * i for first, distance, count in parts for i in range(count)]


# fmt: off
TABLES = {
    8: [1, .99375, .9875, .98125, .975, .909375, .725, .421875],
    20: equal_steps((1, .0025, 10)) + [.975, .963, .932, .882, .813, .725, .618, .492, .347, .183],
    30: equal_steps((1, 1 / 600, 15)) + [
        .975, .969111, .954778, .932, .900778, .861111, .813, .756444, .691444, .618, .536111, .445778, .347,
        .239778, .124111,
    ],
    40: equal_steps((1, .00125, 20)) + [
        .975, .971375, .963, .949875, .932, .909375, .882, .849875, .813, .771375, .725, .673875, .618, .557375,
        .492, .421875, .347, .267375, .183, .093875,
    ],
}
# fmt: on


@pytest.mark.parametrize("steps", TABLES)
def test_linear_quadratic_sigmas_are_those_of_the_fact_sheet(steps: int) -> None:
    sigmas = LINEAR_QUADRATIC.get_sigmas(steps, tokens=1)
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas, torch.tensor(TABLES[steps], dtype=torch.float32), rtol=0, atol=6e-7)


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [
        (40, 13376, {0: 1.0, 1: 0.999301, 20: 0.972873, 38: 0.524141, 39: 0.1}),
        (20, 4992, {0: 1.0, 1: 0.993117, 10: 0.879796, 18: 0.357350, 19: 0.1}),
    ],
)
def test_shifted_sigmas_are_those_of_the_fact_sheet(steps: int, count: int, expected: dict[int, float]) -> None:
    sigmas = SD3.get_sigmas(steps, tokens=count)
    assert len(sigmas) == steps
    assert {index: sigmas[index].item() for index in expected} == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize("schedule", [LINEAR_QUADRATIC, Schedule()], ids=["linear-quadratic", "uniform"])
def test_unshifted_sigmas_equal_the_official_ones_bit_for_bit(schedule: Schedule, parity: Any) -> None:
    for steps in COUNTS:
        sigmas, expected = schedule.get_sigmas(steps, tokens=77), official_sigmas(schedule, steps, (1, 7, 11))
        parity("sigmas", schedule.sampler, "official", relative_error(sigmas, expected))
        assert torch.equal(sigmas, expected)


@pytest.mark.parametrize("shift_terminal", [0.1, None, 0.25])
def test_shifted_sigmas_equal_the_official_ones(shift_terminal: float | None, parity: Any) -> None:
    schedule = Schedule(shifting="SD3", shift_terminal=shift_terminal)
    for grid in GRIDS:
        for steps in COUNTS[1:]:
            sigmas, expected = (
                schedule.get_sigmas(steps, tokens=num_tokens(grid)),
                official_sigmas(schedule, steps, grid),
            )
            parity("sigmas", "SD3 shift", "official", relative_error(sigmas, expected))
            torch.testing.assert_close(sigmas, expected, rtol=0, atol=5e-7)


def test_a_linear_quadratic_schedule_may_be_shifted_too() -> None:
    schedule = Schedule(sampler="LinearQuadratic", shifting="SD3", shift_terminal=0.1)
    for steps in (2, 9, 30):
        sigmas = schedule.get_sigmas(steps, tokens=num_tokens(GRIDS[0]))
        torch.testing.assert_close(sigmas, official_sigmas(schedule, steps, GRIDS[0]), rtol=0, atol=5e-7)


def test_one_step_starts_at_1_where_the_official_stretch_divides_by_zero() -> None:
    assert official_sigmas(SD3, 1, (2, 2, 2)).isnan().all()
    for schedule in (SD3, LINEAR_QUADRATIC, Schedule(), Schedule(shifting="SD3")):
        assert schedule.get_sigmas(1, tokens=8).tolist() == [1.0]


def test_every_schedule_decreases_from_1_and_stays_above_0() -> None:
    for schedule in (SD3, LINEAR_QUADRATIC, Schedule(), Schedule(shifting="SD3")):
        for steps in COUNTS[1:-1]:
            sigmas = schedule.get_sigmas(steps, tokens=4992)
            assert sigmas[0] == 1
            assert sigmas[-1] > 0
            assert (sigmas.diff() < 0).all()


def test_a_stretched_schedule_goes_from_1_to_its_terminal() -> None:
    for shift_terminal in (0.05, 0.1, 0.5):
        sigmas = stretch_to_terminal(sd3_shift(uniform_schedule(12), 300), shift_terminal)
        assert [sigmas[0].item(), sigmas[-1].item()] == pytest.approx([1, shift_terminal], abs=2e-7)


def test_the_shift_is_linear_in_the_tokens_and_not_clamped() -> None:
    """The logit shifts by 0.95 at 1024 tokens, by 2.05 at 4096, and linearly beyond."""
    sigmas = torch.tensor([0.3, 0.8], dtype=torch.float64)
    for count, shift in ((1024, 0.95), (4096, 2.05), (7168, 3.15), (1024 - 3072, -0.15)):
        change = sd3_shift(sigmas, count).logit() - sigmas.logit()
        torch.testing.assert_close(change, torch.full_like(sigmas, shift))


@pytest.mark.parametrize("schedule", [SD3, LINEAR_QUADRATIC], ids=["sd3", "linear-quadratic"])
@pytest.mark.parametrize(("front", "back"), [(0, 3), (4, 0), (17, 2), (0, 29), (29, 0)])
def test_skipped_sigmas_are_cut_off_after_the_shift_as_officially(schedule: Schedule, front: int, back: int) -> None:
    sigmas = schedule.get_sigmas(30, tokens=num_tokens(GRIDS[1]), skip_initial=front, skip_final=back)
    assert torch.equal(sigmas, schedule.get_sigmas(30, tokens=num_tokens(GRIDS[1]))[front : 30 - back])
    expected = official_sigmas(schedule, 30, GRIDS[1], skip_initial=front, skip_final=back)
    torch.testing.assert_close(sigmas, expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize(
    ("steps", "front", "back"), [(0, 0, 0), (-1, 0, 0), (5, 5, 0), (5, 0, 5), (5, 3, 2), (5, -1, 0), (5, 0, -1)]
)
def test_too_few_steps_are_refused_by_value(steps: int, front: int, back: int) -> None:
    with pytest.raises(RequestError) as caught:
        LINEAR_QUADRATIC.get_sigmas(steps, tokens=1, skip_initial=front, skip_final=back)
    assert str(steps) in str(caught.value)


def test_explicit_sigmas_are_used_verbatim_and_never_shifted() -> None:
    for sigmas in (DISTILLED_SIGMAS, (0.9094, 0.725, 0.4219), (1.0,), (0.001,)):
        scheduler = official(SD3)
        expected, _ = retrieve_timesteps(scheduler, 40, timesteps=list(sigmas), samples_shape=(1, 128, 16, 22, 38))
        assert torch.equal(explicit_sigmas(sigmas), expected)
        assert torch.equal(explicit_sigmas(sigmas), torch.tensor(sigmas))


@pytest.mark.parametrize(
    "sigmas", [(), (0.5, 0.5), (0.4, 0.5), (1.0, 0.0), (1.1, 0.5), (0.5, -0.1), (float("nan"),), (1.0, float("nan"))]
)
def test_sigmas_that_do_not_decrease_from_1_to_0_are_refused_by_value(sigmas: tuple[float, ...]) -> None:
    with pytest.raises(RequestError) as caught:
        explicit_sigmas(sigmas)
    assert str(list(sigmas)) in str(caught.value)


def test_a_distilled_model_allows_its_own_sigmas_however_rounded() -> None:
    schedule = Schedule(sampler="LinearQuadratic", allowed_sigmas=DISTILLED_SIGMAS)
    assert len(schedule.get_sigmas(8, tokens=1)) == 8
    assert torch.equal(schedule.check_allowed(explicit_sigmas(DISTILLED_SIGMAS)), explicit_sigmas(DISTILLED_SIGMAS))
    assert len(schedule.check_allowed(explicit_sigmas((0.9094, 0.725, 0.4219)))) == 3


def test_a_distilled_model_refuses_other_sigmas_by_value() -> None:
    schedule = Schedule(sampler="LinearQuadratic", allowed_sigmas=DISTILLED_SIGMAS)
    with pytest.raises(RequestError) as caught:
        schedule.get_sigmas(5, tokens=1)
    message = str(caught.value)
    refused = {
        f"{sigma:.4f}" for sigma in linear_quadratic_schedule(5).tolist() if round(sigma, 4) not in DISTILLED_SIGMAS
    }
    assert refused
    assert all(sigma in message for sigma in refused)
    assert "0.4219" in message
    assert "steps" in message
    with pytest.raises(RequestError, match=r"0\.5000"):
        schedule.check_allowed(explicit_sigmas((1.0, 0.5)))


def test_sigmas_are_checked_after_skipping() -> None:
    schedule = Schedule(sampler="LinearQuadratic", allowed_sigmas=DISTILLED_SIGMAS[:-1])
    assert len(schedule.get_sigmas(8, tokens=1, skip_final=1)) == 7
    with pytest.raises(RequestError, match=r"0\.4219"):
        schedule.get_sigmas(8, tokens=1)


@pytest.mark.parametrize("schedule", [SD3, LINEAR_QUADRATIC, Schedule(), Schedule(allowed_sigmas=DISTILLED_SIGMAS)])
def test_a_schedule_survives_its_header_which_the_official_class_reads(schedule: Schedule) -> None:
    header = schedule.to_header()
    assert Schedule.from_header(header, schedule.allowed_sigmas) == schedule
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = RectifiedFlowScheduler.from_config(dict(header))
    assert (read.sampler, read.shifting, read.target_shift_terminal) == (
        schedule.sampler,
        schedule.shifting,
        schedule.shift_terminal,
    )


@pytest.mark.parametrize("header", [{"sampler": "Constant"}, {"shifting": "SimpleDiffusion"}, {"sampler": "karras"}])
def test_a_header_with_an_unreleased_sampler_is_refused_by_value(header: dict[str, str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        Schedule.from_header(header)
    assert next(iter(header.values())) in str(caught.value)
