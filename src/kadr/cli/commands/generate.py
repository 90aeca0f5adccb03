"""`kadr generate`: a video from a prompt."""

from __future__ import annotations

from dataclasses import replace

from kadr.cli import enhance, run
from kadr.cli.flags import options
from kadr.cli.flags.groups import with_flag_groups
from kadr.cli.flags.request import (
    check_choices,
    component_options,
    engine_options,
    refuse_second_pass_flags,
    warn_unused_flags,
    with_duration,
)
from kadr.cli.series import SeriesWriter, build_series, print_dry_runs, read_prompts
from kadr.cli.series_output import reserve_outputs
from kadr.cli.terminal.daily_notice import print_daily
from kadr.request.request import refuse_missing_media

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
def generate(prompt: options.PromptOrStdin, flags: options.GenerateFlags) -> None:
    """Make a video from a prompt, or several from prompts and seeds.

    With --image or --video it shows your images and clips, with --control it follows a clip. Prints the path of each
    video.
    """
    check_choices(flags)
    series = build_series(prompt, flags)
    refuse_second_pass_flags(series.template, flags.model)
    components = component_options(flags.model, series.template)
    is_demo, model = "model" not in components, components.pop("model", "demo")
    refuse_missing_media(series.template)
    enhancer = enhance.create_enhancer(flags.enhance)
    series = read_prompts(series, prompt, flags)  # after all flags: somebody may type the prompts
    if flags.output.dry_run:
        enhance.announce_enhancer(enhancer)
        engine = run.open_engine(model, **components, **engine_options(flags.model))
        series = replace(series, template=with_duration(series.template, flags.video.seconds, engine))
        print_dry_runs(engine, series, as_json=flags.output.json)
        return
    with reserve_outputs(series, flags.output) as reserve:
        if is_demo:
            print_daily("demo", DEMO_NOTICE)
        if flags.model.no_prompt_cache:
            components["prompt_cache"] = False
        engine = run.open_engine(model, **components, **engine_options(flags.model))
        series = replace(series, template=with_duration(series.template, flags.video.seconds, engine))
        warn_unused_flags(series.template, flags.model, engine)
        SeriesWriter(engine, series, reserve, enhancer, flags).write_all()
