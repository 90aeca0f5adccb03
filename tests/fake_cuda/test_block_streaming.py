"""Streamed blocks stay on the host in every weight format, and their copies wait for the work that they must."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kadr.memory.block_swap import BlockSwapper
from kadr.memory.mapped_files import module_tensors
from tests.fake_cuda.modes import build_request, open_engine
from tests.fake_cuda.runtime import DEVICE, Runtime
from tests.fake_cuda.watch import DeviceWatch

FORMATS = [None, "int8", "int8-weights", "fp8", "fp8-weights", "Q8_0", "Q4_0"]
WIDTH = 32


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("quant", FORMATS)
def test_streamed_weights_stay_on_the_host(quant: str | None) -> None:
    engine = open_engine("cuda", {"quant": quant, "offload": "blocks", "dtype": "bfloat16"})
    with engine.start(build_request({}, {}), stages=("denoise",)) as generation:
        before = torch.cuda.memory_allocated()
        with generation.modules.transformer() as transformer:
            placement = generation.plan.stage("denoise").placement
            assert placement.streamed_blocks == len(transformer.blocks)
            assert {tensor.device.type for tensor in module_tensors(transformer.blocks)} == {"cpu"}
            assert torch.cuda.memory_allocated() - before <= 1.02 * placement.private_bytes + 100_000
            assert sum(tensor.nbytes for tensor in module_tensors(transformer.blocks)) <= placement.host_bytes


def test_the_first_copy_waits_for_work_that_may_use_its_memory(cuda: Runtime) -> None:
    blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4)).requires_grad_(False)
    with DeviceWatch(cuda) as watch:
        x = torch.ones(2, WIDTH, device="cuda")
        BlockSwapper(list(blocks), DEVICE)
        for _ in range(3):
            for block in blocks:
                x = block(x)
    assert not watch.races


def test_slots_are_not_reused_while_the_next_copy_is_under_way(cuda: Runtime) -> None:
    blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4)).requires_grad_(False)
    with DeviceWatch(cuda) as watch:
        x = torch.ones(2, WIDTH, device="cuda")
        BlockSwapper(list(blocks), DEVICE)
        for block in blocks:
            x = block(x)  # the last one starts the copy of the first
        del blocks, block
        x.sum()
    assert not watch.races
