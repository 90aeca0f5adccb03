"""Plans as the API shows them: what a video would take, how its prompts are read, and what would fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from kadr.errors import KadrWarning, PlanError
from kadr.media.known_headers import use_known_headers
from kadr.planning.plan import Plan
from kadr.request.prompt_words import describe_prompts
from kadr.request.resolved_request import ResolvedRequest
from kadr.request.windows import Windows
from kadr.server.routes.drafts import API_NAMES, Draft
from kadr.server.routes.views import format_seconds
from kadr.server.state import ServerState
from kadr.shapes import Size


def show_plan(state: ServerState, draft: Draft, resolved: ResolvedRequest) -> dict[str, Any]:
    """Returns the plan of a draft as a `schema.VideoPlan`. Loads no weight, and fetches nothing."""
    engine = state.catalogue.engine(draft.engine)
    facts = {
        "model": draft.model,
        "prompts": [asdict(facts) for facts in describe_prompts(resolved, engine.spec)],
        **_show_shape(resolved),
    }
    with warnings.catch_warnings(record=True) as caught, use_known_headers(draft.headers):
        warnings.simplefilter("always", KadrWarning)
        try:
            plan = engine.plan(resolved, reclaimable_bytes=state.queue.supervisor.device_bytes)
        except PlanError as error:
            suggestion = show_fields(error.smaller) or None
            return {**facts, "fits": False, "message": state.hide_paths(str(error)), "suggestion": suggestion}
    messages = [str(item.message) for item in caught if issubclass(item.category, KadrWarning)]
    return {**facts, **_show_costs(state, plan), "warnings": [state.hide_paths(message) for message in messages]}


def show_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields of a `Request` as `POST /v1/videos` takes them: sizes as text, windows as an object."""
    return {API_NAMES.get(name, name): _as_json(value) for name, value in fields.items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, Windows):
        return asdict(value)
    return str(value) if isinstance(value, Size) else value


def _show_shape(resolved: ResolvedRequest) -> dict[str, Any]:
    """Returns size and length of a video, and what is sampled for it."""
    ends = [min(span.first_frame + span.frames, resolved.frames) for span in resolved.spans]
    return {
        "size": str(resolved.size),
        "num_frames": resolved.frames,
        "fps": resolved.fps,
        "seconds": format_seconds(resolved.frames / resolved.fps),
        "sampled_size": str(resolved.sampled_size),
        "sampled_frames": resolved.sampled_frames,
        "num_passes": len(resolved.passes),
        "windows": [list(added) for added in pairwise([0, *ends])],
    }


def _show_costs(state: ServerState, plan: Plan) -> dict[str, Any]:
    return {
        "fits": True,
        "message": plan.summary(),
        "peak_bytes": plan.peak_bytes,
        "estimated_seconds": round(plan.seconds, 1),
        "estimated_seconds_range": [round(bound, 1) for bound in plan.seconds_range],
        "bytes_to_fetch": plan.bytes_to_fetch,
        "reasons": [state.hide_paths(reason) for reason in plan.reasons()],
    }
