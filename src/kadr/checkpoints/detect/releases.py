"""Finds the release that a checkpoint is: one that is named, else by facts of its weights, else by names.

Several releases have the same tensors, such as a dev model and the distilled one of the same version, and differ in
their recipes. Where neither facts nor names decide, the candidates stay, and whoever needs a recipe asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kadr.checkpoints.detect.upscaler import MODEL_KIND
from kadr.errors import CheckpointError
from kadr.models.registry import MODEL_RELEASES, Recipe, Release
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, TransformerConfig

_HUB_FOLDER_PREFIX = "models--"  # of a repository's folder in the hub's cache: models--OWNER--NAME/snapshots/COMMIT
# "0.9.8", "v0.9" or "098", and not a part of a longer number.
_VERSION = re.compile(r"(?<![\d.])0\.9(?:\.(\d))?(?!\d|\.\d)|(?<![a-z0-9])v?09(\d)(?![a-z0-9])")
_COMMIT = re.compile(r"[0-9a-f]{40}")  # name of a snapshot's folder in the hub's cache
_SIZE = re.compile(r"(?<![a-z0-9])(2|13)b(?![a-z0-9])")
_DEV = re.compile(r"(?<![a-z])dev(?![a-z])")
_SIZE_NAMES: Mapping[int | None, str] = {TRANSFORMER_2B.num_layers: "2", TRANSFORMER_13B.num_layers: "13"}
_RELEASED_SIZES = {(config.num_layers, config.width) for config in (TRANSFORMER_2B, TRANSFORMER_13B)}


@dataclass(frozen=True, kw_only=True)
class ReleaseFacts:
    """Facts of a checkpoint that distinguish releases, from its header and the shapes of its tensors.

    Args:
        kind: see `CheckpointInfo.kind`.
        transformer: None where the checkpoint has none.
        vae_families: the VAE families that the model may have been trained with; () where that is open.
        allowed_sigmas: the sigmas that the header restricts the model to; None where it does not.
        stores_fp8: most weights are in fp8.
    """

    kind: str
    transformer: TransformerConfig | None
    vae_families: tuple[str, ...] = ()
    allowed_sigmas: Sequence[float] | None = None
    stores_fp8: bool = False

    def contradictions(self, release: Release) -> list[str]:
        """Returns the facts that a release contradicts, each in words."""
        transformer, family = self.transformer, release.vae_family
        contradictions = [f"it is a {self.kind}, not {release.kind}"] if self.kind != release.kind else []
        if transformer and release.num_layers not in (None, transformer.num_layers):
            contradictions.append(f"layers: {transformer.num_layers}, not {release.num_layers}")
        elif transformer and release.num_layers and (transformer.num_layers, transformer.width) not in _RELEASED_SIZES:
            contradictions.append(f"it is {transformer.width} wide, and no released model with its layers is")
        if self.vae_families and family is not None and family not in self.vae_families:
            contradictions.append(f"VAE: {' or '.join(self.vae_families)}, not {family}")
        if self.allowed_sigmas is not None and release.recipe.first_pass.sigmas is None:
            contradictions.append("it was distilled for certain sigmas")
        return contradictions


@dataclass(frozen=True)
class ReleaseMatch:
    """The release that a checkpoint is, or may be.

    Args:
        release: None where it is open, or no released model fits.
        candidates: releases that fit, where several do.
        contradicted_name: a name that points to a release which the weights are not; None if there is none.
    """

    release: Release | None
    candidates: tuple[Release, ...] = ()
    contradicted_name: str | None = None


def match_release(
    path: Path, facts: ReleaseFacts, names: Iterable[str], *, explicit: Release | None = None
) -> ReleaseMatch:
    """Finds the release of a model's checkpoint.

    Args:
        names: names that may tell it, the most trusted first: of the file, the folder, the repository.
        explicit: the release that the user says it is.

    Raises:
        CheckpointError: the checkpoint contradicts `explicit`.
    """
    if explicit is not None:
        if contradictions := facts.contradictions(explicit):
            raise CheckpointError(
                f"{path} is not {explicit.name}: {'; '.join(contradictions)}. {_way_out_of_contradiction(facts)}"
            )
        return ReleaseMatch(explicit)
    if facts.kind != MODEL_KIND:
        return ReleaseMatch(None)
    candidates, has_telling_name, contradicted_name = _fitting_releases(facts), False, None
    for name in names:
        named = narrow_by_name(candidates, name)
        if named:
            candidates, has_telling_name = named, True
        elif named is not None:
            contradicted_name = contradicted_name or name
    candidates = _narrow_by_header(candidates, facts, is_named=has_telling_name)
    if facts.transformer is None:  # a VAE, which releases share
        return ReleaseMatch(candidates[0] if has_telling_name and len(candidates) == 1 else None)
    if len(candidates) == 1:
        return ReleaseMatch(candidates[0])
    return ReleaseMatch(None, tuple(candidates), contradicted_name)


def narrow_by_name(releases: Sequence[Release], name: str) -> list[Release] | None:
    """Returns those of some releases that a name may mean: the one it names exactly, else by version, size and kind.

    Returns None for a name that says nothing of a release.
    """
    text = name.lower()
    if exact := [release for release in releases if text in (release.name, release.file_stem)]:
        return exact
    versions = {_normalize_version(first or second) for first, second in _VERSION.findall(text)}
    sizes = set(_SIZE.findall(text))
    is_distilled, is_dev = "distill" in text, _DEV.search(text) is not None
    if not (versions or sizes or is_distilled or is_dev):
        return None
    return [
        release
        for release in releases
        if (not versions or release.version.partition("-")[0] in versions)
        and (not sizes or _SIZE_NAMES.get(release.num_layers) in sizes)
        and (not is_distilled or release.is_distilled)
        and (is_distilled or not is_dev or release.version.endswith("-dev"))
    ]


def path_names(path: Path, *, is_component: bool = False) -> list[str]:
    """Returns the names in a path that may tell a release: its own, and that of its repository in the hub's cache.

    Args:
        is_component: the path is the folder of one component, such as transformer/ in the folder that has the name.
    """
    path = path.absolute()
    named = path.parent if is_component else path
    names = [named.name if named.is_dir() else named.stem]
    if not is_component and "ltx" in path.parent.name.lower():  # a parent named "dev" says nothing
        names.append(path.parent.name)
    names += [part.rpartition("--")[2] for part in reversed(path.parts) if part.startswith(_HUB_FOLDER_PREFIX)]
    return [name for name in names if not _COMMIT.fullmatch(name)]


def family_of_match(path: Path, match: ReleaseMatch) -> str:
    """Returns the VAE family whose positions and sigmas all releases follow that a checkpoint may be.

    Raises:
        CheckpointError: they follow different ones.
    """
    families = {release.vae_family for release in (match.candidates or (match.release,)) if release is not None}
    if families == {"0.9.5"}:
        return "0.9.5"
    if families and families <= {"0.9", "0.9.1"}:  # they have the same positions and sigmas
        return "0.9"
    raise unknown_release_error(path, match.candidates)


def unknown_release_error(path: Path, candidates: Iterable[Release]) -> CheckpointError:
    """Builds the error that asks for the release of a checkpoint."""
    names = ", ".join(release.name for release in candidates)
    return CheckpointError(
        f"{path} does not say which release of LTX-Video it is, and these have the same tensors but other settings: "
        f"{names}. Pass the one it is, or was trained from, with --release NAME.",
        topic="model",
        fix="--release NAME",
    )


def _fitting_releases(facts: ReleaseFacts) -> list[Release]:
    return [release for release in MODEL_RELEASES if release.repo is not None and not facts.contradictions(release)]


def _narrow_by_header(candidates: list[Release], facts: ReleaseFacts, *, is_named: bool) -> list[Release]:
    """Narrows by the storage dtype and by the sigmas in the header; other sigmas than a release's mean another model.

    Args:
        is_named: a name tells the version, which is then believed in spite of the sigmas.
    """
    stored = [release for release in candidates if release.name.endswith("-fp8") == facts.stores_fp8]
    candidates = stored or candidates
    if facts.allowed_sigmas is None:
        return candidates
    fitting = [release for release in candidates if _recipe_sigmas(release.recipe) == set(facts.allowed_sigmas)]
    if not fitting:
        return candidates if is_named else []
    return fitting if is_named else fitting[-1:]  # the headers of 0.9.8, the last, state them


def _recipe_sigmas(recipe: Recipe) -> set[float]:
    """Returns the explicit sigmas of both passes."""
    passes = (recipe.first_pass, recipe.second_pass)
    return {sigma for settings in passes if settings is not None for sigma in settings.sigmas or ()}


def _way_out_of_contradiction(facts: ReleaseFacts) -> str:
    if names := ", ".join(release.name for release in _fitting_releases(facts)):
        return f"Name one that it may be ({names}), or leave the release out."
    return "Leave the release out."


def _normalize_version(patch: str) -> str:
    return "0.9" if patch in ("", "0") else f"0.9.{patch}"
