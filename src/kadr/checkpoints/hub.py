"""Fetches checkpoints from the Hugging Face hub. Only this module and `text/enhance.py` use the network.

A cached file is used without a request. An interrupted download of a large file resumes where it stopped, and every
download is verified against the hub's checksum before it is used.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from kadr.cancellation import check_cancelled, uninterruptible_wait
from kadr.checkpoints.digest import SHA256_HEX_DIGITS, compute_digest, is_digest
from kadr.errors import Cancelled, CheckpointError
from kadr.file_names import replace_file
from kadr.json_reader import parse_json
from kadr.regular_file import read_text

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

RESERVED_BYTES = 1 << 30  # stay free on the disk after a download
MAX_COMMIT_BYTES = 100  # of a commit's name


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it.

    Args:
        repo: such as "Lightricks/LTX-Video".
        name: its path within the repository.
        size: in bytes.
        digest: its checksum; see the module `digest`.
    """

    repo: str
    name: str
    size: int
    digest: str

    @property
    def is_lfs(self) -> bool:
        """True if git-lfs stores it, as it does every file of more than a few megabytes."""
        return len(self.digest) == SHA256_HEX_DIGITS

    @property
    def blob_path(self) -> Path:
        """Path of its bytes in huggingface_hub's cache."""
        return _repo_folder(self.repo) / "blobs" / self.digest

    @property
    def incomplete_path(self) -> Path:
        """Path of its bytes while they download."""
        return self.blob_path.with_name(f"{self.digest}.incomplete")

    @property
    def remaining_bytes(self) -> int:
        """Bytes still to download."""
        if self.blob_path.exists():
            return 0
        return max(self.size - (self.incomplete_path.stat().st_size if self.incomplete_path.exists() else 0), 0)


def cached_file(repo: str, file: str) -> Path | None:
    """Returns the path of a file in the cache, if it is there. Uses no network."""
    with _explain_settings():
        from huggingface_hub.file_download import try_to_load_from_cache

        try:
            path = try_to_load_from_cache(repo, file)
        except UnicodeDecodeError:  # of the file that names the commit: a power cut may leave anything
            return None
    return Path(path) if isinstance(path, str) else None


def cached_folder(repo: str, patterns: Sequence[str]) -> Path | None:
    """Returns a repository's folder in the cache, if all files that the patterns name are there. Uses no network."""
    with _explain_settings():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=True))
        except (LocalEntryNotFoundError, UnicodeDecodeError):  # see `cached_file`
            return None
    # Older versions of huggingface_hub also return the folder of an interrupted download.
    files = _list_local(folder, patterns)
    all_matched = all(fnmatch.filter(files, pattern) for pattern in patterns)
    return folder if all_matched and all(path.is_file() for path in files.values()) else None


def list_cached(repo: str, patterns: Sequence[str]) -> dict[str, Path]:
    """Lists the files that the cache has for the patterns, by name; some paths may be gone from the disk."""
    return _list_local(_repo_folder(repo) / "snapshots" / _cached_commit(repo), patterns)


def list_stored(repo: str, patterns: Sequence[str]) -> list[Path]:
    """Lists the files of all commits in the cache that match the patterns."""
    snapshots = _repo_folder(repo) / "snapshots"
    commits = sorted(snapshots.iterdir()) if snapshots.is_dir() else []
    paths = [path for commit in commits for path in _list_local(commit, patterns).values()]
    return [path for path in paths if path.is_symlink() or path.exists()]


def remove_stored(paths: Sequence[Path]) -> list[Path]:
    """Removes files that `list_stored` returned, and the blobs that no other file of their repository links to.

    Returns:
        The files that are gone.

    Raises:
        CheckpointError: one cannot be removed, or is not in the cache.
    """
    cache = os.path.realpath(cache_folder())
    for path in paths:
        if not Path(os.path.realpath(path.parent)).is_relative_to(cache):
            raise CheckpointError(f"{path} is not in the cache, {cache}. It is not removed.")
    blobs = {(_repo_of(path), Path(os.path.realpath(path))) for path in paths if path.is_symlink()}
    try:
        for path in paths:
            path.unlink(missing_ok=True)
        linked = {blob for repo_folder in {folder for folder, _ in blobs} for blob in _linked_blobs(repo_folder)}
        for repo_folder, blob in blobs:
            if blob.is_relative_to(os.path.realpath(repo_folder)) and blob not in linked:
                blob.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{error.filename} cannot be removed: {reason}. Check its permissions.") from error
    return list(paths)


def _repo_of(path: Path) -> Path:
    """Returns the folder of the repository that a file in the cache belongs to."""
    return next(folder for folder in path.parents if folder.name == "snapshots").parent


def _linked_blobs(repo_folder: Path) -> set[Path]:
    """Returns the blobs that files of a repository link to."""
    links = (path for path in (repo_folder / "snapshots").rglob("*") if path.is_symlink())
    return {Path(os.path.realpath(link)) for link in links}


def _cached_commit(repo: str) -> str:
    """Returns the commit that the cache has as the newest; "main" where no file names one."""
    file = _repo_folder(repo) / "refs" / "main"
    try:
        commit = read_text(file, max_bytes=MAX_COMMIT_BYTES).strip() if file.is_file() else ""
    except (OSError, UnicodeDecodeError):
        commit = ""
    return commit if commit.isalnum() else "main"


def list_missing(repo: str, patterns: Sequence[str]) -> list[RemoteFile]:
    """Lists the files on the hub that match the patterns and are not in the cache.

    Raises:
        CheckpointError: the hub does not answer, or a pattern matches nothing.
    """
    with _translate_errors(repo, patterns):
        return [file for file in _list_remote(repo, patterns) if cached_file(repo, file.name) is None]


def fetch(repo: str, file: str) -> Path:
    """Downloads a file, unless it is cached.

    Returns:
        Its path in the cache.

    Raises:
        CheckpointError: it is not cached, and there is no network, no such file, no access or no disk space; or the
            download does not have the hub's checksum.
    """
    from huggingface_hub import hf_hub_download

    if (cached := cached_file(repo, file)) is not None:
        return cached
    with _translate_errors(repo, [file]):
        other_files = _fetch_large_files(repo, [file])
        path = Path(hf_hub_download(repo, file))
        _verify_files(other_files)
    return path


def fetch_folder(repo: str, patterns: Sequence[str]) -> Path:
    """Downloads the files of a repository that match the patterns, unless they are cached.

    Each pattern, such as "text_encoder/*", must match a file. Returns the folder of the repository in the cache; other
    files may be missing in it.

    Raises:
        CheckpointError: see `fetch`.
    """
    from huggingface_hub import snapshot_download

    if (cached := cached_folder(repo, patterns)) is not None:
        return cached
    with _translate_errors(repo, patterns):
        other_files = _fetch_large_files(repo, patterns)
        folder = Path(snapshot_download(repo, allow_patterns=list(patterns)))
        _verify_files(other_files)
    return folder


def fetch_digest(repo: str, name: str, path: Path) -> str | None:
    """Asks the hub for the checksum of a cached file; returns None where it does not answer."""
    revision = path.relative_to(_repo_folder(repo) / "snapshots").parts[0]
    try:
        with _translate_errors(repo, [name]):
            return _list_remote(repo, [name], revision)[0].digest or None
    except CheckpointError:
        return None


def compute_digest_with_progress(path: Path, name: str, like: str) -> str:
    """Computes the checksum of a file, with a progress bar on a terminal; see `compute_digest`."""
    from huggingface_hub.utils import tqdm

    size = path.stat().st_size
    with tqdm(total=size, desc=f"checking {name}", unit="B", unit_scale=True, disable=None) as bar:
        return compute_digest(path, like=like, watch=bar.update)


def check_disk_space(description: str, needed_bytes: int) -> None:
    """Refuses a download that would fill the disk.

    Args:
        description: the download, for the error.

    Raises:
        CheckpointError: the disk has too little free space.
    """
    cache = cache_folder()
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if free < needed_bytes + RESERVED_BYTES:
        raise CheckpointError(
            f"{description} takes {needed_bytes / 1e9:.1f} GB, and {cache} has {free / 1e9:.1f} GB free, of which "
            f"{RESERVED_BYTES / 1e9:.0f} GB stay free. Free some, or set HF_HOME to a folder on a larger disk."
        )


def _list_local(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Lists the files of a folder that match the patterns, and the shards that an index names, on disk or not."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    paths = {name: path for name, path in paths.items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    for index in [path for name, path in paths.items() if name.endswith(".index.json") and path.is_file()]:
        for shard in _read_shard_names(index):
            path = index.with_name(shard)
            paths.setdefault(path.relative_to(folder).as_posix(), path)
    return paths


def _read_shard_names(index: Path) -> set[str]:
    try:
        return set(parse_json(read_text(index))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()  # damaged: its checksum reports it


def _list_remote(repo: str, patterns: Sequence[str], revision: str | None = None) -> list[RemoteFile]:
    from huggingface_hub import HfApi

    files = HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or ()
    for pattern in patterns:
        if not fnmatch.filter([file.rfilename for file in files], pattern):
            raise _not_in_repo_error(repo, pattern)
    matching = [file for file in files if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in patterns)]
    return [RemoteFile(repo, file.rfilename, file.size or 0, _listed_digest(file)) for file in matching]


def _listed_digest(file: RepoSibling) -> str:
    digest = (file.lfs.sha256 if file.lfs else file.blob_id) or ""
    return digest if is_digest(digest) else ""


def _fetch_large_files(repo: str, patterns: Sequence[str]) -> list[RemoteFile]:
    """Checks the disk space of a download and fetches its large files into huggingface_hub's cache.

    huggingface_hub skips files that its cache has. Its newer versions discard the bytes of an interrupted download:
    gigabytes, with these models. So kadr downloads large files itself.

    Returns:
        The missing files that are left to huggingface_hub.
    """
    files = list_missing(repo, patterns)
    check_disk_space(f"{', '.join(patterns)} of {repo}", sum(file.remaining_bytes for file in files))
    large_files = (
        [file for file in files if file.is_lfs and not file.blob_path.exists()] if _supports_symlinks() else []
    )
    for file in sorted(large_files, key=lambda file: file.size):
        check_cancelled()
        _download(file)
    return [file for file in files if file not in large_files]


def _verify_files(files: Iterable[RemoteFile]) -> None:
    for file in files:
        if file.digest and (path := cached_file(file.repo, file.name)) is not None:
            _verify_digest(path, file)


def _download(file: RemoteFile) -> None:
    """Downloads a file into huggingface_hub's cache, resuming an earlier attempt."""
    from huggingface_hub.utils import WeakFileLock

    lock = cache_folder() / ".locks" / _repo_folder(file.repo).name / f"{file.digest}.lock"  # huggingface_hub's own
    for folder in (lock.parent, file.incomplete_path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if file.blob_path.exists():  # another process was faster
            return
        _complete_download(file)
        _verify_digest(file.incomplete_path, file)
        replace_file(file.incomplete_path, file.blob_path)


def _complete_download(file: RemoteFile) -> None:
    """Downloads what the incomplete file lacks, or all of it if that is larger than the file."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    downloaded_bytes = file.incomplete_path.stat().st_size if file.incomplete_path.exists() else 0
    with file.incomplete_path.open("ab" if downloaded_bytes <= file.size else "wb") as incomplete:
        http_get(
            hf_hub_url(file.repo, file.name),
            cast(BinaryIO, _CancellableFile(incomplete)),
            resume_size=incomplete.tell(),
            headers=build_hf_headers(),
            expected_size=file.size,
            displayed_filename=file.name,
        )


class _CancellableFile:
    """A file whose `write` looks at the token: huggingface_hub calls it for each chunk of a download."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        """Raises: Cancelled: the work is cancelled."""
        check_cancelled()
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _verify_digest(path: Path, file: RemoteFile) -> None:
    if (actual := compute_digest_with_progress(path, file.name, file.digest)) != file.digest:
        path.resolve().unlink()  # the bytes, not only the link to them
        raise CheckpointError(
            f"{file.name} of {file.repo} arrived damaged: its checksum is {actual}, and the hub's is {file.digest}. "
            "The download was deleted; try again."
        )


def _supports_symlinks() -> bool:
    from huggingface_hub.file_download import are_symlinks_supported

    return are_symlinks_supported(cache_folder())


@contextmanager
def _explain_settings() -> Iterator[None]:
    """Explains where huggingface_hub refuses its settings: it reads them when it is imported.

    Raises:
        CheckpointError: an environment variable has a value that it does not take.
    """
    try:
        import huggingface_hub.file_download  # noqa: F401 (the package's own lazy import prints its errors to stdout)

        yield
    except (ValueError, RuntimeError) as error:  # RuntimeError: a ~user that there is not
        raise CheckpointError(
            f"huggingface_hub cannot use its settings: {str(error).rstrip('.')}. Correct the environment variables "
            "whose names begin with HF_."
        ) from error


@contextmanager
def _translate_errors(repo: str, patterns: Iterable[str]) -> Iterator[None]:
    try:
        check_cancelled()
        with uninterruptible_wait():
            yield
    except (CheckpointError, Cancelled):
        raise
    except Exception as error:  # huggingface_hub's errors, and those of the HTTP client it is built on
        raise _as_checkpoint_error(repo, ", ".join(patterns), error) from error


def _as_checkpoint_error(repo: str, patterns: str, error: Exception) -> CheckpointError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{repo} requires you to accept its licence. Accept it on {_url(repo)}, then run `hf auth login`."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(f"there is no repository {repo} on the hub, or it is private. Check {_url(repo)}.")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return _not_in_repo_error(repo, patterns)
    if isinstance(error, errors.OfflineModeIsEnabled):  # its own text is half a line of advice
        reason = "HF_HUB_OFFLINE is set"
    else:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return CheckpointError(
        f"{patterns} of {repo} is not in the cache ({cache_folder()}) and could not be fetched: {reason}. Try again "
        f"with a network; or download it from {_url(repo)} on another machine and give its path instead of a name, or "
        f"copy {_repo_folder(repo).name} from that machine's cache."
    )


def _not_in_repo_error(repo: str, pattern: str) -> CheckpointError:
    return CheckpointError(f"{repo} has no {pattern}. {_url(repo)}/tree/main lists its files.")


def _url(repo: str) -> str:
    return f"https://huggingface.co/{repo}"


def _repo_folder(repo: str) -> Path:
    """Returns the folder of a repository in the cache."""
    with _explain_settings():
        from huggingface_hub.file_download import repo_folder_name

    return cache_folder() / repo_folder_name(repo_id=repo, repo_type="model")


def cache_folder() -> Path:
    """Returns the folder of huggingface_hub's cache."""
    with _explain_settings():
        from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
