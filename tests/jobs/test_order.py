"""The order of claims: priority, owners in turns, warm models, and nobody passed over more often than the bound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kadr.jobs.order import Waiting, next_job


def waiting(number: int, **columns: object) -> Waiting:
    """Returns a job that waits."""
    return Waiting(
        **{"number": number, "owner": "", "priority": 0, "position": float(number), "passed": 0, "engine": "a"}
        | columns  # type: ignore[arg-type]
    )


def number_of_next(*jobs: Waiting, max_passes: int = 8, **arguments: object) -> int | None:
    """Returns the number of the job that is next."""
    chosen = next_job(jobs, max_passes=max_passes, **arguments)  # type: ignore[arg-type]
    return chosen and chosen.number


def test_nothing_is_next_in_an_empty_queue() -> None:
    assert number_of_next() is None


def test_first_position_goes_first() -> None:
    assert number_of_next(waiting(1, position=2.0), waiting(2, position=1.5)) == 2


def test_higher_priority_goes_first() -> None:
    assert number_of_next(waiting(1), waiting(2, priority=5), waiting(3, priority=-5)) == 2


def test_owner_with_nothing_in_progress_goes_first() -> None:
    assert number_of_next(waiting(1, owner="a"), waiting(2, owner="b"), running={"a": 1}) == 2


def test_owner_that_was_served_longer_ago_goes_first() -> None:
    assert number_of_next(waiting(1, owner="a"), waiting(2, owner="b"), last_served={"a": 7, "b": 3}) == 2
    assert number_of_next(waiting(1, owner="a"), waiting(2, owner="b"), last_served={"a": 7}) == 2


def test_warm_model_goes_first_within_a_priority() -> None:
    assert number_of_next(waiting(1), waiting(2, engine="b"), warm_engines={"b"}) == 2
    assert number_of_next(waiting(1, priority=1), waiting(2, engine="b"), warm_engines={"b"}) == 1


def test_job_that_was_passed_too_often_goes_before_everything() -> None:
    overdue = waiting(1, passed=8, priority=-100)
    assert number_of_next(overdue, waiting(2, priority=100), warm_engines={"b"}) == 1
    assert number_of_next(waiting(3, passed=9), waiting(2, passed=8)) == 2


def test_bound_of_zero_is_the_order_of_submission() -> None:
    assert number_of_next(waiting(3, priority=9), waiting(1), waiting(2), max_passes=0) == 1


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-2, 2), st.sampled_from("xy")), min_size=1, max_size=40),
    st.integers(0, 5),
    st.data(),
)
def test_nobody_is_passed_more_often_than_the_bound(
    submissions: list[tuple[str, int, str]], max_passes: int, data: st.DataObject
) -> None:
    jobs: dict[int, Waiting] = {}
    submitted = iter(enumerate(submissions))
    is_open = True
    while is_open or jobs:
        if is_open and (not jobs or data.draw(st.booleans())):
            item = next(submitted, None)
            is_open = item is not None
            if item is not None:
                number, (owner, priority, engine) = item
                jobs[number] = waiting(number, owner=owner, priority=priority, engine=engine)
            continue
        chosen = next_job(list(jobs.values()), max_passes=max_passes, warm_engines={data.draw(st.sampled_from("xy"))})
        assert chosen is not None
        del jobs[chosen.number]
        for number, job in jobs.items():
            if number < chosen.number:
                jobs[number] = waiting(**vars(job) | {"passed": job.passed + 1})
                assert job.passed < max_passes


@pytest.mark.parametrize("max_passes", [0, 1, 8])
def test_low_priority_is_served_in_a_stream_of_higher_ones(max_passes: int) -> None:
    low, claimed = waiting(0, priority=-100), 0
    while (chosen := next_job([low, waiting(claimed + 1, priority=100)], max_passes=max_passes)) is not None:
        if chosen.number == 0:
            break
        claimed += 1
        low = waiting(0, priority=-100, passed=low.passed + 1)
    assert claimed == max_passes
