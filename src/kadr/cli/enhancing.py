"""The flags of prompt enhancement: who is asked, and what is said of it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kadr.cli import options
from kadr.cli.faults import say
from kadr.pipeline.request import Request
from kadr.text.endpoint import KEY

if TYPE_CHECKING:
    from kadr.text.enhance import Enhancer


def asked(flags: options.EnhanceFlags) -> Enhancer | None:
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
    from kadr.text.enhance import TIMEOUT, Enhancer  # loads an HTTP client

    timeout = TIMEOUT if flags.enhance_timeout is None else flags.enhance_timeout
    key = os.environ.get(KEY, "").strip() or None
    return Enhancer(flags.enhance, flags.enhance_model, key=key, required=flags.enhance_required, timeout=timeout)


def announce(enhancer: Enhancer | None) -> None:
    """Say what a dry run leaves out."""
    if enhancer is not None:
        say(f"{enhancer.place} would enhance the prompt; it was not asked, and the prompt is shown as it was written")


def enhanced(request: Request, enhancer: Enhancer | None, windows: Path | None = None) -> Request:
    """The request with the prompt that the endpoint made of it, which is said.

    Args:
        windows: the folder of a long video that is gone on with. Where these words were enhanced when it was begun,
            the same prompt is taken, and nobody is asked: another answer would be another video.

    Raises:
        EnhanceError: the endpoint fails, and --enhance-required is given.
    """
    if windows is not None:
        from kadr.pipeline.window_folder import enhanced_in  # loads torch

        if (prompt := enhanced_in(windows, request.prompt)) is not None:
            say(f"enhanced when the video was begun: {prompt}")
            return replace(request, prompt=prompt, original_prompt=request.prompt)
    if enhancer is None:
        return request
    from kadr.pipeline import enhance

    say(f"{enhancer.place} is asked to enhance the prompt")
    made = enhance.enhanced(request, enhancer)
    if made is not request:
        say(f"enhanced: {made.prompt}")
    return made
