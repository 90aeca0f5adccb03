"""The emulated GPU refuses what a GPU refuses, and its watch reports what makes the host wait and what races."""

from __future__ import annotations

import pytest
import torch

from tests.fake_cuda.runtime import Runtime
from tests.fake_cuda.watch import DeviceWatch


@pytest.fixture
def watch(cuda: Runtime) -> DeviceWatch:
    return DeviceWatch(cuda)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, device="cuda", dtype=dtype)


@pytest.mark.usefixtures("cuda")
def test_a_mix_of_devices_is_refused() -> None:
    x, host = ones(4, 4), torch.ones(4, 4)
    for operation in (
        lambda: x + host,
        lambda: torch.nn.functional.linear(x, host),
        lambda: torch.cat([x, host]),
        lambda: x[torch.tensor([0, 2])],
        lambda: torch.nn.functional.conv3d(ones(1, 4, 3, 3, 3), torch.ones(4, 4, 1, 1, 1)),
        lambda: torch.lerp(x, host, 0.5),
        lambda: torch.nn.functional.layer_norm(x, (4,), torch.ones(4)),
        lambda: host.add_(x),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            operation()
    assert torch.equal((x + torch.tensor(1.0)).cpu(), 2 * host)  # a number may be anywhere


@pytest.mark.usefixtures("cuda")
def test_a_mismatch_of_dtypes_is_refused() -> None:
    x, half = ones(4, 4), ones(4, 4, dtype=torch.bfloat16)
    for operation in (
        lambda: torch.nn.functional.linear(x, half),
        lambda: torch.nn.functional.conv3d(ones(1, 4, 3, 3, 3), ones(4, 4, 1, 1, 1, dtype=torch.bfloat16)),
        lambda: torch.nn.functional.scaled_dot_product_attention(ones(1, 1, 4, 8), ones(1, 1, 4, 8), half[None, None]),
    ):
        with pytest.raises(RuntimeError, match=r"dtype|type"):
            operation()


@pytest.mark.usefixtures("cuda")
def test_8_bit_matmuls_have_the_rules_of_cublas() -> None:
    codes = ones(16, 32, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="greater than 16"):
        torch._int_mm(codes, codes.t())
    assert int(torch._int_mm(ones(17, 32, dtype=torch.int8), codes.t())[16, 15]) == 32
    codes, scale = ones(32, 32).to(torch.float8_e4m3fn), ones(32, 1)
    with pytest.raises(RuntimeError, match="column major"):
        torch._scaled_mm(codes, codes, scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="bf16"):
        torch._scaled_mm(codes, codes.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.float32)
    output = torch._scaled_mm(codes, codes.t(), scale_a=2 * scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    assert float(output[0, 0]) == 64


@pytest.mark.usefixtures("cuda")
def test_a_convolution_is_channels_last_as_cudnn_makes_it() -> None:
    x, weight = ones(1, 8, 4, 5, 6), ones(4, 8, 1, 1, 1)
    for is_last in (False, True):
        input_ = x.to(memory_format=torch.channels_last_3d) if is_last else x
        for kernel in (weight, ones(4, 8, 3, 3, 3).to(memory_format=torch.channels_last_3d)):
            output = torch.nn.functional.conv3d(input_, kernel)
            is_expected = is_last or kernel is not weight
            assert output.is_contiguous(memory_format=torch.channels_last_3d) == is_expected


@pytest.mark.usefixtures("cuda")
def test_views_share_memory_and_allocations_are_counted() -> None:
    before = torch.cuda.memory_allocated()
    x = torch.zeros(4, 256, device="cuda")
    x[1:3].view(-1)[5:9].fill_(1)
    x.t()[0].add_(2)
    assert x.cpu().sum() == 12
    parameter = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    parameter.data = x[0]
    assert parameter.is_cuda
    assert torch.cuda.memory_allocated() - before == x.nbytes
    del x, parameter
    assert torch.cuda.memory_allocated() == before


def test_waits_of_the_host_are_reported(watch: DeviceWatch) -> None:
    x, pinned = ones(8), torch.empty(8, pin_memory=True)
    with watch:
        _ = x * 2 + x.mean()
        x.copy_(pinned, non_blocking=True)
        pinned.copy_(x, non_blocking=True)
        assert not watch.waits
        x.sum().item()
        bool(x[0])
        x.nonzero()
        x[x > 0]
        x.cpu()
        torch.ones(8).to("cuda")
        torch.ones(8).to("cuda", non_blocking=True)  # from memory that is not pinned
        torch.empty(8).copy_(x, non_blocking=True)
        torch.cuda.synchronize()
    assert [wait.kind for wait in watch.waits] == [*["reads a value"] * 4, *["blocking copy"] * 4, "drains a stream"]


def test_a_wait_for_earlier_work_drains_nothing(watch: DeviceWatch) -> None:
    x, event = ones(8), torch.cuda.Event()
    with watch:
        x.mul_(2)
        event.record()
        x.mul_(2)
        event.synchronize()
        assert not watch.waits
        event.record()
        event.synchronize()
    assert [wait.kind for wait in watch.waits] == ["drains a stream"]


def test_accesses_that_no_event_orders_are_races(watch: DeviceWatch) -> None:
    side, filled = torch.cuda.Stream(), torch.cuda.Event()
    source = torch.ones(8).pin_memory()
    with watch:
        x = torch.empty(8, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.copy_(source, non_blocking=True)
            filled.record()
        filled.wait()
        x.sum()
        assert not watch.races
        with torch.cuda.stream(side):
            x.zero_()  # while it is read
        assert "zero_" in watch.races.pop()
        x.sum()  # while it is written
        assert "does not wait for zero_" in watch.races.pop()
        source.fill_(2)  # no wait for its copy
        assert "does not wait for copy_" in watch.races.pop()
        with torch.cuda.stream(side):
            torch.empty(8, device="cuda")
        fresh = torch.empty(8, device="cuda")
        with torch.cuda.stream(side):
            fresh.zero_()  # work on the other stream may still use that memory
        assert "does not wait for empty" in watch.races.pop()
    assert not watch.races


def test_memory_that_is_freed_while_another_stream_uses_it_is_a_race(watch: DeviceWatch) -> None:
    side = torch.cuda.Stream()
    with watch:
        for is_recorded in (True, False):
            x = torch.empty(8, device="cuda")
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x.zero_()
            if is_recorded:
                x.record_stream(side)
            del x
            torch.empty(8, device="cuda")
            assert len(watch.races) == (not is_recorded)
    assert "does not wait for zero_" in watch.races[0]


def test_a_graph_repeats_its_work_and_a_capture_cannot_wait(cuda: Runtime, watch: DeviceWatch) -> None:
    x, graph = ones(4), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        output = (x * 2)[1:].add_(1)
    x.fill_(5)
    graph.replay()
    assert output.tolist() == [11.0] * 3
    with watch, pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(graph):
        x.sum().item()
    assert not cuda.is_capturing
