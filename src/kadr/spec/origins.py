"""The VAE and the text encoder of a model that lacks them: those given, those it remembers, those of its release."""

from __future__ import annotations

from pathlib import Path

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.gguf.origins import TEXT_ENCODER_FIELD, VAE_FIELD, ComponentOrigin
from kadr.errors import CheckpointError
from kadr.models import registry
from kadr.models.registry import MODEL_RELEASES, Release
from kadr.spec.locate import (
    TEXT_ENCODER_ROLE,
    VAE,
    ModelComponent,
    locate,
    locate_release,
    locate_text_encoder,
    text_encoder_folder,
    text_encoder_of_release,
)
from kadr.spec.model_folders import NO_FOLDERS, ModelFolders

_FLAG_BY_ROLE = {VAE: "--vae", TEXT_ENCODER_ROLE: "--text-encoder"}


def locate_vae(
    name_or_path: str | Path | None, model: ModelComponent, checkpoint: Checkpoint, folders: ModelFolders = NO_FOLDERS
) -> ModelComponent | None:
    """Finds the VAE that is named, that the registry names for a release without one, or that a file remembers.

    Args:
        checkpoint: the opened model.

    Returns:
        None for the model's own VAE, and where nothing is known.

    Raises:
        RequestError, CheckpointError: as `locate`; or the VAE that the file remembers is not there.
    """
    if name_or_path is not None:
        return locate(name_or_path, VAE, folders)
    if model.release is not None and model.release.vae is not None:
        return locate_release(model.release.vae, VAE)
    origin = None if checkpoint.info.has_vae else _read_origin(checkpoint, VAE_FIELD)
    return None if origin is None else _locate_origin(origin, VAE, checkpoint.path)


def find_text_encoder(
    name_or_path: str | Path | None,
    model: ModelComponent,
    checkpoint: Checkpoint,
    release: Release | None,
    folders: ModelFolders = NO_FOLDERS,
) -> ModelComponent:
    """Finds the text encoder that is named, that a file remembers, or that `locate_text_encoder` finds.

    Raises:
        RequestError, CheckpointError: as `locate`; or the encoder that the file remembers is not there.
    """
    origin = None if name_or_path is not None else _read_origin(checkpoint, TEXT_ENCODER_FIELD)
    if origin is None or _has_moved_with_model(origin, model):
        is_in_model = checkpoint.holds_text_encoder
        return locate_text_encoder(name_or_path, model, release, folders, is_in_model=is_in_model)
    return _locate_origin(origin, TEXT_ENCODER_ROLE, checkpoint.path)


def component_origins(model: ModelComponent, checkpoint: Checkpoint) -> dict[str, ComponentOrigin]:
    """Returns field of a GGUF file -> origin of a component that is not in it, as far as that is known.

    Args:
        model: the model that is written, by name or path.
        checkpoint: the same, opened.
    """
    origins: dict[str, ComponentOrigin | None] = {
        VAE_FIELD: _read_origin(checkpoint, VAE_FIELD),
        TEXT_ENCODER_FIELD: _read_origin(checkpoint, TEXT_ENCODER_FIELD),
    }
    if model.release is not None:
        name = model.release.name
        origins = {
            VAE_FIELD: ComponentOrigin(name=model.release.vae or name),
            TEXT_ENCODER_FIELD: ComponentOrigin(name=model.release.text_encoder or name),
        }
    else:
        if checkpoint.info.has_vae:
            origins[VAE_FIELD] = ComponentOrigin(path=str(checkpoint.path.absolute()))
        if checkpoint.holds_text_encoder:
            origins[TEXT_ENCODER_FIELD] = ComponentOrigin(path=str(checkpoint.path.absolute()))
        elif (folder := text_encoder_folder(model)) is not None:
            origins[TEXT_ENCODER_FIELD] = ComponentOrigin(path=str(folder.absolute()))
    return {field: origin for field, origin in origins.items() if origin is not None}


def _read_origin(checkpoint: Checkpoint, field: str) -> ComponentOrigin | None:
    source = checkpoint.sources.get("transformer")
    return None if source is None else ComponentOrigin.from_metadata(source.metadata, field)


def _has_moved_with_model(origin: ComponentOrigin, model: ModelComponent) -> bool:
    """Returns whether the remembered folder is gone, and the model has a text encoder beside it."""
    is_gone = origin.path is not None and not _is_there(Path(origin.path))
    return is_gone and text_encoder_folder(model) is not None


def _locate_origin(origin: ComponentOrigin, role: str, file: Path) -> ModelComponent:
    """Returns the component that a file remembers.

    Raises:
        CheckpointError: it is not there, or this kadr does not know its name.
    """
    if origin.name is not None:
        release = registry.RELEASES_BY_NAME.get(origin.name)
        if release is None or not (release in MODEL_RELEASES or release.kind == role):
            raise _origin_error(origin.name, role, file, "which this kadr does not know")
        if role == TEXT_ENCODER_ROLE and release in MODEL_RELEASES:
            return text_encoder_of_release(release)
        return locate_release(origin.name, role)
    path = Path(origin.path or "")
    for candidate in (path, file.parent / path.name):
        if _is_there(candidate):
            return ModelComponent(role, str(candidate), candidate)
    raise _origin_error(str(path), role, file, "which is not there")


def _is_there(path: Path) -> bool:
    """Returns whether a path of a file's header may be opened: a plain file or a folder, and on no other machine."""
    return not str(path).startswith(("//", "\\\\")) and (path.is_file() or path.is_dir())


def _origin_error(wanted: str, role: str, file: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{file} takes its {role} from {wanted}, {problem}. Put it back, or give one with {_FLAG_BY_ROLE[role]}."
    )
