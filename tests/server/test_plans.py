"""Plans: how prompts are read, what is sampled, what would fit; and each client gets its own warnings alone."""

from __future__ import annotations

import asyncio
import json
import time
import warnings
from typing import Any

import pytest

from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import KadrWarning
from kadr.memory.device import resident_bytes
from kadr.pipeline.engine import Engine
from kadr.planning import planner
from kadr.server.schema import VideoSettings
from tests.server.app_client import HOST
from tests.server.opened_app import SMALL, OpenedApp

WINDOWED = {**SMALL, "prompt": "a red circle | a fox", "num_frames": 60, "windows": {"frames": 25}}
SIZES = ("64x64", "96x64", "128x64", "160x64")


def plan_of(app: OpenedApp, **settings: Any) -> dict[str, Any]:
    """Returns the plan of a small video, but for the fields that are given."""
    answer = app.send("POST", "/v1/plan", json_body={**SMALL, **settings})
    assert answer.status == 200, answer
    data: dict[str, Any] = answer.data
    return data


def test_plan_says_how_its_prompt_is_read(local_app: OpenedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextEncoderCheckpoint, "load", lambda *args, **options: pytest.fail("weights were loaded"))
    text = "a red 🐈 on a black background"
    (prompt,) = plan_of(local_app, prompt=f" {text} ")["prompts"]
    assert prompt.pop("tokens") > len(text.split())
    expected = {"text": text, "max_tokens": 256, "num_characters_read": len(text), "unknown_words": []}
    assert prompt == expected
    (long,) = plan_of(local_app, prompt="a fox " * 1000)["prompts"]
    assert long["tokens"] > 2000
    assert 0 < long["num_characters_read"] < 1000
    assert long["unknown_words"] == ["fox"]
    assert [item["text"] for item in plan_of(local_app, **WINDOWED)["prompts"]] == ["a red circle", "a fox"]


def test_plan_says_what_is_sampled(local_app: OpenedApp) -> None:
    plan = plan_of(local_app, size="70x66", num_frames=10)
    assert (plan["size"], plan["sampled_size"]) == ("70x66", "96x96")
    assert (plan["num_frames"], plan["sampled_frames"]) == (10, 17)
    assert (plan["num_passes"], plan["windows"]) == (1, [])
    assert plan_of(local_app, multi_scale=True)["num_passes"] == 2
    assert plan_of(local_app, **WINDOWED)["windows"] == [[0, 25], [25, 41], [41, 57], [57, 60]]
    short_overlap = {**WINDOWED, "windows": {"frames": 25, "overlap": 8}}
    assert plan_of(local_app, **short_overlap)["windows"] == [[0, 25], [25, 49], [49, 60]]


@pytest.mark.parametrize("settings", [{"size": "512x512", "num_frames": 121}, {**WINDOWED, "size": "512x512"}])
def test_suggestion_of_a_plan_fits(
    local_app: OpenedApp, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    peak_bytes = plan_of(local_app, **settings)["peak_bytes"]
    monkeypatch.setattr(planner, "free_bytes", lambda device: int((peak_bytes - resident_bytes()) * 0.5))
    plan = plan_of(local_app, **settings)
    assert not plan["fits"]
    assert {"prompts", "sampled_size", "windows"} <= set(plan)
    assert plan["suggestion"]
    assert set(plan["suggestion"]) <= set(VideoSettings.model_fields)
    fitting = plan_of(local_app, **{**settings, **plan["suggestion"]})
    assert (fitting["fits"], fitting["suggestion"]) == (True, None)
    monkeypatch.setattr(planner, "free_bytes", lambda device: 0)
    hopeless = plan_of(local_app, **settings)
    assert (hopeless["fits"], hopeless["suggestion"]) == (False, None)


def test_warnings_of_a_plan_are_its_own(
    local_app: OpenedApp, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Engine.plan

    def plan_slowly(engine: Engine, resolved: Any, **options: Any) -> Any:
        time.sleep(0.02)
        warnings.warn(f"this is about {resolved.size}", KadrWarning, stacklevel=1)
        time.sleep(0.02)
        return plan(engine, resolved, **options)

    async def plan_all() -> list[Any]:
        fields = [("content-type", "application/json"), ("host", HOST)]
        bodies = [json.dumps({**SMALL, "size": size}).encode() for size in SIZES]
        calls = [local_app.send.call("POST", "/v1/plan", fields, iter([body])) for body in bodies]
        return await asyncio.gather(*calls)

    local_app.send("POST", "/v1/plan", json_body=SMALL)
    monkeypatch.setattr(Engine, "plan", plan_slowly)
    before = warnings.showwarning, list(warnings.filters)
    answers = loop.run_until_complete(plan_all())
    assert [answer.data["warnings"] for answer in answers] == [[f"this is about {size}"] for size in SIZES]
    assert (warnings.showwarning, list(warnings.filters)) == before
