"""Models as the API shows them: their words, and what a request that leaves all else out resolves to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kadr.models.registry import find_release
from kadr.server.schema import VideoSettings
from tests.server.opened_app import OpenedApp, open_app

LARGE = "ltxv-13b-0.9.8-dev"
MODELS = {name: name for name in ("demo", "demo-distilled", LARGE)}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, loop: asyncio.AbstractEventLoop) -> Iterator[OpenedApp]:
    with open_app(tmp_path_factory.mktemp("models") / "data", loop, models=MODELS) as opened:
        yield opened


def model(app: OpenedApp, name: str) -> dict[str, Any]:
    data: dict[str, Any] = app.send("GET", f"/v1/models/{name}").data
    return data


def test_model_tells_what_the_registry_knows(app: OpenedApp) -> None:
    demo, large = model(app, "demo"), model(app, LARGE)
    assert (demo["release"], demo["is_demo"], demo["is_distilled"]) == ("demo", True, False)
    assert (large["release"], large["is_demo"], large["is_distilled"]) == (LARGE, False, False)
    assert model(app, "demo-distilled")["is_distilled"] is True
    assert (demo["max_prompt_tokens"], demo["max_frames_at_once"], large["max_frames_at_once"]) == (256, 25, 257)
    assert large["words"] is None
    assert {word for phrase in demo["words"] for word in phrase.split()} == find_release("demo").known_words
    assert len(set(demo["words"])) == len(demo["words"])


@pytest.mark.parametrize("name", MODELS)
def test_defaults_are_what_a_lone_prompt_resolves_to(app: OpenedApp, name: str) -> None:
    recipe, defaults = find_release(name).recipe, model(app, name)["defaults"]
    assert set(defaults) <= set(VideoSettings.model_fields)
    assert (defaults["size"], defaults["num_frames"], defaults["fps"]) == (str(recipe.size), recipe.frames, recipe.fps)
    assert defaults["multi_scale"] == recipe.multi_scale
    assert defaults["sampler"] in ("euler", "euler_stochastic")
    expected = len(recipe.first_pass.sigmas) if recipe.first_pass.sigmas else recipe.first_pass.steps
    assert defaults["num_inference_steps"] == expected
    scale = recipe.first_pass.guidance.cfg_scale
    assert defaults.get("guidance_scale") == (None if isinstance(scale, tuple) else scale)
    twice = {"guidance_scale", *(["num_inference_steps"] if "sigmas" in defaults else [])}
    sent = {key: value for key, value in defaults.items() if key not in twice}
    lone, full = ({"prompt": "a red circle", "model": name, **more} for more in ({}, sent))
    plans = [app.send("POST", "/v1/plan", json_body=body).data for body in (lone, full)]
    assert {**plans[0], "peak_bytes": 0, "message": ""} == {**plans[1], "peak_bytes": 0, "message": ""}


def test_list_of_models_opens_none(app: OpenedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(app.state.catalogue), "engine", lambda *args: pytest.fail("it was opened"))
    models = app.send("GET", "/v1/models").data["data"]
    assert [item["id"] for item in models] == list(MODELS)
    assert set(models[0]) == {"id", "object", "created", "owned_by", "is_default"}


def test_model_that_cannot_be_opened_is_shown_without_facts(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> None:
    (tmp_path / "models" / "checkpoints").mkdir(parents=True)
    file = tmp_path / "models" / "checkpoints" / "damaged.safetensors"
    file.write_bytes(b"\x10" + bytes(7) + b'{"a": 1}        ')
    with open_app(tmp_path / "data", loop, models_dirs=(tmp_path / "models",)) as app:
        shown = model(app, "damaged.safetensors")
    assert shown["id"] == "damaged.safetensors"
    assert {key for key, value in shown.items() if value is None} == {
        *("release", "is_distilled", "words", "max_prompt_tokens", "max_frames_at_once", "defaults", "recipe"),
    }
