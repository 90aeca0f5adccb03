"""Flags in groups: one dataclass has all of them, and the help has a section per group."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, fields
from functools import wraps
from inspect import Parameter, Signature, getdoc, signature
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer
from typer.core import TyperCommand

F = TypeVar("F")


class GroupedCommand(TyperCommand):
    """A command whose help lists flags by group."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                title = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or "Help"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def with_flag_groups(flags: type[F]) -> Callable[[Callable[[Any, F], None]], Callable[..., None]]:
    """Gives a verb the flags of a dataclass of groups; each group is a dataclass whose docstring is its title.

    The verb gets its first argument and the filled dataclass; the parser sees one long signature. The argument is None
    where it is left out, if its type allows that.
    """
    groups = get_type_hints(flags)

    def wrap(verb: Callable[[Any, F], None]) -> Callable[..., None]:
        argument = _first_parameter(verb)

        @wraps(verb)
        def run(**values: Any) -> None:
            filled_groups = {
                name: group(**{flag.name: values[flag.name] for flag in fields(group)})
                for name, group in groups.items()
            }
            verb(values[argument.name], flags(**filled_groups))

        parameters = [
            argument,
            *(parameter for group in groups.values() for parameter in _group_parameters(group)),
        ]
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return wrap


def _first_parameter(verb: Callable[..., None]) -> Parameter:
    name = next(iter(signature(verb).parameters))
    hint = get_type_hints(verb, include_extras=True)[name]
    default = None if type(None) in get_args(get_args(hint)[0]) else Parameter.empty
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=hint)


def _group_parameters(group: Any) -> list[Parameter]:
    """Returns the flags of a group as parameters, each with the group's title."""
    hints, title = get_type_hints(group, include_extras=True), (getdoc(group) or "").rstrip(".")
    parameters = []
    for flag in fields(group):
        kind, info = get_args(hints[flag.name])
        assert isinstance(info, type(typer.Option()))
        info = copy(info)  # several verbs may share a flag
        info.rich_help_panel = title
        default = Parameter.empty if flag.default is MISSING else flag.default
        parameters.append(
            Parameter(flag.name, Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=Annotated[kind, info])
        )
    return parameters
