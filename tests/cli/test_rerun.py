"""`kadr rerun`: makes a video again from the request stored in its file."""

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
from kadr.schema import REQUEST as REQUEST_SCHEMA
from kadr.schema import VIDEO_METADATA, Schema
from kadr.shapes import Size
from kadr.version import __version__
from tests import tiny_models
from tests.cli.conftest import CommandResult, FakeEngine
from tests.stored_files import STORED_FILES

Run = Callable[..., CommandResult]
WriteVideo = Callable[..., Path]
UPSCALERS = ("spatial_upscaler", "temporal_upscaler")
REQUEST = Request(prompt="a red circle", size=(64, 64), frames=9, fps=24.0, seed=3, steps=4)


@pytest.fixture
def write_video(tmp_path: Path) -> WriteVideo:
    """A function that writes video.mp4 with a record; its arguments replace entries of the record."""
    model, text_encoder = tmp_path / "m.safetensors", tmp_path / "t5"
    model.touch()
    text_encoder.mkdir()
    record = {
        "version": __version__,
        "model_name": "m.safetensors",
        "model": str(model),
        "text_encoder": str(text_encoder),
        "vae": str(model),
        "device": "cpu",
        "dtype": "float32",
        "request": REQUEST.to_json(),
    }

    def write(**replacements: Any) -> Path:
        with VideoWriter(tmp_path / "video.mp4", Size(64, 64), 24, metadata={**record, **replacements}) as writer:
            writer.write(np.zeros((1, 64, 64, 3), np.uint8))
        return tmp_path / "video.mp4"

    return write


def test_rerun_says_why_it_cannot_show_a_preview(kadr: Run, engine: FakeEngine, write_video: WriteVideo) -> None:
    assert "there are no previews" in kadr("rerun", write_video(), "--preview").err
    assert "there are no previews" not in kadr("rerun", write_video()).err
    assert engine.preview_flags == [False, False]


def test_rerun_uses_the_stored_request_and_model(
    kadr: Run, engine: FakeEngine, write_video: WriteVideo, tmp_path: Path
) -> None:
    result = kadr("rerun", write_video())
    assert result[:2] == (0, f"{tmp_path / 'video-2.mp4'}\n"), result.err
    assert engine.requests == [REQUEST]
    options = {"text_encoder": tmp_path / "t5", "device": "cpu", "dtype": "float32"}
    assert engine.open_calls == [(str(tmp_path / "m.safetensors"), options)]
    assert "warning" not in result.err


def test_interrupted_long_video_is_found_by_resume(
    kadr: Run, engine: FakeEngine, write_video: WriteVideo, tmp_path: Path
) -> None:
    path = write_video()
    (tmp_path / "video-2.windows").mkdir()
    (tmp_path / "video-2.windows" / "window-0001.safetensors").touch()
    assert kadr("rerun", path).out == f"{tmp_path / 'video-3.mp4'}\n"
    assert kadr("rerun", path, "--resume").out == f"{tmp_path / 'video-2.mp4'}\n"


def test_seed_output_and_device_may_change(kadr: Run, engine: FakeEngine, write_video: WriteVideo) -> None:
    assert kadr("rerun", write_video(), "--seed", "9", "--output", "new.mp4", "--device", "auto").out == "new.mp4\n"
    assert engine.requests[0].seed == 9
    assert engine.open_calls[0][1]["device"] == "auto"


def test_separate_vae_is_used_again(kadr: Run, engine: FakeEngine, write_video: WriteVideo, tmp_path: Path) -> None:
    vae = tmp_path / "v.safetensors"
    vae.touch()
    assert kadr("rerun", write_video(vae=str(vae))).code == 0
    assert engine.open_calls[0][1]["vae"] == vae


def test_second_pass_components_are_used_again(
    kadr: Run, engine: FakeEngine, write_video: WriteVideo, tmp_path: Path
) -> None:
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in ("second_model", *UPSCALERS)}
    for path in paths.values():
        Path(path).touch()
    upscalers = [paths[name] for name in UPSCALERS]
    assert kadr("rerun", write_video(**paths)).code == 0
    assert kadr("rerun", write_video(**paths), "--model", "demo").code == 0
    for _, options in engine.open_calls:
        assert (options["second_model"], options["upscaler"]) == (paths["second_model"], upscalers)


def test_loras_are_used_again_with_their_strengths(
    kadr: Run, engine: FakeEngine, write_video: WriteVideo, tmp_path: Path
) -> None:
    (tmp_path / "style.safetensors").touch()
    loras = [
        {"path": str(tmp_path / "style.safetensors"), "strength": 0.5, "second_strength": None},
        {
            "path": str(tmp_path / "ltxv-097-ic-lora-canny-control-comfyui.safetensors"),
            "strength": 1.0,
            "second_strength": 0.0,
        },
    ]
    result = kadr("rerun", write_video(loras=loras, merge_loras=True))
    assert result.code == 0, result.err
    _, options = engine.open_calls[0]
    assert options["loras"] == [
        (str(tmp_path / "style.safetensors"), 0.5, None),
        ("ltxv-13b-0.9.7-ic-lora-canny", 1.0, 0.0),  # no longer on disk, but the registry knows its file name
    ]
    assert (options["merge_loras"], "lora_partial" in options) == (True, False)
    assert "another file" not in result.err
    loras[0]["sha256"] = hashlib.sha256(b"").hexdigest()
    assert "another file" not in kadr("rerun", write_video(loras=loras)).err
    (tmp_path / "style.safetensors").write_bytes(b"trained again")
    result = kadr("rerun", write_video(loras=loras))
    assert (result.code, "style.safetensors is not the file" in result.err) == (0, True)
    (tmp_path / "style.safetensors").unlink()
    result = kadr("rerun", write_video(loras=loras))
    assert (result.code, "the LoRA was" in result.err, "style.safetensors" in result.err) == (1, True, True)


def test_moved_second_pass_components_are_opened_by_name(
    kadr: Run, engine: FakeEngine, write_video: WriteVideo
) -> None:
    model, upscaler = "/gone/ltx-video-2b-v0.9.5.safetensors", "/gone/ltxv-spatial-upscaler-0.9.8.safetensors"
    assert kadr("rerun", write_video(second_model=model, spatial_upscaler=upscaler)).code == 0
    options = engine.open_calls[0][1]
    assert (options["second_model"], options["upscaler"]) == ("ltxv-2b-0.9.5", ["ltxv-spatial-upscaler-0.9.8"])


@pytest.mark.parametrize("component", ["model", "text_encoder", "vae", "second_model", *UPSCALERS])
def test_missing_component_is_named(kadr: Run, engine: FakeEngine, write_video: WriteVideo, component: str) -> None:
    result = kadr("rerun", write_video(**{component: "/gone/component"}))
    assert (result.code, result.out, engine.open_calls) == (1, "", [])
    assert "/gone/component" in result.err


def test_moved_released_model_is_opened_by_name(kadr: Run, engine: FakeEngine, write_video: WriteVideo) -> None:
    gone = "/gone/demo.safetensors"
    file = write_video(model_name="demo", model=gone, vae=gone, text_encoder="/gone/t5")
    result = kadr("rerun", file)
    assert result.code == 0, result.err
    assert engine.open_calls == [("demo", {"device": "cpu", "dtype": "float32"})]
    assert "/gone/t5" in result.err


def test_released_model_on_disk_is_opened_by_name(
    kadr: Run, engine: FakeEngine, write_video: WriteVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_on_disk = tmp_path / "m.safetensors"
    monkeypatch.setattr(rerun, "find_release_on_disk", lambda release: file_on_disk)
    assert kadr("rerun", write_video(model_name="ltxv-2b-0.9.5")).code == 0
    assert engine.open_calls[-1][0] == "ltxv-2b-0.9.5"
    file_on_disk = tmp_path / "another snapshot"
    assert kadr("rerun", write_video(model_name="ltxv-2b-0.9.5")).code == 0
    assert engine.open_calls[-1][0] == str(tmp_path / "m.safetensors")


def test_a_missing_image_is_named(kadr: Run, engine: FakeEngine, write_video: WriteVideo) -> None:
    request = Request(prompt="x", conditions=[Condition(media="/gone/photo.jpg")])
    result = kadr("rerun", write_video(request=request.to_json()))
    assert (result.code, result.out, engine.open_calls) == (1, "", [])
    assert "/gone/photo.jpg" in result.err


def test_another_version_is_pointed_out(kadr: Run, engine: FakeEngine, write_video: WriteVideo) -> None:
    result = kadr("rerun", write_video(version="0.0.1"))
    assert result.code == 0
    assert "warning: made with kadr 0.0.1" in result.err


def test_video_from_before_schema_numbers_is_made_again(kadr: Run, engine: FakeEngine, tmp_path: Path) -> None:
    stored = read_metadata(STORED_FILES / "video.mp4")
    assert "schema" not in stored
    assert "schema" not in stored["request"]
    result = kadr("rerun", STORED_FILES / "video.mp4", "--output", tmp_path / "again.mp4")
    assert result.code == 0, result.err
    assert engine.requests == [Request.from_json(stored["request"])]
    (request,) = engine.requests
    assert (request.prompt, request.size, request.frames, request.seed) == ("a red circle", Size(64, 64), 9, 3)
    assert (engine.open_calls[0][0], engine.open_calls[0][1]["dtype"]) == ("demo", "float32")


@pytest.mark.parametrize("schema", [VIDEO_METADATA, REQUEST_SCHEMA], ids=lambda schema: schema.kind)
def test_video_of_a_newer_kadr_is_refused_by_name(
    kadr: Run, engine: FakeEngine, write_video: WriteVideo, schema: Schema
) -> None:
    newer = {"schema": schema.number + 1}
    path = write_video(**(newer if schema is VIDEO_METADATA else {"request": {**REQUEST.to_json(), **newer}}))
    result = kadr("rerun", path)
    assert (result.code, result.out, engine.open_calls) == (1, "", [])
    assert f"the {schema.kind} in {path} has the schema number {schema.number + 1}; kadr" in result.err
    assert "update kadr" in result.err


@pytest.mark.parametrize("stored_request", [None, "text", {"prompt": "x", "unknown": 1}])
def test_malformed_record_is_explained(
    kadr: Run, engine: FakeEngine, write_video: WriteVideo, stored_request: Any
) -> None:
    result = kadr("rerun", write_video(request=stored_request))
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")


def test_missing_file_is_explained(kadr: Run, engine: FakeEngine) -> None:
    result = kadr("rerun", "absent.mp4")
    assert (result.code, result.out) == (1, "")
    assert "absent.mp4" in result.err


def test_a_video_made_again_has_the_same_frames(kadr: Run, tmp_path: Path) -> None:
    """End to end, on a real engine with a model of random weights."""
    folder = tiny_models.write_model(tmp_path / "model")
    first = tmp_path / "first.mp4"
    flags = ["--size", "64x32", "--frames", "9", "--steps", "2", "--seed", "3", "--device", "cpu"]
    original = kadr("generate", "a red circle", "--model", folder / tiny_models.MODEL_FILE, *flags, "--output", first)
    assert original.code == 0, original.err
    same_seed, other_seed = kadr("rerun", first), kadr("rerun", first, "--seed", "4")
    assert (same_seed.code, other_seed.code) == (0, 0), same_seed.err + other_seed.err
    frames = [read_video(path.strip()).frames for path in (original.out, same_seed.out, other_seed.out)]
    assert frames[0].shape == (9, 32, 64, 3)
    assert np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], frames[2])
    assert read_metadata(first)["request"] == read_metadata(same_seed.out.strip())["request"]
