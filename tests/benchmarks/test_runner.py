"""The runner: everyone in turns, medians and spreads, and nobody missing in silence. With a clock that is told."""

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
    """Runs what it is given, and says how long that took: what is next in the list of who ran."""

    def __init__(self, **seconds: list[float]) -> None:
        self.seconds = {name: cycle(values) for name, values in seconds.items()}
        self.ran: list[str] = []

    def contender(self, name: str, **more: object) -> Contender:
        return Contender(name=name, run=lambda: self.ran.append(name), dtype="float32", **more)  # type: ignore[arg-type]

    def __call__(self, run: Task) -> float:
        already = len(self.ran)
        run()
        return sum(next(self.seconds[name]) for name in self.ran[already:])


def nothing(run: Task) -> None:
    """A peak that is not known."""


def measured(clock: Clock, *contenders: Contender, rounds: int = 3) -> list[Measurement]:
    return measure(contenders, rounds=rounds, warm_ups=1, clock=clock, peak=nothing)[0]


def test_everyone_runs_once_in_every_round_and_rounds_begin_with_another() -> None:
    clock = Clock(a=[1.0], b=[1.0], c=[1.0])
    measured(clock, *map(clock.contender, "abc"))
    warm_up, rounds = clock.ran[:3], clock.ran[3:]
    assert warm_up == ["a", "b", "c"]
    assert ["".join(rounds[i : i + 3]) for i in (0, 3, 6)] == ["abc", "bca", "cab"]


@pytest.mark.parametrize("count", [1, 3])
def test_warm_ups_do_not_count(count: int) -> None:
    clock = Clock(a=[9.0, 1.0, 2.0, 3.0])
    given = {"rounds": 2, "warm_ups": count, "clock": clock, "peak": nothing}
    (only,), _ = measure([clock.contender("a")], **given)
    assert len(clock.ran) == count + 2
    assert 9.0 not in only.seconds


def test_a_time_is_the_median_and_its_spread_the_distance_of_the_quartiles() -> None:
    clock = Clock(a=[50.0, 1.0, 2.0, 3.0, 4.0, 100.0])  # the first is the warm-up's
    (only,) = measured(clock, clock.contender("a"), rounds=5)
    assert (only.median, only.interquartile_range) == (3.0, 2.0)
    assert interquartile_range([7.0]) == 0.0


def test_a_ratio_is_that_of_each_round_and_so_a_drifting_machine_does_not_show() -> None:
    clock = Clock(a=[1.0, 1.0, 10.0, 2.0], b=[2.0, 2.0, 20.0, 4.0])
    a, b = measured(clock, clock.contender("a"), clock.contender("b"))
    assert b.ratio(a) == 2.0
    assert a.ratio(a) == 1.0


def test_what_is_too_short_to_be_timed_runs_several_times_in_a_row() -> None:
    clock = Clock(a=[0.05], b=[5.0])
    a, b = measured(clock, clock.contender("a"), clock.contender("b"), rounds=1)
    assert (a.repeats, b.repeats) == (4, 1)
    assert clock.ran == ["a", "b", *"aaaa", "b"]
    assert a.median == pytest.approx(0.05)


def test_a_peer_that_fails_is_told_and_the_others_run() -> None:
    def fail() -> None:
        raise RuntimeError("out of luck\nand more")

    clock = Clock(a=[1.0])
    broken = Contender(name="peer", run=fail, dtype="float32")
    given = {"rounds": 1, "warm_ups": 1, "clock": clock, "peak": nothing}
    noted, failed = measure([broken, clock.contender("a")], **given)
    assert [each.contender.name for each in noted] == ["a"]
    assert [(each.name, each.reason) for each in failed] == [("peer", "failed: RuntimeError: out of luck")]
    with pytest.raises(RuntimeError, match="out of luck"):
        measure([Contender(name="ours", run=fail, dtype="float32", is_kadr=True)], **given)


def giving(value: float, **more: object) -> Contender:
    return Contender(name="x", run=lambda: torch.full((3, 4), value), dtype="float32", **more)  # type: ignore[arg-type]


def test_a_result_is_compared_with_the_reference_and_that_of_a_yardstick_is_not() -> None:
    given = {"rounds": 1, "warm_ups": 1, "clock": seconds_of, "peak": nothing}
    reference = torch.full((3, 4), 2.0)
    (near, rod), _ = measure([giving(2.2), giving(9.0, yardstick=True)], reference=reference, **given)
    assert near.error == pytest.approx(0.1)
    assert rod.error is None
    _, (odd,) = measure([giving(1.0)], reference=torch.ones(4, 4), **given)
    assert "shape" in odd.reason


def seconds_of(run: Task) -> float:
    run()
    return 1.0


def test_an_error_is_relative_to_the_norm_of_the_reference() -> None:
    reference = torch.randn(7, 3000, 5, generator=torch.Generator().manual_seed(0))
    assert relative_error(reference, reference) == 0
    assert relative_error(1.25 * reference, reference) == pytest.approx(0.25)
    assert relative_error(torch.ones(2, 2), torch.zeros(2, 2)) == 1


def test_memory_is_told_in_a_run_of_its_own_after_the_rounds_and_not_of_yardsticks() -> None:
    clock, asked = Clock(a=[1.0], rod=[1.0]), []

    def peak(run: Task) -> int:
        asked.append(len(clock.ran))
        return 5

    contenders = [clock.contender("a"), clock.contender("rod", yardstick=True)]
    (a, rod), _ = measure(contenders, rounds=2, warm_ups=1, clock=clock, peak=peak)
    assert (a.peak_bytes, rod.peak_bytes) == (5, None)
    assert asked == [6]


@pytest.fixture
def resettable() -> None:
    try:
        RESET_FILE.write_text("5")
    except OSError:
        pytest.skip("this system does not set its highest mark back")


@pytest.mark.usefixtures("resettable")
def test_memory_is_what_a_run_takes_whatever_was_taken_before() -> None:
    def taking(megabytes: int) -> Callable[[], None]:
        def run() -> None:
            torch.ones(megabytes << 18).add_(1)  # of four bytes each

        return run

    host_peak_bytes(taking(64))
    large, small = (host_peak_bytes(taking(size)) for size in (200, 40))
    assert large is not None
    assert small is not None
    assert 195 << 20 < large < 215 << 20
    assert 35 << 20 < small < 55 << 20


def test_a_program_is_run_to_its_end_and_tells_its_memory() -> None:
    words = "import sys, time; open(sys.argv[-1], 'w').write('x'); held = bytearray(50 << 20); time.sleep(0.2)"
    program = Program([sys.executable, "-c", words], {})
    held = bytearray(200 << 20)  # of this process, which does not count
    program()
    del held
    assert program.peak_bytes is not None
    assert 50 << 20 < program.peak_bytes < 120 << 20


@pytest.mark.parametrize(
    "words, said", [("raise SystemExit('no such thing')", "no such thing"), ("pass", "ended with 0")]
)
def test_a_program_that_fails_or_writes_nothing_says_so(words: str, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        Program([sys.executable, "-c", words], {})()
