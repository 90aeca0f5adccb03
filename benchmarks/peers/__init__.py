"""Other engines on the same work and the same weights. One that is not installed is reported as skipped."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module

from kadr.bench.cases import DECODE, DIT, ENCODE, END_TO_END, STARTUP, TEXT
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
    """

    module_name: str
    stages: tuple[str, ...]


PEERS: Mapping[str, Peer] = {
    "diffusers": Peer("benchmarks.peers.diffusers", (DIT, ENCODE, DECODE, END_TO_END)),
    "diffusers compiled": Peer("benchmarks.peers.compiled", (DIT, DECODE, END_TO_END)),
    "transformers": Peer("benchmarks.peers.transformers", (TEXT,)),
    "official": Peer("benchmarks.peers.official", (DIT, ENCODE, DECODE)),
    "openvino": Peer("benchmarks.peers.openvino", (DIT,)),
    "LTXPipeline": Peer("benchmarks.peers.startup", (STARTUP,)),
}


def contender_factories(names: Sequence[str]) -> list[ContenderFactory]:
    """Returns the factories of peers, by name."""
    return [_contender_factory(name, PEERS[name]) for name in names]


def _contender_factory(name: str, peer: Peer) -> ContenderFactory:
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
