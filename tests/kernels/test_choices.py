"""Kernels chosen by timing are recorded, and used again where the same video is made again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kadr.errors import KadrWarning
from kadr.kernels import attention, choices, fp8
from kadr.kernels.autotuner import AttentionAutotuner, is_key_for
from kadr.media.clip import read_metadata
from kadr.pipeline import calibrate
from kadr.pipeline.engine import Engine
from kadr.planning.calibration.calibration import Calibration
from kadr.planning.calibration.storage import load_calibration, load_kernels
from kadr.request.request import Request
from kadr.request.windows import Windows
from tests.kernels.test_attention import FakeTimer, inputs, raises_error
from tests.planning.test_calibration import MEASURED

CPU = torch.device("cpu")
REQUEST = Request(prompt="a red circle", size=(64, 64), frames=9, steps=1, guidance=1.0)
LONG = Request(
    prompt="a red circle", size=(64, 64), frames=41, steps=1, guidance=1.0, windows=Windows(frames=25, overlap=8)
)


@pytest.fixture
def autotuner(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> AttentionAutotuner:
    """An autotuner of fake candidates, of which "b" is the fastest, in place of the device's; nothing is stored yet."""
    monkeypatch.setenv("KADR_CACHE", str(tmp_path_factory.mktemp("cache")))
    timer = FakeTimer(a=2.0, b=1.0, c=3.0)
    fake = AttentionAutotuner([timer.candidate(name) for name in "abc"], timer)
    monkeypatch.setattr(choices, "_autotuners", lambda device: iter([fake]))
    return fake


def chosen_key(autotuner: AttentionAutotuner) -> str:
    autotuner.pick(*inputs())
    (key,) = autotuner.choices()
    return key


def test_choices_of_another_device_are_ignored() -> None:
    assert choices.restore_choices({"attention cuda bfloat16 64x64, head dim 64": "flash"}, CPU) == []


def test_chosen_kernel_is_recorded_as_plain_data(autotuner: AttentionAutotuner) -> None:
    key = chosen_key(autotuner)
    assert key == "attention cpu float32 128x128, head dim 16"
    assert json.loads(json.dumps(choices.record_choices(CPU))) == {key: "b"}


def test_restored_kernel_is_used_though_another_is_faster(autotuner: AttentionAutotuner) -> None:
    key = "attention cpu float32 128x128, head dim 16"
    assert choices.restore_choices({key: "c"}, CPU) == []
    assert autotuner.pick(*inputs()).name == "c"
    assert choices.record_choices(CPU) == {key: "c"}


def test_choice_of_this_process_is_kept_unless_overridden(autotuner: AttentionAutotuner) -> None:
    key = chosen_key(autotuner)
    choices.restore_choices({key: "a"}, CPU)
    assert autotuner.pick(*inputs()).name == "b"
    choices.restore_choices({key: "a"}, CPU, override=True)
    assert autotuner.pick(*inputs()).name == "a"
    choices.restore_choices({key: "c"}, CPU)  # of a calibration, say: what was restored first stays
    assert autotuner.pick(*inputs()).name == "a"


def test_kernel_that_this_machine_lacks_is_named(autotuner: AttentionAutotuner) -> None:
    key = chosen_key(autotuner)
    assert choices.restore_choices({key: "flash 9"}, CPU, override=True) == [f"flash 9 for {key}"]
    assert autotuner.pick(*inputs()).name == "b"


def test_restored_kernel_that_fails_gives_a_warning_and_the_fastest() -> None:
    timer = FakeTimer(a=2.0, b=1.0)
    fake = AttentionAutotuner([timer.candidate("a", raises_error), timer.candidate("b")], timer)
    fake.restore({"attention cpu float32 128x128, head dim 16": "a"})
    with pytest.warns(KadrWarning, match="a, which computed attention cpu .*, cannot do so here: RuntimeError"):
        assert fake.pick(*inputs()).name == "b"


def test_fp8_matmul_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "_selected_matmuls", {(torch.device("cuda", 0), torch.bfloat16): fp8.UNSCALED_MM})
    assert fp8.selected_matmuls(torch.device("cuda")) == {"fp8 matmul cuda bfloat16": "unscaled"}
    assert fp8.selected_matmuls(CPU) == {}


# In videos


@pytest.fixture
def tuned_attention(autotuner: AttentionAutotuner, monkeypatch: pytest.MonkeyPatch) -> AttentionAutotuner:
    """The fake autotuner, used by every attention of a model."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, *, may_round: bool
    ) -> torch.Tensor:
        return autotuner.pick(q, k, v, bias).run(q, k, v, bias)

    monkeypatch.setattr(attention, "attend", attend)
    return autotuner


def test_video_records_its_kernels_and_is_made_with_them_again(
    engine: Engine, tuned_attention: AttentionAutotuner, tmp_path: Path
) -> None:
    engine.write(REQUEST, tmp_path / "first.mp4")
    kernels = read_metadata(tmp_path / "first.mp4")["kernels"]
    assert kernels
    assert set(kernels.values()) == {"b"}
    assert engine.generate(REQUEST).metadata["kernels"] == kernels
    stored = dict.fromkeys(kernels, "c")
    engine.write(REQUEST, tmp_path / "second.mp4", kernels=stored)
    assert read_metadata(tmp_path / "second.mp4")["kernels"] == stored


def test_recorded_kernel_that_is_missing_is_a_notice_in_the_video(
    engine: Engine, tuned_attention: AttentionAutotuner, tmp_path: Path
) -> None:
    engine.write(REQUEST, tmp_path / "first.mp4")
    kernels = read_metadata(tmp_path / "first.mp4")["kernels"]
    with pytest.warns(KadrWarning, match="kernels that were used before are not on this machine: flash 9 for"):
        engine.write(REQUEST, tmp_path / "second.mp4", kernels=dict.fromkeys(kernels, "flash 9"))
    metadata = read_metadata(tmp_path / "second.mp4")
    assert metadata["kernels"] == kernels
    assert any("flash 9" in notice for notice in metadata["notices"])


@pytest.mark.usefixtures("autotuner")  # not that of the process, for which other tests may have chosen
@pytest.mark.parametrize("kernels", [None, {}, [], "b"])
def test_video_without_recorded_kernels_is_made_as_usual(engine: Engine, tmp_path: Path, kernels: Mapping) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", KadrWarning)
        engine.write(REQUEST, tmp_path / "a.mp4", kernels=kernels)
    assert "kernels" not in read_metadata(tmp_path / "a.mp4")


def test_resumed_video_uses_the_kernels_of_its_first_windows(
    engine: Engine, tuned_attention: AttentionAutotuner, tmp_path: Path
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(progress: object) -> None:
        if (getattr(progress, "window", None) or (0,))[0] == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        engine.write(LONG, tmp_path / "a.mp4", watch=interrupt)
    request_file = tmp_path / "a.windows" / "request.json"
    stored = json.loads(request_file.read_text())
    assert set(stored["kernels"].values()) == {"b"}
    assert "kernels" not in stored["video"]
    request_file.write_text(json.dumps({**stored, "kernels": dict.fromkeys(stored["kernels"], "c")}))
    engine.write(LONG, tmp_path / "a.mp4", resume=True)
    assert set(read_metadata(tmp_path / "a.mp4")["kernels"].values()) == {"c"}


def test_calibrated_kernels_are_used_by_the_next_process(
    engine: Engine, autotuner: AttentionAutotuner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KADR_CACHE", str(tmp_path))

    def measure(*_: object) -> Calibration:
        chosen_key(autotuner)
        return replace(MEASURED, kernels={})

    monkeypatch.setattr(calibrate, "measure_machine", measure)
    path = calibrate.calibrate_machine(engine.spec)
    assert json.loads(path.read_text())["kernels"] == autotuner.choices()
    calibrated = load_calibration(engine.spec.dtype, engine.spec.device)
    assert calibrated is not None
    assert is_key_for(next(iter(calibrated.kernels)), CPU)


def test_kernels_of_a_first_use_are_stored_and_used_by_the_next_process(
    autotuner: AttentionAutotuner, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = chosen_key(autotuner)
    calibrate.remember_kernels(engine.spec)
    assert load_kernels(engine.spec.dtype, CPU) == {key: "b"}
    next_process = AttentionAutotuner(
        [FakeTimer(b=2.0, c=1.0).candidate(name) for name in "bc"], FakeTimer(b=2.0, c=1.0)
    )
    monkeypatch.setattr(choices, "_autotuners", lambda device: iter([next_process]))
    calibrate.restore_calibrated_kernels(engine.spec)
    assert next_process._restored == {key: "b"}


def test_calibration_chooses_kernels_anew(
    autotuner: AttentionAutotuner, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices.restore_choices({"attention cpu float32 128x128, head dim 16": "c"}, CPU)
    key = chosen_key(autotuner)
    calibrate.remember_kernels(engine.spec)
    assert load_kernels(engine.spec.dtype, CPU) == {key: "c"}

    def measure(*_: object) -> Calibration:
        chosen_key(autotuner)
        return MEASURED

    monkeypatch.setattr(calibrate, "measure_machine", measure)
    calibrate.calibrate_machine(engine.spec)
    assert load_kernels(engine.spec.dtype, CPU)[key] == "b"


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    autotuner: AttentionAutotuner, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen_key(autotuner)
    (tmp_path / "file").touch()
    monkeypatch.setenv("KADR_CACHE", str(tmp_path / "file"))
    calibrate.remember_kernels(engine.spec)
    assert load_kernels(engine.spec.dtype, CPU) == {}
