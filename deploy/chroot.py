"""Folders that stand for images: a system by debootstrap, and commands in it, in namespaces of their own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# What Debian's slim images leave out of a system by debootstrap.
NOT_IN_SLIM = ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/groff")
NOT_IN_SLIM += ("usr/share/lintian", "var/cache/apt/archives", "var/lib/apt/lists", "var/log/apt")
DPKG_EXCLUDES = "".join(f"path-exclude /{folder}/*\n" for folder in NOT_IN_SLIM[:6])
PIP_FOLDER = "/mnt/pip"  # where pip's folders of this machine lie in a root
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Mounts go with the namespace. Arguments: root, then pairs of folders to bind, "--", and the command.
_ENTER = """
root=$1; shift
mount -t proc proc "$root/proc"
while [ "$1" != -- ]; do
    mkdir -p "$root$2"
    mount --bind "$1" "$root$2"
    shift 2
done
shift
exec chroot "$root" "$@"
"""


@dataclass(frozen=True)
class Network:
    """Settings and folders of this machine that the build phase of a rehearsal needs to fetch packages.

    Args:
        environment: for pip, with paths inside of the root.
        binds: folders of this machine -> where they lie in the root while a command runs.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    binds: Mapping[str, str] = field(default_factory=dict)


def bootstrap(root: Path, suite: str, mirror: str) -> None:
    """Makes Debian's minimal system in a folder, without what its slim images lack.

    Raises:
        subprocess.CalledProcessError: debootstrap failed.
    """
    subprocess.run(["debootstrap", "--variant=minbase", suite, str(root), mirror], check=True, stdout=sys.stderr)
    (root / "etc/dpkg/dpkg.cfg.d/slim").write_text(DPKG_EXCLUDES)
    for folder in NOT_IN_SLIM:
        shutil.rmtree(root / folder, ignore_errors=True)
    (root / "var/cache/apt/archives/partial").mkdir(parents=True)


def copy_root(source: Path, target: Path) -> None:
    """Copies a whole system with owners, modes and links."""
    subprocess.run(["cp", "--archive", "--reflink=auto", str(source), str(target)], check=True)


def run_in_root(
    root: Path, words: Sequence[str], environment: Mapping[str, str], folder: str, network: Network
) -> None:
    """Runs a command of a build as root in a folder of a system.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    resolver = root / "etc/resolv.conf"
    resolver.write_text(Path("/etc/resolv.conf").read_text())
    binds = [word for pair in network.binds.items() for word in pair]
    variables = {"PATH": DEFAULT_PATH, "DEBIAN_FRONTEND": "noninteractive", **network.environment, **environment}
    assignments = [f"{name}={value}" for name, value in variables.items()]
    enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-euc", _ENTER, "enter", str(root)]
    try:
        subprocess.run(
            [*enter, *binds, "--", "env", "-i", "-C", folder, *assignments, *words], check=True, stdout=sys.stderr
        )
    finally:
        resolver.write_text("")  # Docker writes its own into each container
        for place in (*network.binds.values(), PIP_FOLDER):  # empty: nothing is mounted here any more
            if (root / place.lstrip("/")).exists():
                (root / place.lstrip("/")).rmdir()


def size_bytes(folder: Path) -> int:
    """Returns the bytes that a folder takes on disk, each file once."""
    output = subprocess.run(["du", "--summarize", "--block-size=1", str(folder)], capture_output=True, check=True)
    return int(output.stdout.split()[0])


def find_user(root: Path, name: str) -> tuple[int, int]:
    """Returns the user and group numbers of a user of a system."""
    for line in (root / "etc/passwd").read_text().splitlines():
        fields = line.split(":")
        if fields[0] == name:
            return int(fields[2]), int(fields[3])
    raise LookupError(f"{root}/etc/passwd has no user {shlex.quote(name)}")


def forget_cached_pages(root: Path) -> None:
    """Has the cache drop the pages of a system's programs, so that they are read from the disk again."""
    os.sync()
    for path in (*(root / "usr").rglob("*"), *(root / "opt").rglob("*")):
        if path.is_file() and not path.is_symlink():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
