"""Noise levels, against the tables of the fact sheet and the official scheduler."""

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


def official_levels(schedule: Schedule, steps: int, grid: tuple[int, int, int], **skipped: int) -> torch.Tensor:
    names = {"skip_initial": "skip_initial_inference_steps", "skip_final": "skip_final_inference_steps"}
    made, _ = retrieve_timesteps(
        official(schedule), steps, samples_shape=(1, 128, *grid), **{names[k]: v for k, v in skipped.items()}
    )
    return made


def tokens(grid: tuple[int, int, int]) -> int:
    return grid[0] * grid[1] * grid[2]


def ends(*parts: tuple[float, float, int]) -> list[float]:
    """Equal steps: (first, distance, count) after another."""
    return [first - distance * i for first, distance, count in parts for i in range(count)]


# fmt: off
TABLES = {
    8: [1, .99375, .9875, .98125, .975, .909375, .725, .421875],
    20: ends((1, .0025, 10)) + [.975, .963, .932, .882, .813, .725, .618, .492, .347, .183],
    30: ends((1, 1 / 600, 15)) + [
        .975, .969111, .954778, .932, .900778, .861111, .813, .756444, .691444, .618, .536111, .445778, .347,
        .239778, .124111,
    ],
    40: ends((1, .00125, 20)) + [
        .975, .971375, .963, .949875, .932, .909375, .882, .849875, .813, .771375, .725, .673875, .618, .557375,
        .492, .421875, .347, .267375, .183, .093875,
    ],
}
# fmt: on


@pytest.mark.parametrize("steps", TABLES)
def test_linear_quadratic_levels_are_those_of_the_fact_sheet(steps: int) -> None:
    made = LINEAR_QUADRATIC.get_sigmas(steps, tokens=1)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, torch.tensor(TABLES[steps], dtype=torch.float32), rtol=0, atol=6e-7)


@pytest.mark.parametrize(
    ("steps", "count", "picked"),
    [
        (40, 13376, {0: 1.0, 1: 0.999301, 20: 0.972873, 38: 0.524141, 39: 0.1}),
        (20, 4992, {0: 1.0, 1: 0.993117, 10: 0.879796, 18: 0.357350, 19: 0.1}),
    ],
)
def test_shifted_levels_are_those_of_the_fact_sheet(steps: int, count: int, picked: dict[int, float]) -> None:
    made = SD3.get_sigmas(steps, tokens=count)
    assert len(made) == steps
    assert {index: made[index].item() for index in picked} == pytest.approx(picked, abs=6e-7)


@pytest.mark.parametrize("schedule", [LINEAR_QUADRATIC, Schedule()], ids=["linear-quadratic", "uniform"])
def test_unshifted_levels_are_the_official_ones_in_every_bit(schedule: Schedule, parity: Any) -> None:
    for steps in COUNTS:
        made, expected = schedule.get_sigmas(steps, tokens=77), official_levels(schedule, steps, (1, 7, 11))
        parity("sigmas", schedule.sampler, "official", relative_error(made, expected))
        assert torch.equal(made, expected)


@pytest.mark.parametrize("terminal", [0.1, None, 0.25])
def test_shifted_levels_are_the_official_ones(terminal: float | None, parity: Any) -> None:
    schedule = Schedule(shifting="SD3", shift_terminal=terminal)
    for grid in GRIDS:
        for steps in COUNTS[1:]:
            made, expected = schedule.get_sigmas(steps, tokens=tokens(grid)), official_levels(schedule, steps, grid)
            parity("sigmas", "SD3 shift", "official", relative_error(made, expected))
            torch.testing.assert_close(made, expected, rtol=0, atol=5e-7)


def test_a_linear_quadratic_schedule_may_be_shifted_too() -> None:
    schedule = Schedule(sampler="LinearQuadratic", shifting="SD3", shift_terminal=0.1)
    for steps in (2, 9, 30):
        made = schedule.get_sigmas(steps, tokens=tokens(GRIDS[0]))
        torch.testing.assert_close(made, official_levels(schedule, steps, GRIDS[0]), rtol=0, atol=5e-7)


def test_one_step_starts_from_pure_noise_where_the_official_stretch_divides_by_zero() -> None:
    assert official_levels(SD3, 1, (2, 2, 2)).isnan().all()
    for schedule in (SD3, LINEAR_QUADRATIC, Schedule(), Schedule(shifting="SD3")):
        assert schedule.get_sigmas(1, tokens=8).tolist() == [1.0]


def test_every_schedule_falls_strictly_from_1_and_stays_above_0() -> None:
    for schedule in (SD3, LINEAR_QUADRATIC, Schedule(), Schedule(shifting="SD3")):
        for steps in COUNTS[1:-1]:
            made = schedule.get_sigmas(steps, tokens=4992)
            assert made[0] == 1
            assert made[-1] > 0
            assert (made.diff() < 0).all()


def test_a_stretched_schedule_ends_at_its_terminal_and_keeps_pure_noise() -> None:
    for terminal in (0.05, 0.1, 0.5):
        made = stretch_to_terminal(sd3_shift(uniform_schedule(12), 300), terminal)
        assert [made[0].item(), made[-1].item()] == pytest.approx([1, terminal], abs=2e-7)


def test_the_shift_is_linear_in_the_tokens_and_not_clamped() -> None:
    """The logarithm of the odds moves by 0.95 at 1024 tokens, by 2.05 at 4096, and on from there."""
    level = torch.tensor([0.3, 0.8], dtype=torch.float64)
    for count, shift in ((1024, 0.95), (4096, 2.05), (7168, 3.15), (1024 - 3072, -0.15)):
        moved = sd3_shift(level, count).logit() - level.logit()
        torch.testing.assert_close(moved, torch.full_like(level, shift))


@pytest.mark.parametrize("schedule", [SD3, LINEAR_QUADRATIC], ids=["sd3", "linear-quadratic"])
@pytest.mark.parametrize(("front", "back"), [(0, 3), (4, 0), (17, 2), (0, 29), (29, 0)])
def test_skipped_levels_are_cut_off_after_the_shift_as_the_official_ones(
    schedule: Schedule, front: int, back: int
) -> None:
    made = schedule.get_sigmas(30, tokens=tokens(GRIDS[1]), skip_initial=front, skip_final=back)
    assert torch.equal(made, schedule.get_sigmas(30, tokens=tokens(GRIDS[1]))[front : 30 - back])
    expected = official_levels(schedule, 30, GRIDS[1], skip_initial=front, skip_final=back)
    torch.testing.assert_close(made, expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize(
    ("steps", "front", "back"), [(0, 0, 0), (-1, 0, 0), (5, 5, 0), (5, 0, 5), (5, 3, 2), (5, -1, 0), (5, 0, -1)]
)
def test_too_few_steps_are_refused_by_value(steps: int, front: int, back: int) -> None:
    with pytest.raises(RequestError) as caught:
        LINEAR_QUADRATIC.get_sigmas(steps, tokens=1, skip_initial=front, skip_final=back)
    assert str(steps) in str(caught.value)


def test_levels_given_by_hand_are_used_verbatim_and_never_shifted() -> None:
    for given in (DISTILLED_SIGMAS, (0.9094, 0.725, 0.4219), (1.0,), (0.001,)):
        scheduler = official(SD3)
        expected, _ = retrieve_timesteps(scheduler, 40, timesteps=list(given), samples_shape=(1, 128, 16, 22, 38))
        assert torch.equal(explicit_sigmas(given), expected)
        assert torch.equal(explicit_sigmas(given), torch.tensor(given))


@pytest.mark.parametrize(
    "given", [(), (0.5, 0.5), (0.4, 0.5), (1.0, 0.0), (1.1, 0.5), (0.5, -0.1), (float("nan"),), (1.0, float("nan"))]
)
def test_levels_that_do_not_fall_between_1_and_0_are_refused_by_value(given: tuple[float, ...]) -> None:
    with pytest.raises(RequestError) as caught:
        explicit_sigmas(given)
    assert str(list(given)) in str(caught.value)


def test_a_distilled_model_allows_its_own_levels_however_they_are_rounded() -> None:
    schedule = Schedule(sampler="LinearQuadratic", allowed_sigmas=DISTILLED_SIGMAS)
    assert len(schedule.get_sigmas(8, tokens=1)) == 8
    assert torch.equal(schedule.check_allowed(explicit_sigmas(DISTILLED_SIGMAS)), explicit_sigmas(DISTILLED_SIGMAS))
    assert len(schedule.check_allowed(explicit_sigmas((0.9094, 0.725, 0.4219)))) == 3


def test_a_distilled_model_refuses_other_levels_by_value() -> None:
    schedule = Schedule(sampler="LinearQuadratic", allowed_sigmas=DISTILLED_SIGMAS)
    with pytest.raises(RequestError) as caught:
        schedule.get_sigmas(5, tokens=1)
    message = str(caught.value)
    strange = {
        f"{level:.4f}" for level in linear_quadratic_schedule(5).tolist() if round(level, 4) not in DISTILLED_SIGMAS
    }
    assert strange
    assert all(level in message for level in strange)
    assert "0.4219" in message
    assert "--steps" in message
    with pytest.raises(RequestError, match=r"0\.5000"):
        schedule.check_allowed(explicit_sigmas((1.0, 0.5)))


def test_a_schedule_that_skipping_makes_allowed_is_allowed() -> None:
    schedule = Schedule(sampler="LinearQuadratic", allowed_sigmas=DISTILLED_SIGMAS[:-1])
    assert len(schedule.get_sigmas(8, tokens=1, skip_final=1)) == 7
    with pytest.raises(RequestError, match=r"0\.4219"):
        schedule.get_sigmas(8, tokens=1)


@pytest.mark.parametrize("schedule", [SD3, LINEAR_QUADRATIC, Schedule(), Schedule(allowed_sigmas=DISTILLED_SIGMAS)])
def test_a_schedule_survives_its_header_and_the_official_class_reads_it(schedule: Schedule) -> None:
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
def test_a_header_with_a_sampler_that_no_released_model_has_is_refused_by_value(header: dict[str, str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        Schedule.from_header(header)
    assert next(iter(header.values())) in str(caught.value)
