"""Schema numbers of what kadr stores: an older layout is upgraded when it is read, a newer one is refused by name.

To change a layout, append to its `upgrades` a pure function from the data before to the data after: that raises its
number. docs/reference/stored-files.md lists the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kadr.errors import CheckpointError, KadrError, MediaError, RequestError
from kadr.quoting import quote
from kadr.validation import check_bool
from kadr.version import __version__

FIRST_NUMBER = 1  # that of data without a number: kadr wrote none at first
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]

# Caches are never upgraded or refused: the number is part of a file's name, so another one is another file.
PROMPT_CACHE_NUMBER = 1
CALIBRATION_NUMBER = 1
EXAMPLE_CACHE_NUMBER = 3
PREVIEW_CACHE_NUMBER = 1

# A newer database is refused; an older one is upgraded by `jobs.database`, in SQL.
JOBS_DATABASE_NUMBER = 2


@dataclass(frozen=True)
class Schema:
    """The layout of one kind of stored data.

    Args:
        kind: noun for the data in errors.
        error: class of the errors.
        upgrades: upgrades[n - 1] turns data of number n into data of number n + 1; neither contains the number.
        key: key of the number in the data.
    """

    kind: str
    error: type[KadrError]
    upgrades: tuple[Upgrade, ...] = ()
    key: str = "schema"

    @property
    def number(self) -> int:
        """The current number, in which this kadr writes."""
        return FIRST_NUMBER + len(self.upgrades)

    def stamp(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns data of the current layout with its number, as it is stored."""
        return {self.key: self.number, **data}

    def upgrade(self, data: Mapping[str, Any], path: Path | None = None) -> dict[str, Any]:
        """Returns stored data in the current layout, with the current number.

        Args:
            path: the file with the data, for errors.

        Raises:
            KadrError: as `read_number`.
        """
        found = self.read_number(data, path)
        upgraded = {name: value for name, value in data.items() if name != self.key}
        for upgrade in self.upgrades[found - FIRST_NUMBER :]:
            upgraded = upgrade(upgraded)
        return self.stamp(upgraded)

    def read_number(self, data: Mapping[str, Any], path: Path | None = None) -> int:
        """Returns the number of stored data.

        Raises:
            KadrError: of the class `error`: a newer kadr wrote the data, or the number is not one.
        """
        found = data.get(self.key, FIRST_NUMBER)
        subject = f"the {self.kind}" if path is None else f"the {self.kind} in {path}"
        if not isinstance(found, int) or isinstance(found, bool) or found < FIRST_NUMBER:
            raise self.error(
                f"{subject} has the schema number {quote(found)}; it must be a whole number from {FIRST_NUMBER} to "
                f"{self.number}. Restore it: it was changed."
            )
        if found > self.number:
            raise self.error(
                f"{subject} has the schema number {quote(found)}; kadr {__version__} reads numbers up to "
                f"{self.number}. A "
                "newer kadr wrote it: update kadr."
            )
        return found


def _put_video_under_own_key(identity: dict[str, Any]) -> dict[str, Any]:
    """Window folder 1 -> 2: the metadata of the video, which has a number of its own, is an object in the file."""
    return {"video": identity}


def _name_samplers(request: dict[str, Any]) -> dict[str, Any]:
    """Request 1 -> 2: each pass names its sampler, where `stochastic` was true, false or null.

    Raises:
        RequestError: `stochastic` is none of these.
    """
    if isinstance(request.get("second_pass"), dict):
        request = {**request, "second_pass": _name_samplers(request["second_pass"])}
    if "stochastic" not in request:
        return request
    upgraded = {name: value for name, value in request.items() if name != "stochastic"}
    if (is_stochastic := request["stochastic"]) is None:
        return upgraded
    check_bool("stochastic", is_stochastic)
    return {**upgraded, "sampler": "euler_stochastic" if is_stochastic else "euler"}


def _remember_no_components(fields: dict[str, Any]) -> dict[str, Any]:
    """GGUF header 1 -> 2: it may say where the VAE and the text encoder come from; an older one does not."""
    return fields


def _keep_absolute_paths(metadata: dict[str, Any]) -> dict[str, Any]:
    """Video metadata 1 -> 2: paths beside the video may be relative to it; an older file has absolute ones."""
    return metadata


# A request that a user writes has no number either: an upgrade must leave fields of later numbers as they are.
REQUEST = Schema("request", RequestError, upgrades=(_name_samplers,))
VIDEO_METADATA = Schema("video metadata", MediaError, upgrades=(_keep_absolute_paths,))
LATENTS = Schema("latents", CheckpointError)
WINDOW_FOLDER = Schema("window folder", CheckpointError, upgrades=(_put_video_under_own_key,))
BATCH_ROW = Schema("row of a batch", CheckpointError)
TRAINING_STATE = Schema("training state", CheckpointError)
GGUF = Schema("GGUF header", CheckpointError, upgrades=(_remember_no_components,), key="kadr.schema")


def upgrade_video_metadata(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Upgrades the metadata of a video and the request in it.

    Args:
        path: the file with the metadata, for errors.

    Raises:
        MediaError, RequestError: a newer kadr wrote it.
    """
    upgraded = VIDEO_METADATA.upgrade(metadata, path)
    if isinstance(request := upgraded.get("request"), Mapping):
        upgraded["request"] = REQUEST.upgrade(request, path)
    return upgraded
