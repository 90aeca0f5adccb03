"""kadr and its peers on the demo, at the smallest size: all compute the same, and those that cannot say so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import peers
from benchmarks.peers.traceable import EXAMPLE_TOKENS
from kadr.bench import benchmark, model_files, runner
from kadr.bench.cases import FLOAT32_VARIANT, Selection, VideoShape
from kadr.bench.kadr_contenders import kadr_contender
from kadr.bench.model_files import open_model_files
from kadr.bench.runner import Contender, relative_error
from kadr.bench.stage_case import StageCase
from tests.benchmarks.test_cases import SMALL, demo_case

SMALLEST = ["--size", "64x64x9", "--rounds", "1", "--matmul", "64", "--device", "cpu"]


# On such a CPU the variant int8 runs as int8-weights, and the result says so.
pytestmark = pytest.mark.filterwarnings("ignore:this CPU has no instructions for int8")


@pytest.fixture(scope="module", autouse=True)
def no_repeats() -> Iterator[None]:
    """Short tasks are not repeated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "MIN_TIMED_SECONDS", 0.0)
        yield


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    assert benchmarks.main([*SMALLEST, *arguments, "--results", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    result: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    return result


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    arguments = ("--stage", "text,encode,dit,decode", "--peer", "diffusers,transformers,official")
    result = run(tmp_path_factory.mktemp("results"), *arguments)
    return {"machine": result["machine"], **{case["stage"]: case for case in result["cases"]}}


def by_name(case: dict[str, Any]) -> dict[str, Any]:
    return {figure["name"]: figure for figure in case["contenders"]}


@pytest.mark.parametrize(
    "stage, names",
    [
        ("text", ["kadr auto", "transformers"]),
        ("encode", ["kadr auto", "official"]),
        ("dit", ["kadr auto", "kadr int8", "diffusers", "official"]),
        ("decode", ["kadr auto", "official"]),
    ],
)
def test_contenders_agree_on_the_same_weights(stages: dict[str, Any], stage: str, names: list[str]) -> None:
    figures = by_name(stages[stage])
    assert list(figures) == names
    for name, figure in figures.items():
        assert figure["error"] < (0.05 if name == "kadr int8" else 1e-5), name
        assert figure["median"] > 0
        assert figure["share_of_matmul"] > 0
    assert figures["kadr auto"]["ratio"] == 1


def test_contenders_that_cannot_run_are_listed(stages: dict[str, Any]) -> None:
    assert [skipped["name"] for skipped in stages["decode"]["skipped"]] == ["diffusers"]
    assert "no VAE of this shape" in stages["decode"]["skipped"][0]["reason"]


def test_a_result_describes_machine_and_reference(stages: dict[str, Any]) -> None:
    assert stages["machine"].keys() >= {"cpu", "cores", "threads", "instruction_sets", "torch", "revision", "load"}
    assert stages["dit"]["flops"] > 0
    assert stages["dit"]["reference"] == "kadr float32"


def test_a_peer_that_is_not_installed_is_listed_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'openvino'")

    monkeypatch.setattr(peers, "import_module", missing)
    result = run(tmp_path, "--stage", "dit", "--peer", "openvino", "--no-reference", "--variant", "auto")
    (case,) = result["cases"]
    assert case["skipped"] == [
        {"name": "openvino", "reason": "not installed: ModuleNotFoundError: No module named 'openvino'"}
    ]
    assert case["reference"].startswith("not compared")


def test_end_to_end_of_kadr_is_the_engine_itself(tmp_path: Path) -> None:
    result = run(tmp_path, "--stage", "end-to-end", "--schedule", "8", "--variant", "auto", "--peer", "diffusers")
    (case,) = result["cases"]
    assert by_name(case)["kadr auto"]["error"] == 0
    assert case["schedule"] == "8"
    assert [skipped["name"] for skipped in case["skipped"]] == ["diffusers"]


@pytest.mark.parametrize("stage", ["text", "dit"])
def test_openvino_computes_the_same_at_any_size(stage: str) -> None:
    pytest.importorskip("openvino")
    from benchmarks.peers import openvino

    case = replace(demo_case("8"), stage=stage)
    assert case.shape.grid.num_tokens > EXAMPLE_TOKENS
    with torch.no_grad(), ExitStack() as stack:
        engine = case.open_engine(FLOAT32_VARIANT)
        expected = kadr_contender(case, FLOAT32_VARIANT, engine, stack).run()
        contender = next(each for each in openvino.create_contenders(case, stack) if isinstance(each, Contender))
        assert relative_error(contender.run(), expected) < 1e-4


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of a released layout, all of its layers, and few channels."""
    vae = replace(model_files.VAE_0_9_5, encoder_base_channels=8, decoder_base_channels=8)
    monkeypatch.setattr(model_files, "VAE_0_9_5", vae)
    monkeypatch.setitem(model_files.TRANSFORMERS, "2b", SMALL)
    monkeypatch.setattr(model_files, "POOL_NUMEL", (1 << 12) + 1)


def test_diffusers_makes_the_same_video(narrow: None, tmp_path: Path) -> None:
    arguments = (
        "--model",
        "2b",
        "--stage",
        "end-to-end",
        "--schedule",
        "8,20-cfg",
        "--model-folder",
        str(tmp_path / "m"),
    )
    for case in run(tmp_path, *arguments, "--variant", "float32", "--peer", "diffusers")["cases"]:
        assert case["skipped"] == []
        assert by_name(case)["diffusers"]["error"] < 0.01  # of frames of 8 bits


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_openvino_vae_computes_the_same_at_any_size(stage: str, narrow: None, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from benchmarks.peers import openvino

    selection = Selection(models=("2b",), num_layers=1, stages=(stage,), device="cpu")
    with open_model_files("2b", selection, tmp_path) as files, torch.no_grad(), ExitStack() as stack:
        case = StageCase(files, VideoShape.parse("96x64x25"), stage, torch.device("cpu"))
        expected = kadr_contender(case, FLOAT32_VARIANT, case.open_engine(FLOAT32_VARIANT), stack).run()
        contender = next(each for each in openvino.create_contenders(case, stack) if isinstance(each, Contender))
        assert relative_error(contender.run(), expected) < 1e-3


@pytest.mark.parametrize("arguments", [["--stage", "odd"], ["--num-layers", "2"], ["--size", "63x64x9"]])
def test_bad_arguments_are_an_error_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_an_interrupted_run_goes_on_with_the_cases_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALLEST, "--no-peers", "--variant", "auto", "--stage", "text,dit", "--results", str(tmp_path)]
    measure, done = benchmark.measure_case, []

    def measure_one(*case: Any) -> dict[str, Any]:
        if done:
            raise KeyboardInterrupt
        done.append(case)
        return measure(*case)

    monkeypatch.setattr(benchmark, "measure_case", measure_one)
    with pytest.raises(KeyboardInterrupt):
        benchmarks.main(arguments)
    (path,) = tmp_path.iterdir()
    first = json.loads(path.read_text())["cases"]
    assert [case["stage"] for case in first] == ["text"]
    monkeypatch.undo()
    assert benchmarks.main([*arguments, "--resume"]) == 0
    cases = json.loads(path.read_text())["cases"]
    assert [case["stage"] for case in cases] == ["text", "dit"]
    assert cases[0] == first[0]
    capsys.readouterr()
    assert benchmarks.main([*arguments, "--resume", "--no-reference"]) == 1
    assert "was measured with command 'python -m benchmarks" in capsys.readouterr().err
    assert json.loads(path.read_text())["cases"] == cases


def test_a_peer_in_its_own_process_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, unknown = (peers.Peer("benchmarks.peers.official", ("dit",), own_process=True) for _ in range(2))
    monkeypatch.setattr(peers, "PEERS", {"official": own, "unknown to the process": unknown})
    result = run(tmp_path, "--stage", "dit", "--peer", "official,unknown to the process", "--variant", "auto")
    (case,) = result["cases"]
    assert by_name(case)["official"]["error"] < 1e-5
    (skipped,) = case["skipped"]
    assert skipped["name"] == "unknown to the process"
    assert skipped["reason"].startswith("failed: RuntimeError: the process ended with 1")


@pytest.mark.slow
def test_zentorch_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("zentorch")
    (case,) = run(tmp_path, "--stage", "dit", "--peer", "zentorch", "--variant", "auto")["cases"]
    assert by_name(case)["diffusers zentorch"]["error"] < 1e-5
