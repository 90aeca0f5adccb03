"""A prompt that was encoded before does not touch the text encoder, and gives the same video bit for bit."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kadr import Engine, KadrWarning, Progress, Request, Size
from kadr.checkpoints.save import write_tensors
from kadr.checkpoints.source import Source
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.models.t5 import T5Encoder
from kadr.pipeline import prompt_cache
from kadr.pipeline.prompt_cache import PromptCache, cache_home
from kadr.text.tokenizer import PromptTokens
from tests.tiny_models import MODEL_FILE, TEXT_WIDTH

REQUEST = Request(prompt="a red circle", size=Size(32, 32), frames=1, fps=24, steps=1, guidance=3.0)
BLUE = "over the blue sea"


def opened(home: Path, cache: Path | bool, dtype: str = "float32") -> Engine:
    return Engine.open(home / MODEL_FILE, device="cpu", dtype=dtype, prompt_cache=cache)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where nothing is yet."""
    return tmp_path / "cache" / "prompts"


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text encoder must not be touched: not even its module is built."""

    def refuse(self: TextEncoderCheckpoint, *given: object, **more: object) -> T5Encoder:
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(TextEncoderCheckpoint, "load", refuse)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The ids of what was encoded."""
    seen: list[Tensor] = []
    forward = T5Encoder.forward
    monkeypatch.setattr(T5Encoder, "forward", lambda *given: (seen.append(given[1]), forward(*given))[1])
    return seen


# --- the same video -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_of_before_gives_the_same_latents_without_the_text_encoder(
    dtype: str, home: Path, cache: Path, request: pytest.FixtureRequest
) -> None:
    uncached = opened(home, False, dtype).denoise(REQUEST)
    fresh = opened(home, cache, dtype).denoise(REQUEST)
    request.getfixturevalue("no_encoder")
    reports: list[Progress] = []
    found = opened(home, cache, dtype).denoise(REQUEST, watch=reports.append)
    assert torch.equal(fresh, uncached)
    assert torch.equal(found, uncached)
    assert [(report.step, report.of) for report in reports if report.stage == "text"] == [(0, 2), (1, 2), (2, 2)]


def test_only_what_is_missing_is_encoded(home: Path, cache: Path, encoded: list[Tensor]) -> None:
    engine = opened(home, cache)
    alone = replace(REQUEST, guidance=1.0)
    engine.denoise(alone)
    engine.denoise(replace(REQUEST, negative_prompt=BLUE))
    engine.denoise(replace(REQUEST, prompt=BLUE, negative_prompt="a red circle"))
    ids = engine.components.tokenizer.encode
    assert [each.tolist() for each in encoded] == [ids("a red circle").ids.tolist(), ids(BLUE).ids.tolist()]


def test_the_plan_has_no_text_stage_where_all_prompts_are_known(home: Path, cache: Path) -> None:
    engine = opened(home, cache)
    assert [stage.stage for stage in engine.plan(REQUEST).stages] == ["text", "denoise", "decode"]
    engine.denoise(REQUEST)
    assert [stage.stage for stage in engine.plan(REQUEST).stages] == ["denoise", "decode"]


def test_only_the_rows_of_real_tokens_are_kept_in_the_dtype_they_were_computed_in(home: Path, cache: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        engine = opened(home, cache / dtype, dtype)
        engine.denoise(replace(REQUEST, guidance=1.0))
        (path,) = (cache / dtype).iterdir()
        (info,) = Source.open(path).infos.values()
        assert info.shape == (int(engine.components.tokenizer.encode("a red circle").mask.sum()), TEXT_WIDTH)
        assert info.storage_type == dtype


def test_where_there_is_no_token_the_transformer_is_told_zero(home: Path) -> None:
    engine = opened(home, False)
    text = engine._create_generation(replace(REQUEST, guidance=1.0), lambda progress: None).prompt_encoder
    with torch.no_grad():
        (made,) = text.encode(lambda progress: None)
    assert made.mask.any()
    assert made.embeddings[made.mask].abs().min() > 0
    assert made.embeddings[~made.mask].abs().max() == 0


# --- what a name depends on ---------------------------------------------------------------------------------------


def kept(text: TextEncoderCheckpoint, folder: Path, **other: str) -> PromptCache:
    how = {"dtype": torch.float32, "device": "cpu", **other}
    return PromptCache(folder, text, **how)


@pytest.fixture
def text(home: Path, tmp_path: Path) -> TextEncoderCheckpoint:
    """An encoder of its own, that may be changed."""
    shutil.copytree(home, tmp_path / "own")
    return TextEncoderCheckpoint.open(tmp_path / "own")


def rows_for(text: TextEncoderCheckpoint, prompt: str = "a red circle") -> tuple[PromptTokens, Tensor]:
    tokens = text.load_tokenizer().encode(prompt)
    return tokens, torch.randn(int(tokens.mask.sum()), TEXT_WIDTH, generator=torch.Generator().manual_seed(1))


def test_another_prompt_dtype_device_or_way_to_hold_the_weights_is_another_name(
    text: TextEncoderCheckpoint, cache: Path
) -> None:
    tokens, rows = rows_for(text)
    kept(text, cache).store(tokens, rows)
    found = kept(text, cache).look_up(tokens)
    assert found is not None
    assert torch.equal(found, rows)
    assert kept(text, cache).look_up(rows_for(text, BLUE)[0]) is None
    for other in ({"dtype": torch.bfloat16}, {"device": "cuda"}, {"held": "Q8_0"}):
        assert kept(text, cache, **other).look_up(tokens) is None


def test_a_changed_file_is_another_name_and_a_moved_one_is_not(
    text: TextEncoderCheckpoint, cache: Path, tmp_path: Path
) -> None:
    tokens, rows = rows_for(text)
    kept(text, cache).store(tokens, rows)
    shutil.move(tmp_path / "own", tmp_path / "moved")
    moved = TextEncoderCheckpoint.open(tmp_path / "moved")
    assert kept(moved, cache).look_up(tokens) is not None
    weights = tmp_path / "moved" / "text_encoder" / "model.safetensors"
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert kept(moved, cache).look_up(tokens) is None
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    config = weights.with_name("config.json")
    config.write_text(config.read_text().replace('"layer_norm_epsilon": 1e-06', '"layer_norm_epsilon": 1e-05'))
    assert kept(TextEncoderCheckpoint.open(tmp_path / "moved"), cache).look_up(tokens) is None


# --- files that are not what they should be --------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


SPOILED: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no tensors at all, and a long line about it"),
    "one bit": _flip,
    "another tensor": lambda path: write_tensors(path, {"weight": torch.ones(3)}, dtype=torch.float32),
    "another shape": lambda path: write_tensors(path, {"encoding": torch.ones(3, 5)}, dtype=torch.float32),
    "whole numbers": lambda path: write_tensors(path, {"encoding": torch.ones(4, TEXT_WIDTH)}, dtype=torch.int32),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_damaged_or_foreign_file_is_ignored_and_written_again(
    how: str, text: TextEncoderCheckpoint, cache: Path, recwarn: pytest.WarningsRecorder
) -> None:
    tokens, rows = rows_for(text)
    prompts = kept(text, cache)
    prompts.store(tokens, rows)
    (path,) = cache.iterdir()
    SPOILED[how](path)
    assert prompts.look_up(tokens) is None
    prompts.store(tokens, rows)
    found = prompts.look_up(tokens)
    assert found is not None
    assert torch.equal(found, rows)
    assert list(cache.iterdir()) == [path]
    assert not recwarn.list


def test_a_folder_that_cannot_be_written_to_is_told_once_and_changes_nothing(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    engine = opened(home, tmp_path / "file" / "prompts")
    with pytest.warns(KadrWarning, match=r"cannot be kept in .*file.prompts .*KADR_CACHE.*--no-prompt-cache") as told:
        latents = [engine.denoise(REQUEST) for _ in range(2)]
    assert len(told) == 1
    assert torch.equal(*latents)
    assert torch.equal(latents[0], opened(home, False).denoise(REQUEST))


# --- how much is kept, and where -----------------------------------------------------------------------------------


def test_what_was_used_longest_ago_goes_first_and_no_file_of_others_does(
    text: TextEncoderCheckpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = kept(text, cache)
    words = ["a", "red", "circle", "moving", "right", "over", "the", "blue", "sea"]
    made = [rows_for(text, word) for word in words]
    stranger = cache / "notes.safetensors"
    cache.mkdir(parents=True)
    stranger.write_bytes(b"x" * 10_000)
    for age, (tokens, rows) in enumerate(made[:5]):
        prompts.store(tokens, rows)
        (newest,) = (path for path in cache.iterdir() if path != stranger and path.stat().st_mtime > 1_000_000)
        os.utime(newest, (age, age))
        size = newest.stat().st_size
    assert prompts.look_up(made[0][0]) is not None  # and so it is the one used last
    monkeypatch.setattr(prompt_cache, "MAX_CACHE_BYTES", 3 * size + size // 2)
    prompts.store(*made[5])
    assert [prompts.look_up(tokens) is not None for tokens, _ in made[:6]] == [True, False, False, False, True, True]
    assert stranger.exists()


def test_without_a_cache_nothing_is_written(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KADR_CACHE", str(tmp_path / "cache"))
    opened(home, False).denoise(REQUEST)
    assert not (tmp_path / "cache").exists()
    opened(home, True).denoise(REQUEST)
    assert len(list((tmp_path / "cache" / "prompts").iterdir())) == 2


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"KADR_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ("linux", {"KADR_CACHE": "~/own"}, "/home/me/own"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/kadr"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/kadr"),
        ("linux", {"KADR_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/kadr"),
        ("darwin", {}, "/home/me/Library/Caches/kadr"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/kadr/cache"),
    ],
)
def test_the_cache_lies_where_the_system_has_such_things(
    platform: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KADR_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_home() == Path(expected)


def test_a_user_without_a_home_goes_without_a_cache(
    text: TextEncoderCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("KADR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    prompts = PromptCache.open(True, text, dtype=torch.float32, device="cpu")
    tokens, rows = rows_for(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts.store(tokens, rows)
        assert prompts.look_up(tokens) is None
