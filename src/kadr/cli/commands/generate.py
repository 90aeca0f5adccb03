"""`kadr generate`: a video from a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kadr.cli import enhance, run
from kadr.cli.flags import options
from kadr.cli.flags.groups import with_flag_groups
from kadr.cli.flags.request import (
    build_request,
    check_choices,
    component_options,
    engine_options,
    refuse_second_pass_flags,
    warn_unused_flags,
    with_duration,
)
from kadr.cli.output_path import refuse_missing_media, reserve_output
from kadr.cli.terminal.daily_notice import print_daily
from kadr.cli.terminal.errors import print_stdout
from kadr.request.request import Request

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine

DEMO_NOTICE = (
    "No --model is named, so the bundled demo draws this: one coloured shape that moves, grows or stands still on a "
    "plain background, and nothing else. Its words: kadr models info demo. Real models: kadr models"
)
GENERATE_EPILOG = (
    "The model's recipe fills in what you leave out. The official script's flags work too: --num_frames, "
    "--frame_rate, --height with --width, --num_inference_steps, --guidance_scale, --output_path, --pipeline_config, "
    "--conditioning_media_paths and the rest."
)


@with_flag_groups(options.GenerateFlags)
def generate(prompt: options.Prompt, flags: options.GenerateFlags) -> None:
    """Make a video from a prompt.

    With --image or --video it shows your images and clips, with --control it follows a clip. Prints the path of the
    video.
    """
    check_choices(flags)
    request = build_request(prompt, flags)
    refuse_second_pass_flags(request, flags.model)
    components = component_options(flags.model, request)
    is_demo, model = "model" not in components, components.pop("model", "demo")
    refuse_missing_media(request)
    enhancer = enhance.create_enhancer(flags.enhance)
    if flags.output.dry_run:
        enhance.announce_enhancer(enhancer)
        print_dry_run(request, run.open_engine(model, **components, **engine_options(flags.model)), flags)
        return
    latents, resume = flags.output.save_latents, flags.output.resume
    with reserve_output(request, flags.output.output, latents_path=latents, resume=resume) as output:
        if is_demo:
            print_daily("demo", DEMO_NOTICE)
        if flags.model.no_prompt_cache:
            components["prompt_cache"] = False
        engine = run.open_engine(model, **components, **engine_options(flags.model))
        request = with_duration(request, flags.video.seconds, engine)
        warn_unused_flags(request, flags.model, engine)
        request = enhance.enhance_request(engine, request, enhancer, output, resume=resume)
        run.write_video(engine, request, output, latents_path=latents, as_json=flags.output.json, resume=resume)


def print_dry_run(request: Request, engine: Engine, flags: options.GenerateFlags) -> None:
    """Prints every step of the request, without making it."""
    from kadr.cli.terminal import dry_run  # loads torch

    result = engine.dry_run(with_duration(request, flags.video.seconds, engine))
    print_stdout(dry_run.format_dry_run(result, as_json=flags.output.json))
