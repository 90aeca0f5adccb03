"""A real notebook kernel shows videos, plans, dry runs and progress; its outputs are well-formed HTML."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.html_reader import HtmlReader

pytest.importorskip("ipykernel")
from jupyter_client.manager import KernelManager

SOURCES = Path(__file__).parents[2] / "src"
Run = Callable[[str], list[dict[str, Any]]]
SETUP = """
import kadr
engine = kadr.Engine.open("demo")
request = kadr.Request("a red circle moving right on a black background", size=(64, 64), frames=9, steps=3)
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder with a short path, as sockets of Unix need."""
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Run]:
    """A function that runs a cell in a kernel of its own process, and returns its outputs."""
    manager = KernelManager(kernel_name="python3", transport="ipc", connection_file=str(folder / "kernel.json"))
    paths = os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")])
    manager.start_kernel(env={**os.environ, "PYTHONPATH": paths, "IPYTHONDIR": str(folder)})
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)

    def run_cell(code: str) -> list[dict[str, Any]]:
        outputs: list[dict[str, Any]] = []

        def collect(message: dict[str, Any]) -> None:
            if message["msg_type"] not in ("status", "execute_input"):
                outputs.append({"kind": message["msg_type"], **message["content"]})

        reply = client.execute_interactive(code, output_hook=collect, timeout=60)
        assert reply["content"]["status"] == "ok", reply["content"]
        return outputs

    run_cell(SETUP)
    yield run_cell
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_progress_bar_is_one_output_that_changes(run: Run) -> None:
    first, *later = run("video = engine.generate(request, watch=kadr.ProgressBar(), preview=True)")
    assert first["kind"] == "display_data"
    assert {output["kind"] for output in later} == {"update_display_data"}
    assert {output["transient"]["display_id"] for output in later} == {first["transient"]["display_id"]}
    pages = [HtmlReader.read(output["data"]["text/html"]) for output in (first, *later)]
    assert any(each.tag == "img" for page in pages for each in page.elements)
    assert all(each.tag != "img" for each in pages[-1].elements)
    assert later[-1]["data"]["text/plain"] == "decoding: 9 of 9"


def test_cell_that_ends_with_a_video_plays_it_and_so_does_show(run: Run) -> None:
    run("small = engine.generate(request)")
    ((result,), (shown,)) = run("small"), run("small.show()")
    assert (result["kind"], shown["kind"]) == ("execute_result", "display_data")
    for output in (result, shown):
        assert HtmlReader.read(output["data"]["text/html"]).find("video")["width"] == "64"
        assert output["data"]["text/plain"].startswith("<Video 64x64, 9 frames")


def test_plan_and_dry_run_are_tables(run: Run) -> None:
    for code, text in (("engine.plan(request)", "transformer"), ("engine.dry_run(request)", "6 model evaluations.")):
        (output,) = run(code)
        reader = HtmlReader.read(output["data"]["text/html"])
        assert text in reader.texts
        assert "table" in {each.tag for each in reader.elements}
