"""Prompt enhancement from the command line: which endpoint is called, and what is printed about it."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kadr.cli.flags import options
from kadr.cli.terminal.errors import print_stderr
from kadr.errors import KadrWarning
from kadr.request.request import Request
from kadr.request.windows import window_folder_path
from kadr.text.endpoint import KEY_VARIABLE

MAX_SHOWN_PROMPT = 2000  # characters: an enhanced prompt has up to 190 words

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine
    from kadr.text.enhance import Enhancer


def create_enhancer(flags: options.EnhanceFlags) -> Enhancer | None:
    """Returns the endpoint that --enhance names, with the key from the environment; None without --enhance.

    Raises:
        RequestError: not a URL, or one that the key must not be sent to.
    """
    if flags.enhance is None:
        values = {"model": flags.enhance_model, "required": flags.enhance_required, "timeout": flags.enhance_timeout}
        for name, value in values.items():
            if value is not None and value is not False:
                raise typer.BadParameter("it needs --enhance URL.", param_hint=f"--enhance-{name}")
        return None
    from kadr.text.enhance import DEFAULT_TIMEOUT, Enhancer  # loads an HTTP client

    timeout = DEFAULT_TIMEOUT if flags.enhance_timeout is None else flags.enhance_timeout
    key = os.environ.get(KEY_VARIABLE, "").strip() or None
    return Enhancer(flags.enhance, flags.enhance_model, key=key, required=flags.enhance_required, timeout=timeout)


def announce_enhancer(enhancer: Enhancer | None) -> None:
    """Prints that a dry run does not call the endpoint."""
    if enhancer is not None:
        print_stderr(f"{enhancer.display_url} would enhance the prompt; a dry run does not call it")


def enhance_request(
    engine: Engine, request: Request, enhancer: Enhancer | None, output: Path, *, resume: bool
) -> Request:
    """Returns the request with the endpoint's prompt, and prints it.

    Args:
        resume: resume a long video. The prompt it began with is used and the endpoint is not called: another answer
            would make another video.

    Raises:
        EnhanceError: the endpoint fails, and --enhance-required is given.
        KadrError: the video cannot be made; the endpoint is not called then.
    """
    if resume and (stored := _with_stored_prompt(window_folder_path(output), request)) is not None:
        return stored
    if enhancer is None:
        return request
    from kadr.pipeline.longvideo.window_folder import check_resumable  # loads torch
    from kadr.request import prompt_enhancement
    from kadr.request.complete import complete_request

    if complete_request(request, engine.spec.recipe).windows is not None:
        check_resumable(window_folder_path(output), resume=resume)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KadrWarning)  # printed when the video is made
        engine.plan(request)  # an answer may cost money: refuse first what cannot be made
    print_stderr(f"asking {enhancer.display_url} to enhance the prompt")
    enhanced = prompt_enhancement.enhance_prompt(request, enhancer)
    if enhanced is not request:
        print_stderr(f"enhanced: {enhanced.prompt}", limit=MAX_SHOWN_PROMPT)
    return enhanced


def _with_stored_prompt(folder: Path, request: Request) -> Request | None:
    """Returns the request with the prompt that a long video began with, if it was made from the same words."""
    from kadr.pipeline.longvideo.window_folder import stored_prompt  # loads torch

    stored = stored_prompt(folder, request.prompt)
    if stored is None:
        return None
    prompt, original = stored
    if original is not None:
        print_stderr(f"enhanced when the video began: {prompt}", limit=MAX_SHOWN_PROMPT)
    return replace(request, prompt=prompt, original_prompt=original)
