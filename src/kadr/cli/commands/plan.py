"""`kadr plan`: memory and time of a request on this machine, and the placement of every stage."""

from __future__ import annotations

import json
from typing import Any

from kadr.cli import run
from kadr.cli.flags import options
from kadr.cli.flags.groups import with_flag_groups
from kadr.cli.flags.request import (
    build_request,
    check_choices,
    component_options,
    engine_options,
    lora_options,
    refuse_second_pass_flags,
    with_duration,
)
from kadr.cli.output_path import refuse_missing_media
from kadr.errors import CheckpointError
from kadr.request.request import Request

PLAN_EPILOG = "The flags are those of `kadr generate`. Nothing is loaded or fetched."


@with_flag_groups(options.PlanFlags)
def plan(prompt: options.Prompt, flags: options.PlanFlags) -> None:
    """Print what a video would take: memory and time, stage by stage.

    Takes the flags of `kadr generate`, and prints the placement of each component and the reason for it. If nothing
    fits, it exits with an error that says what would.
    """
    check_choices(flags)
    request = build_request(prompt, flags)
    refuse_second_pass_flags(request, flags.model)
    components = component_options(flags.model, request)
    refuse_missing_media(request)
    _refuse_unfetched({**components, **lora_options(flags.model)}, request, flags.video.seconds)
    model = components.pop("model", "demo")
    engine = run.open_engine(model, **components, **engine_options(flags.model))
    video_plan = engine.plan(with_duration(request, flags.video.seconds, engine))
    print(json.dumps(video_plan.to_json()) if flags.output.json else video_plan)


def _refuse_unfetched(engine_options: dict[str, Any], request: Request, seconds: float | None) -> None:
    """Refuses a plan for files that are not on disk: it is made from headers, and gigabytes are not fetched for it.

    Raises:
        CheckpointError: a component is not on disk.
    """
    from kadr.pipeline.dry_run import DryRunEngine

    engine = DryRunEngine.open(**engine_options)
    components = engine.run(with_duration(request, seconds, engine)).components
    absent = [component for component in components if component.path is None]
    if absent:
        names = " and ".join(component.name for component in absent)
        raise CheckpointError(
            f"{names} {'is' if len(absent) == 1 else 'are'} not on disk, and a plan is made from the files' headers. "
            f"Fetch it with `kadr models pull {absent[0].name}`, or see every step with `kadr generate --dry-run`."
        )
