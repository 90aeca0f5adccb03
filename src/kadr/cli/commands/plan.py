"""`kadr plan`: memory and time of a request on this machine, and the placement of every stage."""

from __future__ import annotations

import json

from kadr.cli import run
from kadr.cli.flags import options
from kadr.cli.flags.groups import with_flag_groups
from kadr.cli.flags.request import (
    build_request,
    check_choices,
    component_options,
    engine_options,
    refuse_second_pass_flags,
    with_duration,
)
from kadr.cli.terminal.errors import print_stdout
from kadr.cli.terminal.output import print_lines
from kadr.request.request import refuse_missing_media

PLAN_EPILOG = "The flags are those of `kadr generate`. Nothing is loaded or fetched: the model need not be on disk."


@with_flag_groups(options.PlanFlags)
def plan(prompt: options.Prompt, flags: options.PlanFlags) -> None:
    """Print what a video would take: memory and time, stage by stage.

    Takes the flags of `kadr generate`, and prints the placement of each component and the reason for it. If nothing
    fits, it exits with an error that says what would. The time is a wide range until --calibrate
    has measured the machine.
    """
    check_choices(flags)
    request = build_request(prompt, flags)
    refuse_second_pass_flags(request, flags.model)
    components = component_options(flags.model, request)
    refuse_missing_media(request)
    model = components.pop("model", "demo")
    engine = run.open_engine(model, **components, **engine_options(flags.model))
    request = with_duration(request, flags.video.seconds, engine)
    if flags.output.calibrate:
        run.calibrate(engine)
    video_plan = engine.plan(request).with_startup()
    if flags.output.json:
        print_stdout(json.dumps(video_plan.to_json()))
    else:
        print_lines(str(video_plan).split("\n"))
