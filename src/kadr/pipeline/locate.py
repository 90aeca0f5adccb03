"""From what a person calls a model to the files it is in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kadr.checkpoints import hub
from kadr.errors import CheckpointError
from kadr.models import registry
from kadr.models.registry import Released

PACKAGE = Path(__file__).parents[1]
SUFFIXES = {".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin"}
TEXT_FOLDERS = ["text_encoder/*", "tokenizer/*"]


@dataclass(frozen=True)
class Found:
    """The files of a model.

    Args:
        name: as it was asked for.
        text_encoder: None where none is named and none lies beside the model; see `fetched_text`.
        vae: None where the VAE is in `model`.
        released: the registry's entry; None for a path, whose header has to tell.
    """

    name: str
    model: Path
    text_encoder: Path | None
    vae: Path | None
    released: Released | None


def locate(model: str | Path, *, text_encoder: str | Path | None, vae: str | Path | None) -> Found:
    """Find the files; that of a released model is fetched from the hub where it is not on disk yet.

    Raises:
        RequestError: an unknown name.
        CheckpointError: a path that is not there, or a file that cannot be fetched.
    """
    released = None if _is_path(model) else registry.find(str(model))
    own_text = None if text_encoder is None else _existing(text_encoder, "the text encoder")
    own_vae = None if vae is None else _existing(vae, "the VAE")
    path = _released_file(released) if released else _existing(model, "the model")
    return Found(
        name=str(model), model=path, text_encoder=own_text or _text_beside(path), vae=own_vae, released=released
    )


def fetched_text(released: Released | None) -> Path:
    """The text encoder of a model that has none beside it, fetched from the hub where it is not on disk yet."""
    return hub.fetch_folder((released and released.text_encoder) or registry.TEXT_HUB, TEXT_FOLDERS)


def _is_path(model: str | Path) -> bool:
    text = str(model)
    return (
        isinstance(model, Path) or "/" in text or "\\" in text or Path(text).suffix in SUFFIXES or Path(text).exists()
    )


def _existing(path: str | Path, what: str) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{what} is not at {path}. Give an existing path, or a name that `kadr models` lists.")
    return path


def _released_file(released: Released) -> Path:
    if released.repo is None:
        return _existing(PACKAGE / released.file, "the bundled model")
    return hub.fetch(released.repo, released.file, size_bytes=released.size_bytes)


def _text_beside(model: Path) -> Path | None:
    """A text encoder that came with the model: in the same folder, or in the folder that the model is."""
    folder = model if model.is_dir() else model.parent
    return folder if (folder / "text_encoder").is_dir() else None
