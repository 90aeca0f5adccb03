"""Drafts: what a client asks for, turned into a job: a request, the engine it needs, and the media it shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kadr.jobs.job import Job, NewJob
from kadr.media.known_headers import KnownHeader, use_known_headers
from kadr.quoting import quote
from kadr.request.complete import with_duration
from kadr.request.request import Request
from kadr.request.resolved_request import ResolvedRequest
from kadr.server.auth import Client
from kadr.server.errors import ApiError
from kadr.server.inputs.media_sources import MediaSource, describe_source, find_source
from kadr.server.schema import LoraReference, VideoSettings
from kadr.server.state import ServerState

# Names of other servers for fields of a `Request`.
FIELD_ALIASES = {"num_frames": "frames", "num_inference_steps": "steps", "guidance_scale": "guidance"}
API_NAMES = {name: alias for alias, name in FIELD_ALIASES.items() if name != "guidance"}  # which is an object
# Fields of a body that are not fields of a `Request` under that name.
_OTHER_FIELDS = {
    *("model", "seconds", "size", "width", "height", "input_reference", "lora", "loras", "priority", "extra_params"),
    *("video", "conditions", "controls", "input_video", *FIELD_ALIASES),
}


@dataclass(frozen=True)
class Draft:
    """A job that was asked for.

    Args:
        request: its request; each medium is the path of its file now.
        engine: what opens its model; see `NewJob`.
        model: name of the model.
        loras: as the client named them.
        sources: its media, in the order of `Request.media_paths`, each file once.
        priority: see `NewJob`.
        remixed_from: id of the video whose settings it has.
    """

    request: Request
    engine: Mapping[str, Any]
    model: str
    loras: Sequence[Mapping[str, Any]]
    sources: Sequence[MediaSource]
    priority: int = 0
    remixed_from: str | None = None

    @property
    def headers(self) -> dict[str, KnownHeader]:
        """The headers of its media, by path: nobody who resolves it may open them."""
        return {str(source.path): source.header for source in self.sources}

    def new_job(self, client: Client, resolved: ResolvedRequest) -> NewJob:
        """Returns the job to submit. resolved: its request, resolved for its model."""
        names = {str(source.path): source.name for source in self.sources}
        labels = {
            "model": self.model,
            "loras": list(self.loras),
            "media": [describe_source(source) for source in self.sources],
            "remixed_from": self.remixed_from,
            "size": str(resolved.size),
            "frames": resolved.frames,
            "fps": resolved.fps,
        }
        return NewJob(
            request=with_media(self.request, names).to_json(),
            engine=self.engine,
            owner=client.name,
            priority=self.priority,
            labels=labels,
        )


def with_media(request: Request, names: Mapping[str, str]) -> Request:
    """Returns a request with other paths for its media."""
    conditions = tuple(replace(item, media=names[item.media]) for item in request.conditions)
    controls = tuple(replace(item, media=names[item.media]) for item in request.controls)
    input_video = None if request.input_video is None else names[request.input_video]
    return replace(request, conditions=conditions, controls=controls, input_video=input_video)


def build_draft(
    state: ServerState, client: Client, body: VideoSettings, prompt: str, begin: str | None = None
) -> Draft:
    """Returns the draft of a body whose media are ids.

    Args:
        begin: id of the image or clip that the video begins with.

    Raises:
        ApiError: a model, LoRA or medium is not there, or two fields contradict each other.
        RequestError: a value is out of its range.
    """
    model, opened = state.catalogue.find_model(body.model)
    loras = _list_loras(body)
    engine = {"model": opened, "loras": [state.catalogue.find_lora(lora.name) for lora in loras]}
    sources = _Sources(state, client)
    fields = {**_plain_fields(body), "size": _size(body), "prompt": prompt}
    conditions = [{"media": begin}] if begin is not None else []
    fields["conditions"] = [sources.place(item, "conditions") for item in (*conditions, *(body.conditions or ()))]
    fields["controls"] = [sources.place(item, "controls") for item in body.controls or ()]
    if body.input_video is not None:
        fields["input_video"] = sources.path(body.input_video)
    if any(lora.strength is not None or lora.second_strength is not None for lora in loras):
        fields["lora_strengths"] = [_strength(lora) for lora in loras]
    request = Request.from_json(fields)
    if body.seconds is not None:
        if request.frames is not None:
            raise ApiError(400, "both seconds and frames are given; give one.", code="invalid_value", param="seconds")
        recipe = state.catalogue.engine(engine).spec.recipe
        with use_known_headers({str(source.path): source.header for source in sources.found}):
            request = with_duration(request, parse_seconds(body.seconds), recipe)
    named_loras = [lora.model_dump(exclude_none=True) for lora in loras]
    return Draft(request, engine, model, named_loras, sources.found, body.priority or 0)


def remix_draft(state: ServerState, client: Client, job: Job, prompt: str) -> Draft:
    """Returns the draft of a job again, with another prompt and the same seed.

    Raises:
        ApiError: its model is no longer here.
    """
    media = [find_source(state, client, f"{job.id}/{number}", number) for number in range(len(job.labels["media"]))]
    names = {source.name: str(source.path) for source in media}
    request = replace(with_media(Request.from_json(job.request), names), prompt=prompt, original_prompt=None)
    state.catalogue.find_model(job.labels["model"])
    return Draft(
        request, job.engine, job.labels["model"], job.labels["loras"], media, job.priority, remixed_from=job.id
    )


def parse_seconds(value: str | float) -> float:
    """Returns a number of seconds, which clients also send as text.

    Raises:
        ApiError: it is none.
    """
    try:
        seconds = float(value)
    except (ValueError, OverflowError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ApiError(
            400, f"seconds is {quote(value)}; it must be a number above 0.", code="invalid_value", param="seconds"
        )
    return seconds


def settings_of(job: Job) -> dict[str, Any]:
    """Returns all settings of a job, as `POST /v1/videos` takes them; its media are `VIDEO/N`."""
    references = {item["name"]: f"{job.id}/{number}" for number, item in enumerate(job.labels.get("media", ()))}
    settings = settings_from_request(job.request, references)
    settings |= {"model": job.labels.get("model", ""), "loras": job.labels.get("loras", []), "priority": job.priority}
    return {key: value for key, value in settings.items() if value != []}


def settings_from_request(request: Mapping[str, Any], references: Mapping[str, str]) -> dict[str, Any]:
    """Returns the settings in a request, as `POST /v1/videos` takes them, but for its model and LoRAs.

    Args:
        request: as `Request.to_json` writes it.
        references: path of each medium -> how the API refers to it. Media without one are left out.
    """
    settings = plain_settings(request)
    for kind in ("conditions", "controls"):
        settings[kind] = [
            {**_without_none(item), "media": references[item["media"]]}
            for item in request.get(kind) or ()
            if item["media"] in references
        ]
    if (input_video := settings.pop("input_video", None)) in references:
        settings["input_video"] = references[input_video]
    else:
        settings.pop("denoise_strength", None)
    for left_out in ("lora_strengths", "original_prompt", "is_clip"):
        settings.pop(left_out, None)
    return {key: value for key, value in settings.items() if value != []}


def plain_settings(request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a request in JSON that are not left open, and of its objects too."""
    settings = {key: value for key, value in request.items() if value not in (None, [], ()) and key != "schema"}
    for kind in ("guidance", "second_pass"):
        if isinstance(settings.get(kind), Mapping):
            settings[kind] = _without_none(settings[kind])
    return settings


def _without_none(item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in item.items()
        if value is not None and key != "is_clip"
    }


class _Sources:
    """The media of a draft, each found once."""

    def __init__(self, state: ServerState, client: Client) -> None:
        self._state, self._client = state, client
        self._by_reference: dict[str, MediaSource] = {}

    @property
    def found(self) -> list[MediaSource]:
        return list(self._by_reference.values())

    def path(self, reference: str) -> str:
        """Returns the path of a medium now."""
        if reference not in self._by_reference:
            index = len(self._by_reference)
            self._by_reference[reference] = find_source(self._state, self._client, reference, index)
        return str(self._by_reference[reference].path)

    def place(self, item: Mapping[str, Any], param: str) -> dict[str, Any]:
        """Returns a condition or control with the path of its medium."""
        if not isinstance(item.get("media"), str):
            raise ApiError(400, f"each of {param} must have media, an id.", code="invalid_value", param=param)
        if "is_clip" in item:
            raise ApiError(400, "is_clip is not a parameter: the file tells.", code="unknown_parameter", param=param)
        return {**item, "media": self.path(item["media"])}


def _plain_fields(body: VideoSettings) -> dict[str, Any]:
    """Returns the fields of a request that a body has under the same name or an alias."""
    settings = body.model_dump(exclude_none=True)
    fields = {name: value for name, value in settings.items() if name not in _OTHER_FIELDS and name != "prompt"}
    for alias, name in FIELD_ALIASES.items():
        if alias in settings:
            if name in fields:
                raise ApiError(400, f"both {alias} and {name} are given; give one.", code="invalid_value", param=alias)
            fields[name] = settings[alias]
    return fields


def _size(body: VideoSettings) -> str | None:
    if body.width is None and body.height is None:
        return body.size
    if body.size is not None or body.width is None or body.height is None:
        raise ApiError(400, "give size, or width with height.", code="invalid_value", param="size")
    return f"{body.width}x{body.height}"


def _list_loras(body: VideoSettings) -> list[LoraReference]:
    if body.lora is not None and body.loras is not None:
        raise ApiError(400, "both lora and loras are given; give one.", code="invalid_value", param="lora")
    named = [body.lora] if body.lora is not None else (body.loras or [])
    return [
        LoraReference(name=item, strength=None, second_strength=None) if isinstance(item, str) else item
        for item in named
    ]


def _strength(lora: LoraReference) -> Any:
    strength = 1.0 if lora.strength is None else lora.strength
    return strength if lora.second_strength is None else (strength, lora.second_strength)
