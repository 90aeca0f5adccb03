"""Other engines on the same work and the same weights. One that is not installed is reported as skipped."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module

from kadr.bench.cases import DECODE, DIT, ENCODE, END_TO_END, STARTUP, TEXT
from kadr.bench.own_process import contenders_in_own_process
from kadr.bench.runner import Contender, SkippedContender, error_line
from kadr.bench.stage_case import ContenderFactory, StageCase

# OpenVINO and NNCF send telemetry, unless this package cannot be imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Peer:
    """An engine to compare with.

    Args:
        module_name: module that imports the engine and has `create_contenders`, a `ContenderFactory`.
        stages: the stages it can run.
        own_process: runs in a process of its own, because importing it changes what others do.
    """

    module_name: str
    stages: tuple[str, ...]
    own_process: bool = False


PEERS: Mapping[str, Peer] = {
    "diffusers": Peer("benchmarks.peers.diffusers", (DIT, ENCODE, DECODE, END_TO_END)),
    "diffusers compiled": Peer("benchmarks.peers.compiled", (DIT, DECODE, END_TO_END)),
    "transformers": Peer("benchmarks.peers.transformers", (TEXT,)),
    # It adds passes to the compiler of the whole process.
    "zentorch": Peer("benchmarks.peers.zentorch", (DIT, DECODE, END_TO_END), own_process=True),
    "official": Peer("benchmarks.peers.official", (DIT, ENCODE, DECODE)),
    "openvino": Peer("benchmarks.peers.openvino", (TEXT, ENCODE, DIT, DECODE)),
    "LTXPipeline": Peer("benchmarks.peers.startup", (STARTUP,)),
}


def contender_factories(names: Sequence[str]) -> list[ContenderFactory]:
    """Returns the factories of peers, by name."""
    return [_process_factory(name) if PEERS[name].own_process else contender_factory(name) for name in names]


def contender_factory(name: str) -> ContenderFactory:
    """Returns the factory of a peer in this process."""
    peer = PEERS[name]

    def create_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
        if stage_case.stage not in peer.stages:
            return
        try:
            module = import_module(peer.module_name)
        except ImportError as error:
            yield SkippedContender(name, f"not installed: {error_line(error)}")
            return
        try:
            yield from module.create_contenders(stage_case, stack)
        except Exception as error:  # one broken peer does not stop the others
            yield SkippedContender(name, f"failed: {error_line(error)}")

    return create_contenders


def _process_factory(name: str) -> ContenderFactory:
    """Returns the factory of a peer in a process of its own."""

    def create_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
        if stage_case.stage not in PEERS[name].stages:
            return
        command = [sys.executable, "-m", "benchmarks.peers.peer_process", name]
        try:
            yield from contenders_in_own_process(command, {}, stage_case, stack)
        except Exception as error:
            yield SkippedContender(name, f"failed: {error_line(error)}")

    return create_contenders
