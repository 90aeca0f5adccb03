"""The checkpoint that `kadr quantize` and `kadr convert` read: a path, or a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kadr.errors import RequestError
from kadr.models.registry import Release, find_model_release
from kadr.spec.locate import fetch_release, locate_file
from kadr.spec.model_folders import ModelFolders


def find_input(
    source: str,
    refuse: Callable[[Release], None],
    *,
    stated_release: str | None = None,
    models_dirs: Sequence[str] = (),
) -> tuple[Path, Release | None]:
    """Returns the files, and the release where it is named or stated; fetches what is not on disk.

    Args:
        source: a path, the name of a release, or a name in the folders of models.
        refuse: raises for a release that the command does not take, before anything is fetched.
        stated_release: the name of the release that the user says a path is.
        models_dirs: as for `ModelFolders.open`.

    Raises:
        CheckpointError: the path does not exist, or the release cannot be fetched.
        RequestError: there is no such name, or it is refused.
    """
    path, release = locate_file(source, ModelFolders.open(models_dirs))
    if path is not None:
        return path, None if stated_release is None else find_model_release(stated_release)
    assert release is not None
    if stated_release not in (None, release.name):
        raise RequestError(f"{source} is a release itself; --release is for a file or a folder. Leave it out.")
    refuse(release)
    return fetch_release(release), release
