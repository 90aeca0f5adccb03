"""`kadr generate`: flags into a request."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from kadr.cli import making, options
from kadr.cli.faults import say
from kadr.cli.official import JOINT
from kadr.errors import RequestError
from kadr.pipeline.request import Condition, Request
from kadr.shapes import Size

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine

DEMO = (
    "No --model is named, so the bundled demo draws this: one coloured shape that moves, grows or stands still on a "
    "plain background, and nothing else. Real models: kadr models"
)
EPILOG = (
    "What is left out is taken from the model's own recipe. The official script's names work too: --num_frames, "
    "--frame_rate, --height with --width, --num_inference_steps, --guidance_scale, --output_path, "
    "--conditioning_media_paths and the rest."
)
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "bfloat16", "float32")


def generate(
    prompt: options.Prompt,
    model: options.Model = None,
    size: options.SizeText = None,
    frames: options.Frames = None,
    seconds: options.Seconds = None,
    fps: options.Fps = None,
    seed: options.Seed = 0,
    image: options.Image = None,
    negative_prompt: options.Negative = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    output: options.Output = None,
    json: options.Json = False,
    save_latents: options.SaveLatents = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    text_encoder: options.TextEncoder = None,
    vae: options.Vae = None,
    levels: options.Levels = None,
    skip_initial: options.SkipInitial = 0,
    skip_final: options.SkipFinal = 0,
    stochastic: options.Stochastic = None,
    guidance_batch: options.GuidanceBatch = False,
    image_noise: options.ImageNoise = None,
    image_crf: options.ImageCrf = None,
    decode_timestep: options.DecodeTimestep = None,
    decode_noise: options.DecodeNoise = None,
) -> None:
    """Make a video from a prompt.

    With --image it starts from your picture. Prints the path of the video.
    """
    if frames is not None and seconds is not None:
        raise typer.BadParameter("give --frames or --seconds, not both.", param_hint="--seconds")
    one_of("--device", device.partition(":")[0], DEVICES)
    one_of("--dtype", dtype, DTYPES)
    request = Request(
        prompt=prompt,
        size=parsed_size(size),
        frames=frames,
        fps=fps,
        seed=seed,
        steps=steps,
        levels=parsed_levels(levels),
        skip_initial=skip_initial,
        skip_final=skip_final,
        guidance=guidance,
        guidance_batch=guidance_batch,
        negative_prompt=negative_prompt,
        stochastic=stochastic,
        conditions=tuple(condition(text) for text in image or ()),
        image_noise=image_noise,
        image_crf=image_crf,
        decode_timestep=decode_timestep,
        decode_noise=decode_noise,
    )
    output = making.chosen_output(output)
    making.refuse_early(request, output, save_latents)
    if model is None:
        say(DEMO)
    engine = making.open_engine(model or "demo", text_encoder=text_encoder, vae=vae, device=device, dtype=dtype)
    if seconds is not None:
        request = replace(request, frames=frames_in(seconds, engine, request))
    making.make(engine, request, output, latents=save_latents, as_json=json)


def one_of(flag: str, value: str, known: Sequence[str]) -> None:
    """Refuse what no device or dtype is called."""
    if value not in known:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}.", param_hint=flag)


def parsed_size(text: str | None) -> Size | None:
    """Read "704x480"."""
    try:
        return None if text is None else Size.parse(text)
    except RequestError as error:
        raise typer.BadParameter(str(error), param_hint="--size") from error


def parsed_levels(text: str | None) -> tuple[float, ...] | None:
    """Read "1.0,0.9,0.725"."""
    try:
        return None if text is None else tuple(float(level) for level in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers such as 1.0,0.9.", param_hint="--levels"
        ) from error


def condition(text: str) -> Condition:
    """Read the parts of one --image. The path is made absolute, because the video remembers it."""
    path, *numbers = text.split(JOINT)
    frame, strength = (*numbers, *("0", "1.0")[len(numbers) :])
    try:
        at, share = int(frame), float(strength)
    except ValueError as error:
        wanted = f"frame {frame!r} and strength {strength!r} must be a whole number and a number: PATH FRAME STRENGTH."
        raise typer.BadParameter(wanted, param_hint="--image") from error
    return Condition(media=os.path.abspath(os.path.expanduser(path)), frame=at, strength=share)


def frames_in(seconds: float, engine: Engine, request: Request) -> int:
    """How many frames last so long, at the frame rate of the request or of the model."""
    fps = engine.resolve(request).fps
    if not 0 < seconds < math.inf or fps is None:
        raise RequestError(f"seconds is {seconds}; it must be a number above 0.")
    return max(1, round(seconds * fps))
