"""The registry: names that resolve, sizes that follow from the shapes, recipes of the official configs."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from kadr.errors import RequestError
from kadr.models.registry import (
    DEFAULT_NEGATIVE_PROMPT,
    DEFAULT_TEXT_ENCODER,
    DISTILLED_SIGMAS,
    LTX_VIDEO_REPO,
    MODEL_RELEASES,
    RELEASES,
    RELEASES_BY_NAME,
    TEXT_ENCODER_GGUF,
    UPSCALER,
    Recipe,
    Release,
    find_release,
    required_releases,
)
from kadr.models.t5 import T5_XXL, T5Encoder
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, Transformer
from kadr.models.vae import VAE
from kadr.models.vae.config import VAE_0_9, VAE_0_9_1, VAE_0_9_5
from kadr.sampling.schedules import Schedule, explicit_sigmas
from kadr.sampling.settings import Guidance, Pass
from kadr.shapes import Size, snap_frames

HOSTED = [release for release in MODEL_RELEASES if release.repo]
FP8 = [release for release in HOSTED if release.name.endswith("-fp8")]
COMPONENTS = [release for release in RELEASES if release.kind != "model" and release.repo]
BLOCK_MATRIX = re.compile(r"blocks\.\d+\.(self_attention|cross_attention|feed_forward)\.(q|k|v|out|up|down)\.weight")

# Settings of each pass in the official configs, configs/*.yaml of ltx_video.
PLAIN_2B = ({"steps": 40, "guidance": {"cfg_scale": 3, "stg_scale": 1, "rescale": 0.7, "skip_blocks": (19,)}},)
STOCHASTIC_2B = (
    {"steps": 8, "sampler": "euler_stochastic", "guidance": {"cfg_scale": 1, "stg_scale": 0, "rescale": 1}},
)
NO_GUIDANCE = {"cfg_scale": 1, "stg_scale": 0, "rescale": 1, "skip_blocks": (42,)}
DISTILLED = (
    {"sigmas": (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725), "guidance": NO_GUIDANCE},
    {"sigmas": (0.9094, 0.725, 0.4219), "guidance": NO_GUIDANCE},
)
DISTILLED_13B = (DISTILLED[0], {**DISTILLED[1], "tone_map": 0.6})
DEV_13B = (
    {
        "steps": 30,
        "skip_final": 3,
        "guidance": {
            "sigmas": (1.0, 0.996, 0.9933, 0.985, 0.9767, 0.9008, 0.6180),
            "cfg_scale": (1, 1, 6, 8, 6, 1, 1),
            "stg_scale": (0, 0, 4, 4, 4, 2, 1),
            "rescale": (1, 1, 0.5, 0.5, 1, 1, 1),
            "skip_blocks": ((), (11, 25, 35, 39), (22, 35, 39), (28,), (28,), (28,), (28,)),
            "cfg_star": True,
        },
    },
    {
        "steps": 30,
        "skip_initial": 17,
        "guidance": {
            "sigmas": (1.0,),
            "cfg_scale": (1,),
            "stg_scale": (1,),
            "rescale": (1,),
            "skip_blocks": (27,),
            "cfg_star": True,
        },
    },
)
# name: file without its suffix, blocks, VAE, upscaler, passes
OFFICIAL: dict[str, tuple[str, int, str, str | None, tuple[dict[str, Any], ...]]] = {
    "ltxv-2b-0.9": ("ltx-video-2b-v0.9", 28, "0.9", None, PLAIN_2B),
    "ltxv-2b-0.9.1": ("ltx-video-2b-v0.9.1", 28, "0.9.1", None, PLAIN_2B),
    "ltxv-2b-0.9.5": ("ltx-video-2b-v0.9.5", 28, "0.9.5", None, PLAIN_2B),
    "ltxv-2b-0.9.6-dev": ("ltxv-2b-0.9.6-dev-04-25", 28, "0.9.5", None, PLAIN_2B),
    "ltxv-2b-0.9.6-distilled": ("ltxv-2b-0.9.6-distilled-04-25", 28, "0.9.5", None, STOCHASTIC_2B),
    "ltxv-2b-0.9.8-distilled": ("ltxv-2b-0.9.8-distilled", 28, "0.9.5", "0.9.8", DISTILLED),
    "ltxv-2b-0.9.8-distilled-fp8": ("ltxv-2b-0.9.8-distilled-fp8", 28, "0.9.5", "0.9.8", DISTILLED),
    "ltxv-13b-0.9.7-dev": ("ltxv-13b-0.9.7-dev", 48, "0.9.5", "0.9.7", DEV_13B),
    "ltxv-13b-0.9.7-dev-fp8": ("ltxv-13b-0.9.7-dev-fp8", 48, "0.9.5", "0.9.7", DEV_13B),
    "ltxv-13b-0.9.7-distilled": ("ltxv-13b-0.9.7-distilled", 48, "0.9.5", "0.9.7", DISTILLED),
    "ltxv-13b-0.9.7-distilled-fp8": ("ltxv-13b-0.9.7-distilled-fp8", 48, "0.9.5", "0.9.7", DISTILLED),
    "ltxv-13b-0.9.8-dev": ("ltxv-13b-0.9.8-dev", 48, "0.9.5", "0.9.8", DEV_13B),
    "ltxv-13b-0.9.8-dev-fp8": ("ltxv-13b-0.9.8-dev-fp8", 48, "0.9.5", "0.9.8", DEV_13B),
    "ltxv-13b-0.9.8-distilled": ("ltxv-13b-0.9.8-distilled", 48, "0.9.5", "0.9.8", DISTILLED_13B),
    "ltxv-13b-0.9.8-distilled-fp8": ("ltxv-13b-0.9.8-distilled-fp8", 48, "0.9.5", "0.9.8", DISTILLED_13B),
}
IC_LORA_REPO = "Lightricks/LTX-Video-ICLoRA"
# name: kind, repository, file
OFFICIAL_COMPONENTS = {
    "ltxv-spatial-upscaler-0.9.7": ("spatial upscaler", LTX_VIDEO_REPO, "ltxv-spatial-upscaler-0.9.7.safetensors"),
    "ltxv-spatial-upscaler-0.9.8": ("spatial upscaler", LTX_VIDEO_REPO, "ltxv-spatial-upscaler-0.9.8.safetensors"),
    "ltxv-temporal-upscaler-0.9.7": ("temporal upscaler", LTX_VIDEO_REPO, "ltxv-temporal-upscaler-0.9.7.safetensors"),
    "ltxv-temporal-upscaler-0.9.8": ("temporal upscaler", LTX_VIDEO_REPO, "ltxv-temporal-upscaler-0.9.8.safetensors"),
    "ltxv-13b-0.9.7-distilled-lora": ("LoRA", LTX_VIDEO_REPO, "ltxv-13b-0.9.7-distilled-lora128.safetensors"),
    "ltxv-13b-0.9.7-ic-lora-canny": (
        "LoRA",
        f"{IC_LORA_REPO}-canny-13b-0.9.7",
        "ltxv-097-ic-lora-canny-control-comfyui.safetensors",
    ),
    "ltxv-13b-0.9.7-ic-lora-depth": (
        "LoRA",
        f"{IC_LORA_REPO}-depth-13b-0.9.7",
        "ltxv-097-ic-lora-depth-control-comfyui.safetensors",
    ),
    "ltxv-13b-0.9.7-ic-lora-pose": (
        "LoRA",
        f"{IC_LORA_REPO}-pose-13b-0.9.7",
        "ltxv-097-ic-lora-pose-control-comfyui.safetensors",
    ),
    "ltxv-13b-0.9.8-ic-lora-detailer": (
        "LoRA",
        f"{IC_LORA_REPO}-detailer-13b-0.9.8",
        "ltxv-098-ic-lora-detailer-comfyui.safetensors",
    ),
    "t5-v1.1-xxl": ("text encoder", "PixArt-alpha/PixArt-XL-2-1024-MS", "text_encoder/*"),
    "t5-v1.1-xxl-q8-gguf": ("text encoder", "city96/t5-v1_1-xxl-encoder-gguf", "t5-v1_1-xxl-encoder-Q8_0.gguf"),
    "t5-v1.1-tokenizer": ("tokenizer", "PixArt-alpha/PixArt-XL-2-1024-MS", "tokenizer/spiece.model"),
}


def as_pass(settings: dict[str, Any]) -> Pass:
    return Pass(**{**settings, "guidance": Guidance(**settings["guidance"])})


def test_names_are_the_official_ones() -> None:
    assert list(OFFICIAL) == [release.name for release in HOSTED]
    assert list(OFFICIAL_COMPONENTS) == [release.name for release in COMPONENTS]
    bundled = [release.name for release in RELEASES if release.repo is None]
    assert bundled == ["demo", "demo-distilled", "demo-upscaler", "demo-lora-teal", "demo-ic-lora-canny"]
    assert len(RELEASES_BY_NAME) == len(RELEASES) == len(OFFICIAL) + len(OFFICIAL_COMPONENTS) + len(bundled)
    assert all(find_release(release.name) is release for release in RELEASES)


@pytest.mark.parametrize("name", OFFICIAL)
def test_model_is_the_official_file(name: str) -> None:
    release = find_release(name)
    file, num_layers, vae, upscaler, _ = OFFICIAL[name]
    assert (release.kind, release.repo, release.file) == ("model", LTX_VIDEO_REPO, f"{file}.safetensors")
    assert (release.num_layers, release.vae_family) == (num_layers, vae)
    assert release.upscaler == (upscaler and f"ltxv-spatial-upscaler-{upscaler}")
    assert (release.text_encoder, release.vae) == (DEFAULT_TEXT_ENCODER, None)
    assert release.is_distilled is ("distilled" in name)
    assert release.version in name


@pytest.mark.parametrize("name", OFFICIAL)
def test_recipe_is_that_of_the_official_config(name: str) -> None:
    recipe, passes = find_release(name).recipe, OFFICIAL[name][-1]
    assert [recipe.first_pass, recipe.second_pass][: len(passes)] == [as_pass(settings) for settings in passes]
    assert recipe.multi_scale is (recipe.second_pass is not None) is (len(passes) == 2)
    # Equal in all of those configs and in the official script's defaults.
    assert (recipe.downscale_factor, recipe.negative_prompt) == (0.6666666, DEFAULT_NEGATIVE_PROMPT)
    assert (recipe.size, recipe.frames, recipe.fps) == (Size(1216, 704), 121, 30.0)
    assert (recipe.decode_timestep, recipe.decode_noise, recipe.image_noise) == (0.05, 0.025, 0.15)


@pytest.mark.parametrize("name", OFFICIAL_COMPONENTS)
def test_component_is_the_official_file(name: str) -> None:
    component = find_release(name)
    assert (component.kind, component.repo, component.file) == OFFICIAL_COMPONENTS[name]
    assert component.version in name
    assert required_releases(component) == (component,)


@pytest.mark.parametrize("fp8", FP8, ids=lambda release: release.name)
def test_fp8_release_differs_from_bf16_only_in_its_file(fp8: Release) -> None:
    bf16 = find_release(fp8.name.removesuffix("-fp8"))
    file_fields = {"name": bf16.name, "file": bf16.file, "size_bytes": bf16.size_bytes}
    file_fields["description"] = fp8.description.removesuffix(", with the matrices of the blocks in 8 bits")
    assert replace(fp8, **file_fields) == bf16
    assert fp8.size_bytes < bf16.size_bytes


def test_model_requires_its_upscaler_and_text_encoder() -> None:
    names = [entry.name for entry in required_releases(find_release("ltxv-13b-0.9.7-dev-fp8"))]
    assert names == ["ltxv-13b-0.9.7-dev-fp8", "ltxv-spatial-upscaler-0.9.7", DEFAULT_TEXT_ENCODER]
    assert [entry.name for entry in required_releases(find_release("ltxv-2b-0.9.5"))] == [
        "ltxv-2b-0.9.5",
        DEFAULT_TEXT_ENCODER,
    ]
    assert [entry.name for entry in required_releases(find_release("demo-distilled"))] == [
        "demo-distilled",
        "demo-upscaler",
        "demo",
    ]


def test_model_without_vae_requires_its_vae_release_once() -> None:
    bare = replace(find_release("ltxv-13b-0.9.8-dev"), vae="ltxv-2b-0.9.8-distilled")
    names = [entry.name for entry in required_releases(bare)]
    assert names == [bare.name, "ltxv-spatial-upscaler-0.9.8", "ltxv-2b-0.9.8-distilled", DEFAULT_TEXT_ENCODER]
    assert required_releases(replace(bare, vae=bare.upscaler)) == (
        replace(bare, vae=bare.upscaler),
        *required_releases(bare)[1::2],
    )


def test_text_encoder_folder_includes_its_tokenizer() -> None:
    assert find_release(DEFAULT_TEXT_ENCODER).file_patterns == ("text_encoder/*", "tokenizer/*")
    assert find_release(TEXT_ENCODER_GGUF).file_patterns == ("t5-v1_1-xxl-encoder-Q8_0.gguf",)
    assert find_release("demo").file_patterns == ("assets/demo/demo.safetensors",)


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_releases_name_releases_of_the_right_kind(release: Release) -> None:
    for name, kind in (
        (release.text_encoder, "text encoder"),
        (release.upscaler, "spatial upscaler"),
        (release.vae, "model"),
    ):
        assert name is None or find_release(name).kind == kind
    assert (release.recipe.second_pass is None) or release.upscaler is not None
    assert find_release(UPSCALER).kind == "spatial upscaler"


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("ltxv-2b-0.9.6", "ltxv-2b-0.9.6-dev"), ("ltx-13b-0.9.8-dev", "ltxv-13b-0.9.8-dev"), ("Demo", "demo")],
)
def test_unknown_name_suggests_similar_names(name: str, suggestion: str) -> None:
    with pytest.raises(RequestError, match=rf"{name}.*Did you mean .*{suggestion}"):
        find_release(name)


def test_name_similar_to_none_lists_all() -> None:
    with pytest.raises(RequestError, match=r"Known are demo, .*ltxv-2b-0\.9,.*t5-v1\.1-xxl"):
        find_release("zzzzzzzz")


@pytest.fixture(scope="module")
def numbers() -> dict[int | str, int]:
    """Counts parameters: of a transformer by its blocks, of the matrices in its blocks, of a VAE by its family."""
    with torch.device("meta"):
        small, large = Transformer(TRANSFORMER_2B).state_dict(), Transformer(TRANSFORMER_13B).state_dict()
        vaes = {"0.9": VAE(VAE_0_9), "0.9.1": VAE(VAE_0_9_1), "0.9.5": VAE(VAE_0_9_5)}
    # In the official fp8 files these have one byte, and everything else is as in the other files.
    matrices = {
        f"matrices of {layers}": {name: tensor for name, tensor in state.items() if BLOCK_MATRIX.fullmatch(name)}
        for layers, state in ((28, small), (48, large))
    }
    states = {28: small, 48: large, **matrices, **{family: vae.state_dict() for family, vae in vaes.items()}}
    return {key: sum(tensor.numel() for tensor in state.values()) for key, state in states.items()}


@pytest.mark.parametrize("release", HOSTED, ids=lambda release: release.name)
def test_file_size_follows_from_its_tensors(release: Release, numbers: dict[int | str, int]) -> None:
    bytes_per_number = 4 if release.version == "0.9" else 2
    expected = (numbers[release.num_layers] + numbers[release.vae_family]) * bytes_per_number
    if release in FP8:
        expected -= numbers[f"matrices of {release.num_layers}"]
    assert release.size_bytes == pytest.approx(expected, rel=0.001)


def test_text_encoder_size_follows_from_its_tensors() -> None:
    with torch.device("meta"):
        parameters = sum(tensor.numel() for tensor in T5Encoder(T5_XXL).state_dict().values())
    assert find_release(DEFAULT_TEXT_ENCODER).size_bytes == pytest.approx(4 * parameters, rel=0.01)
    gguf_bytes = 34 / 32 * parameters  # Q8_0: 32 numbers in 34 bytes
    assert find_release(TEXT_ENCODER_GGUF).size_bytes == pytest.approx(gguf_bytes, rel=0.01)


@pytest.mark.parametrize("kind, size", [("spatial", 2048 * 512 * 9 + 2048), ("temporal", 1024 * 512 * 27 + 1024)])
def test_upscaler_size_follows_from_its_tensors(kind: str, size: int) -> None:
    conv, norm = 512 * 512 * 27 + 512, 2 * 512
    ends = 128 * 512 * 27 + 512 + norm + 512 * 128 * 27 + 128
    parameters = ends + 16 * (conv + norm) + size  # eight residual blocks of two convolutions
    for version in ("0.9.7", "0.9.8"):
        assert find_release(f"ltxv-{kind}-upscaler-{version}").size_bytes == pytest.approx(4 * parameters, rel=0.01)


@pytest.mark.parametrize("release", MODEL_RELEASES, ids=lambda release: release.name)
def test_recipe_can_be_sampled(release: Release) -> None:
    recipe = release.recipe
    assert recipe.size.snap() == recipe.size
    assert snap_frames(recipe.frames) == recipe.frames
    for settings in filter(None, (recipe.first_pass, recipe.second_pass, recipe.single_pass)):
        settings.guidance.check_lists()
        assert settings.sigmas is None or len(explicit_sigmas(settings.sigmas)) == len(settings.sigmas)
        assert (settings.sigmas is None) != (settings.steps is None)
        uses_cfg = [settings.guidance.at_sigma(percent / 100).cfg_scale > 1 for percent in range(101)]
        assert not (release.is_distilled and any(uses_cfg))


def test_single_pass_runs_to_the_end_where_the_first_of_two_stops() -> None:
    for release in HOSTED:
        recipe = release.recipe
        if recipe.multi_scale:
            assert recipe.single_pass is not None
            assert recipe.single_pass.skip_final == 0
            assert recipe.single_pass.guidance == recipe.first_pass.guidance
            assert recipe.single_pass.sigmas in (None, DISTILLED_SIGMAS)
        else:
            assert recipe.single_pass is None


def test_distilled_sigmas_are_linear_quadratic_rounded_down() -> None:
    sigmas = Schedule(sampler="LinearQuadratic").get_sigmas(8, tokens=1)
    assert torch.allclose(sigmas, torch.tensor(DISTILLED_SIGMAS), atol=1e-4)


def test_multi_scale_recipe_without_second_pass_is_refused() -> None:
    with pytest.raises(RequestError, match="multi-scale but has no second pass"):
        Recipe(multi_scale=True)


def test_every_model_has_a_licence() -> None:
    assert (
        find_release("demo").licence
        == find_release(DEFAULT_TEXT_ENCODER).licence
        == find_release(TEXT_ENCODER_GGUF).licence
        == "Apache-2.0"
    )
    assert "research" in find_release("ltxv-2b-0.9").licence
    assert "v0.9.1.license" in find_release("ltxv-2b-0.9.1").licence
    assert "OpenRAIL" in find_release("ltxv-2b-0.9.5").licence
    later = [release for release in RELEASES if release.repo == LTX_VIDEO_REPO and release.version >= "0.9.6"]
    assert len(later) == 17
    assert all("Open-Weights-License-0.X" in release.licence for release in later)
