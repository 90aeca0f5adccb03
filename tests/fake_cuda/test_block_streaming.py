"""Streamed blocks stay on the host in every weight format, and their copies wait for the work that they must."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kadr.errors import KadrWarning
from kadr.memory import block_swap
from kadr.memory.block_swap import BlockSwapper, PinnedPool
from kadr.memory.mapped_files import module_tensors
from kadr.planning import planner
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


@pytest.mark.usefixtures("cuda")
def test_blocks_are_pinned_where_as_much_host_memory_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine("cuda", {"offload": "blocks"})
    request = build_request({}, {})
    denoise = engine.plan(request).stage("denoise")
    assert denoise.placement.pins_blocks
    assert denoise.placement.spare_host_bytes == denoise.placement.host_bytes > 0
    monkeypatch.setattr(planner, "RESERVED_FRACTION", 0.0)
    for host_bytes, is_pinned in (
        (2 * denoise.placement.host_bytes, True),
        (2 * denoise.placement.host_bytes - 1, False),
    ):
        free = {"cuda": 1 << 34, "cpu": host_bytes}
        monkeypatch.setattr(planner, "free_bytes", lambda device, free=free: free[device.type])
        plan = engine.plan(request)
        assert plan.stage("denoise").placement.pins_blocks is is_pinned
        assert any("too little free memory to pin" in reason for reason in plan.reasons()) is not is_pinned
        assert not any("do not fit into" in reason for reason in plan.reasons())


@pytest.mark.parametrize("pin_memory", [False, True])
def test_pinned_blocks_are_copied_without_the_host(pin_memory: bool, cuda: Runtime) -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5)).requires_grad_(False)
    before = [tensor.clone() for tensor in module_tensors(blocks)]
    x = torch.randn(2, WIDTH)
    expected = nn.Sequential(*blocks)(x)
    BlockSwapper(list(blocks), DEVICE, pin_memory=pin_memory)
    tensors = module_tensors(blocks)
    assert all(tensor.is_pinned() is pin_memory for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == (1 if pin_memory else 10)
    with DeviceWatch(cuda) as watch:
        y = x.pin_memory().to("cuda", non_blocking=True)
        for _ in range(3):
            output = nn.Sequential(*blocks)(y)
    torch.testing.assert_close(output.cpu(), expected)
    assert not watch.races
    assert [wait.kind for wait in watch.waits if "block_swap" in wait.line] == []
    assert all(torch.equal(tensor, old) for tensor, old in zip(module_tensors(blocks), before, strict=True))


def test_blocks_that_the_system_refuses_to_pin_are_staged(cuda: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_swap, "PINNED_PIECE_BYTES", WIDTH * WIDTH * 4 + 256)
    blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5)).requires_grad_(False)
    x = torch.randn(2, WIDTH)
    expected, add = nn.Sequential(*blocks)(x), PinnedPool.add

    def refuse(self: PinnedPool, tensor: torch.Tensor) -> torch.Tensor:
        if sum(other.is_pinned() for other in module_tensors(blocks)) >= 4:
            raise torch.OutOfMemoryError("CUDA error: out of memory")
        return add(self, tensor)

    monkeypatch.setattr(PinnedPool, "add", refuse)
    with pytest.warns(KadrWarning, match="only 2 of 5"):
        BlockSwapper(list(blocks), DEVICE, pin_memory=True)
    assert sum(tensor.is_pinned() for tensor in module_tensors(blocks)) == 4
    with DeviceWatch(cuda) as watch:
        y = x.to("cuda")
        for _ in range(2):
            output = nn.Sequential(*blocks)(y)
    torch.testing.assert_close(output.cpu(), expected)
    assert not watch.races


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
