"""Pipeline configs of the official package: an unchanged YAML file becomes a recipe and the components it names.

A key that the file leaves out has the default of the official LTXVideoPipeline.__call__, not kadr's. In a file with two
passes, keys at the top hold for both, as in LTXMultiScalePipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from kadr.errors import RequestError
from kadr.models import registry
from kadr.models.registry import Recipe
from kadr.quoting import quote, show
from kadr.regular_file import read_text
from kadr.sampling.samplers import EULER_STOCHASTIC
from kadr.sampling.settings import ATTENTION_VALUES, Guidance, Pass
from kadr.validation import expand_home, is_number, near_names, suggest_names
from kadr.yaml_reader import parse_yaml

MAX_CONFIG_BYTES = 1 << 16  # the official ones have two kilobytes; a larger file is something else
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
# Official key -> field. These may be set at the top or in a pass.
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
    "stochastic_sampling": "sampler",
    "tone_map_compression_ratio": "tone_map",
}
LIST_KEYS = ("guidance_scale", "stg_scale", "rescaling_scale")  # a list has an entry for each guidance_timesteps
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
    """Contents of a pipeline config.

    Keys of prompt enhancement are checked and ignored: kadr never changes a prompt by itself. The precision is ignored
    too: `dtype` of `Engine.open` decides what is computed in, whatever the weights are stored as.

    Args:
        path: path of the file.
        recipe: its settings, as a recipe like those of the registry.
        checkpoint, upscaler, text_encoder: names or paths in the file; None where it has none.
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
        """Reads a config.

        Args:
            path: of the file; or the name of an official one, such as ltxv-13b-0.9.8-dev, which needs no file.

        Raises:
            RequestError: the file cannot be read, or has an unknown key or a bad value; the message names it. Or there
                is neither such a file nor such a name.
        """
        path = expand_home(path)
        if not path.exists() and (release := _find_named(path)) is not None:
            return cls(path=path, recipe=release.recipe, checkpoint=release.name, upscaler=release.upscaler)
        context = _ErrorContext(path)
        data = _drop_nulls(_load_yaml(path))
        _refuse_unknown(context, data, TOP_LEVEL_KEYS)
        _check_top_level(context, data)
        return cls(
            path=path,
            recipe=_parse_recipe(context, data),
            checkpoint=data.get("checkpoint_path"),
            upscaler=data.get("spatial_upscaler_model_path"),
            text_encoder=data.get("text_encoder_model_name_or_path"),
            precision=data.get("precision", PRECISIONS[0]),
        )

    def engine_arguments(
        self, overrides: Mapping[str, Any] | None = None, *, include_upscaler: bool = True
    ) -> dict[str, Any]:
        """Returns keyword arguments for `Engine.open`.

        A name is looked up beside the file, then in the current folder, then in the registry.

        Args:
            overrides: arguments that replace those of the file.
            include_upscaler: whether to return the upscaler too.

        Raises:
            RequestError: a name is neither a file nor a release.
        """
        overrides = overrides or {}
        located = self._locate_components(overrides, include_upscaler=include_upscaler)
        return {**overrides, **located, "recipe": self.recipe}

    def _locate_components(self, overrides: Mapping[str, Any], *, include_upscaler: bool) -> dict[str, Any]:
        """Locates the components that the file names and `overrides` does not replace."""
        located: dict[str, Any] = {}
        if "model" not in overrides:
            located["model"] = self._locate("checkpoint_path", self.checkpoint, "model", "--model")
        if include_upscaler and self.recipe.multi_scale and self.upscaler and "upscaler" not in overrides:
            kind = "spatial upscaler"
            located["upscaler"] = [self._locate("spatial_upscaler_model_path", self.upscaler, kind, "--upscaler")]
        if "text_encoder" not in overrides and self.text_encoder not in (None, registry.TEXT_ENCODER_REPO):
            key = "text_encoder_model_name_or_path"
            located["text_encoder"] = self._locate(key, self.text_encoder, "text encoder", "--text-encoder")
        return located

    def _locate(self, key: str, name: str | None, kind: str, flag: str) -> str:
        context = _ErrorContext(self.path)
        if not name:
            raise context.error(key, f"is missing, so there is no {kind}. Add it, or give one with {flag}.")
        for folder in (self.path.parent, Path()):
            if (path := folder / expand_home(name)).exists():
                return str(path.absolute())
        stem = Path(name).name.removesuffix(".safetensors")
        release = next((r for r in registry.RELEASES if r.kind == kind and stem in (r.file_stem, r.name)), None)
        if release is None:
            raise context.error(
                key,
                f"is {quote(name)}, which is neither a file beside the config or in this folder, nor a "
                f"released {kind}. "
                f"Give one with {flag}; `kadr models` lists the releases.",
            )
        return release.name


@dataclass(frozen=True)
class _ErrorContext:
    """Place of a key in a file, for error messages."""

    path: Path
    section: str = ""

    def error(self, key: object, problem: object) -> RequestError:
        """Returns an error that names the file, the section and the key."""
        return RequestError(f"{self.path}: {self.section}{key} {problem}", is_about_file=True)

    def build(self, key: str, build: Callable[..., T], **values: Any) -> T:
        """Calls `build` with values of one key; an error names the key."""
        try:
            return build(**values)
        except RequestError as error:
            raise self.error(key, f"is not valid: {error.args[0]}") from error

    def in_section(self, name: str) -> _ErrorContext:
        """Returns the context of a pass of the file."""
        return _ErrorContext(self.path, f"{name}: ")


def _find_named(path: Path) -> registry.Release | None:
    """Returns the released model whose official config has that name, with .yaml or without.

    The recipes of the registry are those of the official configs.

    Raises:
        RequestError: the text is no path, and no such name.
    """
    name = path.name.removesuffix(".yaml").removesuffix(".yml")
    if path.parent != Path():
        return None
    models = {release.name: release for release in registry.MODEL_RELEASES if release.repo is not None}
    if name not in models and path.name == name:
        advice = suggest_names(name, models)
        raise RequestError(f"there is no config {quote(name)}, neither a file nor a name. {advice}")
    return models.get(name)


def _load_yaml(path: Path) -> Mapping[Any, Any]:
    advice = "Give a pipeline config such as configs/ltxv-13b-0.9.8-dev.yaml of the official package."
    try:
        data = parse_yaml(read_text(path, max_bytes=MAX_CONFIG_BYTES))
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise RequestError(f"the config {path} cannot be read: {reason}. {advice}") from error
    except ValueError as error:
        raise RequestError(f"{path} is not YAML: {show(error, 200)}. {advice}") from error
    if not isinstance(data, dict):
        raise RequestError(f"{path} is not a mapping of keys to values. {advice}")
    return data


def _drop_nulls(data: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns the data without keys whose value is null: they count as left out."""
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
            raise context.error(key, "is set in a pass; it belongs at the top of the file.")
        nearest = near_names(str(key), known, count=1) or near_names(str(key), TOP_LEVEL_KEYS, count=1)
        advice = f"Did you mean {nearest[0]}?" if nearest else "Remove it."
        raise context.error(key, f"is not a key of a pipeline config. {advice}")


def _check_top_level(context: _ErrorContext, data: Mapping[str, Any]) -> None:
    for key in STRING_KEYS:
        if not isinstance(value := data.get(key, ""), str):
            raise context.error(key, f"is {quote(value)}; it must be text.")
    for key in NUMBER_KEYS:
        if not is_number(value := data.get(key, 0)):
            raise context.error(key, f"is {quote(value)}; it must be a number.")
    for key, low in (("decode_timestep", 0.0), ("decode_noise_scale", 0.0), ("downscale_factor", 0.01)):
        if not low <= (value := data.get(key, 1)) <= 1:
            raise context.error(key, f"is {value}; it must lie between {low:g} and 1.")
    for key, known in (
        ("pipeline_type", PIPELINE_TYPES),
        ("precision", PRECISIONS),
        ("sampler", tuple(OFFICIAL_SAMPLERS)),
    ):
        if (value := data.get(key, known[0])) not in known:
            raise context.error(key, f"is {quote(value)}; it must be one of {', '.join(known)}.")


def _parse_recipe(context: _ErrorContext, data: Mapping[str, Any]) -> Recipe:
    sampler = OFFICIAL_SAMPLERS[data.get("sampler", "from_checkpoint")]
    shared = {key: value for key, value in data.items() if key in (*PASS_KEYS, *GUIDANCE_KEYS)}  # by both passes
    _check_settings(context, shared)
    stg_mode = _parse_stg_mode(context, data)
    timestep = data.get("decode_timestep", 0.0)
    decoding: dict[str, Any] = {"decode_timestep": timestep, "decode_noise": data.get("decode_noise_scale", timestep)}
    if data.get("pipeline_type", PIPELINE_TYPES[0]) == "base":
        for name in PASS_SECTIONS:
            if name in data:
                raise context.error(
                    name, "is given, but the pipeline_type is base, which has one pass. Use multi-scale."
                )
        first = _parse_pass(context, shared, stg_mode)
        return Recipe(first_pass=_with_explicit_sigmas(context, first, sampler), **decoding)
    for key in ("downscale_factor", *PASS_SECTIONS):
        if key not in data:
            raise context.error(key, "is missing; a pipeline_type of multi-scale needs it.")
    first, second = (
        _parse_pass(context.in_section(name), {**shared, **_parse_section(context, data, name)}, stg_mode)
        for name in PASS_SECTIONS
    )
    single = _single_pass(first, second)
    return Recipe(
        first_pass=_with_explicit_sigmas(context.in_section(PASS_SECTIONS[0]), first, sampler),
        second_pass=_with_explicit_sigmas(context.in_section(PASS_SECTIONS[1]), second, sampler),
        single_pass=single and _with_explicit_sigmas(context, single, sampler),
        multi_scale=True,
        downscale_factor=data["downscale_factor"],
        **decoding,
    )


def _parse_section(context: _ErrorContext, data: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = data[name]
    if not isinstance(section, dict):
        raise context.error(name, f"is {quote(section)}; it must be a mapping of keys to values.")
    _refuse_unknown(context.in_section(name), section, (*PASS_KEYS, *GUIDANCE_KEYS))
    _check_settings(context.in_section(name), section)
    return section


def _check_settings(context: _ErrorContext, values: Mapping[str, Any]) -> None:
    """Checks each value by itself, so that an error names its key."""
    for key, value in values.items():
        if key == "stochastic_sampling":
            if not isinstance(value, bool):
                raise context.error(key, f"is {quote(value)}; it must be true or false.")
            continue
        kind, field = (Pass, PASS_KEYS[key]) if key in PASS_KEYS else (Guidance, GUIDANCE_KEYS[key])
        settings = context.build(key, kind, **{field: value})
        if isinstance(settings, Pass) and settings.sigmas is not None and not _is_decreasing(settings.sigmas):
            raise context.error(key, f"is {value}; the sigmas must decrease, from at most 1, and stay above 0.")


def _is_decreasing(sigmas: Sequence[float]) -> bool:
    return bool(sigmas) and sigmas[0] <= 1 and sigmas[-1] > 0 and all(a > b for a, b in pairwise(sigmas))


def _parse_stg_mode(context: _ErrorContext, data: Mapping[str, Any]) -> str | None:
    """Returns the STG mode; None where it is the default."""
    official_mode = data.get("stg_mode", ATTENTION_VALUES).lower()
    stg_mode = OFFICIAL_STG_MODES.get(official_mode, official_mode)
    context.build("stg_mode", Guidance, stg_mode=stg_mode)
    return None if stg_mode == ATTENTION_VALUES else stg_mode


def _parse_pass(context: _ErrorContext, values: Mapping[str, Any], stg_mode: str | None) -> Pass:
    values = {**OFFICIAL_DEFAULTS, **values}
    if "timesteps" in values:
        del values["num_inference_steps"]  # the list sets the number of steps
    for key in LIST_KEYS:
        if isinstance(values[key], list) and "guidance_timesteps" not in values:
            raise context.error(key, "is a list, but there are no guidance_timesteps for its entries. Add them.")
    guidance = Guidance(
        **{GUIDANCE_KEYS[key]: value for key, value in values.items() if key in GUIDANCE_KEYS}, stg_mode=stg_mode
    )
    context.build("guidance_timesteps", guidance.check_lists)
    settings = {PASS_KEYS[key]: value for key, value in values.items() if key in PASS_KEYS}
    settings["sampler"] = EULER_STOCHASTIC if settings.get("sampler") else None  # off is left open
    return context.build("timesteps", Pass, **settings, guidance=guidance)


def _single_pass(first_pass: Pass, second_pass: Pass) -> Pass | None:
    """Returns the first pass extended to where the second ends, for a run in a single pass; None if it is long enough.

    The official package has no such pass. The second pass's sigmas below the first's last are appended, and steps that
    the first pass skips at its end are restored.
    """
    if first_pass.sigmas is not None and second_pass.sigmas is not None:
        last = first_pass.sigmas[-1]
        appended = tuple(sigma for sigma in second_pass.sigmas if sigma < last)
        return replace(first_pass, sigmas=(*first_pass.sigmas, *appended)) if appended else None
    return replace(first_pass, skip_final=0) if first_pass.skip_final else None


def _with_explicit_sigmas(context: _ErrorContext, settings: Pass, sampler: str | None) -> Pass:
    """Returns the pass with the sigmas of a sampler other than the checkpoint's.

    Such a sampler does not shift by size, so its sigmas fit any.
    """
    if sampler is None or settings.steps is None:
        return settings
    from kadr.sampling.schedules import Schedule  # loads torch

    steps, skips = settings.steps, {name: getattr(settings, name) for name in ("skip_initial", "skip_final")}
    sigmas = context.build("sampler", Schedule(sampler=sampler).get_sigmas, steps=steps, tokens=0, **skips)
    return replace(settings, steps=None, skip_initial=0, skip_final=0, sigmas=tuple(sigmas.tolist()))
