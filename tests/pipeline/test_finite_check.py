"""NaN and infinity are found where they arise, and the stage is retried once in float32."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import tee
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kadr import Condition, Engine, KadrWarning, Progress, Request, Size, Video
from kadr.errors import NonFiniteError
from kadr.media.clip import read_metadata, read_video
from kadr.media.writer import VideoWriter
from kadr.memory.module_cache import ModuleCache
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.pipeline.finite_check import FiniteCheck, NonFiniteFound, is_finite
from kadr.pipeline.modules import Modules
from kadr.pipeline.notices import Notices
from kadr.pipeline.retry import retry_frames_in_fp32, retry_in_fp32
from kadr.planning.placement import CONVERTED, Placement
from tests.tiny_models import MODEL_FILE, write_model

REQUEST = Request(prompt="a red circle", size=Size(64, 32), frames=9, fps=24, seed=7, steps=3, guidance=1.0)
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


# --- the check -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_nan_or_infinity_is_found_among_many_numbers(dtype: torch.dtype) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert is_finite(x)
        x[1, 20, 3] = bad
        assert not is_finite(x)
        assert not is_finite(x.transpose(0, 2))


class FakeCopy:
    """A copy to the host that completes when it is waited for; lists what happened."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.started = 0

    def __call__(self, flag: Tensor) -> Callable[[], bool]:
        self.started += 1
        number = self.started
        self.events.append(f"started {number}")

        def read_flag() -> bool:
            self.events.append(f"read {number}")
            return bool(flag)

        return read_flag


def test_asynchronous_flag_is_read_at_the_next_check() -> None:
    copy = FakeCopy()
    finite_check = FiniteCheck(copy)
    for step in range(3):
        finite_check.check(torch.ones(2), f"step {step}")
    assert copy.events == ["started 1", "started 2", "read 1", "started 3", "read 2"]
    finite_check.synchronize()
    finite_check.synchronize()
    assert copy.events[5:] == ["read 3"]


def test_asynchronous_check_names_the_right_location() -> None:
    finite_check = FiniteCheck(FakeCopy())
    finite_check.check(torch.tensor([math.nan]), "step 1")
    with pytest.raises(NonFiniteFound) as caught:
        finite_check.check(torch.ones(2), "step 2")
    assert caught.value.location == "step 1"
    finite_check.synchronize()
    finite_check.check(torch.tensor([math.inf]), "step 3")
    with pytest.raises(NonFiniteFound) as caught:
        finite_check.synchronize()
    assert caught.value.location == "step 3"


def test_cpu_check_is_immediate() -> None:
    finite_check = FiniteCheck.for_device(torch.device("cpu"))
    with pytest.raises(NonFiniteFound, match="step 1"):
        finite_check.check(torch.tensor([math.nan]), "step 1")


# --- the retry -------------------------------------------------------------------------------------------------------


def modules_in(dtype: torch.dtype) -> Any:
    """Stands for the modules of a generation whose stages are planned in a dtype."""
    return SimpleNamespace(stage_dtype=lambda stage: dtype, notices=Notices())


def fail_until(
    dtype: torch.dtype | None, calls: list[torch.dtype | None], *, until: torch.dtype | None = FLOAT32
) -> str:
    calls.append(dtype)
    if dtype != until:
        raise NonFiniteFound("step 3 of 8")
    return "done"


def test_stage_that_fails_in_bfloat16_is_retried_with_one_warning() -> None:
    calls: list[torch.dtype | None] = []
    with pytest.warns(KadrWarning) as warned:
        assert retry_in_fp32(modules_in(BFLOAT16), "denoise", lambda dtype: fail_until(dtype, calls)) == "done"
    assert calls == [None, FLOAT32]
    (message,) = [str(warning.message) for warning in warned]
    assert message == (
        "denoise produced NaN or infinity at step 3 of 8 in bfloat16; retrying in float32, which is slower and takes "
        "more memory."
    )


def test_stage_in_float32_is_not_retried() -> None:
    calls: list[torch.dtype | None] = []
    with pytest.raises(NonFiniteError, match=r"step 3 of 8, in float32\. .*verify") as caught:
        retry_in_fp32(modules_in(FLOAT32), "denoise", lambda dtype: fail_until(dtype, calls))
    assert caught.value.stage == "denoise"
    assert calls == [None]


def test_failure_in_float32_after_retry_is_an_error() -> None:
    calls: list[torch.dtype | None] = []
    with pytest.warns(KadrWarning), pytest.raises(NonFiniteError) as caught:
        retry_in_fp32(modules_in(BFLOAT16), "refine", lambda dtype: fail_until(dtype, calls, until=BFLOAT16))
    assert caught.value.stage == "refine"
    assert calls == [None, FLOAT32]


def test_fp32_retry_frees_tensors_of_the_first_attempt() -> None:
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def run(dtype: torch.dtype | None) -> int:
        others = len(alive)
        module = nn.Linear(2, 2)
        alive.add(module)
        if dtype is None:
            raise NonFiniteFound("prompt 1 of 1")
        return others

    with pytest.warns(KadrWarning):
        assert retry_in_fp32(modules_in(BFLOAT16), "text", run) == 0


@pytest.mark.parametrize(("first", "second"), [((4, 4), (4, 4, 1)), ((1, 2), (5, 4)), ((), (9,)), ((8,), (1,) * 9)])
def test_retry_skips_frames_already_yielded(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    def run(dtype: torch.dtype | None) -> Iterator[Tensor]:
        sizes, offset = (second, 100) if dtype else (first, 0)
        start = 0
        for size in sizes:
            yield torch.arange(start, start + size) + offset
            start += size
        if dtype is None:
            raise NonFiniteFound(f"frame {start + 1} of 9")

    with pytest.warns(KadrWarning):
        frames = torch.cat(list(retry_frames_in_fp32(modules_in(BFLOAT16), "decode", run)))
    num_yielded = sum(first)
    assert frames.tolist() == [frame + (100 if frame >= num_yielded else 0) for frame in range(9)]


# --- in a generation ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bf16_engine(home: Path) -> Engine:
    return Engine.open(home / MODEL_FILE, device="cpu", dtype="bfloat16", prompt_cache=False)


@contextmanager
def float32_in(engine: Engine, stage: str) -> Iterator[None]:
    """Plans one stage in float32."""
    placement, changes = Modules.placement, {"dtype": "float32", "weight_format": CONVERTED, "streamed_blocks": 0}

    def patched(self: Modules, name: str) -> Placement:
        return replace(placement(self, name), **changes) if name == stage else placement(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Modules, "placement", patched)
        yield


def spoil_text(patch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...]) -> None:
    forward = T5Encoder.forward

    def spoiled(self: T5Encoder, ids: Tensor, mask: Tensor) -> Tensor:
        prompt_embeds = forward(self, ids, mask)
        return prompt_embeds / 0 if prompt_embeds.dtype in dtypes else prompt_embeds

    patch.setattr(T5Encoder, "forward", spoiled)


def spoil_encoder(patch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...]) -> None:
    encode = VAE.encode_stream

    def spoiled(self: VAE, *args: Any, **kwargs: Any) -> Tensor:
        latents = encode(self, *args, **kwargs)
        return latents * math.nan if latents.dtype in dtypes else latents

    patch.setattr(VAE, "encode_stream", spoiled)


def spoil_transformer(patch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...]) -> None:
    """Spoils all steps from the second on."""
    forward, calls = Transformer.forward, dict.fromkeys(dtypes, 0)

    def spoiled(self: Transformer, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        velocity = forward(self, tokens, *args, **kwargs)
        if tokens.dtype in dtypes:
            calls[tokens.dtype] += 1
            velocity = velocity / 0 if calls[tokens.dtype] > 1 else velocity
        return velocity

    patch.setattr(Transformer, "forward", spoiled)


def spoil_decoder(patch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...]) -> None:
    """Spoils all chunks from the second on."""
    stream = VAE.decode_chunks

    def spoiled(self: VAE, chunks: Iterable[Tensor], *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        chunks, peeked = tee(chunks)
        dtype = next(peeked).dtype
        for number, pixels in enumerate(stream(self, chunks, *args, **kwargs)):
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
def test_retried_stage_gives_the_float32_result(
    stage: str, bf16_engine: Engine, image_condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(REQUEST, conditions=(image_condition,))
    plain = bf16_engine.generate(request)
    with float32_in(bf16_engine, stage):
        expected = bf16_engine.generate(request)
    spoil, location = STAGES[stage]
    spoil(monkeypatch, (BFLOAT16,))
    reports: list[Progress] = []
    with pytest.warns(KadrWarning, match=rf"^{stage} .*{location} in bfloat16; retrying in float32") as warned:
        video = bf16_engine.generate(request, watch=reports.append)
    assert len(warned) == 1, [str(w.message) for w in warned]
    if stage == "decode":  # frames already yielded stay
        num_yielded = first_difference(video, plain)
        assert num_yielded > 0
        frames = np.concatenate([plain.frames[:num_yielded], expected.frames[num_yielded:]])
        expected = replace(expected, frames=frames)
    assert torch.equal(video.latents, expected.latents)
    assert np.array_equal(video.frames, expected.frames)
    assert torch.equal(video.latents, plain.latents) == (stage == "decode")
    steps = [report.step for report in reports if report.stage == stage]
    retry = steps.index(0, 1)
    assert steps[retry:] == sorted(steps[retry:])
    assert max(steps[:retry]) < max(steps[retry:]) or stage in ("text", "encode")


def first_difference(a: Video, b: Video) -> int:
    return next(i for i, (x, y) in enumerate(zip(a.frames, b.frames, strict=True)) if not np.array_equal(x, y))


@pytest.mark.parametrize("stage", STAGES)
def test_stage_that_fails_in_float32_is_named_and_leaves_no_file(
    stage: str, bf16_engine: Engine, image_condition: Condition, output_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    STAGES[stage][0](monkeypatch, (BFLOAT16, FLOAT32))
    with pytest.warns(KadrWarning) as warned, pytest.raises(NonFiniteError, match=STAGES[stage][1]) as caught:
        bf16_engine.write(replace(REQUEST, conditions=(image_condition,)), output_folder / "a.mp4")
    assert len(warned) == 1, [str(w.message) for w in warned]
    assert caught.value.stage == stage
    assert list(output_folder.iterdir()) == []


def test_damaged_weights_stop_a_generation_after_one_retry(tmp_path: Path) -> None:
    def spoil(module: nn.Module) -> None:
        module.blocks[1].feed_forward.down.weight.view(-1)[0] = math.nan  # type: ignore[union-attr,index]

    home = write_model(tmp_path / "model", weight_edits={"transformer": spoil})
    engine = Engine.open(home / MODEL_FILE, device="cpu", dtype="bfloat16", prompt_cache=False)
    with pytest.warns(KadrWarning) as warned, pytest.raises(NonFiniteError, match="step 1 of 3, in float32") as caught:
        engine.denoise(REQUEST)
    assert len(warned) == 1, [str(w.message) for w in warned]
    assert caught.value.stage == "denoise"


def test_retried_decode_writes_every_frame_exactly_once(
    bf16_engine: Engine, output_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[np.ndarray] = []
    write = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames: (written.append(frames), write(self, frames))[1])
    spoil_decoder(monkeypatch, (BFLOAT16,))
    with pytest.warns(KadrWarning, match=r"^decode"):
        video_file = bf16_engine.write(replace(REQUEST, frames=30, steps=1), output_folder / "a.mp4")
    assert video_file.frames == sum(map(len, written)) == 30


def test_fp32_retry_frees_bf16_module_first_and_caches_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.open(home / MODEL_FILE, device="cpu", dtype="bfloat16", prompt_cache=False)
    events: list[str] = []
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    acquire = ModuleCache.acquire

    def recording_acquire(self: ModuleCache, name: str, load: Callable[[], nn.Module], **kwargs: Any) -> Any:
        def recording_load() -> nn.Module:
            events.append(f"{name}, with {sum(isinstance(module, Transformer) for module in alive)} others")
            module = load()
            alive.add(module)
            return module

        return acquire(self, name, recording_load, **kwargs)

    monkeypatch.setattr(ModuleCache, "acquire", recording_acquire)
    spoil_transformer(monkeypatch, (BFLOAT16,))
    with pytest.warns(KadrWarning):
        engine.denoise(REQUEST)
    assert events[1:] == ["transformer, with 0 others", "transformer in float32, with 0 others"]
    assert not any("float32" in name for name in engine._model.module_cache.cached_names)


def test_asynchronous_check_names_the_step_and_yields_no_bad_frame(
    engine: Engine, output_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FiniteCheck, "for_device", lambda device: FiniteCheck(FakeCopy()))
    good = engine.generate(replace(REQUEST, frames=30))
    for stage, location in (("denoise", "step 2 of 3"), ("decode", r"frame \d+ of 30")):
        with pytest.MonkeyPatch.context() as patch:
            STAGES[stage][0](patch, (FLOAT32,))
            written: list[np.ndarray] = []
            write = VideoWriter.write
            patch.setattr(
                VideoWriter, "write", lambda self, f, write=write, to=written: (to.append(f), write(self, f))[1]
            )
            with pytest.raises(NonFiniteError, match=location) as caught:
                engine.write(replace(REQUEST, frames=30), output_folder / "a.mp4")
        assert caught.value.stage == stage
        frames = np.concatenate(written) if written else good.frames[:0]
        assert np.array_equal(frames, good.frames[: len(frames)])
        assert (len(frames) > 0) == (stage == "decode")


def test_retry_is_a_notice_of_the_video_and_in_the_file(
    bf16_engine: Engine, output_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bf16_engine.generate(REQUEST).notices == ()
    spoil_decoder(monkeypatch, (BFLOAT16,))  # the file's header is written before
    request = replace(REQUEST, frames=30, steps=1)
    with pytest.warns(KadrWarning, match=r"^decode"):
        video = bf16_engine.generate(request)
    with pytest.warns(KadrWarning, match=r"^decode"):
        video_file = bf16_engine.write(request, output_folder / "a.mp4")
    (notice,) = video.notices
    assert notice.startswith("decode produced NaN or infinity at frame ")
    assert video_file.notices == video.notices
    assert video.metadata["notices"] == read_metadata(video_file.path)["notices"] == [notice]
    assert np.array_equal(
        read_video(video_file.path).frames[0], read_video(video.save(output_folder / "b.mp4")).frames[0]
    )
