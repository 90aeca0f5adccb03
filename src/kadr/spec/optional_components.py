"""The parts a model can be given besides its own: another transformer for the second pass, latent upscalers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.errors import CheckpointError, RequestError
from kadr.models import registry
from kadr.models.registry import Release
from kadr.spec.locate import fetch_release, fetch_upscaler, is_path, locate


def open_second_model(model: str | Path | None) -> tuple[Checkpoint | None, Release | None]:
    """The checkpoint of the second pass's model, and its entry in the registry, where one is named.

    Raises:
        RequestError, CheckpointError: as `locate` and `Checkpoint.open`.
    """
    if model is None:
        return None, None
    found = locate(model, text_encoder=None, vae=None)
    checkpoint = Checkpoint.open(found.model, release=found.release)
    return checkpoint, found.release or checkpoint.info.release


def open_upscalers(upscalers: str | Path | Sequence[str | Path]) -> list[Checkpoint]:
    """The checkpoints of upscalers, by name or path.

    Raises:
        RequestError, CheckpointError: an unknown name, or a path that is not there; and as `Checkpoint.open`.
    """
    wanted = [upscalers] if isinstance(upscalers, str | Path) else list(upscalers)
    return [Checkpoint.open(_locate_upscaler(one)) for one in wanted]


def _locate_upscaler(upscaler: str | Path) -> Path:
    if is_path(upscaler):
        path = Path(upscaler).expanduser()
        if not path.exists():
            raise CheckpointError(f"the upscaler is not at {path}. Give an existing path, or a name of `kadr models`.")
        return path
    released = registry.find_release(str(upscaler))
    if not released.kind.endswith("upscaler"):
        raise RequestError(f"{released.name} is a {released.kind}, and no upscaler. `kadr models` lists those.")
    return fetch_release(released)


def open_default_upscaler(release: Release | None) -> Checkpoint:
    """The upscaler that belongs to a model, fetched from the hub where it is not on disk yet.

    Raises:
        CheckpointError: the model has none, or it cannot be fetched.
    """
    if release is None or release.upscaler is None:
        raise CheckpointError(
            "two passes need a latent upscaler, and none belongs to this model. Give one with --upscaler, or make a "
            "single pass."
        )
    return Checkpoint.open(fetch_upscaler(release))
