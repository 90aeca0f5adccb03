"""The checkpoint that `kadr quantize` and `kadr convert` read: a path, or a release by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kadr.errors import CheckpointError, RequestError
from kadr.models.registry import Release, find_model_release, find_release
from kadr.spec.locate import fetch_release, is_path
from kadr.validation import expand_home


def find_input(
    source: str, refuse: Callable[[Release], None], stated_release: str | None = None
) -> tuple[Path, Release | None]:
    """Returns the files, and the release where it is named or stated; fetches what is not on disk.

    Args:
        refuse: raises for a release that the command does not take, before anything is fetched.
        stated_release: the name of the release that the user says a path is.

    Raises:
        CheckpointError: the path does not exist, or the release cannot be fetched.
        RequestError: there is no such release, or it is refused.
    """
    if is_path(source):
        path = expand_home(source)
        if not path.exists():
            raise CheckpointError(f"{path} does not exist. Check the path; `kadr models` lists what is known by name.")
        return path, None if stated_release is None else find_model_release(stated_release)
    release = find_release(source)
    if stated_release not in (None, release.name):
        raise RequestError(f"{source} is a release itself; --release is for a file or a folder. Leave it out.")
    refuse(release)
    return fetch_release(release), release
