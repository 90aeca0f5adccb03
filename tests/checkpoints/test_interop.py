"""Files that kadr writes have the names and types by which other programs tell what they are."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from ltx_video.models.autoencoders.latent_upsampler import LatentUpsampler
from safetensors import safe_open

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.gguf.convert import transformer_to_gguf
from kadr.checkpoints.lora.file import write_lora
from kadr.models.lora_layers import LoraWeights
from kadr.quant.mixes import find_mix
from tests import tiny_models

# ComfyUI-GGUF keeps these as they are, and the loader expects them so.
NEVER_QUANTIZED = ("adaln_single.", "caption_projection.", "patchify_proj.", "proj_out.", "scale_shift_table")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model(tmp_path_factory.mktemp("tiny")) / tiny_models.MODEL_FILE


def test_single_file_follows_the_key_rules_of_comfyui(model: Path) -> None:
    with safe_open(model, "pt") as opened:
        keys, metadata = set(opened.keys()), opened.metadata()
    assert all(key.startswith(("model.diffusion_model.", "vae.")) for key in keys)
    # The model by its embedding of the timestep, its depth by the blocks, the VAE by a probe of its decoder.
    assert "model.diffusion_model.adaln_single.emb.timestep_embedder.linear_1.bias" in keys
    assert "model.diffusion_model.transformer_blocks.1.attn2.to_k.weight" in keys
    assert {"vae.decoder.up_blocks.0.res_blocks.0.conv1.conv.weight", "vae.encoder.conv_out.conv.weight"} <= keys
    assert {f"vae.per_channel_statistics.{name}-of-means" for name in ("mean", "std")} <= keys
    assert json.loads(metadata["config"]).keys() >= {"transformer", "vae", "scheduler"}


def test_upscaler_has_the_keys_of_the_official_class(tmp_path: Path) -> None:
    file = tiny_models.write_random_upscaler(tmp_path / "up.safetensors")
    with safe_open(file, "pt") as opened:
        keys, metadata = set(opened.keys()), opened.metadata()
    with torch.device("meta"):
        official = LatentUpsampler.from_config(json.loads(metadata["config"]))
    assert keys == official.state_dict().keys()


def test_gguf_follows_the_key_rules_of_comfyui_gguf(model: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(model)
    transformer_to_gguf(checkpoint, tmp_path / "x.gguf", find_mix("Q4_0"))
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["general.architecture"].contents() == "ltxv"
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types.keys() == checkpoint.sources["transformer"].infos.keys()  # the official names, without a prefix
    for tensor in reader.tensors:
        is_kept = any(name in tensor.name for name in NEVER_QUANTIZED)
        is_vector = len(checkpoint.sources["transformer"].infos[tensor.name].shape) == 1
        assert (types[tensor.name] in ("F32", "F16", "BF16")) == (is_kept or is_vector), tensor.name
        assert not is_vector or types[tensor.name] == "F32"


def test_lora_follows_the_key_rules_of_comfyui(tmp_path: Path) -> None:
    weights = LoraWeights(down=torch.ones(2, 4), up=torch.ones(4, 2), scale=1.0)
    write_lora(tmp_path / "x.safetensors", {"blocks.0.self_attention.q": weights, "blocks.0.feed_forward.up": weights})
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        keys = set(opened.keys())
    layers = ("attn1.to_q", "ff.net.0.proj")
    prefix = "diffusion_model.transformer_blocks.0"
    assert keys == {f"{prefix}.{layer}.lora_{half}.weight" for layer in layers for half in "AB"}
