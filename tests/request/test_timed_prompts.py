"""Prompts of a long video that say when they are shown."""

from __future__ import annotations

import pytest

from kadr import Engine, Request
from kadr.errors import RequestError
from kadr.request.prompt_enhancement import enhance_prompt
from kadr.request.resolved_request import ResolvedRequest
from kadr.request.windows import Windows, split_time, timed_prompts

WINDOWS = Windows(frames=25, overlap=8)  # each adds 24 frames, and the first 25: they begin at 0, 1.04, 2.04, ... s


@pytest.fixture(scope="module")
def demo() -> Engine:
    return Engine.open("demo")


def resolve(demo: Engine, *prompts: str, frames: int | None = None, windows: Windows = WINDOWS) -> ResolvedRequest:
    return demo.resolve(Request(prompt=" | ".join(prompts), windows=windows, frames=frames, size=(64, 64)))


def test_each_window_has_the_prompt_of_its_own_first_frame(demo: Engine) -> None:
    resolved = resolve(demo, "0-1s: a red circle", "1s-2.5s: a blue square", "2.5s-: a green ring", frames=97)
    assert [resolved.prompt_index(index) for index in range(len(resolved.spans))] == [0, 1, 1, 2]
    assert resolved.all_prompts[:3] == ("a red circle", "a blue square", "a green ring")
    assert resolved.request.prompt.startswith("0-1s: a red circle | ")  # what was asked is kept, for a rerun
    again = demo.resolve(Request.from_json(resolved.request.to_json()))
    assert again.prompts == resolved.prompts


def test_the_end_of_the_last_prompt_is_the_length(demo: Engine) -> None:
    assert resolve(demo, "0s-1s: a red circle", "1-3s: a blue square").frames == 72
    assert resolve(demo, "0s-1s: a red circle", "1-3s: a blue square", frames=60).frames == 60


def test_an_open_end_in_between_is_where_the_next_begins(demo: Engine) -> None:
    closed = resolve(demo, "0-1s: a red circle", "1-2s: a ring", frames=57)
    assert resolve(demo, "0s-: a red circle", "1s-: a ring", frames=57).prompts == closed.prompts


def test_one_window_has_the_text_without_its_time(demo: Engine) -> None:
    resolved = resolve(demo, "0-1s: a red circle", frames=25)
    assert (resolved.windows, resolved.prompts) == (None, ("a red circle",))


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        (("0-1s: a", "b"), "'b' does not say when it is shown"),
        (("1s-2s: a",), "begins at 1 s, not at 0 s"),
        (("0-1s: a", "2-3s: b"), "begins at 2 s, not at 1 s"),
        (("0-2s: a", "1-3s: b"), "begins at 1 s, not at 2 s"),
        (("0s-: a", "0s-: b"), "begins at 0 s, not after 0 s"),
        (("0-0s: a",), "ends at 0 s, before it begins"),
        (("0-1.5s: a", "1.5-2s: b", "2s-: c"), r"no window begins within 1.5-2s.*begin at 0, 1.04, 2.04 s"),
        (("0-9s: a", "9s-: b"), r"no window begins within 9s-"),
    ],
)
def test_times_that_do_not_fit_are_refused(demo: Engine, prompts: tuple[str, ...], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        resolve(demo, *prompts, frames=57)


@pytest.mark.parametrize("prompt", ["a fox: it runs", "3-4: numbers", "1990s: a street", "ratio 4-3s: x", "0-3s:", ""])
def test_other_prompts_have_no_time(prompt: str) -> None:
    assert (timed_prompts([prompt]), split_time(prompt)) == ((), ("", prompt))


def test_an_enhanced_prompt_keeps_its_time(demo: Engine) -> None:
    class Echo:
        required = True

        def enhance_scenes(self, scenes: list[str], images: object) -> list[str]:
            assert scenes == ["a circle", "a ring"]
            return [scene.upper() for scene in scenes]

    request = Request(prompt="0-1s: a circle | 1s-: a ring", windows=WINDOWS)
    assert enhance_prompt(request, Echo()).prompt == "0-1s: A CIRCLE | 1s-: A RING"  # type: ignore[arg-type]
