"""Flag names of the official script, translated to kadr's before parsing.

They are not options of their own: some take lists, which the parser cannot express, and --help stays readable. The
names are the fields of `InferenceConfig` in ltx_video/inference.py and the keys of its pipeline configs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import typer

from kadr.cli.flags.groups import GroupedCommand
from kadr.quoting import quote
from kadr.request.inputs import CLIP_SUFFIXES

ALIASES: Mapping[str, str] = {
    "--num_frames": "--frames",
    "--frame_rate": "--fps",
    "--num_inference_steps": "--steps",
    "--guidance_scale": "--guidance",
    "--negative_prompt": "--negative-prompt",
    "--output_path": "--output",
    "--image_cond_noise_scale": "--image-noise",
    "--skip_initial_inference_steps": "--skip-initial",
    "--skip_final_inference_steps": "--skip-final",
    "--decode_timestep": "--decode-timestep",
    "--decode_noise_scale": "--decode-noise",
    "--pipeline_config": "--config",
    "--input_media_path": "--input-video",
    "--spatial_upscaler_model_path": "--upscaler",
    "--stg_scale": "--stg",
    "--stg_mode": "--stg-mode",
    "--rescaling_scale": "--rescale",
    "--skip_block_list": "--skip-blocks",
    "--guidance_timesteps": "--guidance-sigmas",
    "--timesteps": "--sigmas",
    "--tone_map_compression_ratio": "--tone-map",
}
SIZE_FLAGS = ("--width", "--height")
CONDITIONING_PATHS, CONDITIONING_FRAMES, CONDITIONING_STRENGTHS = (
    "--conditioning_media_paths",
    "--conditioning_start_frames",
    "--conditioning_strengths",
)
OFFLOAD_TO_CPU = "--offload_to_cpu"  # a switch, with or without a value
OFFLOAD_STAGES_FLAGS = ["--offload", "stages"]
MEDIA_FLAGS = ("--image", "--video")
LORA_FLAG, PROMPT_FLAG = "--lora", "--prompt"
# Between the values of one --image, --video or --lora, and between prompts. The system ends every argument at this
# character, so none of them contains it.
SEPARATOR = "\0"
BOX_PREFIX = "box="
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_STRENGTH_LIKE = re.compile(r"[+-]?[\d.,]+%?|[+-]?(nan|inf)", re.IGNORECASE)  # looks like a strength, malformed or not


class OfficialCommand(GroupedCommand):
    """A command that also accepts the official flag names."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        # The shell completes a line that is not finished.
        return super().parse_args(ctx, args if ctx.resilient_parsing else translate_official(args))


def translate_official(args: Sequence[str]) -> list[str]:
    """Translates arguments to kadr's flags; joins each --image, --video and --lora with its values.

    Raises:
        typer.BadParameter: lists that do not match, or a flag whose value is missing.
    """
    translated: list[str] = []
    sides: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    prompts: list[str] = []
    positional: list[str] = []  # arguments after --
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            positional = rest
            break
        name, has_value, value = word.partition("=")
        if has_value and name in {
            *ALIASES,
            OFFLOAD_TO_CPU,
            *SIZE_FLAGS,
            CONDITIONING_PATHS,
            CONDITIONING_FRAMES,
            CONDITIONING_STRENGTHS,
            PROMPT_FLAG,
            LORA_FLAG,
            *MEDIA_FLAGS,
        }:
            rest.insert(0, value)
            word = name
        if word == OFFLOAD_TO_CPU:
            translated += OFFLOAD_STAGES_FLAGS if _pop_switch(rest) else []
        elif word in SIZE_FLAGS:
            sides[word] = _pop_value(word, rest)
        elif word in (CONDITIONING_PATHS, CONDITIONING_FRAMES, CONDITIONING_STRENGTHS):
            lists[word] = _pop_values(rest)
        elif word == PROMPT_FLAG:
            prompts.append(_pop_value(word, rest))
        elif word in MEDIA_FLAGS:
            translated += [word, SEPARATOR.join([_pop_value(word, rest), *_pop_numbers(rest), *_pop_box(rest)])]
        elif word == LORA_FLAG:
            translated += [word, SEPARATOR.join([_pop_value(word, rest), *_pop_numbers(rest)])]
            _refuse_malformed_strength(rest)
        else:
            translated.append(ALIASES.get(word, word))
    if prompts and positional:
        raise typer.BadParameter(
            f"a prompt is given as {quote(positional[0])} too; give only one of the two.", param_hint=PROMPT_FLAG
        )
    final_args = [SEPARATOR.join(prompts)] if prompts else positional
    return [*translated, *_size(sides), *_media(lists), *(["--", *final_args] if final_args else [])]


def _pop_value(name: str, rest: list[str]) -> str:
    if not rest:
        raise typer.BadParameter("a value must follow.", param_hint=name)
    return rest.pop(0)


def _pop_switch(rest: list[str]) -> bool:
    """Returns whether a switch is on; removes its value, if there is one."""
    if rest and rest[0].lower() in ("true", "false", "1", "0", "yes", "no"):
        return rest.pop(0).lower() in ("true", "1", "yes")
    return True


def _pop_values(rest: list[str]) -> list[str]:
    """Removes and returns the values up to the next flag."""
    values = []
    while rest and not rest[0].startswith("--"):
        values.append(rest.pop(0))
    return values


def _pop_numbers(rest: list[str]) -> list[str]:
    """Removes and returns the frame and strength, or the two strengths, if they follow."""
    numbers: list[str] = []
    while rest and len(numbers) < 2 and _NUMBER.fullmatch(rest[0]):
        numbers.append(rest.pop(0))
    return numbers


def _refuse_malformed_strength(rest: list[str]) -> None:
    """Refuses a malformed strength: a prompt does not look like one."""
    if rest and _STRENGTH_LIKE.fullmatch(rest[0]):
        raise typer.BadParameter(
            f"{quote(rest[0])} is not a strength: write PATH, a number such as 0.8 and, for a second pass, another.",
            param_hint=LORA_FLAG,
        )


def _pop_box(rest: list[str]) -> list[str]:
    """Removes and returns box=X,Y,W,H, if it follows."""
    return [rest.pop(0)] if rest and rest[0].startswith(BOX_PREFIX) else []


def _size(sides: Mapping[str, str]) -> list[str]:
    if not sides:
        return []
    if len(sides) < len(SIZE_FLAGS):
        raise typer.BadParameter("--width and --height go together. Or give --size WxH.", param_hint=next(iter(sides)))
    return ["--size", "x".join(sides[side] for side in SIZE_FLAGS)]


def _media(lists: Mapping[str, list[str]]) -> list[str]:
    """Turns the three official lists into one flag per item."""
    if not lists:
        return []
    media, starts = lists.get(CONDITIONING_PATHS, []), lists.get(CONDITIONING_FRAMES, [])
    strengths = lists.get(CONDITIONING_STRENGTHS, ["1.0"] * len(media))
    if not len(media) == len(starts) == len(strengths):
        raise typer.BadParameter(
            f"{len(media)} media, {len(starts)} start frames and {len(strengths)} strengths; give equally many.",
            param_hint=CONDITIONING_PATHS,
        )
    items = zip(media, starts, strengths, strict=True)
    return [word for item in items for word in (_flag_for(item[0]), SEPARATOR.join(item))]


def _flag_for(path: str) -> str:
    return "--video" if path.lower().endswith(CLIP_SUFFIXES) else "--image"
