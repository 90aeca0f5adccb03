"""Each check of a machine: one that it finds, with the fix; and a machine that is well."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kadr.diagnosis.finding import ERROR, NOTE, QUALITY, SPEED
from kadr.diagnosis.folders import CacheFolder, read_folders
from kadr.diagnosis.machine import EXTRAS, VARIABLES, Machine, read_machine
from kadr.diagnosis.machine_checks import DEBUG_VARIABLES, check_machine

GIB = 1 << 30
GPU = {"device": "cuda", "gpu": "H200", "gpu_driver": "570.1"}
WELL = Machine(
    versions={"torch": "2.8"},
    system="Linux",
    cpu="a CPU",
    cores=8,
    usable_cores=16,
    threads=8,
    instruction_sets=("avx512_vnni",),
    has_bfloat16=True,
    has_fast_int8=True,
    device="cpu",
    dtype="bfloat16",
    is_calibrated=True,
    memory_bytes=32 * GIB,
    free_bytes=20 * GIB,
    load=0.5,
    folders=(CacheFolder("kadr cache", "/cache", 0, 100 * GIB),),
)


def test_a_machine_that_is_well_has_no_findings() -> None:
    assert list(check_machine(WELL)) == []
    assert list(check_machine(replace(WELL, **GPU, cuda="12.8", threads=1))) == []


@pytest.mark.parametrize(
    "changes, kind, topic, fix",
    [
        ({"kernels": "reference"}, SPEED, "kernels", "unset KADR_KERNELS"),
        ({"kernels": "fast"}, ERROR, "kernels", "unset KADR_KERNELS"),
        ({"environment": {"CUDA_LAUNCH_BLOCKING": "1"}}, SPEED, "environment", "unset CUDA_LAUNCH_BLOCKING"),
        ({"threads": 1}, SPEED, "threads", "export OMP_NUM_THREADS=8"),
        ({"threads": 1, "environment": {"OMP_NUM_THREADS": "1"}}, SPEED, "threads", "unset OMP_NUM_THREADS"),
        ({"threads": 8, "usable_cores": 2}, SPEED, "threads", "export OMP_NUM_THREADS=2"),
        ({"load": 30.0}, SPEED, "load", ""),
        ({"gpu_driver": "570.1"}, SPEED, "GPU", "pip install --force-reinstall torch"),
        (
            {"gpu_driver": "470.2", "cuda": "12.8"},
            SPEED,
            "GPU",
            "python -c 'import torch; torch.cuda.init()'",
        ),
        (
            {"cudnn_fault": "cuDNN 9.10.2 computes some wrong: pip install 'nvidia-cudnn-cu12>=9.15.1'."},
            QUALITY,
            "cuDNN",
            "pip install 'nvidia-cudnn-cu12>=9.15.1'",
        ),
        ({"has_bfloat16": False}, SPEED, "dtype", "--quant int8"),
        ({"has_fast_int8": False}, NOTE, "int8", ""),
        ({"memory_limit_bytes": 8 * GIB}, SPEED, "memory", "docker run --memory 28g"),
        ({"swap_bytes": 4 * GIB}, SPEED, "memory", "--offload blocks"),
        (
            {"folders": (CacheFolder("hub cache", "/hub", 0, GIB),)},
            NOTE,
            "disk",
            "export HF_HOME=/a/larger/disk",
        ),
        ({"absent_models_dirs": ("/my models",)}, NOTE, "model folders", "mkdir -p '/my models'"),
        ({"is_calibrated": False}, NOTE, "calibration", 'kadr plan "a prompt" --calibrate'),
    ],
)
def test_a_check_finds_what_is_wrong(changes: dict[str, Any], kind: str, topic: str, fix: str) -> None:
    (found,) = check_machine(replace(WELL, **changes))
    assert (found.kind, found.topic, found.fix) == (kind, topic, fix)


@pytest.mark.parametrize("value", ["", "0"])
def test_a_debug_variable_that_is_off_is_no_finding(value: str) -> None:
    assert list(check_machine(replace(WELL, environment=dict.fromkeys(DEBUG_VARIABLES, value)))) == []


def test_this_machine_is_read_as_plain_data_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KADR_ENHANCE_KEY", "sk-secret")
    monkeypatch.setenv("HF_TOKEN", "hf-secret")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")
    machine = read_machine(torch.device("cpu"))
    text = json.dumps(machine.to_json())
    assert "secret" not in text
    assert json.loads(text)["environment"]["CUDA_LAUNCH_BLOCKING"] == "0"
    assert not [name for name in VARIABLES if "KEY" in name or "TOKEN" in name]
    assert set(machine.extras) == set(EXTRAS)
    assert machine.versions["av"]
    assert machine.free_bytes > 0


def test_sizes_of_caches_count_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KADR_CACHE", str(tmp_path))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "one").write_bytes(bytes(1000))
    (tmp_path / "two").write_bytes(bytes(24))
    folder = read_folders()[0]
    assert (folder.path, folder.size_bytes) == (str(tmp_path), 1024)
    assert folder.free_bytes > 0
    monkeypatch.setenv("KADR_CACHE", str(tmp_path / "not" / "there"))
    assert read_folders()[0].size_bytes == 0
