"""Previews of each step: a linear map that is fitted to the VAE once, and shows what the video will be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.preview import correlate, mean_by_cell, small_frames
from kadr import Engine, Progress, Request
from kadr.pipeline.stages.preview import PreviewMap, open_preview_map

REQUEST = Request("a red circle moving right on a black background", size=(128, 128), frames=17, seed=1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return Engine.open("demo", prompt_cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def previews(engine) -> list[tuple[Progress, np.ndarray]]:
    seen: list[tuple[Progress, np.ndarray]] = []

    def watch(progress: Progress) -> None:
        if (preview := progress.preview) is not None:
            seen.append((progress, preview))

    engine.generate(REQUEST, watch=watch, preview=True)
    return seen


def psnr(frames: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((frames.astype(float) - other) ** 2)))


def test_each_denoising_step_has_a_preview_and_no_other_stage(previews):
    assert {progress.stage for progress, _ in previews} == {"denoise"}
    assert [progress.step for progress, _ in previews] == list(range(1, 25))


def test_preview_is_a_quarter_of_each_side_and_an_eighth_of_the_frames(previews):
    assert all(preview.shape == (3, 32, 32, 3) and preview.dtype == np.uint8 for _, preview in previews)


@pytest.fixture(scope="module")
def target(engine) -> np.ndarray:
    """The video, as a preview would show it."""
    return small_frames(engine.generate(REQUEST).frames)


def test_correlation_with_the_video_rises_to_that_of_docs_performance(previews, target):
    """The table there has 0.84 for the last step, 0.81 for the worst video, and 0.92 for the mean colours of cells."""
    first, middle, last = (correlate(previews[step][1], target) for step in (0, 15, 23))
    assert first + 0.03 < middle < last
    assert last > 0.75
    assert correlate(mean_by_cell(previews[-1][1]), mean_by_cell(target)) > 0.85


def test_previews_come_to_look_like_the_video(previews, target):
    grey = np.full_like(target, target.mean((0, 1, 2)))
    first, last = psnr(previews[0][1], target), psnr(previews[-1][1], target)
    assert last > max(first, psnr(grey, target)) + 2
    assert last > 20


def test_previews_do_not_change_the_video(engine):
    plain, previewed = engine.generate(REQUEST), engine.generate(REQUEST, preview=True)
    assert np.array_equal(plain.frames, previewed.frames)


def test_without_being_asked_for_there_is_none(engine):
    seen: list[np.ndarray | None] = []
    engine.generate(REQUEST, watch=lambda progress: seen.append(progress.preview))
    assert set(seen) == {None}


def test_both_passes_have_previews(engine):
    stages = set()

    def watch(progress: Progress) -> None:
        if progress.preview is not None:
            stages.add((progress.stage, progress.preview.shape))

    engine.generate(Request(REQUEST.prompt, size=(128, 128), frames=9, multi_scale=True), watch=watch, preview=True)
    assert stages == {("denoise", (2, 16, 16, 3)), ("refine", (2, 32, 32, 3))}


def test_map_is_fitted_once_and_read_from_the_cache_after_that(engine, tmp_path, monkeypatch):
    loader = engine._model.loader
    fitted = open_preview_map(loader, tmp_path)
    monkeypatch.setattr(PreviewMap, "fit", lambda *args: pytest.fail("it was fitted again"))
    assert torch.equal(open_preview_map(loader, tmp_path).weights, fitted.weights)


def test_fit_reports_progress_in_clips_and_a_map_from_the_cache_none(tmp_path):
    other, seen = Engine.open("demo", prompt_cache=tmp_path), []

    def watch(progress: Progress) -> None:
        seen.append((progress.stage, progress.step, progress.of))

    for expected in ([("preview", step, 24) for step in (0, 6, 12, 18, 24)], []):
        seen.clear()
        with other.start(REQUEST, watch=watch, preview=True):
            assert seen == expected
        other = Engine.open("demo", prompt_cache=tmp_path)


def test_damaged_cache_file_is_replaced(engine, tmp_path):
    loader = engine._model.loader
    fitted = open_preview_map(loader, tmp_path)
    (file,) = (tmp_path / "previews").iterdir()
    file.write_bytes(b"nothing")
    assert torch.equal(open_preview_map(loader, tmp_path).weights, fitted.weights)
    assert torch.equal(open_preview_map(loader, tmp_path).weights, fitted.weights)


def test_vae_without_an_encoder_is_a_notice_and_the_video_is_made(engine, monkeypatch, tmp_path):
    other = Engine.open("demo", prompt_cache=tmp_path)

    def fail(*args: object, **kwargs: object) -> None:
        from kadr.errors import CheckpointError

        raise CheckpointError("the VAE has no encoder")

    monkeypatch.setattr(type(other._model.loader), "load_vae_encoder", fail)
    with pytest.warns(UserWarning, match="no previews"):
        video = other.generate(REQUEST, preview=True)
    assert any("no encoder" in notice for notice in video.notices)
