"""Which model is in a file, from what its header says.

The header's config is believed first, then the shapes of the tensors, then the name of the file; what they leave open
is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from kadr.checkpoints.detect.upscaler import MODEL_KIND, checkpoint_kind, detect_upscaler_config, find_upscaler_release
from kadr.checkpoints.detect.vae_families import FAMILY_SCHEDULES, VAE_FAMILIES, find_vae_family, version_label
from kadr.checkpoints.gguf.header import ARCHITECTURE_KEY, NAME_KEY
from kadr.checkpoints.header import FP8_DTYPES
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.models.registry import MODEL_RELEASES, RELEASES, RELEASES_BY_NAME, Recipe, Release, find_by_file_stem
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, TransformerConfig
from kadr.models.upscaler import UpscalerConfig
from kadr.models.vae.config import VAEConfig
from kadr.sampling.schedules import Schedule

_T = TypeVar("_T")
# How the names of GGUF files end: "-Q4_K_M", "_q8_0", ".bf16".
_GGUF_TYPE_SUFFIX = re.compile(r"[-_.](ud-)?(i?q\d\w*|b?f16|f32|fp16|fp32)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint is.

    Args:
        version: such as "0.9.6-dev" where `release` is known; else what is certain, such as "0.9.5 or later".
        release: the released model this is; None where its name and its header leave that open.
        layout: "single file", "GGUF" or "diffusers".
        transformer, vae, upscaler: sizes of the components; None where the component is not in the checkpoint.
        vae_family: "0.9", "0.9.1" or "0.9.5", the VAE that the model was made for; None for one of its own.
        schedule: how the model's noise levels are made; of an upscaler, those of the models that it goes with.
        dtype: what most weights are stored as; uint8 where they are packed.
    """

    version: str
    release: Release | None
    layout: str
    transformer: TransformerConfig | None
    vae: VAEConfig | None
    vae_family: str | None
    schedule: Schedule
    dtype: torch.dtype
    upscaler: UpscalerConfig | None = None

    @property
    def kind(self) -> str:
        """ "model", "spatial upscaler" or another kind of the registry's; a part of a model is a "model"."""
        return checkpoint_kind(self.transformer, self.upscaler)

    @property
    def has_transformer(self) -> bool:
        return self.transformer is not None

    @property
    def has_vae(self) -> bool:
        return self.vae is not None


def detect_single_file(
    source: Source, components: Mapping[str, Source], *, release: Release | None = None
) -> CheckpointInfo:
    """Tell what a single file is.

    Args:
        components: its components; see `components.split`.
        release: the model that the user says it is; else the name of the file is looked up.

    Raises:
        CheckpointError: the header cannot be understood, `release` is contradicted by what is in the file, or neither
            header, shapes nor name tell the version.
    """
    config = read_header_config(source)
    upsampler = detect_upscaler_config(components["upsampler"], config) if "upsampler" in components else None
    vae, family = _detect_vae(source, components.get("vae"), config)
    transformer = _detect_transformer(source, components.get("transformer"), config)
    allowed = config.get("allowed_inference_steps")
    named = release or _find_release_by_name(source, upsampler)
    kind = checkpoint_kind(transformer, upsampler)
    named = confirm_release(
        source.path, named, transformer, family, kind=kind, allowed_sigmas=allowed, is_explicit=release is not None
    )
    if "scheduler" in config:
        schedule = _parse_config_entry(source, "scheduler", lambda: Schedule.from_header(config["scheduler"], allowed))
    else:
        schedule = FAMILY_SCHEDULES[_infer_family(source, config, transformer, family, named)]
    if transformer is not None and "transformer" not in config:
        causal = _infer_family(source, config, transformer, family, named) == "0.9.5"
        transformer = replace(transformer, causal_temporal_positioning=causal)
    dtype = next((components[name] for name in ("transformer", "upsampler") if name in components), source).dtype
    named = named or _find_release_by_sigmas(transformer, schedule, dtype)
    return CheckpointInfo(
        version=named.version if named else version_label(transformer, family, upsampler),
        release=named,
        layout="GGUF" if _is_gguf(source) else "single file",
        transformer=transformer,
        vae=vae,
        vae_family=family,
        schedule=schedule,
        dtype=dtype,
        upscaler=upsampler,
    )


def _find_release_by_name(source: Source, upscaler: UpscalerConfig | None) -> Release | None:
    """The released model of this file's name; of a GGUF file first the one that it says it was made of."""
    stem = source.path.stem
    if upscaler is not None:
        return find_upscaler_release(stem, upscaler)
    made_of = RELEASES_BY_NAME.get(source.metadata.get(NAME_KEY, ""))
    if made_of is not None and made_of.kind == MODEL_KIND:
        return made_of
    return find_by_file_stem(_GGUF_TYPE_SUFFIX.sub("", stem) if _is_gguf(source) else stem)


def _is_gguf(source: Source) -> bool:
    return ARCHITECTURE_KEY in source.metadata or source.path.suffix.lower() == ".gguf"


def read_header_config(source: Source) -> dict[str, Any]:
    """The official header's config; empty where a file was saved without."""
    try:
        config = json.loads(source.metadata.get("config", "{}"))
    except ValueError as error:
        raise CheckpointError(
            f"{source.path}: the config in its header is not JSON: {error}. Take the file as it was released."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{source.path}: the config in its header is {config!r}; it must be a JSON object.")
    return config


def _detect_vae(
    source: Source, component: Source | None, config: Mapping[str, Any]
) -> tuple[VAEConfig | None, str | None]:
    """The VAE in the file, and the family of the VAE that the model was made for, in the file or not."""
    if "vae" in config:
        said = _parse_config_entry(source, "vae", lambda: VAEConfig.from_header(config["vae"]))
        return (said if component else None), find_vae_family(said)
    if component is None:
        return None, None
    out = component.infos.get("encoder.conv_out.conv.weight")
    width = out.shape[1] if out and len(out.shape) == 5 else None
    conditioned = any(name.startswith("decoder.last_time_embedder.") for name in component.infos)
    family = {2048: "0.9.5", 512: "0.9.1" if conditioned else "0.9"}.get(width or 0)
    if family is None:
        raise CheckpointError(
            f"{source.path}: there is no config in its header, and a VAE whose encoder ends {width} wide is none of "
            "the released ones (512 or 2048). Take a file that still has its header."
        )
    return VAE_FAMILIES[family], family


def _detect_transformer(
    source: Source, component: Source | None, config: Mapping[str, Any]
) -> TransformerConfig | None:
    """Sizes by header or by shape; by shape, whether positions are causal is still open."""
    if component is None:
        return None
    if "transformer" in config:
        return _parse_config_entry(source, "transformer", lambda: TransformerConfig.from_header(config["transformer"]))
    layers = len({name.split(".")[1] for name in component.infos if name.startswith("transformer_blocks.")})
    width = next((component.infos[name].shape[0] for name in ("patchify_proj.bias",) if name in component.infos), None)
    for known in (TRANSFORMER_2B, TRANSFORMER_13B):
        if (layers, width) == (known.num_layers, known.width):
            return known
    raise CheckpointError(
        f"{source.path}: there is no config in its header, and {layers} layers {width} wide are none of the released "
        "transformers (28 of 2048, 48 of 4096). Take a file that still has its header."
    )


def _parse_config_entry(source: Source, entry: str, parse: Callable[[], _T]) -> _T:
    """Run a reader of the header and say which file it read."""
    try:
        return parse()
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{source.path}: the config in its header has a {entry!r} that cannot be read ({error!r}). "
            "Take the file as it was released."
        ) from error


def confirm_release(
    path: Path,
    release: Release | None,
    transformer: TransformerConfig | None,
    vae_family: str | None,
    *,
    kind: str,
    allowed_sigmas: object = None,
    is_explicit: bool,
) -> Release | None:
    """The model that a name stands for, if what is in the checkpoint does not speak against it.

    Args:
        vae_family: of the VAE.
        allowed_sigmas: noise levels that the header restricts the model to.
        is_explicit: the user gave the name, so that a contradiction is an error.
    """
    if release is None:
        return None
    layers = transformer.num_layers if transformer else None
    against = [
        f"{what} {found}, not {expected}"
        for what, found, expected in (
            ("it is a", kind, release.kind),
            ("layers:", layers, release.num_layers),
            ("VAE:", vae_family, release.vae_family),
        )
        if found is not None and expected is not None and found != expected
    ]
    if allowed_sigmas is not None and release.recipe.first_pass.sigmas is None:
        against.append("it was distilled for certain noise levels")
    if against and is_explicit:
        raise CheckpointError(f"{path} is not {release.name}: {'; '.join(against)}. Leave the name out.")
    return None if against else release


def _infer_family(
    source: Source,
    config: Mapping[str, Any],
    transformer: TransformerConfig | None,
    vae_family: str | None,
    release: Release | None,
) -> str:
    """Whose positions and noise levels a file follows that does not say itself: those of a VAE's family."""
    if vae_family is not None:
        return vae_family
    if transformer is None:
        return "0.9.5"
    if "transformer" in config:
        return "0.9.5" if transformer.causal_temporal_positioning else "0.9"
    if transformer.num_layers == TRANSFORMER_13B.num_layers:
        return "0.9.5"
    if release is not None and release.vae_family is not None:
        return release.vae_family
    known = ", ".join(r.name for r in RELEASES if r.num_layers == transformer.num_layers)
    raise CheckpointError(
        f"{source.path} is a 2B transformer without VAE and without a config in its header: its shapes are the same "
        f"in all versions, and its name says none. Name the version (release=...) or rename the file to one of {known}."
    )


def _find_release_by_sigmas(
    transformer: TransformerConfig | None, schedule: Schedule, dtype: torch.dtype
) -> Release | None:
    """The released model that only its list of allowed noise levels gives away."""
    if transformer is None or schedule.allowed_sigmas is None:
        return None
    return next(
        (
            released
            for released in reversed(MODEL_RELEASES)
            if released.num_layers == transformer.num_layers
            and _recipe_sigmas(released.recipe) == set(schedule.allowed_sigmas)
            and released.name.endswith("fp8") == (dtype in FP8_DTYPES)
        ),
        None,
    )


def _recipe_sigmas(recipe: Recipe) -> set[float]:
    """The noise levels of all its passes, where it names them."""
    passes = (recipe.first_pass, recipe.second_pass)
    return {level for each in passes if each is not None for level in each.sigmas or ()}
