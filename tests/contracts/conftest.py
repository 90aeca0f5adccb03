"""A copy of the sources, and a wheel built from it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="session")
def clone_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a clone that a wheel is built from. Tests do not write to it."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return copy


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, clone_sources: Path) -> Path:
    """A wheel built from a copy of the sources by the installed backend, without the network."""
    sources, output = tmp_path_factory.mktemp("build") / "kadr", tmp_path_factory.mktemp("built")
    shutil.copytree(clone_sources, sources)
    process = subprocess.run([sys.executable, "-c", BUILD, str(output)], cwd=sources, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    (path,) = output.glob("kadr-*.whl")
    return path
