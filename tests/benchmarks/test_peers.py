"""kadr and its peers on the demo, at the least size: everyone computes the same, and who cannot says so."""

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
from tests.benchmarks.test_cases import demo_work

LEAST = ["--size", "64x64x9", "--rounds", "1", "--matmul", "64", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def once() -> Iterator[None]:
    """Nothing is repeated only because it is short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "MIN_TIMED_SECONDS", 0.0)
        yield


def run(folder: Path, *words: str) -> dict[str, Any]:
    assert benchmarks.main([*LEAST, *words, "--results", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    made: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    return made


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    words = ("--stage", "text,encode,dit,decode", "--peer", "diffusers,transformers,official")
    made = run(tmp_path_factory.mktemp("results"), *words)
    return {"machine": made["machine"], **{case["stage"]: case for case in made["cases"]}}


def by_name(case: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each for each in case["contenders"]}


@pytest.mark.parametrize(
    "stage, names",
    [
        ("text", ["kadr auto", "transformers"]),
        ("encode", ["kadr auto", "official"]),
        ("dit", ["kadr auto", "kadr int8", "diffusers", "official"]),
        ("decode", ["kadr auto", "official"]),
    ],
)
def test_everyone_runs_on_the_same_weights_and_gets_the_same(
    stages: dict[str, Any], stage: str, names: list[str]
) -> None:
    found = by_name(stages[stage])
    assert list(found) == names
    for name, figure in found.items():
        assert figure["error"] < (0.05 if name == "kadr int8" else 1e-5), name
        assert figure["median"] > 0
        assert figure["share_of_matmul"] > 0
    assert found["kadr auto"]["ratio"] == 1


def test_who_cannot_run_is_listed(stages: dict[str, Any]) -> None:
    assert [each["name"] for each in stages["decode"]["absent"]] == ["diffusers"]
    assert "no VAE of this shape" in stages["decode"]["absent"][0]["reason"]


def test_a_result_says_what_it_was_measured_on(stages: dict[str, Any]) -> None:
    assert stages["machine"].keys() >= {"cpu", "cores", "threads", "instructions", "torch", "revision", "load"}
    assert stages["dit"]["flops"] > 0
    assert stages["dit"]["compared"] == "kadr float32"


def test_a_peer_that_is_not_installed_is_told_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'openvino'")

    monkeypatch.setattr(peers, "import_module", missing)
    made = run(tmp_path, "--stage", "dit", "--peer", "openvino", "--no-reference", "--variant", "auto")
    (case,) = made["cases"]
    assert case["absent"] == [
        {"name": "openvino", "reason": "not installed: ModuleNotFoundError: No module named 'openvino'"}
    ]
    assert case["compared"].startswith("not compared")


def test_the_whole_way_is_that_of_the_engine(tmp_path: Path) -> None:
    made = run(tmp_path, "--stage", "end-to-end", "--schedule", "8", "--variant", "auto", "--peer", "diffusers")
    (case,) = made["cases"]
    assert by_name(case)["kadr auto"]["error"] == 0
    assert case["schedule"] == "8"
    assert [each["name"] for each in case["absent"]] == ["diffusers"]


def test_openvino_computes_the_same() -> None:
    pytest.importorskip("openvino")
    from benchmarks.peers import openvino

    work = replace(demo_work("8"), stage="dit")
    with torch.no_grad(), ExitStack() as stack:
        module = work.checkpoint.load_transformer(torch.float32)
        given = work.inputs
        right = module(
            given["tokens"], module.compute_rope(given["positions"]), given["text"], given["mask"], given["level"]
        )
        found = next(each for each in openvino.create_contenders(work, stack) if isinstance(each, Contender))
        assert relative_error(found.run(), right) < 1e-4


@pytest.mark.parametrize("words", [["--stage", "odd"], ["--num-layers", "2"], ["--size", "63x64x9"]])
def test_what_does_not_exist_is_an_error_in_a_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(words) == 1
    assert capsys.readouterr().err.startswith("error: ")
