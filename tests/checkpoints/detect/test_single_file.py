"""Detection believes a single file's header, then its shapes, then its name, and asks for what stays open."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.detect.vae_families import VAE_FAMILIES as VAES
from kadr.errors import CheckpointError
from kadr.models.registry import DISTILLED_SIGMAS, find_release
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, TransformerConfig
from kadr.models.upscaler import SPATIAL_UPSCALER_CONFIG, TEMPORAL_UPSCALER_CONFIG, UpscalerConfig
from kadr.models.vae.config import VAE_0_9, VAE_0_9_1, VAE_0_9_5, VAEConfig
from kadr.sampling.schedules import Schedule
from tests.checkpoints.checkpoint_files import (
    LINEAR_QUADRATIC,
    SMALL_TRANSFORMER,
    SMALL_UPSCALER,
    SMALL_VAE,
    official_metadata,
    single_file_shapes,
    upscaler_shapes,
    write_sparse,
)

SHIFTED = Schedule(sampler="Uniform", shifting="SD3", shift_terminal=0.1)
OLD_2B = replace(TRANSFORMER_2B, causal_temporal_positioning=False)
FAMILIES = {"0.9": (OLD_2B, SHIFTED), "0.9.1": (OLD_2B, SHIFTED), "0.9.5": (TRANSFORMER_2B, LINEAR_QUADRATIC)}


def write_and_open(
    path: Path,
    transformer: TransformerConfig | None = None,
    vae: VAEConfig | None = None,
    *,
    metadata: Any = None,
    without_prefix: bool = False,
    release: str | None = None,
) -> Checkpoint:
    write_sparse(path, single_file_shapes(transformer, vae, without_prefix=without_prefix), metadata=metadata)
    return Checkpoint.open(path, release=find_release(release) if release else None)


def refusal_of(path: Path, shapes: dict[str, tuple[int, ...]], **options: Any) -> str:
    """Returns the error text of opening a file with these shapes."""
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(write_sparse(path, shapes, **options))
    assert str(path) in str(error.value)
    return str(error.value)


# The header


@pytest.mark.parametrize("family", VAES)
def test_a_header_is_read(tmp_path: Path, family: str) -> None:
    transformer, schedule = FAMILIES[family]
    metadata = official_metadata(transformer, VAES[family], schedule)
    info = write_and_open(tmp_path / "x.safetensors", transformer, VAES[family], metadata=metadata).info
    assert (info.transformer, info.vae, info.schedule) == (transformer, VAES[family], schedule)
    assert (info.vae_family, info.layout, info.dtype) == (family, "single file", torch.bfloat16)
    # The VAEs of the first two releases are in no other; four later ones have the same tensors.
    assert (info.release and info.release.version) == (family if family != "0.9.5" else None)
    assert info.version == (family if family != "0.9.5" else "0.9.5 or later")


def test_the_header_is_believed_before_the_shapes_and_the_name(tmp_path: Path) -> None:
    metadata = official_metadata(OLD_2B, VAE_0_9_5, SHIFTED)
    info = write_and_open(
        tmp_path / "ltxv-2b-0.9.6-dev-04-25.safetensors", TRANSFORMER_2B, VAE_0_9_5, metadata=metadata
    ).info
    assert info.transformer == OLD_2B
    assert info.schedule == SHIFTED


def test_unreleased_widths_are_read_from_the_header(tmp_path: Path) -> None:
    metadata = official_metadata(SMALL_TRANSFORMER, SMALL_VAE)
    info = write_and_open(tmp_path / "x.safetensors", SMALL_TRANSFORMER, SMALL_VAE, metadata=metadata).info
    assert (info.transformer, info.vae, info.vae_family) == (SMALL_TRANSFORMER, SMALL_VAE, "0.9.5")


def test_a_header_without_causal_positioning_means_not_causal(tmp_path: Path) -> None:
    header = TRANSFORMER_2B.to_header()
    del header["causal_temporal_positioning"]
    metadata = {"config": json.dumps({"transformer": header})}
    info = write_and_open(tmp_path / "x.safetensors", TRANSFORMER_2B, metadata=metadata).info
    assert info.transformer == OLD_2B
    assert info.schedule == SHIFTED
    assert info.version == "0.9 or 0.9.1"


@pytest.mark.parametrize(("config", "name"), [(TRANSFORMER_2B, "ltxv-2b"), (TRANSFORMER_13B, "ltxv-13b")])
def test_allowed_sigmas_identify_a_distilled_release(tmp_path: Path, config: TransformerConfig, name: str) -> None:
    metadata = official_metadata(config, VAE_0_9_5, allowed_inference_steps=DISTILLED_SIGMAS)
    info = write_and_open(tmp_path / "x.safetensors", config, VAE_0_9_5, metadata=metadata).info
    assert info.schedule.allowed_sigmas == DISTILLED_SIGMAS
    assert info.release is find_release(f"{name}-0.9.8-distilled")


@pytest.mark.parametrize(
    ("dtype", "name"), [("BF16", "ltxv-13b-0.9.8-distilled"), ("F8_E4M3", "ltxv-13b-0.9.8-distilled-fp8")]
)
def test_the_dtype_distinguishes_an_fp8_release_from_bf16(tmp_path: Path, dtype: str, name: str) -> None:
    metadata = official_metadata(TRANSFORMER_13B, VAE_0_9_5, allowed_inference_steps=DISTILLED_SIGMAS)
    path = write_sparse(
        tmp_path / "x.safetensors", single_file_shapes(TRANSFORMER_13B, VAE_0_9_5), dtype=dtype, metadata=metadata
    )
    assert Checkpoint.open(path).info.release is find_release(name)


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({"config": "{"}, "is not JSON"),
        ({"config": "[]"}, "must be a JSON object"),
        ({"config": '{"transformer": {}}'}, r"'transformer' that cannot be read .KeyError\('num_layers'"),
        ({"config": '{"transformer": []}'}, "'transformer' that cannot be read"),
        ({"config": '{"vae": {"dims": 3}}'}, "VAE's header has"),
        ({"config": json.dumps({"scheduler": {"sampler": "Constant"}})}, "sampler is 'Constant'"),
        ({"config": json.dumps({"transformer": {"qk_norm": "layer_norm"}})}, "qk_norm = 'layer_norm'"),
    ],
)
def test_an_invalid_header_is_refused(tmp_path: Path, metadata: Any, error: str) -> None:
    with pytest.raises(CheckpointError, match=rf"x\.safetensors.*{error}"):
        write_and_open(tmp_path / "x.safetensors", TRANSFORMER_2B, VAE_0_9_5, metadata=metadata)


# Shapes


@pytest.mark.parametrize("family", VAES)
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["no metadata", "no config"])
def test_without_a_header_the_vae_decides_the_family(tmp_path: Path, family: str, metadata: Any) -> None:
    transformer, schedule = FAMILIES[family]
    info = write_and_open(tmp_path / "x.safetensors", transformer, VAES[family], metadata=metadata).info
    assert (info.transformer, info.vae, info.schedule) == (transformer, VAES[family], schedule)
    assert info.vae_family == family


def test_without_a_header_a_13b_transformer_is_0_9_7_or_later(tmp_path: Path) -> None:
    info = write_and_open(tmp_path / "x.safetensors", TRANSFORMER_13B, without_prefix=True).info
    assert (info.transformer, info.vae, info.schedule) == (TRANSFORMER_13B, None, LINEAR_QUADRATIC)
    assert info.version == "0.9.7 or later"


@pytest.mark.parametrize("family", VAES)
@pytest.mark.parametrize("without_prefix", [True, False])
def test_a_vae_alone_is_detected(tmp_path: Path, family: str, without_prefix: bool) -> None:
    checkpoint = write_and_open(tmp_path / "x.safetensors", vae=VAES[family], without_prefix=without_prefix)
    assert checkpoint.info.vae == VAES[family]
    assert not checkpoint.info.has_transformer
    assert checkpoint.describe().missing_components == ("transformer", "text encoder")
    with pytest.raises(CheckpointError, match="has no transformer, only vae"):
        checkpoint.load_transformer()


@pytest.mark.parametrize(
    ("transformer", "vae", "error"),
    [
        (SMALL_TRANSFORMER, VAE_0_9_5, "2 layers 32 wide are none of the released"),
        (TRANSFORMER_2B, SMALL_VAE, "encoder ends 256 wide is none of the released"),
    ],
)
def test_without_a_header_only_released_sizes_are_known(
    tmp_path: Path, transformer: TransformerConfig, vae: VAEConfig, error: str
) -> None:
    with pytest.raises(CheckpointError, match=error):
        write_and_open(tmp_path / "x.safetensors", transformer, vae)


# Names


def test_a_2b_transformer_without_header_and_vae_needs_a_version(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ltxv-2b-0\.9\.6-dev.*release=NAME"):
        write_and_open(tmp_path / "x.safetensors", TRANSFORMER_2B)


@pytest.mark.parametrize(
    ("name", "expected", "schedule"),
    [
        ("ltx-video-2b-v0.9", OLD_2B, SHIFTED),
        ("ltx-video-2b-v0.9.1", OLD_2B, SHIFTED),
        ("ltxv-2b-0.9.6-dev-04-25", TRANSFORMER_2B, LINEAR_QUADRATIC),
        ("LTXV-2B-0.9.8-distilled", TRANSFORMER_2B, LINEAR_QUADRATIC),
    ],
)
def test_the_file_name_decides_the_version(
    tmp_path: Path, name: str, expected: TransformerConfig, schedule: Schedule
) -> None:
    info = write_and_open(tmp_path / f"{name}.safetensors", TRANSFORMER_2B, without_prefix=True).info
    assert (info.transformer, info.schedule) == (expected, schedule)
    assert info.release is not None
    assert info.version == info.release.version


def test_the_given_release_decides_the_version(tmp_path: Path) -> None:
    info = write_and_open(tmp_path / "x.safetensors", TRANSFORMER_2B, release="ltxv-2b-0.9.1").info
    assert (info.transformer, info.schedule, info.version) == (OLD_2B, SHIFTED, "0.9.1")


def test_the_file_name_completes_the_header(tmp_path: Path) -> None:
    metadata = official_metadata(TRANSFORMER_2B, VAE_0_9_5)
    path = tmp_path / "ltxv-2b-0.9.6-distilled-04-25.safetensors"
    info = write_and_open(path, TRANSFORMER_2B, VAE_0_9_5, metadata=metadata).info
    assert info.release is find_release("ltxv-2b-0.9.6-distilled")


@pytest.mark.parametrize(
    ("transformer", "vae", "extra_entries", "error"),
    [
        (TRANSFORMER_2B, VAE_0_9_5, {}, "layers: 28, not 48"),
        (TRANSFORMER_13B, VAE_0_9_1, {}, "VAE: 0.9.1, not 0.9.5"),
        (
            TRANSFORMER_13B,
            VAE_0_9_5,
            {"allowed_inference_steps": [1.0, 0.5]},
            "it was distilled for certain sigmas",
        ),
    ],
)
def test_a_contradicted_file_name_is_ignored_and_a_given_release_refused(
    tmp_path: Path, transformer: TransformerConfig, vae: VAEConfig, extra_entries: Any, error: str
) -> None:
    metadata = official_metadata(transformer, vae, **extra_entries)
    info = write_and_open(tmp_path / "ltxv-13b-0.9.8-dev.safetensors", transformer, vae, metadata=metadata).info
    assert info.release is None
    with pytest.raises(CheckpointError, match=f"is not ltxv-13b-0.9.8-dev: {error}"):
        write_and_open(tmp_path / "x.safetensors", transformer, vae, metadata=metadata, release="ltxv-13b-0.9.8-dev")


# Upscalers

UPSCALERS = {
    "header": SPATIAL_UPSCALER_CONFIG,
    "spatial": SPATIAL_UPSCALER_CONFIG,
    "temporal": TEMPORAL_UPSCALER_CONFIG,
    "both": replace(SPATIAL_UPSCALER_CONFIG, temporal_upsample=True),
    "small": SMALL_UPSCALER,
}


def write_and_open_upscaler(
    path: Path, config: UpscalerConfig, *, with_header: bool = True, release: str | None = None
) -> Checkpoint:
    metadata = {"config": json.dumps(config.to_header())} if with_header else None
    write_sparse(path, upscaler_shapes(config), dtype="F32", metadata=metadata)
    return Checkpoint.open(path, release=find_release(release) if release else None)


@pytest.mark.parametrize("which", UPSCALERS)
def test_an_upscaler_is_detected_by_its_header_or_its_shapes(tmp_path: Path, which: str) -> None:
    config = UPSCALERS[which]
    checkpoint = write_and_open_upscaler(tmp_path / "x.safetensors", config, with_header=which == "header")
    info = checkpoint.info
    assert (info.upscaler, info.transformer, info.vae, info.vae_family) == (config, None, None, None)
    assert (info.kind, info.layout, info.dtype) == (config.kind, "single file", torch.float32)
    assert info.version == (
        "0.9.7 or 0.9.8" if config in (SPATIAL_UPSCALER_CONFIG, TEMPORAL_UPSCALER_CONFIG) else "unreleased"
    )
    assert (info.release, list(checkpoint.sources)) == (None, ["upscaler"])


@pytest.mark.parametrize("with_header", [True, False])
@pytest.mark.parametrize(
    ("config", "kind"), [(SPATIAL_UPSCALER_CONFIG, "spatial"), (TEMPORAL_UPSCALER_CONFIG, "temporal")]
)
def test_the_name_of_an_upscaler_tells_its_version(
    tmp_path: Path, config: UpscalerConfig, kind: str, with_header: bool
) -> None:
    info = write_and_open_upscaler(
        tmp_path / f"ltxv-{kind}-upscaler-0.9.7.safetensors", config, with_header=with_header
    ).info
    assert (info.release, info.version) == (find_release(f"ltxv-{kind}-upscaler-0.9.7"), "0.9.7")
    other = tmp_path / f"ltxv-{'temporal' if kind == 'spatial' else 'spatial'}-upscaler-0.9.7.safetensors"
    assert write_and_open_upscaler(other, config, with_header=with_header).info.release is None


def test_an_upscaler_is_not_a_model_and_a_model_not_an_upscaler(tmp_path: Path) -> None:
    for release, kind in (("ltxv-2b-0.9.5", "model"), ("ltxv-temporal-upscaler-0.9.8", "temporal upscaler")):
        with pytest.raises(CheckpointError, match=f"is not {release}: it is a spatial upscaler, not {kind}"):
            write_and_open_upscaler(tmp_path / "x.safetensors", SPATIAL_UPSCALER_CONFIG, release=release)
    with pytest.raises(CheckpointError, match=r"is not ltxv-spatial.*: it is a model, not spatial upscaler"):
        write_and_open(tmp_path / "y.safetensors", TRANSFORMER_13B, release="ltxv-spatial-upscaler-0.9.8")


@pytest.mark.parametrize(("component", "flag"), [("transformer", "model"), ("vae", "vae")])
def test_an_upscaler_without_a_component_is_refused_with_its_flag(tmp_path: Path, component: str, flag: str) -> None:
    checkpoint = write_and_open_upscaler(tmp_path / "x.safetensors", SPATIAL_UPSCALER_CONFIG)
    with pytest.raises(
        CheckpointError,
        match=rf"x\.safetensors is a spatial upscaler, not a model, and has no {component}.* as upscaler, .*as {flag}",
    ):
        getattr(checkpoint, f"load_{component}")()


def test_the_error_for_a_missing_upscaler_names_one(tmp_path: Path) -> None:
    checkpoint = write_and_open(tmp_path / "x.safetensors", TRANSFORMER_2B, VAE_0_9_5)
    assert checkpoint.info.upscaler is None
    with pytest.raises(CheckpointError, match=r"has no upscaler, only transformer and vae\. Give one such as"):
        checkpoint.load_upscaler()


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (SPATIAL_UPSCALER_CONFIG.to_header() | {"dims": 2}, "dims = 2"),
        (SPATIAL_UPSCALER_CONFIG.to_header() | {"spatial_scale": 1.5}, "spatial_scale, .*LTX-2"),
        ({"vae": SMALL_VAE.to_header()}, "vae, "),
    ],
)
def test_an_upscaler_with_another_header_is_refused(tmp_path: Path, config: Any, error: str) -> None:
    metadata = {"config": json.dumps(config)}
    text = refusal_of(tmp_path / "x.safetensors", upscaler_shapes(SPATIAL_UPSCALER_CONFIG), metadata=metadata)
    assert re.search(f"the upscaler's header has {error}", text)


@pytest.mark.parametrize(
    "change",
    [{"upsampler.0.weight": (6 * 32, 32, 3, 3)}, {"upsampler.0.weight": (32,)}, {"initial_conv.weight": (32, 12)}],
)
def test_without_a_header_unknown_upscaler_shapes_are_refused(tmp_path: Path, change: Any) -> None:
    text = refusal_of(tmp_path / "x.safetensors", upscaler_shapes(SMALL_UPSCALER) | change)
    assert "no upscaler of this family has initial_conv.weight of [32, 12" in text


# Files of another kind


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "is a LoRA"),
        ("diffusion_model.transformer_blocks.0.attn1.to_q.lora_B.default.weight", "is a LoRA"),
        ("diffusion_model.transformer_blocks.0.attn1.to_q.lora_down.weight", "is a LoRA"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.alpha", "is a LoRA"),
        ("model.diffusion_model.audio_patchify_proj.weight", "is LTX-2.*kadr runs LTX-Video 0.9 to 0.9.8"),
        ("model.diffusion_model.transformer_blocks.0.audio_attn1.to_q.weight", "is LTX-2"),
        ("model.diffusion_model.av_ca_video_scale_shift_adaln_single.linear.weight", "is LTX-2"),
        ("audio_vae.decoder.conv_in.conv.weight", "is LTX-2"),
        ("vocoder.conv_pre.weight", "is LTX-2"),
        ("model.diffusion_model.video_embeddings_connector.learnable_registers", "is LTX-2"),
        ("text_embedding_projection.aggregate_embed.weight", "is LTX-2"),
        ("post_upsample_res_blocks.0.conv1.weight", "has tensors of an upscaler.*Use the two files"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "is a T5 text encoder.*text_encoder"),
        ("shared.weight", "is a T5 text encoder"),
        ("proj_in.weight", "one component of a diffusers folder"),
        ("encoder.mid_block.resnets.0.conv1.conv.weight", "one component of a diffusers folder"),
        ("model.layers.0.self_attn.q_proj.weight", "not a checkpoint of the LTX-Video family"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_its_kind(tmp_path: Path, name: str, error: str) -> None:
    # Among tensors of a model, as in the files where such a key occurs.
    shapes = {"model.diffusion_model.patchify_proj.weight": (4, 4), name: (4, 4)}
    with pytest.raises(CheckpointError, match=error):
        Checkpoint.open(write_sparse(tmp_path / "x.safetensors", shapes))


def test_ltx_2_is_recognized_by_its_header(tmp_path: Path) -> None:
    metadata = {"config": json.dumps({"transformer": {"_class_name": "AVTransformer3DModel"}})}
    assert "LTX-2" in refusal_of(tmp_path / "x.safetensors", single_file_shapes(TRANSFORMER_2B), metadata=metadata)


def test_an_error_names_a_tensor_of_no_component(tmp_path: Path) -> None:
    shapes = single_file_shapes(TRANSFORMER_2B, VAE_0_9) | {"ema.decay": (1,)}
    assert "1 of its 906 tensors" in (text := refusal_of(tmp_path / "x.safetensors", shapes))
    assert "ema.decay" in text


def test_a_tensor_with_and_without_its_prefix_is_refused(tmp_path: Path) -> None:
    shapes = single_file_shapes(TRANSFORMER_2B, VAE_0_9) | {"decoder.conv_in.conv.bias": (512,)}
    assert "such as decoder.conv_in.conv.bias" in refusal_of(tmp_path / "x.safetensors", shapes)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert "none at all" in refusal_of(tmp_path / "x.safetensors", {})


# Descriptions


def test_a_checkpoint_is_described(tmp_path: Path) -> None:
    metadata = official_metadata(TRANSFORMER_2B, VAE_0_9_1, SHIFTED)
    checkpoint = write_and_open(tmp_path / "ltx-video-2b-v0.9.1.safetensors", OLD_2B, VAE_0_9_1, metadata=metadata)
    description = asdict(checkpoint.describe())
    transformer, vae = description.pop("components")
    assert description == {
        "path": str(checkpoint.path),
        "kind": "model",
        "layout": "single file",
        "version": "0.9.1",
        "registry_name": "ltxv-2b-0.9.1",
        "release_candidates": (),
        "vae_family": "0.9.1",
        "sampler": "Uniform",
        "missing_components": ("text encoder",),
        "origins": {},
    }
    assert transformer == {
        "name": "transformer",
        "sizes": {"num_layers": 28, "width": 2048, "num_heads": 32},
        "num_tensors": 28 * 25 + 15,
        "num_parameters": 1_923_385_472,
        "size_bytes": 2 * 1_923_385_472,
        "dtype": "bfloat16",
        "type_counts": {"bfloat16": 28 * 25 + 15},
    }
    assert (vae["name"], vae["num_tensors"], vae["sizes"]) == ("vae", 294, {"latent_channels": 128, "patch_size": 4})
    assert checkpoint.size_bytes == transformer["size_bytes"] + vae["size_bytes"]
    json.dumps(description)


def test_an_upscaler_is_described_without_missing_components(tmp_path: Path) -> None:
    description = asdict(
        write_and_open_upscaler(
            tmp_path / "ltxv-spatial-upscaler-0.9.8.safetensors", SPATIAL_UPSCALER_CONFIG
        ).describe()
    )
    (component,) = description.pop("components")
    assert description == {
        "path": str(tmp_path / "ltxv-spatial-upscaler-0.9.8.safetensors"),
        "kind": "spatial upscaler",
        "layout": "single file",
        "version": "0.9.8",
        "registry_name": "ltxv-spatial-upscaler-0.9.8",
        "release_candidates": (),
        "vae_family": None,
        "sampler": None,
        "missing_components": (),
        "origins": {},
    }
    assert component == {
        "name": "upscaler",
        "sizes": {"in_channels": 128, "mid_channels": 512, "num_blocks_per_stage": 4},
        "num_tensors": 72,
        "num_parameters": 126_250_624,
        "size_bytes": 4 * 126_250_624,
        "dtype": "float32",
        "type_counts": {"float32": 72},
    }


def test_a_text_encoder_beside_the_file_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text("{}")
    checkpoint = write_and_open(tmp_path / "x.safetensors", TRANSFORMER_2B, VAE_0_9_5, metadata=None)
    assert checkpoint.describe().missing_components == ()


INSPECT = """
import sys, time, resource
from kadr.checkpoints.detect.vae_families import VAE_FAMILIES as VAES
from kadr.checkpoints.checkpoint import Checkpoint
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
description = Checkpoint.open(sys.argv[1]).describe()
seconds = time.process_time() - start
print(description.registry_name, sum(component.size_bytes for component in description.components), seconds)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_28_gigabytes_are_inspected_in_a_second_without_reading_them(tmp_path: Path) -> None:
    metadata = official_metadata(TRANSFORMER_13B, VAE_0_9_5)
    path = write_sparse(
        tmp_path / "ltxv-13b-0.9.7-dev.safetensors", single_file_shapes(TRANSFORMER_13B, VAE_0_9_5), metadata=metadata
    )
    process = subprocess.run([sys.executable, "-c", INSPECT, str(path)], check=True, capture_output=True, text=True)
    model, size, seconds, added_bytes = process.stdout.split()
    assert (model, int(size)) == ("ltxv-13b-0.9.7-dev", path.stat().st_size - header_bytes(path))
    assert int(size) > 28e9
    assert float(seconds) < 1
    assert int(added_bytes) < 30e6


def header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
