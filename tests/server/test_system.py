"""The server as a client sees it: its device and disk, its bounds, and who the client is."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from kadr.memory.device import resident_bytes, total_bytes
from kadr.server.system_monitor import CACHE_SECONDS, LOW_DISK_BYTES, SystemMonitor
from kadr.version import __version__
from tests.server.opened_app import ADMIN, ANNA, BEN, OpenedApp

LIMIT = 10**9


def system(app: OpenedApp, token: str | None = None) -> dict[str, Any]:
    answer = app.send("GET", "/v1/system", token=token)
    assert answer.status == 200, answer
    data: dict[str, Any] = answer.data
    return data


def test_system_tells_each_client_who_it_is(app: OpenedApp, local_app: OpenedApp) -> None:
    fields = ("client", "is_admin", "needs_token")
    seen = [tuple(system(app, token)[field] for field in fields) for token in (ADMIN, ANNA, BEN)]
    assert seen == [("admin", True, True), ("anna", False, True), ("ben", False, True)]
    assert tuple(system(local_app)[field] for field in fields) == (None, True, False)


def test_system_has_the_bounds_of_the_client(app: OpenedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = SimpleNamespace(max_queued=900, max_queued_per_owner=7)
    monkeypatch.setattr(app.state.queue.store, "limits", limits)
    assert [system(app, token)["max_queued"] for token in (ANNA, BEN)] == [900, 7]  # Anna's own bound is 1000
    limits.max_queued_per_owner = None
    assert system(app, BEN)["max_queued"] == 900
    assert system(app, BEN)["max_upload_bytes"] == app.state.uploads.limits.max_bytes


def test_system_describes_the_machine(local_app: OpenedApp) -> None:
    shown = system(local_app)
    assert (shown["version"], shown["models"]) == (__version__, len(local_app.state.catalogue.model_names()))
    assert shown["disk_free_bytes"] == pytest.approx(shutil.disk_usage(local_app.folder).free, rel=0.1)
    bound = local_app.state.queue.supervisor.min_free_bytes + LOW_DISK_BYTES
    assert shown["is_disk_low"] is (shown["disk_free_bytes"] < bound)
    if shown["device"] == "cpu":
        assert 0 < shown["memory_bytes"] <= psutil.virtual_memory().total
        assert shown["memory_used_bytes"] >= 0.5 * resident_bytes()


def open_monitor(folder: Path, now: list[float], **settings: Any) -> SystemMonitor:
    options = {"device": "cpu", "min_free_bytes": LIMIT, "count_models": lambda: 3, **settings}
    return SystemMonitor(folder, **options, clock=lambda: now[0])


def test_monitor_looks_once_a_second(tmp_path: Path) -> None:
    now, counts = [100.0], iter(range(10))
    monitor = open_monitor(tmp_path, now, count_models=lambda: next(counts))
    assert [monitor.read().models for _ in range(3)] == [0, 0, 0]
    now[0] += 0.9 * CACHE_SECONDS
    assert monitor.read().models == 0
    now[0] += 0.2 * CACHE_SECONDS
    assert [monitor.read().models for _ in range(2)] == [1, 1]


def test_disk_is_low_before_jobs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = LIMIT + LOW_DISK_BYTES
    for free, is_low in ((bound, False), (bound - 1, True), (LIMIT, True), (LIMIT - 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        facts = open_monitor(tmp_path, [0.0]).read()
        assert (facts.disk_free_bytes, facts.is_disk_low) == (free, is_low)


def test_disk_that_cannot_be_read_is_not_called_low(tmp_path: Path) -> None:
    facts = open_monitor(tmp_path / "missing", [0.0]).read()
    assert (facts.disk_free_bytes, facts.is_disk_low) == (None, False)


def test_gpu_goes_by_its_name_and_may_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cuda = SimpleNamespace(type="cuda")
    monkeypatch.setattr("kadr.memory.device.pick_device", lambda name: cuda if name == "cuda:1" else None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 80))
    facts = open_monitor(tmp_path, [0.0], device="cuda:1").read()
    assert (facts.device, facts.memory_bytes, facts.memory_used_bytes) == ("NVIDIA H200", 80, 70)
    assert total_bytes(cuda) == 80  # type: ignore[arg-type]

    def refuse(device: object) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    full = open_monitor(tmp_path, [0.0], device="cuda:1").read()
    assert (full.device, full.memory_bytes, full.memory_used_bytes) == ("NVIDIA H200", 80, None)
