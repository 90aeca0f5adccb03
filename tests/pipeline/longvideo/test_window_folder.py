"""Resume: an interrupted long video continues from its finished windows and equals an uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kadr import Condition, Engine, Request
from kadr.errors import Cancelled, CheckpointError, KadrError, KadrWarning, RequestError
from kadr.media.clip import read_video
from kadr.pipeline.longvideo.window_folder import REQUEST_FILE, WindowFolder, finished_windows, stored_prompt
from kadr.pipeline.progress import Progress
from kadr.pipeline.video import VideoFile
from kadr.request.windows import Windows, window_folder_path
from kadr.sampling.settings import Guidance
from kadr.schema import REQUEST, VIDEO_METADATA, WINDOW_FOLDER
from kadr.shapes import Size
from tests.stored_files import STORED_FILES
from tests.tiny_models import MODEL_FILE, write_model

LONG = Request(
    prompt="birds fly | blue sea | golden light",
    size=Size(64, 64),
    frames=73,
    fps=24.0,
    seed=5,
    sigmas=(1.0, 0.7, 0.4),
    guidance=Guidance(cfg_scale=2.0, stg_scale=0.0),
    windows=Windows(frames=25, overlap=16),
)


def interrupt_at(window: int, step: int) -> Callable[[Progress], None]:
    """Returns a watcher that interrupts at a step of a window, counted from 1."""

    def watch(progress: Progress) -> None:
        if progress.window == (window, 4) and progress.step == 3 * (window - 1) + step:
            raise KeyboardInterrupt

    return watch


def interrupt(engine: Engine, path: Path, request: Request = LONG, window: int = 3) -> None:
    with pytest.raises((KeyboardInterrupt, Cancelled)):
        engine.write(request, path, watch=interrupt_at(window, 2))


@pytest.fixture(scope="module")
def uninterrupted(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> VideoFile:
    """Long video with an anchor image and fresh noise at every step."""
    home = tmp_path_factory.mktemp("uninterrupted")
    Image.new("RGB", (64, 64), (200, 30, 40)).save(home / "first.png")
    request = replace(LONG, conditions=(Condition(str(home / "first.png")),), sampler="euler_stochastic")
    return engine.write(request, home / "whole.mp4")


@pytest.mark.parametrize("window", [2, 3, 4])
def test_video_resumed_in_any_window_equals_an_uninterrupted_one(
    window: int, engine: Engine, output_folder: Path, uninterrupted: VideoFile
) -> None:
    request = uninterrupted.request
    interrupt(engine, output_folder / "cut.mp4", request, window)
    folder = window_folder_path(output_folder / "cut.mp4")
    assert len(finished_windows(folder)) == window - 1
    assert [path.name for path in output_folder.iterdir()] == ["cut.windows"]
    reports: list[Progress] = []
    resumed = engine.write(request, output_folder / "cut.mp4", watch=reports.append, resume=True)
    steps = [progress.step for progress in reports if progress.stage == "denoise"]
    assert steps[0] == 3 * (window - 1)  # finished windows are not sampled again
    assert steps[-1] == 12
    assert resumed.latents.equal(uninterrupted.latents)
    assert (read_video(resumed.path).frames == read_video(uninterrupted.path).frames).all()
    assert not folder.exists()


def test_video_on_disk_equals_the_one_in_memory(engine: Engine, output_folder: Path) -> None:
    video_file, video = engine.write(LONG, output_folder / "clip.mp4"), engine.generate(LONG)
    assert video_file.latents.equal(video.latents)
    video.save(output_folder / "other.mp4")
    assert (read_video(output_folder / "clip.mp4").frames == read_video(output_folder / "other.mp4").frames).all()
    assert (engine.decode(video.latents[None], LONG).numpy() == video.frames).all()


def test_resume_writes_the_file_if_all_windows_were_finished(
    engine: Engine, output_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_disk_full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    whole = engine.write(LONG, output_folder / "whole.mp4")
    with monkeypatch.context() as patch:
        patch.setattr("kadr.pipeline.generation.Generation.decode", raise_disk_full)
        with pytest.raises(OSError, match="No space"):
            engine.write(LONG, output_folder / "clip.mp4")
    assert len(finished_windows(window_folder_path(output_folder / "clip.mp4"))) == 4
    stages: set[str] = set()
    video_file = engine.write(
        LONG, output_folder / "clip.mp4", resume=True, watch=lambda progress: stages.add(progress.stage)
    )
    assert stages == {"decode"}
    assert video_file.latents.equal(whole.latents)


def test_finished_windows_are_never_overwritten(engine: Engine, output_folder: Path) -> None:
    interrupt(engine, output_folder / "clip.mp4")
    contents = {path: path.read_bytes() for path in window_folder_path(output_folder / "clip.mp4").iterdir()}
    with pytest.raises(RequestError, match=r"clip.windows holds 2 finished windows .*resume, delete the folder, or"):
        engine.write(LONG, output_folder / "clip.mp4")
    assert {path: path.read_bytes() for path in window_folder_path(output_folder / "clip.mp4").iterdir()} == contents


def test_folder_without_a_finished_window_starts_over(engine: Engine, output_folder: Path) -> None:
    interrupt(engine, output_folder / "clip.mp4", window=1)
    assert len(finished_windows(window_folder_path(output_folder / "clip.mp4"))) == 0
    engine.write(replace(LONG, seed=6), output_folder / "clip.mp4")
    assert [path.name for path in output_folder.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 6}, "seed is 5 there and 6 now"),
        ({"prompt": "birds fly | blue sea"}, "prompt is 'birds fly | blue sea | golden light' there and 'birds fly |"),
        ({"windows": Windows(frames=25, overlap=16, adain=0.5)}, "windows.adain is 0.25 there and 0.5 now"),
        ({"frames": 89, "fps": 25.0}, "frames is 73 there and 89 now; fps is 24.0 there and 25.0 now"),
    ],
    ids=["seed", "prompt", "windows", "frames"],
)
def test_windows_of_another_request_are_refused_with_the_differences(
    change: dict[str, Any], difference: str, engine: Engine, output_folder: Path
) -> None:
    interrupt(engine, output_folder / "clip.mp4")
    with pytest.raises(RequestError) as caught:
        engine.write(replace(LONG, **change), output_folder / "clip.mp4", resume=True)
    assert difference in str(caught.value)
    assert len(finished_windows(window_folder_path(output_folder / "clip.mp4"))) == 2


def test_windows_of_another_model_image_or_version_are_refused(output_folder: Path, tmp_path: Path) -> None:
    home = write_model(tmp_path / "model")
    engine = Engine.open(home / MODEL_FILE, device="cpu", prompt_cache=False)
    photo = output_folder / "first.png"
    Image.new("RGB", (64, 64), (200, 30, 40)).save(photo)
    request = replace(LONG, conditions=(Condition(str(photo)),))
    interrupt(engine, output_folder / "clip.mp4", request)

    def assert_refused(name: str) -> None:
        reopened = Engine.open(home / MODEL_FILE, device="cpu", prompt_cache=False)
        with pytest.raises(RequestError, match=f"is of another video: .*{name}"):
            reopened.write(request, output_folder / "clip.mp4", resume=True)

    times = {path: (path.stat().st_atime_ns, path.stat().st_mtime_ns) for path in (photo, home / MODEL_FILE)}
    for path, (_, modified) in times.items():
        os.utime(path, ns=(modified, modified + 10**9))
        assert_refused(path.name)
        os.utime(path, ns=times[path])
    stored = json.loads((window_folder_path(output_folder / "clip.mp4") / REQUEST_FILE).read_text())
    (window_folder_path(output_folder / "clip.mp4") / REQUEST_FILE).write_text(
        json.dumps({**stored, "video": {**stored["video"], "version": "0.0.1"}})
    )
    assert_refused("version is '0.0.1' there")


def test_resume_with_another_weight_format_gives_a_warning(home: Path, output_folder: Path) -> None:
    engine = Engine.open(home / MODEL_FILE, device="cpu")
    interrupt(engine, output_folder / "clip.mp4")
    streamed = Engine.open(home / MODEL_FILE, device="cpu", offload="blocks")
    with pytest.warns(KadrWarning, match="runs differently than before"):
        streamed.write(LONG, output_folder / "clip.mp4", resume=True)


def test_resume_with_nothing_to_resume_starts_with_a_warning(engine: Engine, output_folder: Path) -> None:
    """So one command is enough, however often a machine goes down."""
    interrupt(engine, output_folder / "clip.mp4", window=1)
    assert list(output_folder.iterdir()) == []
    with pytest.warns(KadrWarning, match=r"nothing to resume in .*clip.windows; the video starts from the beginning"):
        video_file = engine.write(LONG, output_folder / "clip.mp4", resume=True)
    assert video_file.latents.equal(engine.denoise(LONG)[0])


def test_resume_of_a_video_without_windows_is_refused(engine_without_weights: Engine, output_folder: Path) -> None:
    with pytest.raises(RequestError, match="only a long video, made in windows, is stored"):
        engine_without_weights.write(
            replace(LONG, windows=None, prompt="birds"), output_folder / "clip.mp4", resume=True
        )
    assert list(output_folder.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "empty", "another shape", "other numbers"])
def test_only_a_damaged_window_is_sampled_again(damage: str, engine: Engine, output_folder: Path) -> None:
    interrupt(engine, output_folder / "clip.mp4", window=4)
    damaged = window_folder_path(output_folder / "clip.mp4") / "window-0002.safetensors"
    if damage == "another shape":
        save_file({"latents": torch.zeros(1, 2, 3, 4, 5)}, damaged)
    elif damage == "other numbers":
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-4] + b"\0\0\xc0\x7f")
    else:
        damaged.write_bytes(damaged.read_bytes()[:-8] if damage == "truncated" else b"")
    reports: list[Progress] = []
    with pytest.warns(KadrWarning, match=r"window-0002.safetensors is damaged or of another video: .* sampled again"):
        video_file = engine.write(LONG, output_folder / "clip.mp4", resume=True, watch=reports.append)
    assert {progress.window[0] for progress in reports if progress.window} == {2, 4}
    assert video_file.latents.equal(engine.denoise(LONG)[0])


def test_windows_of_another_video_are_never_reused(engine: Engine, output_folder: Path) -> None:
    """Even if the first of them is missing."""
    interrupt(engine, output_folder / "clip.mp4", window=3)
    folder = window_folder_path(output_folder / "clip.mp4")
    (folder / "window-0001.safetensors").unlink()
    with pytest.raises(RequestError, match="holds 1 finished window of an unfinished video"):
        engine.write(replace(LONG, seed=9), output_folder / "clip.mp4")
    (folder / REQUEST_FILE).unlink()
    for resume in (False, True):
        with pytest.raises(
            RequestError, match=r"holds 1 finished window, but no request.json that names the video. Del"
        ):
            engine.write(LONG, output_folder / "clip.mp4", resume=resume)


def test_refused_request_leaves_no_files(engine: Engine, output_folder: Path) -> None:
    request = replace(LONG, sigmas=None, steps=4, skip_initial=2)
    for method in (engine.plan, lambda request: engine.write(request, output_folder / "clip.mp4")):
        with pytest.raises(RequestError, match="there is nothing to start from"):
            method(request)
    interrupt(engine, output_folder / "clip.mp4", window=1)
    assert list(output_folder.iterdir()) == []


def test_other_video_does_not_overwrite_an_unfinished_one(engine: Engine, output_folder: Path) -> None:
    interrupt(engine, output_folder / "clip.mp4")
    with pytest.raises(RequestError, match="holds 2 finished windows of an unfinished video"):
        engine.write(replace(LONG, windows=None, prompt="birds", frames=9), output_folder / "clip.mp4")
    assert not (output_folder / "clip.mp4").exists()


def test_window_folder_that_is_a_symlink_stays_one(engine: Engine, output_folder: Path) -> None:
    (output_folder / "elsewhere").mkdir()
    window_folder_path(output_folder / "clip.mp4").symlink_to(output_folder / "elsewhere")
    engine.write(LONG, output_folder / "clip.mp4")
    assert sorted(path.name for path in output_folder.iterdir()) == ["clip.mp4", "clip.windows", "elsewhere"]


def test_two_engines_cannot_write_one_video(engine: Engine, home: Path, output_folder: Path) -> None:
    other = Engine.open(home / MODEL_FILE, device="cpu", prompt_cache=False)

    def write_another(progress: Progress) -> None:
        if progress.stage == "denoise" and progress.step == 1:
            with pytest.raises(RequestError, match=r"another process is writing to .*clip.windows"):
                other.write(replace(LONG, seed=9), output_folder / "clip.mp4")

    video_file = engine.write(LONG, output_folder / "clip.mp4", watch=write_another)
    assert video_file.latents.equal(engine.denoise(LONG)[0])
    assert [path.name for path in output_folder.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("text", ["[1]", "{", "null", '{"schema": 2}'])
def test_unreadable_request_file_is_an_error_that_names_it(text: str, engine: Engine, output_folder: Path) -> None:
    interrupt(engine, output_folder / "clip.mp4")
    (window_folder_path(output_folder / "clip.mp4") / REQUEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"request.json cannot be read: .* Delete .*clip.windows"):
        engine.write(LONG, output_folder / "clip.mp4", resume=True)


def stored_windows(output_folder: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of a folder that kadr wrote before schema numbers, and the identity that kadr gives its video now."""
    folder = Path(shutil.copytree(STORED_FILES / "clip.windows", output_folder / "clip.windows"))
    identity = json.loads((folder / REQUEST_FILE).read_text())
    assert "schema" not in identity
    return folder, VIDEO_METADATA.stamp({**identity, "request": Request.from_json(identity["request"]).to_json()})


def test_folder_from_before_schema_numbers_is_resumed(output_folder: Path) -> None:
    folder, identity = stored_windows(output_folder)
    with WindowFolder.open(folder, identity, [(1, 8, 4, 2, 2)], resume=True) as windows:
        assert windows.has(0)
        assert windows.read(0).shape == (1, 8, 4, 2, 2)


@pytest.mark.parametrize("part", ["window folder", "video metadata", "request"])
def test_folder_of_a_newer_kadr_is_refused_by_name(part: str, output_folder: Path) -> None:
    folder, identity = stored_windows(output_folder)
    stored = WINDOW_FOLDER.stamp({"video": identity})
    parts = {"window folder": stored, "video metadata": identity, "request": identity["request"]}
    number = {schema.kind: schema.number for schema in (WINDOW_FOLDER, VIDEO_METADATA, REQUEST)}[part]
    parts[part]["schema"] = number + 1
    (folder / REQUEST_FILE).write_text(json.dumps(stored))
    match = rf"the {part} in .*request.json has the schema number {number + 1}; .* up to {number}\. .* update kadr"
    with pytest.raises(KadrError, match=match), WindowFolder.open(folder, identity, [(1, 8, 4, 2, 2)], resume=True):
        pass
    with pytest.raises(KadrError, match=match):
        stored_prompt(folder, identity["request"]["prompt"])
    assert finished_windows(folder) == [0]


def test_only_kadr_s_files_are_removed(engine: Engine, output_folder: Path) -> None:
    interrupt(engine, output_folder / "clip.mp4")
    notes = window_folder_path(output_folder / "clip.mp4") / "notes.txt"
    notes.write_text("mine")
    engine.write(LONG, output_folder / "clip.mp4", resume=True)
    assert list(window_folder_path(output_folder / "clip.mp4").iterdir()) == [notes]


def test_windows_on_disk_leave_memory(engine: Engine, output_folder: Path) -> None:
    """While a window is sampled, only its own latents and its guides are in memory."""
    import gc

    live_elements: list[int] = []

    def watch(progress: Progress) -> None:
        if progress.stage == "denoise" and progress.window is not None and progress.step % 3 == 1:
            gc.collect()
            latents = [
                x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.shape[1:2] == (8,) and x.dim() == 5
            ]
            live_elements.append(sum(x.numel() for x in latents))

    request = replace(LONG, frames=25 + 16 * 6, prompt="birds fly")
    engine.write(request, output_folder / "clip.mp4", watch=watch)
    assert len(live_elements) == 7
    assert max(live_elements[3:]) == live_elements[2]


@pytest.mark.skipif(sys.platform != "linux", reason="others allow only names that are UTF-8")
def test_window_in_a_folder_that_is_no_utf8_is_reused(tmp_path: Path) -> None:
    folder, latents = tmp_path / os.fsdecode(b"\xff.windows"), torch.rand(1, 4, 2, 3, 3)
    identity = VIDEO_METADATA.stamp({"request": LONG.to_json()})
    for resume in (False, True):
        with WindowFolder.open(folder, identity, [latents.shape], resume=resume) as windows:
            assert windows.has(0) == resume
            if not resume:
                windows.store(0, latents)
            assert torch.equal(windows.read(0), latents)
