"""From what a person calls a model to the files it is in."""

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
class ModelFiles:
    """The files of a model.

    Args:
        name: as it was asked for.
        text_encoder: None where none is named and none lies beside the model; see `fetch_text_encoder`.
        vae: None where the VAE is in `model`.
        release: the registry's entry; None for a path, whose header has to tell.
    """

    name: str
    model: Path
    text_encoder: Path | None
    vae: Path | None
    release: Release | None


def locate(model: str | Path, *, text_encoder: str | Path | None = None, vae: str | Path | None = None) -> ModelFiles:
    """Find the files; what is named and not on disk yet is fetched from the hub.

    Args:
        text_encoder, vae: a path or a name of the registry, instead of the model's own.

    Raises:
        RequestError: an unknown name, or that of something else.
        CheckpointError: a path that is not there, or a file that cannot be fetched.
    """
    released = None if is_path(model) else registry.find_release(str(model))
    if released is not None:
        _require_model(released)
    own_text = None if text_encoder is None else _find_component(text_encoder, "text encoder")
    own_vae = None if vae is None else _find_component(vae, "model", "VAE")
    if own_vae is None and released is not None and released.vae is not None:
        own_vae = registry.RELEASES_BY_NAME[released.vae]
    path = fetch_release(released) if released else _require_existing(model, "model")
    return ModelFiles(
        name=str(model),
        model=path,
        vae=_fetch_if_release(own_vae),
        text_encoder=_fetch_if_release(own_text) or _text_encoder_beside(path),
        release=released,
    )


def fetch_text_encoder(release: Release | None) -> Path:
    """The text encoder of a model that has none beside it, fetched from the hub where it is not on disk yet.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    return fetch_release(registry.RELEASES_BY_NAME[(release and release.text_encoder) or registry.DEFAULT_TEXT_ENCODER])


def fetch_upscaler(release: Release) -> Path:
    """The upscaler that a model's second pass needs, fetched from the hub where it is not on disk yet.

    Raises:
        CheckpointError: it cannot be fetched, or there is none.
    """
    if release.upscaler is None:
        raise CheckpointError(f"no upscaler was released for {release.name}. Give one with --upscaler.")
    return fetch_release(registry.RELEASES_BY_NAME[release.upscaler])


def locate_lora(lora: str | Path) -> Path:
    """The file, or folder, of a LoRA that is given by its path or by a name of the registry.

    Raises:
        RequestError: it is the name of something else.
        CheckpointError: it is not there, or cannot be fetched.
    """
    located = _fetch_if_release(_find_component(lora, registry.LORA))
    assert located is not None
    return located


def check_lora_name(lora: str | Path) -> None:
    """As `locate_lora`, and nothing is fetched."""
    _find_component(lora, registry.LORA)


def fetch_release(release: Release) -> Path:
    """The file of an entry, or the folder where it is of many, fetched from the hub where it is not on disk yet.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    if release.repo is None:
        return _require_existing(PACKAGE_ROOT / release.file, "bundled file")
    if _is_pattern(release):
        return hub.fetch_folder(release.repo, release.file_patterns)
    return hub.fetch(release.repo, release.file)


def find_release_on_disk(release: Release) -> Path | None:
    """As `fetch_release`, if all of it is here already; the network is not asked."""
    if release.repo is None:
        path = PACKAGE_ROOT / release.file
        return path if path.is_file() else None
    if _is_pattern(release):
        return hub.cached_folder(release.repo, release.file_patterns)
    return hub.cached_file(release.repo, release.file)


def is_path(name_or_path: str | Path) -> bool:
    """Whether this is a path, and not a name."""
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
            f"{release.name} is a {release.kind}, and no model. Give it as {_FLAGS[release.kind]}, and a model "
            "that `kadr models` lists."
        )


def _find_component(name_or_path: str | Path, kind: str, label: str = "") -> Path | Release:
    """A part that is given: a path that is there, or an entry of that kind."""
    released = None if Path(name_or_path).exists() else registry.RELEASES_BY_NAME.get(str(name_or_path))
    if released is None:
        return _require_existing(name_or_path, label or kind)
    if released.kind != kind:
        known = [entry.name for entry in registry.RELEASES if entry.kind == kind and entry.repo is not None]
        raise RequestError(
            f"{released.name} is a {released.kind}; for the {label or kind} give a path, or a name such as {known[0]}."
        )
    return released


def _fetch_if_release(component: Path | Release | None) -> Path | None:
    return fetch_release(component) if isinstance(component, Release) else component


def _require_existing(path: str | Path, label: str) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"the {label} is not at {path}. Give an existing path, or a name that `kadr models` lists."
        )
    return path


def _text_encoder_beside(model: Path) -> Path | None:
    """A text encoder that came with the model: in the same folder, or in the folder that the model is."""
    folder = model if model.is_dir() else model.parent
    return folder if (folder / "text_encoder").is_dir() else None
