"""Checks that the recipe of a model is known before it is used."""

from __future__ import annotations

import warnings

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.detect.releases import unknown_release_error
from kadr.errors import KadrWarning
from kadr.models.registry import Recipe
from kadr.spec.locate import ModelComponent


def require_known_recipe(checkpoint: Checkpoint) -> None:
    """Checks that a checkpoint of no known release may run by the default recipe.

    A model of unreleased sizes may; if its name says otherwise, a warning says so.

    Raises:
        CheckpointError: it has the tensors of several releases with different recipes.
    """
    info = checkpoint.info
    if info.release_candidates:
        raise unknown_release_error(checkpoint.path, info.release_candidates)
    if info.contradicted_name is not None and info.transformer is not None:
        steps, transformer = Recipe().first_pass.steps, info.transformer
        message = (
            f"{checkpoint.path} is named {info.contradicted_name}, but no release of that name has "
            f"{transformer.num_layers} layers {transformer.width} wide: kadr runs it with default settings, "
            f"{steps} steps with CFG. Set --steps or --sigmas, and --guidance, if it was distilled."
        )
        warnings.warn(KadrWarning(message, topic="model"), stacklevel=4)


def warn_unknown_second_release(component: ModelComponent, checkpoint: Checkpoint) -> None:
    """Warns that the second pass does not get the recipe of its model, where it is not known which of several."""
    if component.release is None and checkpoint.info.release_candidates:
        names = ", ".join(release.name for release in checkpoint.info.release_candidates)
        message = (
            f"{component.name} does not say which release of LTX-Video it is, so the second pass has the settings of "
            f"the first pass's model. Put one of these names into its name for its own settings: {names}."
        )
        warnings.warn(KadrWarning(message, topic="model"), stacklevel=4)
