"""Names of outputs are reserved when they are chosen: processes and threads in one folder lose no video."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kadr.cli.reservation import Reservation, release_at_end, reserve_file
from kadr.errors import Cancelled, MediaError, RequestError
from kadr.media.writer import VideoWriter
from kadr.request.request import Request
from kadr.shapes import Size
from tests.cli.conftest import CommandResult, FakeEngine

Run = Callable[..., CommandResult]
SOURCES = Path(__file__).parents[2] / "src"
PROMPT = "a red circle moving right on a black background"
HOLD_A_NAME = """
import sys, time
from pathlib import Path
from kadr.cli.reservation import Reservation
reservation = Reservation(Path(sys.argv[1]))
assert reservation.acquire()
print("reserved", flush=True)
time.sleep(60)
"""

CHOOSE_AND_WRITE = """
import time
from kadr.cli.output_path import reserve_output
from kadr.request.request import Request
for _ in range(3):
    with reserve_output(Request(prompt="a"), None) as path:
        time.sleep(0.02)
        path.open("xb").close()
        print(path, flush=True)
"""


def start_python(*args: str | Path, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    return subprocess.Popen(
        [sys.executable, *args], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_processes_at_once_choose_different_names(tmp_path: Path) -> None:
    processes = [start_python("-c", CHOOSE_AND_WRITE, folder=tmp_path) for _ in range(4)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    names = ["out.mp4", *(f"out-{number}.mp4" for number in range(2, 13))]
    assert sorted("".join(out for out, _ in outputs).split()) == sorted(names)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


@pytest.mark.slow
def test_three_commands_at_once_write_three_videos(tmp_path: Path) -> None:
    flags = ("--model", "demo", "--size", "64x64", "--frames", "1", "--steps", "1", "--device", "cpu")
    commands = [start_python("-m", "kadr", "generate", PROMPT, *flags, folder=tmp_path) for _ in range(3)]
    outputs = [command.communicate(timeout=120) for command in commands]
    assert [command.returncode for command in commands] == [0, 0, 0], outputs
    names = ["out-2.mp4", "out-3.mp4", "out.mp4"]
    assert sorted(out.strip() for out, _ in outputs) == names
    assert sorted(os.listdir(tmp_path)) == names


def test_threads_at_once_reserve_different_names(tmp_path: Path) -> None:
    reservations = [Reservation(tmp_path / "out.mp4") for _ in range(8)]
    barrier, results = threading.Barrier(8), list[bool]()

    def reserve(reservation: Reservation) -> None:
        barrier.wait()
        results.append(reservation.acquire())
        barrier.wait()  # nobody releases it before all have tried
        if results.count(True) == 1 and reservation.acquire():
            reservation.release()

    threads = [threading.Thread(target=reserve, args=(reservation,)) for reservation in reservations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count(True) == 1


def test_a_reserved_name_is_not_chosen(kadr: Run, engine: FakeEngine, tmp_path: Path) -> None:
    with reserve_file(tmp_path / "out.mp4", flag="--output"):
        assert kadr("generate", PROMPT).out == "out-2.mp4\n"
        result = kadr("generate", PROMPT, "--output", "out.mp4")
        assert (result.code, result.out) == (1, "")
        assert "another process is writing out.mp4. Wait until it ends, or choose another --output." in result.err
    assert kadr("generate", PROMPT).out == "out.mp4\n"
    assert sorted(os.listdir(tmp_path)) == ["out-2.mp4", "out.mp4"]


def test_names_in_folders_and_beside_a_file_are_reserved(kadr: Run, engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    record = {"kadr": "0", "request": Request(prompt=PROMPT).to_json(), "model_name": "demo", "schema": 1}
    with VideoWriter("made.mp4", Size(64, 64), 24, metadata=record) as writer:
        writer.write(np.zeros((1, 64, 64, 3), np.uint8))
    with reserve_file(Path("videos/out.mp4"), flag="--output"), reserve_file(Path("made-2.mp4"), flag="--output"):
        assert kadr("generate", PROMPT, "--output", "videos").out == f"{Path('videos', 'out-2.mp4')}\n"
        rerun = kadr("rerun", "made.mp4", "--model", "demo")
        assert rerun.out == "made-3.mp4\n", rerun.err


def test_latents_that_another_process_writes_are_refused(kadr: Run, engine: FakeEngine, tmp_path: Path) -> None:
    engine.latents = torch.zeros(1)
    with reserve_file(tmp_path / "l.safetensors", flag="--save-latents"):
        result = kadr("generate", PROMPT, "--save-latents", "l.safetensors")
        assert result.code == 1
        assert "another process is writing l.safetensors. Wait until it ends, or choose another --save" in result.err
    assert engine.written_requests == []
    assert kadr("generate", PROMPT, "--save-latents", "l.safetensors").code == 0
    assert sorted(os.listdir(tmp_path)) == ["l.safetensors", "out.mp4"]


def test_a_killed_process_does_not_block_a_name(kadr: Run, engine: FakeEngine, tmp_path: Path) -> None:
    process = start_python("-c", HOLD_A_NAME, tmp_path / "out.mp4", folder=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "reserved\n"
    assert kadr("generate", PROMPT).out == "out-2.mp4\n"
    process.kill()
    process.communicate()
    assert kadr("generate", PROMPT).out == "out.mp4\n"
    assert sorted(os.listdir(tmp_path)) == ["out-2.mp4", "out.mp4"]  # nor is anything of it left


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Cancelled("stop"), RequestError("seed"), OSError(28, "full")])
def test_an_error_leaves_no_reservation(kadr: Run, engine: FakeEngine, tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        raise error

    engine.on_half_written = fail
    assert kadr("generate", PROMPT, "--save-latents", "l.safetensors").code != 0
    assert os.listdir(tmp_path) == []


def test_resume_passes_over_a_video_that_is_being_made(kadr: Run, engine: FakeEngine, tmp_path: Path) -> None:
    for name in ("out.windows", "out-2.windows"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "window-0001.safetensors").touch()
    with reserve_file(tmp_path / "out.mp4", flag="--output"):
        assert kadr("generate", PROMPT, "--window", "9", "--resume").out == "out-2.mp4\n"
        (tmp_path / "out-2.windows" / "window-0001.safetensors").unlink()
        result = kadr("generate", PROMPT, "--window", "9", "--resume")
        assert (result.code, "another process is writing out.mp4" in result.err) == (1, True)
    assert kadr("generate", PROMPT, "--window", "9", "--resume").out == "out.mp4\n"


def test_resume_of_nothing_replaces_no_file(kadr: Run, engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"precious")
    assert kadr("generate", PROMPT, "--window", "9", "--resume").out == "out-2.mp4\n"
    assert (tmp_path / "out.mp4").read_bytes() == b"precious"


def test_reservations_fit_the_longest_names_and_create_no_folder(tmp_path: Path) -> None:
    reservation = Reservation(tmp_path / f"{'x' * 251}.mp4")
    assert reservation.acquire()
    with release_at_end(reservation):
        assert len(os.listdir(tmp_path)) == 1
    with pytest.raises(MediaError, match="does not exist"):
        Reservation(tmp_path / "absent" / "out.mp4").acquire()
    assert os.listdir(tmp_path) == []
