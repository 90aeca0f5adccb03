"""Settings by the name that the reader of a message knows: a field in Python, in JSON and in tables, a flag on the
command line.

Messages are written once, with fields or flags. `speak` turns them into the words of the process: fields, unless the
command line has asked for flags.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# Field -> its flag. Only what a message may name; `command_line` knows how each is written.
FLAGS_BY_FIELD = {
    "size": "--size",
    "frames": "--frames",
    "fps": "--fps",
    "seconds": "--seconds",
    "seed": "--seed",
    "negative_prompt": "--negative-prompt",
    "steps": "--steps",
    "sigmas": "--sigmas",
    "skip_initial": "--skip-initial",
    "skip_final": "--skip-final",
    "sampler": "--sampler",
    "input_video": "--input-video",
    "denoise_strength": "--denoise-strength",
    "image_noise": "--image-noise",
    "image_crf": "--image-crf",
    "tone_map": "--tone-map",
    "decode_timestep": "--decode-timestep",
    "decode_noise": "--decode-noise",
    "guidance_batch": "--guidance-batch",
    "guidance.cfg_scale": "--guidance",
    "guidance.sigmas": "--guidance-sigmas",
    "stg_scale": "--stg",
    "skip_blocks": "--skip-blocks",
    "stg_mode": "--stg-mode",
    "apg_norm": "--apg-norm",
    "second_pass.steps": "--second-steps",
    "second_pass.sigmas": "--second-sigmas",
    "second_pass.guidance": "--second-guidance",
    "windows": "--window",
    "windows.overlap": "--overlap",
    "overlap_strength": "--overlap-strength",
    "anchor_strength": "--anchor-strength",
    "cache": "--cache",
    "multi_scale=False": "--single-pass",
    "multi_scale": "--multi-scale",
    "model": "--model",
    "release": "--release",
    "device": "--device",
    "dtype": "--dtype",
    "quant": "--quant",
    "offload": "--offload",
    "loras": "--lora",
    "lora_partial": "--lora-partial",
    "merge_loras": "--merge-loras",
    "upscaler": "--upscaler",
    "second_model": "--second-model",
    "text_encoder": "--text-encoder",
    "vae": "--vae",
    "models_dirs": "--models-dir",
    "codec": "--codec",
    "crf": "--crf",
    "keep_audio": "--keep-audio",
    "resume": "--resume",
}
_FIELDS_BY_FLAG = {flag: field for field, flag in FLAGS_BY_FIELD.items()}
# A field's name is a word of prose too ("the model", "9 frames"), but not where it has an underscore or begins a
# message that says its value.
_ANYWHERE = "|".join(sorted((re.escape(field) for field in FLAGS_BY_FIELD if "_" in field), key=len, reverse=True))
_FIRST = "|".join(field for field in FLAGS_BY_FIELD if "_" not in field and "." not in field)
_FIELD = re.compile(rf"(?<![\w./-])({_ANYWHERE})(?![\w./(-])|^({_FIRST})(?= (?:is|are) )")
# Behind a flag: a number or a size, a choice, the name of a model, or a word that stands for a value, such as NAME.
_VALUE = r"(?: (\d[\w.,:/-]*\w|\d|auto|none|stages|blocks|int8|fp8|[A-Z]+\b|[a-z][\w.]*-[\w.-]*\w))?"
_FLAG = re.compile(rf"(?<![\w-])(--[a-z][a-z-]*[a-z]){_VALUE}")
_COMMAND = re.compile(r"`[^`]*`|\bkadr [a-z-]+[^.;`]*")  # to be typed in a shell, whoever reads it


class _Speech:
    """The way this process names settings: it is one for all of it, as its terminal is."""

    with_flags = False


def name_settings_by_flags(with_flags: bool) -> None:
    """Makes messages name flags from now on, or fields again. For a process that kadr owns."""
    _Speech.with_flags = with_flags


def speak(message: str) -> str:
    """Returns a message with the names that its reader knows. Commands in it stay as they are."""
    replace: Callable[[str], str] = _with_flags if _Speech.with_flags else _with_fields
    parts, end = [], 0
    for command in _COMMAND.finditer(message):
        parts += [replace(message[end : command.start()]), command[0]]
        end = command.end()
    return "".join([*parts, replace(message[end:])]) if parts else replace(message)


def _with_flags(text: str) -> str:
    return _FIELD.sub(lambda match: FLAGS_BY_FIELD[match[1] or match[2]], text)


def _with_fields(text: str) -> str:
    def name(match: re.Match[str]) -> str:
        field, value = _FIELDS_BY_FLAG.get(match[1]), match[2]
        if field is None:
            return match[0]
        return field if value is None else f"{field}={value}"

    return _FLAG.sub(name, text)
