"""Official pipeline configs become the recipes of the registry; an error in one names its key and file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kadr.errors import RequestError
from kadr.models import registry
from kadr.models.registry import DISTILLED_SIGMAS, Recipe
from kadr.request.official_config import OfficialConfig
from kadr.sampling.schedules import linear_quadratic_schedule, uniform_schedule
from kadr.sampling.settings import Guidance, Pass
from tests.request.official_configs import OFFICIAL_CONFIGS

DEV_13B, DISTILLED_13B, DEV_2B = "ltxv-13b-0.9.8-dev", "ltxv-13b-0.9.8-distilled", "ltxv-2b-0.9.5"


def write_config(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, "utf-8")
    return path


def read_config(folder: Path, text: str) -> OfficialConfig:
    return OfficialConfig.read(write_config(folder, text))


@pytest.mark.parametrize("name", OFFICIAL_CONFIGS)
def test_official_config_gives_the_recipe_of_the_registry(tmp_path: Path, name: str) -> None:
    config = read_config(tmp_path, OFFICIAL_CONFIGS[name])
    release = registry.find_release(name)
    assert config.recipe == release.recipe
    assert config.checkpoint == release.file
    assert config.precision == ("float8_e4m3fn" if name.endswith("fp8") else "bfloat16")


@pytest.mark.parametrize("name", OFFICIAL_CONFIGS)
def test_components_have_their_names_in_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config, release = read_config(tmp_path, OFFICIAL_CONFIGS[name]), registry.find_release(name)
    upscaler = {"upscaler": [release.upscaler]} if release.upscaler else {}
    assert config.engine_arguments() == {"model": name, "recipe": config.recipe, **upscaler}


def test_every_released_model_has_its_config() -> None:
    assert {model.name for model in registry.MODEL_RELEASES if model.repo == registry.LTX_VIDEO_REPO} == set(
        OFFICIAL_CONFIGS
    )


def test_files_beside_the_config_or_here_precede_registry_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working_folder, config_folder = tmp_path / "work", tmp_path / "config"
    working_folder.mkdir()
    config_folder.mkdir()
    monkeypatch.chdir(working_folder)
    checkpoint, upscaler = (
        config_folder / f"{DEV_13B}.safetensors",
        working_folder / "ltxv-spatial-upscaler-0.9.8.safetensors",
    )
    checkpoint.touch()
    upscaler.touch()
    arguments = read_config(config_folder, OFFICIAL_CONFIGS[DEV_13B]).engine_arguments()
    assert (arguments["model"], arguments["upscaler"]) == (str(checkpoint), [str(upscaler)])


def test_overrides_replace_names_that_need_not_exist(tmp_path: Path) -> None:
    text = OFFICIAL_CONFIGS[DEV_13B].replace(f"{DEV_13B}.safetensors", "gone.safetensors")
    config = read_config(tmp_path, text)
    with pytest.raises(RequestError, match=r"config\.yaml: checkpoint_path is 'gone.safetensors'"):
        config.engine_arguments()
    arguments = config.engine_arguments({"model": "demo", "upscaler": ["mine.safetensors"]})
    assert (arguments["model"], arguments["upscaler"]) == ("demo", ["mine.safetensors"])
    assert "upscaler" not in config.engine_arguments({"model": "demo"}, include_upscaler=False)


def test_keys_left_out_have_the_official_defaults(tmp_path: Path) -> None:
    recipe = read_config(tmp_path, "checkpoint_path: demo").recipe
    guidance = Guidance(cfg_scale=4.5, stg_scale=1.0, rescale=0.7)
    assert recipe == Recipe(first_pass=Pass(steps=20, guidance=guidance), decode_timestep=0.0, decode_noise=0.0)
    assert read_config(tmp_path, "decode_timestep: 0.1").recipe.decode_noise == 0.1


def test_passes_override_the_keys_at_the_top(tmp_path: Path) -> None:
    text = OFFICIAL_CONFIGS[DISTILLED_13B].replace(
        "stochastic_sampling: false", "stochastic_sampling: true\nguidance_scale: 7"
    )
    recipe = read_config(tmp_path, text).recipe
    assert recipe.second_pass is not None
    for settings in (recipe.first_pass, recipe.second_pass):
        assert settings.sampler == "euler_stochastic"
        assert settings.guidance.cfg_scale == 1


def test_null_counts_as_left_out(tmp_path: Path) -> None:
    config = read_config(tmp_path, "skip_block_list:\nspatial_upscaler_model_path: null\nstg_scale: ~\n")
    assert config.upscaler is None
    assert config.recipe.first_pass.guidance.stg_scale == 1.0


def test_single_pass_runs_to_the_end_of_the_schedule(tmp_path: Path) -> None:
    dev, distilled = (read_config(tmp_path, OFFICIAL_CONFIGS[name]).recipe for name in (DEV_13B, DISTILLED_13B))
    assert dev.single_pass == replace(dev.first_pass, skip_final=0)
    assert distilled.single_pass == replace(distilled.first_pass, sigmas=DISTILLED_SIGMAS)


@pytest.mark.parametrize(
    "official_mode, mode", [("stg_as", "attention_skip"), ("Transformer_Block", "transformer_block")]
)
def test_stg_mode_has_short_names(tmp_path: Path, official_mode: str, mode: str) -> None:
    text = OFFICIAL_CONFIGS[DEV_2B].replace('stg_mode: "attention_values"', f"stg_mode: {official_mode}")
    assert read_config(tmp_path, text).recipe.first_pass.guidance.stg_mode == mode


@pytest.mark.parametrize(
    "sampler, sigmas", [("uniform", uniform_schedule(40)), ("linear-quadratic", linear_quadratic_schedule(40))]
)
def test_another_sampler_becomes_explicit_sigmas(tmp_path: Path, sampler: str, sigmas: Any) -> None:
    text = OFFICIAL_CONFIGS["ltxv-2b-0.9"].replace("from_checkpoint", sampler, 1)
    first = read_config(tmp_path, text).recipe.first_pass
    assert first.sigmas == tuple(sigmas.tolist())
    assert first.steps is None


def test_another_sampler_skips_the_steps_of_each_pass(tmp_path: Path) -> None:
    recipe = read_config(tmp_path, OFFICIAL_CONFIGS[DEV_13B].replace("from_checkpoint", "uniform", 1)).recipe
    sigmas = tuple(uniform_schedule(30).tolist())
    assert recipe.second_pass is not None
    assert recipe.single_pass is not None
    assert (recipe.first_pass.sigmas, recipe.second_pass.sigmas, recipe.single_pass.sigmas) == (
        sigmas[:27],
        sigmas[17:],
        sigmas,
    )


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("stg_scale: 1", "stg_sacle: 1", ["stg_sacle", "stg_scale"]),
        ("stg_scale: 1", "42: 1", ["42", "not a key"]),
        ("stg_scale: 1", "stg_scale: strong", ["stg_scale", "'strong'", "number"]),
        ("stg_scale: 1", "stg_scale: true", ["stg_scale", "True"]),
        ("stg_scale: 1", "stg_scale: [1, 2]", ["stg_scale", "guidance_timesteps"]),
        ("guidance_scale: 3", "guidance_scale: 0.5", ["guidance_scale", "0.5", "1 is off"]),
        ("steps: 40", "steps: 4.5", ["num_inference_steps", "4.5", "whole"]),
        ("steps: 40", "steps: 40\nskip_final_inference_steps: -1", ["skip_final_inference_steps", "-1"]),
        ("steps: 40", "steps: 40\ntimesteps: [0.5, 0.9]", ["timesteps", "decrease"]),
        ("steps: 40", "steps: 40\ntimesteps: [0.9, 0.5]\nskip_initial_inference_steps: 1", ["timesteps", "skipped"]),
        ("skip_block_list: [19]", "skip_block_list: [x]", ["skip_block_list", "'x'"]),
        ("stochastic_sampling: false", "stochastic_sampling: 0", ["stochastic_sampling", "true or false"]),
        ('stg_mode: "attention_values"', "stg_mode: residual", ["stg_mode", "changes nothing"]),
        ('stg_mode: "attention_values"', "stg_mode: [a]", ["stg_mode", "text"]),
        ("decode_timestep: 0.05", "decode_timestep: [0.05]", ["decode_timestep", "number"]),
        ("decode_timestep: 0.05", "decode_timestep: 2", ["decode_timestep", "2", "between 0 and 1"]),
        ("pipeline_type: base", "pipeline_type: basic", ["pipeline_type", "multi-scale"]),
        ("pipeline_type: base", "pipeline_type: base\nfirst_pass: {}", ["first_pass", "base"]),
        ("pipeline_type: base", "pipeline_type: multi-scale", ["downscale_factor", "missing"]),
        ('precision: "bfloat16"', "precision: int4", ["precision", "int4", "float8_e4m3fn"]),
        ('sampler: "from_checkpoint"', "sampler: karras", ["sampler", "karras", "uniform"]),
    ],
)
def test_bad_value_is_refused_with_its_key_and_file(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in OFFICIAL_CONFIGS[DEV_2B]
    with pytest.raises(RequestError) as caught:
        read_config(tmp_path, OFFICIAL_CONFIGS[DEV_2B].replace(old, new, 1))
    message = str(caught.value)
    assert [word for word in ("config.yaml", *words) if word not in message] == []


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("  stg_scale: [1]", "  stg_scale: [1, 2]", ["second_pass: ", "2 values for 1"]),
        ("  stg_scale: [1]", "  stg_scales: [1]", ["second_pass: stg_scales", "stg_scale?"]),
        ("  stg_scale: [1]", "  precision: bfloat16", ["second_pass: precision", "top of the file"]),
        ("downscale_factor: 0.6666666", "downscale_factor: 1.5", ["downscale_factor", "1.5"]),
        ("words_threshold: 120", "words_threshold: .nan", ["threshold", "nan", "a number"]),
        ("second_pass:\n  guidance_scale: [1]", "second_pass: twice\nignored:", ["ignored"]),
    ],
)
def test_bad_value_in_a_pass_is_refused_with_the_pass(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in OFFICIAL_CONFIGS[DEV_13B]
    with pytest.raises(RequestError) as caught:
        read_config(tmp_path, OFFICIAL_CONFIGS[DEV_13B].replace(old, new, 1))
    assert [word for word in ("config.yaml", *words) if word not in str(caught.value)] == []


def test_pass_that_is_not_a_mapping_is_refused(tmp_path: Path) -> None:
    text = "pipeline_type: multi-scale\ndownscale_factor: 0.5\nfirst_pass: 1\nsecond_pass: 2\n"
    with pytest.raises(RequestError, match="first_pass is 1"):
        read_config(tmp_path, text)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "a: [1", "a: !!python/object:os.system {}", "\0"])
def test_file_that_is_not_a_config_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(RequestError, match=r"config\.yaml"):
        read_config(tmp_path, text)


def test_unreadable_file_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(RequestError, match=path.name):
            OfficialConfig.read(path)
    large = tmp_path / "model.safetensors"
    with large.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(RequestError, match="too many"):
        OfficialConfig.read(large)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RequestError, match="not text"):
        OfficialConfig.read(binary)
