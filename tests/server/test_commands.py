"""A video as a command line: its settings, names in the place of its media, and nothing of where things lie."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.server.answers import refused
from tests.server.media import clip, image
from tests.server.opened_app import ANNA, BEN, OpenedApp, open_app

DEMO_FILE = Path(__file__).parents[2] / "src" / "kadr" / "assets" / "demo"


def command_of(app: OpenedApp, video_id: str) -> dict[str, Any]:
    answer = app.send("GET", f"/v1/videos/{video_id}/command")
    assert answer.status == 200, answer
    return answer.data


def test_command_has_the_settings_of_a_video(local_app: OpenedApp) -> None:
    video = local_app.submit(prompt="it's a fox", seed=7, fps=24, guidance={"cfg_scale": 3, "stg_scale": 1})
    assert command_of(local_app, video) == {
        "command": "kadr generate 'it'\"'\"'s a fox' --size 64x64 --frames 9 --fps 24 --seed 7 --steps 1 --guidance 3 "
        "--stg 1",
        "media": [],
        "notes": [],
    }


def test_media_of_a_command_are_names(local_app: OpenedApp) -> None:
    photo, film = local_app.upload(image()), local_app.upload(clip())
    conditions = [{"media": photo, "frame": -1, "strength": 0.5}, {"media": film, "frame": 8}]
    answer = command_of(local_app, local_app.submit(num_frames=25, conditions=conditions))
    assert answer["media"] == ["media/0.png", "media/1.mp4"]
    assert "--image media/0.png -1 0.5 --video media/1.mp4 8" in answer["command"]


def test_loras_of_a_command_have_the_names_of_the_server(
    tmp_path: Path, loop: asyncio.AbstractEventLoop, data_folder: Path
) -> None:
    models = data_folder / "models of commands"
    (models / "loras").mkdir(parents=True)
    (lora,) = DEMO_FILE.parent.rglob("*teal*.safetensors")
    (models / "loras" / "teal.safetensors").write_bytes(lora.read_bytes())
    with open_app(data_folder / "commands", loop, models_dirs=(models,), engine_options={"quant": "int8"}) as app:
        video = app.submit(loras=[{"name": "teal", "strength": 0.5}])
        command = command_of(app, video)["command"]
    assert command.startswith("kadr generate 'a red circle' --quant int8 --lora teal 0.5 --size 64x64")


def test_command_of_a_named_file_has_the_name_and_no_path(app: OpenedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    video = app.submit(ANNA)
    store, catalogue = app.state.queue.store, app.state.catalogue
    with store.table.change() as change:
        job = store.get(video)
        labels = {**job.labels, "model": "mine.safetensors"}
        change.update("id = ?", (video,), engine={"model": "/models/mine.safetensors", "loras": []}, labels=labels)
    monkeypatch.setattr(catalogue, "options", {"vae": "/models/vae.safetensors", "dtype": "auto"})
    answer = app.send("GET", f"/v1/videos/{video}/command", token=ANNA).data
    assert " --model mine.safetensors " in answer["command"]
    assert answer["notes"] == ["this server has its own vae: name yours."]
    assert "/models" not in str(answer)
    refused(app.send("GET", f"/v1/videos/{video}/command", token=BEN), 404, "video_not_found")


def test_what_no_flag_can_say_is_noted(local_app: OpenedApp) -> None:
    video = local_app.submit(downscale_factor=0.5)
    assert command_of(local_app, video)["notes"] == ["downscale_factor is 0.5, which no flag can say."]
