"""Finds the files of a model by name or path, without fetching anything; and fetches those of a release."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from kadr.checkpoints import hub
from kadr.errors import CheckpointError, KadrWarning, RequestError
from kadr.models import registry
from kadr.models.registry import Release
from kadr.quoting import quote
from kadr.spec.model_folders import (
    CHECKPOINT_SUFFIXES,
    LORA_KINDS,
    MODEL_KINDS,
    NO_FOLDERS,
    TEXT_ENCODER_KINDS,
    UPSCALER_KINDS,
    VAE_KINDS,
    ModelFolders,
    is_name,
)
from kadr.validation import check_path, expand_home, near_names

PACKAGE_ROOT = Path(__file__).parents[1]
MODEL, SECOND_MODEL, VAE, UPSCALER_ROLE, TEXT_ENCODER_ROLE = "model", "second model", "VAE", "upscaler", "text encoder"
TOKENIZER_ROLE = "tokenizer"
_KINDS = {
    MODEL: ("model",),
    SECOND_MODEL: ("model",),
    VAE: ("model",),
    UPSCALER_ROLE: ("spatial upscaler", "temporal upscaler"),
    TEXT_ENCODER_ROLE: ("text encoder",),
    registry.LORA: (registry.LORA,),
}
# Role -> kinds of the folders of models that are searched for it, in this order.
KINDS_BY_ROLE: Mapping[str, tuple[str, ...]] = {
    MODEL: MODEL_KINDS,
    SECOND_MODEL: MODEL_KINDS,
    VAE: VAE_KINDS,
    UPSCALER_ROLE: UPSCALER_KINDS,
    TEXT_ENCODER_ROLE: TEXT_ENCODER_KINDS,
    registry.LORA: LORA_KINDS,
}
_FLAGS = {
    "spatial upscaler": "--upscaler",
    "temporal upscaler": "--upscaler",
    "text encoder": "--text-encoder",
    registry.LORA: "--lora",
}


@dataclass(frozen=True)
class ModelComponent:
    """A component of a model, wherever it is.

    Args:
        role: "model", "second model", "VAE", "upscaler", "text encoder", "tokenizer" or "LoRA".
        name: the path or registry name that it was given by; "beside the model" or "in the model" for a text encoder
            there.
        path: None where it is not on disk.
        release: the registry's entry; of a path, the release that it was detected or stated to be, or None.
        strengths: of a LoRA, in the first and the second pass.
    """

    role: str
    name: str
    path: Path | None
    release: Release | None = None
    strengths: tuple[float, float] | None = None

    @property
    def known_release(self) -> Release:
        """The registry's entry.

        Raises:
            CheckpointError: it was given by a path.
        """
        if self.release is None:
            raise CheckpointError(f"the {self.role} {self.name} is not on disk. Give an existing path.")
        return self.release

    @property
    def bytes_to_fetch(self) -> int | None:
        """Bytes to fetch by the registry; 0 for what is on disk, None where the registry has no size."""
        if self.path is not None:
            return 0
        return None if self.release is None else self.release.size_bytes

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, with the name of the release."""
        return {
            "role": self.role,
            "name": self.name,
            "release": self.release.name if self.release else None,
            "path": self.path and str(self.path),
            "bytes_to_fetch": self.bytes_to_fetch,
            "strengths": self.strengths,
        }


class ModelFile(NamedTuple):
    """The path of a file or folder, or the release that a name means."""

    path: Path | None = None
    release: Release | None = None


def locate(name_or_path: str | Path, role: str, folders: ModelFolders = NO_FOLDERS) -> ModelComponent:
    """Finds a component by name or path; a released one need not be on disk.

    An existing path comes first, then a release, then the folders of models: a release means the same weights on every
    machine, whatever its folders have.

    Args:
        role: as in `ModelComponent`.
        folders: where a name is looked up that is neither a path nor a release.

    Raises:
        RequestError: an unknown name, or the name of another kind of release.
        CheckpointError: a path that does not exist, or a name that leads out of the folders.
    """
    path, release = look_up(name_or_path, (role,), folders, label=f"the {role}")
    name = str(name_or_path)
    if release is not None:
        if release.kind not in _KINDS[role]:
            raise _wrong_kind_error(release, role)
        return ModelComponent(role, name, find_release_on_disk(release), release)
    if path is not None:
        return ModelComponent(role, name, path)
    if role in (MODEL, SECOND_MODEL, UPSCALER_ROLE) and not is_path(name_or_path):
        raise unknown_name_error(name, role, folders)
    raise _absent_error(name_or_path, role, folders)


def locate_file(name_or_path: str, folders: ModelFolders = NO_FOLDERS) -> ModelFile:
    """Finds a file by path or name as `locate` does, whatever its role.

    Where folders of several roles have the name, a model comes first, and a warning names the others.

    Raises:
        RequestError, CheckpointError: as `locate`.
    """
    found = look_up(name_or_path, tuple(KINDS_BY_ROLE), folders, label="the path")
    if found == ModelFile():
        if is_path(name_or_path):
            raise _absent_error(name_or_path, "file", folders)
        raise unknown_name_error(name_or_path, "model", folders)
    return found


def look_up(name_or_path: str | Path, roles: Sequence[str], folders: ModelFolders, *, label: str) -> ModelFile:
    """Returns the existing path, or what `look_up_name` returns.

    Args:
        label: noun for the component, in errors.

    Raises:
        RequestError, CheckpointError: as `look_up_name`; or no file can have this path.
    """
    check_path(label, name_or_path)
    path = expand_home(name_or_path)
    if os.path.exists(path):
        return ModelFile(path)
    return look_up_name(str(name_or_path), folders, roles)


def look_up_name(name: str, folders: ModelFolders, roles: Sequence[str] = tuple(KINDS_BY_ROLE)) -> ModelFile:
    """Returns the release of this name, else the file in the folders of models; both None where there is neither.

    Raises:
        RequestError: the name fits several files of a folder.
        CheckpointError: it leads out of the folders.
    """
    found = _find_in_folders(name, roles, folders)
    release = registry.RELEASES_BY_NAME.get(name)
    if release is None:
        return ModelFile(found)
    if found is not None:
        _warn_of_clash(name, found)
    return ModelFile(release=release)


def _find_in_folders(name: str, roles: Sequence[str], folders: ModelFolders) -> Path | None:
    """Returns the file of this name of the first role that has it; warns of those of the others."""
    components = [locate_in_folders(name, role, folders) for role in roles]
    paths = list(dict.fromkeys(component.path for component in components if component is not None))
    if len(paths) > 1:
        others = " and ".join(map(str, paths[1:]))
        warnings.warn(f"{name} is {paths[0]} here; for {others} pass that path.", KadrWarning, stacklevel=4)
    return paths[0] if paths else None


def locate_in_folders(name: str, role: str, folders: ModelFolders) -> ModelComponent | None:
    """Finds a component by its name in the folders of models alone; never by a path or outside of them.

    Returns:
        None where the folders have no such name, or it is no name; see `model_folders.split_name`.

    Raises:
        RequestError: the name fits several files.
        CheckpointError: a symbolic link leads out of the folders.
    """
    path = folders.find(name, KINDS_BY_ROLE[role]) if folders and is_name(name) else None
    return None if path is None else ModelComponent(role, name, path)


def _warn_of_clash(name: str, path: Path) -> None:
    remedy = "Rename it" if path.is_dir() else f"To open the file, write {path.name}"
    warnings.warn(f"{name} is a release, which is used, and also {path}. {remedy}.", KadrWarning, stacklevel=4)


def unknown_name_error(name: str, noun: str, folders: ModelFolders = NO_FOLDERS) -> RequestError:
    """Returns the error for a name that neither a release nor the folders have, with similar names of releases."""
    if not folders:
        return registry.no_such_release_error(name)
    similar = near_names(name, registry.RELEASES_BY_NAME)
    hint = f" Did you mean {', '.join(similar)}?" if similar else ""
    return RequestError(
        f"there is no {noun} named {quote(name)}, neither a release nor in the folders of models "
        f"({folders.describe()}).{hint} `kadr models` lists both; to open a file, pass its path."
    )


def _absent_error(path: str | Path, noun: str, folders: ModelFolders) -> CheckpointError:
    searched = f" The folders of models do not have it either: {folders.describe()}." if folders else ""
    return CheckpointError(
        f"the {noun} {expand_home(path)} does not exist. Give an existing path, or a name that `kadr models` lists."
        f"{searched}"
    )


def _wrong_kind_error(release: Release, role: str) -> RequestError:
    if role in (MODEL, SECOND_MODEL):
        if release.kind not in _FLAGS:
            return RequestError(f"{release.name} is a {release.kind}, not a model. Give one that `kadr models` lists.")
        return RequestError(
            f"{release.name} is a {release.kind}, not a model. Give it as {_FLAGS[release.kind]}, and a model "
            "that `kadr models` lists."
        )
    example = next(entry.name for entry in registry.RELEASES if entry.kind in _KINDS[role] and entry.repo is not None)
    return RequestError(f"{release.name} is a {release.kind}; for the {role} give a path, or a name such as {example}.")


def with_stated_release(model: ModelComponent, name: str | None) -> ModelComponent:
    """Returns a model with the release that the user says it is.

    Raises:
        RequestError: there is no such release, or the model was given by the name of another one.
    """
    if name is None:
        return model
    release = registry.find_model_release(name)
    if model.release not in (None, release):
        raise RequestError(
            f"{model.name} is a release itself, and --release says it is {name}. --release is for a file or a folder: "
            "leave it out."
        )
    return replace(model, release=release)


def locate_release(name: str, role: str) -> ModelComponent:
    """Returns a component that the registry names."""
    release = registry.RELEASES_BY_NAME[name]
    return ModelComponent(role, name, find_release_on_disk(release), release)


def locate_text_encoder(
    name_or_path: str | Path | None,
    model: ModelComponent,
    release: Release | None,
    folders: ModelFolders = NO_FOLDERS,
    *,
    is_in_model: bool = False,
) -> ModelComponent:
    """Finds the text encoder: the one that is named, or is in the model's file, or beside it, else the registry's.

    Args:
        name_or_path: also the name of a released model, which means that model's text encoder.
        release: the model's; None for a model that is not in the registry.
        folders: as for `locate`.
        is_in_model: the model's file has a text encoder in it.

    Raises:
        RequestError, CheckpointError: as `locate`.
    """
    if name_or_path is not None:
        named = registry.RELEASES_BY_NAME.get(str(name_or_path))
        if named is not None and named in registry.MODEL_RELEASES and not Path(name_or_path).exists():
            return text_encoder_of_release(named)
        return locate(name_or_path, TEXT_ENCODER_ROLE, folders)
    if is_in_model and model.path is not None:
        return ModelComponent(TEXT_ENCODER_ROLE, "in the model", model.path)
    if (folder := text_encoder_folder(model)) is not None:
        return ModelComponent(TEXT_ENCODER_ROLE, "beside the model", folder)
    return locate_release((release and release.text_encoder) or registry.DEFAULT_TEXT_ENCODER, TEXT_ENCODER_ROLE)


def text_encoder_of_release(release: Release) -> ModelComponent:
    """Returns the text encoder of a released model; that of a bundled one lies beside its file."""
    if release.text_encoder is not None:
        return locate_release(release.text_encoder, TEXT_ENCODER_ROLE)
    return ModelComponent(TEXT_ENCODER_ROLE, release.name, fetch_release(release).parent)


def text_encoder_folder(model: ModelComponent) -> Path | None:
    """Returns the folder with a `text_encoder` in it that a model on disk is, or lies in; None if there is none."""
    if model.path is None:
        return None
    folder = model.path if model.path.is_dir() else model.path.parent
    return folder if (folder / "text_encoder").is_dir() else None


def fetch_release(release: Release) -> Path:
    """Returns the file of a release, or the folder of one with several files, fetched if it is not on disk.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    if release.repo is None:
        path = PACKAGE_ROOT / release.file
        if not path.exists():
            raise _absent_error(path, "bundled file", NO_FOLDERS)
        return path
    if _is_pattern(release):
        return hub.fetch_folder(release.repo, release.file_patterns)
    return hub.fetch(release.repo, release.file)


def find_release_on_disk(release: Release) -> Path | None:
    """Returns the path of a release like `fetch_release` if all of it is on disk, else None. Uses no network."""
    if release.repo is None:
        path = PACKAGE_ROOT / release.file
        return path if path.is_file() else None
    if _is_pattern(release):
        return hub.cached_folder(release.repo, release.file_patterns)
    return hub.cached_file(release.repo, release.file)


def is_path(name_or_path: str | Path) -> bool:
    """Returns whether this is a path, and not a registry name."""
    text = str(name_or_path)
    return (
        isinstance(name_or_path, Path)
        or "/" in text
        or "\\" in text
        or Path(text).suffix in CHECKPOINT_SUFFIXES
        or Path(text).exists()
    )


def _is_pattern(release: Release) -> bool:
    return "*" in release.file
