"""`kadr doctor`: why a video looks bad or takes long, on this machine and with these flags, and what corrects it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, get_type_hints

import typer

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
from kadr.cli.prompts import STDIN, check_prompt_source, read_prompt_lines
from kadr.cli.terminal.errors import EXIT_ERROR, print_stdout
from kadr.request.request import Request, refuse_missing_media

if TYPE_CHECKING:
    from kadr.diagnosis.finding import Findings
    from kadr.diagnosis.machine import Machine
    from kadr.spec.model import ModelSpec

DOCTOR_EPILOG = (
    "A line of `kadr generate` works with `doctor` in its place; flags of the output and of seeds change nothing. Exit "
    "codes: 0 nothing makes the result bad, 1 something does, or no video can be made. Nothing is loaded or fetched."
)


@with_flag_groups(options.GenerateFlags)
def doctor(prompt: options.PromptOrStdin, flags: options.GenerateFlags) -> None:
    """Say why a video looks bad or takes long, and what corrects it.

    Alone it describes the machine and the software, and what would make it faster. With --model it also checks the
    model's files, and with a prompt or any flag of `kadr generate` that request: every setting off the model's recipe,
    and the flag that corrects it.
    """
    from kadr.diagnosis.finding import Findings  # these load torch
    from kadr.diagnosis.machine_checks import check_machine

    check_choices(flags)
    findings, spec = Findings(), None
    if prompt is not None or _has_request(flags):
        spec = _diagnose_requests(prompt, flags, findings)
    else:
        _check_model_folders(findings)
    machine = _read_machine(flags.model.device, spec, findings)
    findings.add(check_machine(machine))
    _print(machine, spec, findings, as_json=flags.output.json)
    if any(finding.is_bad for finding in findings.sorted()):
        raise typer.Exit(EXIT_ERROR)


def _has_request(flags: options.GenerateFlags) -> bool:
    """Returns whether any flag says something of a model or a request."""
    groups = get_type_hints(options.GenerateFlags)
    defaults = options.GenerateFlags(**{name: group() for name, group in groups.items()})
    relevant = replace(flags, output=defaults.output, model=replace(flags.model, device=defaults.model.device))
    return relevant != defaults


def _diagnose_requests(prompt: str | None, flags: options.GenerateFlags, findings: Findings) -> ModelSpec | None:
    """Adds what is wrong with the request of each prompt, and returns the model; None where it cannot be opened."""
    from kadr.diagnosis.diagnose import diagnose_request

    has_prompt = prompt is not None or flags.series.prompt_file is not None
    if has_prompt:
        check_prompt_source(prompt, flags.series.prompt_file)
    spec = None
    with findings.record():
        request = build_request("" if prompt in (None, STDIN) else prompt, flags)
        refuse_second_pass_flags(request, flags.model)
        components = component_options(flags.model, request)
        engine = run.open_engine(components.pop("model", "demo"), **components, **engine_options(flags.model))
        spec = engine.spec
        refuse_missing_media(request)
        request = with_duration(request, flags.video.seconds, engine)
        for one in _with_each_prompt(request, prompt, flags):
            diagnose_request(spec, one, findings, has_prompt=has_prompt, is_enhanced=flags.enhance.enhance is not None)
    return spec


def _with_each_prompt(request: Request, prompt: str | None, flags: options.GenerateFlags) -> list[Request]:
    """Returns the request with each line of a file of prompts or of stdin, if that is where they are."""
    if flags.series.prompt_file is None and prompt != STDIN:
        return [request]
    lines = read_prompt_lines(flags.series.prompt_file)
    return [replace(request, prompt=line) for line in dict.fromkeys(lines)]


def _check_model_folders(findings: Findings) -> None:
    from kadr.spec.model_folders import ModelFolders

    with findings.record():
        ModelFolders.open()


def _read_machine(device_name: str, spec: ModelSpec | None, findings: Findings) -> Machine:
    """Reads the machine as the model uses it; without a model, as a released one would."""
    from kadr.diagnosis.machine import read_machine
    from kadr.memory.device import pick_device

    if spec is not None:
        return read_machine(spec.device, spec.dtype)
    device = pick_device("auto")
    with findings.record():
        device = pick_device(device_name)
    return read_machine(device)


def _print(machine: Machine, spec: ModelSpec | None, findings: Findings, *, as_json: bool) -> None:
    from kadr.cli.terminal.diagnosis import print_diagnosis
    from kadr.pipeline.display.dry_run_rows import component_rows

    components = () if spec is None else spec.components
    if as_json:
        described = {
            "machine": machine.to_json(),
            "components": [component.to_json() for component in components],
            "findings": [finding.to_json() for finding in findings.sorted()],
        }
        print_stdout(json.dumps(described))
    else:
        print_diagnosis(machine, [*component_rows(components)], findings.sorted())
