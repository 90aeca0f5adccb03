"""Files that kadr writes are read by kadr, safetensors, the official package and transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from ltx_video.models.autoencoders.causal_video_autoencoder import CausalVideoAutoencoder
from ltx_video.models.autoencoders.latent_upsampler import LatentUpsampler as OfficialUpsampler
from ltx_video.models.transformers.transformer3d import Transformer3DModel
from ltx_video.schedulers.rf import RectifiedFlowScheduler
from safetensors import safe_open

from kadr.checkpoints import keys
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.save import write_single_file, write_tensors, write_text_encoder, write_upscaler
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE
from kadr.sampling.positions import token_positions
from kadr.sampling.schedules import Schedule
from kadr.shapes import LatentGrid
from tests.checkpoints.checkpoint_files import (
    LINEAR_QUADRATIC,
    SMALL_T5,
    SMALL_TRANSFORMER,
    SMALL_UPSCALER,
    SMALL_VAE,
    have_same_weights,
)
from tests.oracles import VAES, narrow_vae_config, randn, relative_error
from tests.text.test_tokenizer import train
from tests.tiny_models import build_random

DISTILLED = Schedule(sampler="LinearQuadratic", allowed_sigmas=(1.0, 0.5))


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return build_random(lambda: Transformer(SMALL_TRANSFORMER))


@pytest.fixture(scope="module")
def vae() -> VAE:
    return build_random(lambda: VAE(SMALL_VAE))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, transformer: Transformer, vae: VAE) -> Path:
    path = tmp_path_factory.mktemp("saved") / "x.safetensors"
    write_single_file(
        path,
        transformer=transformer,
        vae=vae,
        schedule=DISTILLED,
        dtype=torch.float32,
        metadata={"trained_on": "shapes"},
    )
    return path


# The official package


@torch.inference_mode()
def test_official_transformer_loads_the_file_and_computes_the_same(path: Path, transformer: Transformer) -> None:
    official = Transformer3DModel.from_pretrained(path).eval()
    positions = token_positions(LatentGrid(2, 2, 2), fps=24, causal=True)[None]
    noise, text, sigma = randn(1, 8, 12), randn(1, 5, 24, seed=2), torch.full((1, 1), 0.7)
    mask = torch.arange(5)[None] < 3
    expected = official(
        noise,
        indices_grid=positions,
        encoder_hidden_states=text,
        encoder_attention_mask=mask.long(),
        timestep=sigma,
        return_dict=False,
    )[0]
    velocity = transformer(noise, transformer.compute_rope(positions), text, mask, sigma)
    assert relative_error(velocity, expected) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("family", VAES)
def test_the_official_vae_loads_the_file_and_computes_the_same(tmp_path: Path, family: str) -> None:
    ours = build_random(lambda: VAE(narrow_vae_config(VAES[family], width=8)))
    write_single_file(tmp_path / "x.safetensors", vae=ours, schedule=LINEAR_QUADRATIC, dtype=torch.float32)
    official = CausalVideoAutoencoder.from_pretrained(tmp_path / "x.safetensors").eval()
    assert torch.equal(official.mean_of_means, ours.statistics.mean)
    assert torch.equal(official.std_of_means, ours.statistics.std)
    pixels = randn(1, 3, 9, 32, 32)
    assert relative_error(ours.encode_moments(pixels).mean, official.encode(pixels).latent_dist.mean) < 1e-5
    assert set(official.state_dict()) - {"mean_of_means", "std_of_means"} == {
        name for name in keys.map_keys(keys.VAE_KEYS, ours.state_dict()).values() if "statistics" not in name
    }


@torch.inference_mode()
@pytest.mark.parametrize("spatial, temporal", [(True, False), (False, True), (True, True)])
def test_the_official_upscaler_loads_the_file_and_computes_the_same(
    tmp_path: Path, spatial: bool, temporal: bool
) -> None:
    config = replace(SMALL_UPSCALER, spatial_upsample=spatial, temporal_upsample=temporal)
    ours = build_random(lambda: LatentUpscaler(config))
    path = tmp_path / "x.safetensors"
    write_upscaler(path, ours, metadata={"trained_on": "shapes"})
    latents = randn(1, 12, 2, 3, 3)
    assert relative_error(ours(latents), OfficialUpsampler.from_pretrained(path).eval()(latents)) < 1e-5
    checkpoint = Checkpoint.open(path)
    assert (checkpoint.info.upscaler, checkpoint.info.dtype) == (ours.config, torch.float32)
    assert checkpoint.sources["upscaler"].metadata["trained_on"] == "shapes"
    assert have_same_weights(checkpoint.load_upscaler(), ours)
    assert list(tmp_path.iterdir()) == [path]


def test_the_official_scheduler_loads_the_file(path: Path) -> None:
    official = RectifiedFlowScheduler.from_pretrained(path)
    official.set_timesteps(8, samples_shape=torch.Size((1, 128, 4, 4, 4)))
    assert torch.allclose(official.timesteps, LINEAR_QUADRATIC.get_sigmas(8, tokens=64))


# kadr and safetensors


def test_a_written_checkpoint_opens_with_the_same_info_and_weights(
    path: Path, transformer: Transformer, vae: VAE
) -> None:
    checkpoint = Checkpoint.open(path)
    info = checkpoint.info
    assert (info.transformer, info.vae, info.schedule) == (SMALL_TRANSFORMER, SMALL_VAE, DISTILLED)
    assert info.dtype == torch.float32
    assert have_same_weights(checkpoint.load_transformer(), transformer)
    assert have_same_weights(checkpoint.load_vae(), vae)


def test_safetensors_reads_the_tensors_and_the_metadata(path: Path, transformer: Transformer) -> None:
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        weight = file.get_tensor("model.diffusion_model.patchify_proj.weight")
    assert torch.equal(weight, transformer.proj_in.weight)
    assert metadata["trained_on"] == "shapes"
    assert metadata["format"] == "pt"
    config = json.loads(metadata["config"])
    assert config.keys() == {"transformer", "vae", "scheduler", "allowed_inference_steps"}
    assert config["allowed_inference_steps"] == [1.0, 0.5]
    assert {name.split(".")[0] for name in names} == {"model", "vae"}
    assert not {f"vae.{name}" for name in keys.VAE_UNUSED_KEYS} & names


def test_allowed_sigmas_are_written_only_for_distilled_models(tmp_path: Path, vae: VAE) -> None:
    write_single_file(tmp_path / "x.safetensors", vae=vae, schedule=LINEAR_QUADRATIC)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]).keys() == {"vae", "scheduler"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_tensor_is_written_in_the_requested_dtype(tmp_path: Path, vae: VAE, dtype: torch.dtype) -> None:
    write_single_file(tmp_path / "x.safetensors", vae=vae, schedule=LINEAR_QUADRATIC, dtype=dtype)
    checkpoint = Checkpoint.open(tmp_path / "x.safetensors")
    assert {info.dtype for info in checkpoint.sources["vae"].infos.values()} == {dtype}
    assert have_same_weights(checkpoint.load_vae(), vae, dtype)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path, vae: VAE) -> None:
    for name in ("one", "two"):
        write_single_file(tmp_path / name, vae=vae, schedule=LINEAR_QUADRATIC)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_non_contiguous_scalar_and_empty_tensors_are_written(tmp_path: Path) -> None:
    tensors = {
        "transposed": randn(3, 5).T,
        "strided": randn(10)[::2],
        "scalar": torch.tensor(2.0),
        "empty": randn(0, 4),
    }
    write_tensors(tmp_path / "x.safetensors", tensors, dtype=torch.float32)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_tensor_offsets_are_aligned_for_mapping(path: Path) -> None:
    source = Checkpoint.open(path).sources["vae"]
    assert all(info.file_offset % 4 == 0 for info in source.infos.values())


# Atomic


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, vae: VAE) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(NotImplementedError):  # a meta tensor has no values
        write_tensors(path, {"a": randn(4), "b": torch.empty(4, device="meta")}, dtype=torch.float32)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_of_255_bytes_is_written(tmp_path: Path) -> None:
    path = tmp_path / f"{'x' * 243}.safetensors"
    write_tensors(path, {"a": torch.zeros(1)}, dtype=torch.float32, metadata={})
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_a_checkpoint_error(tmp_path: Path, vae: VAE) -> None:
    with pytest.raises(CheckpointError, match="cannot be written: No such file or directory"):
        write_single_file(tmp_path / "none" / "x.safetensors", vae=vae, schedule=LINEAR_QUADRATIC)


def test_a_checkpoint_without_components_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a transformer, a VAE or both"):
        write_single_file(tmp_path / "x.safetensors", schedule=LINEAR_QUADRATIC)


# Text encoders


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "some.model").write_bytes(train())
    encoder = build_random(lambda: T5Encoder(SMALL_T5))
    write_text_encoder(folder / "home", encoder, folder / "some.model", dtype=torch.float32)
    return folder / "home"


@torch.inference_mode()
def test_transformers_loads_the_text_encoder_and_computes_the_same(text: Path) -> None:
    official, loading = transformers.T5EncoderModel.from_pretrained(text / "text_encoder", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    encoder = TextEncoderCheckpoint.open(text).load()
    tokens = TextEncoderCheckpoint.open(text).load_tokenizer().encode("a red circle moving right")
    expected = official.eval()(tokens.ids, attention_mask=tokens.mask).last_hidden_state
    is_token = tokens.mask[0]
    assert relative_error(encoder(tokens.ids, tokens.mask)[:, is_token], expected[:, is_token]) < 1e-5


def test_transformers_loads_the_tokenizer_and_gives_the_same_ids(text: Path) -> None:
    pytest.importorskip("google.protobuf", reason="transformers reads SentencePiece models through it")
    ours = TextEncoderCheckpoint.open(text).load_tokenizer().encode("a red circle moving right")
    theirs = transformers.AutoTokenizer.from_pretrained(text / "tokenizer")("a red circle moving right").input_ids
    assert theirs == ours.ids[ours.mask].tolist()


def test_a_text_encoder_is_described(text: Path) -> None:
    description = TextEncoderCheckpoint.open(text).describe()
    assert description.sizes == {"num_layers": 2, "d_model": 32, "vocab_size": 160}
    assert (description.name, description.dtype, description.num_tensors) == ("text encoder", "float32", 2 * 9 + 3)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.model").write_bytes(train())
    encoder = build_random(lambda: T5Encoder(replace(SMALL_T5, vocab_size=149)))
    write_text_encoder(tmp_path, encoder, tmp_path / "some.model")
    with pytest.raises(CheckpointError, match="token ids up to 149, the encoder's vocabulary ends at 148"):
        TextEncoderCheckpoint.open(tmp_path).load_tokenizer()
