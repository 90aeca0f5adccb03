"""The runner: turns, medians, ranges and failures, with a scripted clock."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import cycle

import pytest
import torch

from kadr.bench.peak_memory import RESET_FILE, host_peak_bytes
from kadr.bench.runner import Contender, Measurement, Task, interquartile_range, measure, relative_error
from kadr.bench.startup import Program


class Clock:
    """Runs a task, and returns the next duration in the list of each contender that ran."""

    def __init__(self, **seconds: list[float]) -> None:
        self.seconds = {name: cycle(values) for name, values in seconds.items()}
        self.ran: list[str] = []

    def contender(self, name: str, **fields: object) -> Contender:
        return Contender(name=name, run=lambda: self.ran.append(name), dtype="float32", **fields)  # type: ignore[arg-type]

    def __call__(self, task: Task) -> float:
        before = len(self.ran)
        task()
        return sum(next(self.seconds[name]) for name in self.ran[before:])


def unknown_peak(task: Task) -> None:
    """Returns no peak."""


def run_rounds(clock: Clock, *contenders: Contender, rounds: int = 3) -> list[Measurement]:
    return measure(contenders, rounds=rounds, warm_ups=1, clock=clock, peak=unknown_peak)[0]


def test_all_run_once_per_round_and_rounds_rotate() -> None:
    clock = Clock(a=[1.0], b=[1.0], c=[1.0])
    run_rounds(clock, *map(clock.contender, "abc"))
    warm_up, rounds = clock.ran[:3], clock.ran[3:]
    assert warm_up == ["a", "b", "c"]
    assert ["".join(rounds[i : i + 3]) for i in (0, 3, 6)] == ["abc", "bca", "cab"]


@pytest.mark.parametrize("count", [1, 3])
def test_warm_ups_do_not_count(count: int) -> None:
    clock = Clock(a=[9.0, 1.0, 2.0, 3.0])
    options = {"rounds": 2, "warm_ups": count, "clock": clock, "peak": unknown_peak}
    (only,), _ = measure([clock.contender("a")], **options)
    assert len(clock.ran) == count + 2
    assert 9.0 not in only.seconds


def test_a_time_is_the_median_with_the_interquartile_range() -> None:
    clock = Clock(a=[50.0, 1.0, 2.0, 3.0, 4.0, 100.0])  # the first is the warm-up's
    (only,) = run_rounds(clock, clock.contender("a"), rounds=5)
    assert (only.median, only.interquartile_range) == (3.0, 2.0)
    assert interquartile_range([7.0]) == 0.0


def test_ratios_within_rounds_cancel_a_drifting_machine() -> None:
    clock = Clock(a=[1.0, 1.0, 10.0, 2.0], b=[2.0, 2.0, 20.0, 4.0])
    a, b = run_rounds(clock, clock.contender("a"), clock.contender("b"))
    assert b.ratio(a) == 2.0
    assert a.ratio(a) == 1.0


def test_short_tasks_are_repeated_within_a_round() -> None:
    clock = Clock(a=[0.05], b=[5.0])
    a, b = run_rounds(clock, clock.contender("a"), clock.contender("b"), rounds=1)
    assert (a.repeats, b.repeats) == (4, 1)
    assert clock.ran == ["a", "b", *"aaaa", "b"]
    assert a.median == pytest.approx(0.05)


def test_a_failed_peer_is_reported_and_the_others_run() -> None:
    def fail() -> None:
        raise RuntimeError("out of luck\nand more")

    clock = Clock(a=[1.0])
    broken = Contender(name="peer", run=fail, dtype="float32")
    options = {"rounds": 1, "warm_ups": 1, "clock": clock, "peak": unknown_peak}
    measurements, failed = measure([broken, clock.contender("a")], **options)
    assert [each.contender.name for each in measurements] == ["a"]
    assert [(each.name, each.reason) for each in failed] == [("peer", "failed: RuntimeError: out of luck")]
    with pytest.raises(RuntimeError, match="out of luck"):
        measure([Contender(name="ours", run=fail, dtype="float32", is_kadr=True)], **options)


def constant(value: float, **fields: object) -> Contender:
    return Contender(name="x", run=lambda: torch.full((3, 4), value), dtype="float32", **fields)  # type: ignore[arg-type]


def test_results_are_compared_with_the_reference_but_not_yardsticks() -> None:
    options = {"rounds": 1, "warm_ups": 1, "clock": one_second, "peak": unknown_peak}
    reference = torch.full((3, 4), 2.0)
    (near, yardstick), _ = measure([constant(2.2), constant(9.0, is_yardstick=True)], reference=reference, **options)
    assert near.error == pytest.approx(0.1)
    assert yardstick.error is None
    _, (failed,) = measure([constant(1.0)], reference=torch.ones(4, 4), **options)
    assert "shape" in failed.reason


def one_second(task: Task) -> float:
    task()
    return 1.0


def test_an_error_is_relative_to_the_norm_of_the_reference() -> None:
    reference = torch.randn(7, 3000, 5, generator=torch.Generator().manual_seed(0))
    assert relative_error(reference, reference) == 0
    assert relative_error(1.25 * reference, reference) == pytest.approx(0.25)
    assert relative_error(torch.ones(2, 2), torch.zeros(2, 2)) == 1


def test_memory_has_its_own_run_after_the_rounds_but_not_yardsticks() -> None:
    clock, runs_before = Clock(a=[1.0], yardstick=[1.0]), []

    def peak(task: Task) -> int:
        runs_before.append(len(clock.ran))
        return 5

    contenders = [clock.contender("a"), clock.contender("yardstick", is_yardstick=True)]
    (a, yardstick), _ = measure(contenders, rounds=2, warm_ups=1, clock=clock, peak=peak)
    assert (a.peak_bytes, yardstick.peak_bytes) == (5, None)
    assert runs_before == [6]


@pytest.fixture
def resettable_peak() -> None:
    try:
        RESET_FILE.write_text("5")
    except OSError:
        pytest.skip("this system cannot reset the peak memory of a process")


@pytest.mark.usefixtures("resettable_peak")
def test_peak_memory_ignores_earlier_peaks() -> None:
    def allocate(megabytes: int) -> Callable[[], None]:
        def run() -> None:
            torch.ones(megabytes << 18).add_(1)  # of four bytes each

        return run

    host_peak_bytes(allocate(64))
    large, small = (host_peak_bytes(allocate(size)) for size in (200, 40))
    assert large is not None
    assert small is not None
    assert 195 << 20 < large < 215 << 20
    assert 35 << 20 < small < 55 << 20


def test_a_program_runs_to_its_end_and_reports_its_memory() -> None:
    code = "import sys, time; open(sys.argv[-1], 'w').write('x'); block = bytearray(50 << 20); time.sleep(0.2)"
    program = Program([sys.executable, "-c", code], {})
    ballast = bytearray(200 << 20)  # of this process, which does not count
    program()
    del ballast
    assert program.peak_bytes is not None
    assert 50 << 20 < program.peak_bytes < 120 << 20


@pytest.mark.parametrize(
    "code, message", [("raise SystemExit('no such thing')", "no such thing"), ("pass", "ended with 0")]
)
def test_a_program_that_fails_or_writes_nothing_is_an_error(code: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        Program([sys.executable, "-c", code], {})()
