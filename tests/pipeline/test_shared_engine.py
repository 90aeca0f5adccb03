"""One engine, several threads: the same frames as one after the other, each module loaded once."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from kadr import CancelToken, Condition, Engine, Progress, Request, Size, Windows
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import Busy, Cancelled, RequestError

SMALL = Request(prompt="a red circle moving right", size=Size(64, 64), frames=9, steps=2)
MAX_GROWTH = 10e6  # bytes that 45 videos may add to the process


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Request]]:
    """Model and request of each mode."""
    path = tmp_path_factory.mktemp("image") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    two_passes = Request(prompt=SMALL.prompt, size=Size(64, 64), frames=9)
    return {
        "text": ("demo", SMALL),
        "two passes": ("demo-distilled", two_passes),
        "image": ("demo", replace(SMALL, conditions=(Condition(str(path)),))),
        "windows": ("demo", replace(SMALL, frames=25, windows=Windows(frames=17, overlap=8))),
    }


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each module is loaded."""
    counts: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        load = getattr(owner, name)

        def counted(self: Any, *args: Any, **options: Any) -> Any:
            counts[f"{name} {sorted(options.items())} of {getattr(self, 'path', '')}"] += 1
            return load(self, *args, **options)

        monkeypatch.setattr(owner, name, counted)

    for name in ("load_transformer", "load_vae", "load_upscaler"):
        count(Checkpoint, name)
    count(TextEncoderCheckpoint, "load")
    return counts


def generate_all(engine: Engine, seeds: range, request: Request, threads: int) -> list[np.ndarray]:
    """Generates a video for each seed, in that many threads that begin at once."""
    barrier = threading.Barrier(threads)

    def generate(seed: int) -> np.ndarray:
        if seed < threads:
            barrier.wait(timeout=60)
        return engine.generate(replace(request, seed=seed)).frames

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(generate, seeds))


@pytest.mark.parametrize("mode", ["text", "two passes", "image", "windows"])
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_make_the_frames_of_one_after_the_other(
    threads: int, mode: str, requests: dict[str, tuple[str, Request]], loads: Counter[str], tmp_path: Path
) -> None:
    model, request = requests[mode]
    alone = Engine.open(model, device="cpu", prompt_cache=tmp_path / "a")
    expected = [alone.generate(replace(request, seed=seed)).frames for seed in range(threads)]
    loads.clear()
    shared = Engine.open(model, device="cpu", prompt_cache=tmp_path / "b")
    frames = generate_all(shared, range(threads), request, threads)
    assert all(map(np.array_equal, frames, expected))
    assert loads
    assert set(loads.values()) == {1}


@pytest.fixture
def occupied() -> Iterator[Engine]:
    """An engine that is making a video in another thread until the test ends."""
    engine, started, done = Engine.open("demo", device="cpu"), threading.Event(), threading.Event()

    def hold(progress: Progress) -> None:
        started.set()
        done.wait(timeout=60)

    thread = threading.Thread(target=lambda: engine.generate(SMALL, watch=hold))
    thread.start()
    assert started.wait(timeout=60)
    yield engine
    done.set()
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.generate(SMALL, wait=False),
        lambda engine: engine.denoise(SMALL, wait=False),
        lambda engine: engine.prepare(SMALL, wait=False),
        lambda engine: engine.write(SMALL, "never.mp4", wait=False),
    ],
)
def test_who_does_not_wait_is_told_at_once(call: Callable[[Engine], object], occupied: Engine) -> None:
    with pytest.raises(Busy, match="making another video"):
        call(occupied)


def test_plan_resolve_and_dry_run_do_not_wait(occupied: Engine) -> None:
    assert occupied.plan(SMALL).peak_bytes > 0
    assert occupied.resolve(SMALL).frames == 9
    assert occupied.dry_run(SMALL).resolved.model_evaluations == 4


def test_watcher_that_asks_for_another_video_is_refused() -> None:
    """It would wait for itself for ever."""
    engine = Engine.open("demo", device="cpu")

    def ask(progress: Progress) -> None:
        engine.generate(SMALL)

    with pytest.raises(Busy, match="this thread"):
        engine.generate(SMALL, watch=ask)
    assert engine.generate(SMALL, wait=False).frames.shape == (9, 64, 64, 3)


def test_cancelled_video_leaves_the_engine_to_the_next() -> None:
    engine = Engine.open("demo", device="cpu")
    expected = engine.generate(SMALL).frames

    def cancel(progress: Progress) -> None:
        if progress.step:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        engine.generate(SMALL, watch=cancel)
    assert np.array_equal(engine.generate(SMALL, wait=False).frames, expected)


def test_generation_is_used_inside_its_block_for_its_stages() -> None:
    engine = Engine.open("demo", device="cpu")
    with (
        engine.start(SMALL, stages=("text",)) as generation,
        pytest.raises(RequestError, match="denoise is not planned"),
    ):
        generation.denoise()
    with engine.start(SMALL) as generation:
        latents = generation.denoise()
    with pytest.raises(RequestError, match="has ended"):
        list(generation.decode(latents))


def test_generation_is_cancelled_from_another_thread() -> None:
    engine = Engine.open("demo", device="cpu")
    request = replace(SMALL, steps=1000)
    with engine.start(request) as generation:
        threading.Timer(0.05, generation.cancel, ["enough"]).start()
        with pytest.raises(Cancelled, match="enough"):
            generation.denoise()


def test_one_who_waits_can_be_cancelled(occupied: Engine) -> None:
    token = CancelToken()
    threading.Timer(0.05, token.cancel).start()
    with pytest.raises(Cancelled):
        occupied.generate(SMALL, cancel=token)


@pytest.mark.slow
def test_fifty_videos_reload_nothing_and_memory_stays(loads: Counter[str]) -> None:
    engine, process, sizes = Engine.open("demo", device="cpu"), psutil.Process(), []
    for seed in range(50):
        engine.generate(replace(SMALL, seed=seed))
        gc.collect()
        sizes.append(process.memory_info().rss)
    assert set(loads.values()) == {1}
    assert sizes[-1] - sizes[4] <= MAX_GROWTH
