"""Route of commands: a video as the command line that makes it again."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from kadr.jobs.job import Job
from kadr.models.registry import RELEASES_BY_NAME
from kadr.request.reproduce.command_line import CommandLine, command_line
from kadr.request.request import Request
from kadr.server import schema
from kadr.server.routes import documents
from kadr.server.state import Sender, ServerState, State
from kadr.spec.lora import Lora

DEMO = "demo"  # `kadr generate` takes it where none is named
# Options of a server that change frames -> flag, and its default.
_QUALITY_FLAGS = {"dtype": ("--dtype", "auto"), "quant": ("--quant", "none")}
_COMPONENTS = ("text_encoder", "vae", "upscaler")  # of a server, as paths that no answer may have

router = APIRouter(prefix="/v1")


@router.get("/videos/{video_id}/command", response_model=schema.VideoCommand, responses=documents.ERRORS)
async def get_command(state: State, client: Sender, video_id: str) -> Any:
    """Shows the `kadr generate` command that makes a video again, quoted for a POSIX shell."""
    job = state.queue.store.get(video_id, client.scope)
    command = _command_of(state, job)
    notes = [*command.notes, *_notes_on_components(state)]
    return {"command": str(command), "media": [item["name"] for item in job.labels["media"]], "notes": notes}


def _command_of(state: ServerState, job: Job) -> CommandLine:
    options = state.catalogue.options
    flags = {
        flag: options[name]
        for name, (flag, default) in _QUALITY_FLAGS.items()
        if options.get(name) not in (None, default)
    }
    # What the server opens is a name that every kadr knows, or a path that is nobody else's business.
    opened = job.engine["model"]
    model = opened if opened in RELEASES_BY_NAME else job.labels["model"]
    loras = [Lora(item["name"], item.get("strength", 1.0), item.get("second_strength")) for item in job.labels["loras"]]
    request = Request.from_json(job.request)
    return command_line(request, model=None if model == DEMO else model, loras=loras, options=flags)


def _notes_on_components(state: ServerState) -> list[str]:
    used = [name.replace("_", " ") for name in _COMPONENTS if state.catalogue.options.get(name)]
    return [f"this server has its own {' and '.join(used)}: name yours."] if used else []
