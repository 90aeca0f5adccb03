"""A diffusers folder says the same as the official file in other words, and gives the same modules."""

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
# scheduler_config.json of the released folders, cut down to what is read.
DYNAMIC = {
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
PLAIN = DYNAMIC | {"shift_terminal": None, "use_dynamic_shifting": False}
FAMILIES = {"0.9": (DYNAMIC, SHIFTED), "0.9.1": (DYNAMIC, SHIFTED), "0.9.5": (PLAIN, LINEAR_QUADRATIC)}


def write(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def changed(file: Path, **more: Any) -> None:
    write(file, json.loads(file.read_text()) | more)


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


def save(folder: Path, transformer: Transformer | None, vae: VAE | None, family: str) -> Path:
    """As diffusers itself saves them."""
    if transformer is not None:
        diffusers_transformer(transformer).save_pretrained(folder / "transformer")
    if vae is not None:
        diffusers_vae(vae, family).save_pretrained(folder / "vae")
    write(folder / "scheduler" / "scheduler_config.json", FAMILIES[family][0])
    return folder


@pytest.fixture
def folder(tmp_path: Path, transformer: Transformer) -> Path:
    return save(tmp_path / "model", transformer, small_vae("0.9.5"), "0.9.5")


# The same model


def test_a_folder_and_a_single_file_give_the_same_modules(
    tmp_path: Path, transformer: Transformer, vae: VAE, family: str
) -> None:
    causal, schedule = family == "0.9.5", FAMILIES[family][1]
    one = Checkpoint.open(save(tmp_path / "model", transformer, vae, family))
    transformer = copy(transformer)
    transformer.config = replace(SMALL_TRANSFORMER, causal_temporal_positioning=causal)
    write_single_file(
        tmp_path / "x.safetensors", transformer=transformer, vae=vae, schedule=schedule, dtype=torch.float32
    )
    other = Checkpoint.open(tmp_path / "x.safetensors")
    assert one.info.layout == "diffusers"
    assert replace(one.info, layout="single file") == other.info
    assert have_same_weights(one.load_transformer(), other.load_transformer())
    assert have_same_weights(one.load_vae(), other.load_vae())
    assert have_same_weights(one.load_vae(torch.bfloat16), vae, torch.bfloat16)


@torch.inference_mode()
def test_a_folder_and_a_single_file_compute_the_same(tmp_path: Path, transformer: Transformer) -> None:
    vae = small_vae("0.9.5")
    write_single_file(
        tmp_path / "x.safetensors", transformer=transformer, vae=vae, schedule=LINEAR_QUADRATIC, dtype=torch.float32
    )
    pair = [
        Checkpoint.open(path) for path in (save(tmp_path / "m", transformer, vae, "0.9.5"), tmp_path / "x.safetensors")
    ]
    where = token_positions(LatentGrid(2, 2, 1), fps=24, causal=True)[None]
    noise, text, level = randn(1, 4, 12), randn(1, 3, 24), torch.full((1, 1), 0.5)
    one, other = (
        model(noise, model.compute_rope(where), text, None, level) for model in (c.load_transformer() for c in pair)
    )
    assert relative_error(one, other) < 1e-6  # not equal: how far the tensors stand from a cache line differs
    latents = randn(1, 12, 2, 1, 1)
    one, other = (model.decode(latents, timestep=level[0]) for model in (c.load_vae(with_encoder=False) for c in pair))
    assert relative_error(one, other) < 1e-6


# Upscalers


@pytest.fixture
def upscaler(tmp_path: Path) -> Path:
    """A folder as that of a released upscaler: with the VAE of its latents."""
    ours = build_random(lambda: LatentUpscaler(SMALL_UPSCALER))
    theirs = LTXLatentUpsamplerModel(in_channels=12, mid_channels=32, num_blocks_per_stage=2)
    known_as = map_keys(UPSCALER_KEYS, ours.state_dict(), is_diffusers=True)
    theirs.load_state_dict({known_as[name]: tensor for name, tensor in ours.state_dict().items()})
    theirs.save_pretrained(tmp_path / "upscaler" / "latent_upsampler")
    return save(tmp_path / "upscaler", None, small_vae("0.9.5"), "0.9.5")


def test_the_folder_of_an_upscaler_is_opened_with_its_vae_or_alone(upscaler: Path) -> None:
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


def test_a_config_of_no_released_upscaler_is_refused(upscaler: Path) -> None:
    changed(upscaler / "latent_upsampler" / "config.json", dims=2)
    with pytest.raises(CheckpointError, match=r"latent_upsampler.config\.json: .*dims = 2; kadr knows only 3"):
        Checkpoint.open(upscaler)


# Configs


def test_the_released_vae_configs_are_read_as_the_released_vaes(family: str) -> None:
    config = dict(DIFFUSERS_VAES[family])
    for name in ("block_out_channels", "decoder_block_out_channels"):
        config[name] = [width * 128 for width in config[name]]
    assert read_vae_config(config, Path("vae")) == VAES[family]


def test_a_config_of_the_first_release_leaves_the_decoder_out() -> None:
    config = {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": [4, 3, 3, 3, 4],
        "spatio_temporal_scaling": [True, True, True, False],
    }
    assert read_vae_config(config, Path("vae")) == VAES["0.9"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decoder_causal": True}, "decoder_causal = True"),
        ({"patch_size_t": 2}, "patch_size_t = 2"),
        ({"block_out_channels": [4, 8, 16, 32, 65]}, "65 channels are no multiple of 32"),
        ({"downsample_type": ["conv"] * 4}, "describes no VAE of this family"),
        ({"layers_per_block": []}, "describes no VAE of this family"),
        ({"decoder_inject_noise": [True] * 4}, "built as none of 0.9, 0.9.1 and 0.9.5"),
        ({"patch_size": 2}, "reduce time 8 and space 16 times"),
    ],
)
def test_a_vae_of_another_build_is_refused(folder: Path, change: Mapping[str, Any], said: str) -> None:
    changed(folder / "vae" / "config.json", **change)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm = 'layer_norm' .*; kadr knows only 'rms_norm_across_heads'"),
        ({"patch_size": 2}, "patch_size = 2"),
        ({"cross_attention_dim": 31}, "cross_attention_dim = 31 .*; kadr knows only 32"),
        ({"num_layers": None}, "num_layers = None.*positive whole number"),
        ({"num_layers": 0}, "num_layers = 0"),
    ],
)
def test_a_transformer_of_another_build_is_refused(folder: Path, change: Mapping[str, Any], said: str) -> None:
    changed(folder / "transformer" / "config.json", **change)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DYNAMIC, SHIFTED),
        (PLAIN, LINEAR_QUADRATIC),
        (DYNAMIC | {"shift_terminal": None}, Schedule(sampler="Uniform", shifting="SD3")),
        ({}, LINEAR_QUADRATIC),
    ],
)
def test_the_scheduler_is_read(tmp_path: Path, config: Mapping[str, Any], expected: Schedule) -> None:
    write(tmp_path / "scheduler_config.json", config)
    assert read_schedule(tmp_path / "scheduler_config.json", "0.9.5") == expected


def test_without_a_scheduler_the_family_tells(tmp_path: Path) -> None:
    assert [read_schedule(tmp_path / "none.json", family) for family in FAMILIES] == [
        SHIFTED,
        SHIFTED,
        LINEAR_QUADRATIC,
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_shift": 0.5}, "base_shift = 0.5 .*; kadr knows only 0.95"),
        ({"max_image_seq_len": 9000}, "max_image_seq_len = 9000"),
        ({"time_shift_type": "linear"}, "shifts by 'linear'"),
    ],
)
def test_a_scheduler_that_shifts_otherwise_is_refused(tmp_path: Path, change: Mapping[str, Any], said: str) -> None:
    write(tmp_path / "scheduler_config.json", DYNAMIC | change)
    with pytest.raises(CheckpointError, match=said):
        read_schedule(tmp_path / "scheduler_config.json", "0.9")


# Folders


def test_the_folder_of_one_component_is_opened(folder: Path) -> None:
    vae = Checkpoint.open(folder / "vae")
    assert (vae.info.vae_family, vae.info.has_transformer) == ("0.9.5", False)
    assert have_same_weights(vae.load_vae(), Checkpoint.open(folder).load_vae())


def lone_transformer(folder: Path, config: TransformerConfig) -> Path:
    """The config and header of a released transformer, without a VAE beside it."""
    transformer = diffusers_transformer_on_meta(config)
    transformer.save_config(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    write_sparse(folder / "diffusion_pytorch_model.safetensors", shapes)
    return folder


def test_a_2b_transformer_without_vae_asks_for_its_version(tmp_path: Path) -> None:
    folder = lone_transformer(tmp_path / "transformer", TRANSFORMER_2B)
    for path in (folder, tmp_path):
        with pytest.raises(CheckpointError, match="name the version"):
            Checkpoint.open(path)
    old, new = (
        Checkpoint.open(folder, release=find_release(f"ltxv-2b-{version}")).info for version in ("0.9.1", "0.9.5")
    )
    assert (old.transformer, old.schedule) == (replace(TRANSFORMER_2B, causal_temporal_positioning=False), SHIFTED)
    assert (new.transformer, new.schedule) == (TRANSFORMER_2B, LINEAR_QUADRATIC)
    with pytest.raises(CheckpointError, match=r"is not ltxv-13b-0\.9\.7-dev: layers: 28, not 48"):
        Checkpoint.open(folder, release=find_release("ltxv-13b-0.9.7-dev"))


def test_a_13b_transformer_without_vae_is_0_9_7_or_later(tmp_path: Path) -> None:
    found = Checkpoint.open(lone_transformer(tmp_path / "transformer", TRANSFORMER_13B)).info
    assert (found.transformer, found.schedule, found.version) == (TRANSFORMER_13B, LINEAR_QUADRATIC, "0.9.7 or later")


def test_a_folder_with_a_text_encoder_misses_nothing(folder: Path) -> None:
    assert Checkpoint.open(folder).describe().missing_components == ("text encoder",)
    write(folder / "text_encoder" / "config.json", {})
    assert Checkpoint.open(folder).describe().missing_components == ()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "none of transformer/, vae/, latent_upsampler/ in it"),
        ({"a.safetensors": {}}, "Name one of the files in it: a.safetensors"),
        ({"config.json": {"architectures": ["T5EncoderModel"]}}, "is a T5 text encoder.*--text-encoder"),
        ({"transformer/config.json": {"_class_name": "LTX2VideoTransformer3DModel"}}, "is LTX-2"),
        ({"vae/config.json": {"_class_name": "AutoencoderKLLTX2Video"}}, "is LTX-2"),
        ({"transformer/config.json": {"_class_name": "WanTransformer3DModel"}}, "holds a WanTransformer3DModel"),
        ({"transformer/config.json": []}, "must be a JSON object"),
        ({"vae/other.json": {}}, r"config\.json is missing"),
    ],
)
def test_a_folder_of_another_kind_is_named(tmp_path: Path, files: Mapping[str, Any], said: str) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(tmp_path)


def test_a_single_file_of_a_folder_is_sent_to_its_folder(folder: Path) -> None:
    for component in ("transformer", "vae"):
        with pytest.raises(CheckpointError, match="one component of a diffusers folder"):
            Checkpoint.open(folder / component / "diffusion_pytorch_model.safetensors")
