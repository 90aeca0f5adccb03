"""kadr notices a notebook without loading IPython; a real kernel is in tests/pipeline/test_notebooks.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kadr.notebook.kernel import notebook_display

SOURCES = Path(__file__).parents[2] / "src"


def test_kadr_does_not_load_ipython(tmp_path: Path) -> None:
    (tmp_path / "IPython.py").write_text("raise SystemExit('IPython was loaded')")
    code = "import kadr\nfor name in kadr.__all__: getattr(kadr, name)\nkadr.ProgressBar()\nprint('done')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(SOURCES)))}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, encoding="utf-8", timeout=60
    )
    assert (process.stdout, process.stderr) == ("done\n", "")


@pytest.mark.parametrize("shell", [None, SimpleNamespace(), SimpleNamespace(kernel=None)])
def test_ipython_on_a_terminal_is_no_notebook(monkeypatch: pytest.MonkeyPatch, shell: Any) -> None:
    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert notebook_display() is None


def test_without_ipython_there_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert notebook_display() is None
