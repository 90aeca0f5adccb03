"""`kadr batch`: flags as defaults, output and exit codes, and videos of the demo equal to those of `kadr generate`."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kadr import Condition, Request
from kadr.batch.outcome import RowOutcome, write_manifest
from kadr.batch.progress import BatchProgress
from kadr.batch.row import BatchRow
from kadr.batch.run import Batch, BatchResult
from kadr.cli import batch as batch_module
from kadr.cli import run
from kadr.cli.terminal.batch_watch import MAX_FAILURES_SHOWN, LineWatch, watch_batch
from kadr.errors import Cancelled
from kadr.jobs.job import JobError
from kadr.media.clip import read_metadata, read_video
from kadr.sampling.settings import Guidance
from tests.batch.fake_batch import open_fake_engine
from tests.cli.conftest import CommandResult

Run = Callable[..., CommandResult]
SMALL = ("--model", "demo", "--size", "64x64", "--frames", "9", "--steps", "1")
PROMPT = "a red circle moving right on a black background"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Takes the batches of commands, none of which is run: each of their rows is completed."""
    batches: list[Batch] = []

    def finish(batch: Batch) -> BatchResult:
        batches.append(batch)
        completed = [RowOutcome(number=row.number, line=row.line, status="completed") for row in batch.rows]
        outcomes = sorted([*batch.invalid, *completed], key=lambda outcome: outcome.number)
        return BatchResult(outcomes, len(completed), write_manifest(batch.folder, outcomes))

    monkeypatch.setattr(batch_module.Batch, "run", finish)
    monkeypatch.setattr(run, "open_engine", lambda model, **options: open_fake_engine({"model": model, **options}))
    return batches


def write(name: str, text: str) -> Path:
    Path(name).write_text(text, "utf-8")
    return Path(name)


def errors_of(result: CommandResult) -> list[str]:
    return [line for line in result.err.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_videos_are_those_of_generate(kadr: Run, folder: Path) -> None:
    lines = [
        {"prompt": PROMPT, "seed": 3},
        {"prompt": PROMPT, "lora": ["demo-lora-teal", 0.5], "output": "teal"},
        {"seed": 1},
    ]
    write("rows.jsonl", "\n".join(map(json.dumps, lines)))
    result = kadr("batch", "rows.jsonl", "--out", "out", *SMALL)
    assert (result.code, result.out) == (1, f"{folder / 'out' / 'results.jsonl'}\n")
    assert errors_of(result) == [
        "error: 1 of 3 rows failed: 3. Mend them and run it again; results.jsonl has the reasons."
    ]
    name = "001-a-red-circle-moving-right-on-a-black.mp4"
    for video, flags in ((name, ("--seed", "3")), ("teal.mp4", ("--lora", "demo-lora-teal", "0.5"))):
        assert kadr("generate", PROMPT, *SMALL, *flags, "--output", "alone.mp4").code == 0
        assert np.array_equal(read_video("alone.mp4").frames, read_video(f"out/{video}").frames)
        assert read_metadata(f"out/{video}")["model"] == read_metadata("alone.mp4")["model"]
        assert kadr("rerun", f"out/{video}", "--output", "again.mp4").code == 0
        assert Path("again.mp4").read_bytes() == Path("out", video).read_bytes()
    again = kadr("batch", "rows.jsonl", "--out", "out", "--json", *SMALL)
    assert json.loads(again.out) | {"seconds": 0} == {
        "rows": 3,
        "completed": 2,
        "failed": 1,
        "made": 0,
        "seconds": 0,
        "manifest": str(folder / "out" / "results.jsonl"),
    }


def test_flags_are_defaults_of_all_rows(kadr: Run, batches: list[Batch]) -> None:
    for name in ("a.png", "m.safetensors", "style.safetensors"):
        Path(name).touch()
    write("prompts.txt", "one\ntwo")
    flags = """--size 64x64 --seconds 2 --seed 7 --steps 3 --guidance 2 --image a.png -1 0.5 --model m.safetensors
        --lora style.safetensors 0.5 --vae v --release r --quant int8 --dtype float32 --offload blocks --models-dir x
        --no-prompt-cache --device cpu --device cuda:1"""
    result = kadr("batch", "prompts.txt", "--out", "made/here", *shlex.split(flags))
    assert result.code == 0, result.err
    (batch,) = batches
    here = Path.cwd()
    assert (batch.folder, batch.folder.is_dir(), batch.retries_failed) == (here / "made" / "here", True, False)
    image = Condition(str(here / "a.png"), frame=-1, strength=0.5)
    settings: dict[str, Any] = {"size": (64, 64), "seed": 7, "steps": 3, "guidance": Guidance(cfg_scale=2.0)}
    expected = [Request(prompt, **settings, conditions=(image,), lora_strengths=(0.5,)) for prompt in ("one", "two")]
    assert [row.request.lora_strengths for row in batch.rows] == [((0.5, 0.5),)] * 2
    assert [row.request.to_json() | {"lora_strengths": [0.5]} for row in batch.rows] == [
        each.to_json() for each in expected
    ]
    model, style = (str(here / name) for name in ("m.safetensors", "style.safetensors"))
    assert batch.rows[0].engine == {"model": model, "release": "r", "vae": "v", "loras": [style]}
    assert batch.rows[0].seconds == 2.0
    execution = {"quant": "int8", "dtype": "float32", "offload": "blocks", "models_dirs": ["x"], "prompt_cache": False}
    makers: list[Any] = list(batch.makers)
    assert [maker().options for maker in makers] == [{**execution, "device": device} for device in ("cpu", "cuda:1")]
    assert not makers[0]().writes_stills


def test_retries_and_the_home_folder_are_passed_on(
    kadr: Run, batches: list[Batch], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    write("a.txt", "one")
    assert kadr("batch", "a.txt", "--out", "~/clips", "--retry-failed", "--model", "demo").code == 0
    assert (batches[0].folder, batches[0].retries_failed) == (folder / "home" / "clips", True)
    assert kadr("batch", "a.txt", "--out", "b").err.count("bundled demo") == 1


@pytest.mark.parametrize(
    "args, code, message",
    [
        (("a.txt",), 2, "Missing option '--out'"),
        (("--out", "out"), 2, "Missing argument 'FILE'"),
        (("a.txt", "--out", "out", "--frames", "9", "--seconds", "1"), 2, "give --frames or --seconds, not both"),
        (("a.txt", "--out", "out", "--device", "cpu", "--device", "tpu"), 2, "'tpu' is not one of"),
        (("a.txt", "--out", "out", "--output", "x.mp4"), 2, "No such option: --output"),
        (("a.txt", "--out", "out", "--steps", "0"), 1, "steps is 0"),
        (("a.txt", "--out", "out", "--image", "b.png"), 1, "there is no file"),
        (("a.txt", "--out", "a.txt"), 1, "cannot be made: it is a file. Choose another --out"),
        (("a.txt", "--out", "a.txt/out"), 1, "cannot be made: Not a directory"),
        (("a.txt", "--out", "x" * 256), 1, "a file name has at most 255 bytes"),
        (("b.txt", "--out", "out"), 1, "cannot be read: No such file or directory"),
        (("results.jsonl", "--out", "."), 1, "is the manifest of"),
        (("a.txt", "--prompt", "b", "--out", "out"), 2, "unexpected extra argument"),
    ],
)
def test_bad_usage_is_refused(kadr: Run, batches: list[Batch], args: tuple[str, ...], code: int, message: str) -> None:
    write("a.txt", "one")
    write("results.jsonl", '{"prompt": "a"}')
    result = kadr("batch", *args)
    assert (result.code, result.out, batches) == (code, "", [])
    assert message in " ".join(result.err.split())


def test_failed_rows_are_counted_and_named(kadr: Run, batches: list[Batch]) -> None:
    write("a.jsonl", "[]\n" * 15 + '{"prompt": "a"}')
    result = kadr("batch", "a.jsonl", "--out", "out", "--json")
    assert (result.code, json.loads(result.out)["failed"]) == (1, 15)
    assert errors_of(result) == [
        "error: 15 of 16 rows failed: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 3 more. Mend them and run it again; "
        "results.jsonl has the reasons."
    ]


def test_row_that_failed_on_the_way_names_the_flag(
    kadr: Run, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = JobError("out_of_memory", "memory is full.")
    failed = RowOutcome(number=1, line=1, status="failed", error=error)
    monkeypatch.setattr(
        batch_module.Batch, "run", lambda batch: BatchResult([failed], 0, batch.folder / "results.jsonl")
    )
    write("a.txt", "one")
    result = kadr("batch", "a.txt", "--out", "out")
    assert "or make those again with --retry-failed" in errors_of(result)[0]


def test_cancelled_batch_ends_with_130(kadr: Run, batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(batch: Batch) -> BatchResult:
        raise Cancelled

    monkeypatch.setattr(batch_module.Batch, "run", cancel)
    write("a.txt", "one")
    result = kadr("batch", "a.txt", "--out", "out", "--model", "demo")
    assert (result.code, result.out, result.err) == (130, "", "cancelled\n")


def test_dry_run_checks_rows_and_writes_nothing(kadr: Run, batches: list[Batch]) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "frames": 7}, {"promt": "c"}, {"prompt": "d", "model": "missing"}]
    write("a.jsonl", "\n".join(map(json.dumps, rows)))
    result = kadr("batch", "a.jsonl", "--out", "out", "--dry-run")
    assert (result.code, result.out, batches, Path("out").exists()) == (1, "1 of 4 rows can be made\n", [], False)
    assert [line.partition(":")[0] for line in result.err.splitlines()] == [
        "row 2 (line 2) failed",
        "row 3 (line 3) failed",
        "row 4 (line 4) failed",
        "error",
    ]
    summary = json.loads(kadr("batch", "a.jsonl", "--out", "out", "--dry-run", "--json").out)
    assert (summary["rows"], summary["valid"], [line["row"] for line in summary["invalid"]]) == (4, 1, [2, 3, 4])
    write("a.jsonl", '{"prompt": "a"}')
    assert kadr("batch", "a.jsonl", "--out", "out", "--dry-run").code == 0


ROW = BatchRow(number=4, line=5, request=Request("a"), engine={}, work=10.0)
STAGE = {"stage": "denoise", "step": 3, "of": 8, "window": None, "fraction": 0.5}
FAILED = RowOutcome(number=7, line=9, status="failed", error=JobError("x", "no \x1b memory"))
COMPLETED = RowOutcome(number=4, line=5, status="completed", path="004-a.mp4", seconds=62.0)


def test_lines_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    watch, progress = LineWatch(clock=lambda: now[0]), BatchProgress(50, 3, 1, clock=lambda: now[0])
    progress.begin([ROW, ROW])
    progress.advance(ROW, {**STAGE, "fraction": 0.0})
    watch.show_progress(progress, ROW, STAGE)
    now[0] = 30.0
    progress.advance(ROW, STAGE)
    watch.show_progress(progress, ROW, {**STAGE, "window": [2, 3]})
    watch.show_progress(progress, ROW, STAGE)
    watch.show_outcome(progress, FAILED)
    watch.show_outcome(progress, COMPLETED)
    watch.show_line("something")
    assert capfd.readouterr() == (
        "",
        "row 4: denoising, window 2 of 3, 3 of 8; 3 done, 1 failed, 46 left, 1:30 to go\n"
        "row 7 (line 9) failed: no \\x1b memory\n"
        "row 4: 004-a.mp4 in 1:02; 3 done, 1 failed, 46 left, 1:30 to go\n"
        "something\n",
    )


def test_ten_thousand_failures_are_not_all_printed(capfd: pytest.CaptureFixture[str]) -> None:
    watch, progress = LineWatch(), BatchProgress(10_000, 0, 0)
    for _ in range(10_000):
        watch.show_outcome(progress, FAILED)
    lines = capfd.readouterr().err.splitlines()
    assert (len(lines), lines[-1]) == (MAX_FAILURES_SHOWN + 1, "further rows that fail are only in the manifest")


def test_one_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, progress = Terminal(), BatchProgress(50, 3, 1)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with watch_batch() as watch:
        watch.show_progress(progress, ROW, STAGE)
        watch.show_outcome(progress, FAILED)
        progress.num_completed += 1
        watch.show_outcome(progress, COMPLETED)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "row 7 (line 9) failed: no \\x1b memory" in text
    assert re.search(r"rows [^\n]* 5/50 4 done, 1 failed, 45 left\s*$", text)
    assert "004-a.mp4" not in text


def test_help_of_batch_has_the_groups_of_generate(kadr: Run) -> None:
    text = kadr("batch", "--help").out
    assert [
        title for title in ("The batch:", "The model:", "Guidance (", "Images and clips:") if title not in text
    ] == []
    assert "may be repeated, for one worker each" in " ".join(text.split())
