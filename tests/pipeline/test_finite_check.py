"""Numbers that are none are found where they arise, and the stage is done again in float32, once."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kadr import Condition, Engine, KadrWarning, Progress, Request, Size, Video
from kadr.errors import NonFiniteError
from kadr.media.writer import VideoWriter
from kadr.memory.module_cache import ModuleCache
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.pipeline.finite_check import FiniteCheck, NonFiniteFound, is_finite
from kadr.pipeline.retry import retry_frames_in_fp32, retry_in_fp32
from kadr.planning.plan import CONVERTED
from tests.tiny_models import MODEL_FILE, write_model

REQUEST = Request(prompt="a red circle", size=Size(64, 32), frames=9, fps=24, seed=7, steps=3, guidance=1.0)
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


# --- looking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_none_is_found_among_many(dtype: torch.dtype) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert is_finite(x)
        x[1, 20, 3] = bad
        assert not is_finite(x)
        assert not is_finite(x.transpose(0, 2))


class Post:
    """Answers that come when they are asked for, and a note of what happened."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.sent = 0

    def __call__(self, answer: Tensor) -> Callable[[], bool]:
        self.sent += 1
        number = self.sent
        self.notes.append(f"sent {number}")

        def answered() -> bool:
            self.notes.append(f"asked {number}")
            return bool(answer)

        return answered


def test_an_answer_that_takes_time_is_asked_for_when_the_next_one_is_on_its_way() -> None:
    post = Post()
    watchman = FiniteCheck(post)
    for step in range(3):
        watchman.check(torch.ones(2), f"step {step}")
    assert post.notes == ["sent 1", "sent 2", "asked 1", "sent 3", "asked 2"]
    watchman.synchronize()
    watchman.synchronize()
    assert post.notes[5:] == ["asked 3"]


def test_a_late_answer_names_the_place_it_is_about() -> None:
    watchman = FiniteCheck(Post())
    watchman.check(torch.tensor([math.nan]), "step 1")
    with pytest.raises(NonFiniteFound) as caught:
        watchman.check(torch.ones(2), "step 2")
    assert caught.value.location == "step 1"
    watchman.synchronize()
    watchman.check(torch.tensor([math.inf]), "step 3")
    with pytest.raises(NonFiniteFound) as caught:
        watchman.synchronize()
    assert caught.value.location == "step 3"


def test_on_a_cpu_the_answer_is_there_at_once() -> None:
    watchman = FiniteCheck.for_device(torch.device("cpu"))
    with pytest.raises(NonFiniteFound, match="step 1"):
        watchman.check(torch.tensor([math.nan]), "step 1")


# --- doing it again -----------------------------------------------------------------------------------------------


def failing(dtype: torch.dtype | None, calls: list[torch.dtype | None], *, until: torch.dtype | None = FLOAT32) -> str:
    calls.append(dtype)
    if dtype != until:
        raise NonFiniteFound("step 3 of 8")
    return "done"


def test_a_stage_that_fails_in_bfloat16_is_done_again_in_float32_with_one_line() -> None:
    calls: list[torch.dtype | None] = []
    with pytest.warns(KadrWarning) as told:
        assert retry_in_fp32("denoise", BFLOAT16, lambda dtype: failing(dtype, calls)) == "done"
    assert calls == [None, FLOAT32]
    (line,) = [str(warning.message) for warning in told]
    assert line == (
        "denoise gave numbers that are not finite at step 3 of 8 in bfloat16; doing it again in float32, which is "
        "slower and takes more memory."
    )


def test_a_stage_in_float32_is_not_done_again() -> None:
    calls: list[torch.dtype | None] = []
    with pytest.raises(NonFiniteError, match=r"step 3 of 8, in float32\. .*verify") as caught:
        retry_in_fp32("denoise", FLOAT32, lambda dtype: failing(dtype, calls))
    assert caught.value.stage == "denoise"
    assert calls == [None]


def test_what_fails_in_float32_too_ends_there() -> None:
    calls: list[torch.dtype | None] = []
    with pytest.warns(KadrWarning), pytest.raises(NonFiniteError) as caught:
        retry_in_fp32("refine", BFLOAT16, lambda dtype: failing(dtype, calls, until=BFLOAT16))
    assert caught.value.stage == "refine"
    assert calls == [None, FLOAT32]


def test_what_the_first_run_had_in_memory_is_gone_before_the_second() -> None:
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def run(dtype: torch.dtype | None) -> int:
        others = len(alive)
        module = nn.Linear(2, 2)
        alive.add(module)
        if dtype is None:
            raise NonFiniteFound("prompt 1 of 1")
        return others

    with pytest.warns(KadrWarning):
        assert retry_in_fp32("text", BFLOAT16, run) == 0


@pytest.mark.parametrize(("first", "second"), [((4, 4), (4, 4, 1)), ((1, 2), (5, 4)), ((), (9,)), ((8,), (1,) * 9)])
def test_frames_that_were_handed_on_are_not_handed_on_again(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    def run(dtype: torch.dtype | None) -> Iterator[Tensor]:
        sizes, mark = (second, 100) if dtype else (first, 0)
        done = 0
        for size in sizes:
            yield torch.arange(done, done + size) + mark
            done += size
        if dtype is None:
            raise NonFiniteFound(f"frame {done + 1} of 9")

    with pytest.warns(KadrWarning):
        frames = torch.cat(list(retry_frames_in_fp32("decode", BFLOAT16, run)))
    known = sum(first)
    assert frames.tolist() == [frame + (100 if frame >= known else 0) for frame in range(9)]


# --- in a generation ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(home: Path) -> Engine:
    return Engine.open(home / MODEL_FILE, device="cpu", dtype="bfloat16", prompt_cache=False)


@contextmanager
def float32_in(engine: Engine, stage: str) -> Iterator[None]:
    """One stage is planned in float32."""
    components = engine.components
    choice, wide = components.placement, {"dtype": "float32", "hold": CONVERTED, "streamed": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            components, "placement", lambda asked: replace(choice(asked), **wide) if asked == stage else choice(asked)
        )
        yield


def spoil_text(patch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...]) -> None:
    forward = T5Encoder.forward

    def spoiled(self: T5Encoder, ids: Tensor, mask: Tensor) -> Tensor:
        made = forward(self, ids, mask)
        return made / 0 if made.dtype in dtypes else made

    patch.setattr(T5Encoder, "forward", spoiled)


def spoil_encoder(patch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...]) -> None:
    encode = VAE.encode_stream

    def spoiled(self: VAE, *given: Any, **more: Any) -> Tensor:
        made = encode(self, *given, **more)
        return made * math.nan if made.dtype in dtypes else made

    patch.setattr(VAE, "encode_stream", spoiled)


def spoil_transformer(patch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...]) -> None:
    """From its second step on."""
    forward, calls = Transformer.forward, dict.fromkeys(dtypes, 0)

    def spoiled(self: Transformer, tokens: Tensor, *given: Any) -> Tensor:
        made = forward(self, tokens, *given)
        if tokens.dtype in dtypes:
            calls[tokens.dtype] += 1
            made = made / 0 if calls[tokens.dtype] > 1 else made
        return made

    patch.setattr(Transformer, "forward", spoiled)


def spoil_decoder(patch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...]) -> None:
    """From its second piece on."""
    stream = VAE.decode_chunks

    def spoiled(self: VAE, chunks: Iterable[Tensor], *given: Any, **more: Any) -> Iterator[Tensor]:
        chunks, looked_at = tee(chunks)
        dtype = next(looked_at).dtype
        for number, pixels in enumerate(stream(self, chunks, *given, **more)):
            yield pixels / 0 if number and dtype in dtypes else pixels

    patch.setattr(VAE, "decode_chunks", spoiled)


Spoil = Callable[[pytest.MonkeyPatch, tuple[torch.dtype, ...]], None]
STAGES: dict[str, tuple[Spoil, str]] = {
    "text": (spoil_text, "prompt 1 of 1"),
    "encode": (spoil_encoder, "image or clip 1 of 1"),
    "denoise": (spoil_transformer, "step 2 of 3"),
    "decode": (spoil_decoder, r"frame \d of 9"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_fails_in_bfloat16_comes_to_what_it_comes_to_in_float32(
    stage: str, narrow: Engine, photo: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(REQUEST, conditions=(photo,))
    plain = narrow.generate(request)
    with float32_in(narrow, stage):
        expected = narrow.generate(request)
    spoil, place = STAGES[stage]
    spoil(monkeypatch, (BFLOAT16,))
    reports: list[Progress] = []
    with pytest.warns(KadrWarning, match=rf"^{stage} .*{place} in bfloat16; doing it again in float32") as told:
        made = narrow.generate(request, watch=reports.append)
    assert len(told) == 1
    if stage == "decode":  # what had been handed on stays
        known = first_difference(made, plain)
        assert known > 0
        expected = replace(expected, frames_psnr=np.concatenate([plain.frames[:known], expected.frames[known:]]))
    assert torch.equal(made.latents, expected.latents)
    assert np.array_equal(made.frames, expected.frames)
    assert torch.equal(made.latents, plain.latents) == (stage == "decode")
    steps = [report.step for report in reports if report.stage == stage]
    again = steps.index(0, 1)
    assert steps[again:] == sorted(steps[again:])
    assert max(steps[:again]) < max(steps[again:]) or stage in ("text", "encode")


def first_difference(one: Video, other: Video) -> int:
    return next(i for i, (a, b) in enumerate(zip(one.frames, other.frames, strict=True)) if not np.array_equal(a, b))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_fails_in_float32_too_is_named_and_leaves_nothing(
    stage: str, narrow: Engine, photo: Condition, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    STAGES[stage][0](monkeypatch, (BFLOAT16, FLOAT32))
    with pytest.warns(KadrWarning) as told, pytest.raises(NonFiniteError, match=STAGES[stage][1]) as caught:
        narrow.write(replace(REQUEST, conditions=(photo,)), out / "a.mp4")
    assert len(told) == 1
    assert caught.value.stage == stage
    assert list(out.iterdir()) == []


def test_damaged_weights_stop_a_bfloat16_run_after_one_more_try(tmp_path: Path) -> None:
    def spoil(module: nn.Module) -> None:
        module.layers[1].feed_forward.down.weight.view(-1)[0] = math.nan  # type: ignore[union-attr,index]

    home = write_model(tmp_path / "model", weight_edits={"transformer": spoil})
    engine = Engine.open(home / MODEL_FILE, device="cpu", dtype="bfloat16", prompt_cache=False)
    with pytest.warns(KadrWarning) as told, pytest.raises(NonFiniteError, match="step 1 of 3, in float32") as caught:
        engine.denoise(REQUEST)
    assert len(told) == 1
    assert caught.value.stage == "denoise"


def test_no_frame_of_a_failed_stage_is_written_twice_or_left_out(
    narrow: Engine, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[np.ndarray] = []
    put = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames: (written.append(frames), put(self, frames))[1])
    spoil_decoder(monkeypatch, (BFLOAT16,))
    with pytest.warns(KadrWarning, match=r"^decode"):
        made = narrow.write(replace(REQUEST, frames=30, steps=1), out / "a.mp4")
    assert made.frames == sum(map(len, written)) == 30


def test_the_module_in_bfloat16_is_gone_before_the_one_in_float32_comes_and_that_one_is_not_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.open(home / MODEL_FILE, device="cpu", dtype="bfloat16", prompt_cache=False)
    events: list[str] = []
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    take = ModuleCache.acquire

    def noted(self: ModuleCache, name: str, load: Callable[[], nn.Module], **how: Any) -> Any:
        def loaded() -> nn.Module:
            events.append(f"{name}, with {sum(isinstance(one, Transformer) for one in alive)} others")
            module = load()
            alive.add(module)
            return module

        return take(self, name, loaded, **how)

    monkeypatch.setattr(ModuleCache, "acquire", noted)
    spoil_transformer(monkeypatch, (BFLOAT16,))
    with pytest.warns(KadrWarning):
        engine.denoise(REQUEST)
    assert events[1:] == ["transformer, with 0 others", "transformer in float32, with 0 others"]
    assert not any("float32" in name for name in engine.components.module_cache.cached_names)


def test_where_answers_are_late_the_step_is_named_all_the_same_and_no_bad_frame_is_handed_on(
    engine: Engine, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FiniteCheck, "for_device", lambda device: FiniteCheck(Post()))
    good = engine.generate(replace(REQUEST, frames=30))
    for stage, place in (("denoise", "step 2 of 3"), ("decode", r"frame \d+ of 30")):
        with pytest.MonkeyPatch.context() as patch:
            STAGES[stage][0](patch, (FLOAT32,))
            written: list[np.ndarray] = []
            put = VideoWriter.write
            patch.setattr(VideoWriter, "write", lambda self, f, put=put, to=written: (to.append(f), put(self, f))[1])
            with pytest.raises(NonFiniteError, match=place) as caught:
                engine.write(replace(REQUEST, frames=30), out / "a.mp4")
        assert caught.value.stage == stage
        made = np.concatenate(written) if written else good.frames[:0]
        assert np.array_equal(made, good.frames[: len(made)])
        assert (len(made) > 0) == (stage == "decode")
