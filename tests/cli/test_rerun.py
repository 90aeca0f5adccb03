"""`kadr rerun`: a video is made again from what its file remembers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kadr.cli.commands import rerun
from kadr.media.clip import read_metadata, read_video
from kadr.media.writer import VideoWriter
from kadr.request.inputs import Condition
from kadr.request.request import Request
from kadr.shapes import Size
from kadr.version import __version__
from tests import tiny_models
from tests.cli.conftest import CommandResult, FakeEngine

Run = Callable[..., CommandResult]
Film = Callable[..., Path]
UPSCALERS = ("spatial_upscaler", "temporal_upscaler")
REQUEST = Request(prompt="a red circle", size=(64, 64), frames=9, fps=24.0, seed=3, steps=4)


@pytest.fixture
def film(tmp_path: Path) -> Film:
    """Write film.mp4 with a record, some of it replaced."""
    model, text = tmp_path / "m.safetensors", tmp_path / "t5"
    model.touch()
    text.mkdir()
    usual = {
        "version": __version__,
        "model_name": "m.safetensors",
        "model": str(model),
        "text_encoder": str(text),
        "vae": str(model),
        "device": "cpu",
        "dtype": "float32",
        "request": REQUEST.to_json(),
    }

    def write(**replaced: Any) -> Path:
        with VideoWriter(tmp_path / "film.mp4", Size(64, 64), 24, metadata={**usual, **replaced}) as writer:
            writer.write(np.zeros((1, 64, 64, 3), np.uint8))
        return tmp_path / "film.mp4"

    return write


def test_everything_is_as_it_was(kadr: Run, engine: FakeEngine, film: Film, tmp_path: Path) -> None:
    ended = kadr("rerun", film())
    assert ended[:2] == (0, f"{tmp_path / 'film-2.mp4'}\n"), ended.err
    assert engine.requests == [REQUEST]
    options = {"text_encoder": tmp_path / "t5", "device": "cpu", "dtype": "float32"}
    assert engine.open_calls == [(str(tmp_path / "m.safetensors"), options)]
    assert "warning" not in ended.err


def test_a_long_video_that_was_cut_off_is_found_again(
    kadr: Run, engine: FakeEngine, film: Film, tmp_path: Path
) -> None:
    path = film()
    (tmp_path / "film-2.windows").mkdir()
    (tmp_path / "film-2.windows" / "window-0001.safetensors").touch()
    assert kadr("rerun", path).out == f"{tmp_path / 'film-3.mp4'}\n"
    assert kadr("rerun", path, "--resume").out == f"{tmp_path / 'film-2.mp4'}\n"


def test_seed_output_and_device_may_change(kadr: Run, engine: FakeEngine, film: Film) -> None:
    assert kadr("rerun", film(), "--seed", "9", "--output", "new.mp4", "--device", "auto").out == "new.mp4\n"
    assert engine.requests[0].seed == 9
    assert engine.open_calls[0][1]["device"] == "auto"


def test_vae_of_its_own_is_taken_again(kadr: Run, engine: FakeEngine, film: Film, tmp_path: Path) -> None:
    vae = tmp_path / "v.safetensors"
    vae.touch()
    assert kadr("rerun", film(vae=str(vae))).code == 0
    assert engine.open_calls[0][1]["vae"] == vae


def test_parts_of_the_second_pass_are_taken_again(kadr: Run, engine: FakeEngine, film: Film, tmp_path: Path) -> None:
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in ("second_model", *UPSCALERS)}
    for path in paths.values():
        Path(path).touch()
    upscalers = [paths[name] for name in UPSCALERS]
    assert kadr("rerun", film(**paths)).code == 0
    assert kadr("rerun", film(**paths), "--model", "demo").code == 0
    for _, options in engine.open_calls:
        assert (options["second_model"], options["upscaler"]) == (paths["second_model"], upscalers)


def test_loras_are_taken_again_with_their_strengths(kadr: Run, engine: FakeEngine, film: Film, tmp_path: Path) -> None:
    (tmp_path / "style.safetensors").touch()
    loras = [
        {"path": str(tmp_path / "style.safetensors"), "strength": 0.5, "second_strength": None},
        {
            "path": str(tmp_path / "ltxv-097-ic-lora-canny-control-comfyui.safetensors"),
            "strength": 1.0,
            "second_strength": 0.0,
        },
    ]
    ended = kadr("rerun", film(loras=loras, merge_loras=True))
    assert ended.code == 0, ended.err
    _, options = engine.open_calls[0]
    assert options["loras"] == [
        (str(tmp_path / "style.safetensors"), 0.5, None),
        ("ltxv-13b-0.9.7-ic-lora-canny", 1.0, 0.0),  # which is no longer there, and known by name
    ]
    assert (options["merge_loras"], "lora_partial" in options) == (True, False)
    assert "another file" not in ended.err
    loras[0]["sha256"] = hashlib.sha256(b"").hexdigest()
    assert "another file" not in kadr("rerun", film(loras=loras)).err
    (tmp_path / "style.safetensors").write_bytes(b"trained again")
    ended = kadr("rerun", film(loras=loras))
    assert (ended.code, "style.safetensors is not the file" in ended.err) == (0, True)
    (tmp_path / "style.safetensors").unlink()
    ended = kadr("rerun", film(loras=loras))
    assert (ended.code, "the LoRA was" in ended.err, "style.safetensors" in ended.err) == (1, True, True)


def test_released_parts_of_the_second_pass_that_moved_are_opened_by_name(
    kadr: Run, engine: FakeEngine, film: Film
) -> None:
    model, upscaler = "/gone/ltx-video-2b-v0.9.5.safetensors", "/gone/ltxv-spatial-upscaler-0.9.8.safetensors"
    assert kadr("rerun", film(second_model=model, spatial_upscaler=upscaler)).code == 0
    options = engine.open_calls[0][1]
    assert (options["second_model"], options["upscaler"]) == ("ltxv-2b-0.9.5", ["ltxv-spatial-upscaler-0.9.8"])


@pytest.mark.parametrize("part", ["model", "text_encoder", "vae", "second_model", *UPSCALERS])
def test_missing_part_of_the_model_is_named(kadr: Run, engine: FakeEngine, film: Film, part: str) -> None:
    ended = kadr("rerun", film(**{part: "/gone/part"}))
    assert (ended.code, ended.out, engine.open_calls) == (1, "", [])
    assert "/gone/part" in ended.err


def test_released_model_that_moved_is_opened_by_name(kadr: Run, engine: FakeEngine, film: Film) -> None:
    gone = "/gone/demo.safetensors"
    file = film(model_name="demo", model=gone, vae=gone, text_encoder="/gone/t5")
    ended = kadr("rerun", file)
    assert ended.code == 0, ended.err
    assert engine.open_calls == [("demo", {"device": "cpu", "dtype": "float32"})]
    assert "/gone/t5" in ended.err


def test_released_model_keeps_its_name(
    kadr: Run, engine: FakeEngine, film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "m.safetensors"
    monkeypatch.setattr(rerun, "find_release_on_disk", lambda released: here)
    assert kadr("rerun", film(model_name="ltxv-2b-0.9.5")).code == 0
    assert engine.open_calls[-1][0] == "ltxv-2b-0.9.5"
    here = tmp_path / "another snapshot"
    assert kadr("rerun", film(model_name="ltxv-2b-0.9.5")).code == 0
    assert engine.open_calls[-1][0] == str(tmp_path / "m.safetensors")


def test_a_missing_image_is_named(kadr: Run, engine: FakeEngine, film: Film) -> None:
    request = Request(prompt="x", conditions=[Condition(media="/gone/photo.jpg")])
    ended = kadr("rerun", film(request=request.to_json()))
    assert (ended.code, ended.out, engine.open_calls) == (1, "", [])
    assert "/gone/photo.jpg" in ended.err


def test_another_version_is_pointed_out(kadr: Run, engine: FakeEngine, film: Film) -> None:
    ended = kadr("rerun", film(version="0.0.1"))
    assert ended.code == 0
    assert "warning: made with kadr 0.0.1" in ended.err


@pytest.mark.parametrize("request_", [None, "text", {"prompt": "x", "unheard_of": 1}])
def test_record_that_cannot_be_read_is_explained(kadr: Run, engine: FakeEngine, film: Film, request_: Any) -> None:
    ended = kadr("rerun", film(request=request_))
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: ")


def test_file_that_is_not_there_is_explained(kadr: Run, engine: FakeEngine) -> None:
    ended = kadr("rerun", "absent.mp4")
    assert (ended.code, ended.out) == (1, "")
    assert "absent.mp4" in ended.err


def test_a_video_made_again_has_the_same_frames(kadr: Run, tmp_path: Path) -> None:
    """The whole way, on a real engine with a model of random weights."""
    home = tiny_models.write_model(tmp_path / "model")
    first = tmp_path / "first.mp4"
    flags = ["--size", "64x32", "--frames", "9", "--steps", "2", "--seed", "3", "--device", "cpu"]
    made = kadr("generate", "a red circle", "--model", home / tiny_models.MODEL_FILE, *flags, "--output", first)
    assert made.code == 0, made.err
    again, other = kadr("rerun", first), kadr("rerun", first, "--seed", "4")
    assert (again.code, other.code) == (0, 0), again.err + other.err
    frames = [read_video(path.strip()).frames for path in (made.out, again.out, other.out)]
    assert frames[0].shape == (9, 32, 64, 3)
    assert np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], frames[2])
    assert read_metadata(first)["request"] == read_metadata(again.out.strip())["request"]
