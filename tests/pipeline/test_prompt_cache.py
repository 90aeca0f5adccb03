"""A cached prompt does not load the text encoder, and gives bit for bit the same video."""

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
from kadr.cache_home import cache_home
from kadr.checkpoints.save import write_tensors
from kadr.checkpoints.source import Source
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.models.t5 import T5Encoder
from kadr.pipeline import prompt_cache
from kadr.pipeline.prompt_cache import PromptCache
from kadr.schema import PROMPT_CACHE_NUMBER
from kadr.text.tokenizer import PromptTokens
from tests.tiny_models import MODEL_FILE, TEXT_WIDTH

REQUEST = Request(prompt="a red circle", size=Size(32, 32), frames=1, fps=24, steps=1, guidance=3.0)
BLUE = "over the blue sea"


def open_engine(home: Path, cache: Path | bool, dtype: str = "float32") -> Engine:
    return Engine.open(home / MODEL_FILE, device="cpu", dtype=dtype, prompt_cache=cache)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder that does not exist yet."""
    return tmp_path / "cache" / "prompts"


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the text encoder is loaded, even without weights."""

    def refuse(self: TextEncoderCheckpoint, *args: object, **kwargs: object) -> T5Encoder:
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(TextEncoderCheckpoint, "load", refuse)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Token ids of the prompts that were encoded."""
    ids: list[Tensor] = []
    forward = T5Encoder.forward
    monkeypatch.setattr(T5Encoder, "forward", lambda *args: (ids.append(args[1]), forward(*args))[1])
    return ids


# --- the same video -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_prompt_gives_same_latents_without_text_encoder(
    dtype: str, home: Path, cache: Path, request: pytest.FixtureRequest
) -> None:
    uncached = open_engine(home, False, dtype).denoise(REQUEST)
    fresh = open_engine(home, cache, dtype).denoise(REQUEST)
    request.getfixturevalue("no_encoder")
    reports: list[Progress] = []
    cached = open_engine(home, cache, dtype).denoise(REQUEST, watch=reports.append)
    assert torch.equal(fresh, uncached)
    assert torch.equal(cached, uncached)
    assert [(report.step, report.of) for report in reports if report.stage == "text"] == [(0, 2), (1, 2), (2, 2)]


def test_only_missing_prompts_are_encoded(home: Path, cache: Path, encoded: list[Tensor]) -> None:
    engine = open_engine(home, cache)
    engine.denoise(replace(REQUEST, guidance=1.0))
    engine.denoise(replace(REQUEST, negative_prompt=BLUE))
    engine.denoise(replace(REQUEST, prompt=BLUE, negative_prompt="a red circle"))
    assert engine.spec.tokenizer is not None
    encode = engine.spec.tokenizer.encode
    assert [ids.tolist() for ids in encoded] == [encode("a red circle").ids.tolist(), encode(BLUE).ids.tolist()]


def test_plan_has_no_text_stage_if_all_prompts_are_cached(home: Path, cache: Path) -> None:
    engine = open_engine(home, cache)
    assert [stage.stage for stage in engine.plan(REQUEST).stages] == ["text", "denoise", "decode"]
    engine.denoise(REQUEST)
    assert [stage.stage for stage in engine.plan(REQUEST).stages] == ["denoise", "decode"]


def test_prompts_to_encode_are_planned_whatever_the_request_has_cached(home: Path, cache: Path) -> None:
    engine = open_engine(home, cache)
    engine.denoise(REQUEST)
    with engine.start(REQUEST, stages=("text",), prompts=[BLUE]) as generation:
        assert [stage.stage for stage in generation.plan.stages] == ["text"]
    with engine.start(REQUEST, stages=("text",)) as generation:
        assert generation.plan.stages == ()
        assert len(generation.encode_prompts()) == 2  # from the cache: no module is acquired


def test_cache_has_only_real_tokens_in_the_computed_dtype(home: Path, cache: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        engine = open_engine(home, cache / dtype, dtype)
        engine.denoise(replace(REQUEST, guidance=1.0))
        (path,) = (cache / dtype).iterdir()
        (info,) = Source.open(path).infos.values()
        assert engine.spec.tokenizer is not None
        assert info.shape == (int(engine.spec.tokenizer.encode("a red circle").mask.sum()), TEXT_WIDTH)
        assert info.storage_type == dtype


def test_embeddings_of_padding_are_zero(home: Path) -> None:
    engine = open_engine(home, False)
    with engine.start(replace(REQUEST, guidance=1.0)) as generation, torch.no_grad():
        (encoded,) = generation.prompt_encoder.encode(generation.modules, lambda progress: None)
    assert encoded.mask.any()
    assert encoded.embeddings[encoded.mask].abs().min() > 0
    assert encoded.embeddings[~encoded.mask].abs().max() == 0


# --- the key of a file -----------------------------------------------------------------------------------------------


def prompt_cache_in(text: TextEncoderCheckpoint, folder: Path, **settings: str) -> PromptCache:
    return PromptCache(folder, text, **{"dtype": torch.float32, "device": "cpu", **settings})


@pytest.fixture
def text(home: Path, tmp_path: Path) -> TextEncoderCheckpoint:
    """A copy of the text encoder that may be changed."""
    shutil.copytree(home, tmp_path / "copy")
    return TextEncoderCheckpoint.open(tmp_path / "copy")


def rows_for(text: TextEncoderCheckpoint, prompt: str = "a red circle") -> tuple[PromptTokens, Tensor]:
    tokens = text.load_tokenizer().encode(prompt)
    return tokens, torch.randn(int(tokens.mask.sum()), TEXT_WIDTH, generator=torch.Generator().manual_seed(1))


def test_prompt_dtype_device_and_weight_format_are_in_the_key(text: TextEncoderCheckpoint, cache: Path) -> None:
    tokens, rows = rows_for(text)
    prompt_cache_in(text, cache).store(tokens, rows)
    stored = prompt_cache_in(text, cache).look_up(tokens)
    assert stored is not None
    assert torch.equal(stored, rows)
    assert prompt_cache_in(text, cache).look_up(rows_for(text, BLUE)[0]) is None
    for other in ({"dtype": torch.bfloat16}, {"device": "cuda"}, {"weight_format": "Q8_0"}):
        assert prompt_cache_in(text, cache, **other).look_up(tokens) is None


def test_another_schema_number_is_another_file(
    text: TextEncoderCheckpoint, cache: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    tokens, rows = rows_for(text)
    prompts = prompt_cache_in(text, cache)
    prompts.store(tokens, rows)
    for number in (PROMPT_CACHE_NUMBER + 1, PROMPT_CACHE_NUMBER - 1):
        monkeypatch.setattr(prompt_cache, "PROMPT_CACHE_NUMBER", number)
        assert prompts.look_up(tokens) is None
        prompts.store(tokens, rows)
    assert len(list(cache.iterdir())) == 3
    assert not recwarn.list


def test_changed_files_change_the_key_and_moved_files_do_not(
    text: TextEncoderCheckpoint, cache: Path, tmp_path: Path
) -> None:
    tokens, rows = rows_for(text)
    prompt_cache_in(text, cache).store(tokens, rows)
    shutil.move(tmp_path / "copy", tmp_path / "moved")
    moved = TextEncoderCheckpoint.open(tmp_path / "moved")
    assert prompt_cache_in(moved, cache).look_up(tokens) is not None
    weights = tmp_path / "moved" / "text_encoder" / "model.safetensors"
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert prompt_cache_in(moved, cache).look_up(tokens) is None
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    config = weights.with_name("config.json")
    config.write_text(config.read_text().replace('"layer_norm_epsilon": 1e-06', '"layer_norm_epsilon": 1e-05'))
    assert prompt_cache_in(TextEncoderCheckpoint.open(tmp_path / "moved"), cache).look_up(tokens) is None


# --- damaged files ---------------------------------------------------------------------------------------------------


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
    "another shape": lambda path: write_tensors(path, {"prompt_embeddings": torch.ones(3, 5)}, dtype=torch.float32),
    "integers": lambda path: write_tensors(path, {"prompt_embeddings": torch.ones(4, TEXT_WIDTH)}, dtype=torch.int32),
}


@pytest.mark.parametrize("damage", SPOILED)
def test_damaged_or_foreign_file_is_ignored_and_written_again(
    damage: str, text: TextEncoderCheckpoint, cache: Path, recwarn: pytest.WarningsRecorder
) -> None:
    tokens, rows = rows_for(text)
    prompts = prompt_cache_in(text, cache)
    prompts.store(tokens, rows)
    (path,) = cache.iterdir()
    SPOILED[damage](path)
    assert prompts.look_up(tokens) is None
    prompts.store(tokens, rows)
    stored = prompts.look_up(tokens)
    assert stored is not None
    assert torch.equal(stored, rows)
    assert list(cache.iterdir()) == [path]
    assert not recwarn.list


def test_unwritable_folder_warns_once_and_changes_nothing(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    engine = open_engine(home, tmp_path / "file" / "prompts")
    with pytest.warns(
        KadrWarning, match=r"cannot be stored in .*file.prompts .*KADR_CACHE.*--no-prompt-cache"
    ) as warned:
        latents = [engine.denoise(REQUEST) for _ in range(2)]
    assert len(warned) == 1
    assert torch.equal(*latents)
    assert torch.equal(latents[0], open_engine(home, False).denoise(REQUEST))


# --- size and folder of the cache ------------------------------------------------------------------------------------


def test_least_recently_used_files_go_first_and_no_foreign_one(
    text: TextEncoderCheckpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompt_cache_in(text, cache)
    words = ["a", "red", "circle", "moving", "right", "over", "the", "blue", "sea"]
    prompts_rows = [rows_for(text, word) for word in words]
    foreign_file = cache / "notes.safetensors"
    cache.mkdir(parents=True)
    foreign_file.write_bytes(b"x" * 10_000)
    for age, (tokens, rows) in enumerate(prompts_rows[:5]):
        prompts.store(tokens, rows)
        (newest,) = (path for path in cache.iterdir() if path != foreign_file and path.stat().st_mtime > 1_000_000)
        os.utime(newest, (age, age))
        size = newest.stat().st_size
    assert prompts.look_up(prompts_rows[0][0]) is not None  # which makes it the last one used
    monkeypatch.setattr(prompt_cache, "MAX_CACHE_BYTES", 3 * size + size // 2)
    prompts.store(*prompts_rows[5])
    assert [prompts.look_up(tokens) is not None for tokens, _ in prompts_rows[:6]] == [
        True,
        False,
        False,
        False,
        True,
        True,
    ]
    assert foreign_file.exists()


def test_without_cache_no_prompt_is_written(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KADR_CACHE", str(tmp_path / "cache"))
    open_engine(home, False).denoise(REQUEST)
    assert not (tmp_path / "cache" / "prompts").exists()
    open_engine(home, True).denoise(REQUEST)
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
def test_cache_home_follows_the_platform(
    platform: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KADR_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_home() == Path(expected)


def test_user_without_home_directory_has_no_cache(text: TextEncoderCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("KADR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    prompts = PromptCache.open(True, text, dtype=torch.float32, device="cpu")
    tokens, rows = rows_for(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts.store(tokens, rows)
        assert prompts.look_up(tokens) is None
