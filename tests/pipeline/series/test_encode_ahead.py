"""Prompts encoded ahead are in the prompt cache, with the text encoder loaded once, and nothing is said twice."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from kadr import Engine, Request, Windows
from kadr.errors import KadrWarning
from kadr.pipeline.series import encode_ahead
from kadr.pipeline.series.encode_ahead import encode_prompts_ahead
from kadr.request.series import RequestSeries
from tests.tiny_models import MODEL_FILE

TINY = Request(prompt="", size=(64, 64), frames=9, steps=1)


@pytest.fixture
def engine_with_cache(home: Path, tmp_path: Path) -> Engine:
    """Engine of the tiny model, with a prompt cache of its own."""
    return Engine.open(home / MODEL_FILE, device="cpu", prompt_cache=tmp_path / "prompts")


def uncached(engine: Engine, prompts: tuple[str, ...]) -> int:
    return len(engine._model.prompt_encoder(prompts).uncached_token_counts)


def test_prompts_encoded_ahead_are_in_the_cache(engine_with_cache: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_ahead, "_PROMPTS_AT_ONCE", 2)
    prompts = tuple(f"a circle {number}" for number in range(5))
    assert uncached(engine_with_cache, prompts) == 5
    loader = engine_with_cache._model.loader
    loads, load = [], loader.load_text_encoder
    monkeypatch.setattr(loader, "load_text_encoder", lambda *args, **options: loads.append(1) or load(*args, **options))
    encode_prompts_ahead(engine_with_cache, RequestSeries(TINY, prompts), prompts)
    assert (uncached(engine_with_cache, prompts), len(loads)) == (0, 1)


def test_prompt_that_cannot_be_encoded_is_left_to_its_video(engine_with_cache: Engine) -> None:
    windows = Request(prompt="", size=(64, 64), frames=17, steps=1, windows=Windows(frames=9, overlap=8))
    prompts = ("one", "a | | b", "1 | 2 | 3 | 4 | 5 | 6", "half a character \ud800", "two | three")
    series = RequestSeries(windows, prompts)
    encode_prompts_ahead(engine_with_cache, series, prompts[:3] + prompts[4:])
    assert uncached(engine_with_cache, ("one", "two", "three")) == 0
    encode_prompts_ahead(engine_with_cache, series, prompts[3:4])


def test_warnings_about_a_prompt_are_left_to_its_video(engine_with_cache: Engine) -> None:
    long = "circle " * 400
    series = RequestSeries(TINY, (long, ""))
    with warnings.catch_warnings():
        warnings.simplefilter("error", KadrWarning)
        encode_prompts_ahead(engine_with_cache, series, series.prompts)
    assert uncached(engine_with_cache, ("",)) == 0
    with pytest.warns(KadrWarning, match="truncated"):
        engine_with_cache.generate(series.request(long, 0))
