"""Reads a Dockerfile: its stages, each with its instructions, and what a container of a stage runs.

It knows the instructions that kadr's own Dockerfile uses and refuses others by line, so that a rehearsal does not pass
over a step that Docker would take.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

STEPS = ("RUN", "COPY")  # change files; all others are settings
SETTINGS = ("ARG", "ENV", "USER", "WORKDIR", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")
_ASSIGNMENT = re.compile(r"""(\w+)=("[^"]*"|\S*)""")


class DockerfileError(ValueError):
    """A line that this reader does not know."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, with its continued lines joined. line: number of its first line."""

    keyword: str
    value: str
    line: int


@dataclass(frozen=True)
class Stage:
    """A stage of the build. base: an image, or the name of a stage before it; name: "" of a last one without a name."""

    name: str
    base: str
    instructions: tuple[Instruction, ...]

    @property
    def sources(self) -> list[str]:
        """The stages that it copies from."""
        copies = [split_copy(each) for each in self.instructions if each.keyword == "COPY"]
        return [copy.stage for copy in copies if copy.stage]


@dataclass
class Container:
    """The settings of a container of a stage: its program, user, folders and ports, by the instructions so far."""

    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    folder: str = "/"
    volumes: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    health_check: list[str] = field(default_factory=list)

    def apply(self, instruction: Instruction, given: Mapping[str, str]) -> None:
        """Applies a setting. given: values of build arguments, which precede the defaults in the file."""
        keyword, value = instruction.keyword, instruction.value
        variables = {**self.arguments, **self.environment}
        if keyword == "ARG":
            name, _, default = value.partition("=")
            self.arguments[name] = given.get(name, expand(default, variables))
        elif keyword == "ENV":
            pairs = _ASSIGNMENT.findall(value)
            self.environment |= {name: expand(text.strip('"'), variables) for name, text in pairs}
        elif keyword == "USER":
            self.user = value
        elif keyword == "WORKDIR":
            self.folder = value
        elif keyword == "VOLUME":
            self.volumes += value.split()
        elif keyword == "EXPOSE":
            self.ports.append(int(value))
        elif keyword == "ENTRYPOINT":
            self.entrypoint = _read_list(instruction, value)
        elif keyword == "HEALTHCHECK":
            self.health_check = _read_list(instruction, value.partition("CMD")[2])


@dataclass(frozen=True)
class Copy:
    """A COPY. stage: that it copies from; "": from the context."""

    stage: str
    sources: tuple[str, ...]
    target: str


def split_copy(instruction: Instruction) -> Copy:
    """Returns the parts of a COPY."""
    words = instruction.value.split()
    stage = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else ""
    if words[0].startswith("--") or len(words) < 2:
        raise DockerfileError(f"line {instruction.line}: COPY {instruction.value} is not read here.")
    return Copy(stage, tuple(words[:-1]), words[-1])


def read_stages(text: str, given: Mapping[str, str] | None = None) -> list[Stage]:
    """Returns the stages of a Dockerfile, in order.

    Args:
        given: values of build arguments.

    Raises:
        DockerfileError: an instruction that is not read here.
    """
    outer, stages = Container(), []
    for instruction in _instructions(text):
        if instruction.keyword == "FROM":
            base, _, name = instruction.value.partition(" AS ")
            stages.append(Stage(name, expand(base, outer.arguments), ()))
        elif stages:
            last = stages[-1]
            stages[-1] = Stage(last.name, last.base, (*last.instructions, instruction))
        else:
            outer.apply(instruction, given or {})
    known = Container(arguments=outer.arguments)
    return [_with_outer_arguments(stage, known.arguments) for stage in stages]


def needed_stages(stages: list[Stage]) -> list[Stage]:
    """Returns the stages that the last one is made of, in order, itself included."""
    needed = {stages[-1].name}
    for stage in reversed(stages):
        if stage.name in needed:
            needed |= {stage.base, *stage.sources}
    return [stage for stage in stages if stage.name in needed]


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replaces $NAME, ${NAME} and ${NAME:-default}."""
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2]) or match[3] or "", text)


def _with_outer_arguments(stage: Stage, outer: Mapping[str, str]) -> Stage:
    """Returns a stage in which `ARG NAME` has the value from before the first FROM, as Docker passes it on."""
    instructions = [
        Instruction("ARG", f"{each.value}={outer[each.value]}", each.line)
        if each.keyword == "ARG" and each.value in outer
        else each
        for each in stage.instructions
    ]
    return Stage(stage.name, stage.base, tuple(instructions))


def _instructions(text: str) -> Iterator[Instruction]:
    value, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        first = first if value else number
        value += line.strip().removesuffix("\\").rstrip() + " "
        if line.rstrip().endswith("\\"):
            continue
        keyword, _, rest = value.strip().partition(" ")
        if keyword not in ("FROM", *STEPS, *SETTINGS):
            raise DockerfileError(f"line {first}: {keyword} is not read here.")
        yield Instruction(keyword, rest.strip(), first)
        value = ""


def _read_list(instruction: Instruction, text: str) -> list[str]:
    """Returns the words of the form in JSON, which no shell reads."""
    try:
        words: Any = json.loads(text)
    except ValueError as error:
        raise DockerfileError(f"line {instruction.line}: {instruction.keyword} must be a list in JSON.") from error
    return list(words)
