"""The wheel holds the whole package, the demo model included, and nothing else."""

import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_WHEEL_BYTES = 35_000_000  # 31 MB are the demo model, its distilled twin and its upscaler


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
