"""The wheel holds the whole package, the demo model included, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_WHEEL_BYTES = 35_000_000  # 31 MB are the demo model, its distilled twin and its upscaler
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources by the installed backend, without the network."""
    source_copy, output = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source_copy)
    shutil.copytree(ROOT / "src", source_copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    process = subprocess.run(
        [sys.executable, "-c", BUILD, str(output)], cwd=source_copy, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    (path,) = output.glob("kadr-*.whl")
    return path


def test_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "kadr").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(name.startswith("kadr/assets/demo/") for name in sources), "the demo model is missing from the sources"
    with zipfile.ZipFile(wheel) as archive:
        wheel_files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert wheel_files == sources


def test_wheel_carries_its_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        assert "Apache License" in archive.read(names["licenses/LICENSE"]).decode()
        assert "kadr = kadr.__main__:main" in archive.read(names["entry_points.txt"]).decode()


def test_wheel_is_under_35_megabytes(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
