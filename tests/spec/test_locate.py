"""A name is resolved to a component, on disk or not; other kinds are refused, and nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kadr import Engine, Request
from kadr.checkpoints import hub
from kadr.errors import CheckpointError, RequestError
from kadr.models import registry
from kadr.models.registry import DEFAULT_TEXT_ENCODER, LORA, TEXT_ENCODER_GGUF, TEXT_ENCODER_REPO, find_release
from kadr.spec.locate import (
    MODEL,
    PACKAGE_ROOT,
    TEXT_ENCODER_ROLE,
    UPSCALER_ROLE,
    VAE,
    fetch_release,
    find_release_on_disk,
    locate,
    locate_text_encoder,
)

HUB_FILES = "Lightricks/LTX-Video"


@pytest.fixture(autouse=True)
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """Requests to a hub that has every file; none of them is on disk."""
    requests: list[tuple[str, ...]] = []

    def fetch(repo: str, file: str) -> Path:
        requests.append((repo, file))
        return tmp_path / file

    def fetch_folder(repo: str, patterns: Sequence[str]) -> Path:
        requests.append((repo, *patterns))
        return tmp_path / "text"

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(hub, "fetch_folder", fetch_folder)
    return requests


def test_named_model_is_located_without_being_fetched(fetched: list[tuple[str, ...]]) -> None:
    component = locate("ltxv-13b-0.9.8-dev", MODEL)
    assert (component.path, component.release) == (None, find_release("ltxv-13b-0.9.8-dev"))
    assert component.bytes_to_fetch == 28_579_000_000
    assert fetched == []


def test_text_encoder_is_the_named_the_adjacent_or_the_registry_one(tmp_path: Path) -> None:
    absent, release = locate("ltxv-2b-0.9.5", MODEL), find_release("ltxv-2b-0.9.5")
    assert locate_text_encoder(None, absent, release).name == DEFAULT_TEXT_ENCODER
    assert locate_text_encoder(None, absent, None).name == DEFAULT_TEXT_ENCODER
    assert locate_text_encoder(TEXT_ENCODER_GGUF, absent, release).name == TEXT_ENCODER_GGUF
    with_gguf = replace(release, text_encoder=TEXT_ENCODER_GGUF)
    assert locate_text_encoder(None, absent, with_gguf).name == TEXT_ENCODER_GGUF
    beside = locate_text_encoder(None, locate("demo", MODEL), find_release("demo"))
    assert beside.path == PACKAGE_ROOT / "assets/demo"
    given_encoder = tmp_path / "own.gguf"
    given_encoder.touch()
    assert locate_text_encoder(given_encoder, absent, release).path == given_encoder


def test_vae_comes_from_the_release_that_the_model_names(monkeypatch: pytest.MonkeyPatch) -> None:
    release = replace(find_release("ltxv-2b-0.9.6-dev"), vae="ltxv-2b-0.9.1")
    monkeypatch.setitem(registry.RELEASES_BY_NAME, release.name, release)
    spec = Engine.open(release.name, device="cpu").spec
    assert [item.name for item in spec.components if item.role == VAE] == ["ltxv-2b-0.9.1"]
    assert spec.vae_checkpoint.info.vae_family == "0.9.1"


@pytest.mark.parametrize(
    "name, role", [(DEFAULT_TEXT_ENCODER, TEXT_ENCODER_ROLE), ("ltxv-2b-0.9.1", VAE), ("demo-lora-teal", LORA)]
)
def test_registry_name_may_come_as_a_path(name: str, role: str) -> None:
    # The command line passes paths.
    assert locate(Path(name), role).release == find_release(name)


@pytest.mark.parametrize(
    "name, error",
    [
        ("ltxv-spatial-upscaler-0.9.8", "is a spatial upscaler, not a model. Give it as upscaler"),
        ("ltxv-temporal-upscaler-0.9.7", "is a temporal upscaler, not a model. Give it as upscaler"),
        (DEFAULT_TEXT_ENCODER, "is a text encoder, not a model. Give it as text_encoder"),
        (TEXT_ENCODER_GGUF, "is a text encoder, not a model. Give it as text_encoder"),
        ("demo-lora-teal", "is a LoRA, not a model. Give it as loras"),
    ],
)
def test_a_component_is_refused_as_a_model(name: str, error: str) -> None:
    with pytest.raises(RequestError, match=f"{name} {error}"):
        locate(name, MODEL)


@pytest.mark.parametrize(
    "name, role, message",
    [
        ("demo", TEXT_ENCODER_ROLE, rf"demo is a model; for the text encoder .* such as {DEFAULT_TEXT_ENCODER}"),
        (DEFAULT_TEXT_ENCODER, VAE, rf"{DEFAULT_TEXT_ENCODER} is a text encoder; for the VAE .* such as ltxv-2b-0\.9"),
        ("demo", UPSCALER_ROLE, r"demo is a model; for the upscaler give a path, or a name such as ltxv-spatial"),
    ],
)
def test_a_component_of_another_kind_is_refused_with_an_example(name: str, role: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        locate(name, role)


@pytest.mark.parametrize("role", [MODEL, TEXT_ENCODER_ROLE, VAE, UPSCALER_ROLE, LORA])
def test_an_error_names_a_missing_path(role: str) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/x does not exist\. Give an existing path, or a name"):
        locate("nowhere/x", role)


def test_opening_resolving_and_planning_fetch_nothing(fetched: list[tuple[str, ...]]) -> None:
    engine, request = Engine.open("ltxv-2b-0.9.8-distilled", device="cpu"), Request(prompt="a fox")
    engine.plan(engine.resolve(request))
    engine.dry_run(request)
    assert fetched == []


def test_prepare_fetches_the_text_encoder_last(fetched: list[tuple[str, ...]]) -> None:
    engine = Engine.open("ltxv-2b-0.9.8-distilled", device="cpu")
    with pytest.raises(CheckpointError):  # this hub's files are empty names
        engine.prepare(Request(prompt="a fox"))
    model, upscaler = "ltxv-2b-0.9.8-distilled.safetensors", "ltxv-spatial-upscaler-0.9.8.safetensors"
    text_encoder = (TEXT_ENCODER_REPO, "text_encoder/*", "tokenizer/*")
    # The fetched files are not where the cache has them, so they stay absent.
    assert fetched == [(HUB_FILES, model), (HUB_FILES, upscaler), text_encoder]


def test_bundled_models_are_on_disk(fetched: list[tuple[str, ...]]) -> None:
    component = locate("demo", MODEL)
    assert component.path == find_release_on_disk(find_release("demo")) == PACKAGE_ROOT / "assets/demo/demo.safetensors"
    assert component.bytes_to_fetch == 0
    assert fetch_release(find_release("demo")) == component.path
    assert fetched == []


def test_a_release_is_looked_up_as_file_or_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "cached_file", lambda repo, file: Path(repo, file))
    monkeypatch.setattr(hub, "cached_folder", lambda repo, patterns: Path(repo, *patterns))
    assert find_release_on_disk(find_release(DEFAULT_TEXT_ENCODER)) == Path(
        TEXT_ENCODER_REPO, "text_encoder/*", "tokenizer/*"
    )
    assert find_release_on_disk(find_release("ltxv-2b-0.9.5")) == Path(HUB_FILES, "ltx-video-2b-v0.9.5.safetensors")
