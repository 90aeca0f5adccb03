"""The pipeline configs of the official package: a YAML file, read as it is, becomes a recipe and the parts it names.

What a file leaves out means what it means there, the defaults of LTXVideoPipeline.__call__, and not what kadr would do.
In a file of two passes, what stands at the top holds for both, as in LTXMultiScalePipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml

from kadr.errors import RequestError
from kadr.models import registry
from kadr.models.registry import Recipe
from kadr.sampling.settings import ATTENTION_VALUES, Guidance, Pass

MAX_CONFIG_BYTES = 1 << 20  # the official ones are two kilobytes; above this it is another file
PIPELINE_TYPES = ("base", "multi-scale")
PRECISIONS = ("bfloat16", "mixed_precision", "float8_e4m3fn")
OFFICIAL_SAMPLERS: Mapping[str, str | None] = {
    "from_checkpoint": None,
    "uniform": "Uniform",
    "linear-quadratic": "LinearQuadratic",
}
OFFICIAL_STG_MODES: Mapping[str, str] = {
    "stg_av": ATTENTION_VALUES,
    "stg_as": "attention_skip",
    "stg_r": "residual",
    "stg_t": "transformer_block",
}
# Official key -> field. These may stand at the top or in a pass.
GUIDANCE_KEYS: Mapping[str, str] = {
    "guidance_scale": "cfg_scale",
    "stg_scale": "stg_scale",
    "rescaling_scale": "rescale",
    "skip_block_list": "skip_blocks",
    "guidance_timesteps": "sigmas",
    "cfg_star_rescale": "cfg_star",
}
PASS_KEYS: Mapping[str, str] = {
    "num_inference_steps": "steps",
    "timesteps": "sigmas",
    "skip_initial_inference_steps": "skip_initial",
    "skip_final_inference_steps": "skip_final",
    "stochastic_sampling": "stochastic",
    "tone_map_compression_ratio": "tone_map",
}
LIST_KEYS = ("guidance_scale", "stg_scale", "rescaling_scale")  # a list of these is for guidance_timesteps
OFFICIAL_DEFAULTS: Mapping[str, Any] = {
    "num_inference_steps": 20,
    "guidance_scale": 4.5,
    "stg_scale": 1.0,
    "rescaling_scale": 0.7,
}
PASS_SECTIONS = ("first_pass", "second_pass")
STRING_KEYS = (
    "pipeline_type",
    "checkpoint_path",
    "spatial_upscaler_model_path",
    "stg_mode",
    "text_encoder_model_name_or_path",
    "precision",
    "sampler",
    "prompt_enhancer_image_caption_model_name_or_path",
    "prompt_enhancer_llm_model_name_or_path",
)
NUMBER_KEYS = ("decode_timestep", "decode_noise_scale", "downscale_factor", "prompt_enhancement_words_threshold")
TOP_LEVEL_KEYS = (*STRING_KEYS, *NUMBER_KEYS, *PASS_SECTIONS, *PASS_KEYS, *GUIDANCE_KEYS)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class OfficialConfig:
    """What a pipeline config says.

    Prompt enhancement is checked and left aside: kadr never changes a prompt by itself. So is the precision: weights
    are computed with as `dtype` of `Engine.open` says, whatever they are stored as.

    Args:
        path: of the file.
        recipe: as kadr's own ones.
        checkpoint, upscaler, text_encoder: as the file names them; None where it does not.
        precision: "bfloat16", "mixed_precision" or "float8_e4m3fn".
    """

    path: Path
    recipe: Recipe
    checkpoint: str | None = None
    upscaler: str | None = None
    text_encoder: str | None = None
    precision: str = PRECISIONS[0]

    @classmethod
    def read(cls, path: str | Path) -> OfficialConfig:
        """Read a config.

        Raises:
            RequestError: it cannot be read, has an unknown key, or a value that kadr cannot take; the message says
                which, in which file.
        """
        path = Path(path).expanduser()
        place = _ErrorContext(path)
        data = _drop_nulls(_load_yaml(path))
        _refuse_unknown(place, data, TOP_LEVEL_KEYS)
        _check_top_level(place, data)
        return cls(
            path=path,
            recipe=_parse_recipe(place, data),
            checkpoint=data.get("checkpoint_path"),
            upscaler=data.get("spatial_upscaler_model_path"),
            text_encoder=data.get("text_encoder_model_name_or_path"),
            precision=data.get("precision", PRECISIONS[0]),
        )

    def engine_arguments(
        self, overrides: Mapping[str, Any] | None = None, *, include_upscaler: bool = True
    ) -> dict[str, Any]:
        """What `Engine.open` takes, by name. A name is looked for beside the file, then here, then in the registry.

        Args:
            overrides: parts that go before those of the file.
            include_upscaler: name the upscaler too.

        Raises:
            RequestError: the file names what is neither a file nor a released model.
        """
        parts = dict(overrides or {})
        if "model" not in parts:
            parts["model"] = self._locate("checkpoint_path", self.checkpoint, "model", "--model")
        if include_upscaler and self.recipe.multi_scale and self.upscaler and "upscaler" not in parts:
            kind = "spatial upscaler"
            parts["upscaler"] = [self._locate("spatial_upscaler_model_path", self.upscaler, kind, "--upscaler")]
        if "text_encoder" not in parts and self.text_encoder not in (None, registry.TEXT_ENCODER_REPO):
            key = "text_encoder_model_name_or_path"
            parts["text_encoder"] = self._locate(key, self.text_encoder, "text encoder", "--text-encoder")
        return {**parts, "recipe": self.recipe}

    def _locate(self, key: str, name: str | None, kind: str, flag: str) -> str:
        place = _ErrorContext(self.path)
        if not name:
            raise place.error(key, f"is missing, so there is no {kind}. Add it, or give one with {flag}.")
        for folder in (self.path.parent, Path()):
            if (path := folder / Path(name).expanduser()).exists():
                return str(path.absolute())
        stem = Path(name).name.removesuffix(".safetensors")
        named = next((r for r in registry.RELEASES if r.kind == kind and stem in (r.file_stem, r.name)), None)
        if named is None:
            raise place.error(
                key,
                f"is {name!r}, which is no file beside the config or in this folder, and no released {kind}. Give one "
                f"with {flag}; `kadr models` lists those known.",
            )
        return named.name


@dataclass(frozen=True)
class _ErrorContext:
    """Where something stands, for errors."""

    path: Path
    section: str = ""

    def error(self, key: object, problem: object) -> RequestError:
        return RequestError(f"{self.path}: {self.section}{key} {problem}")

    def build(self, key: str, build: Callable[..., T], **values: Any) -> T:
        """Build something of one key's value; an error says the key."""
        try:
            return build(**values)
        except RequestError as error:
            raise self.error(key, f"cannot be taken: {error}") from error

    def in_section(self, name: str) -> _ErrorContext:
        return _ErrorContext(self.path, f"{name}: ")


def _load_yaml(path: Path) -> Mapping[Any, Any]:
    advice = "Give a pipeline config such as configs/ltxv-13b-0.9.8-dev.yaml of the official package."
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise RequestError(f"{path} has {path.stat().st_size} bytes, too many for a config. {advice}")
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise RequestError(f"the config {path} cannot be read: {reason}. {advice}") from error
    except yaml.YAMLError as error:
        raise RequestError(f"{path} is not YAML: {' '.join(str(error).split())}. {advice}") from error
    if not isinstance(data, dict):
        raise RequestError(f"{path} holds no keys with values. {advice}")
    return data


def _drop_nulls(data: Mapping[Any, Any]) -> dict[Any, Any]:
    """A key without a value counts as left out."""
    return {
        key: _drop_nulls(value) if isinstance(value, dict) else value
        for key, value in data.items()
        if value is not None
    }


def _refuse_unknown(context: _ErrorContext, data: Mapping[Any, Any], known: Sequence[str]) -> None:
    for key in data:
        if key in known:
            continue
        if key in TOP_LEVEL_KEYS:
            raise context.error(key, "stands in a pass; it belongs at the top of the file.")
        near = get_close_matches(str(key), known, n=1) or get_close_matches(str(key), TOP_LEVEL_KEYS, n=1)
        advice = f"Did you mean {near[0]}?" if near else "Remove it."
        raise context.error(key, f"is no key of a pipeline config. {advice}")


def _check_top_level(context: _ErrorContext, data: Mapping[str, Any]) -> None:
    for key in STRING_KEYS:
        if not isinstance(value := data.get(key, ""), str):
            raise context.error(key, f"is {value!r}; it must be text.")
    for key in NUMBER_KEYS:
        if not isinstance(value := data.get(key, 0), int | float) or isinstance(value, bool):
            raise context.error(key, f"is {value!r}; it must be a number.")
    for key, low in (("decode_timestep", 0.0), ("decode_noise_scale", 0.0), ("downscale_factor", 0.01)):
        if not low <= (value := data.get(key, 1)) <= 1:
            raise context.error(key, f"is {value}; it must lie between {low:g} and 1.")
    for key, known in (
        ("pipeline_type", PIPELINE_TYPES),
        ("precision", PRECISIONS),
        ("sampler", tuple(OFFICIAL_SAMPLERS)),
    ):
        if (value := data.get(key, known[0])) not in known:
            raise context.error(key, f"is {value!r}; it must be one of {', '.join(known)}.")


def _parse_recipe(context: _ErrorContext, data: Mapping[str, Any]) -> Recipe:
    sampler = OFFICIAL_SAMPLERS[data.get("sampler", "from_checkpoint")]
    both = {key: value for key, value in data.items() if key in (*PASS_KEYS, *GUIDANCE_KEYS)}
    _check_settings(context, both)
    mode = _parse_stg_mode(context, data)
    decode = data.get("decode_timestep", 0.0)
    common: dict[str, Any] = {"decode_timestep": decode, "decode_noise": data.get("decode_noise_scale", decode)}
    if data.get("pipeline_type", PIPELINE_TYPES[0]) == "base":
        for name in PASS_SECTIONS:
            if name in data:
                raise context.error(
                    name, "is given, but the pipeline_type is base, which has one pass. Use multi-scale."
                )
        return Recipe(first_pass=_with_explicit_sigmas(context, _parse_pass(context, both, mode), sampler), **common)
    for key in ("downscale_factor", *PASS_SECTIONS):
        if key not in data:
            raise context.error(key, "is missing; a pipeline_type of multi-scale needs it.")
    first, second = (
        _parse_pass(context.in_section(name), {**both, **_parse_section(context, data, name)}, mode)
        for name in PASS_SECTIONS
    )
    alone = _single_pass(first, second)
    return Recipe(
        first_pass=_with_explicit_sigmas(context.in_section(PASS_SECTIONS[0]), first, sampler),
        second_pass=_with_explicit_sigmas(context.in_section(PASS_SECTIONS[1]), second, sampler),
        single_pass=alone and _with_explicit_sigmas(context, alone, sampler),
        multi_scale=True,
        downscale_factor=data["downscale_factor"],
        **common,
    )


def _parse_section(context: _ErrorContext, data: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = data[name]
    if not isinstance(section, dict):
        raise context.error(name, f"is {section!r}; it must hold keys with values.")
    _refuse_unknown(context.in_section(name), section, (*PASS_KEYS, *GUIDANCE_KEYS))
    _check_settings(context.in_section(name), section)
    return section


def _check_settings(context: _ErrorContext, values: Mapping[str, Any]) -> None:
    """Build something of each value alone, so that an error names its key."""
    for key, value in values.items():
        if key == "stochastic_sampling" and not isinstance(value, bool):
            raise context.error(key, f"is {value!r}; it must be true or false.")
        kind, field = (Pass, PASS_KEYS[key]) if key in PASS_KEYS else (Guidance, GUIDANCE_KEYS[key])
        made = context.build(key, kind, **{field: value})
        if isinstance(made, Pass) and made.sigmas is not None and not _is_decreasing(made.sigmas):
            raise context.error(key, f"is {value}; the levels must fall, between 1 and 0, without 0 itself.")


def _is_decreasing(sigmas: Sequence[float]) -> bool:
    return bool(sigmas) and sigmas[0] <= 1 and sigmas[-1] > 0 and all(a > b for a, b in pairwise(sigmas))


def _parse_stg_mode(context: _ErrorContext, data: Mapping[str, Any]) -> str | None:
    """How STG disturbs a block; None where it is as everywhere."""
    said = data.get("stg_mode", ATTENTION_VALUES).lower()
    mode = OFFICIAL_STG_MODES.get(said, said)
    context.build("stg_mode", Guidance, stg_mode=mode)
    return None if mode == ATTENTION_VALUES else mode


def _parse_pass(context: _ErrorContext, values: Mapping[str, Any], mode: str | None) -> Pass:
    values = {**OFFICIAL_DEFAULTS, **values}
    if "timesteps" in values:
        del values["num_inference_steps"]  # the list has its own number
    for key in LIST_KEYS:
        if isinstance(values[key], list) and "guidance_timesteps" not in values:
            raise context.error(key, "is a list, and there are no guidance_timesteps that it is for. Add them.")
    guidance = Guidance(
        **{GUIDANCE_KEYS[key]: value for key, value in values.items() if key in GUIDANCE_KEYS}, stg_mode=mode
    )
    context.build("guidance_timesteps", guidance.check_lists)
    settings = {PASS_KEYS[key]: value for key, value in values.items() if key in PASS_KEYS}
    settings["stochastic"] = settings.get("stochastic") or None  # what is off is left open
    return context.build("timesteps", Pass, **settings, guidance=guidance)


def _single_pass(first_pass: Pass, second_pass: Pass) -> Pass | None:
    """The first pass made to end where the second would: it may stop early, and alone it must not.

    The official package has no such thing. Levels that the second goes on with below the first's are added, and
    levels that were left out at the end are put back.
    """
    if first_pass.sigmas is not None and second_pass.sigmas is not None:
        last = first_pass.sigmas[-1]
        more = tuple(level for level in second_pass.sigmas if level < last)
        return replace(first_pass, sigmas=(*first_pass.sigmas, *more)) if more else None
    return replace(first_pass, skip_final=0) if first_pass.skip_final else None


def _with_explicit_sigmas(context: _ErrorContext, settings: Pass, sampler: str | None) -> Pass:
    """The pass with the levels of a sampler that is not the checkpoint's: it shifts nothing, so they fit any size."""
    if sampler is None or settings.steps is None:
        return settings
    from kadr.sampling.schedules import Schedule  # loads torch

    steps, skips = settings.steps, {name: getattr(settings, name) for name in ("skip_initial", "skip_final")}
    levels = context.build("sampler", Schedule(sampler=sampler).get_sigmas, steps=steps, tokens=0, **skips)
    return replace(settings, steps=None, skip_initial=0, skip_final=0, sigmas=tuple(levels.tolist()))
