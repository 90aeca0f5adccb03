"""Runs one variant of kadr in a process of its own: `python -m kadr.bench.variant_process NAME`."""

from __future__ import annotations

import sys

from kadr.bench.kadr_contenders import kadr_contenders
from kadr.bench.own_process import serve_contenders

if __name__ == "__main__":
    serve_contenders(kadr_contenders(sys.argv[1:]))
