"""Prompts that the model cannot know: words outside a small vocabulary, and no words at all."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

from kadr.errors import KadrWarning, RequestError
from kadr.models.registry import find_release
from kadr.pipeline.engine import Engine
from kadr.request.prompt_words import describe_prompts, unknown_words
from kadr.request.request import Request
from kadr.request.windows import Windows, split_prompts
from train import scenes

DEMO = find_release("demo")
KNOWN = "a red circle moving right on a black background"


def prompt_warnings(engine: Engine, request: Request) -> list[str]:
    """Starts a generation, without a stage, and returns what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with engine.start(request):
            pass
    return [str(warning.message) for warning in caught if issubclass(warning.category, KadrWarning)]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.open("demo", device="cpu", prompt_cache=False)


def test_the_demos_words_are_those_of_its_training_captions() -> None:
    captions = list(scenes.vocabulary_corpus(rounds=2))
    assert DEMO.known_words == {word.strip(".,;").lower() for caption in captions for word in caption.split()}
    assert all(unknown_words(caption, DEMO) == [] for caption in captions)
    kinds = {"colours": scenes.COLOURS, "shapes": scenes.SHAPES, "backgrounds": scenes.BACKGROUNDS}
    assert {kind: DEMO.words[kind] for kind in kinds} == {kind: tuple(words) for kind, words in kinds.items()}
    assert DEMO.words["sizes"] == tuple(scenes.SIZES)
    assert DEMO.words["speeds"] == tuple(filter(None, scenes.SPEEDS))
    participles = [phrase for phrases in scenes.MOTION_PARTICIPLES.values() for phrase in phrases]
    assert {word for phrase in participles for word in phrase.split()} <= {
        word for phrase in DEMO.words["motions"] for word in phrase.split()
    }
    assert find_release("demo-distilled").words == DEMO.words


@pytest.mark.parametrize(
    "prompt, expected",
    [
        (KNOWN, []),
        ("Small, white ring; growing.", []),
        ("a grey fox", ["grey", "fox"]),
        ("a RED circle", ["RED"]),  # the demo's captions have capitals at the start only
        ("3 circles", ["3", "circles"]),
        ("лиса", ["лиса"]),
        ("", []),
    ],
)
def test_words_outside_the_captions_are_found(prompt: str, expected: list[str]) -> None:
    assert unknown_words(prompt, DEMO) == expected


def test_unknown_words_get_one_warning_that_names_them(engine: Engine) -> None:
    (text,) = prompt_warnings(engine, Request("a fox on a grey background", size=(64, 64), frames=9))
    assert text == (
        "demo was not trained with 'fox', 'grey', so the video need not show it; its words: `kadr models info demo`"
    )
    assert prompt_warnings(engine, Request(KNOWN, size=(64, 64), frames=9)) == []
    (text,) = prompt_warnings(engine, Request(f"{KNOWN} | {KNOWN} fox", frames=41, windows=Windows(frames=25)))
    assert "'fox'" in text


def test_a_long_list_of_unknown_words_is_cut(engine: Engine) -> None:
    prompt = " ".join(f"word{number}" for number in range(50)) + " " + "x" * 10_000 + "\x1b[31m"
    text = next(text for text in prompt_warnings(engine, Request(prompt)) if "not trained with" in text)
    assert "'word7' and 44 more" in text
    (text,) = prompt_warnings(engine, Request("x" * 1000))[-1:]
    assert len(text) < 500


def test_a_lora_may_know_words_of_its_own() -> None:
    engine = Engine.open("demo", loras=["demo-lora-teal"], device="cpu", prompt_cache=False)
    assert prompt_warnings(engine, Request("a teal circle", size=(64, 64), frames=9)) == []


def test_facts_of_a_prompt_say_what_is_read_of_it(engine: Engine) -> None:
    (facts,) = describe_prompts(engine.resolve(Request(f" {KNOWN} 🐈 fox fox\n")), engine.spec)
    assert facts.text == f"{KNOWN} 🐈 fox fox"
    assert (facts.num_characters_read, facts.max_tokens) == (len(facts.text), 256)
    assert facts.unknown_words == ("fox",)
    tokenizer = engine.spec.tokenizer
    assert tokenizer is not None
    assert facts.tokens == tokenizer.encode(facts.text).mask.sum()
    (long,) = describe_prompts(engine.resolve(Request(f"🐈 {'circle ' * 400}")), engine.spec)
    assert long.tokens is not None
    assert long.tokens > 400
    read = long.text[: long.num_characters_read]
    assert 255 <= tokenizer.encode(read).num_tokens <= 256
    assert tokenizer.encode(f"{read} circle").truncated_text == "circle"


def test_facts_are_those_of_each_windows_prompt(engine: Engine) -> None:
    request = Request(f"{KNOWN} | a fox", size=(64, 64), frames=41, windows=Windows(frames=25))
    facts = describe_prompts(engine.resolve(request), engine.spec)
    assert [(item.text, item.unknown_words) for item in facts] == [(KNOWN, ()), ("a fox", ("fox",))]
    (whole,) = describe_prompts(engine.resolve(replace(request, windows=None)), engine.spec)
    assert whole.text == request.prompt


def test_facts_without_a_tokenizer_leave_tokens_open() -> None:
    engine = Engine.open("ltxv-2b-0.9.8-distilled", device="cpu", prompt_cache=False)
    assert engine.spec.tokenizer is None
    (facts,) = describe_prompts(engine.resolve(Request("a fox", multi_scale=False)), engine.spec)
    assert (facts.text, facts.tokens, facts.num_characters_read, facts.unknown_words) == ("a fox", None, None, ())


@pytest.mark.parametrize("windows", [None, Windows(frames=25)])
def test_an_empty_prompt_is_warned_of(engine: Engine, windows: Windows | None) -> None:
    request = Request("", size=(64, 64), frames=41 if windows else 9, windows=windows)
    assert Request.from_json(request.to_json()) == request
    assert prompt_warnings(engine, request) == ["the prompt is empty: the model decides what to show."]


def test_one_of_several_prompts_may_not_be_empty() -> None:
    assert split_prompts(" ") == ("",)
    with pytest.raises(RequestError, match="prompt 2 of 3 is empty"):
        split_prompts("a | | b")
