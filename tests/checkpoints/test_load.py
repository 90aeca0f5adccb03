"""Loading is strict in both directions, and copies only where the dtype asks for it."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from kadr.checkpoints import keys
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.keys import VAE_UNUSED_KEYS
from kadr.checkpoints.load import load_weights
from kadr.checkpoints.save import write_single_file, write_tensors, write_text_encoder, write_upscaler
from kadr.checkpoints.source import Source
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE
from kadr.quant.layers import ScaledLinear
from tests.checkpoints.checkpoint_files import (
    LINEAR_QUADRATIC,
    SMALL_T5,
    SMALL_TRANSFORMER,
    SMALL_UPSCALER,
    SMALL_VAE,
    build_on_meta,
    have_same_weights,
    official_metadata,
    single_file_shapes,
    t5_shapes,
    write_sparse,
)
from tests.checkpoints.test_source import mapped, needs_proc
from tests.tiny_models import build_random

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return build_random(lambda: Transformer(SMALL_TRANSFORMER))


@pytest.fixture(scope="module")
def vae() -> VAE:
    return build_random(lambda: VAE(SMALL_VAE))


@pytest.fixture
def path(tmp_path: Path, transformer: Transformer, vae: VAE) -> Path:
    write_single_file(tmp_path / "x.safetensors", transformer=transformer, vae=vae, schedule=LINEAR_QUADRATIC)
    return tmp_path / "x.safetensors"


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    return list(module.state_dict().values())


# Numbers and memory


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("asked", [*FLOATS, None])
def test_every_float_dtype_is_read_into_every_other(
    tmp_path: Path, vae: VAE, stored: torch.dtype, asked: torch.dtype | None
) -> None:
    write_single_file(tmp_path / "x.safetensors", vae=vae, schedule=LINEAR_QUADRATIC, dtype=stored)
    loaded = Checkpoint.open(tmp_path / "x.safetensors").load_vae(asked)
    assert {tensor.dtype for tensor in tensors_of(loaded)} == {asked or stored}
    assert have_same_weights(loaded, rounded(vae, stored), asked)


def rounded(module: VAE, dtype: torch.dtype) -> VAE:
    """A copy whose numbers are rounded to a dtype."""
    with torch.device("meta"):
        copy = VAE(module.config)
    copy.load_state_dict({name: tensor.to(dtype) for name, tensor in module.state_dict().items()}, assign=True)
    return copy


@needs_proc
def test_in_its_stored_dtype_a_module_is_the_file_itself(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    assert mapped(path) == []
    modules = [checkpoint.load_transformer(torch.bfloat16), checkpoint.load_vae(torch.bfloat16)]
    (place,) = mapped(path)
    assert all(tensor.data_ptr() in place for module in modules for tensor in tensors_of(module))
    del modules
    gc.collect()
    assert mapped(path) == []


@needs_proc
def test_a_converted_module_keeps_nothing_of_the_file(path: Path) -> None:
    loaded = Checkpoint.open(path).load_transformer(torch.float32)
    gc.collect()
    assert mapped(path) == []
    assert all(tensor.is_contiguous() for tensor in tensors_of(loaded))


def test_loading_400_megabytes_in_their_stored_dtype_takes_no_memory(tmp_path: Path) -> None:
    large = replace(SMALL_T5, vocab_size=200_000, d_model=1024)
    write_sparse(tmp_path / "model.safetensors", t5_shapes(large), dtype="F16")
    (tmp_path / "config.json").write_text(json.dumps(t5_config(large)))
    opened = TextEncoderCheckpoint.open(tmp_path)
    assert opened.size_bytes > 400e6
    before = psutil.Process().memory_info().rss
    encoder = opened.load()
    assert psutil.Process().memory_info().rss - before < 20e6
    assert encoder.embedding.weight.shape == (200_000, 1024)


def t5_config(config: T5Config) -> dict[str, object]:
    return {
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "feed_forward_proj": "gated-gelu",
    }


def test_a_loaded_module_is_ready_for_inference(path: Path) -> None:
    module = Checkpoint.open(path).load_transformer()
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(tensor.device.type == "cpu" for tensor in tensors_of(module))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_weights_are_not_held_in_is_refused(path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match="use bfloat16, float16 or float32"):
        Checkpoint.open(path).load_transformer(dtype)


# 8-bit floats

EIGHT_BIT = [torch.float8_e4m3fn, torch.float8_e5m2]


def cast_as_released(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Store a file's weights as the released fp8 files do, by a plain cast; the file's tensors afterwards."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "transformer_blocks." in name and tensor.ndim == 2 and ("attn" in name or "ff." in name):
                tensors[name] = tensor.to(dtype)

    rewritten(path, change)
    return load_file(path)


@pytest.mark.parametrize("stored", EIGHT_BIT)
@pytest.mark.parametrize("asked", FLOATS)
def test_weights_in_plain_8_bit_floats_are_cast_to_the_dtype_asked_for(
    path: Path, transformer: Transformer, stored: torch.dtype, asked: torch.dtype
) -> None:
    tensors = cast_as_released(path, stored)
    assert sum(tensor.dtype == stored for tensor in tensors.values()) == 2 * (4 + 4 + 2)  # of 2 layers
    checkpoint = Checkpoint.open(path)
    loaded = checkpoint.load_transformer(asked).state_dict()
    names = keys.map_keys(keys.TRANSFORMER_KEYS, loaded)
    for ours, theirs in names.items():
        assert torch.equal(loaded[ours], tensors[f"model.diffusion_model.{theirs}"].to(asked)), ours
    changed = [name for name, theirs in names.items() if tensors[f"model.diffusion_model.{theirs}"].dtype == stored]
    assert not any(torch.equal(loaded[name].float(), transformer.state_dict()[name]) for name in changed)
    assert have_same_weights(checkpoint.load_vae(), checkpoint.load_vae(torch.bfloat16))


def test_8_bit_floats_are_not_computed_in(path: Path) -> None:
    cast_as_released(path, torch.float8_e4m3fn)
    with pytest.raises(
        CheckpointError,
        match=r"stores 20 tensors in 8-bit floats or blocks, such as .*transformer_blocks\..*Ask for bfloat16",
    ):
        Checkpoint.open(path).load_transformer()


PREFIX = "model.diffusion_model."


def scale_as_comfy(path: Path, ending: str, *, by_row: bool = False) -> dict[str, torch.Tensor]:
    """Store a file's weights in 8-bit floats with scales, under ComfyUI's names; what each weight then stands for."""
    meant = {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            if "transformer_blocks." in name and tensor.ndim == 2 and ("attn" in name or "ff." in name):
                scale = tensor.float().abs().amax(1 if by_row else None) / 448
                stored = (tensor.float() / scale.reshape(-1, 1)).to(torch.float8_e4m3fn)
                stem = name.removesuffix(".weight")
                tensors |= {name: stored, stem + ending: scale, stem + ".scale_input": torch.ones(())}
                meant[name.removeprefix(PREFIX)] = stored.float() * scale.reshape(-1, 1)
        tensors[PREFIX + "scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)

    rewritten(path, change)
    return meant


@pytest.mark.parametrize(
    "ending, by_row", [(".scale_weight", False), (".scale_weight", True), (".weight_scale", False)]
)
def test_scales_of_8_bit_floats_are_multiplied_in(path: Path, ending: str, by_row: bool) -> None:
    meant = scale_as_comfy(path, ending, by_row=by_row)
    assert len(meant) == 20
    for asked in (torch.float32, torch.bfloat16):
        loaded = Checkpoint.open(path).load_transformer(asked).state_dict()
        for ours, theirs in keys.map_keys(keys.TRANSFORMER_KEYS, loaded).items():
            if theirs in meant:
                assert torch.equal(loaded[ours], meant[theirs].to(asked)), ours


def test_without_their_scales_they_would_be_other_weights(path: Path) -> None:
    meant = scale_as_comfy(path, ".scale_weight")
    raw = load_file(path)
    assert not any(torch.allclose(raw[PREFIX + name].float(), weight, rtol=0.1) for name, weight in meant.items())


# Held as stored


def evaluated(transformer: Transformer) -> torch.Tensor:
    """An answer of the transformer to fixed tokens."""
    config, generator = transformer.config, torch.Generator().manual_seed(5)
    dtype = transformer.scale_shift_table.dtype
    tokens = torch.randn(2, 6, config.in_channels, generator=generator).to(dtype)
    text = torch.randn(2, 3, config.caption_channels, generator=generator).to(dtype)
    rope = transformer.compute_rope(torch.rand(2, 3, 6, generator=generator) * 50)
    with torch.no_grad():
        return transformer(tokens, rope, text, None, torch.tensor([[1.0], [0.3]]))


@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["bf16", "plain", "scaled"])
def test_weights_held_as_stored_compute_as_converted_ones(path: Path, change: str, asked: torch.dtype) -> None:
    if change == "plain":
        cast_as_released(path, torch.float8_e4m3fn)
    elif change == "scaled":
        scale_as_comfy(path, ".scale_weight")
    checkpoint = Checkpoint.open(path)
    held = checkpoint.load_transformer(asked, keep_storage_dtype=True)
    assert torch.equal(evaluated(held), evaluated(checkpoint.load_transformer(asked)))
    wide = [m for m in held.modules() if isinstance(m, ScaledLinear)]
    assert len(wide) == (0 if change == "bf16" and asked == torch.bfloat16 else 20)
    assert len({id(layer.scratch) for layer in wide}) <= 1
    if wide:  # in the file's own memory
        address = wide[0].weight.data_ptr()
        assert checkpoint.sources["transformer"].read("transformer_blocks.0.attn1.to_q.weight").data_ptr() == address


# Strictness


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a file and keep its header. change: edits them in place."""
    tensors, metadata = load_file(path), dict(Source.open(path).metadata)
    change(tensors)
    save_file(tensors, path, metadata)


def test_a_missing_tensor_is_named(path: Path) -> None:
    rewritten(path, lambda tensors: tensors.pop("model.diffusion_model.transformer_blocks.1.attn2.to_k.bias"))
    with pytest.raises(
        CheckpointError, match=r"transformer: 1 tensors missing: transformer_blocks\.1\.attn2\.to_k\.bias"
    ):
        Checkpoint.open(path).load_transformer()


def test_a_tensor_left_over_is_named(path: Path) -> None:
    rewritten(path, lambda tensors: tensors.update({"vae.decoder.extra.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"vae: 1 tensors left over: decoder\.extra\.weight"):
        Checkpoint.open(path).load_vae()


def test_a_tensor_of_another_shape_is_named_with_both_shapes(path: Path) -> None:
    rewritten(path, lambda tensors: tensors.update({"model.diffusion_model.proj_out.weight": torch.zeros(12, 31)}))
    with pytest.raises(CheckpointError, match=r"1 tensors of another shape: proj_out\.weight is 12x31, not 12x32"):
        Checkpoint.open(path).load_transformer()


def test_a_tensor_in_a_dtype_that_is_not_read_is_named(path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["vae.decoder.conv_in.conv.bias"] = tensors["vae.decoder.conv_in.conv.bias"].to(torch.int8)

    rewritten(path, change)
    with pytest.raises(CheckpointError, match=r"not read here: decoder\.conv_in\.conv\.bias in int8"):
        Checkpoint.open(path).load_vae()


def test_all_complaints_come_at_once_with_five_names_each_and_the_count(path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".attn1." in name]:
            tensors[name.replace("attn1", "attn7")] = tensors.pop(name)
        tensors["model.diffusion_model.proj_out.bias"] = torch.zeros(3)

    rewritten(path, change)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path).load_transformer()
    said = str(caught.value)
    assert "20 tensors missing" in said
    assert "20 tensors left over" in said
    assert "1 tensors of another shape" in said
    assert said.count("and 15 more") == 2
    assert said.count("attn7") == 5


def test_the_statistics_that_nobody_reads_may_be_there(path: Path) -> None:
    rewritten(path, lambda tensors: tensors.update({f"vae.{name}": torch.zeros(12) for name in VAE_UNUSED_KEYS}))
    assert Checkpoint.open(path).load_vae().statistics.mean.shape == (12,)


def test_a_checkpoint_of_other_sizes_than_its_header_says_is_refused(tmp_path: Path) -> None:
    shapes = single_file_shapes(SMALL_TRANSFORMER)
    metadata = official_metadata(SMALL_TRANSFORMER)
    metadata["config"] = metadata["config"].replace('"num_layers": 2', '"num_layers": 3')
    path = write_sparse(tmp_path / "x.safetensors", shapes, metadata=metadata)
    with pytest.raises(CheckpointError, match="25 tensors missing"):
        Checkpoint.open(path).load_transformer()


def test_fill_serves_any_module(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"w": torch.ones(2, 3), "b": torch.ones(2)}, dtype=torch.float32)
    module, source = build_on_meta(lambda: nn.Linear(3, 2)), Source.open(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="1 tensors left over: b"):
        load_weights(build_on_meta(lambda: nn.Linear(3, 2, bias=False)), source, {"weight": "w"})
    load_weights(build_on_meta(lambda: nn.Linear(3, 2, bias=False)), source, {"weight": "w"}, ignored_keys=["b"])
    load_weights(module, source, {"weight": "w", "bias": "b"}, dtype=torch.float16)
    assert module.weight.dtype == torch.float16
    assert module.bias.tolist() == [1.0, 1.0]


# Halves of a VAE


@needs_proc
def test_a_half_that_is_not_asked_for_is_not_there(path: Path, vae: VAE) -> None:
    checkpoint = Checkpoint.open(path)
    half = checkpoint.load_vae(torch.float32, with_encoder=False)
    assert half.encoder is None
    assert have_same_weights(half.decoder, rounded(vae, torch.bfloat16).decoder, torch.float32)
    assert torch.equal(half.statistics.mean, vae.statistics.mean.bfloat16().float())
    other = checkpoint.load_vae(with_decoder=False)
    assert other.decoder is None
    assert other.encoder is not None


def test_the_half_that_is_not_asked_for_is_accounted_for(path: Path) -> None:
    rewritten(path, lambda tensors: tensors.pop("vae.encoder.conv_in.conv.bias"))
    with pytest.raises(CheckpointError, match=r"1 tensors missing: encoder\.conv_in\.conv\.bias"):
        Checkpoint.open(path).load_vae(with_encoder=False)


# Upscalers


@pytest.fixture(scope="module")
def upsampler() -> LatentUpscaler:
    return build_random(lambda: LatentUpscaler(SMALL_UPSCALER))


def test_an_upscaler_is_loaded_in_float32_unless_asked_otherwise(tmp_path: Path, upsampler: LatentUpscaler) -> None:
    write_upscaler(tmp_path / "x.safetensors", upsampler, dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(tmp_path / "x.safetensors")
    assert {tensor.dtype for tensor in tensors_of(checkpoint.load_upscaler())} == {torch.float32}
    assert {tensor.dtype for tensor in tensors_of(checkpoint.load_upscaler(None))} == {torch.bfloat16}
    assert have_same_weights(checkpoint.load_upscaler(torch.bfloat16), upsampler, torch.bfloat16)


def test_an_upscaler_is_accounted_for_in_both_directions(tmp_path: Path, upsampler: LatentUpscaler) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["res_blocks.0.conv3.bias"] = tensors.pop("res_blocks.0.conv1.bias")

    write_upscaler(tmp_path / "x.safetensors", upsampler)
    rewritten(tmp_path / "x.safetensors", change)
    with pytest.raises(
        CheckpointError, match=r"missing: res_blocks\.0\.conv1\.bias; .*over: res_blocks\.0\.conv3\.bias"
    ):
        Checkpoint.open(tmp_path / "x.safetensors").load_upscaler()


# Text encoders


@pytest.fixture(scope="module")
def encoder() -> T5Encoder:
    return build_random(lambda: T5Encoder(SMALL_T5))


@pytest.fixture(scope="module")
def oracle(encoder: T5Encoder, tmp_path_factory: pytest.TempPathFactory) -> transformers.T5EncoderModel:
    folder = tmp_path_factory.mktemp("t5")
    (folder / "spiece.model").write_bytes(b"not read here")
    write_text_encoder(folder, encoder, folder / "spiece.model", dtype=torch.float32)
    return transformers.T5EncoderModel.from_pretrained(folder / "text_encoder")


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_folder_saved_by_transformers_is_read(
    tmp_path: Path, encoder: T5Encoder, oracle: transformers.T5EncoderModel, size: str
) -> None:
    oracle.save_pretrained(tmp_path / "text_encoder", max_shard_size=size)
    assert (len(list(tmp_path.rglob("*.safetensors"))) > 1) == (size == "20KB")
    for path in (tmp_path, tmp_path / "text_encoder"):
        opened = TextEncoderCheckpoint.open(path)
        assert opened.config == SMALL_T5
        assert have_same_weights(opened.load(), encoder)
        assert have_same_weights(opened.load(torch.bfloat16), encoder, torch.bfloat16)


@pytest.mark.parametrize(
    "kept", [["shared.weight"], ["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]]
)
def test_the_embedding_may_stand_under_either_name_or_both(tmp_path: Path, encoder: T5Encoder, kept: list[str]) -> None:
    (tmp_path / "spiece.model").write_bytes(b"not read here")
    write_text_encoder(tmp_path, encoder, tmp_path / "spiece.model", dtype=torch.float32)
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors.pop("shared.weight")
    save_file(tensors | {name: embedding.clone() for name in kept}, file)
    assert have_same_weights(TextEncoderCheckpoint.open(tmp_path).load(), encoder)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no config.json, so it is no text encoder"),
        ({"config.json": "{"}, r"config\.json cannot be read"),
        ({"config.json": '{"model_type": "llama"}'}, "model_type is 'llama'"),
        ({"config.json": json.dumps(t5_config(SMALL_T5))}, "has no weights"),
    ],
)
def test_a_folder_that_is_no_text_encoder_is_refused(tmp_path: Path, files: dict[str, str], said: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=said):
        TextEncoderCheckpoint.open(tmp_path)


def test_a_file_given_as_text_encoder_is_sent_to_its_folder(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is neither a folder nor a GGUF file, so .*text_encoder/.*or a \.gguf"):
        TextEncoderCheckpoint.open(path)
