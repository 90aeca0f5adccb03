"""A text encoder's file takes the nearest tokenizer, and one inside a model's file is the model's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kadr import Engine, Request
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError
from kadr.models.registry import TEXT_ENCODER_REPO, TOKENIZER
from kadr.models.t5 import T5_XXL, T5Encoder
from kadr.spec.locate import TOKENIZER_ROLE
from kadr.spec.tokenizer import add_tokenizer, fetch_tokenizer
from tests.checkpoints import text_encoder_files as files
from tests.fakehub import COMMIT, FakeHub, serve_fake_hub
from tests.tiny_models import MODEL_FILE, build_random, sentencepiece_model, t5_config, write_model

REQUEST = Request(prompt="a red circle", size=(64, 64), frames=9, steps=2)
T5_PREFIX = "text_encoders.t5xxl.transformer."


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def encoder_file(tmp_path: Path) -> Path:
    """A small encoder with the released vocabulary, alone in its folder."""
    module = build_random(lambda: T5Encoder(replace(t5_config(), vocab_size=T5_XXL.vocab_size)))
    return files.write(tmp_path / "comfy" / "text_encoders" / "t5xxl_fp16.safetensors", files.encoder_tensors(module))


@pytest.fixture(autouse=True)
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_fake_hub(monkeypatch, tmp_path / "cache") as server:
        pieces = {"tokenizer/spiece.model": sentencepiece_model(), "tokenizer/tokenizer_config.json": b"{}"}
        server.repos[TEXT_ENCODER_REPO] = {**pieces, "text_encoder/model.safetensors": b"gigabytes"}
        yield server


def open_model_alone(home: Path, folder: Path, text_encoder: Path) -> Engine:
    """Opens the model's file with an encoder from elsewhere."""
    folder.mkdir()
    return Engine.open(
        shutil.copy(home / MODEL_FILE, folder), text_encoder=text_encoder, device="cpu", prompt_cache=False
    )


def test_a_missing_tokenizer_is_fetched_once_and_alone(
    home: Path, tmp_path: Path, encoder_file: Path, remote: FakeHub
) -> None:
    engine = open_model_alone(home, tmp_path / "alone", encoder_file)
    assert ("tokenizer", None) in [(item.role, item.path) for item in engine.spec.components]
    plan = engine.plan(REQUEST)
    assert (TOKENIZER, 792_000) in plan.to_fetch
    assert "tokenizer is not on disk" in str(plan)
    assert (remote.sent_files, engine.spec.tokenizer) == ([], None)
    assert engine.generate(REQUEST).frames.shape == (9, 64, 64, 3)
    assert [name for name, _ in remote.sent_files] == ["tokenizer/spiece.model"]
    known = engine.plan(REQUEST).stage("text").placement
    assert plan.stage("text").placement.seconds > 5 * known.seconds  # until then, that of prompts of 256 tokens
    assert engine.spec.text_encoder_checkpoint.path == encoder_file
    again = open_model_alone(home, tmp_path / "again", encoder_file)
    assert again.generate(REQUEST).frames.shape == (9, 64, 64, 3)
    assert len(remote.sent_files) == 1


def test_the_nearest_tokenizer_is_taken(tmp_path: Path, encoder_file: Path, remote: FakeHub) -> None:
    def tokenizer_file() -> Path | None:
        opened, _ = add_tokenizer(TextEncoderCheckpoint.open(encoder_file))
        if not opened.has_tokenizer:
            return None
        opened.load_tokenizer()
        return opened.tokenizer_path

    assert tokenizer_file() is None
    cached = tmp_path / "cache" / f"models--{TEXT_ENCODER_REPO.replace('/', '--')}"
    snapshot = cached / "snapshots" / COMMIT / "tokenizer" / "spiece.model"
    for path, content in ((cached / "refs" / "main", COMMIT.encode()), (snapshot, sentencepiece_model())):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    assert tokenizer_file() == snapshot
    for beside in (encoder_file.parent / "tokenizer" / "spiece.model", encoder_file.parent / "spiece.model"):
        beside.parent.mkdir(exist_ok=True)
        beside.write_bytes(b"damaged")
        with pytest.raises(CheckpointError, match=f"{beside} .*is not a SentencePiece model"):
            tokenizer_file()
        beside.write_bytes(sentencepiece_model())
        assert tokenizer_file() is None  # the one beside it
    assert remote.sent_files == []


def test_without_a_network_the_error_names_a_place_that_works(encoder_file: Path, remote: FakeHub) -> None:
    remote.repos.clear()
    with pytest.raises(CheckpointError, match=f"Or put spiece.model beside {encoder_file}"):
        fetch_tokenizer(TextEncoderCheckpoint.open(encoder_file))
    (encoder_file.parent / "spiece.model").write_bytes(sentencepiece_model())
    assert fetch_tokenizer(TextEncoderCheckpoint.open(encoder_file)).load_tokenizer().vocab_size == 40


def test_an_encoder_of_another_vocabulary_does_not_get_the_released_one(tmp_path: Path) -> None:
    path = files.write(tmp_path / "t5.safetensors", files.encoder_tensors(build_random(lambda: T5Encoder(t5_config()))))
    opened, component = add_tokenizer(TextEncoderCheckpoint.open(path))
    assert component is None
    with pytest.raises(CheckpointError, match=r"no tokenizer .* Put spiece\.model"):
        opened.load_tokenizer()


def test_the_encoder_in_a_models_file_is_its_own(home: Path, tmp_path: Path) -> None:
    module = TextEncoderCheckpoint.open(home).load(torch.float32)
    metadata = {"config": json.dumps(json.loads(Checkpoint.open(home / MODEL_FILE).sources["vae"].metadata["config"]))}
    encoder = files.with_prefix(T5_PREFIX, files.encoder_tensors(module))
    encoder["text_encoders.t5xxl.logit_scale"] = torch.ones(())
    path = files.write(tmp_path / "all" / "all.safetensors", load_file(home / MODEL_FILE) | encoder, metadata)
    shutil.copytree(home / "tokenizer", path.parent / "tokenizer")
    opened, plain = Checkpoint.open(path), Checkpoint.open(home / MODEL_FILE)
    assert (opened.info, set(opened.sources)) == (plain.info, {"transformer", "vae"})
    assert opened.describe().missing_components == ()
    engines = [Engine.open(item, device="cpu", prompt_cache=False) for item in (path, home / MODEL_FILE)]
    located = {item.role: item for item in engines[0].spec.components}["text encoder"]
    assert (located.name, located.path) == ("in the model", path)
    assert all(item.role != TOKENIZER_ROLE for item in engines[0].spec.components)
    of_whole, of_plain = (engine.denoise(REQUEST) for engine in engines)
    assert torch.allclose(of_whole, of_plain, rtol=1e-4, atol=1e-4)
    outside = Engine.open(path, text_encoder=home, device="cpu")
    assert outside.spec.text_encoder_checkpoint.path == home / "text_encoder"
