"""A name becomes files: of the model, and of the parts it names; what is no model is refused before anything comes."""

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
    """What is asked of the hub; it has everything."""
    asked: list[tuple[str, ...]] = []

    def fetch(repo: str, file: str) -> Path:
        asked.append((repo, file))
        return tmp_path / file

    def fetch_folder(repo: str, patterns: Sequence[str]) -> Path:
        asked.append((repo, *patterns))
        return tmp_path / "text"

    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(hub, "fetch_folder", fetch_folder)
    return asked


def test_a_name_is_its_file_and_its_text_encoder_waits(fetched: list[tuple[str, ...]], tmp_path: Path) -> None:
    found = locate("ltxv-13b-0.9.8-dev")
    assert found.model == tmp_path / "ltxv-13b-0.9.8-dev.safetensors"
    assert (found.release, found.text_encoder, found.vae) == (find_release("ltxv-13b-0.9.8-dev"), None, None)
    assert fetched == [(HUB_FILES, "ltxv-13b-0.9.8-dev.safetensors")]


def test_the_parts_that_wait_come_when_they_are_asked_for(fetched: list[tuple[str, ...]]) -> None:
    released = find_release("ltxv-13b-0.9.7-dev")
    fetch_text_encoder(released)
    fetch_text_encoder(None)
    fetch_upscaler(released)
    text = (TEXT_ENCODER_REPO, "text_encoder/*", "tokenizer/*")
    assert fetched == [text, text, (HUB_FILES, "ltxv-spatial-upscaler-0.9.7.safetensors")]


def test_a_model_of_one_pass_has_no_upscaler() -> None:
    with pytest.raises(CheckpointError, match=r"no upscaler was released for ltxv-2b-0\.9\.5.*--upscaler"):
        fetch_upscaler(find_release("ltxv-2b-0.9.5"))


def test_a_vae_comes_from_the_entry_that_the_model_names_unless_one_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bare = replace(find_release("ltxv-2b-0.9.6-dev"), vae="ltxv-2b-0.9.5")
    monkeypatch.setitem(registry.RELEASES_BY_NAME, bare.name, bare)
    assert locate(bare.name).vae == tmp_path / "ltx-video-2b-v0.9.5.safetensors"
    own = tmp_path / "own.safetensors"
    own.touch()
    assert locate(bare.name, vae=own).vae == own


def test_parts_are_given_by_name_too(tmp_path: Path) -> None:
    # The command line hands over paths.
    found = locate("demo", text_encoder=Path(DEFAULT_TEXT_ENCODER), vae=Path("ltxv-2b-0.9.1"))
    assert found.text_encoder == tmp_path / "text"
    assert found.vae == tmp_path / "ltx-video-2b-v0.9.1.safetensors"


@pytest.mark.parametrize(
    "name, said",
    [
        ("ltxv-spatial-upscaler-0.9.8", "is a spatial upscaler, and no model. Give it as --upscaler"),
        ("ltxv-temporal-upscaler-0.9.7", "is a temporal upscaler, and no model. Give it as --upscaler"),
        (DEFAULT_TEXT_ENCODER, "is a text encoder, and no model. Give it as --text-encoder"),
        (TEXT_ENCODER_GGUF, "is a text encoder, and no model. Give it as --text-encoder"),
    ],
)
def test_a_part_is_not_opened_as_a_model(fetched: list[tuple[str, ...]], name: str, said: str) -> None:
    with pytest.raises(RequestError, match=f"{name} {said}"):
        locate(name)
    assert fetched == []


def test_a_part_of_another_kind_is_refused_with_one_that_fits(fetched: list[tuple[str, ...]]) -> None:
    with pytest.raises(RequestError, match=rf"demo is a model; for the text encoder .* such as {DEFAULT_TEXT_ENCODER}"):
        locate("ltxv-2b-0.9.5", text_encoder="demo")
    with pytest.raises(
        RequestError, match=rf"{DEFAULT_TEXT_ENCODER} is a text encoder; for the VAE .* such as ltxv-2b-0\.9"
    ):
        locate("ltxv-2b-0.9.5", vae=DEFAULT_TEXT_ENCODER)
    assert fetched == []


def test_a_text_encoder_in_a_gguf_file_comes_by_its_name_or_path(
    fetched: list[tuple[str, ...]], tmp_path: Path
) -> None:
    released = find_release(TEXT_ENCODER_GGUF)
    assert locate("demo", text_encoder=TEXT_ENCODER_GGUF).text_encoder == tmp_path / released.file
    assert (
        fetch_text_encoder(replace(find_release("ltxv-2b-0.9.5"), text_encoder=TEXT_ENCODER_GGUF))
        == tmp_path / released.file
    )
    assert fetched == [(released.repo, released.file)] * 2
    own = tmp_path / "own.gguf"
    own.touch()
    assert locate("demo", text_encoder=own).text_encoder == own
    with pytest.raises(CheckpointError, match=r"the text encoder is not at folder/t5-Q8_0\.gguf"):
        locate("demo", text_encoder="folder/t5-Q8_0.gguf")


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_path_that_is_not_there_is_named(part: str) -> None:
    with pytest.raises(CheckpointError, match=r"is not at nowhere/x\. Give an existing path, or a name"):
        locate("demo", **{part: "nowhere/x"})


def test_what_comes_with_kadr_is_here(fetched: list[tuple[str, ...]]) -> None:
    found = locate("demo")
    assert found.model == find_release_on_disk(find_release("demo")) == PACKAGE_ROOT / "assets/demo/demo.safetensors"
    assert found.text_encoder == found.model.parent
    assert fetched == []


def test_whether_an_entry_is_here_is_asked_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "cached_file", lambda repo, file: Path(repo, file))
    monkeypatch.setattr(hub, "cached_folder", lambda repo, patterns: Path(repo, *patterns))
    assert find_release_on_disk(find_release(DEFAULT_TEXT_ENCODER)) == Path(
        TEXT_ENCODER_REPO, "text_encoder/*", "tokenizer/*"
    )
    assert find_release_on_disk(find_release("ltxv-2b-0.9.5")) == Path(HUB_FILES, "ltx-video-2b-v0.9.5.safetensors")
