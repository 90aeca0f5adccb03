"""Settings of a video that kadr made, from what it stored in the file, as far as this server has what they name."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any

from kadr.errors import KadrError
from kadr.jobs.engine_maker import VIDEO_FILE
from kadr.jobs.job import COMPLETED, Job
from kadr.json_reader import parse_json
from kadr.quoting import one_line, show
from kadr.request.request import Request
from kadr.schema import upgrade_video_metadata
from kadr.server.auth import Client
from kadr.server.errors import ApiError
from kadr.server.inputs.bodies import check_body
from kadr.server.inputs.uploads import StoredUpload
from kadr.server.routes.drafts import settings_from_request, settings_of
from kadr.server.schema import MAX_PROMPT_CHARACTERS, CreateVideo
from kadr.server.state import ServerState
from kadr.spec.lora import Lora

MAX_CANDIDATES = 100  # jobs with the same prompt, of which one may have made the file
MAX_SEARCHED = 100  # words of its prompt: SQLite takes no condition of thousands
MAX_NAMED = 20  # things that are missing
_THIS_VIDEO = Path("this video")  # what errors call it


def read_settings(state: ServerState, client: Client, upload: StoredUpload) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns the settings of an uploaded video, as `POST /v1/videos` takes them, and names of what they lack.

    Anybody may have written what it stores: what is not a request of kadr gives no settings.
    """
    if not upload.metadata:
        return None, []
    try:
        record = upgrade_video_metadata(parse_json(upload.metadata, is_strict=True), _THIS_VIDEO)
        request = Request.from_json(record["request"])
        stored_loras = _read_loras(record, request)
    except KadrError as error:  # also of a newer kadr, whose number it names
        return None, [one_line(str(error))]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None, ["its settings are damaged"]
    if len(request.prompt) > MAX_PROMPT_CHARACTERS:
        return None, ["its prompt is too long for this server"]
    if (job := _find_job(state, client, request, state.uploads.path(upload))) is not None:
        return settings_of(job), []
    settings = settings_from_request(request.to_json(), {})
    if request.conditions and "windows" in settings:
        settings["windows"].pop("anchor_strength", None)  # the image that it is for is not here
    model, missing = _find_model(state, record)
    loras, missing_loras = _find_loras(state, stored_loras)
    if model is not None:
        settings["model"] = model
    if loras:
        settings["loras"] = loras
    try:
        check_body(CreateVideo, settings)
    except ApiError as error:  # a list or a text that is longer than this server takes
        return None, [error.message]
    missing += missing_loras + [show(path.name) for path in dict.fromkeys(request.media_paths())]
    return settings, missing[:MAX_NAMED]


def _find_job(state: ServerState, client: Client, request: Request, path: Path) -> Job | None:
    """Returns the job that made the very file at a path, if it is still here: its media are, too."""
    words = request.prompt.split()[:MAX_SEARCHED]
    page = state.queue.store.jobs(client.scope, statuses=(COMPLETED,), words=words, limit=MAX_CANDIDATES)
    return next((job for job in page.jobs if _is_same_file(state.queue.store.folders.output(job.id), path)), None)


def _is_same_file(output: Path, path: Path) -> bool:
    with suppress(OSError):  # one of them is deleted at this moment
        return filecmp.cmp(output / VIDEO_FILE, path, shallow=False)  # their sizes first
    return False


def _find_model(state: ServerState, record: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """Returns the name that this server has for a model, and what is missing."""
    names = [os.path.basename(name) for key in ("model_name", "release") if isinstance(name := record.get(key), str)]
    for name in names:
        served = [own for own, opened in state.catalogue.models.items() if opened == name]
        for candidate in (*served, name, Path(name).stem):
            try:
                return state.catalogue.find_model(candidate)[0], []
            except ApiError:
                continue
    return None, [show(name) for name in names[:1]]


def _read_loras(record: Mapping[str, Any], request: Request) -> list[Lora]:
    """Returns the LoRAs of a video, each with the strengths that it had.

    Raises:
        RequestError, TypeError, AttributeError: kadr did not write them.
    """
    strengths = request.lora_strengths or ()
    loras = []
    for number, entry in enumerate(record.get("loras") or ()):
        lora = Lora(entry.get("path"), entry.get("strength"), entry.get("second_strength"))
        if number < len(strengths):
            own = strengths[number]
            lora = Lora(lora.path, *(own if isinstance(own, tuple) else (own,)))
        loras.append(lora)
    return loras


def _find_loras(state: ServerState, loras: Sequence[Lora]) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the LoRAs of a video that this server has, by its own names, and the names of the others."""
    if not loras:
        return [], []
    names = {
        Path(name).stem: name for name in reversed(state.catalogue.lora_names())
    }  # the first of two that are alike
    found, missing = [], []
    for lora in loras:
        stem = PureWindowsPath(lora.path).stem  # takes the separators of every system
        if stem not in names:
            missing.append(show(stem))
            continue
        entry = {"name": names[stem], "strength": lora.strength, "second_strength": lora.second_strength}
        found.append({key: value for key, value in entry.items() if value is not None})
    return found, missing
