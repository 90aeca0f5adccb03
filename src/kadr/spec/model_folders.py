"""Folders of models, as ComfyUI arranges them: a name is looked up in them and never leads outside.

The look-up takes names from anyone, such as a server's clients. It refuses absolute paths and `..`, and follows a
symbolic link only to a place inside the same folders.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kadr.errors import CheckpointError, KadrWarning, RequestError
from kadr.quoting import quote
from kadr.spec.model_dirs import configured_dirs, read_extra_model_paths
from kadr.validation import check_path, expand_home

# Names of ComfyUI's folders. Those of a role are searched in the order of its tuple.
MODEL_KINDS = ("checkpoints", "diffusion_models", "unet")
VAE_KINDS = ("vae", *MODEL_KINDS)  # a checkpoint has a VAE too, and so has a diffusers folder
TEXT_ENCODER_KINDS = ("text_encoders", "clip")
LORA_KINDS = ("loras",)
UPSCALER_KINDS = ("latent_upscale_models",)
FOLDER_KINDS = (*MODEL_KINDS, *TEXT_ENCODER_KINDS, "vae", *LORA_KINDS, *UPSCALER_KINDS)
OPTIONAL_SUFFIXES = (".safetensors", ".gguf")  # endings that a name may leave out
# Pickles are found too, so that the error for one says what it is.
CHECKPOINT_SUFFIXES = {*OPTIONAL_SUFFIXES, ".ckpt", ".pt", ".pth", ".bin"}
MAX_NAME_PARTS, MAX_PART_BYTES = 16, 240  # with an ending, a part still fits the 255 bytes of most file systems
MAX_ENTRIES = 10_000  # of a folder that are looked at
# A folder with one of these in it is a model in several files. A `text_encoder` may lie beside the file of a model.
_FOLDER_MARKERS = (
    *("model_index.json", "config.json", "adapter_config.json"),
    *("adapter_model.safetensors", "pytorch_lora_weights.safetensors"),
    *("transformer", "vae", "latent_upsampler"),
)
_TEXT_ENCODER_MARKERS = ("config.json", "text_encoder")


@dataclass(frozen=True)
class ModelFolder:
    """A folder with models of one kind, a name of `FOLDER_KINDS`."""

    kind: str
    path: Path


@dataclass(frozen=True)
class FolderEntry:
    """A model in a folder.

    Args:
        kind: see `ModelFolder`.
        name: for `ModelFolders.find`: the path in the folder, with slashes and with its ending.
        path: the file, or the folder of a model in several files.
        problem: the reason why it cannot be looked up; None where it can.
    """

    kind: str
    name: str
    path: Path
    problem: str | None = None


@dataclass(frozen=True)
class ModelFolders:
    """Folders of models, in the order in which they are searched.

    Args:
        folders: by kind.
        missing: folders that the environment or a config file names and that have no models, such as those of a disk
            that is not there now.
    """

    folders: tuple[ModelFolder, ...] = ()
    missing: tuple[Path, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.folders or self.missing)

    @classmethod
    def open(cls, dirs: Iterable[str | Path] = ()) -> ModelFolders:
        """Opens the folders that are named, then those of `configured_dirs`.

        Args:
            dirs: folders arranged as ComfyUI's `models`, or files like its extra_model_paths.yaml.

        Raises:
            RequestError: one of `dirs` does not exist or has no folder of any kind; or a config file cannot be read.
        """
        folders: list[ModelFolder] = []
        missing: list[Path] = []
        for is_configured, paths in ((False, _check_dirs(dirs)), (True, configured_dirs())):
            for path in paths:
                found = _find_kind_folders(path)
                if not found and not is_configured:
                    raise _no_folders_error(path)
                folders += [folder for folder in found if folder not in folders]
                missing += [] if found else [path]
        return cls(tuple(folders), tuple(missing))

    def find(self, name: str, kinds: Sequence[str]) -> Path | None:
        """Returns the model of a name, in the first folder that has it; None if none has.

        Args:
            name: a path inside a folder of one of the kinds; .safetensors and .gguf may be left out.
            kinds: names of `FOLDER_KINDS`, in the order in which they are searched.

        Returns:
            A file or a folder below one of the folders; symbolic links in it lead nowhere else.

        Raises:
            RequestError: the name is absolute or has `..` in it, or it fits several files of a folder.
            CheckpointError: a symbolic link leads out of the folders.
        """
        parts = split_name(name)
        for folder in (folder for kind in kinds for folder in self.folders if folder.kind == kind):
            exact = folder.path.joinpath(*parts)
            candidates = (exact, *(exact.with_name(exact.name + suffix) for suffix in OPTIONAL_SUFFIXES))
            present = [path for path in candidates if _is_model(path, folder.kind)]
            if len(present) > 1 and present[0] != exact:
                names = " and ".join(path.name for path in present)
                raise RequestError(f"{folder.path} has {names}. Give the name with its ending.")
            if present:
                if problem := self._find_escape(present[0]):
                    raise CheckpointError(problem)
                return present[0]
        return None

    def kind_of(self, path: Path) -> str:
        """Returns the kind of the folder that has a path which `find` returned."""
        return next(folder.kind for folder in self.folders if path.is_relative_to(folder.path))

    def describe(self) -> str:
        """Names the folders, for an error: those that were searched, and those that are missing."""
        searched = ", ".join(dict.fromkeys(str(folder.path.parent) for folder in self.folders))
        missing = f"; not there: {', '.join(map(str, self.missing))}" if self.missing else ""
        return f"{searched or 'none'}{missing}"

    def list_entries(self) -> Iterator[FolderEntry]:
        """Yields the models in every folder, each under the name that `find` takes.

        A name that an earlier folder of the kind has too is left out, because it leads to the file there. A folder with
        more than `MAX_ENTRIES` entries gives a warning.
        """
        seen: set[tuple[str, str]] = set()
        for folder in self.folders:
            for path in _walk_models(folder.path, folder.kind):
                name = path.relative_to(folder.path).as_posix()
                if (folder.kind, name) not in seen:
                    seen.add((folder.kind, name))
                    yield FolderEntry(folder.kind, name, path, self._find_problem(name, path))

    def _find_problem(self, name: str, path: Path) -> str | None:
        if "\\" in name:
            return f"{path} has a backslash in its name, which separates folders. Rename it."
        try:
            split_name(name)
        except RequestError as error:
            return str(error)
        return self._find_escape(path)

    @cached_property
    def _real_roots(self) -> tuple[Path, ...]:
        return tuple(Path(os.path.realpath(folder.path)) for folder in self.folders)

    def _find_escape(self, path: Path) -> str | None:
        """Returns the reason to refuse a path that leads, itself or by a file in it, out of the folders."""
        for number, item in enumerate(_with_descendants(path)):
            if number > MAX_ENTRIES:
                return f"{path} has more than {MAX_ENTRIES:,} files, so it is not a model. Name a folder in it."
            real = Path(os.path.realpath(item))
            if not any(real.is_relative_to(root) for root in self._real_roots):
                return (
                    f"{item} is a link that leads out of the folders of models. Put the file itself there, or add the "
                    "folder of the file to an extra_model_paths.yaml."
                )
        return None


NO_FOLDERS = ModelFolders()


def split_name(name: str) -> tuple[str, ...]:
    """Splits a name at / and \\ into its parts, each a plain file name.

    Raises:
        RequestError: it is absolute, has an empty part or one such as `..`, or cannot be a file's name.
    """
    parts = tuple(name.replace("\\", "/").split("/"))
    is_plain = all(
        part.strip(" .") == part and part.isprintable() and ":" not in part and 0 < _count_bytes(part) <= MAX_PART_BYTES
        for part in parts
    )
    if not is_plain or len(parts) > MAX_NAME_PARTS:
        raise RequestError(
            f"{quote(name)} is not the name of a model: it must be a file's name, or its path inside a folder of "
            "models, without `..` and not absolute."
        )
    return parts


def is_name(text: str) -> bool:
    """Returns whether `split_name` takes a text."""
    try:
        return bool(split_name(text))
    except RequestError:
        return False


def _count_bytes(part: str) -> int:
    return len(part.encode("utf-8", "surrogatepass"))


def _check_dirs(dirs: Any) -> list[Path]:
    if isinstance(dirs, str | Path) or not isinstance(dirs, Iterable):
        raise RequestError(f"models_dirs is {quote(dirs)}; it must be a list of folders, such as ['~/ComfyUI/models'].")
    paths = list(dirs)
    for path in paths:
        check_path("a folder of models", path)
    return [expand_home(path) for path in paths]


def _find_kind_folders(path: Path) -> list[ModelFolder]:
    """Returns the folders of every kind: of a file like extra_model_paths.yaml, of `models`, or of ComfyUI itself."""
    if path.suffix.lower() in (".yaml", ".yml") and os.path.isfile(path):
        pairs = list(read_extra_model_paths(path))
        return [ModelFolder(kind, folder) for kind, folder in pairs if kind in FOLDER_KINDS and os.path.isdir(folder)]
    for home in (path, path / "models"):
        found = [ModelFolder(kind, home / kind) for kind in FOLDER_KINDS if os.path.isdir(home / kind)]
        if found:
            return found
    return []


def _no_folders_error(path: Path) -> RequestError:
    if not os.path.exists(path):
        return RequestError(f"the folder of models {path} does not exist. Create it, or name another.")
    return RequestError(
        f"{path} has none of the folders {', '.join(FOLDER_KINDS)}. Name a folder that is arranged as ComfyUI's "
        "models, or an extra_model_paths.yaml."
    )


def _is_model(path: Path, kind: str) -> bool:
    """Returns whether a path is a file of weights, or a folder of a model in several files."""
    if path.is_dir():
        markers = _TEXT_ENCODER_MARKERS if kind in TEXT_ENCODER_KINDS else _FOLDER_MARKERS
        return any((path / marker).exists() for marker in markers)
    return path.suffix.lower() in CHECKPOINT_SUFFIXES and path.is_file()


def _walk_models(root: Path, kind: str) -> Iterator[Path]:
    """Yields the models below a folder by name, and looks at `MAX_ENTRIES` entries at most; follows no link to a folder
    that is not a model itself."""
    number = 0
    for folder, subfolders, files in os.walk(root):
        paths = {name: Path(folder, name) for name in (*subfolders, *files)}
        models = sorted(name for name, path in paths.items() if _is_model(path, kind) or _is_dead_link(path))
        subfolders[:] = sorted(name for name in subfolders if name not in models and not name.startswith("."))
        number += len(subfolders) + len(files)
        yield from (paths[name] for name in models)
        if number > MAX_ENTRIES:
            warnings.warn(
                f"{root} has more than {MAX_ENTRIES:,} files; the rest is not listed", KadrWarning, stacklevel=2
            )
            return


def _is_dead_link(path: Path) -> bool:
    return path.suffix.lower() in CHECKPOINT_SUFFIXES and path.is_symlink() and not path.exists()


def _with_descendants(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir():
        for folder, subfolders, files in os.walk(path):
            yield from (Path(folder, name) for name in (*subfolders, *files))
