"""Contenders that need a process of their own: a variable is read once, or a library changes torch for all.

The other process makes its contenders and waits. It runs one when it is told to, and times it itself, so that nothing
between the processes counts. Meanwhile this process waits, so contenders still run in turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kadr.bench.cases import VideoShape
from kadr.bench.model_files import ModelFiles
from kadr.bench.peak_memory import peak_memory_for
from kadr.bench.runner import Contender, SkippedContender, clock_for, error_line, run_repeatedly
from kadr.bench.stage_case import ContenderFactory, StageCase
from kadr.kernels.cpu.malloc import is_malloc_tuned, tune_malloc

REPLY_MARK = "kadr-bench-reply "  # tells a reply from what libraries print
EXIT_SECONDS = 30  # a process that was told to end may take so long
SHARED_FIELDS = ("name", "dtype", "weight_bytes", "note", "is_kadr", "products")  # of contenders, as plain data


def contenders_in_own_process(
    command: Sequence[str], environment: Mapping[str, str], stage_case: StageCase, stack: ExitStack
) -> Iterator[Contender | SkippedContender]:
    """Yields the contenders of a program that calls `serve_contenders`. It ends when the stack closes.

    Args:
        environment: variables to add to this process's environment.
    """
    program = _Program(command, environment)
    stack.callback(program.close)
    for index, fields in enumerate(program.ask(describe_case(stage_case))["contenders"]):
        if "reason" in fields:
            yield SkippedContender(**fields)
            continue
        result_path = stage_case.files.scratch_folder / f"result-{program.pid}-{index}.pt"
        yield Contender(
            **fields,
            run=partial(_run_there, program, index, result_path),
            measure_peak=partial(_measure_peak_there, program, index),
            time_runs=partial(_time_there, program, index),
        )


def _run_there(program: _Program, index: int, result_path: Path) -> Tensor | None:
    program.ask({"run": index, "result": str(result_path)})
    if not result_path.exists():
        return None
    result: Tensor = torch.load(result_path, weights_only=True)
    result_path.unlink()
    return result


def _time_there(program: _Program, index: int, repeats: int) -> float:
    seconds: float = program.ask({"time": index, "repeats": repeats})["seconds"]
    return seconds


def _measure_peak_there(program: _Program, index: int, _: Any) -> int | None:
    peak: int | None = program.ask({"peak": index})["bytes"]
    return peak


class _Program:
    """A program that answers every line with one reply."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            # It finds modules where this process found them.
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        self.pid = self._process.pid

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a message and returns the reply.

        Raises:
            RuntimeError: the program failed, or ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it ended; the end of its output tells so
            pass
        for line in self._process.stdout:
            if line.startswith(REPLY_MARK):
                reply: dict[str, Any] = json.loads(line.removeprefix(REPLY_MARK))
                if "error" in reply:
                    raise RuntimeError(reply["error"])
                return reply
        raise RuntimeError(f"the process ended with {self._process.wait()}; what it wrote to stderr is above")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._process.stdout:
            try:
                self._process.stdin.close()  # the end of its input is the end of its work
                self._process.wait(EXIT_SECONDS)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()


def serve_contenders(factory: ContenderFactory) -> None:
    """Makes the contenders of the case on the first line of stdin, and runs them as the other lines say."""
    message = json.loads(sys.stdin.readline())
    if message["is_malloc_tuned"]:
        tune_malloc()
    torch.set_num_threads(message["threads"])
    stage_case = restore_case(message)
    with ExitStack() as stack, torch.no_grad():
        made = list(factory(stage_case, stack))
        _reply({"contenders": [_shared_fields(each) for each in made]})
        for line in sys.stdin:
            try:
                _reply(_obey(json.loads(line), made, stage_case.device))
            except Exception as error:  # the other process tells what failed
                _reply({"error": error_line(error)})


def _shared_fields(contender: Contender | SkippedContender) -> dict[str, Any]:
    if isinstance(contender, SkippedContender):
        return asdict(contender)
    return {name: getattr(contender, name) for name in SHARED_FIELDS}


def _obey(message: Mapping[str, Any], made: Sequence[Any], device: torch.device) -> dict[str, Any]:
    if "run" in message:
        result = made[message["run"]].run()
        if isinstance(result, Tensor):
            torch.save(result.detach().cpu().contiguous(), message["result"])
        return {}
    if "time" in message:
        run: Callable[[], Any] = made[message["time"]].run
        return {"seconds": clock_for(device)(partial(run_repeatedly, run, message["repeats"])) / message["repeats"]}
    return {"bytes": peak_memory_for(device)(made[message["peak"]].run)}


def _reply(reply: Mapping[str, Any]) -> None:
    print(f"\n{REPLY_MARK}{json.dumps(reply)}", flush=True)


def describe_case(stage_case: StageCase) -> dict[str, Any]:
    """Returns a case, and what of this process it depends on, as plain data."""
    files = {name: str(value) if isinstance(value, Path) else value for name, value in vars(stage_case.files).items()}
    return {
        "files": files,
        "shape": str(stage_case.shape),
        "stage": stage_case.stage,
        "device": str(stage_case.device),
        "schedule": stage_case.schedule,
        "prompt_tokens": stage_case.prompt_tokens,
        "threads": torch.get_num_threads(),
        "is_malloc_tuned": is_malloc_tuned(),
    }


def restore_case(message: Mapping[str, Any]) -> StageCase:
    """Returns the case of `describe_case`."""
    files = dict(message["files"])
    for name in ("path", "text_encoder_folder", "scratch_folder"):
        files[name] = Path(files[name])
    for name in ("transformer_blocks", "text_encoder_blocks"):
        files[name] = None if files[name] is None else tuple(files[name])
    return StageCase(
        ModelFiles(**files),
        VideoShape.parse(message["shape"]),
        message["stage"],
        torch.device(message["device"]),
        message["schedule"],
        message["prompt_tokens"],
    )
