"""Runs one peer in a process of its own: `python -m benchmarks.peers.peer_process NAME`."""

from __future__ import annotations

import sys

from benchmarks.peers import contender_factory
from kadr.bench.own_process import serve_contenders

if __name__ == "__main__":
    serve_contenders(contender_factory(sys.argv[1]))
