"""A dry run in words: what would be opened and made, and the steps of each pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kadr.planning.plan import format_bytes
from kadr.request.inputs import Condition
from kadr.request.passes import ResolvedPass
from kadr.request.resolved_request import ResolvedRequest
from kadr.request.windows import Windows
from kadr.sampling.samplers import EULER
from kadr.sampling.settings import ATTENTION_VALUES
from kadr.spec.locate import ModelComponent

STEP_HEAD = ("step", "sigma", "guidance", "stg", "rescale", "blocks")


def describe_request(components: Iterable[ModelComponent], resolved: ResolvedRequest) -> Iterator[tuple[str, str]]:
    """Yields what would be opened, and the request with nothing left open, as pairs of a name and a value."""
    yield from component_rows(components)
    yield from _video(resolved)
    yield from _media(resolved)
    yield from _decoding(resolved)


def component_rows(components: Iterable[ModelComponent]) -> Iterator[tuple[str, str]]:
    """Yields the role of each component, and its name, release, state on disk and strengths."""
    for component in components:
        yield component.role, f"{component.name}{_release(component)}{_disk_state(component)}{_strengths(component)}"


def _release(component: ModelComponent) -> str:
    release = component.release
    return "" if release is None or release.name == component.name else f", release {release.name}"


def _disk_state(component: ModelComponent) -> str:
    if component.path is not None:
        return ""
    size = f": {format_bytes(component.bytes_to_fetch)} to fetch" if component.bytes_to_fetch else ""
    return f", not on disk{size}"


def _strengths(component: ModelComponent) -> str:
    if component.strengths is None:
        return ""
    first, second = component.strengths
    return f", strength {first:g}" + (f", {second:g} in a second pass" if second != first else "")


def _video(resolved: ResolvedRequest) -> Iterator[tuple[str, str]]:
    if resolved.windows is None:
        yield "prompt", resolved.request.prompt
    else:
        yield from _windows(resolved, resolved.windows)
    if resolved.uses_cfg:
        yield "negative prompt", resolved.negative_prompt or "(empty)"
    yield "size", f"{resolved.size}, sampled at {resolved.sampled_size}"
    yield "frames", f"{resolved.frames}, sampled as {resolved.sampled_frames}"
    yield "fps", f"{resolved.fps:g}"
    yield "seed", str(resolved.seed)
    if resolved.step_cache is not None:
        yield "step cache", str(resolved.step_cache)


def _windows(resolved: ResolvedRequest, windows: Windows) -> Iterator[tuple[str, str]]:
    last = len(resolved.prompts)
    for number, prompt in enumerate(resolved.prompts, 1):
        position = f"window {number}" if number < last else f"from window {number} on"
        yield "prompt", f"{prompt} ({position})"
    settings = f"AdaIN {windows.adain:g}, strength {windows.overlap_strength:g}"
    lengths = f"{len(resolved.window_passes)} of up to {windows.frames} frames, of which {windows.overlap} overlap"
    yield "windows", f"{lengths}; {settings}"
    if windows.anchor_strength:
        yield "anchor image", f"the image at frame 0, strength {windows.anchor_strength:g}"


def _media(resolved: ResolvedRequest) -> Iterator[tuple[str, str]]:
    denoise_strength = resolved.request.denoise_strength
    if resolved.input_video is not None:
        strength = "" if denoise_strength is None else f", strength {denoise_strength:g}"
        yield "input video", f"{resolved.input_video.path}{strength}"
    for condition in resolved.conditions:
        kind = "clip" if len(condition.media) > 1 else "image"
        yield kind, f"{condition}{_strength_and_box(condition.condition)}"
    for control in resolved.controls:
        yield "control", f"{control.control} (frames 0 to {len(control.media) - 1})"
    if resolved.conditions or resolved.input_video is not None:
        yield "images", f"through H.264 at quality {resolved.image_crf}, noise {resolved.image_noise:g}"


def _strength_and_box(condition: Condition) -> str:
    """Returns the strength of a condition, and its box if it has one."""
    box = "" if condition.box is None else f", box {','.join(map(str, condition.box))}"
    return f", strength {condition.strength:g}{box}"


def _decoding(resolved: ResolvedRequest) -> Iterator[tuple[str, str]]:
    last = resolved.passes[-1].settings
    tone_map = f", tone map {last.tone_map:g}" if last.tone_map else ""
    yield "decoding", f"at timestep {resolved.decode_timestep:g}, noise {resolved.decode_noise:g}{tone_map}"


def pass_headline(resolved_pass: ResolvedPass) -> str:
    """Returns the size of a pass or of a window, and the options that it uses."""
    grid, settings = resolved_pass.grid, resolved_pass.settings
    guidance = settings.guidance
    options = {
        f"sampler {settings.sampler}": settings.sampler != EULER,
        f"STG by {guidance.stg_mode or ATTENTION_VALUES}": any(
            step.stg_scale > 0 for step in resolved_pass.evaluation_guidance
        ),
        "CFG*": bool(guidance.cfg_star) and resolved_pass.uses_cfg,
        f"APG {guidance.apg}": guidance.apg is not None and guidance.apg >= 0 and resolved_pass.uses_cfg,
    }
    video = f"{resolved_pass.size}, {resolved_pass.frames} frames at {resolved_pass.fps:g} per second"
    latents = f"{grid.frames}x{grid.height}x{grid.width} latents, {grid.num_tokens} tokens"
    label = (
        f"pass {resolved_pass.number}"
        if resolved_pass.window_count == 1
        else f"each of {resolved_pass.window_count} windows"
    )
    return "; ".join([f"{label}: {video}", latents, *(option for option, is_on in options.items() if is_on)])


def step_rows(resolved_pass: ResolvedPass) -> Iterator[tuple[str, ...]]:
    """Yields the cells of each evaluation, under `STEP_HEAD`."""
    for number, step in enumerate(resolved_pass.evaluations, 1):
        for index, (sigma, guidance) in enumerate(step):
            values = (f"{value:g}" for value in (sigma, guidance.cfg_scale, guidance.stg_scale, guidance.rescale))
            yield str(number) if index == 0 else "", *values, ",".join(map(str, guidance.skip_blocks)) or "-"
