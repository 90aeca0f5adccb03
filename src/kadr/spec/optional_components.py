"""Optional components of a model: another transformer for the second pass, latent upscalers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.errors import CheckpointError, RequestError
from kadr.models import registry
from kadr.models.registry import Release
from kadr.spec.locate import fetch_release, fetch_upscaler, is_path, locate


def open_second_model(model: str | Path | None) -> tuple[Checkpoint | None, Release | None]:
    """Opens the checkpoint of the second pass's model and returns it with its release; (None, None) for None.

    Raises:
        RequestError, CheckpointError: see `locate` and `Checkpoint.open`.
    """
    if model is None:
        return None, None
    files = locate(model, text_encoder=None, vae=None)
    checkpoint = Checkpoint.open(files.model, release=files.release)
    return checkpoint, files.release or checkpoint.info.release


def open_upscalers(upscalers: str | Path | Sequence[str | Path]) -> list[Checkpoint]:
    """Opens the checkpoints of upscalers given by name or path.

    Raises:
        RequestError, CheckpointError: an unknown name, or a path that does not exist; see also `Checkpoint.open`.
    """
    names_or_paths = [upscalers] if isinstance(upscalers, str | Path) else list(upscalers)
    return [Checkpoint.open(_locate_upscaler(name_or_path)) for name_or_path in names_or_paths]


def _locate_upscaler(upscaler: str | Path) -> Path:
    if is_path(upscaler):
        path = Path(upscaler).expanduser()
        if not path.exists():
            raise CheckpointError(
                f"the upscaler {path} does not exist. Give an existing path, or a name of `kadr models`."
            )
        return path
    release = registry.find_release(str(upscaler))
    if not release.kind.endswith("upscaler"):
        raise RequestError(f"{release.name} is a {release.kind}, not an upscaler. `kadr models` lists upscalers.")
    return fetch_release(release)


def open_default_upscaler(release: Release | None) -> Checkpoint:
    """Opens the upscaler that belongs to a model, fetched if it is not on disk.

    Raises:
        CheckpointError: the model has none, or it cannot be fetched.
    """
    if release is None or release.upscaler is None:
        raise CheckpointError(
            "two passes need a latent upscaler, and none belongs to this model. Give one with --upscaler, or use a "
            "single pass."
        )
    return Checkpoint.open(fetch_upscaler(release))
