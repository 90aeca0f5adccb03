"""A name is resolved to the files of a model and its components; other kinds are refused before fetching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kadr.checkpoints import hub
from kadr.errors import CheckpointError, RequestError
from kadr.models import registry
from kadr.models.registry import DEFAULT_TEXT_ENCODER, TEXT_ENCODER_GGUF, TEXT_ENCODER_REPO, find_release
from kadr.spec.locate import PACKAGE_ROOT, fetch_text_encoder, fetch_upscaler, find_release_on_disk, locate

HUB_FILES = "Lightricks/LTX-Video"


@pytest.fixture(autouse=True)
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """Requests to a hub that has every file."""
    requests: list[tuple[str, ...]] = []

    def fetch(repo: str, file: str) -> Path:
        requests.append((repo, file))
        return tmp_path / file

    def fetch_folder(repo: str, patterns: Sequence[str]) -> Path:
        requests.append((repo, *patterns))
        return tmp_path / "text"

    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(hub, "fetch_folder", fetch_folder)
    return requests


def test_a_name_gives_its_file_and_fetches_no_text_encoder(fetched: list[tuple[str, ...]], tmp_path: Path) -> None:
    files = locate("ltxv-13b-0.9.8-dev")
    assert files.model == tmp_path / "ltxv-13b-0.9.8-dev.safetensors"
    assert (files.release, files.text_encoder, files.vae) == (find_release("ltxv-13b-0.9.8-dev"), None, None)
    assert fetched == [(HUB_FILES, "ltxv-13b-0.9.8-dev.safetensors")]


def test_text_encoder_and_upscaler_are_fetched_on_demand(fetched: list[tuple[str, ...]]) -> None:
    release = find_release("ltxv-13b-0.9.7-dev")
    fetch_text_encoder(release)
    fetch_text_encoder(None)
    fetch_upscaler(release)
    text = (TEXT_ENCODER_REPO, "text_encoder/*", "tokenizer/*")
    assert fetched == [text, text, (HUB_FILES, "ltxv-spatial-upscaler-0.9.7.safetensors")]


def test_a_model_of_one_pass_has_no_upscaler() -> None:
    with pytest.raises(CheckpointError, match=r"no upscaler was released for ltxv-2b-0\.9\.5.*--upscaler"):
        fetch_upscaler(find_release("ltxv-2b-0.9.5"))


def test_the_vae_comes_from_the_release_that_the_model_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release = replace(find_release("ltxv-2b-0.9.6-dev"), vae="ltxv-2b-0.9.5")
    monkeypatch.setitem(registry.RELEASES_BY_NAME, release.name, release)
    assert locate(release.name).vae == tmp_path / "ltx-video-2b-v0.9.5.safetensors"
    given_vae = tmp_path / "own.safetensors"
    given_vae.touch()
    assert locate(release.name, vae=given_vae).vae == given_vae


def test_text_encoder_and_vae_may_be_registry_names(tmp_path: Path) -> None:
    # The command line passes paths.
    files = locate("demo", text_encoder=Path(DEFAULT_TEXT_ENCODER), vae=Path("ltxv-2b-0.9.1"))
    assert files.text_encoder == tmp_path / "text"
    assert files.vae == tmp_path / "ltx-video-2b-v0.9.1.safetensors"


@pytest.mark.parametrize(
    "name, error",
    [
        ("ltxv-spatial-upscaler-0.9.8", "is a spatial upscaler, not a model. Give it as --upscaler"),
        ("ltxv-temporal-upscaler-0.9.7", "is a temporal upscaler, not a model. Give it as --upscaler"),
        (DEFAULT_TEXT_ENCODER, "is a text encoder, not a model. Give it as --text-encoder"),
        (TEXT_ENCODER_GGUF, "is a text encoder, not a model. Give it as --text-encoder"),
    ],
)
def test_a_component_is_refused_as_a_model(fetched: list[tuple[str, ...]], name: str, error: str) -> None:
    with pytest.raises(RequestError, match=f"{name} {error}"):
        locate(name)
    assert fetched == []


def test_a_component_of_another_kind_is_refused_with_an_example(fetched: list[tuple[str, ...]]) -> None:
    with pytest.raises(RequestError, match=rf"demo is a model; for the text encoder .* such as {DEFAULT_TEXT_ENCODER}"):
        locate("ltxv-2b-0.9.5", text_encoder="demo")
    with pytest.raises(
        RequestError, match=rf"{DEFAULT_TEXT_ENCODER} is a text encoder; for the VAE .* such as ltxv-2b-0\.9"
    ):
        locate("ltxv-2b-0.9.5", vae=DEFAULT_TEXT_ENCODER)
    assert fetched == []


def test_a_gguf_text_encoder_is_given_by_name_or_path(fetched: list[tuple[str, ...]], tmp_path: Path) -> None:
    release = find_release(TEXT_ENCODER_GGUF)
    assert locate("demo", text_encoder=TEXT_ENCODER_GGUF).text_encoder == tmp_path / release.file
    model = replace(find_release("ltxv-2b-0.9.5"), text_encoder=TEXT_ENCODER_GGUF)
    assert fetch_text_encoder(model) == tmp_path / release.file
    assert fetched == [(release.repo, release.file)] * 2
    given_encoder = tmp_path / "own.gguf"
    given_encoder.touch()
    assert locate("demo", text_encoder=given_encoder).text_encoder == given_encoder
    with pytest.raises(CheckpointError, match=r"the text encoder folder/t5-Q8_0\.gguf does not exist"):
        locate("demo", text_encoder="folder/t5-Q8_0.gguf")


@pytest.mark.parametrize("component", ["text_encoder", "vae"])
def test_an_error_names_a_missing_path(component: str) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/x does not exist\. Give an existing path, or a name"):
        locate("demo", **{component: "nowhere/x"})


def test_bundled_models_are_on_disk(fetched: list[tuple[str, ...]]) -> None:
    files = locate("demo")
    assert files.model == find_release_on_disk(find_release("demo")) == PACKAGE_ROOT / "assets/demo/demo.safetensors"
    assert files.text_encoder == files.model.parent
    assert fetched == []


def test_a_release_is_looked_up_as_file_or_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "cached_file", lambda repo, file: Path(repo, file))
    monkeypatch.setattr(hub, "cached_folder", lambda repo, patterns: Path(repo, *patterns))
    assert find_release_on_disk(find_release(DEFAULT_TEXT_ENCODER)) == Path(
        TEXT_ENCODER_REPO, "text_encoder/*", "tokenizer/*"
    )
    assert find_release_on_disk(find_release("ltxv-2b-0.9.5")) == Path(HUB_FILES, "ltx-video-2b-v0.9.5.safetensors")
