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

MAXIMUM_BYTES = 1 << 20  # the official ones are two kilobytes; above this it is another file
PIPELINES = ("base", "multi-scale")
PRECISIONS = ("bfloat16", "mixed_precision", "float8_e4m3fn")
SAMPLERS: Mapping[str, str | None] = {
    "from_checkpoint": None,
    "uniform": "Uniform",
    "linear-quadratic": "LinearQuadratic",
}
SHORT_MODES: Mapping[str, str] = {
    "stg_av": ATTENTION_VALUES,
    "stg_as": "attention_skip",
    "stg_r": "residual",
    "stg_t": "transformer_block",
}
# Official key -> field. These may stand at the top or in a pass.
GUIDANCE: Mapping[str, str] = {
    "guidance_scale": "scale",
    "stg_scale": "stg",
    "rescaling_scale": "rescale",
    "skip_block_list": "skip_blocks",
    "guidance_timesteps": "at",
    "cfg_star_rescale": "cfg_star",
}
PASS: Mapping[str, str] = {
    "num_inference_steps": "steps",
    "timesteps": "levels",
    "skip_initial_inference_steps": "skip_initial",
    "skip_final_inference_steps": "skip_final",
    "stochastic_sampling": "stochastic",
    "tone_map_compression_ratio": "tone_map",
}
LISTS = ("guidance_scale", "stg_scale", "rescaling_scale")  # a list of these is for guidance_timesteps
ABSENT: Mapping[str, Any] = {"num_inference_steps": 20, "guidance_scale": 4.5, "stg_scale": 1.0, "rescaling_scale": 0.7}
PASSES = ("first_pass", "second_pass")
TEXTS = (
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
NUMBERS = ("decode_timestep", "decode_noise_scale", "downscale_factor", "prompt_enhancement_words_threshold")
TOP = (*TEXTS, *NUMBERS, *PASSES, *PASS, *GUIDANCE)

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
        place = _Place(path)
        data = _without_nulls(_loaded(path))
        _refuse_unknown(place, data, TOP)
        _check_top(place, data)
        return cls(
            path=path,
            recipe=_recipe(place, data),
            checkpoint=data.get("checkpoint_path"),
            upscaler=data.get("spatial_upscaler_model_path"),
            text_encoder=data.get("text_encoder_model_name_or_path"),
            precision=data.get("precision", PRECISIONS[0]),
        )

    def parts(self, given: Mapping[str, Any] | None = None, *, upscale: bool = True) -> dict[str, Any]:
        """What `Engine.open` takes, by name. A name is looked for beside the file, then here, then in the registry.

        Args:
            given: parts that go before those of the file.
            upscale: name the upscaler too.

        Raises:
            RequestError: the file names what is neither a file nor a released model.
        """
        parts = dict(given or {})
        if "model" not in parts:
            parts["model"] = self._found("checkpoint_path", self.checkpoint, "model", "--model")
        if upscale and self.recipe.multi_scale and self.upscaler and "upscaler" not in parts:
            kind = "spatial upscaler"
            parts["upscaler"] = [self._found("spatial_upscaler_model_path", self.upscaler, kind, "--upscaler")]
        if "text_encoder" not in parts and self.text_encoder not in (None, registry.TEXT_ENCODER_REPO):
            key = "text_encoder_model_name_or_path"
            parts["text_encoder"] = self._found(key, self.text_encoder, "text encoder", "--text-encoder")
        return {**parts, "recipe": self.recipe}

    def _found(self, key: str, name: str | None, kind: str, flag: str) -> str:
        place = _Place(self.path)
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
class _Place:
    """Where something stands, for errors."""

    path: Path
    section: str = ""

    def error(self, key: object, problem: object) -> RequestError:
        return RequestError(f"{self.path}: {self.section}{key} {problem}")

    def checked(self, key: str, build: Callable[..., T], **values: Any) -> T:
        """Build something of one key's value; an error says the key."""
        try:
            return build(**values)
        except RequestError as error:
            raise self.error(key, f"cannot be taken: {error}") from error

    def inside(self, name: str) -> _Place:
        return _Place(self.path, f"{name}: ")


def _loaded(path: Path) -> Mapping[Any, Any]:
    advice = "Give a pipeline config such as configs/ltxv-13b-0.9.8-dev.yaml of the official package."
    try:
        if path.stat().st_size > MAXIMUM_BYTES:
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


def _without_nulls(data: Mapping[Any, Any]) -> dict[Any, Any]:
    """A key without a value counts as left out."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in data.items()
        if value is not None
    }


def _refuse_unknown(place: _Place, data: Mapping[Any, Any], known: Sequence[str]) -> None:
    for key in data:
        if key in known:
            continue
        if key in TOP:
            raise place.error(key, "stands in a pass; it belongs at the top of the file.")
        near = get_close_matches(str(key), known, n=1) or get_close_matches(str(key), TOP, n=1)
        advice = f"Did you mean {near[0]}?" if near else "Remove it."
        raise place.error(key, f"is no key of a pipeline config. {advice}")


def _check_top(place: _Place, data: Mapping[str, Any]) -> None:
    for key in TEXTS:
        if not isinstance(value := data.get(key, ""), str):
            raise place.error(key, f"is {value!r}; it must be text.")
    for key in NUMBERS:
        if not isinstance(value := data.get(key, 0), int | float) or isinstance(value, bool):
            raise place.error(key, f"is {value!r}; it must be a number.")
    for key, low in (("decode_timestep", 0.0), ("decode_noise_scale", 0.0), ("downscale_factor", 0.01)):
        if not low <= (value := data.get(key, 1)) <= 1:
            raise place.error(key, f"is {value}; it must lie between {low:g} and 1.")
    for key, known in (("pipeline_type", PIPELINES), ("precision", PRECISIONS), ("sampler", tuple(SAMPLERS))):
        if (value := data.get(key, known[0])) not in known:
            raise place.error(key, f"is {value!r}; it must be one of {', '.join(known)}.")


def _recipe(place: _Place, data: Mapping[str, Any]) -> Recipe:
    sampler = SAMPLERS[data.get("sampler", "from_checkpoint")]
    both = {key: value for key, value in data.items() if key in (*PASS, *GUIDANCE)}
    _check_settings(place, both)
    mode = _mode(place, data)
    decode = data.get("decode_timestep", 0.0)
    common: dict[str, Any] = {"decode_timestep": decode, "decode_noise": data.get("decode_noise_scale", decode)}
    if data.get("pipeline_type", PIPELINES[0]) == "base":
        for name in PASSES:
            if name in data:
                raise place.error(name, "is given, but the pipeline_type is base, which has one pass. Use multi-scale.")
        return Recipe(first_pass=_spelled_out(place, _pass(place, both, mode), sampler), **common)
    for key in ("downscale_factor", *PASSES):
        if key not in data:
            raise place.error(key, "is missing; a pipeline_type of multi-scale needs it.")
    first, second = (_pass(place.inside(name), {**both, **_section(place, data, name)}, mode) for name in PASSES)
    alone = _alone(first, second)
    return Recipe(
        first_pass=_spelled_out(place.inside(PASSES[0]), first, sampler),
        second_pass=_spelled_out(place.inside(PASSES[1]), second, sampler),
        single_pass=alone and _spelled_out(place, alone, sampler),
        multi_scale=True,
        downscale=data["downscale_factor"],
        **common,
    )


def _section(place: _Place, data: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = data[name]
    if not isinstance(section, dict):
        raise place.error(name, f"is {section!r}; it must hold keys with values.")
    _refuse_unknown(place.inside(name), section, (*PASS, *GUIDANCE))
    _check_settings(place.inside(name), section)
    return section


def _check_settings(place: _Place, values: Mapping[str, Any]) -> None:
    """Build something of each value alone, so that an error names its key."""
    for key, value in values.items():
        if key == "stochastic_sampling" and not isinstance(value, bool):
            raise place.error(key, f"is {value!r}; it must be true or false.")
        kind, field = (Pass, PASS[key]) if key in PASS else (Guidance, GUIDANCE[key])
        made = place.checked(key, kind, **{field: value})
        if isinstance(made, Pass) and made.sigmas is not None and not _fall(made.sigmas):
            raise place.error(key, f"is {value}; the levels must fall, between 1 and 0, without 0 itself.")


def _fall(levels: Sequence[float]) -> bool:
    return bool(levels) and levels[0] <= 1 and levels[-1] > 0 and all(a > b for a, b in pairwise(levels))


def _mode(place: _Place, data: Mapping[str, Any]) -> str | None:
    """How STG disturbs a block; None where it is as everywhere."""
    said = data.get("stg_mode", ATTENTION_VALUES).lower()
    mode = SHORT_MODES.get(said, said)
    place.checked("stg_mode", Guidance, mode=mode)
    return None if mode == ATTENTION_VALUES else mode


def _pass(place: _Place, values: Mapping[str, Any], mode: str | None) -> Pass:
    values = {**ABSENT, **values}
    if "timesteps" in values:
        del values["num_inference_steps"]  # the list has its own number
    for key in LISTS:
        if isinstance(values[key], list) and "guidance_timesteps" not in values:
            raise place.error(key, "is a list, and there are no guidance_timesteps that it is for. Add them.")
    guidance = Guidance(**{GUIDANCE[key]: value for key, value in values.items() if key in GUIDANCE}, stg_mode=mode)
    place.checked("guidance_timesteps", guidance.check_lists)
    settings = {PASS[key]: value for key, value in values.items() if key in PASS}
    settings["stochastic"] = settings.get("stochastic") or None  # what is off is left open
    return place.checked("timesteps", Pass, **settings, guidance=guidance)


def _alone(first: Pass, second: Pass) -> Pass | None:
    """The first pass made to end where the second would: it may stop early, and alone it must not.

    The official package has no such thing. Levels that the second goes on with below the first's are added, and
    levels that were left out at the end are put back.
    """
    if first.sigmas is not None and second.sigmas is not None:
        last = first.sigmas[-1]
        more = tuple(level for level in second.sigmas if level < last)
        return replace(first, levels=(*first.sigmas, *more)) if more else None
    return replace(first, skip_final=0) if first.skip_final else None


def _spelled_out(place: _Place, settings: Pass, sampler: str | None) -> Pass:
    """The pass with the levels of a sampler that is not the checkpoint's: it shifts nothing, so they fit any size."""
    if sampler is None or settings.steps is None:
        return settings
    from kadr.sampling.schedules import Schedule  # loads torch

    steps, skips = settings.steps, {name: getattr(settings, name) for name in ("skip_initial", "skip_final")}
    levels = place.checked("sampler", Schedule(sampler=sampler).get_sigmas, steps=steps, tokens=0, **skips)
    return replace(settings, steps=None, skip_initial=0, skip_final=0, levels=tuple(levels.tolist()))
