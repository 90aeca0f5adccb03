"""The flags of prompt enhancement: who is asked, and what is said of it."""

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

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine
    from kadr.text.enhance import Enhancer


def create_enhancer(flags: options.EnhanceFlags) -> Enhancer | None:
    """The endpoint that is to enhance the prompt, with the key of the environment.

    Raises:
        RequestError: a URL that is none, or that the key must not be sent to.
    """
    if flags.enhance is None:
        given = {"model": flags.enhance_model, "required": flags.enhance_required, "timeout": flags.enhance_timeout}
        for name, value in given.items():
            if value is not None and value is not False:
                raise typer.BadParameter("it needs --enhance URL.", param_hint=f"--enhance-{name}")
        return None
    from kadr.text.enhance import DEFAULT_TIMEOUT, Enhancer  # loads an HTTP client

    timeout = DEFAULT_TIMEOUT if flags.enhance_timeout is None else flags.enhance_timeout
    key = os.environ.get(KEY_VARIABLE, "").strip() or None
    return Enhancer(flags.enhance, flags.enhance_model, key=key, required=flags.enhance_required, timeout=timeout)


def announce_enhancer(enhancer: Enhancer | None) -> None:
    """Say what a dry run leaves out."""
    if enhancer is not None:
        print_stderr(
            f"{enhancer.display_url} would enhance the prompt; it was not asked, and the prompt is shown as it was written"
        )


def enhance_request(
    engine: Engine, request: Request, enhancer: Enhancer | None, output: Path, *, resume: bool
) -> Request:
    """The request with the prompt that the endpoint made of it, which is said.

    Args:
        resume: a long video is gone on with. The prompt that it was begun with is taken, and nobody is asked: another
            answer would be another video.

    Raises:
        EnhanceError: the endpoint fails, and --enhance-required is given.
        KadrError: the video cannot be made; nobody is asked then.
    """
    if resume and (begun := _with_stored_prompt(window_folder_path(output), request)) is not None:
        return begun
    if enhancer is None:
        return request
    from kadr.pipeline.longvideo.window_folder import check_resumable  # loads torch
    from kadr.request import prompt_enhancement

    if engine.resolve(request).windows is not None:
        check_resumable(window_folder_path(output), resume=resume)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KadrWarning)  # it is said when the video is made
        engine.plan(request)  # an answer may cost money, and does not change what can be made
    print_stderr(f"{enhancer.display_url} is asked to enhance the prompt")
    made = prompt_enhancement.enhance_prompt(request, enhancer)
    if made is not request:
        print_stderr(f"enhanced: {made.prompt}")
    return made


def _with_stored_prompt(folder: Path, request: Request) -> Request | None:
    """The request with the prompt that a long video was begun with, if that was made of the same words."""
    from kadr.pipeline.longvideo.window_folder import stored_prompt  # loads torch

    found = stored_prompt(folder, request.prompt)
    if found is None:
        return None
    prompt, original = found
    if original is not None:
        print_stderr(f"enhanced when the video was begun: {prompt}")
    return replace(request, prompt=prompt, original_prompt=original)
