"""`kadr`: all verbs. Nothing here loads torch, and no verb does until it has to."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kadr.cli.commands import (
    batch,
    bench,
    convert,
    doctor,
    generate,
    inspect,
    plan,
    quantize,
    rerun,
    selftest,
    serve,
    train_lora,
)
from kadr.cli.commands.models import group as models
from kadr.cli.flags.official import OfficialCommand
from kadr.cli.terminal.closed_streams import open_closed_streams
from kadr.cli.terminal.errors import (
    EXIT_ERROR,
    explain_stdout_error,
    handle_errors,
    print_stderr,
    print_stdout,
    set_quiet,
)
from kadr.cli.terminal.signals import handle_signals
from kadr.errors import KadrError
from kadr.kernels.cpu.malloc import tune_malloc
from kadr.media.pyav import quiet_encoders
from kadr.memory.allocator import use_expandable_segments
from kadr.quoting import one_line
from kadr.setting_names import name_settings_by_flags
from kadr.version import __version__

_ClickException: type[Exception] = typer.BadParameter.__mro__[2]  # typer exports only its subclasses


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        is_eager=True,
        expose_value=False,
        callback=set_quiet,
        help="Print nothing but the result, and errors.",
    ),
]


class SafeGroup(TyperGroup):
    """A group of verbs: usage errors are one line, escaped and cut as other errors are, and every verb has --quiet."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _add_quiet(self)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _usage_on_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _usage_on_one_line():
            return super().invoke(ctx)


def _add_quiet(group: Any) -> None:
    """Gives every verb of a group the flag --quiet."""
    for command in group.commands.values():
        if hasattr(command, "commands"):
            _add_quiet(command)
        else:
            command.params.append(_quiet_flag())


def _quiet_flag() -> Any:
    """Returns the flag as typer makes it of an annotation, for verbs that do not have it in theirs."""

    def verb(quiet: Quiet = False) -> None:
        """Takes the flag."""

    donor = typer.Typer(add_completion=False)
    donor.command()(verb)
    return typer.main.get_command(donor).params[0]


@contextmanager
def _usage_on_one_line() -> Iterator[None]:
    try:
        yield
    except _ClickException as error:
        message = one_line(error.format_message())  # type: ignore[attr-defined]
        error.format_message = lambda: message  # type: ignore[attr-defined]
        raise


# Without markup, help is plain text: rich would take longer to load than everything else.
app = typer.Typer(
    name="kadr",
    cls=SafeGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        print_stdout(f"kadr {__version__}")
        raise typer.Exit


@app.callback(epilog="Exit codes: 0 done, 1 an error that is explained, 2 bad usage, 130 cancelled.")
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make video from text, images and clips with the LTX-Video family."""


app.command(cls=OfficialCommand, epilog=generate.GENERATE_EPILOG)(handle_errors()(generate.generate))
app.command(cls=OfficialCommand, epilog=plan.PLAN_EPILOG)(handle_errors()(plan.plan))
app.command(cls=OfficialCommand, epilog=doctor.DOCTOR_EPILOG)(handle_errors()(doctor.doctor))
app.command(cls=OfficialCommand, epilog=batch.BATCH_EPILOG)(handle_errors()(batch.batch))
app.command(epilog=rerun.RERUN_EPILOG)(handle_errors()(rerun.rerun))
app.command()(handle_errors()(inspect.inspect))
app.command("train-lora", epilog=train_lora.TRAIN_LORA_EPILOG)(handle_errors()(train_lora.train_lora))
app.command(epilog=quantize.QUANTIZE_EPILOG)(handle_errors()(quantize.quantize))
app.command(epilog=convert.CONVERT_EPILOG)(handle_errors()(convert.convert))
app.command(epilog=bench.BENCH_EPILOG)(handle_errors()(bench.bench))
app.command(epilog=selftest.SELFTEST_EPILOG)(handle_errors()(selftest.selftest))
app.command(epilog=serve.SERVE_EPILOG)(handle_errors()(serve.serve))
app.add_typer(models.app, name="models")


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line, handles signals, and ends the process with its exit code."""
    with handle_signals():
        run(args)


def run(args: Sequence[str] | None = None) -> None:
    """Runs the command line and ends the process with its exit code."""
    open_closed_streams()
    tune_malloc()
    quiet_encoders()
    name_settings_by_flags(True)
    use_expandable_segments()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a prompt may have letters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=args, prog_name="kadr")
    except (KadrError, OSError) as error:  # of --version and --help, which no verb prints
        print_stderr(f"error: {explain_stdout_error(error) if isinstance(error, OSError) else error}")
        sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    main()
