"""Plans that are made at the same time: each client gets its own warnings, and nobody else's."""

from __future__ import annotations

import asyncio
import json
import time
import warnings
from typing import Any

import pytest

from kadr.errors import KadrWarning
from kadr.pipeline.engine import Engine
from tests.server.app_client import HOST
from tests.server.opened_app import SMALL, OpenedApp

SIZES = ("64x64", "96x64", "128x64", "160x64")


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
