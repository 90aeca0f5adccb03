"""Every call that is not the same on Linux, macOS and Windows is listed here with what makes it safe there.

A new one fails until it is listed. docs/reference/support.md says on which systems kadr was run.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "kadr"
# Modules of which every use is looked at, but for names that are the same everywhere.
SYSTEM_MODULES = (
    "os",
    "signal",
    "socket",
    "mmap",
    "ctypes",
    "subprocess",
    "fcntl",
    "resource",
    "select",
    "msvcrt",
    "pty",
)
SYSTEM_MODULES += ("multiprocessing", "termios", "pwd", "grp", "winreg", "syslog", "platform")
PORTABLE = {
    *("os.path", "os.environ", "os.PathLike", "os.urandom", "os.getpid", "os.scandir", "os.fspath", "os.sep"),
    *(
        "subprocess.Popen",
        "subprocess.PIPE",
        "subprocess.DEVNULL",
        "subprocess.SubprocessError",
        "subprocess.CalledProcessError",
    ),
    *("subprocess.TimeoutExpired", "mmap.mmap", "mmap.PAGESIZE", "mmap.ACCESS_READ", "socket.socket", "socket.timeout"),
    *("ctypes.c_ubyte", "ctypes.c_void_p", "ctypes.c_size_t", "platform.platform", "platform.processor"),
    *("platform.machine", "platform.python_version"),
}
PATH_METHODS = ("rename", "symlink_to", "hardlink_to", "readlink", "chmod", "unlink", "rmdir", "samefile", "madvise")
PATH_METHODS += ("is_mount", "as_uri", "is_fifo", "is_socket")
CALLED_PATH_METHODS = ("owner", "group")  # jobs have an owner too: only calls of these are a path's
LOCKS = ("FileLock", "WeakFileLock", "NamedTemporaryFile")
SYSTEM_FOLDERS = ("/proc", "/sys", "/dev")

# Call -> what makes it safe on all systems, and the modules that have it.
CALLS: dict[str, tuple[str, set[str]]] = {
    ".madvise": ("only if mmap names the advice, which it does not on Windows", {"memory/mapped_files.py"}),
    ".rename": (
        "of a folder: an older one steps aside first, as no system replaces one that is not empty; of a new file",
        {"atomic_write.py"},
    ),
    ".rmdir": ("OSError is suppressed", {"pipeline/longvideo/folder_lock.py"}),
    ".samefile": ("only of files that exist; knows that names differ in case alone", {"validation.py"}),
    ".unlink": (
        "of files that kadr has closed and copied from; of leftovers, OSError is suppressed",
        {
            "atomic_write.py",
            "bench/own_process.py",
            "checkpoints/hub.py",
            "cli/reservation.py",
            "jobs/database.py",
            "jobs/engine_maker.py",
            "jobs/folders.py",
            "jobs/store.py",
            "media/encoders/animation.py",
            "media/encoders/container.py",
            "media/encoders/tags.py",
            "pipeline/longvideo/folder_lock.py",
            "pipeline/longvideo/window_folder.py",
            "pipeline/prompt_cache.py",
        },
    ),
    "/proc": (
        "OSError means unknown",
        {"bench/peak_memory.py", "diagnosis/machine.py", "memory/cgroup.py", "memory/cpu.py", "memory/device.py"},
    ),
    "/sys": ("OSError means no limit", {"memory/cgroup.py"}),
    "FileLock": (
        "filelock has a lock of each system",
        {"cli/reservation.py", "jobs/table.py", "pipeline/longvideo/folder_lock.py"},
    ),
    "WeakFileLock": ("huggingface_hub's, by filelock", {"checkpoints/hub.py"}),
    "ctypes.CDLL": (
        "only on Linux, and only functions that it has",
        {"jobs/worker.py", "kernels/cpu/malloc.py", "memory/device.py", "memory/mapped_files.py"},
    ),
    "mmap.ACCESS_COPY": ("only on Windows", {"memory/mapped_files.py"}),
    "mmap.MAP_PRIVATE": ("not on Windows", {"memory/mapped_files.py"}),
    "mmap.PROT_READ": ("not on Windows", {"memory/mapped_files.py"}),
    "mmap.PROT_WRITE": ("not on Windows", {"memory/mapped_files.py"}),
    "multiprocessing.get_context": (
        "spawn, which every system has",
        {"jobs/worker.py", "server/inputs/media_process.py"},
    ),
    "open without an encoding": ("of bytes", {"batch/publishing.py", "jobs/folders.py", "regular_file.py"}),
    "os.O_RDONLY": ("of a folder, not on Windows", {"atomic_write.py"}),
    "os.O_RDWR": ("exists everywhere", {"cli/terminal/closed_streams.py"}),
    "os.O_WRONLY": ("exists everywhere", {"cli/terminal/errors.py"}),
    "os.POSIX_FADV_DONTNEED": ("only if os has posix_fadvise", {"planning/calibration/rates.py"}),
    "os.SEEK_CUR": ("exists everywhere", {"media/image.py"}),
    "os.W_OK": (
        "see os.access",
        {"cli/output_path.py", "jobs/supervisor.py", "media/writer.py", "training/lora_training.py"},
    ),
    "os.X_OK": ("see os.access", {"cli/output_path.py", "media/writer.py"}),
    "os._exit": ("exists everywhere", {"cli/terminal/signals.py", "jobs/worker.py"}),
    "os.access": (
        "refuses early; Windows may say yes, and writing then fails",
        {"cli/output_path.py", "jobs/supervisor.py", "media/writer.py", "training/lora_training.py"},
    ),
    "os.close": ("of a folder, not on Windows", {"atomic_write.py"}),
    "os.cpu_count": ("may be None, which is stored as it is", {"planning/calibration/storage.py"}),
    "os.startfile": ("only on Windows, which alone has it", {"pipeline/display/player.py"}),
    "os.devnull": ("names each system's own", {"cli/terminal/closed_streams.py", "cli/terminal/errors.py"}),
    "os.dup2": ("exists everywhere; OSError and ValueError are suppressed", {"cli/terminal/errors.py"}),
    "os.fdopen": ("exists everywhere", {"cli/terminal/closed_streams.py"}),
    "os.fsencode": (
        "exists everywhere; on Windows UTF-8",
        {"atomic_write.py", "cli/terminal/output.py", "validation.py"},
    ),
    "os.fchmod": ("only if os has it, which it has not on Windows before Python 3.13", {"server/signed_urls.py"}),
    "os.fstat": ("inode and time only tell files apart; both exist on NTFS", {"memory/mapped_files.py"}),
    "os.fsync": (
        "of files open for writing; of folders not on Windows; of one open for reading only if os has posix_fadvise",
        {"atomic_write.py", "jobs/folders.py", "planning/calibration/rates.py"},
    ),
    "os.getcwd": ("exists everywhere; its error is explained", {"cli/terminal/errors.py"}),
    "os.getloadavg": ("only if os has it, which it has not on Windows", {"bench/machine.py"}),
    "os.link": ("OSError means a copy instead", {"server/inputs/media_sources.py"}),
    "os.lstat": ("only for the size of a file", {"diagnosis/folders.py", "jobs/folders.py"}),
    "os.name": (
        "tells whether open files can be removed, and folders be opened",
        {"atomic_write.py", "file_names.py"},
    ),
    "os.open": (
        "of os.devnull; of a folder not on Windows",
        {"atomic_write.py", "cli/terminal/closed_streams.py", "cli/terminal/errors.py"},
    ),
    "os.pathsep": ("names each system's own", {"bench/own_process.py", "spec/model_dirs.py"}),
    "os.posix_fadvise": ("only if os has it", {"planning/calibration/rates.py"}),
    "os.readlink": (
        "only of a path that is a link",
        {"checkpoints/verify.py"},
    ),
    "os.replace": ("tries again on Windows while another program has a file open", {"file_names.py"}),
    "os.stat": (
        "only for the kind, the size and the age of a file",
        {"jobs/folders.py", "regular_file.py", "server/routes/content.py"},
    ),
    "os.utime": ("OSError is suppressed", {"pipeline/prompt_cache.py"}),
    "os.walk": ("follows no links", {"diagnosis/folders.py", "jobs/folders.py", "spec/model_folders.py"}),
    "os.write": ("to stderr; OSError is suppressed", {"cli/terminal/signals.py"}),
    "platform.release": ("only on Linux", {"memory/allocator.py"}),
    "resource.RLIMIT_AS": ("only on Linux", {"server/inputs/media_process.py"}),
    "resource.RLIMIT_FSIZE": ("only on Linux", {"server/inputs/media_process.py"}),
    "resource.RLIMIT_NOFILE": ("only if there is such a module", {"server/connections.py"}),
    "resource.RLIM_INFINITY": ("only if there is such a module", {"server/connections.py"}),
    "resource.getrlimit": ("only if there is such a module", {"server/connections.py"}),
    "resource.setrlimit": (
        "only if there is such a module; OSError and ValueError mean no change",
        {"server/connections.py", "server/inputs/media_process.py"},
    ),
    "signal.SIGCONT": ("only on Linux", {"jobs/worker.py"}),
    "signal.SIG_IGN": ("exists everywhere", {"cli/terminal/signals.py", "jobs/worker.py"}),
    "signal.getsignal": ("of signals that this system has", {"cli/terminal/signals.py"}),
    "signal.set_wakeup_fd": ("of a socket, which Windows demands", {"cli/terminal/signals.py"}),
    "signal.signal": ("of signals that this system has", {"cli/terminal/signals.py", "jobs/worker.py"}),
    "socket.AF_INET": ("exists everywhere", {"server/run.py"}),
    "socket.AF_INET6": ("exists everywhere; OSError is explained where the system has no IPv6", {"server/run.py"}),
    "socket.IPPROTO_TCP": ("exists everywhere", {"server/connections.py", "server/run.py"}),
    "socket.SOCK_STREAM": ("exists everywhere", {"server/run.py"}),
    "socket.SOL_SOCKET": ("exists everywhere", {"server/run.py"}),
    "socket.SO_REUSEADDR": ("not on Windows, where it would let two servers share a port", {"server/run.py"}),
    "socket.TCP_NOTSENT_LOWAT": ("only if socket has it", {"server/connections.py"}),
    "socket.gethostname": ("exists everywhere", {"server/gate.py"}),
    "socket.socketpair": ("exists on Windows since Python 3.5", {"cli/terminal/signals.py"}),
    "subprocess.list2cmdline": ("only on Windows", {"cli/commands/quantize.py"}),
    "subprocess.run": (
        "of sys.executable, git, nvidia-smi or a C compiler; failing means unknown",
        {"bench/machine.py", "bench/peak.py", "diagnosis/machine.py", "planning/calibration/rates.py"},
    ),
}


def found_calls(source: str) -> Iterator[str]:
    """Yields the calls and names in a module's source that are not the same on all systems."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else ""
            if name.partition(".")[0] in SYSTEM_MODULES:
                yield from {name} - PORTABLE
            elif node.attr in PATH_METHODS:
                yield f".{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module in SYSTEM_MODULES:
            yield from {f"{node.module}.{alias.name}" for alias in node.names} - PORTABLE
        elif isinstance(node, ast.Call):
            yield from _calls_by_name(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            yield from (folder for folder in SYSTEM_FOLDERS if node.value.startswith(f"{folder}/"))


def _calls_by_name(node: ast.Call) -> Iterator[str]:
    function = node.func
    keywords = {keyword.arg for keyword in node.keywords}
    if isinstance(function, ast.Name) and function.id in LOCKS:
        yield function.id
    if isinstance(function, ast.Name) and function.id == "open" and "encoding" not in keywords:
        yield "open without an encoding"
    if not isinstance(function, ast.Attribute):
        return
    if function.attr in CALLED_PATH_METHODS:
        yield f".{function.attr}"
    if function.attr == "replace" and len(node.args) == 1 and not keywords:  # str.replace takes two
        yield ".replace"
    if function.attr == "read_text" and not node.args and "encoding" not in keywords:
        yield "read_text without an encoding"
    if function.attr == "write_text" and len(node.args) < 2 and "encoding" not in keywords:
        yield "write_text without an encoding"
    if function.attr in ("run", "Popen") and {"text", "universal_newlines"} & keywords and "encoding" not in keywords:
        yield "subprocess text without an encoding"


def calls_in_package() -> dict[str, set[str]]:
    """Returns each call that is not the same everywhere, and the modules that have it."""
    modules: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for name in found_calls(path.read_text("utf-8")):
            modules[name].add(path.relative_to(PACKAGE).as_posix())
    return dict(modules)


def test_calls_that_are_not_the_same_everywhere_are_listed_with_a_guard() -> None:
    assert calls_in_package() == {name: modules for name, (_, modules) in CALLS.items()}
    assert all(guard for guard, _ in CALLS.values())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\nos.kill(os.getpid(), 9)", ["os.kill"]),
        ("from os import fork", ["os.fork"]),
        ("import fcntl\nfcntl.flock(1, 2)", ["fcntl.flock"]),
        ("path.rename(other)", [".rename"]),
        ("path.replace(other)", [".replace"]),
        ("text.replace('a', 'b')", []),
        ("path.owner()", [".owner"]),
        ("job.owner", []),
        ("partial(path.unlink, missing_ok=True)", [".unlink"]),
        ("open('a')", ["open without an encoding"]),
        ("open('a', encoding='utf-8')", []),
        ("path.read_text()", ["read_text without an encoding"]),
        ("path.read_text('utf-8')", []),
        ("path.write_text('a')", ["write_text without an encoding"]),
        ("run('git', text=True)", []),
        ("subprocess.run('git', text=True)", ["subprocess text without an encoding", "subprocess.run"]),
        ("Path('/proc/self')", ["/proc"]),
        ("NamedTemporaryFile()", ["NamedTemporaryFile"]),
    ],
)
def test_unportable_call_is_noticed(source: str, expected: list[str]) -> None:
    assert sorted(found_calls(source)) == expected
