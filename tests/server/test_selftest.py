"""The self-test over HTTP: one at a time, for admins, with its stages as they end; the server's end is its end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kadr.hidden_paths import PathHider
from kadr.selftest.progress import parse_progress_line, progress_line
from kadr.selftest.result import Check, StageResult
from kadr.server.errors import ApiError
from kadr.server.selftests import Selftests, SelftestState
from tests.server.answers import refused
from tests.server.opened_app import ADMIN, OpenedApp, open_app, some_tokens

SAY_STAGES = """
import json, sys
print("warning: something", file=sys.stderr)
print("selftest: files: pass", file=sys.stderr)
print("selftest: LoRAs: not run: no LoRA was given", file=sys.stderr)
print(json.dumps({"report": "of " + " ".join(sys.argv[1:])}))
"""
FAIL_EARLY = "import sys; sys.exit('error: /srv/secret/x.safetensors is damaged.')"
WAIT = "import sys, time; print('selftest: files: pass', file=sys.stderr, flush=True); time.sleep(600)"
Make = Callable[..., Selftests]


@pytest.fixture
def make() -> Iterator[Make]:
    """Returns a function that makes the self-tests of a server, with a program instead of kadr's."""
    opened: list[Selftests] = []

    def make(program: str, **options: Any) -> Selftests:
        opened.append(Selftests(command=(sys.executable, "-c", program), **options))
        return opened[-1]

    yield make
    for selftests in opened:
        selftests.close()


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(selftests: Selftests) -> SelftestState:
    wait_until(lambda: selftests.state.status != "in_progress")
    return selftests.state


def test_finished_test_has_stages_and_report(make: Make) -> None:
    selftests = make(SAY_STAGES, engine_options={"quant": "int8", "vae": None, "models_dirs": ("a",)}, device="cpu")
    assert selftests.state.status == "none"
    assert selftests.start("nice name", "demo").status == "in_progress"
    state = finish(selftests)
    assert (state.status, state.model) == ("completed", "nice name")
    assert [(stage["name"], stage["verdict"]) for stage in state.stages] == [("files", "pass"), ("LoRAs", "not run")]
    assert state.report == "of --json --device cpu --quant int8 --models-dir a -- demo"


def test_test_that_ends_with_an_error_shows_it_without_folders(make: Make) -> None:
    selftests = make(FAIL_EARLY, hide=PathHider(["/srv/secret"]))
    selftests.start("demo", "demo")
    assert finish(selftests) == SelftestState("failed", "demo", (), "error: x.safetensors is damaged.")


def test_second_test_is_refused_until_the_first_ends(make: Make) -> None:
    selftests = make(WAIT)
    selftests.start("demo", "demo")
    wait_until(lambda: len(selftests.state.stages) == 1)
    with pytest.raises(ApiError, match="a self-test of demo is in progress") as error:
        selftests.start("other", "other")
    assert error.value.status == 409


def test_close_ends_the_process_and_starts_no_other(make: Make) -> None:
    selftests = make(WAIT)
    selftests.start("demo", "demo")
    process = selftests._process
    assert isinstance(process, subprocess.Popen)
    selftests.close()
    assert process.poll() is not None
    assert selftests.state.status == "failed"
    with pytest.raises(ApiError, match="the server stops"):
        selftests.start("demo", "demo")


def test_progress_lines_are_read_back() -> None:
    failed = StageResult("linear layers", (Check("error: x", 2.0, None, 1.0),), 0.1)
    assert parse_progress_line(progress_line(failed)) == {
        "name": "linear layers",
        "verdict": "fail",
        "problem": "error: x 2 (at most 1)",
    }
    assert parse_progress_line("warning: selftest: files: pass") is None


@pytest.fixture
def admin_app(tmp_path: Path, loop: Any) -> Iterator[OpenedApp]:
    with open_app(tmp_path / "data", loop, tokens=some_tokens(), devices=("cpu",)) as opened:
        yield opened


def test_admin_tests_the_demo_over_http(admin_app: OpenedApp) -> None:
    """The real command, in its own process."""

    def get() -> Any:
        return admin_app.send("GET", "/v1/selftest", token=ADMIN).data

    def post(body: Any) -> Any:
        return admin_app.send("POST", "/v1/selftest", token=ADMIN, json_body=body)

    assert get() == {"status": "none", "model": None, "stages": [], "report": None}
    refused(post({"model": "nothing"}), 404, "model_not_found")
    refused(post({"modle": "demo"}), 400)
    assert post({}).data["status"] == "in_progress"
    refused(post({"model": "demo"}), 409, "selftest_in_progress")
    wait_until(lambda: get()["status"] != "in_progress", seconds=180)
    answer = get()
    assert (answer["status"], answer["model"]) == ("completed", "demo"), answer
    assert {stage["verdict"] for stage in answer["stages"]} == {"pass", "not run"}
    assert answer["report"].startswith("kadr selftest of demo: pass")
