"""`kadr plan`: what a request would take of this machine, and how it is made to fit."""

from __future__ import annotations

import json
from typing import Any

from kadr.cli import run
from kadr.cli.commands import generate
from kadr.cli.flags import options
from kadr.cli.flags.groups import with_flag_groups
from kadr.errors import CheckpointError
from kadr.request.request import Request

PLAN_EPILOG = "The flags are those of `kadr generate`. Nothing is loaded and nothing is fetched."


@with_flag_groups(options.PlanFlags)
def plan(prompt: options.Prompt, flags: options.PlanFlags) -> None:
    """Say what a video would take: memory and time, stage by stage.

    Takes the same flags as `kadr generate`, and prints how each part would be held and why. Ends with an error where
    nothing fits, and says what would.
    """
    generate.check_choices(flags)
    request = generate.build_request(prompt, flags)
    generate.refuse_second_pass_flags(request, flags.model)
    parts = generate.component_options(flags.model, request)
    run.refuse_missing_media(request)
    _refuse_unfetched({**parts, **generate.lora_options(flags.model)}, request, flags.video.seconds)
    model = parts.pop("model", "demo")
    engine = run.open_engine(model, **parts, **generate.engine_options(flags.model))
    made = engine.plan(generate.with_duration(request, flags.video.seconds, engine))
    print(json.dumps(made.to_json()) if flags.output.json else made)


def _refuse_unfetched(engine_options: dict[str, Any], request: Request, seconds: float | None) -> None:
    """Say what is not on disk: a plan is made from headers, and gigabytes are not fetched for it.

    Raises:
        CheckpointError: something is not.
    """
    from kadr.pipeline.dry_run import DryRunEngine

    engine = DryRunEngine.open(**engine_options)
    absent = [
        part for part in engine.run(generate.with_duration(request, seconds, engine)).components if part.path is None
    ]
    if absent:
        names = " and ".join(part.name for part in absent)
        raise CheckpointError(
            f"{names} {'is' if len(absent) == 1 else 'are'} not on disk, and a plan is made from what the files say. "
            f"Get it with `kadr models pull {absent[0].name}`, or see what the request comes to with `kadr generate "
            "--dry-run`."
        )
