"""Devices and dtypes are picked or refused by name; memory of devices is in bytes."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kadr.errors import RequestError
from kadr.kernels import fp8
from kadr.memory import device
from kadr.memory.device import (
    FP32_MAX_PARAMETERS,
    explain_cudnn,
    free_bytes,
    pick_device,
    pick_dtype,
    total_bytes,
    used_bytes,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def set_devices(patch: pytest.MonkeyPatch, *, cuda: bool = False, mps: bool = False) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: cuda)
    patch.setattr(torch.backends.mps, "is_available", lambda: mps)
    patch.setattr(torch.cuda, "device_count", lambda: 2 if cuda else 0)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda:0"), (True, False, "cuda:0"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_picks_the_fastest_available_device(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_devices(monkeypatch, cuda=cuda, mps=mps)
    assert pick_device("auto") == torch.device(expected)
    assert pick_device("cpu") == CPU


def test_device_may_have_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    set_devices(monkeypatch, cuda=True)
    assert pick_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_without_a_number_is_the_current_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors name theirs with a number: what is remembered by device would not be found without it."""
    set_devices(monkeypatch, cuda=True)
    assert pick_device(name) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert pick_device(name) == torch.device("cuda", 1)


def test_the_fp8_matmul_selected_for_a_model_is_that_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trial inside of the compiler would be traced into the graph."""
    set_devices(monkeypatch, cuda=True)
    trials = []
    monkeypatch.setattr(fp8, "_first_correct_matmul", lambda *key: trials.append(key) or fp8.FP32_MATMUL)
    fp8.reset()
    fp8.select_matmul(pick_device("auto"), torch.bfloat16)
    with FakeTensorMode():
        fp8.select_matmul(torch.empty(2, device="cuda").device, torch.bfloat16)
    fp8.reset()
    assert len(trials) == 1


@pytest.mark.parametrize("name", ["gpu", "CUDA", "", "xla", "tpu:0", "nvidia"])
def test_unknown_device_is_refused_with_known_names(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        pick_device(name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in ("auto", "cpu", "cuda", "mps"))


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_unavailable_device_is_refused_with_a_way_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_devices(monkeypatch)
    with pytest.raises(RequestError, match=f"'{name}'.*none here.*cpu"):
        pick_device(name)


@pytest.mark.parametrize("name", ["cuda:", "cuda:x", "cpu:x", "cuda:-1"])
def test_malformed_device_index_is_refused_by_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_devices(monkeypatch, cuda=True)
    with pytest.raises(RequestError, match=name):
        pick_device(name)


def test_too_high_device_index_is_refused_with_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    set_devices(monkeypatch, cuda=True)
    with pytest.raises(RequestError, match="'cuda:2', but there are 2 here"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["fp16", "float16", "bf16", "", "int8", "Float32"])
def test_unknown_dtype_is_refused_with_known_names(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        pick_dtype(name, CPU, 1)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in ("auto", "bfloat16", "float32"))


def test_named_dtype_is_used_on_every_device() -> None:
    for torch_device in (CPU, CUDA):
        for parameters in (1, 10**11):
            assert pick_dtype("bfloat16", torch_device, parameters) is torch.bfloat16
            assert pick_dtype("float32", torch_device, parameters) is torch.float32


@pytest.mark.parametrize(
    ("torch_device", "parameters", "has_units", "expected"),
    [
        (CPU, FP32_MAX_PARAMETERS - 1, True, torch.float32),
        (CPU, FP32_MAX_PARAMETERS, True, torch.bfloat16),
        (CPU, FP32_MAX_PARAMETERS, False, torch.float32),
        (CUDA, FP32_MAX_PARAMETERS - 1, False, torch.float32),
        (CUDA, FP32_MAX_PARAMETERS, False, torch.bfloat16),
    ],
)
def test_auto_dtype_is_bfloat16_for_large_models_if_fast(
    torch_device: torch.device, parameters: int, has_units: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_cpu_has_bfloat16", lambda: has_units)
    assert pick_dtype("auto", torch_device, parameters) is expected


@pytest.mark.parametrize("limit", [4_000_000_000, sys.maxsize])
def test_total_memory_of_a_container_is_its_limit(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(device.cgroup, "memory_limit_bytes", lambda: limit)
    assert total_bytes(CPU) == min(limit, psutil.virtual_memory().total)


def test_used_memory_is_that_of_the_process_and_its_children() -> None:
    before = used_bytes(CPU)
    code = "import sys; data = bytearray(b'x') * 200_000_000; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        during = used_bytes(CPU)
        child.communicate()
    assert 190_000_000 < during - before < 300_000_000


def test_used_memory_of_a_gpu_is_what_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 80))
    assert used_bytes(CUDA) == 70


def test_memory_that_torch_keeps_for_reuse_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second request finds the first one's memory in torch's cache, which CUDA counts as taken."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_bytes(CUDA) == 40


@pytest.mark.parametrize(
    ("version", "is_good"),
    [(90100, True), (90701, True), (90800, False), (91002, False), (91500, False), (91501, True), (92000, True)],
)
def test_cudnn_with_wrong_3d_convolutions_is_named_with_its_remedy(
    version: int, is_good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    message = explain_cudnn(CUDA)
    assert (message == "") is is_good
    if version == 91002:
        assert "cuDNN 9.10.2 " in message
        assert "pip install 'nvidia-cudnn-cu13>=9.15.1'" in message
    assert explain_cudnn(CPU) == ""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert explain_cudnn(CUDA) == ""


def test_free_memory_is_in_bytes() -> None:
    assert 10**6 < free_bytes(CPU) < 10**15
