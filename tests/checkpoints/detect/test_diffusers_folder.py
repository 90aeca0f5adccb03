"""A diffusers folder and the official single file of a model give the same configs and modules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.detect.diffusers_folder import read_schedule, read_vae_config
from kadr.checkpoints.keys import UPSCALER_KEYS, map_keys
from kadr.checkpoints.save import write_single_file
from kadr.errors import CheckpointError
from kadr.models.registry import find_release
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, Transformer, TransformerConfig
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE
from kadr.sampling.positions import token_positions
from kadr.sampling.schedules import Schedule
from kadr.shapes import LatentGrid
from tests.checkpoints.checkpoint_files import (
    LINEAR_QUADRATIC,
    SMALL_TRANSFORMER,
    SMALL_UPSCALER,
    have_same_weights,
    write_sparse,
)
from tests.oracles import (
    DIFFUSERS_VAES,
    VAES,
    diffusers_transformer,
    diffusers_transformer_on_meta,
    diffusers_vae,
    narrow_vae_config,
    randn,
    relative_error,
)
from tests.tiny_models import build_random

SHIFTED = Schedule(sampler="Uniform", shifting="SD3", shift_terminal=0.1)
# scheduler_config.json of the released folders, reduced to the keys that are read.
DYNAMIC_SHIFTING = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 1024,
    "base_shift": 0.95,
    "max_image_seq_len": 4096,
    "max_shift": 2.05,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.1,
    "use_dynamic_shifting": True,
}
NO_SHIFTING = DYNAMIC_SHIFTING | {"shift_terminal": None, "use_dynamic_shifting": False}
FAMILIES = {
    "0.9": (DYNAMIC_SHIFTING, SHIFTED),
    "0.9.1": (DYNAMIC_SHIFTING, SHIFTED),
    "0.9.5": (NO_SHIFTING, LINEAR_QUADRATIC),
}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def change_json(file: Path, **more: Any) -> None:
    write_json(file, json.loads(file.read_text()) | more)


def small_vae(family: str) -> VAE:
    return build_random(lambda: VAE(narrow_vae_config(VAES[family], width=4)))


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return build_random(lambda: Transformer(SMALL_TRANSFORMER))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def vae(family: str) -> VAE:
    return small_vae(family)


def save_diffusers_folder(folder: Path, transformer: Transformer | None, vae: VAE | None, family: str) -> Path:
    """Saves components with diffusers itself."""
    if transformer is not None:
        diffusers_transformer(transformer).save_pretrained(folder / "transformer")
    if vae is not None:
        diffusers_vae(vae, family).save_pretrained(folder / "vae")
    write_json(folder / "scheduler" / "scheduler_config.json", FAMILIES[family][0])
    return folder


@pytest.fixture
def folder(tmp_path: Path, transformer: Transformer) -> Path:
    return save_diffusers_folder(tmp_path / "model", transformer, small_vae("0.9.5"), "0.9.5")


# The same model


def test_a_folder_and_a_single_file_give_the_same_modules(
    tmp_path: Path, transformer: Transformer, vae: VAE, family: str
) -> None:
    is_causal, schedule = family == "0.9.5", FAMILIES[family][1]
    folder = Checkpoint.open(save_diffusers_folder(tmp_path / "model", transformer, vae, family))
    transformer = copy(transformer)
    transformer.config = replace(SMALL_TRANSFORMER, causal_temporal_positioning=is_causal)
    write_single_file(
        tmp_path / "x.safetensors", transformer=transformer, vae=vae, schedule=schedule, dtype=torch.float32
    )
    single_file = Checkpoint.open(tmp_path / "x.safetensors")
    assert folder.info.layout == "diffusers"
    assert replace(folder.info, layout="single file") == single_file.info
    assert have_same_weights(folder.load_transformer(), single_file.load_transformer())
    assert have_same_weights(folder.load_vae(), single_file.load_vae())
    assert have_same_weights(folder.load_vae(torch.bfloat16), vae, torch.bfloat16)


@torch.inference_mode()
def test_a_folder_and_a_single_file_compute_the_same(tmp_path: Path, transformer: Transformer) -> None:
    vae = small_vae("0.9.5")
    write_single_file(
        tmp_path / "x.safetensors", transformer=transformer, vae=vae, schedule=LINEAR_QUADRATIC, dtype=torch.float32
    )
    checkpoints = [
        Checkpoint.open(path)
        for path in (save_diffusers_folder(tmp_path / "m", transformer, vae, "0.9.5"), tmp_path / "x.safetensors")
    ]
    positions = token_positions(LatentGrid(2, 2, 1), fps=24, causal=True)[None]
    noise, text, sigma = randn(1, 4, 12), randn(1, 3, 24), torch.full((1, 1), 0.5)
    transformers = (checkpoint.load_transformer() for checkpoint in checkpoints)
    of_folder, of_file = (model(noise, model.compute_rope(positions), text, None, sigma) for model in transformers)
    assert relative_error(of_folder, of_file) < 1e-6  # not equal: the alignment of the tensors in memory differs
    latents = randn(1, 12, 2, 1, 1)
    vaes = (checkpoint.load_vae(with_encoder=False) for checkpoint in checkpoints)
    of_folder, of_file = (model.decode(latents, timestep=sigma[0]) for model in vaes)
    assert relative_error(of_folder, of_file) < 1e-6


# Upscalers


@pytest.fixture
def upscaler(tmp_path: Path) -> Path:
    """A folder laid out as a released upscaler's: with the VAE of its latents."""
    model = build_random(lambda: LatentUpscaler(SMALL_UPSCALER))
    diffusers_model = LTXLatentUpsamplerModel(in_channels=12, mid_channels=32, num_blocks_per_stage=2)
    key_map = map_keys(UPSCALER_KEYS, model.state_dict(), is_diffusers=True)
    diffusers_model.load_state_dict({key_map[name]: tensor for name, tensor in model.state_dict().items()})
    diffusers_model.save_pretrained(tmp_path / "upscaler" / "latent_upsampler")
    return save_diffusers_folder(tmp_path / "upscaler", None, small_vae("0.9.5"), "0.9.5")


def test_an_upscaler_folder_opens_with_its_vae_or_alone(upscaler: Path) -> None:
    whole, alone = Checkpoint.open(upscaler), Checkpoint.open(upscaler / "latent_upsampler")
    assert whole.info.upscaler == alone.info.upscaler == SMALL_UPSCALER
    assert (whole.info.vae_family, alone.info.has_vae) == ("0.9.5", False)
    for checkpoint in (whole, alone):
        assert have_same_weights(checkpoint.load_upscaler(), build_random(lambda: LatentUpscaler(SMALL_UPSCALER)))
        described = checkpoint.describe()
        assert (described.kind, described.missing_components) == ("spatial upscaler", ())
        with pytest.raises(CheckpointError, match="is a spatial upscaler, not a model"):
            checkpoint.load_transformer()
    assert have_same_weights(whole.load_vae(), small_vae("0.9.5"))


def test_an_unreleased_upscaler_config_is_refused(upscaler: Path) -> None:
    change_json(upscaler / "latent_upsampler" / "config.json", dims=2)
    with pytest.raises(CheckpointError, match=r"latent_upsampler.config\.json: .*dims = 2; kadr knows only 3"):
        Checkpoint.open(upscaler)


# Configs


def test_released_vae_configs_give_the_released_vaes(family: str) -> None:
    config = dict(DIFFUSERS_VAES[family])
    for name in ("block_out_channels", "decoder_block_out_channels"):
        config[name] = [width * 128 for width in config[name]]
    assert read_vae_config(config, Path("vae")) == VAES[family]


def test_a_first_release_config_has_no_decoder_keys() -> None:
    config = {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": [4, 3, 3, 3, 4],
        "spatio_temporal_scaling": [True, True, True, False],
    }
    assert read_vae_config(config, Path("vae")) == VAES["0.9"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"decoder_causal": True}, "decoder_causal = True"),
        ({"patch_size_t": 2}, "patch_size_t = 2"),
        ({"block_out_channels": [4, 8, 16, 32, 65]}, "65 channels are not a multiple of 32"),
        ({"downsample_type": ["conv"] * 4}, "does not describe an LTX-Video VAE"),
        ({"layers_per_block": []}, "does not describe an LTX-Video VAE"),
        ({"decoder_inject_noise": [True] * 4}, "built as none of 0.9, 0.9.1 and 0.9.5"),
        ({"patch_size": 2}, "reduce time 8 and space 16 times"),
    ],
)
def test_a_vae_of_another_architecture_is_refused(folder: Path, change: Mapping[str, Any], error: str) -> None:
    change_json(folder / "vae" / "config.json", **change)
    with pytest.raises(CheckpointError, match=error):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm = 'layer_norm' .*; kadr knows only 'rms_norm_across_heads'"),
        ({"patch_size": 2}, "patch_size = 2"),
        ({"cross_attention_dim": 31}, "cross_attention_dim = 31 .*; kadr knows only 32"),
        ({"num_layers": None}, "num_layers = None.*positive whole number"),
        ({"num_layers": 0}, "num_layers = 0"),
    ],
)
def test_a_transformer_of_another_architecture_is_refused(folder: Path, change: Mapping[str, Any], error: str) -> None:
    change_json(folder / "transformer" / "config.json", **change)
    with pytest.raises(CheckpointError, match=error):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DYNAMIC_SHIFTING, SHIFTED),
        (NO_SHIFTING, LINEAR_QUADRATIC),
        (DYNAMIC_SHIFTING | {"shift_terminal": None}, Schedule(sampler="Uniform", shifting="SD3")),
        ({}, LINEAR_QUADRATIC),
    ],
)
def test_a_scheduler_config_gives_its_schedule(tmp_path: Path, config: Mapping[str, Any], expected: Schedule) -> None:
    write_json(tmp_path / "scheduler_config.json", config)
    assert read_schedule(tmp_path / "scheduler_config.json", "0.9.5") == expected


def test_without_a_scheduler_config_the_vae_family_decides(tmp_path: Path) -> None:
    assert [read_schedule(tmp_path / "none.json", family) for family in FAMILIES] == [
        SHIFTED,
        SHIFTED,
        LINEAR_QUADRATIC,
    ]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"base_shift": 0.5}, "base_shift = 0.5 .*; kadr knows only 0.95"),
        ({"max_image_seq_len": 9000}, "max_image_seq_len = 9000"),
        ({"time_shift_type": "linear"}, "shifts by 'linear'"),
    ],
)
def test_an_unsupported_shift_is_refused(tmp_path: Path, change: Mapping[str, Any], error: str) -> None:
    write_json(tmp_path / "scheduler_config.json", DYNAMIC_SHIFTING | change)
    with pytest.raises(CheckpointError, match=error):
        read_schedule(tmp_path / "scheduler_config.json", "0.9")


# Folders


def test_the_folder_of_one_component_opens(folder: Path) -> None:
    vae = Checkpoint.open(folder / "vae")
    assert (vae.info.vae_family, vae.info.has_transformer) == ("0.9.5", False)
    assert have_same_weights(vae.load_vae(), Checkpoint.open(folder).load_vae())


def write_transformer_folder(folder: Path, config: TransformerConfig) -> Path:
    """Writes config and header of a released transformer, without a VAE beside it."""
    transformer = diffusers_transformer_on_meta(config)
    transformer.save_config(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    write_sparse(folder / "diffusion_pytorch_model.safetensors", shapes)
    return folder


def test_a_2b_transformer_without_vae_needs_a_version(tmp_path: Path) -> None:
    folder = write_transformer_folder(tmp_path / "transformer", TRANSFORMER_2B)
    for path in (folder, tmp_path):
        with pytest.raises(CheckpointError, match="release=NAME"):
            Checkpoint.open(path)
    old, new = (
        Checkpoint.open(folder, release=find_release(f"ltxv-2b-{version}")).info for version in ("0.9.1", "0.9.5")
    )
    assert (old.transformer, old.schedule) == (replace(TRANSFORMER_2B, causal_temporal_positioning=False), SHIFTED)
    assert (new.transformer, new.schedule) == (TRANSFORMER_2B, LINEAR_QUADRATIC)
    with pytest.raises(CheckpointError, match=r"is not ltxv-13b-0\.9\.7-dev: layers: 28, not 48"):
        Checkpoint.open(folder, release=find_release("ltxv-13b-0.9.7-dev"))


def test_a_13b_transformer_without_vae_is_0_9_7_or_later(tmp_path: Path) -> None:
    info = Checkpoint.open(write_transformer_folder(tmp_path / "transformer", TRANSFORMER_13B)).info
    assert (info.transformer, info.schedule, info.version) == (TRANSFORMER_13B, LINEAR_QUADRATIC, "0.9.7 or later")


def test_a_folder_with_a_text_encoder_is_complete(folder: Path) -> None:
    assert Checkpoint.open(folder).describe().missing_components == ("text encoder",)
    write_json(folder / "text_encoder" / "config.json", {})
    assert Checkpoint.open(folder).describe().missing_components == ()


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({}, "none of transformer/, vae/, latent_upsampler/ in it"),
        ({"a.safetensors": {}}, "Name one of the files in it: a.safetensors"),
        ({"config.json": {"architectures": ["T5EncoderModel"]}}, "is a T5 text encoder.*text_encoder"),
        ({"transformer/config.json": {"_class_name": "LTX2VideoTransformer3DModel"}}, "is LTX-2"),
        ({"vae/config.json": {"_class_name": "AutoencoderKLLTX2Video"}}, "is LTX-2"),
        ({"transformer/config.json": {"_class_name": "WanTransformer3DModel"}}, "has a WanTransformer3DModel"),
        ({"transformer/config.json": []}, "must be a JSON object"),
        ({"vae/other.json": {}}, r"config\.json is missing"),
    ],
)
def test_a_folder_of_another_kind_is_refused_with_its_kind(
    tmp_path: Path, files: Mapping[str, Any], error: str
) -> None:
    for name, content in files.items():
        write_json(tmp_path / name, content)
    with pytest.raises(CheckpointError, match=error):
        Checkpoint.open(tmp_path)


def test_a_file_of_a_diffusers_folder_is_refused_with_the_folder(folder: Path) -> None:
    for component in ("transformer", "vae"):
        with pytest.raises(CheckpointError, match="one component of a diffusers folder"):
            Checkpoint.open(folder / component / "diffusion_pytorch_model.safetensors")
