"""`RequestSeries`: each prompt with each seed, in order, and nothing else differs."""

from __future__ import annotations

import pytest

from kadr.errors import RequestError
from kadr.request.request import Request
from kadr.request.series import MAX_VARIATIONS, RequestSeries, SeriesItem
from kadr.request.windows import Windows

TEMPLATE = Request(prompt="", seed=-1, frames=17, steps=3)


def test_every_prompt_has_every_seed_in_order() -> None:
    series = RequestSeries(TEMPLATE, ("a", "b"), 3)
    expected = [(1, "a", -1), (2, "a", 0), (3, "a", 1), (4, "b", -1), (5, "b", 0), (6, "b", 1)]
    assert list(series) == [SeriesItem(*item) for item in expected]
    assert len(series) == 6


def test_requests_differ_in_prompt_and_seed_alone() -> None:
    series = RequestSeries(TEMPLATE, ("a",), 2)
    requests = [series.request(item.prompt, item.seed) for item in series]
    assert requests == [Request(prompt="a", seed=seed, frames=17, steps=3) for seed in (-1, 0)]


@pytest.mark.parametrize("variations", [0, -1, MAX_VARIATIONS + 1, 1.5, True, None])
def test_number_of_variations_is_limited(variations: object) -> None:
    with pytest.raises(RequestError, match=r"variations is .* between 1 and 1000"):
        RequestSeries(TEMPLATE, ("a",), variations)  # type: ignore[arg-type]


def test_prompt_that_does_not_fit_is_refused_when_its_request_is_built() -> None:
    series = RequestSeries(Request(prompt="", windows=Windows(frames=9)), ("a | b", "a | | b"))
    assert series.request("a | b", 0).prompts == ("a", "b")
    with pytest.raises(RequestError, match="prompt 2 of 3 is empty"):
        series.request("a | | b", 0)
