"""The flag names of the official script, put into kadr's words before they are parsed.

They are not options of their own: some take lists, which the parser has no form for, and --help stays readable. The
names are the fields of `InferenceConfig` in ltx_video/inference.py and the keys of its pipeline configs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import typer
from typer.core import TyperCommand

RENAMED: Mapping[str, str] = {
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
}
SIDES = ("--width", "--height")
MEDIA, STARTS, STRENGTHS = "--conditioning_media_paths", "--conditioning_start_frames", "--conditioning_strengths"
LATER: Mapping[str, str] = {
    "--pipeline_config": "The released models bring their own recipe: name one with --model, and change it by flags.",
    "--input_media_path": "Start from a picture with --image.",
    "--offload_to_cpu": "Leave it out: modules already leave the device after their stage where memory is tight.",
}
# Between the parts of one --image. The system ends every argument at this character, so no path holds it.
JOINT = "\0"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


class OfficialCommand(TyperCommand):
    """A command that also takes the official names."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        return super().parse_args(ctx, translated(args))


def translated(args: Sequence[str]) -> list[str]:
    """The arguments in kadr's words; each --image with its numbers joined to one.

    Raises:
        typer.BadParameter: an official flag that kadr has no counterpart for yet, or lists that do not match.
    """
    ours: list[str] = []
    sides: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    prompts: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            prompts += rest
            break
        name, given, value = word.partition("=")
        if given and name in {*RENAMED, *LATER, *SIDES, MEDIA, STARTS, STRENGTHS, "--prompt", "--image"}:
            rest.insert(0, value)
            word = name
        if word in LATER:
            raise typer.BadParameter(f"kadr cannot do this yet. {LATER[word]}", param_hint=word)
        if word in SIDES:
            sides[word] = _value(word, rest)
        elif word in (MEDIA, STARTS, STRENGTHS):
            lists[word] = _values(rest)
        elif word == "--prompt":
            prompts.append(_value(word, rest))
        elif word == "--image":
            ours += ["--image", JOINT.join([_value(word, rest), *_numbers(rest)])]
        else:
            ours.append(RENAMED.get(word, word))
    return [*ours, *_size(sides), *_images(lists), *(["--", *prompts] if prompts else [])]


def _value(name: str, rest: list[str]) -> str:
    if not rest:
        raise typer.BadParameter("a value must follow.", param_hint=name)
    return rest.pop(0)


def _values(rest: list[str]) -> list[str]:
    """What follows up to the next flag."""
    values = []
    while rest and not rest[0].startswith("--"):
        values.append(rest.pop(0))
    return values


def _numbers(rest: list[str]) -> list[str]:
    """The frame and the strength, where they follow."""
    numbers: list[str] = []
    while rest and len(numbers) < 2 and _NUMBER.fullmatch(rest[0]):
        numbers.append(rest.pop(0))
    return numbers


def _size(sides: Mapping[str, str]) -> list[str]:
    if not sides:
        return []
    if len(sides) < len(SIDES):
        raise typer.BadParameter("--width and --height go together. Or give --size WxH.", param_hint=next(iter(sides)))
    return ["--size", "x".join(sides[side] for side in SIDES)]


def _images(lists: Mapping[str, list[str]]) -> list[str]:
    """The three lists, item by item."""
    if not lists:
        return []
    media, starts = lists.get(MEDIA, []), lists.get(STARTS, [])
    strengths = lists.get(STRENGTHS, ["1.0"] * len(media))
    if not len(media) == len(starts) == len(strengths):
        raise typer.BadParameter(
            f"{len(media)} media, {len(starts)} start frames and {len(strengths)} strengths; give one of each to each.",
            param_hint=MEDIA,
        )
    images = (JOINT.join(parts) for parts in zip(media, starts, strengths, strict=True))
    return [word for image in images for word in ("--image", image)]
