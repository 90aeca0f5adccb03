"""Calibrations: laws of the curves, storage on disk, what a plan reads of them, and what measuring gives."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kadr.errors import CheckpointError
from kadr.memory.mapped_files import cached_fraction
from kadr.models.transformer import TRANSFORMER_2B, TransformerConfig
from kadr.models.vae.config import VAE_0_9_5
from kadr.pipeline.engine import Engine
from kadr.planning.calibration import layers, measure, probe, rates, storage
from kadr.planning.calibration.calibration import (
    CONVERT,
    INT8,
    PLAIN,
    PLAIN_CONV,
    WINOGRAD_4,
    Calibration,
    Curve,
    dequantize_rate,
)
from kadr.planning.calibration.clock import Clock
from kadr.planning.timing.transformer import EvaluationTimer
from kadr.planning.timing.vae import vae_decode_seconds, vae_encode_seconds
from kadr.request.request import Request
from kadr.schema import CALIBRATION_NUMBER
from kadr.shapes import LatentGrid
from tests import tiny_models

CPU, FLOAT32 = torch.device("cpu"), torch.float32
REQUEST = Request(prompt="a red circle", size=(64, 64), frames=9, steps=2, guidance=1.0)
MEASURED = Calibration(
    blocks={PLAIN: {192: Curve(((16.0, 2e-10), (256.0, 5e-11))), 2048: Curve(((16.0, 4e-11), (512.0, 1e-11)))}},
    attention={64: Curve(((256.0, 4e-11), (4096.0, 2e-11)))},
    convolutions={
        PLAIN_CONV: {128: Curve(((256.0, 3e-11),))},
        WINOGRAD_4: {128: Curve(((256.0, 2e-11),)), 1024: Curve(((64.0, 1e-11),))},
    },
    rates={CONVERT: 1e-9, "start-up": 3.0},
    kernels={"attention of 64": "flash"},
)


def timer(tokens: int, **fields: Any) -> EvaluationTimer:
    options = {"calibration": MEASURED, "config": TRANSFORMER_2B, "kernel": PLAIN, "text_tokens": 20, **fields}
    return EvaluationTimer(tokens=tokens, **options)


# Curves


def test_curve_gives_back_what_was_measured() -> None:
    points = [(16, 3e-10), (256, 5e-11), (2048, 4e-11)]
    curve = Curve.from_points(points)
    assert [curve.at(size) for size, _ in points] == pytest.approx([seconds for _, seconds in points])


def test_larger_size_never_takes_less_time_on_a_curve() -> None:
    noisy = Curve.from_points([(16, 3e-10), (64, 1e-11), (2048, 4e-11), (4096, 1e-12)])
    seconds = [size * noisy.at(size) for size in range(1, 9000, 7)]
    assert all(after >= before * (1 - 1e-9) for before, after in pairwise(seconds))


def test_width_between_two_measured_ones_is_interpolated() -> None:
    slow, fast = (MEASURED.block_seconds(1e12, kernel=PLAIN, width=width, rows=128) for width in (192, 2048))
    assert fast < MEASURED.block_seconds(1e12, kernel=PLAIN, width=768, rows=128) < slow
    assert MEASURED.block_seconds(1e12, kernel=PLAIN, width=8192, rows=128) == fast


def test_kernel_that_was_not_measured_counts_as_plain() -> None:
    assert MEASURED.block_seconds(1e12, kernel=INT8, width=2048, rows=64) == MEASURED.block_seconds(
        1e12, kernel=PLAIN, width=2048, rows=64
    )


# Times of stages


def test_more_tokens_samples_or_prompts_never_take_less_time() -> None:
    seconds = [timer(tokens).evaluation_seconds() for tokens in (1, 15, 16, 100, 511, 512, 513, 3000, 9000)]
    assert all(after > before for before, after in pairwise(seconds))
    assert timer(512).evaluation_seconds(batch=2) > timer(512).evaluation_seconds()
    assert timer(512, text_tokens=200).evaluation_seconds() > timer(512).evaluation_seconds()
    assert timer(512, lora_parameters=10**7).evaluation_seconds() > timer(512).evaluation_seconds()


def test_weights_that_are_dequantized_add_to_every_call() -> None:
    assert timer(512, weights_per_use=1.5).evaluation_seconds() == timer(512).evaluation_seconds() + 1.5
    assert 0 < timer(512).perturbed_seconds((14,), "attention_values") < timer(512).evaluation_seconds()


def test_one_block_at_a_measured_size_takes_the_measured_time() -> None:
    config = TransformerConfig(num_layers=1, num_heads=32, head_dim=64, caption_channels=128)
    flops = 28 * 512 * 2048**2 + 4 * 512 * 20 * 2048
    attention_flops = 4 * 512**2 * 2048
    expected = flops * 1e-11 + MEASURED.attention_seconds(attention_flops, head_dim=64, tokens=512)
    assert timer(512, config=config).evaluation_seconds() == pytest.approx(expected, rel=0.05)  # and around the block


def test_larger_video_never_takes_less_time_to_decode_or_encode() -> None:
    grids = [
        LatentGrid(1, 8, 8),
        LatentGrid(2, 8, 8),
        LatentGrid(2, 8, 16),
        LatentGrid(7, 16, 24),
        LatentGrid(16, 32, 48),
    ]
    for seconds in (vae_decode_seconds, vae_encode_seconds):
        times = [seconds(MEASURED, VAE_0_9_5, grid, WINOGRAD_4) for grid in grids]
        assert all(after > before for before, after in pairwise(times))


# Storage


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KADR_CACHE", str(tmp_path))
    return tmp_path


def test_stored_calibration_is_read_back(cache: Path) -> None:
    assert storage.load_calibration(FLOAT32, CPU) is None
    path = storage.store_calibration(MEASURED, FLOAT32, CPU)
    assert path.parent == cache / "calibration"
    assert storage.load_calibration(FLOAT32, CPU) == MEASURED
    assert storage.load_calibration(torch.bfloat16, CPU) is None
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_calibration_is_for_as_many_threads_as_were_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.store_calibration(MEASURED, FLOAT32, CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert storage.load_calibration(FLOAT32, CPU) is None


@pytest.mark.parametrize(
    "change",
    [
        {"schema": CALIBRATION_NUMBER + 1},
        {"schema": None},
        {"machine": {"cpu": "another"}},
        {"blocks": {"plain": {}}},
        {"blocks": {}},
        {"convolutions": {"winograd 4": {"64": [[16, 1e-9]]}}},
        {"blocks": {"plain": {"2048": [[16, -1]]}}},
        {"attention": [1]},
        {"rates": {"convert": "fast"}},
    ],
)
def test_calibration_of_another_machine_or_layout_is_none(cache: Path, change: dict[str, Any]) -> None:
    path = storage.store_calibration(MEASURED, FLOAT32, CPU)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert storage.load_calibration(FLOAT32, CPU) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": 1}'])
def test_broken_file_means_uncalibrated(cache: Path, content: bytes) -> None:
    storage.store_calibration(MEASURED, FLOAT32, CPU).write_bytes(content)
    assert storage.load_calibration(FLOAT32, CPU) is None
    assert not storage.current_calibration(FLOAT32, CPU).is_measured


def test_folder_that_cannot_be_created_is_an_error_with_a_way_out(cache: Path) -> None:
    (cache / "calibration").write_text("a file")
    with pytest.raises(CheckpointError, match="Set KADR_CACHE to a writable folder"):
        storage.store_calibration(MEASURED, FLOAT32, CPU)


# Plans


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(home: Path, cache: Path) -> Engine:
    return Engine.open(home / tiny_models.MODEL_FILE, prompt_cache=False, device="cpu", dtype="float32")


def test_calibrated_plan_measures_nothing_and_opens_no_socket(
    engine: Engine, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.store_calibration(MEASURED, FLOAT32, CPU)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the plan measured something or opened a socket")

    for owner, name in ((storage, "measure_matmul_rate"), (Clock, "once"), (socket, "socket")):
        monkeypatch.setattr(owner, name, refuse)
    plan = engine.plan(REQUEST)
    assert plan.is_calibrated
    assert plan.to_json()["calibrated"] is True


def test_plan_follows_the_measured_times(engine: Engine, cache: Path) -> None:
    storage.store_calibration(MEASURED, FLOAT32, CPU)
    before = engine.plan(REQUEST).stage("denoise").placement.seconds
    slow = {width: Curve(tuple((size, 10 * t) for size, t in c.points)) for width, c in MEASURED.blocks[PLAIN].items()}
    storage.store_calibration(replace(MEASURED, blocks={PLAIN: slow}), FLOAT32, CPU)
    after = engine.plan(REQUEST).stage("denoise").placement.seconds
    assert 5 * before < after < 11 * before


def test_calibration_does_not_change_which_placements_are_chosen(engine: Engine, cache: Path) -> None:
    def choices() -> list[tuple[str, str, int, int]]:
        stages = engine.plan(REQUEST).stages
        return [(s.stage, s.placement.weight_format, s.placement.device_bytes, len(s.fallbacks)) for s in stages]

    before = choices()
    storage.store_calibration(MEASURED, FLOAT32, CPU)
    assert choices() == before


def test_second_plan_of_an_engine_does_not_count_loading(engine: Engine) -> None:
    first = engine.plan(REQUEST)
    assert all(stage["load_seconds"] >= 0 for stage in first.to_json()["stages"])
    assert first.stage_load_seconds(first.stage("denoise")) > 0
    engine.generate(REQUEST)
    second = engine.plan(REQUEST)
    assert second.stage_load_seconds(second.stage("denoise")) == 0


def test_prepare_calibrates_only_where_it_is_told_to(
    engine: Engine, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kadr.pipeline.calibrate.measure_machine", lambda dtype, device, report: MEASURED)
    engine.prepare(REQUEST)
    assert not engine.plan(REQUEST).is_calibrated
    engine.prepare(REQUEST, calibrate=True)
    assert engine.plan(REQUEST).is_calibrated


# Measuring


@pytest.fixture
def small_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrinks everything that is measured, so that it takes a second."""
    monkeypatch.setattr(layers, "BLOCK_ROWS", ((layers.SMALL, (16, 64), (16, 64)),))
    monkeypatch.setattr(layers, "ATTENTION_HEADS", {32: 2})
    monkeypatch.setattr(layers, "ATTENTION_TOKENS", (64, 128))
    monkeypatch.setattr(layers, "CONV_SIDES", {32: (8,), 64: (8,)})
    monkeypatch.setattr(layers, "FEW_CHANNELS", (32, 64))
    monkeypatch.setattr(rates, "FILE_BYTES", 1_600_000)
    monkeypatch.setattr(rates, "SIDE", 256)
    monkeypatch.setattr(rates, "QUANTIZED_SIDE", 256)
    monkeypatch.setattr(rates, "VIDEO_FRAMES", 4)
    monkeypatch.setattr("kadr.planning.calibration.clock.SECONDS_PER_TASK", 0.0)
    monkeypatch.setattr(measure, "measure_startup", lambda device: {"start-up": 2.0})


@pytest.mark.usefixtures("small_measurements")
def test_measured_machine_has_every_curve_and_rate(cache: Path) -> None:
    steps: list[str] = []
    calibration = measure.measure_machine(FLOAT32, CPU, steps.append)
    assert calibration.is_measured
    assert steps[0] == "self-attention"
    assert "writing an mp4" in steps
    assert set(calibration.blocks) == set(layers.LayerMeter(FLOAT32, CPU).block_kernels())
    assert set(calibration.convolutions) == set(layers.LayerMeter(FLOAT32, CPU).conv_kernels())
    names = ("bfloat16", "float8_e4m3fn", "int8", "Q8_0", "Q4_K", "Q6_K")
    assert set(map(dequantize_rate, names)) <= set(calibration.rates)
    assert calibration.startup_seconds == 2.0
    assert Calibration.from_json(json.loads(json.dumps(calibration.to_json()))) == calibration


def test_start_up_that_cannot_be_measured_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "STARTUP_ARGUMENTS", ("generate", "--no-such-flag"))
    assert rates.measure_startup(CPU) == {}


def test_quick_probe_is_far_shorter_than_a_calibration() -> None:
    assert probe.measure_matmul_rate(FLOAT32, CPU) > 0


def test_cached_fraction_is_one_for_a_file_just_written_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(3_000_000))
    assert cached_fraction(path) > 0.9
    assert cached_fraction(tmp_path / "absent") == 1.0


@pytest.fixture
def run_plan(home: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    from kadr.cli.main import main

    def run_plan(*flags: str) -> tuple[str, str]:
        arguments = ["plan", "a red circle", "--model", str(home / tiny_models.MODEL_FILE), "--size", "64x64"]
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--frames", "9", "--no-prompt-cache", *flags])
        assert not ended.value.code
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run_plan


def test_plan_command_gives_a_range_until_it_has_calibrated(
    run_plan: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "uncalibrated: run `kadr plan --calibrate`" in run_plan()[0]
    before = json.loads(run_plan("--json")[0])
    assert before["calibrated"] is False
    assert before["seconds_range"][0] < before["seconds"] < before["seconds_range"][1]

    def measure_fast(dtype: torch.dtype, device: torch.device, report: measure.Report) -> Calibration:
        report("convolutions")
        return MEASURED

    monkeypatch.setattr("kadr.pipeline.calibrate.measure_machine", measure_fast)
    out, err = run_plan("--calibrate", "--json")
    assert "calibration: convolutions\ncalibration: stored in " in err
    assert json.loads(out)["calibrated"] is True
    text = run_plan()[0]
    assert "uncalibrated" not in text
    assert "; about 3 s" in text  # its start-up counts


def test_modules_are_built_in_their_dtype_without_changing_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_default_dtype", None)  # it is the whole process's
    module = layers.LayerMeter(torch.bfloat16, torch.device("cpu"))._transformer(layers.SMALL, layers.PLAIN)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.bfloat16}
    assert all(0 < weight.abs().max() < 0.03 for weight in module.parameters())
