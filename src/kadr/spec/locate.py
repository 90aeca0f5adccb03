"""From what a person calls a model to the files it is in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kadr.checkpoints import hub
from kadr.errors import CheckpointError, RequestError
from kadr.models import registry
from kadr.models.registry import Release

PACKAGE = Path(__file__).parents[1]
SUFFIXES = {".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin"}
_FLAGS = {
    "spatial upscaler": "--upscaler",
    "temporal upscaler": "--upscaler",
    "text encoder": "--text-encoder",
    registry.LORA: "--lora",
}


@dataclass(frozen=True)
class Found:
    """The files of a model.

    Args:
        name: as it was asked for.
        text_encoder: None where none is named and none lies beside the model; see `fetched_text`.
        vae: None where the VAE is in `model`.
        release: the registry's entry; None for a path, whose header has to tell.
    """

    name: str
    model: Path
    text_encoder: Path | None
    vae: Path | None
    released: Release | None


def locate(model: str | Path, *, text_encoder: str | Path | None = None, vae: str | Path | None = None) -> Found:
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
    own_text = None if text_encoder is None else _part(text_encoder, "text encoder")
    own_vae = None if vae is None else _part(vae, "model", "VAE")
    if own_vae is None and released is not None and released.vae is not None:
        own_vae = registry.RELEASES_BY_NAME[released.vae]
    path = released_file(released) if released else _existing(model, "model")
    return Found(
        name=str(model),
        model=path,
        vae=_fetched(own_vae),
        text_encoder=_fetched(own_text) or _text_beside(path),
        released=released,
    )


def fetched_text(released: Release | None) -> Path:
    """The text encoder of a model that has none beside it, fetched from the hub where it is not on disk yet.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    return released_file(registry.RELEASES_BY_NAME[(released and released.text_encoder) or registry.TEXT_ENCODER])


def fetched_upscaler(released: Release) -> Path:
    """The upscaler that a model's second pass needs, fetched from the hub where it is not on disk yet.

    Raises:
        CheckpointError: it cannot be fetched, or there is none.
    """
    if released.upscaler is None:
        raise CheckpointError(f"no upscaler was released for {released.name}. Give one with --upscaler.")
    return released_file(registry.RELEASES_BY_NAME[released.upscaler])


def located_lora(given: str | Path) -> Path:
    """The file, or folder, of a LoRA that is given by its path or by a name of the registry.

    Raises:
        RequestError: it is the name of something else.
        CheckpointError: it is not there, or cannot be fetched.
    """
    located = _fetched(_part(given, registry.LORA))
    assert located is not None
    return located


def check_lora(given: str | Path) -> None:
    """As `located_lora`, and nothing is fetched."""
    _part(given, registry.LORA)


def released_file(released: Release) -> Path:
    """The file of an entry, or the folder where it is of many, fetched from the hub where it is not on disk yet.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    if released.repo is None:
        return _existing(PACKAGE / released.file, "bundled file")
    if _is_pattern(released):
        return hub.fetch_folder(released.repo, released.file_patterns)
    return hub.fetch(released.repo, released.file)


def on_disk(released: Release) -> Path | None:
    """As `released_file`, if all of it is here already; the network is not asked."""
    if released.repo is None:
        path = PACKAGE / released.file
        return path if path.is_file() else None
    if _is_pattern(released):
        return hub.cached_folder(released.repo, released.file_patterns)
    return hub.cached_file(released.repo, released.file)


def is_path(model: str | Path) -> bool:
    """Whether this is a path, and not a name."""
    text = str(model)
    return (
        isinstance(model, Path) or "/" in text or "\\" in text or Path(text).suffix in SUFFIXES or Path(text).exists()
    )


def _is_pattern(released: Release) -> bool:
    return "*" in released.file


def _require_model(released: Release) -> None:
    if released.kind != "model":
        raise RequestError(
            f"{released.name} is a {released.kind}, and no model. Give it as {_FLAGS[released.kind]}, and a model "
            "that `kadr models` lists."
        )


def _part(given: str | Path, kind: str, what: str = "") -> Path | Release:
    """A part that is given: a path that is there, or an entry of that kind."""
    released = None if Path(given).exists() else registry.RELEASES_BY_NAME.get(str(given))
    if released is None:
        return _existing(given, what or kind)
    if released.kind != kind:
        known = [entry.name for entry in registry.RELEASES if entry.kind == kind and entry.repo is not None]
        raise RequestError(
            f"{released.name} is a {released.kind}; for the {what or kind} give a path, or a name such as {known[0]}."
        )
    return released


def _fetched(part: Path | Release | None) -> Path | None:
    return released_file(part) if isinstance(part, Release) else part


def _existing(path: str | Path, what: str) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"the {what} is not at {path}. Give an existing path, or a name that `kadr models` lists."
        )
    return path


def _text_beside(model: Path) -> Path | None:
    """A text encoder that came with the model: in the same folder, or in the folder that the model is."""
    folder = model if model.is_dir() else model.parent
    return folder if (folder / "text_encoder").is_dir() else None
