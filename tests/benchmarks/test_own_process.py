"""Contenders in a process of their own: they run there, with their environment, and are measured there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kadr.bench import kadr_contenders as contenders_module
from kadr.bench.cases import VARIANTS, Variant
from kadr.bench.kadr_contenders import has_zentorch, kadr_contenders
from kadr.bench.own_process import contenders_in_own_process, describe_case, restore_case
from kadr.bench.runner import Contender, SkippedContender
from kadr.bench.stage_case import StageCase
from kadr.kernels.mode import ZENTORCH_VARIABLE
from tests.benchmarks.test_cases import demo_case

PROGRAM = """
import os, time, torch
from kadr.bench.own_process import serve_contenders
from kadr.bench.runner import Contender, SkippedContender

def fail():
    raise ValueError("out of luck")

def create(case, stack):
    print("a library talks")
    yield Contender(name="sum", run=lambda: torch.full((2, 3), float(os.environ["ADDEND"])) + case.prompt_tokens,
                    dtype="float32", note="there", products="int8", weight_bytes=7)
    yield SkippedContender("absent", "not installed")
    yield Contender(name="slow", run=lambda: time.sleep(0.05), dtype="float32")
    yield Contender(name="broken", run=fail, dtype="float32")
    yield Contender(name="last", run=lambda: os._exit(9), dtype="float32")

serve_contenders(create)
"""


@pytest.fixture
def case(tmp_path: Path) -> StageCase:
    case = replace(demo_case("8"), stage="dit", prompt_tokens=40)
    return replace(case, files=replace(case.files, scratch_folder=tmp_path))


@pytest.fixture
def contenders(case: StageCase) -> Iterator[dict[str, Contender | SkippedContender]]:
    with ExitStack() as stack:
        made = contenders_in_own_process([sys.executable, "-c", PROGRAM], {"ADDEND": "2"}, case, stack)
        yield {each.name: each for each in made}


def test_a_case_is_the_same_in_the_other_process(case: StageCase) -> None:
    assert restore_case(describe_case(case)) == case


def test_contenders_run_there_with_their_environment(contenders: dict[str, Contender], case: StageCase) -> None:
    contender = contenders["sum"]
    assert torch.equal(contender.run(), torch.full((2, 3), 42.0))
    assert (contender.note, contender.arithmetic, contender.weight_bytes) == ("there", "int8", 7)
    assert list(case.files.scratch_folder.iterdir()) == []
    assert contenders["absent"] == SkippedContender("absent", "not installed")
    assert "ADDEND" not in os.environ


def test_they_are_timed_and_weighed_there(contenders: dict[str, Contender]) -> None:
    slow = contenders["slow"]
    assert slow.run() is None
    assert slow.time_runs is not None
    assert 0.05 <= slow.time_runs(2) < 1
    assert slow.measure_peak is not None
    peak = slow.measure_peak(slow.run)
    assert peak is None or peak >= 0


def test_a_failure_there_is_one_here_and_the_others_go_on(contenders: dict[str, Contender]) -> None:
    with pytest.raises(RuntimeError, match="ValueError: out of luck"):
        contenders["broken"].run()
    assert contenders["sum"].run() is not None
    with pytest.raises(RuntimeError, match="the process ended with 9"):
        contenders["last"].run()


def test_zentorch_is_within_reach_unless_it_is_turned_off_or_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders_module, "find_spec", lambda _: object())
    monkeypatch.delenv(ZENTORCH_VARIABLE, raising=False)
    on, off, auto = (VARIANTS[name] for name in ("zentorch", "no-zentorch", "auto"))
    assert [has_zentorch(variant) for variant in (on, off, auto)] == [True, False, True]
    monkeypatch.setenv(ZENTORCH_VARIABLE, "0")
    assert [has_zentorch(variant) for variant in (on, off, auto)] == [True, False, False]
    monkeypatch.setattr(contenders_module, "find_spec", lambda _: None)
    assert not any(has_zentorch(variant) for variant in (on, off, auto))


def test_a_variant_without_zentorch_runs_in_its_own_process(case: StageCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders_module, "find_spec", lambda _: object())
    monkeypatch.delenv(ZENTORCH_VARIABLE, raising=False)
    own: list[Variant] = []
    monkeypatch.setattr(contenders_module, "kadr_contender", lambda _, variant, *__: own.append(variant))
    with ExitStack() as stack:
        here, there = kadr_contenders(["auto", "zentorch", "no-zentorch"])(replace(case, prompt_tokens=100), stack)
        assert here is None
        assert own == [VARIANTS["auto"]]  # zentorch is the same
        assert isinstance(there, Contender)
        assert there.name == "kadr no-zentorch"
        assert there.run().shape == case.inputs["tokens"].shape


def test_a_variant_of_zentorch_is_skipped_where_there_is_none(case: StageCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders_module, "find_spec", lambda _: None)
    with ExitStack() as stack:
        (skipped,) = kadr_contenders(["int8-zentorch"])(case, stack)
    assert skipped == SkippedContender("kadr int8-zentorch", "not installed: zentorch")
