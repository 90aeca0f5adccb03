"""A request, and the options of an engine, from parsed flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from kadr.cli.flags import options, parse
from kadr.cli.flags.official import SEPARATOR
from kadr.media.encoders.formats import Encoding
from kadr.quant.weight_formats import NONE, WEIGHT_FORMATS
from kadr.request.request import Request
from kadr.request.windows import PROMPT_SEPARATOR, Windows
from kadr.sampling.settings import Guidance, Pass
from kadr.sampling.step_cache import CACHE_KINDS, FIRST_BLOCK, TAYLOR, StepCache
from kadr.spec.offload import OFFLOAD_AUTO, OFFLOAD_MODES

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPE_NAMES = ("auto", "bfloat16", "float32")


def engine_options(flags: options.OneDeviceModelFlags) -> dict[str, Any]:
    """Returns device, dtype, weight format, offload and LoRAs, as keywords of `Engine.open`."""
    return {"device": flags.device, **execution_options(flags), **lora_options(flags)}


def execution_options(flags: options.ModelFlags) -> dict[str, Any]:
    """Returns dtype, weight format and offload, as keywords of `Engine.open`."""
    keywords: dict[str, Any] = {} if flags.quant == NONE else {"quant": flags.quant}
    keywords |= {} if flags.offload == OFFLOAD_AUTO else {"offload": flags.offload}
    keywords |= {"compile_transformer": True} if flags.compile_transformer else {}
    return {"dtype": flags.dtype, **keywords}


def lora_options(flags: options.ModelFlags) -> dict[str, Any]:
    """Returns the LoRAs, as keywords of `Engine.open`."""
    loras: dict[str, Any] = {"loras": [parse.lora(text) for text in flags.lora]} if flags.lora else {}
    loras |= {"lora_partial": True} if flags.lora_partial else {}
    return loras | ({"merge_loras": True} if flags.merge_loras else {})


def check_choices(flags: options.GenerateFlags | options.PlanFlags | options.BatchFlags) -> None:
    """Refuses values that the parser lets through."""
    if flags.video.frames is not None and flags.video.seconds is not None:
        raise typer.BadParameter("give --frames or --seconds, not both.", param_hint="--seconds")
    devices = [flags.model.device] if isinstance(flags.model.device, str) else flags.model.device
    for device in devices or ["auto"]:
        check_execution(device, flags.model.dtype, flags.model.quant, flags.model.offload)
    parse.check_one_of("--cache", flags.denoising.cache, (NONE, *CACHE_KINDS))


def encoding_of(flags: options.OutputFlags) -> Encoding:
    """Returns how the frames become a file.

    Raises:
        MediaError: no such codec.
    """
    return Encoding(flags.codec, flags.crf, flags.keep_audio, not flags.no_metadata)


def check_execution(device: str, dtype: str, quant: str, offload: str) -> None:
    """Refuses values of --device, --dtype, --quant and --offload that the parser lets through."""
    parse.check_one_of("--device", device.partition(":")[0], DEVICES)
    parse.check_one_of("--dtype", dtype, DTYPE_NAMES)
    parse.check_one_of("--quant", quant.lower(), [name.lower() for name in WEIGHT_FORMATS])
    parse.check_one_of("--offload", offload, OFFLOAD_MODES)


def refuse_second_pass_flags(request: Request, flags: options.ModelFlags) -> None:
    """Refuses flags of a second pass together with windows, before anything is fetched."""
    for name, value in (("--upscaler", flags.upscaler), ("--second-model", flags.second_model)):
        if value and request.windows is not None:
            raise typer.BadParameter("it is for a second pass, and windows are made in one.", param_hint=name)


def warn_unused_flags(request: Request, flags: options.ModelFlags, engine: Engine) -> None:
    """Warns of second-pass flags if the recipe has a single pass."""
    has_second_strength = any(len(lora) > 2 and lora[1] != lora[2] for lora in map(parse.lora, flags.lora or ()))
    if flags.upscaler or flags.second_model or has_second_strength:
        from kadr.request.complete import complete_request  # loads torch
        from kadr.request.passes import unused_second_pass_options, warn_unused_second_pass

        unused = unused_second_pass_options(
            has_upscaler=bool(flags.upscaler),
            has_second_model=bool(flags.second_model),
            has_second_lora_strength=has_second_strength,
        )
        warn_unused_second_pass(complete_request(request, engine.spec.recipe), unused)


def build_request(prompt: str, flags: options.GenerateFlags | options.PlanFlags | options.BatchFlags) -> Request:
    """Builds the request; its length stays open if it is given in seconds.

    Raises:
        RequestError: a value out of its range.
    """
    video, denoising, media = flags.video, flags.denoising, flags.media
    return Request(
        prompt=prompt.replace(SEPARATOR, f" {PROMPT_SEPARATOR} "),
        windows=_windows(flags.windows, has_several_prompts=SEPARATOR in prompt),
        size=parse.size_or_auto(video.size),
        frames=video.frames,
        fps=video.fps,
        seed=video.seed,
        negative_prompt=video.negative_prompt,
        steps=denoising.steps,
        sigmas=parse.floats("--sigmas", denoising.sigmas),
        skip_initial=denoising.skip_initial,
        skip_final=denoising.skip_final,
        sampler=denoising.sampler,
        cache=_cache(denoising),
        guidance=_guidance(flags.guidance),
        guidance_batch=flags.guidance.guidance_batch,
        multi_scale=flags.second_pass.multi_scale,
        second_pass=_second(flags.second_pass),
        **_media(media),
        tone_map=flags.decoding.tone_map,
        decode_timestep=flags.decoding.decode_timestep,
        decode_noise=flags.decoding.decode_noise,
    )


def _windows(flags: options.WindowFlags, *, has_several_prompts: bool) -> Windows | None:
    """Returns the windows; None without any of their flags and with a single --prompt."""
    values: dict[str, Any] = {
        "frames": flags.window,
        "overlap": flags.overlap,
        "overlap_strength": flags.overlap_strength,
        "adain": flags.adain,
        "anchor_strength": flags.anchor_strength,
    }
    values = {name: value for name, value in values.items() if value is not None}
    return Windows(**values) if values or has_several_prompts else None


def _cache(flags: options.DenoisingFlags) -> StepCache | None:
    values: dict[str, Any] = {"threshold": flags.cache_threshold, "interval": flags.cache_interval}
    if flags.cache != NONE:
        return StepCache(flags.cache, **values)
    for name, value in values.items():
        if value is not None:
            kind = FIRST_BLOCK if name == "threshold" else TAYLOR
            raise typer.BadParameter(f"it needs --cache {kind}.", param_hint=f"--cache-{name}")
    return None


def _guidance(flags: options.GuidanceFlags) -> Guidance | None:
    lists = {
        "cfg_scale": parse.numbers("--guidance", flags.guidance),
        "stg_scale": parse.numbers("--stg", flags.stg),
        "rescale": parse.numbers("--rescale", flags.rescale),
        "skip_blocks": parse.blocks("--skip-blocks", flags.skip_blocks),
    }
    sigmas = parse.floats("--guidance-sigmas", flags.guidance_sigmas)
    if sigmas is None:
        _refuse_lists(lists)
    values: dict[str, Any] = {
        **lists,
        "sigmas": sigmas,
        "stg_mode": flags.stg_mode,
        "cfg_star": flags.cfg_star,
        "apg": flags.apg,
        "apg_norm": flags.apg_norm,
    }
    return None if all(value is None for value in values.values()) else Guidance(**values)


def _refuse_lists(lists: Mapping[str, Any]) -> None:
    """Refuses lists without the sigmas they are for: a recipe's own sigmas are easily mistaken for others."""
    scale, stg, rescale, blocks = lists.values()
    has_block_lists = isinstance(blocks, tuple) and any(isinstance(item, tuple) for item in blocks)
    for flag, is_list in (
        ("--guidance", isinstance(scale, tuple)),
        ("--stg", isinstance(stg, tuple)),
        ("--rescale", isinstance(rescale, tuple)),
        ("--skip-blocks", has_block_lists),
    ):
        if is_list:
            raise typer.BadParameter(
                "a value for each sigma needs the sigmas; give --guidance-sigmas, such as --guidance-sigmas 1.0,0.9.",
                param_hint=flag,
            )


def _second(flags: options.SecondPassFlags) -> Pass | None:
    values: dict[str, Any] = {
        "steps": flags.second_steps,
        "sigmas": parse.floats("--second-sigmas", flags.second_sigmas),
        "skip_initial": flags.second_skip_initial,
        "sampler": flags.second_sampler,
        "guidance": None if flags.second_guidance is None else Guidance(cfg_scale=flags.second_guidance),
        "tone_map": flags.second_tone_map,
    }
    values = {name: value for name, value in values.items() if value is not None}
    return Pass(**values) if values else None


def _media(flags: options.MediaFlags) -> dict[str, Any]:
    """Returns the request's fields for images and clips."""
    images = [parse.condition("--image", text) for text in flags.image or ()]
    clips = [parse.condition("--video", text) for text in flags.video or ()]
    return {
        "conditions": (*images, *clips),
        "controls": tuple(parse.control(text) for text in flags.control or ()),
        "input_video": None if flags.input_video is None else parse.absolute_path(flags.input_video),
        "denoise_strength": flags.denoise_strength,
        "image_noise": flags.image_noise,
        "image_crf": flags.image_crf,
    }


def component_options(flags: options.ModelFlags, request: Request) -> dict[str, Any]:
    """Returns the components that flags or the config file name, as keywords of `Engine.open`; a flag takes precedence.

    Raises:
        RequestError: the config file cannot be read, or names something that cannot be found.
    """
    components = _collect_components(flags)
    if flags.config is None:
        return components
    from kadr.request.official_config import OfficialConfig  # loads the YAML reader

    config = OfficialConfig.read(flags.config)
    # An upscaler is not fetched for a single pass.
    return config.engine_arguments(components, include_upscaler=request.multi_scale is not False)


def _collect_components(flags: options.ModelFlags) -> dict[str, Any]:
    """Returns the components that flags name, as keywords of `Engine.open`."""
    components: dict[str, Any] = {
        "model": flags.model,
        "release": flags.release,
        "upscaler": flags.upscaler,
        "second_model": flags.second_model,
        "text_encoder": flags.text_encoder,
        "vae": flags.vae,
        "models_dirs": flags.models_dir,
    }
    return {name: value for name, value in components.items() if value}


def with_duration(request: Request, seconds: float | None, engine: Engine) -> Request:
    """Returns the request with frames for a duration, if there is one; see `request.complete.with_duration`."""
    if seconds is None:
        return request
    from kadr.request import complete  # loads torch

    return complete.with_duration(request, seconds, engine.spec.recipe)
