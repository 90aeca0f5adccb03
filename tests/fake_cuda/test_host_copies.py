"""Frames reach the host in order and complete, each while the next ones are computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kadr.errors import NonFiniteError
from kadr.memory.host_copies import copy_to_host
from kadr.models.vae import VAE
from tests.fake_cuda.modes import build_request, open_engine
from tests.fake_cuda.runtime import Runtime
from tests.fake_cuda.watch import DeviceWatch


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_frames_arrive_in_order_one_chunk_behind_a_gpu(device: str, cuda: Runtime) -> None:
    computed = []

    def chunks() -> Iterator[Tensor]:
        for index in range(4):
            computed.append(index)
            yield torch.full((index + 1, 2), index, dtype=torch.uint8, device=device)

    arrived = []
    with DeviceWatch(cuda) as watch:
        for frames in copy_to_host(chunks()):
            arrived.append((frames.clone(), len(computed)))
    assert [len(frames) for frames, _ in arrived] == [1, 2, 3, 4]
    assert all(frames.device.type == "cpu" and (frames == index).all() for index, (frames, _) in enumerate(arrived))
    assert [count for _, count in arrived] == ([1, 2, 3, 4] if device == "cpu" else [2, 3, 4, 4])
    assert not watch.races
    assert [wait.kind for wait in watch.waits] == ["drains a stream"] * (device == "cuda")  # for the last chunk


def test_nothing_arrives_of_nothing() -> None:
    assert list(copy_to_host(iter(()))) == []


@pytest.mark.usefixtures("cuda")
def test_no_frame_of_a_bad_chunk_leaves_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    decode_chunks = VAE.decode_chunks

    def spoiled(self: VAE, *args: Any, **options: Any) -> Iterator[Tensor]:
        for index, chunk in enumerate(decode_chunks(self, *args, **options)):
            yield chunk * torch.nan if index == 2 else chunk

    monkeypatch.setattr("kadr.planning.options.vae.LARGE_CHUNK_FRAMES", ())  # several chunks of a short video
    request = build_request({"frames": 41, "steps": 1}, {})
    with open_engine("cuda", {}).start(request) as generation:
        latents = generation.denoise()
        good = [frames.clone() for frames in generation.decode(latents)]
        monkeypatch.setattr(VAE, "decode_chunks", spoiled)
        arrived = []
        with pytest.raises(NonFiniteError, match=f"frame {len(good[0]) + len(good[1]) + 1} of 41"):
            arrived.extend(frames.clone() for frames in generation.decode(latents))
    assert len(good) > 3
    assert len(arrived) == 2
    assert all(torch.equal(frames, expected) for frames, expected in zip(arrived, good[:2], strict=True))
