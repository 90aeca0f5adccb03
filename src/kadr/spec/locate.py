"""Finds the files of a model by its name or path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kadr.checkpoints import hub
from kadr.errors import CheckpointError, RequestError
from kadr.models import registry
from kadr.models.registry import Release

PACKAGE_ROOT = Path(__file__).parents[1]
CHECKPOINT_SUFFIXES = {".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin"}
_FLAGS = {
    "spatial upscaler": "--upscaler",
    "temporal upscaler": "--upscaler",
    "text encoder": "--text-encoder",
    registry.LORA: "--lora",
}


@dataclass(frozen=True)
class LocatedModel:
    """The files of a model.

    Args:
        name: the name or path that was given.
        text_encoder: None where none was given and none is beside the model; see `fetch_text_encoder`.
        vae: None where the VAE is in `model`.
        release: the registry's entry; None for a path, whose header decides.
    """

    name: str
    model: Path
    text_encoder: Path | None
    vae: Path | None
    release: Release | None


def locate(model: str | Path, *, text_encoder: str | Path | None = None, vae: str | Path | None = None) -> LocatedModel:
    """Finds the files of a model; a named file that is not on disk is fetched from the hub.

    Args:
        text_encoder, vae: a path or a registry name, instead of the model's own.

    Raises:
        RequestError: an unknown name, or the name of another kind of release.
        CheckpointError: a path that does not exist, or a file that cannot be fetched.
    """
    release = None if is_path(model) else registry.find_release(str(model))
    if release is not None:
        _require_model(release)
    text_encoder_component = None if text_encoder is None else _find_component(text_encoder, "text encoder")
    vae_component = None if vae is None else _find_component(vae, "model", "VAE")
    if vae_component is None and release is not None and release.vae is not None:
        vae_component = registry.RELEASES_BY_NAME[release.vae]
    path = fetch_release(release) if release else _require_existing(model, "model")
    return LocatedModel(
        name=str(model),
        model=path,
        vae=_fetch_if_release(vae_component),
        text_encoder=_fetch_if_release(text_encoder_component) or _text_encoder_beside(path),
        release=release,
    )


def fetch_text_encoder(release: Release | None) -> Path:
    """Returns the text encoder of a model that has none beside it, fetched if it is not on disk.

    Args:
        release: the model's; None for a model that is not in the registry.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    return fetch_release(registry.RELEASES_BY_NAME[(release and release.text_encoder) or registry.DEFAULT_TEXT_ENCODER])


def fetch_upscaler(release: Release) -> Path:
    """Returns the upscaler of a model's second pass, fetched if it is not on disk.

    Raises:
        CheckpointError: it cannot be fetched, or there is none.
    """
    if release.upscaler is None:
        raise CheckpointError(f"no upscaler was released for {release.name}. Give one with --upscaler.")
    return fetch_release(registry.RELEASES_BY_NAME[release.upscaler])


def locate_lora(lora: str | Path) -> Path:
    """Returns the file or folder of a LoRA given by path or registry name, fetched if it is not on disk.

    Raises:
        RequestError: the name is not a LoRA's.
        CheckpointError: the path does not exist, or the file cannot be fetched.
    """
    located = _fetch_if_release(_find_component(lora, registry.LORA))
    assert located is not None
    return located


def check_lora_name(lora: str | Path) -> None:
    """Checks a LoRA's path or name like `locate_lora`, without fetching."""
    _find_component(lora, registry.LORA)


def fetch_release(release: Release) -> Path:
    """Returns the file of a release, or the folder of one with several files, fetched if it is not on disk.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    if release.repo is None:
        return _require_existing(PACKAGE_ROOT / release.file, "bundled file")
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


def _require_model(release: Release) -> None:
    if release.kind != "model":
        raise RequestError(
            f"{release.name} is a {release.kind}, not a model. Give it as {_FLAGS[release.kind]}, and a model "
            "that `kadr models` lists."
        )


def _find_component(name_or_path: str | Path, kind: str, label: str = "") -> Path | Release:
    """Resolves a component to an existing path, or to a release of that kind."""
    release = None if Path(name_or_path).exists() else registry.RELEASES_BY_NAME.get(str(name_or_path))
    if release is None:
        return _require_existing(name_or_path, label or kind)
    if release.kind != kind:
        example = next(entry.name for entry in registry.RELEASES if entry.kind == kind and entry.repo is not None)
        raise RequestError(
            f"{release.name} is a {release.kind}; for the {label or kind} give a path, or a name such as {example}."
        )
    return release


def _fetch_if_release(component: Path | Release | None) -> Path | None:
    return fetch_release(component) if isinstance(component, Release) else component


def _require_existing(path: str | Path, label: str) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"the {label} {path} does not exist. Give an existing path, or a name that `kadr models` lists."
        )
    return path


def _text_encoder_beside(model: Path) -> Path | None:
    """Returns the text encoder beside a model: in the model's folder, or in the folder of its file."""
    folder = model if model.is_dir() else model.parent
    return folder if (folder / "text_encoder").is_dir() else None
