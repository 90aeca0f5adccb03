"""A release is told by facts of the weights, then by names; what neither tells is open, and is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from kadr import Engine, KadrWarning, Request
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.detect.releases import narrow_by_name, path_names
from kadr.errors import CheckpointError, RequestError
from kadr.models.registry import MODEL_RELEASES, Recipe, Release, find_release
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, TransformerConfig
from kadr.models.vae.config import VAE_0_9_5
from kadr.pipeline.dry_run import DryRun
from tests.checkpoints.checkpoint_files import official_metadata, single_file_shapes, write_sparse
from tests.checkpoints.detect.test_diffusers_folder import (
    DYNAMIC_SHIFTING,
    NO_SHIFTING,
    change_json,
    write_json,
    write_transformer_folder,
)
from tests.oracles import VAES, diffusers_vae_on_meta
from tests.tiny_models import MODEL_FILE, write_model

HOSTED = [release for release in MODEL_RELEASES if release.repo is not None]
SAME_13B = ["ltxv-13b-0.9.7-dev", "ltxv-13b-0.9.7-distilled", "ltxv-13b-0.9.8-dev", "ltxv-13b-0.9.8-distilled"]
SAME_2B = ["ltxv-2b-0.9.5", "ltxv-2b-0.9.6-dev", "ltxv-2b-0.9.6-distilled", "ltxv-2b-0.9.8-distilled"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_released_folder(folder: Path, config: TransformerConfig = TRANSFORMER_13B, family: str = "0.9.5") -> Path:
    """Writes configs and headers of a released diffusers folder; its tensors are sparse zeros."""
    write_transformer_folder(folder / "transformer", config)
    vae = diffusers_vae_on_meta(VAES[family], family)
    vae.save_config(folder / "vae")
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    write_sparse(folder / "vae" / "diffusion_pytorch_model.safetensors", shapes)
    shifting = NO_SHIFTING if family == "0.9.5" else DYNAMIC_SHIFTING
    write_json(folder / "scheduler" / "scheduler_config.json", shifting)
    return folder


def release_name(path: Path) -> str | None:
    release = Checkpoint.open(path).info.release
    return release and release.name


def candidates(path: Path) -> list[str]:
    info = Checkpoint.open(path).info
    assert info.release is None
    return [release.name for release in info.release_candidates]


# Names


@pytest.mark.parametrize("release", HOSTED, ids=lambda release: release.name)
def test_a_file_stem_and_a_name_tell_their_release_alone(release: Release) -> None:
    for name in (release.file_stem, release.file_stem.upper(), release.name):
        assert narrow_by_name(HOSTED, name) == [release]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LTX-Video-0.9.8-13B-distilled", ["ltxv-13b-0.9.8-distilled", "ltxv-13b-0.9.8-distilled-fp8"]),
        ("LTX-Video-0.9.1", ["ltxv-2b-0.9.1"]),
        ("LTX-Video-0.9.5", ["ltxv-2b-0.9.5"]),
        ("ltxv_v098_2b_distilled", ["ltxv-2b-0.9.8-distilled", "ltxv-2b-0.9.8-distilled-fp8"]),
        ("my-0.9.6-distilled-2025-09-12", ["ltxv-2b-0.9.6-distilled"]),
        ("ltx-2b-dev", ["ltxv-2b-0.9.6-dev"]),
        ("13b-0.9.1", []),
    ],
)
def test_version_size_and_kind_in_a_name_narrow_the_releases(name: str, expected: list[str]) -> None:
    assert [release.name for release in narrow_by_name(HOSTED, name) or ()] == expected


@pytest.mark.parametrize(
    "name", ["", "LTX-Video", "model", "device", "v10.9.8", "1.0.9.8", "12b", "a098bc", "2024-09-8"]
)
def test_a_name_without_version_size_and_kind_says_nothing(name: str) -> None:
    assert narrow_by_name(HOSTED, name) is None


def test_the_repository_in_the_hubs_cache_is_a_name() -> None:
    snapshot = Path("/cache/models--Lightricks--LTX-Video-0.9.8-13B-distilled/snapshots") / COMMIT
    repository = "LTX-Video-0.9.8-13B-distilled"
    assert path_names(snapshot) == [repository]
    assert path_names(snapshot / "x.safetensors") == ["x", repository]
    assert path_names(snapshot / "transformer", is_component=True) == [repository]


def test_a_parent_folder_is_a_name_only_if_it_names_the_family() -> None:
    assert path_names(Path("/home/dev/model.safetensors")) == ["model"]
    assert path_names(Path("/home/ltxv-2b-0.9.5/model.safetensors")) == ["model", "ltxv-2b-0.9.5"]


# Diffusers folders


def test_a_folder_of_a_distilled_model_gets_its_recipe(tmp_path: Path) -> None:
    folder = write_released_folder(tmp_path / "LTX-Video-0.9.8-13B-distilled")
    assert release_name(folder) == release_name(folder / "transformer") == "ltxv-13b-0.9.8-distilled"
    engine = Engine.open(folder, device="cpu")
    assert engine.spec.recipe == find_release("ltxv-13b-0.9.8-distilled").recipe
    assert len(engine.resolve(Request(prompt="a fox")).passes) == 2


def test_a_folder_in_the_hubs_cache_is_told_by_its_repository(tmp_path: Path) -> None:
    repository = tmp_path / "models--Lightricks--LTX-Video-0.9.8-13B-distilled"
    assert release_name(write_released_folder(repository / "snapshots" / COMMIT)) == "ltxv-13b-0.9.8-distilled"


def test_model_index_and_config_tell_where_a_folder_came_from(tmp_path: Path) -> None:
    folder = write_released_folder(tmp_path / "mine")
    change_json(folder / "transformer" / "config.json", _name_or_path="/data/LTX-Video-0.9.7-distilled/transformer")
    assert release_name(folder) == "ltxv-13b-0.9.7-distilled"
    write_json(folder / "model_index.json", {"_name_or_path": "Lightricks/LTX-Video-0.9.7-dev"})
    assert release_name(folder) == "ltxv-13b-0.9.7-dev"
    named = folder.rename(tmp_path / "LTX-Video-0.9.8-13B-distilled")
    assert release_name(named) == "ltxv-13b-0.9.8-distilled"


@pytest.mark.parametrize("family", ["0.9", "0.9.1"])
def test_an_early_vae_tells_the_release_by_itself(tmp_path: Path, family: str) -> None:
    folder = write_released_folder(tmp_path / "model", TRANSFORMER_2B, family)
    assert release_name(folder) == f"ltxv-2b-{family}"


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("model", TRANSFORMER_13B, SAME_13B),
        ("model", TRANSFORMER_2B, SAME_2B),
        ("ltx-13b-distilled", TRANSFORMER_13B, ["ltxv-13b-0.9.7-distilled", "ltxv-13b-0.9.8-distilled"]),
        ("ltx-0.9.7", TRANSFORMER_13B, ["ltxv-13b-0.9.7-dev", "ltxv-13b-0.9.7-distilled"]),
        ("ltxv-13b-0.9.8-dev", TRANSFORMER_2B, SAME_2B),
    ],
)
def test_what_no_name_tells_is_asked_for_and_the_answer_works(
    tmp_path: Path, name: str, config: TransformerConfig, expected: list[str]
) -> None:
    folder = write_released_folder(tmp_path / name, config)
    assert candidates(folder) == expected
    with pytest.raises(CheckpointError, match=f"other settings: {', '.join(expected)}. .* release=NAME"):
        Engine.open(folder, device="cpu")
    for answer in expected:
        spec = Engine.open(folder, release=answer, device="cpu").spec
        assert (spec.release, spec.recipe) == (find_release(answer), find_release(answer).recipe)


def test_a_given_recipe_needs_no_release(tmp_path: Path) -> None:
    folder = write_released_folder(tmp_path / "model")
    assert Engine.open(folder, recipe=Recipe(fps=12.0), device="cpu").spec.recipe.fps == 12.0


@pytest.mark.parametrize(
    ("shifting", "version", "causal"),
    [(NO_SHIFTING, "0.9.5 or later", True), (DYNAMIC_SHIFTING, "0.9 or 0.9.1", False)],
)
def test_the_scheduler_tells_the_positions_of_a_transformer_alone(
    tmp_path: Path, shifting: dict[str, object], version: str, causal: bool
) -> None:
    write_transformer_folder(tmp_path / "model" / "transformer", TRANSFORMER_2B)
    write_json(tmp_path / "model" / "scheduler" / "scheduler_config.json", shifting)
    info = Checkpoint.open(tmp_path / "model").info
    assert info.transformer is not None
    assert (info.version, info.transformer.causal_temporal_positioning) == (version, causal)


def test_a_name_that_the_sizes_contradict_is_a_warning(tmp_path: Path) -> None:
    home = write_model(tmp_path / "home")
    path = (home / MODEL_FILE).rename(home / "ltxv-2b-0.9.6-distilled.safetensors")
    with pytest.warns(KadrWarning, match=r"no release of that name has 2 layers 64 wide.*steps"):
        assert Engine.open(path, device="cpu").spec.recipe == Recipe()


# Single files


def write_file(path: Path) -> Path:
    metadata = official_metadata(TRANSFORMER_13B, VAE_0_9_5)
    return write_sparse(path, single_file_shapes(TRANSFORMER_13B, VAE_0_9_5), metadata=metadata)


def test_a_renamed_single_file_is_asked_for_too(tmp_path: Path) -> None:
    path = write_file(tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointError, match=f"{', '.join(SAME_13B)}.*release=NAME"):
        Engine.open(path, device="cpu")
    spec = Engine.open(path, release="ltxv-13b-0.9.7-distilled", device="cpu").spec
    assert spec.recipe == find_release("ltxv-13b-0.9.7-distilled").recipe


def test_a_second_model_of_unknown_release_is_a_warning_that_helps(tmp_path: Path) -> None:
    first, second = write_file(tmp_path / "ltxv-13b-0.9.8-dev.safetensors"), write_file(tmp_path / "mine.safetensors")
    with pytest.warns(KadrWarning, match=f"Put one of these names into its name.*: {', '.join(SAME_13B)}"):
        recipe = Engine.open(first, second_model=second, device="cpu").spec.recipe
    assert recipe == find_release("ltxv-13b-0.9.8-dev").recipe
    renamed = second.rename(tmp_path / "mine-ltxv-13b-0.9.8-distilled.safetensors")
    recipe = Engine.open(first, second_model=renamed, device="cpu").spec.recipe
    assert recipe.second_pass == find_release("ltxv-13b-0.9.8-distilled").recipe.second_pass


def test_a_release_of_other_tensors_is_refused_with_those_that_fit(tmp_path: Path) -> None:
    path = write_file(tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointError, match=r"is not ltxv-2b-0\.9\.5: layers: 48, not 28") as error:
        Engine.open(path, release="ltxv-2b-0.9.5", device="cpu")
    assert all(name in str(error.value) for name in SAME_13B)


@pytest.mark.parametrize("name", ["ltxv", "t5-v1.1-xxl", "ltxv-spatial-upscaler-0.9.8"])
def test_a_release_must_be_a_models_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match=rf"release is '{name}'.*one of demo, "):
        Engine.open("demo", release=name)


def test_a_release_beside_another_releases_name_is_refused() -> None:
    with pytest.raises(RequestError, match=r"demo is a release itself.*leave it out"):
        Engine.open("demo", release="demo-distilled")
    assert Engine.open("demo", release="demo").spec.release is find_release("demo")


# Where it is shown


def test_dry_run_and_plan_show_the_release(tmp_path: Path) -> None:
    engine = Engine.open(write_file(tmp_path / "mine.safetensors"), release="ltxv-13b-0.9.8-dev", device="cpu")
    request = Request(prompt="a fox", size=(64, 64), frames=9)
    dry_run: DryRun = engine.dry_run(request)
    assert dry_run.to_json()["components"][0]["release"] == "ltxv-13b-0.9.8-dev"


def test_the_plan_of_a_tiny_copy_states_its_release() -> None:
    engine = Engine.open("demo", device="cpu")
    plan = engine.plan(Request(prompt="a red circle", frames=9))
    assert (plan.to_json()["release"], "release: demo" in str(plan).splitlines()) == ("demo", True)
