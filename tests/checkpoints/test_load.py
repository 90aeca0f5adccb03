"""Loading is strict in both directions, and copies only to convert a dtype."""

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

from kadr.checkpoints import keys, load
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
from kadr.sampling.schedules import Schedule
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
from tests.checkpoints.test_source import mapped_ranges, needs_proc
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


# Values and memory


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("requested", [*FLOATS, None])
def test_every_float_dtype_loads_as_every_other(
    tmp_path: Path, vae: VAE, stored: torch.dtype, requested: torch.dtype | None
) -> None:
    write_single_file(tmp_path / "x.safetensors", vae=vae, schedule=LINEAR_QUADRATIC, dtype=stored)
    loaded = Checkpoint.open(tmp_path / "x.safetensors").load_vae(requested)
    assert {tensor.dtype for tensor in tensors_of(loaded)} == {requested or stored}
    assert have_same_weights(loaded, round_copy(vae, stored), requested)


def round_copy(module: VAE, dtype: torch.dtype) -> VAE:
    """Returns a copy with weights rounded to a dtype."""
    with torch.device("meta"):
        copy = VAE(module.config)
    copy.load_state_dict({name: tensor.to(dtype) for name, tensor in module.state_dict().items()}, assign=True)
    return copy


@needs_proc
def test_a_module_in_its_stored_dtype_shares_memory_with_the_file(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    assert mapped_ranges(path) == []
    modules = [checkpoint.load_transformer(torch.bfloat16), checkpoint.load_vae(torch.bfloat16)]
    (addresses,) = mapped_ranges(path)
    assert all(tensor.data_ptr() in addresses for module in modules for tensor in tensors_of(module))
    del modules
    gc.collect()
    assert mapped_ranges(path) == []


@needs_proc
def test_a_converted_module_keeps_no_map_of_the_file(path: Path) -> None:
    loaded = Checkpoint.open(path).load_transformer(torch.float32)
    gc.collect()
    assert mapped_ranges(path) == []
    assert all(tensor.is_contiguous() for tensor in tensors_of(loaded))


def test_loading_400_mb_in_their_stored_dtype_takes_no_memory(tmp_path: Path) -> None:
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
def test_an_unsupported_compute_dtype_is_refused(path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match="use bfloat16, float16 or float32"):
        Checkpoint.open(path).load_transformer(dtype)


# fp8

FP8_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


def cast_as_released(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Stores a file's weights in fp8 without scales, like the released fp8 files, and returns the new tensors."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "transformer_blocks." in name and tensor.ndim == 2 and ("attn" in name or "ff." in name):
                tensors[name] = tensor.to(dtype)

    rewrite(path, change)
    return load_file(path)


@pytest.mark.parametrize("stored", FP8_DTYPES)
@pytest.mark.parametrize("requested", FLOATS)
def test_fp8_weights_without_scales_are_cast_to_the_compute_dtype(
    path: Path, transformer: Transformer, stored: torch.dtype, requested: torch.dtype
) -> None:
    tensors = cast_as_released(path, stored)
    assert sum(tensor.dtype == stored for tensor in tensors.values()) == 2 * (4 + 4 + 2)  # of 2 blocks
    checkpoint = Checkpoint.open(path)
    loaded = checkpoint.load_transformer(requested).state_dict()
    key_map = keys.map_keys(keys.TRANSFORMER_KEYS, loaded)
    for key, file_key in key_map.items():
        assert torch.equal(loaded[key], tensors[f"model.diffusion_model.{file_key}"].to(requested)), key
    in_fp8 = [key for key, file_key in key_map.items() if tensors[f"model.diffusion_model.{file_key}"].dtype == stored]
    assert not any(torch.equal(loaded[key].float(), transformer.state_dict()[key]) for key in in_fp8)
    assert have_same_weights(checkpoint.load_vae(), checkpoint.load_vae(torch.bfloat16))


def test_fp8_weights_need_a_compute_dtype(path: Path) -> None:
    cast_as_released(path, torch.float8_e4m3fn)
    with pytest.raises(
        CheckpointError,
        match=r"stores 20 tensors in fp8 or GGUF blocks, such as .*transformer_blocks\..*Ask for bfloat16",
    ):
        Checkpoint.open(path).load_transformer()


PREFIX = "model.diffusion_model."


def scale_as_comfy(path: Path, suffix: str, *, by_row: bool = False) -> dict[str, torch.Tensor]:
    """Stores a file's weights in fp8 with scales, under ComfyUI's keys, and returns the dequantized weights."""
    dequantized = {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            if "transformer_blocks." in name and tensor.ndim == 2 and ("attn" in name or "ff." in name):
                scale = tensor.float().abs().amax(1 if by_row else None) / 448
                stored = (tensor.float() / scale.reshape(-1, 1)).to(torch.float8_e4m3fn)
                stem = name.removesuffix(".weight")
                tensors |= {name: stored, stem + suffix: scale, stem + ".scale_input": torch.ones(())}
                dequantized[name.removeprefix(PREFIX)] = stored.float() * scale.reshape(-1, 1)
        tensors[PREFIX + "scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)

    rewrite(path, change)
    return dequantized


@pytest.mark.parametrize(
    "suffix, by_row", [(".scale_weight", False), (".scale_weight", True), (".weight_scale", False)]
)
def test_fp8_weights_are_multiplied_by_their_scales(path: Path, suffix: str, by_row: bool) -> None:
    dequantized = scale_as_comfy(path, suffix, by_row=by_row)
    assert len(dequantized) == 20
    for dtype in (torch.float32, torch.bfloat16):
        loaded = Checkpoint.open(path).load_transformer(dtype).state_dict()
        for key, file_key in keys.map_keys(keys.TRANSFORMER_KEYS, loaded).items():
            if file_key in dequantized:
                assert torch.equal(loaded[key], dequantized[file_key].to(dtype)), key


def test_fp8_weights_without_their_scales_differ(path: Path) -> None:
    dequantized = scale_as_comfy(path, ".scale_weight")
    raw = load_file(path)
    assert not any(torch.allclose(raw[PREFIX + name].float(), weight, rtol=0.1) for name, weight in dequantized.items())


# Weights in their storage dtype


def evaluate(transformer: Transformer) -> torch.Tensor:
    """Evaluates the transformer on fixed tokens."""
    config, generator = transformer.config, torch.Generator().manual_seed(5)
    dtype = transformer.scale_shift_table.dtype
    tokens = torch.randn(2, 6, config.in_channels, generator=generator).to(dtype)
    text = torch.randn(2, 3, config.caption_channels, generator=generator).to(dtype)
    rope = transformer.compute_rope(torch.rand(2, 3, 6, generator=generator) * 50)
    with torch.no_grad():
        return transformer(tokens, rope, text, None, torch.tensor([[1.0], [0.3]]))


@pytest.mark.parametrize("requested", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["bf16", "fp8", "scaled fp8"])
def test_weights_in_their_storage_dtype_compute_as_converted_ones(
    path: Path, storage: str, requested: torch.dtype
) -> None:
    if storage == "fp8":
        cast_as_released(path, torch.float8_e4m3fn)
    elif storage == "scaled fp8":
        scale_as_comfy(path, ".scale_weight")
    checkpoint = Checkpoint.open(path)
    stored = checkpoint.load_transformer(requested, keep_storage_dtype=True)
    assert torch.equal(evaluate(stored), evaluate(checkpoint.load_transformer(requested)))
    layers = [module for module in stored.modules() if isinstance(module, ScaledLinear)]
    assert len(layers) == (0 if storage == "bf16" and requested == torch.bfloat16 else 20)
    assert len({id(layer.scratch) for layer in layers}) <= 1
    if layers:  # the weights share memory with the file
        address = layers[0].weight.data_ptr()
        assert checkpoint.sources["transformer"].read("transformer_blocks.0.attn1.to_q.weight").data_ptr() == address


# Strictness


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a file in place and keeps its metadata."""
    tensors, metadata = load_file(path), dict(Source.open(path).metadata)
    change(tensors)
    save_file(tensors, path, metadata)


def test_an_error_names_a_missing_tensor(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.pop("model.diffusion_model.transformer_blocks.1.attn2.to_k.bias"))
    with pytest.raises(
        CheckpointError, match=r"transformer: 1 tensors missing: transformer_blocks\.1\.attn2\.to_k\.bias"
    ):
        Checkpoint.open(path).load_transformer()


def test_an_error_names_an_unexpected_tensor(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.update({"vae.decoder.extra.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"vae: 1 tensors unexpected: decoder\.extra\.weight"):
        Checkpoint.open(path).load_vae()


def test_an_error_names_a_tensor_of_another_shape_with_both_shapes(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.update({"model.diffusion_model.proj_out.weight": torch.zeros(12, 31)}))
    with pytest.raises(CheckpointError, match=r"1 tensors of another shape: proj_out\.weight is 12x31, not 12x32"):
        Checkpoint.open(path).load_transformer()


def test_an_error_names_a_tensor_of_an_unsupported_dtype(path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["vae.decoder.conv_in.conv.bias"] = tensors["vae.decoder.conv_in.conv.bias"].to(torch.int8)

    rewrite(path, change)
    with pytest.raises(CheckpointError, match=r"of an unsupported dtype: decoder\.conv_in\.conv\.bias in int8"):
        Checkpoint.open(path).load_vae()


def test_one_error_lists_all_mismatches_with_a_name_each(path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".attn1." in name]:
            tensors[name.replace("attn1", "attn7")] = tensors.pop(name)
        tensors["model.diffusion_model.proj_out.bias"] = torch.zeros(3)

    rewrite(path, change)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(path).load_transformer()
    message = str(error.value)
    assert "20 tensors missing" in message
    assert "20 tensors unexpected" in message
    assert "1 tensors of another shape" in message
    assert message.count("and 19 more") == 2
    assert message.count("attn7") == 1
    assert message.endswith("use it as released.")


def test_unused_latent_statistics_are_allowed(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.update({f"vae.{name}": torch.zeros(12) for name in VAE_UNUSED_KEYS}))
    assert Checkpoint.open(path).load_vae().statistics.mean.shape == (12,)


def test_a_header_with_another_layer_count_is_refused(tmp_path: Path) -> None:
    shapes = single_file_shapes(SMALL_TRANSFORMER)
    metadata = official_metadata(SMALL_TRANSFORMER)
    metadata["config"] = metadata["config"].replace('"num_layers": 2', '"num_layers": 3')
    path = write_sparse(tmp_path / "x.safetensors", shapes, metadata=metadata)
    with pytest.raises(CheckpointError, match="25 tensors missing"):
        Checkpoint.open(path).load_transformer()


def test_load_weights_works_for_any_module(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"w": torch.ones(2, 3), "b": torch.ones(2)}, dtype=torch.float32)
    module, source = build_on_meta(lambda: nn.Linear(3, 2)), Source.open(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="1 tensors unexpected: b"):
        load_weights(build_on_meta(lambda: nn.Linear(3, 2, bias=False)), source, {"weight": "w"})
    load_weights(build_on_meta(lambda: nn.Linear(3, 2, bias=False)), source, {"weight": "w"}, ignored_keys=["b"])
    load_weights(module, source, {"weight": "w", "bias": "b"}, dtype=torch.float16)
    assert module.weight.dtype == torch.float16
    assert module.bias.tolist() == [1.0, 1.0]


# Halves of a VAE


@needs_proc
def test_an_unwanted_vae_half_is_none(path: Path, vae: VAE) -> None:
    checkpoint = Checkpoint.open(path)
    half = checkpoint.load_vae(torch.float32, with_encoder=False)
    assert half.encoder is None
    assert have_same_weights(half.decoder, round_copy(vae, torch.bfloat16).decoder, torch.float32)
    assert torch.equal(half.statistics.mean, vae.statistics.mean.bfloat16().float())
    other = checkpoint.load_vae(with_decoder=False)
    assert other.decoder is None
    assert other.encoder is not None


def test_an_unwanted_vae_half_is_still_checked(path: Path) -> None:
    rewrite(path, lambda tensors: tensors.pop("vae.encoder.conv_in.conv.bias"))
    with pytest.raises(CheckpointError, match=r"1 tensors missing: encoder\.conv_in\.conv\.bias"):
        Checkpoint.open(path).load_vae(with_encoder=False)


# Upscalers


@pytest.fixture(scope="module")
def upscaler() -> LatentUpscaler:
    return build_random(lambda: LatentUpscaler(SMALL_UPSCALER))


def test_an_upscaler_loads_in_float32_by_default(tmp_path: Path, upscaler: LatentUpscaler) -> None:
    write_upscaler(tmp_path / "x.safetensors", upscaler, dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(tmp_path / "x.safetensors")
    assert {tensor.dtype for tensor in tensors_of(checkpoint.load_upscaler())} == {torch.float32}
    assert {tensor.dtype for tensor in tensors_of(checkpoint.load_upscaler(None))} == {torch.bfloat16}
    assert have_same_weights(checkpoint.load_upscaler(torch.bfloat16), upscaler, torch.bfloat16)


def test_missing_and_unexpected_upscaler_tensors_are_refused(tmp_path: Path, upscaler: LatentUpscaler) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["res_blocks.0.conv3.bias"] = tensors.pop("res_blocks.0.conv1.bias")

    write_upscaler(tmp_path / "x.safetensors", upscaler)
    rewrite(tmp_path / "x.safetensors", change)
    with pytest.raises(
        CheckpointError, match=r"missing: res_blocks\.0\.conv1\.bias; .*unexpected: res_blocks\.0\.conv3\.bias"
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
    "present_keys",
    [["shared.weight"], ["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]],
)
def test_the_embedding_may_have_either_key_or_both(tmp_path: Path, encoder: T5Encoder, present_keys: list[str]) -> None:
    (tmp_path / "spiece.model").write_bytes(b"not read here")
    write_text_encoder(tmp_path, encoder, tmp_path / "spiece.model", dtype=torch.float32)
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors.pop("shared.weight")
    save_file(tensors | {name: embedding.clone() for name in present_keys}, file)
    assert have_same_weights(TextEncoderCheckpoint.open(tmp_path).load(), encoder)


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({}, "has no config.json, so it is not a text encoder"),
        ({"config.json": "{"}, r"config\.json cannot be read"),
        ({"config.json": '{"model_type": "llama"}'}, "model_type is 'llama'"),
        ({"config.json": json.dumps(t5_config(SMALL_T5))}, "has no weights"),
    ],
)
def test_a_folder_that_is_not_a_text_encoder_is_refused(tmp_path: Path, files: dict[str, str], error: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=error):
        TextEncoderCheckpoint.open(tmp_path)


def test_a_file_given_as_text_encoder_is_refused_with_those_that_fit(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no T5 text encoder in it, .* such as t5xxl_fp16\.safetensors"):
        TextEncoderCheckpoint.open(path)


def test_pages_of_a_converted_tensor_are_released_and_of_a_shared_one_kept(
    vae: VAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, released = tmp_path / "vae.safetensors", []
    write_single_file(path, vae=vae, schedule=Schedule(sampler="Uniform"), dtype=torch.bfloat16)
    monkeypatch.setattr(load, "release_pages", lambda tensors: released.extend(tensors))
    Checkpoint.open(path).load_vae(torch.bfloat16)
    assert released == []
    converted = Checkpoint.open(path).load_vae(torch.float32).state_dict()
    assert len(released) == len(converted)
    assert {tensor.dtype for tensor in released} == {torch.bfloat16}
