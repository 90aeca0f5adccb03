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
from kadr.bench import runner
from kadr.bench.runner import Contender, relative_error
from tests.benchmarks.test_cases import demo_case

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


def test_openvino_computes_the_same() -> None:
    pytest.importorskip("openvino")
    from benchmarks.peers import openvino

    case = replace(demo_case("8"), stage="dit")
    with torch.no_grad(), ExitStack() as stack:
        module, inputs = case.checkpoint.load_transformer(torch.float32), case.inputs
        rope, mask = module.compute_rope(inputs["positions"]), inputs["prompt_attention_mask"]
        expected = module(inputs["tokens"], rope, inputs["prompt_embeds"], mask, inputs["sigma"])
        contender = next(each for each in openvino.create_contenders(case, stack) if isinstance(each, Contender))
        assert relative_error(contender.run(), expected) < 1e-4


@pytest.mark.parametrize("arguments", [["--stage", "odd"], ["--num-layers", "2"], ["--size", "63x64x9"]])
def test_bad_arguments_are_an_error_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: ")
