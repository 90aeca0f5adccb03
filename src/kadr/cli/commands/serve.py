"""`kadr serve`: the OpenAI Videos API over a queue that survives restarts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kadr.cache_home import data_home
from kadr.cli.flags import options
from kadr.cli.flags.options import flag
from kadr.cli.flags.request import check_execution
from kadr.cli.terminal.errors import print_stderr, print_stdout
from kadr.errors import KadrError, RequestError
from kadr.quant.weight_formats import NONE
from kadr.setting_names import name_settings_by_flags

if TYPE_CHECKING:
    from kadr.server.auth import Tokens
    from kadr.server.run import ServerSettings

SERVE_EPILOG = (
    "Prints its address on stdout once it listens. The first signal stops it: the video in progress goes back into the "
    "queue, and is made when the server runs again. docs/guides/serve.md has clients, tokens and limits."
)
DEFAULT_PORT = 8000

SECONDS_PER_DAY = 24 * 3600

Models = Annotated[
    list[str] | None,
    flag("--model", "NAME|PATH", "A model to serve; may be repeated, the first is the default. [default: demo]"),
]
Data = Annotated[
    Path | None, flag("--data", "DIR", "Folder of the queue and its videos. [default: kadr/serve in your data folder]")
]
Host = Annotated[
    str, flag("--host", "HOST", "Address to listen on; beyond this machine a token is needed. [default: 127.0.0.1]")
]
Port = Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0 takes any free one.")]
TokensFile = Annotated[
    Path | None, flag("--tokens", "FILE", "Named tokens, as --new-token prints them. For one token: KADR_TOKEN.")
]
NewToken = Annotated[str | None, flag("--new-token", "NAME", "Print a new token and its lines for the file; then end.")]
NewTokenAdmin = Annotated[bool, flag("--admin", None, "With --new-token: it may see and change everyone's videos.")]
AllowHost = Annotated[
    list[str] | None, flag("--allow-host", "NAME", "A name that the server goes by, besides localhost and addresses.")
]
AllowOrigin = Annotated[
    list[str] | None,
    flag("--allow-origin", "ORIGIN", "Another site whose pages may use it, such as https://studio.example."),
]
Dtype = Annotated[str, flag("--dtype", "auto|bfloat16|float32", "Dtype to compute in; auto suits the device.")]
Quant = Annotated[str, flag("--quant", "none|auto|int8|...", "Quantize the transformer's weights, as generate does.")]
Offload = Annotated[str, flag("--offload", "auto|none|stages|blocks", "Where memory is short, as generate does.")]
TextEncoder = Annotated[Path | None, flag("--text-encoder", "NAME|PATH", "T5 text encoder of all models.")]
Vae = Annotated[Path | None, flag("--vae", "NAME|PATH", "Take the VAE from this checkpoint.")]
Upscaler = Annotated[list[str] | None, flag("--upscaler", "NAME|PATH", "Latent upscaler between two passes.")]
MaxQueued = Annotated[int, typer.Option("--max-queued", metavar="N", help="Videos that may wait, of all clients.")]
MaxPerClient = Annotated[int | None, flag("--max-queued-per-client", "N", "Videos of one client that may wait.")]
KeepDays = Annotated[float | None, flag("--keep-days", "D", "Delete finished videos after so many days.")]
KeepGb = Annotated[float | None, flag("--keep-gb", "G", "Delete the oldest videos where all of them take more.")]
MaxUploadMb = Annotated[int, typer.Option("--max-upload-mb", metavar="N", min=1, max=65536, help="Size of a file.")]
Paused = Annotated[bool, flag("--paused", None, "Begin no video until the queue is resumed: look at it first.")]
HidePrompts = Annotated[bool, flag("--hide-prompts", None, "Write no prompt to the log.")]


def serve(
    model: Models = None,
    models_dir: options.ModelsDir = None,
    data: Data = None,
    host: Host = "127.0.0.1",
    port: Port = DEFAULT_PORT,
    tokens: TokensFile = None,
    new_token: NewToken = None,
    admin: NewTokenAdmin = False,
    allow_host: AllowHost = None,
    allow_origin: AllowOrigin = None,
    device: options.Devices = None,
    dtype: Dtype = "auto",
    quant: Quant = NONE,
    offload: Offload = "auto",
    text_encoder: TextEncoder = None,
    vae: Vae = None,
    upscaler: Upscaler = None,
    max_queued: MaxQueued = 1000,
    max_queued_per_client: MaxPerClient = None,
    keep_days: KeepDays = None,
    keep_gb: KeepGb = None,
    max_upload_mb: MaxUploadMb = 512,
    paused: Paused = False,
    hide_prompts: HidePrompts = False,
) -> None:
    """Serve videos over HTTP: the OpenAI Videos API, with a queue that survives restarts."""
    for name in device or ("auto",):
        check_execution(name, dtype, quant, offload)
    _require_extra()
    from kadr.jobs.expiry import Retention
    from kadr.jobs.job import QueueLimits
    from kadr.jobs.supervisor import MIN_FREE_BYTES
    from kadr.server.inputs.uploads import UploadLimits
    from kadr.server.run import ServerSettings

    if new_token is not None:
        _print_new_token(new_token, is_admin=admin)
        return
    keywords: dict[str, Any] = {"dtype": dtype, "offload": offload, "quant": None if quant == NONE else quant}
    keywords |= {"text_encoder": text_encoder and str(text_encoder), "vae": vae and str(vae)}
    keywords |= {"upscaler": tuple(upscaler)} if upscaler else {}
    name_settings_by_flags(False)  # from here on messages are for clients, who know fields
    _run(
        ServerSettings(
            models=name_models(model or ["demo"]),
            folder=data or _default_folder(),
            host=host,
            port=port,
            tokens=_read_tokens(tokens),
            hosts=tuple(allow_host or ()),
            origins=tuple(allow_origin or ()),
            models_dirs=tuple(models_dir or ()),
            engine_options=keywords,
            devices=tuple(device or ()),
            limits=QueueLimits(max_queued, max_queued_per_client),
            retention=Retention(
                max_age=None if keep_days is None else keep_days * SECONDS_PER_DAY,
                max_bytes=None if keep_gb is None else round(keep_gb * 1e9),
            ),
            upload_limits=UploadLimits(max_bytes=max_upload_mb << 20, min_free_bytes=MIN_FREE_BYTES),
            is_paused=True if paused else None,
            hides_prompts=hide_prompts,
        )
    )


def name_models(models: list[str]) -> dict[str, str]:
    """Returns name -> what `Engine.open` takes: clients see the name of a file, never where it lies.

    Raises:
        RequestError: two files have the same name.
    """
    named: dict[str, str] = {}
    for model in models:
        name = Path(model).name
        if name in named:
            raise RequestError(f"--model {named[name]} and --model {model} have the same name. Rename one.")
        named[name] = os.path.abspath(model) if os.path.exists(model) else model
    return named


def _require_extra() -> None:
    """Explains where the libraries of the server are missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise KadrError(f"kadr serve needs {error.name}, which is not installed: pip install 'kadr[serve]'.") from error


def _print_new_token(name: str, *, is_admin: bool) -> None:
    from kadr.server.auth import new_token

    token, lines = new_token(name, is_admin=is_admin)
    print_stderr("The token, shown this once; give it to whoever uses it:")
    print_stderr(token)
    print_stderr("Its lines for the file of --tokens:")
    print_stdout(lines.rstrip())


def _read_tokens(path: Path | None) -> Tokens:
    from kadr.server.auth import TOKEN_VARIABLE, Tokens

    single = os.environ.get(TOKEN_VARIABLE)
    if path is not None and single:
        raise RequestError(f"both --tokens and {TOKEN_VARIABLE} are given; give one.")
    if path is not None:
        return Tokens.read(path)
    return Tokens.single(single) if single else Tokens()


def _default_folder() -> Path:
    try:
        return data_home() / "serve"
    except RuntimeError as error:
        raise RequestError("this user has no home directory. Name a folder with --data.") from error


def _run(settings: ServerSettings) -> None:
    from kadr.server.run import serve as run_server

    run_server(settings, log=print_stderr, on_ready=lambda address: print_stdout(address))
