"""Videos of jobs, by the demo model: files, reports, the warm engine, and errors."""

from __future__ import annotations

import errno
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kadr import Condition, Control, Request
from kadr.cancellation import CancelToken
from kadr.errors import Cancelled, CheckpointError, KadrWarning, MediaError, RequestError
from kadr.jobs import engine_maker
from kadr.jobs.engine_maker import EngineMaker, Task, with_media_in
from kadr.jobs.folders import write_result
from kadr.jobs.job import canonical_json
from kadr.jobs.worker import explain
from kadr.kernels.cpu import malloc
from kadr.media.clip import read_video
from kadr.media.writer import VideoWriter
from kadr.request.windows import Windows

REQUEST = Request(
    prompt="a red circle moving right on a black background", size=(64, 64), frames=9, seed=1, sigmas=(1.0, 0.5)
)
DEMO = {"model": "demo", "device": "cpu"}


def make(maker: EngineMaker, folder: Path, request: Request = REQUEST, **fields: Any) -> tuple[dict[str, Any], list]:
    """Makes a video in a folder; returns its result and what was reported."""
    reports: list[tuple[str, Any]] = []
    task = Task("video_" + "0" * 32, 1, DEMO, request.to_json(), folder, folder / "output.1")
    result = maker.make(replace(task, **fields), lambda kind, data: reports.append((kind, data)), CancelToken())
    return result, reports


def test_video_is_made_with_its_stills_and_reports(tmp_path: Path) -> None:
    maker = EngineMaker({"prompt_cache": False})  # another test may have encoded the prompt, and then no plan has it
    assert maker.warm_engines == ()
    assert maker.device_bytes == 0
    result, reports = make(maker, tmp_path)
    assert maker.warm_engines == (canonical_json(DEMO),)
    assert maker.device_bytes > 10**7
    assert sorted(path.name for path in (tmp_path / "output.1").iterdir()) == [
        "spritesheet.jpg",
        "thumbnail.jpg",
        "video.mp4",
    ]
    assert (result["file"], result["size"], result["frames"], result["seed"]) == ("video.mp4", "64x64", 9, 1)
    assert result["model_name"] == "demo"
    assert Request.from_json(result["request"]).prompt == REQUEST.prompt
    kinds = [kind for kind, _ in reports]
    assert kinds[:3] == ["load", "plan", "progress"]
    assert set(kinds) <= {"load", "plan", "progress", "notice"}
    loads = [data for kind, data in reports if kind == "load"]
    assert loads == [True] + [True, False] * 3  # the model is opened; text encoder, transformer and decoder are loaded
    denoise = [kind for kind, data in reports if kind == "load" or data.get("stage") == "denoise"]
    assert denoise.index("progress") == 5  # only then, though its module was loaded before
    (plan,) = (data for kind, data in reports if kind == "plan")
    stages = [data["stage"] for kind, data in reports if kind == "progress"]
    assert list(dict.fromkeys(stages)) == list(plan["stage_seconds"])
    assert 0 < plan["layer_seconds"] < max(plan["stage_seconds"].values())
    assert plan["peak_bytes"] > 0
    write_result(tmp_path / "output.1", result)  # it is plain data


def test_second_job_of_a_model_finds_it_warm(tmp_path: Path) -> None:
    maker = EngineMaker(writes_stills=False)
    make(maker, tmp_path, output=tmp_path / "output.1")
    engine = maker._engine
    _, reports = make(maker, tmp_path, output=tmp_path / "output.2")
    assert maker._engine is engine
    assert [data for kind, data in reports if kind == "load"] == [True]
    assert [path.name for path in (tmp_path / "output.2").iterdir()] == ["video.mp4"]
    assert (tmp_path / "output.1" / "video.mp4").read_bytes() == (tmp_path / "output.2" / "video.mp4").read_bytes()


def test_error_of_a_job_leaves_the_engine_open(tmp_path: Path) -> None:
    maker = EngineMaker()
    with pytest.raises(MediaError):
        make(maker, tmp_path, request=replace(REQUEST, conditions=(Condition("media/nothing.png"),)))
    assert maker.warm_engines == (canonical_json(DEMO),)


def test_model_that_cannot_be_opened_leaves_none_warm(tmp_path: Path) -> None:
    maker = EngineMaker(opens_first=DEMO)
    assert maker.warm_engines == (canonical_json(DEMO),)
    with pytest.raises((CheckpointError, RequestError)):
        make(maker, tmp_path, engine={"model": str(tmp_path / "nothing.safetensors")})
    assert maker.warm_engines == ()


def test_model_that_opens_first_and_is_missing_is_no_error(tmp_path: Path) -> None:
    assert EngineMaker(opens_first={"model": str(tmp_path / "nothing.safetensors")}).warm_engines == ()


def test_cancelled_job_leaves_no_file(tmp_path: Path) -> None:
    token = CancelToken()
    token.cancel()
    task = Task("video_" + "0" * 32, 1, DEMO, REQUEST.to_json(), tmp_path, tmp_path / "output.1")
    with pytest.raises(Cancelled):
        EngineMaker().make(task, lambda kind, data: None, token)
    assert list((tmp_path / "output.1").iterdir()) == []


def test_warnings_of_kadr_are_reported_as_they_come() -> None:
    reports: list[tuple[str, Any]] = []
    with engine_maker._report_warnings(lambda kind, data: reports.append((kind, data))):
        for _ in range(2):
            warnings.warn(KadrWarning("a retry in float32"), stacklevel=2)
        warnings.warn(UserWarning("somebody else's"), stacklevel=2)
    assert reports == [("notice", "a retry in float32")] * 2


def test_paths_of_media_are_relative_to_the_folder_of_the_job(tmp_path: Path) -> None:
    absolute = str(tmp_path / "elsewhere" / "b.png")
    request = Request(
        prompt="a",
        conditions=(Condition("media/a.png"), Condition(absolute)),
        controls=(Control("media/c.mp4"),),
        input_video="media/d.mp4",
    )
    placed = with_media_in(request, tmp_path / "job")
    assert [condition.media for condition in placed.conditions] == [str(tmp_path / "job" / "media" / "a.png"), absolute]
    assert placed.controls[0].media == str(tmp_path / "job" / "media" / "c.mp4")
    assert placed.input_video == str(tmp_path / "job" / "media" / "d.mp4")
    assert with_media_in(REQUEST, tmp_path) == REQUEST


def test_uploaded_image_is_read_from_the_folder_of_the_job(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "media" / "a.png")
    request = replace(REQUEST, conditions=(Condition("media/a.png"),))
    result, _ = make(EngineMaker(writes_stills=False), tmp_path, request=request)
    assert result["frames"] == 9


def test_full_disk_is_told_from_bad_media(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(writer: VideoWriter, frames: Any) -> None:
        with writer._translate_errors():
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(VideoWriter, "write", fail)
    with pytest.raises(MediaError) as caught:
        make(EngineMaker(), tmp_path)
    assert explain(caught.value).code == "disk_full"
    assert malloc._Process.running_models == 0, "the decoder is given back, though the error is still there"


LONG = Request(
    prompt="a red circle moving right on a black background",
    size=(64, 64),
    frames=25,
    seed=1,
    sigmas=(1.0, 0.5),
    windows=Windows(frames=9, overlap=8),
)


def interrupt_in_window(maker: EngineMaker, folder: Path, number: int) -> None:
    """Makes the long video, and cancels it in a window, as a dying worker does; its folder is removed."""
    token = CancelToken()

    def report(kind: str, data: Any) -> None:
        if kind == "progress" and data["window"] and data["window"][0] == number:
            token.cancel()

    task = Task("video_" + "0" * 32, 1, DEMO, LONG.to_json(), folder, folder / "output.1")
    with pytest.raises(Cancelled):
        maker.make(task, report, token)
    (folder / ".kadr-0123456789ab.part.mp4").touch()  # of a worker that was killed while it decoded
    shutil.rmtree(folder / "output.1")


def test_long_video_goes_on_from_the_windows_of_an_earlier_attempt(tmp_path: Path) -> None:
    maker = EngineMaker(writes_stills=False)
    interrupt_in_window(maker, tmp_path / "job", 3)
    result, reports = make(maker, tmp_path / "job", LONG, output=tmp_path / "job" / "output.2")
    windows = [data["window"] for kind, data in reports if kind == "progress" and data["window"]]
    assert min(windows) == [3, 3], "the first two are not made again"
    assert result["notices"] == []
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["output.2"]
    make(maker, tmp_path / "whole", LONG)
    resumed, whole = (read_video(tmp_path / path / "video.mp4") for path in ("job/output.2", "whole/output.1"))
    assert np.array_equal(resumed.frames, whole.frames)


def test_windows_that_do_not_fit_are_made_again_with_a_notice(tmp_path: Path) -> None:
    maker = EngineMaker(writes_stills=False)
    interrupt_in_window(maker, tmp_path, 3)
    _, reports = make(maker, tmp_path, replace(LONG, seed=2), output=tmp_path / "output.2")
    notices = [data for kind, data in reports if kind == "notice"]
    assert len(notices) == 1
    assert notices[0].startswith("The windows of an earlier attempt cannot be used, and are made again: ")
    assert [path.name for path in tmp_path.iterdir()] == ["output.2"]


def test_long_video_that_is_refused_is_not_tried_twice(tmp_path: Path) -> None:
    request = replace(LONG, windows=Windows(frames=9, overlap=8, anchor_strength=1.0))
    with pytest.raises(RequestError, match="there is no image at frame 0"):
        make(EngineMaker(writes_stills=False), tmp_path, request)
