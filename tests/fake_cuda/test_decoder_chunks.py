"""A GPU decodes in larger chunks where their memory is no matter, with a fraction of the kernel launches."""

from __future__ import annotations

import pytest
import torch

from kadr import Engine, Request
from kadr.models.vae.decoder import CHUNK_FRAMES
from kadr.planning import planner
from tests.fake_cuda.modes import build_request, open_engine
from tests.fake_cuda.runtime import Runtime
from tests.fake_cuda.watch import DeviceWatch

REQUEST = build_request({"frames": 65, "steps": 1}, {})


def planned_chunk(request: Request, engine: Engine) -> int:
    return engine.plan(request).stage("decode").placement.chunk_frames


@pytest.mark.usefixtures("cuda")
def test_a_plan_takes_large_chunks_while_they_are_small_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine("cuda", {})
    decode = engine.plan(REQUEST).stage("decode")
    assert decode.placement.chunk_frames == 64
    assert not decode.placement.reason
    assert [fallback.chunk_frames for fallback in decode.fallbacks] == [16, CHUNK_FRAMES, 2, 1]
    assert planned_chunk(build_request({"size": (1216, 704), "frames": 257}, {}), engine) < 64
    assert planned_chunk(REQUEST, open_engine("cpu", {})) == CHUNK_FRAMES
    monkeypatch.setattr(planner, "RESERVED_FRACTION", 0.0)
    usual = decode.fallbacks[1]
    assert usual.device_bytes < decode.placement.device_bytes
    monkeypatch.setattr(planner, "free_bytes", lambda device: usual.device_bytes)
    assert planned_chunk(REQUEST, engine) == CHUNK_FRAMES


def test_large_chunks_save_most_launches_and_change_no_frame(cuda: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    videos, launches = [], []
    for large_chunks in ((), (64,)):
        monkeypatch.setattr("kadr.planning.options.vae.LARGE_CHUNK_FRAMES", large_chunks)
        with open_engine("cuda", {}).start(REQUEST) as generation:
            latents = torch.zeros(generation.latents_shape(generation.resolved.passes[-1]), device="cuda")
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with DeviceWatch(cuda) as watch:
                videos.append(torch.cat([frames.clone() for frames in generation.decode(latents)]))
            launches.append(watch.count)
            planned = generation.plan.stage("decode").placement
            assert torch.cuda.max_memory_allocated() - before <= planned.device_bytes
    assert 3 * launches[1] < launches[0]
    assert (videos[0].int() - videos[1].int()).abs().max() <= 1
