"""`kadr selftest` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kadr.cli.main import main
from tests.selftest import faulty_models as faults


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["selftest", *args])
    return int(end.value.code or 0), *capsys.readouterr()


def test_report_goes_to_stdout_and_progress_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "demo", "--device", "cpu")
    assert code == 0
    assert out.startswith("kadr selftest of demo: pass\nmachine: kadr ")
    assert "\npass: VAE (" in out
    assert err.splitlines()[0] == "selftest: files: pass"


def test_failure_exits_with_1_and_names_the_stage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = faults.rewrite(tmp_path / "nan.safetensors", faults.put_nan)
    options = ("--device", "cpu", "--release", "demo", "--text-encoder", str(faults.DEMO.parent))
    code, out, err = run(capsys, str(path), *options, "--json")
    report = json.loads(out)
    assert code == 1
    assert "stages failed: weights, " in err.splitlines()[-1]
    assert report["verdict"] == "fail"
    assert report["report"].startswith("kadr selftest of nan.safetensors: fail")
    assert str(tmp_path) not in out
    stage = next(stage for stage in report["stages"] if stage["name"] == "weights")
    assert [check["figure"] for check in stage["checks"] if not check["passed"]] == [1]


def test_bad_choice_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "demo", "--quant", "int7")[0] == 2
