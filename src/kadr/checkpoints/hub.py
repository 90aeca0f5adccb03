"""Checkpoints from the Hugging Face hub. Nothing else in kadr touches the network.

What is in the local cache is used without asking; a download that broke off goes on where it stopped.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from kadr.errors import CheckpointError

SPARE = 1 << 30  # bytes that a download leaves free on the disk


def on_disk(repo: str, file: str) -> Path | None:
    """Where a file lies in the cache, if it is there whole. The network is not asked."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file)
    return Path(found) if isinstance(found, str) else None


def fetch(repo: str, file: str, *, size_bytes: int | None = None) -> Path:
    """Bring a file to this machine, unless it is here.

    Args:
        repo: such as "Lightricks/LTX-Video".
        size_bytes: of the file, if known; else the hub is asked.

    Raises:
        CheckpointError: it is not in the cache, and there is no network, no such file, no leave or no room to take it.
    """
    from huggingface_hub import hf_hub_download

    if (found := on_disk(repo, file)) is not None:
        return found
    try:
        _check_room(f"{file} of {repo}", _missing_bytes(repo, [file]) if size_bytes is None else size_bytes)
        return Path(hf_hub_download(repo, file))
    except CheckpointError:
        raise
    except Exception as error:  # the library's own errors, and those of whichever HTTP client it is built on
        raise _explained(repo, file, error) from error


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
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=True))
        if _is_whole(folder, patterns):
            return folder
    except LocalEntryNotFoundError:
        pass
    wanted = ", ".join(patterns)
    try:
        _check_room(f"{wanted} of {repo}", _missing_bytes(repo, patterns))
        return Path(snapshot_download(repo, allow_patterns=list(patterns)))
    except CheckpointError:
        raise
    except Exception as error:  # as in `fetch`
        raise _explained(repo, wanted, error) from error


def _is_whole(folder: Path, patterns: Sequence[str]) -> bool:
    """Older versions of the library also hand out what a broken download left behind."""
    held = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    if not all(fnmatch.filter(held, pattern) for pattern in patterns):
        return False
    for index in (folder / name for name in fnmatch.filter(held, "*.index.json")):
        shards = json.loads(index.read_text("utf-8")).get("weight_map", {}).values()
        if not all(index.with_name(shard).is_file() for shard in set(shards)):
            return False
    return True


def _missing_bytes(repo: str, patterns: Sequence[str]) -> int:
    """What is still to be fetched, by the hub's own count."""
    from huggingface_hub import HfApi

    files = HfApi().model_info(repo, files_metadata=True).siblings or ()
    return sum(
        file.size or 0
        for file in files
        if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in patterns)
        and on_disk(repo, file.rfilename) is None
    )


def _check_room(what: str, needed: int) -> None:
    cache = _cache()
    free = shutil.disk_usage(next(place for place in (cache, *cache.parents) if place.exists())).free
    if free < needed + SPARE:
        raise CheckpointError(
            f"{what} takes {needed / 1e9:.1f} GB, and {cache} has {free / 1e9:.1f} GB free, of which "
            f"{SPARE / 1e9:.0f} GB stay so. Free some, or set HF_HOME to a folder on a larger disk."
        )


def _explained(repo: str, wanted: str, error: Exception) -> CheckpointError:
    from huggingface_hub import errors

    url = f"https://huggingface.co/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(f"{repo} asks for its licence to be accepted. Do so on {url}, then run `hf auth login`.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(f"there is no repository {repo} on the hub, or it is private. Check {url}.")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return CheckpointError(f"{repo} has no {wanted}. {url}/tree/main shows what it has.")
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return CheckpointError(
        f"{wanted} of {repo} is not in the cache ({_cache()}) and could not be fetched: {reason}. "
        f"Try again with a network; or download it from {url} on another machine and give its path instead of a name."
    )


def _cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
