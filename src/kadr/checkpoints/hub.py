"""Checkpoints from the Hugging Face hub. Nothing else in kadr touches the network but `text/enhance.py`.

What is in the local cache is used without asking. A large file that broke off goes on where it stopped, and whatever
comes is compared with the hub's checksum before it is used.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kadr.checkpoints.digest import SHA256_HEX_DIGITS, compute_digest, is_digest
from kadr.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

RESERVED_BYTES = 1 << 30  # bytes that a download leaves free on the disk


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it.

    Args:
        repo: such as "Lightricks/LTX-Video".
        name: within the repository.
        digest: its checksum; see `digest`.
    """

    repo: str
    name: str
    size: int
    digest: str

    @property
    def is_lfs(self) -> bool:
        """Whether it is stored beside git, as everything of more than a few megabytes is."""
        return len(self.digest) == SHA256_HEX_DIGITS

    @property
    def blob_path(self) -> Path:
        """Where the library's cache keeps its bytes."""
        return _repo_folder(self.repo) / "blobs" / self.digest

    @property
    def incomplete_path(self) -> Path:
        """Where they are gathered."""
        return self.blob_path.with_name(f"{self.digest}.incomplete")

    @property
    def remaining_bytes(self) -> int:
        """Bytes still to come."""
        if self.blob_path.exists():
            return 0
        return max(self.size - (self.incomplete_path.stat().st_size if self.incomplete_path.exists() else 0), 0)


def cached_file(repo: str, file: str) -> Path | None:
    """Where a file lies in the cache, if it is there whole. The network is not asked."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file)
    return Path(found) if isinstance(found, str) else None


def cached_folder(repo: str, patterns: Sequence[str]) -> Path | None:
    """The folder of a repository in the cache, if all that patterns name is there. The network is not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    # Older versions of the library also hand out what a broken download left behind.
    held = _list_local(folder, patterns)
    matched = all(fnmatch.filter(held, pattern) for pattern in patterns)
    return folder if matched and all(path.is_file() for path in held.values()) else None


def list_cached(repo: str, patterns: Sequence[str]) -> dict[str, Path]:
    """The files that the cache knows of among those that patterns name, by name; some may be gone."""
    commit = _repo_folder(repo) / "refs" / "main"
    folder = _repo_folder(repo) / "snapshots" / (commit.read_text("utf-8").strip() if commit.is_file() else "main")
    return _list_local(folder, patterns)


def list_missing(repo: str, patterns: Sequence[str]) -> list[RemoteFile]:
    """What the hub has under these names and the cache has not.

    Raises:
        CheckpointError: the hub does not answer, or has nothing of one of these names.
    """
    with _translate_errors(repo, patterns):
        return [file for file in _list_remote(repo, patterns) if cached_file(repo, file.name) is None]


def fetch(repo: str, file: str) -> Path:
    """Bring a file to this machine, unless it is here.

    Raises:
        CheckpointError: it is not in the cache, and there is no network, no such file, no leave or no room to take it;
            or what came is not what the hub has.
    """
    from huggingface_hub import hf_hub_download

    if (found := cached_file(repo, file)) is not None:
        return found
    with _translate_errors(repo, [file]):
        rest = _fetch_large_files(repo, [file])
        path = Path(hf_hub_download(repo, file))
        _verify_files(rest)
    return path


def fetch_folder(repo: str, patterns: Sequence[str]) -> Path:
    """Bring the part of a repository that patterns name to this machine, unless it is here.

    Args:
        patterns: such as "text_encoder/*"; each must match something.

    Returns:
        The folder of the repository, in which other files may be missing.

    Raises:
        CheckpointError: as `fetch`.
    """
    from huggingface_hub import snapshot_download

    if (found := cached_folder(repo, patterns)) is not None:
        return found
    with _translate_errors(repo, patterns):
        rest = _fetch_large_files(repo, patterns)
        folder = Path(snapshot_download(repo, allow_patterns=list(patterns)))
        _verify_files(rest)
    return folder


def fetch_digest(repo: str, name: str, path: Path) -> str | None:
    """The checksum that the hub has for a file in the cache; None where it does not answer."""
    revision = path.relative_to(_repo_folder(repo) / "snapshots").parts[0]
    try:
        with _translate_errors(repo, [name]):
            return _list_remote(repo, [name], revision)[0].digest or None
    except CheckpointError:
        return None


def compute_digest_with_progress(path: Path, name: str, like: str) -> str:
    """As `compute_digest`, with a bar on a terminal, as the library shows them."""
    from huggingface_hub.utils import tqdm

    size = path.stat().st_size
    with tqdm(total=size, desc=f"checking {name}", unit="B", unit_scale=True, disable=None) as bar:
        return compute_digest(path, like=like, watch=bar.update)


def check_disk_space(description: str, needed_bytes: int) -> None:
    """Refuse a download that would fill the disk.

    Args:
        needed_bytes: bytes.

    Raises:
        CheckpointError: there is no room for it.
    """
    cache = _cache_folder()
    free = shutil.disk_usage(next(place for place in (cache, *cache.parents) if place.exists())).free
    if free < needed_bytes + RESERVED_BYTES:
        raise CheckpointError(
            f"{description} takes {needed_bytes / 1e9:.1f} GB, and {cache} has {free / 1e9:.1f} GB free, of which "
            f"{RESERVED_BYTES / 1e9:.0f} GB stay so. Free some, or set HF_HOME to a folder on a larger disk."
        )


def _list_local(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """What a folder has of these names, with the parts that an index names, whether they are there or not."""
    held = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    held = {name: path for name, path in held.items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    for index in [path for name, path in held.items() if name.endswith(".index.json") and path.is_file()]:
        for part in _read_shard_names(index):
            path = index.with_name(part)
            held.setdefault(path.relative_to(folder).as_posix(), path)
    return held


def _read_shard_names(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()  # damaged, which is for its checksum to tell


def _list_remote(repo: str, patterns: Sequence[str], revision: str | None = None) -> list[RemoteFile]:
    from huggingface_hub import HfApi

    files = HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or ()
    for pattern in patterns:
        if not fnmatch.filter([file.rfilename for file in files], pattern):
            raise _not_in_repo_error(repo, pattern)
    wanted = [file for file in files if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in patterns)]
    return [RemoteFile(repo, file.rfilename, file.size or 0, _listed_digest(file)) for file in wanted]


def _listed_digest(file: RepoSibling) -> str:
    digest = (file.lfs.sha256 if file.lfs else file.blob_id) or ""
    return digest if is_digest(digest) else ""


def _fetch_large_files(repo: str, patterns: Sequence[str]) -> list[RemoteFile]:
    """Make sure of the room for a download, and bring its large files; those that are left to the library are returned.

    The library leaves alone what lies in its cache already. Newer ones of it throw away what did come of a file when a
    download breaks off: gigabytes, with these models.
    """
    files = list_missing(repo, patterns)
    check_disk_space(f"{', '.join(patterns)} of {repo}", sum(file.remaining_bytes for file in files))
    own = [file for file in files if file.is_lfs and not file.blob_path.exists()] if _supports_symlinks() else []
    for file in sorted(own, key=lambda file: file.size):
        _download(file)
    return [file for file in files if file not in own]


def _verify_files(files: Iterable[RemoteFile]) -> None:
    for file in files:
        if file.digest and (path := cached_file(file.repo, file.name)) is not None:
            _verify_digest(path, file)


def _download(file: RemoteFile) -> None:
    """Bring the bytes of a file into the library's cache, beginning where an earlier attempt ended."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    lock = _cache_folder() / ".locks" / _repo_folder(file.repo).name / f"{file.digest}.lock"  # the library's own
    for folder in (lock.parent, file.incomplete_path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if file.blob_path.exists():  # another process was faster
            return
        begun = file.incomplete_path.stat().st_size if file.incomplete_path.exists() else 0
        with file.incomplete_path.open("ab" if begun <= file.size else "wb") as part:
            http_get(
                hf_hub_url(file.repo, file.name),
                part,
                resume_size=part.tell(),
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.name,
            )
        _verify_digest(file.incomplete_path, file)
        file.incomplete_path.replace(file.blob_path)


def _verify_digest(path: Path, file: RemoteFile) -> None:
    if (found := compute_digest_with_progress(path, file.name, file.digest)) != file.digest:
        path.resolve().unlink()  # not only the link to it
        raise CheckpointError(
            f"{file.name} of {file.repo} came damaged: its checksum is {found}, and the hub's is {file.digest}. What "
            "came was thrown away; try again."
        )


def _supports_symlinks() -> bool:
    from huggingface_hub.file_download import are_symlinks_supported

    return are_symlinks_supported(_cache_folder())


@contextmanager
def _translate_errors(repo: str, patterns: Iterable[str]) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the library's own errors, and those of whichever HTTP client it is built on
        raise _as_checkpoint_error(repo, ", ".join(patterns), error) from error


def _as_checkpoint_error(repo: str, patterns: str, error: Exception) -> CheckpointError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{repo} asks for its licence to be accepted. Do so on {_url(repo)}, then run `hf auth login`."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(f"there is no repository {repo} on the hub, or it is private. Check {_url(repo)}.")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return _not_in_repo_error(repo, patterns)
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return CheckpointError(
        f"{patterns} of {repo} is not in the cache ({_cache_folder()}) and could not be fetched: {reason}. Try again with a "
        f"network; or download it from {_url(repo)} on another machine and give its path instead of a name, or copy "
        f"{_repo_folder(repo).name} from that machine's cache."
    )


def _not_in_repo_error(repo: str, pattern: str) -> CheckpointError:
    return CheckpointError(f"{repo} has no {pattern}. {_url(repo)}/tree/main shows what it has.")


def _url(repo: str) -> str:
    return f"https://huggingface.co/{repo}"


def _repo_folder(repo: str) -> Path:
    """The folder of a repository in the cache."""
    from huggingface_hub.file_download import repo_folder_name

    return _cache_folder() / repo_folder_name(repo_id=repo, repo_type="model")


def _cache_folder() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
