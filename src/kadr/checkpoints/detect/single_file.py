"""Detects the model in a single file.

The header's config is believed first, then the tensor shapes, then names (`releases`); where they leave open how the
model computes, an error asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from kadr.checkpoints.detect.releases import ReleaseFacts, ReleaseMatch, family_of_match, match_release, path_names
from kadr.checkpoints.detect.upscaler import checkpoint_kind, detect_upscaler_config, find_upscaler_release
from kadr.checkpoints.detect.vae_families import FAMILY_SCHEDULES, VAE_FAMILIES, find_vae_family, version_label
from kadr.checkpoints.gguf.header import ARCHITECTURE_KEY, NAME_KEY
from kadr.checkpoints.header import FP8_DTYPES
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.json_reader import parse_json
from kadr.models.registry import RELEASES_BY_NAME, Release
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, TransformerConfig
from kadr.models.upscaler import UpscalerConfig
from kadr.models.vae.config import VAEConfig
from kadr.quoting import quote
from kadr.sampling.schedules import Schedule

_T = TypeVar("_T")
# Endings of GGUF file names: "-Q4_K_M", "_q8_0", ".bf16".
_GGUF_TYPE_SUFFIX = re.compile(r"[-_.](ud-)?(i?q\d\w*|b?f16|f32|fp16|fp32)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """The model, configs and layout detected in a checkpoint.

    Args:
        version: such as "0.9.6-dev" where `release` is known; else what is certain, such as "0.9.5 or later".
        release: the released model this is; None where header, shapes and names leave that open.
        layout: "single file", "GGUF" or "diffusers".
        transformer, vae, upscaler: configs of the components; None where the component is not in the checkpoint.
        vae_family: "0.9", "0.9.1" or "0.9.5", the VAE that the model was trained with; None for another VAE.
        schedule: schedule of the model's sigmas; for an upscaler, that of the models it belongs to.
        dtype: storage dtype of most weights; uint8 for block-quantized ones.
        release_candidates: the releases that it may be, where `release` is None and several fit.
        contradicted_name: a name of the file or folder that points to a release which the weights are not.
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
    release_candidates: tuple[Release, ...] = ()
    contradicted_name: str | None = None

    @property
    def kind(self) -> str:
        """Kind as in the registry: "model", "spatial upscaler", ...; a single component of a model is a "model"."""
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
    """Detects the model in a single file.

    Args:
        components: its components; see `split.split_components`.
        release: the release that the user says it is; None detects it.

    Raises:
        CheckpointError: the header cannot be parsed, the file contradicts `release`, or neither header, shapes nor
            name tell the version.
    """
    config = read_header_config(source)
    upscaler = detect_upscaler_config(components["upscaler"], config) if "upscaler" in components else None
    vae, vae_family = _detect_vae(source, components.get("vae"), config)
    transformer = _detect_transformer(source, components.get("transformer"), config)
    dtype = next((components[name] for name in ("transformer", "upscaler") if name in components), source).dtype
    allowed_sigmas = config.get("allowed_inference_steps")
    facts = ReleaseFacts(
        kind=checkpoint_kind(transformer, upscaler),
        transformer=transformer,
        vae_families=_possible_families(config, transformer, vae_family),
        allowed_sigmas=allowed_sigmas,
        stores_fp8=dtype in FP8_DTYPES,
    )
    stated = release or _find_stated_release(source, upscaler, facts)
    match = match_release(source.path, facts, _release_names(source), explicit=stated)
    if "scheduler" in config:
        schedule = _parse_config_entry(
            source, "scheduler", lambda: Schedule.from_header(config["scheduler"], allowed_sigmas)
        )
    else:
        schedule = FAMILY_SCHEDULES[_infer_family(source, facts, match)]
    if transformer is not None and "transformer" not in config:
        is_causal = _infer_family(source, facts, match) == "0.9.5"
        transformer = replace(transformer, causal_temporal_positioning=is_causal)
    return CheckpointInfo(
        version=match.release.version if match.release else version_label(transformer, vae_family, upscaler),
        release=match.release,
        layout="GGUF" if _is_gguf(source) else "single file",
        transformer=transformer,
        vae=vae,
        vae_family=vae_family,
        schedule=schedule,
        dtype=dtype,
        upscaler=upscaler,
        release_candidates=match.candidates,
        contradicted_name=match.contradicted_name,
    )


def _find_stated_release(source: Source, upscaler: UpscalerConfig | None, facts: ReleaseFacts) -> Release | None:
    """Finds the release that kadr wrote into a GGUF file, or an upscaler's by its file name, unless contradicted."""
    if upscaler is not None:
        release = find_upscaler_release(source.path.stem, upscaler)
    else:
        release = RELEASES_BY_NAME.get(source.metadata.get(NAME_KEY, ""))
    return None if release is None or facts.contradictions(release) else release


def _release_names(source: Source) -> list[str]:
    """Returns the names that may tell the release: of the file, its folder or repository, and in a GGUF header."""
    if not _is_gguf(source):
        return path_names(source.path)
    names = [_GGUF_TYPE_SUFFIX.sub("", name) for name in path_names(source.path)]
    return [*names, *filter(None, [source.metadata.get(NAME_KEY)])]


def _is_gguf(source: Source) -> bool:
    return ARCHITECTURE_KEY in source.metadata or source.path.suffix.lower() == ".gguf"


def read_header_config(source: Source) -> dict[str, Any]:
    """Parses the config in the official header; returns an empty one where the file has none."""
    try:
        config = parse_json(source.metadata.get("config", "{}"))
    except ValueError as error:
        raise CheckpointError(
            f"{source.path}: the config in its header is not JSON: {error}. Use the file as released."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{source.path}: the config in its header is {quote(config)}; it must be a JSON object.")
    return config


def _detect_vae(
    source: Source, component: Source | None, config: Mapping[str, Any]
) -> tuple[VAEConfig | None, str | None]:
    """Returns the config of the VAE in the file, and the family of the VAE the model was trained with."""
    if "vae" in config:
        stated_vae = _parse_config_entry(source, "vae", lambda: VAEConfig.from_header(config["vae"]))
        return (stated_vae if component else None), find_vae_family(stated_vae)
    if component is None:
        return None, None
    conv_out = component.infos.get("encoder.conv_out.conv.weight")
    width = conv_out.shape[1] if conv_out and len(conv_out.shape) == 5 else None
    has_time_embedder = any(name.startswith("decoder.last_time_embedder.") for name in component.infos)
    vae_family = {2048: "0.9.5", 512: "0.9.1" if has_time_embedder else "0.9"}.get(width or 0)
    if vae_family is None:
        raise CheckpointError(
            f"{source.path}: there is no config in its header, and a VAE whose encoder ends {width} wide is none of "
            "the released ones (512 or 2048). Use a file that still has its header."
        )
    return VAE_FAMILIES[vae_family], vae_family


def _detect_transformer(
    source: Source, component: Source | None, config: Mapping[str, Any]
) -> TransformerConfig | None:
    """Returns the config by header or by shape; by shape, whether positions are causal stays open."""
    if component is None:
        return None
    if "transformer" in config:
        return _parse_config_entry(source, "transformer", lambda: TransformerConfig.from_header(config["transformer"]))
    num_layers = len({name.split(".")[1] for name in component.infos if name.startswith("transformer_blocks.")})
    width = next((component.infos[name].shape[0] for name in ("patchify_proj.bias",) if name in component.infos), None)
    for known in (TRANSFORMER_2B, TRANSFORMER_13B):
        if (num_layers, width) == (known.num_layers, known.width):
            return known
    raise CheckpointError(
        f"{source.path}: there is no config in its header, and {num_layers} layers {width} wide are none of the "
        "released transformers (28 of 2048, 48 of 4096). Use a file that still has its header."
    )


def _parse_config_entry(source: Source, entry: str, parse: Callable[[], _T]) -> _T:
    """Calls a parser of a header entry; its errors name the file and the entry."""
    try:
        return parse()
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{source.path}: the config in its header has a {quote(entry)} that cannot be read ({quote(error)}). "
            "Use the file as released."
        ) from error


def _possible_families(
    config: Mapping[str, Any], transformer: TransformerConfig | None, vae_family: str | None
) -> tuple[str, ...]:
    """Returns the VAE families that the model may follow: by its VAE, or else by the positions in its header."""
    if vae_family is not None:
        return (vae_family,)
    if transformer is None or "transformer" not in config:
        return ()
    return ("0.9.5",) if transformer.causal_temporal_positioning else ("0.9", "0.9.1")


def _infer_family(source: Source, facts: ReleaseFacts, match: ReleaseMatch) -> str:
    """Returns the VAE family whose positions and sigmas a file follows, where its header does not say."""
    if facts.vae_families:
        return facts.vae_families[0]
    if facts.transformer is None or facts.transformer.num_layers == TRANSFORMER_13B.num_layers:
        return "0.9.5"
    return family_of_match(source.path, match)
