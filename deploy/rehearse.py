"""Builds kadr's image without Docker, starts it without a network and makes a video: `make image`.

Takes the steps of deploy/Dockerfile, one by one, in a root of debootstrap, with the indexes that pip has on this
machine. Then deploy/first_video.py runs the image's entrypoint as its user. Needs Linux, root, debootstrap, and 6 GB of
disk; takes minutes. Prints a markdown table, and fails if the image is too large or anything in it does not work.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from deploy.chroot import PIP_FOLDER, Network, bootstrap, copy_root, run_in_root, size_bytes
from deploy.dockerfile import (
    STEPS,
    Container,
    Instruction,
    Stage,
    needed_stages,
    read_stages,
    split_copy,
)

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
MAX_IMAGE_BYTES = 1_500_000_000
PYPI = "https://pypi.org/simple"
PIP_SETTINGS = ("index-url", "extra-index-url", "find-links", "cert", "default-timeout")
_DEBIAN_SLIM = re.compile(r"debian:(\w+)-slim")
_PIP_SETTING = re.compile(r"^(:env:|\w+)\.([\w-]+)='(.*)'$", re.MULTILINE)


def main() -> None:
    """Runs the rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="of Debian's packages")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build has it")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the image's root in this new folder")
    options = parser.parse_args()
    for program in ("debootstrap", "unshare", "chroot"):
        if shutil.which(program) is None:
            sys.exit(f"the rehearsal needs {program}: apt-get install debootstrap util-linux coreutils")
    folder = Path(tempfile.mkdtemp(prefix="kadr-image-"))
    try:
        image, container = build(folder, options.mirror, dict(text.split("=", 1) for text in options.build_arg))
        figures = {"size": size_bytes(image), "python": size_bytes(folder / "python")}
        if options.keep is not None:
            image = Path(shutil.move(image, options.keep))
        print(table(figures, run(image, container)))
        if figures["size"] > MAX_IMAGE_BYTES:
            sys.exit(f"the image takes {figures['size'] / 1e9:.2f} GB; it must take less than 1.5 GB")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build(folder: Path, mirror: str, given: dict[str, str]) -> tuple[Path, Container]:
    """Takes the steps of the Dockerfile; returns the root of the image, and what its containers run.

    Args:
        folder: an empty one, for the roots of all stages.
        given: values of build arguments.

    Raises:
        subprocess.CalledProcessError: a step failed.
    """
    network, index = read_pip_settings()
    given = {"TORCH_INDEX": index, **given}
    stages = needed_stages(read_stages(DOCKERFILE.read_text("utf-8"), given))
    containers: dict[str, Container] = {}
    for stage in stages:
        root = folder / (stage.name or "image")
        if stage.base in containers:
            copy_root(folder / stage.base, root)
            container = Container(environment=dict(containers[stage.base].environment))
        else:
            suite = _DEBIAN_SLIM.fullmatch(stage.base)
            if suite is None:
                sys.exit(f"debootstrap makes no {stage.base}; it makes debian:bookworm-slim")
            bootstrap(root, suite[1], mirror)
            container = Container()
        take_steps(stage, folder, root, container, given, network)
        containers[stage.name] = container
    return root, container


def take_steps(
    stage: Stage, folder: Path, root: Path, container: Container, given: dict[str, str], network: Network
) -> None:
    """Takes the steps of one stage in its root, and notes its settings in the container."""
    for instruction in stage.instructions:
        print(f"{stage.name or 'image'}: {instruction.keyword} {instruction.value[:100]}", file=sys.stderr, flush=True)
        if instruction.keyword not in STEPS:
            container.apply(instruction, given)
            (root / container.folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif instruction.keyword == "COPY":
            copy_files(instruction, folder, root)
        else:
            variables = {**container.arguments, **container.environment}
            run_in_root(root, ["/bin/sh", "-c", instruction.value], variables, container.folder, network)


def copy_files(instruction: Instruction, folder: Path, root: Path) -> None:
    """Takes a COPY: from another stage, or from the repository without what the image's ignore file names."""
    copy = split_copy(instruction)
    source_root = folder / copy.stage if copy.stage else ROOT
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text("utf-8").splitlines()
    patterns = [] if copy.stage else [line.removeprefix("**/") for line in ignored if line.startswith("**/")]
    for name in copy.sources:
        source, target = source_root / name.lstrip("/"), root / copy.target.lstrip("/")
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns(*patterns), dirs_exist_ok=True)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def read_pip_settings() -> tuple[Network, str]:
    """Returns pip's settings on this machine, as a root sees them, and the index that they name first."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings: dict[str, str] = {}
    for _, name, value in sorted(_PIP_SETTING.findall(text), key=lambda match: match[0] == ":env:"):
        settings[name] = value
    environment, binds = {}, {}
    for name in PIP_SETTINGS:
        if not (words := settings.get(name, "").replace("\\n", " ").split()):
            continue
        for number, word in enumerate(words):
            path = Path(word.removeprefix("file://"))
            if path.exists():  # an index links to files beside it
                inside = f"{PIP_FOLDER}/{name}-{number}"
                whole = path if name == "find-links" else path.parent
                binds[str(whole)] = inside
                words[number] = word.replace(str(whole), inside)
        environment[f"PIP_{name.replace('-', '_').upper()}"] = " ".join(words)
    return Network(environment, binds), environment.get("PIP_INDEX_URL", PYPI)


def run(image: Path, container: Container) -> list[dict[str, float]]:
    """Starts the image without a network, in a process that sees nothing else; returns the seconds of two starts."""
    settings = {name: value for name, value in vars(container).items() if name != "arguments"}
    enter = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child"]
    command = [*enter, sys.executable, "-m", "deploy.first_video", str(image), json.dumps(settings)]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def table(figures: dict[str, int], runs: list[dict[str, float]]) -> str:
    """Returns what was measured as a markdown table."""
    lines = [
        f"The image takes {figures['size'] / 1e9:.2f} GB; {figures['python'] / 1e9:.2f} GB are Debian and Python.",
        "",
        "| seconds from the start of the container | files on disk | files cached |",
        "|---|---|---|",
        *(f"| {name} | {' | '.join(f'{each[name]:.1f}' for each in runs)} |" for name in runs[0]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
