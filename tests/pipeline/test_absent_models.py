"""Every model of the registry, none of them on disk: resolved and planned, without the network."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kadr import Control, Engine, Request, Size
from kadr.media.writer import VideoWriter
from kadr.models.registry import MODEL_RELEASES
from kadr.pipeline.stages.control_networks import NETWORK_FILE_BYTES, NETWORK_FILES
from kadr.planning import planner

REQUEST = Request(prompt="a red circle moving right")
FETCHED = [release.name for release in MODEL_RELEASES if release.repo is not None]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of a released model is on disk, and opening a socket raises."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(planner, "free_bytes", lambda device: 10**12)  # the figures, whatever this machine has


@pytest.mark.parametrize("name", [release.name for release in MODEL_RELEASES])
def test_every_model_is_planned_without_a_file(name: str) -> None:
    plan = Engine.open(name, device="cpu").plan(REQUEST)
    assert plan.seconds > 0
    assert plan.stages[-1].stage == "decode"
    assert (plan.bytes_to_fetch > 4e9) is (name in FETCHED)
    assert any("256 tokens, the most" in reason for reason in plan.reasons()) is (name in FETCHED)


@pytest.mark.parametrize("name", FETCHED)
def test_bytes_to_fetch_are_those_of_the_registry(name: str) -> None:
    engine = Engine.open(name, device="cpu")
    resolved = engine.resolve(REQUEST)
    components = engine.spec.required_components(has_two_passes=len(resolved.passes) > 1)
    assert components[0].role == "model"
    assert all(component.path is None and component.bytes_to_fetch for component in components)


@pytest.mark.parametrize("name", [release.name for release in MODEL_RELEASES])
def test_resolved_requests_are_equal_and_hashable(name: str) -> None:
    first, second = (Engine.open(name, device="cpu").resolve(REQUEST) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert len({first, second}) == 1


def test_lora_that_is_not_on_disk_is_planned() -> None:
    plain = Engine.open("ltxv-13b-0.9.8-dev", device="cpu")
    adapted = Engine.open("ltxv-13b-0.9.8-dev", device="cpu", loras=["ltxv-13b-0.9.7-distilled-lora"])
    request = Request(prompt="a red circle", size=Size(256, 192), frames=9, multi_scale=False)
    without, with_lora = (engine.plan(request) for engine in (plain, adapted))
    difference = with_lora.bytes_to_fetch - without.bytes_to_fetch
    assert difference == pytest.approx(1_325_000_000)
    assert with_lora.stage("denoise").placement.private_bytes > without.stage("denoise").placement.private_bytes


def test_plan_names_the_networks_that_a_control_would_fetch(tmp_path: Path) -> None:
    pixels = np.zeros((9, 64, 64, 3), np.uint8)
    with VideoWriter(tmp_path / "clip.mp4", Size(64, 64), 24) as writer:
        writer.write(pixels)
    engine = Engine.open("demo", device="cpu", loras=["demo-ic-lora-canny"])
    control = Control(tmp_path / "clip.mp4", kind="pose")
    plan = engine.plan(Request(prompt="a red circle", size=Size(64, 64), frames=9, controls=(control,)))
    assert [name for name, _ in plan.to_fetch] == ["yzd-v/DWPose/yolox_l.onnx", "yzd-v/DWPose/dw-ll_ucoco_384.onnx"]
    assert plan.bytes_to_fetch == pytest.approx(351_000_000)
    assert plan.reasons()[0].startswith("fetch: 351 MB are not on disk: yzd-v/DWPose/yolox_l.onnx, ")


def test_every_network_file_has_a_size() -> None:
    assert {file for _, files in NETWORK_FILES.values() for file in files} == NETWORK_FILE_BYTES.keys()
