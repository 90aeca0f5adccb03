"""README's section Install does what it says, in an empty environment, without the network.

The packages that kadr stands on come from the environment of the tests: the new one finds them as if they had been
installed, so that pip checks every requirement but fetches nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from kadr.media.clip import read_video
from kadr.request.resolved_controls import CONTROL_LIBRARIES
from kadr.version import __version__
from tests.page_commands import ROOT, blocks_of, section_of

README = (ROOT / "README.md").read_text("utf-8")
PAGES = (README, *(path.read_text("utf-8") for path in (ROOT / "docs").rglob("*.md")))
EXTRA_IN_TEXT = re.compile(r"(?:kadr|\.whl|'\.)\[([\w,]+)\]")
# Extras whose requirements the environment of the tests has. rtmlib asks for two builds of OpenCV that need a display;
# the peers of the benchmarks are not there.
INSTALLABLE = ("control", "depth", "heic", "serve")
# import name -> extra: what the package imports only where it is used
SERVER_LIBRARIES = ("fastapi", "prometheus_client", "python_multipart", "uvicorn")
OPTIONAL_IMPORTS = {
    **dict(CONTROL_LIBRARIES.values()),
    "pi_heif": "heic",
    **dict.fromkeys(SERVER_LIBRARIES, "serve"),
}
_PYTHON = """#!/bin/bash
{python} "$@" || exit
if [ "$1 $2" = "-m venv" ]; then
    cd "$3"/lib/python*/site-packages
    echo {packages} > packages.pth
    rm -rf setuptools* pkg_resources  # of Python 3.11 and older, where it would hide the newer one that torch asks for
fi
"""


def extras_of(wheel: Path) -> dict[str, set[str]]:
    """Returns the extras of a wheel, each with the names of the distributions that it adds."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(archive.read(name))
    extras: dict[str, set[str]] = {extra: set() for extra in metadata.get_all("Provides-Extra", [])}
    for requirement in metadata.get_all("Requires-Dist", []):
        if extra := re.search(r"extra == [\"'](\w+)[\"']", requirement):
            extras[extra[1]].add(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
    return extras


def test_extras_of_the_documents_are_those_of_the_wheel(wheel: Path) -> None:
    extras = set(extras_of(wheel))
    assert set(re.findall(r"^\| `pip install '\.\[(\w+)\]'` \|", README, re.MULTILINE)) == extras
    named = {extra for page in PAGES for names in EXTRA_IN_TEXT.findall(page) for extra in names.split(",")}
    assert named <= extras


@pytest.mark.parametrize("import_name, extra", OPTIONAL_IMPORTS.items())
def test_extra_brings_what_the_package_imports(import_name: str, extra: str, wheel: Path) -> None:
    distributions = importlib.metadata.packages_distributions()[import_name]
    assert {name.replace("_", "-") for name in distributions} & extras_of(wheel)[extra]


@pytest.fixture
def clone(tmp_path: Path, clone_sources: Path) -> Path:
    """A clone of the repository in which bash finds a `python3` whose environments have the packages of this one."""
    folder = tmp_path / "clone"
    shutil.copytree(clone_sources, folder)
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("kadr", "__editable__", "pip", "distutils-precedence")):
            (packages / path.name).symlink_to(path)
    programs = tmp_path / "programs"
    programs.mkdir()
    quoted = {"python": shlex.quote(sys.executable), "packages": shlex.quote(str(packages))}
    (programs / "python3").write_text(_PYTHON.format(**quoted))
    (programs / "python3").chmod(0o755)
    return folder


def run_shell(text: str, folder: Path) -> str:
    """Runs shell text with pip's indexes closed, in a folder; returns its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    process = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", text],
        cwd=folder,
        env={
            **environment,
            "PATH": f"{folder.parent / 'programs'}{os.pathsep}{os.environ['PATH']}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_NO_COMPILE": "1",  # takes longer than installing
            "PIP_NO_BUILD_ISOLATION": "0",  # pip turns the value of a flag that reads "no" round
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, f"{text}\n{process.stdout}\n{process.stderr}"
    return process.stdout


@pytest.mark.slow
def test_environment_made_by_the_words_of_readme_runs_kadr(clone: Path, wheel: Path) -> None:
    (block,) = blocks_of(section_of(README, "Install"))
    assert run_shell(block.text, clone).endswith(f"kadr {__version__}\n")

    empty = clone.parent / "empty"
    empty.mkdir()
    shutil.copy(wheel, empty)
    (with_extra,) = re.findall(r"With a wheel, write `(pip install '\S+\.whl\[control\]')`", README)
    activate = f". {shlex.quote(str(clone / '.venv' / 'bin' / 'activate'))}\n"
    run_shell(f"{activate}pip uninstall --yes kadr\n", empty)
    run_shell(activate + with_extra.replace("control", ",".join(INSTALLABLE)), empty)
    output = run_shell(
        f"{activate}python -c 'import kadr; print(kadr.__file__)'\n"
        'kadr generate "a blue square moving left on a gray background" --output square.mp4\n',
        empty,
    )
    module, video = output.splitlines()
    assert Path(module).is_relative_to(clone / ".venv")
    assert video == "square.mp4"
    assert read_video(empty / "square.mp4").frames.shape == (25, 128, 128, 3)
