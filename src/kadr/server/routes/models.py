"""Models as the API shows them: what they know, and what a request with only a prompt gets from them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kadr.errors import KadrError
from kadr.models.registry import Recipe
from kadr.request.complete import complete_request
from kadr.request.request import Request
from kadr.sampling.settings import Guidance
from kadr.server.routes.drafts import API_NAMES, plain_settings
from kadr.server.state import ServerState
from kadr.spec.model import ModelSpec
from kadr.text.tokenizer import MAX_SEQUENCE_LENGTH


def show_model(state: ServerState, name: str) -> dict[str, Any]:
    """Returns a model as a `schema.ServedModel`. name: as the catalogue has it."""
    return {"id": name, "is_default": name == state.catalogue.default}


def describe_model(state: ServerState, name: str) -> dict[str, Any]:
    """Returns a model as a `schema.DescribedModel`: what its headers and the registry tell, if it can be opened."""
    answer = show_model(state, name)
    try:
        spec = state.catalogue.engine({"model": state.catalogue.find_model(name)[1], "loras": []}).spec
    except KadrError:
        return answer
    recipe = asdict(spec.recipe)
    return {
        **answer,
        **_show_release(spec),
        "recipe": {**recipe, "size": "{width}x{height}".format(**recipe["size"])},
        "max_prompt_tokens": MAX_SEQUENCE_LENGTH,
        "max_frames_at_once": spec.trained_at.max_frames,
        "defaults": default_settings(spec.recipe),
    }


def _show_release(spec: ModelSpec) -> dict[str, Any]:
    release = spec.release
    if release is None:
        return {}
    return {
        "release": release.name,
        "is_demo": release.is_demo,
        "is_distilled": release.is_distilled,
        "words": list(release.phrases) or None,
    }


def default_settings(recipe: Recipe) -> dict[str, Any]:
    """Returns what a request with only a prompt resolves to, in fields of `POST /v1/videos`.

    Steps stand there beside sigmas, and the scale beside the guidance that it is of, though a request has one of each.
    """
    request = complete_request(Request(""), recipe)
    settings = {API_NAMES.get(name, name): value for name, value in plain_settings(request.to_json()).items()}
    del settings["prompt"]
    if request.sigmas is not None:
        settings["num_inference_steps"] = len(request.sigmas)
    guidance = request.guidance
    if isinstance(guidance, Guidance) and isinstance(guidance.cfg_scale, float | int):
        settings["guidance_scale"] = guidance.cfg_scale
    return settings
