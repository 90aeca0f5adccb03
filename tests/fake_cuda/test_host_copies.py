"""Frames reach the host in order and complete, each while the next ones are computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kadr.memory.host_copies import copy_to_host
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
