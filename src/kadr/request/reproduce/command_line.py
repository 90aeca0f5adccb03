"""`command_line`: the `kadr generate` command that makes the video of a request; what no flag can say is a note."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kadr.quoting import show
from kadr.request.inputs import CLIP_SUFFIXES, READY, Condition, Control
from kadr.request.request import Request
from kadr.request.windows import Windows
from kadr.sampling.settings import Guidance, Pass
from kadr.sampling.step_cache import StepCache
from kadr.setting_names import FLAGS_BY_FIELD
from kadr.spec.lora import Lora

PROGRAM = ("kadr", "generate")
_NUL = "\0"  # no argument can have it: the system ends every argument there
_STDIN = "-"  # as a prompt, it reads prompts from stdin

# Fields of a request -> their flags, where a value is written as it is.
_PLAIN_FIELDS = (
    *("size", "frames", "fps", "seed", "negative_prompt", "steps", "sigmas", "skip_initial", "skip_final", "sampler"),
    *("input_video", "denoise_strength", "image_noise", "image_crf", "tone_map", "decode_timestep", "decode_noise"),
)
_PLAIN_FLAGS: Mapping[str, str | None] = {
    **{name: FLAGS_BY_FIELD[name] for name in _PLAIN_FIELDS},
    "downscale_factor": None,
    "original_prompt": None,
}
_GUIDANCE_FLAGS = {
    "cfg_scale": "--guidance",
    "sigmas": "--guidance-sigmas",
    "stg_scale": "--stg",
    "rescale": "--rescale",
    "stg_mode": "--stg-mode",
    "apg": "--apg",
    "apg_norm": "--apg-norm",
}
_SECOND_PASS_FLAGS = {
    "steps": "--second-steps",
    "sigmas": "--second-sigmas",
    "skip_initial": "--second-skip-initial",
    "skip_final": None,
    "sampler": "--second-sampler",
    "tone_map": "--second-tone-map",
}
_WINDOW_FLAGS = {
    "frames": "--window",
    "overlap": "--overlap",
    "overlap_strength": "--overlap-strength",
    "adain": "--adain",
    "anchor_strength": "--anchor-strength",
}
_CACHE_FLAGS = {"threshold": "--cache-threshold", "interval": "--cache-interval", "order": None}


@dataclass(frozen=True)
class CommandLine:
    """A command.

    Args:
        arguments: of `kadr generate`, without those two words.
        notes: what it does not say of the request, a sentence for each; () where it says all.
    """

    arguments: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Quotes it for a POSIX shell."""
        return shlex.join((*PROGRAM, *self.arguments))


def command_line(
    request: Request, *, model: str | None = None, loras: Sequence[Lora] = (), options: Mapping[str, str] | None = None
) -> CommandLine:
    """Returns the command that makes the same video; what equals the default is left out.

    Args:
        model: the value of --model; None leaves it out.
        loras: those of the engine; `request.lora_strengths` take the place of their own.
        options: further flags, each with its value.
    """
    words = _Words()
    for name, value in {"--model": model, **(options or {})}.items():
        words.add(name, value)
    for lora in _with_strengths(loras, request, words):
        words.add("--lora", *_lora_values(lora))
    words.add_fields(request, _PLAIN_FLAGS)
    _add_windows(words, request.windows)
    _add_media(words, request)
    _add_cache(words, request.step_cache)
    if isinstance(request.guidance, Guidance):
        _add_guidance(words, request.guidance)
    words.add_switch("--guidance-batch", request.guidance_batch or None)
    words.add_switch("--multi-scale", request.multi_scale, "--single-pass")
    _add_second_pass(words, request.second_pass)
    return CommandLine(_with_prompt(words, request.prompt), tuple(words.notes))


@dataclass
class _Words:
    """Arguments as they come together, with notes on what they do not say."""

    arguments: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, flag: str, value: Any, *further: Any) -> None:
        """Adds a flag with its values; None adds nothing."""
        if value is None:
            return
        first, *others = map(_format, (value, *further))
        # With a space between them, a value such as --frames would be taken for a flag.
        self.arguments += [f"{flag}={first}"] if first.startswith("-") else [flag, first]
        self.arguments += others

    def add_switch(self, flag: str, value: bool | None, off: str = "") -> None:
        """Adds one of two switches; None adds nothing."""
        if value is not None:
            self.arguments.append(flag if value else off)

    def add_fields(self, settings: Any, flags: Mapping[str, str | None], owner: str = "") -> None:
        """Adds the fields of a dataclass that differ from their defaults. owner: in the notes, such as "windows."."""
        defaults = {item.name: item.default for item in fields(settings)}
        for name, flag in flags.items():
            value = getattr(settings, name)
            if value is None or value == defaults[name]:
                continue
            if flag is None or value == () or (isinstance(value, str) and _NUL in value):
                self.cannot_say(owner + name, value)
            else:
                self.add(flag, value)

    def cannot_say(self, name: str, value: Any) -> None:
        """Notes what no flag says."""
        self.notes.append(f"{name} is {show(value)}, which no flag can say.")


def _format(value: Any) -> str:
    """Returns a value as flags take it: 24.0 is 24, and a list has commas."""
    if isinstance(value, tuple):
        return ",".join(map(_format, value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


def _with_prompt(words: _Words, prompt: str) -> tuple[str, ...]:
    """Returns the arguments with the prompt: first, or behind -- where it looks like a flag."""
    if _NUL in prompt or prompt == _STDIN:
        words.cannot_say("prompt", repr(prompt))
        prompt = " " if prompt == _STDIN else prompt.replace(_NUL, " ")
    return (*words.arguments, "--", prompt) if prompt.startswith("-") else (prompt, *words.arguments)


def _with_strengths(loras: Sequence[Lora], request: Request, words: _Words) -> list[Lora]:
    strengths = request.lora_strengths
    if strengths is None:
        return list(loras)
    if len(strengths) != len(loras):
        words.cannot_say("lora_strengths", strengths)
        return list(loras)
    pairs = [item if isinstance(item, tuple) else (item, None) for item in strengths]
    return [replace(lora, strength=pair[0], second_strength=pair[1]) for lora, pair in zip(loras, pairs, strict=True)]


def _lora_values(lora: Lora) -> tuple[Any, ...]:
    first, second = lora.pass_strengths()
    return (lora.path, first, second) if first != second else (lora.path, first) if first != 1 else (lora.path,)


def _add_windows(words: _Words, windows: Windows | None) -> None:
    if windows is None:
        return
    before = len(words.arguments)
    words.add_fields(windows, _WINDOW_FLAGS, "windows.")
    if len(words.arguments) == before:  # any of their flags asks for windows
        words.add("--overlap-strength", windows.overlap_strength)


def _add_media(words: _Words, request: Request) -> None:
    images = [condition for condition in request.conditions if not condition.is_clip]
    clips = [condition for condition in request.conditions if condition.is_clip]
    if (*images, *clips) != request.conditions:
        words.notes.append("the conditions are in another order: a command has the images before the clips.")
    for condition in (*images, *clips):
        words.add("--video" if condition.is_clip else "--image", *_condition_values(condition))
        if not condition.is_clip and Path(condition.media).suffix.lower() in CLIP_SUFFIXES:
            words.notes.append(f"{show(condition.media)} is an image, though its name ends as a clip's.")
    for control in request.controls:
        words.add("--control", _control_value(control))


def _condition_values(condition: Condition) -> list[Any]:
    values: list[Any] = [condition.media + _range_text(condition.frame_range)]
    if condition.frame != 0 or condition.strength != 1:
        values += [condition.frame] + [condition.strength] * (condition.strength != 1)
    if condition.box is not None:
        values.append(f"box={_format(condition.box)}")
    return values


def _control_value(control: Control) -> str:
    text = control.media + _range_text(control.frame_range)
    return text if control.kind == READY and ":" not in control.media else f"{control.kind}:{text}"


def _range_text(frame_range: tuple[int | None, int | None] | None) -> str:
    if frame_range is None:
        return ""
    return "#" + ":".join("" if end is None else str(end) for end in frame_range)


def _add_cache(words: _Words, cache: StepCache | None) -> None:
    if cache is None:
        return
    words.add("--cache", cache.kind)
    default = StepCache(cache.kind)
    changed = {name: flag for name, flag in _CACHE_FLAGS.items() if getattr(cache, name) != getattr(default, name)}
    words.add_fields(cache, changed, "cache.")


def _add_guidance(words: _Words, guidance: Guidance) -> None:
    """Adds guidance. A list of one value is written as that value, which means the same."""
    names = ("cfg_scale", "stg_scale", "rescale", "skip_blocks")
    lists = [name for name in names if _is_list(name, getattr(guidance, name))]
    if guidance.sigmas is None:
        for name in lists:
            words.cannot_say(f"guidance.{name}", f"{getattr(guidance, name)} without sigmas")
        guidance = replace(guidance, **dict.fromkeys(lists))
    words.add_fields(guidance, _GUIDANCE_FLAGS, "guidance.")
    if guidance.skip_blocks is not None:
        blocks = guidance.skip_blocks
        words.add("--skip-blocks", "/".join(map(_format, blocks)) if _is_list("skip_blocks", blocks) else blocks)
    words.add_switch("--cfg-star", guidance.cfg_star, "--no-cfg-star")


def _is_list(name: str, value: Any) -> bool:
    """Tells a list with a value for each of several sigmas from one value; of blocks, one value is a list of them."""
    if not isinstance(value, tuple) or len(value) < 2:
        return False
    return name != "skip_blocks" or isinstance(value[0], tuple)


def _add_second_pass(words: _Words, second_pass: Pass | None) -> None:
    if second_pass is None:
        return
    before = len(words.arguments)
    words.add_fields(second_pass, _SECOND_PASS_FLAGS, "second_pass.")
    guidance = second_pass.guidance
    if isinstance(guidance.cfg_scale, tuple):
        words.cannot_say("second_pass.guidance.cfg_scale", guidance.cfg_scale)
    else:
        words.add("--second-guidance", guidance.cfg_scale)
    for item in fields(guidance):
        if item.name != "cfg_scale" and (value := getattr(guidance, item.name)) is not None:
            words.cannot_say(f"second_pass.guidance.{item.name}", value)
    if len(words.arguments) == before:  # any of its flags says that there is one
        words.add("--second-skip-initial", second_pass.skip_initial)
