"""GGUF files of other tools open as what they are, with the tensors that the gguf package reads."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from kadr.checkpoints import keys
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.gguf import header
from kadr.checkpoints.gguf.header import read_gguf_header
from kadr.checkpoints.load import account
from kadr.checkpoints.save import write_single_file, write_text_encoder
from kadr.checkpoints.source import Source
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint, is_text_encoder
from kadr.errors import CheckpointError
from kadr.kernels.ggml_types import GGML_TYPES
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, Transformer
from kadr.models.vae.config import VAE_0_9_5
from kadr.pipeline.engine import Engine
from kadr.quant.layers import DequantizingLinear
from kadr.sampling.schedules import Schedule
from kadr.spec.locate import PACKAGE_ROOT
from tests import tiny_models
from tests.checkpoints.checkpoint_files import (
    LINEAR_QUADRATIC,
    SMALL_T5,
    SMALL_TRANSFORMER,
    build_on_meta,
    have_same_weights,
    official_metadata,
    single_file_shapes,
    t5_shapes,
)
from tests.checkpoints.gguf import gguf_files
from tests.oracles import relative_error

XXL = T5Config(vocab_size=32128, d_model=4096, num_layers=24, num_heads=64, d_kv=64, d_ff=10240)
SPIECE = (PACKAGE_ROOT / "assets" / "demo" / "tokenizer" / "spiece.model").read_bytes()
OLD = Schedule(sampler="Uniform", shifting="SD3", shift_terminal=0.1)


def random_values(*shape: int) -> np.ndarray:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).numpy()


def dequantize(source: Source, name: str) -> np.ndarray:
    """Dequantizes a tensor with the gguf package."""
    info, tensor = source.infos[name], source.read(name)
    if info.ggml_type is None:
        return tensor.float().numpy()
    return gguf.quants.dequantize(tensor.numpy(), Type[info.ggml_type.name])


def write_released(
    tmp_path: Path, name: str, transformer: Any = TRANSFORMER_2B, block_type: str = "Q8_0", **fields: Any
) -> Path:
    """Writes a sparse file with the tensors of a released transformer's published file."""
    types = gguf_files.transformer_types(single_file_shapes(transformer, without_prefix=True), block_type)
    return gguf_files.write_sparse_gguf(tmp_path / name, "ltxv", types, **fields)


# The container


def test_ggml_type_ids_and_sizes_are_those_of_the_gguf_package() -> None:
    unquantized = {type_id: str(dtype).removeprefix("torch.") for type_id, dtype in header.UNQUANTIZED_TYPES.items()}
    assert unquantized == {Type.F32: "float32", Type.F16: "float16", Type.BF16: "bfloat16"}
    assert {Type(type_id).name for type_id in header.BLOCK_TYPES} == GGML_TYPES.keys()
    for type_id, name in header.BLOCK_TYPES.items():
        assert Type(type_id).name == name
        assert gguf.GGML_QUANT_SIZES[Type(type_id)] == (GGML_TYPES[name].block_size, GGML_TYPES[name].type_size)


def test_tensors_and_fields_are_those_that_the_gguf_package_wrote(tmp_path: Path) -> None:
    types = ("F32", "F16", "BF16", *gguf_files.QUANTS_OF_THE_PACKAGE)
    tensors = {name: (random_values(6, 64), name) for name in types} | {"one": (random_values(7), "F32")}
    fields = {
        "text": "ünï",
        "yes": True,
        "number": 7,
        "small": 1e-6,
        "list": [1.5, 2.5],
        "words": ["a", "▁b"],
    }
    path = gguf_files.write_gguf_file(tmp_path / "x.gguf", "ltxv", tensors, {**fields, "bytes": bytes(range(9))})
    source, header, oracle = Source.open(path), read_gguf_header(path), gguf.GGUFReader(path)
    assert list(source.infos) == [tensor.name for tensor in oracle.tensors]
    for tensor in oracle.tensors:
        assert np.array_equal(source.read(tensor.name).view(torch.uint8).numpy(), tensor.data.view(np.uint8))
        assert np.array_equal(dequantize(source, tensor.name), gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    assert source.infos["Q4_0"].shape == (6, 64)
    assert source.type_counts == {
        name if name in GGML_TYPES else str(source.read(name).dtype)[6:]: 1 for name in types
    } | {"float32": 2}
    assert source.size_bytes == sum(int(tensor.n_bytes) for tensor in oracle.tensors)
    assert {name: header.fields[name] for name in ("text", "yes", "number", "small")} == {
        name: fields[name] for name in ("text", "yes", "number", "small")
    }
    assert list(header.read_array("words") or ()) == ["a", "▁b"]
    assert list(header.read_array("list") or ()) == [1.5, 2.5]
    assert header.read_array("bytes") == bytes(range(9))
    assert header.read_array("text") is header.read_array("absent") is None
    assert "words" not in source.metadata


def test_a_block_quantized_tensor_shares_memory_with_the_file(tmp_path: Path) -> None:
    path = gguf_files.write_gguf_file(tmp_path / "x.gguf", "ltxv", {"a": (random_values(4, 64), "Q8_0")})
    source = Source.open(path)
    first, second = source.read("a"), source.read("a")
    assert first.data_ptr() == second.data_ptr()
    assert (first.dtype, tuple(first.shape)) == (torch.uint8, (4, 68))


def test_a_reshaped_tensor_gets_its_original_shape(tmp_path: Path) -> None:
    values = random_values(4, 64)
    fields = {"comfy.gguf.orig_shape.a": [2, 2, 64], "comfy.gguf.orig_shape.b": [8, 32]}
    path = gguf_files.write_gguf_file(
        tmp_path / "x.gguf", "ltxv", {"a": (values, "F16"), "b": (values, "Q8_0")}, fields
    )
    source = Source.open(path)
    assert (source.read("a").shape, source.read("b").shape) == ((2, 2, 64), (8, 34))
    quantized = gguf.quants.quantize(values, Type.Q8_0)
    assert np.array_equal(dequantize(source, "b").ravel(), gguf.quants.dequantize(quantized, Type.Q8_0).ravel())


def test_a_t5_xxl_file_opens_in_half_a_second(tmp_path: Path) -> None:
    rng = random.Random(0)
    pieces = [f"▁{''.join(rng.choices('abcdefgh', k=6))}{i}" for i in range(XXL.vocab_size)]
    types = {name: (shape, "F32" if len(shape) == 1 else "Q8_0") for name, shape in gguf_files.t5_shapes(XXL).items()}
    tokenizer_fields = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-1.5] * len(pieces),
    }
    fields = {**gguf_files.t5_fields(XXL), **tokenizer_fields}
    path = gguf_files.write_sparse_gguf(tmp_path / "t5.gguf", "t5encoder", types, **fields)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        opened = TextEncoderCheckpoint.open(path)
        times.append(time.perf_counter() - start)
    assert opened.config == XXL
    assert opened.size_bytes > 5e9
    assert min(times) < 0.5


# Transformers


def test_a_published_13b_file_is_detected_by_its_layers(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_released(tmp_path, "anything.gguf", TRANSFORMER_13B, "Q4_K"))
    info = checkpoint.info
    assert (info.layout, info.transformer, info.release) == ("GGUF", TRANSFORMER_13B, None)
    assert (info.schedule, info.version) == (LINEAR_QUADRATIC, "0.9.7 or later")
    assert (info.vae, checkpoint.describe().missing_components) == (None, ("vae", "text encoder"))


@pytest.mark.parametrize(
    "name, model, schedule, causal",
    [
        ("ltx-video-2b-v0.9-Q4_K_M.gguf", "ltxv-2b-0.9", OLD, False),
        ("ltx-video-2b-v0.9.1-q8_0.gguf", "ltxv-2b-0.9.1", OLD, False),
        ("ltx-video-2b-v0.9.5_Q5_K_S.gguf", "ltxv-2b-0.9.5", LINEAR_QUADRATIC, True),
        ("ltxv-2b-0.9.6-distilled-04-25-BF16.gguf", "ltxv-2b-0.9.6-distilled", LINEAR_QUADRATIC, True),
        ("LTXV-2B-0.9.8-distilled.Q6_K.gguf", "ltxv-2b-0.9.8-distilled", LINEAR_QUADRATIC, True),
        ("ltxv-2b-0.9.6-dev.gguf", "ltxv-2b-0.9.6-dev", LINEAR_QUADRATIC, True),
    ],
)
def test_the_name_of_a_2b_file_tells_its_version(
    tmp_path: Path, name: str, model: str, schedule: Schedule, causal: bool
) -> None:
    info = Checkpoint.open(write_released(tmp_path, name)).info
    assert info.release is not None
    assert (info.release.name, info.schedule) == (model, schedule)
    assert info.transformer is not None
    assert info.transformer.causal_temporal_positioning is causal


def test_a_2b_file_of_another_name_needs_a_version(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not say which release.*ltxv-2b-0\.9,.*release=NAME"):
        Checkpoint.open(write_released(tmp_path, "model-Q8_0.gguf"))


def test_a_config_in_the_file_is_believed_before_its_name(tmp_path: Path) -> None:
    sigmas = [1.0, 0.75]
    config = official_metadata(TRANSFORMER_2B, VAE_0_9_5, LINEAR_QUADRATIC, allowed_inference_steps=sigmas)
    info = Checkpoint.open(write_released(tmp_path, "ltx-video-2b-v0.9.1-Q8_0.gguf", **config)).info
    assert (info.release, info.vae_family, info.vae) == (None, "0.9.5", None)
    assert info.schedule == Schedule(sampler="LinearQuadratic", allowed_sigmas=tuple(sigmas))


def test_general_name_is_believed_before_the_file_name(tmp_path: Path) -> None:
    path = write_released(tmp_path, "ltx-video-2b-v0.9.1-Q8_0.gguf", **{"general.name": "ltxv-2b-0.9.6-dev"})
    release = Checkpoint.open(path).info.release
    assert release is not None
    assert release.name == "ltxv-2b-0.9.6-dev"


@pytest.mark.parametrize("architecture", ["ltxv", "pig"])
def test_an_unquantized_file_loads_the_official_weights(tmp_path: Path, architecture: str) -> None:
    module = tiny_models.build_random(lambda: Transformer(SMALL_TRANSFORMER))
    write_single_file(tmp_path / "x.safetensors", transformer=module, schedule=OLD, dtype=torch.float32)
    official = Checkpoint.open(tmp_path / "x.safetensors")
    types = gguf_files.transformer_types(single_file_shapes(SMALL_TRANSFORMER, without_prefix=True), "BF16")
    source = official.sources["transformer"]
    tensors = {name: (source.read(name).numpy(), type_name) for name, (_, type_name) in types.items()}
    path = gguf_files.write_gguf_file(
        tmp_path / "x.gguf", architecture, tensors, official_metadata(SMALL_TRANSFORMER, None, OLD)
    )
    opened = Checkpoint.open(path)
    assert opened.info.transformer == official.info.transformer
    assert opened.info.schedule == OLD
    assert have_same_weights(opened.load_transformer(torch.bfloat16), official.load_transformer(torch.bfloat16))


def test_the_error_for_a_missing_vae_names_a_matching_one(tmp_path: Path) -> None:
    path = write_released(tmp_path, "ltxv-13b-0.9.8-distilled-Q4_K_M.gguf", TRANSFORMER_13B)
    with pytest.raises(
        CheckpointError, match=r"has no vae, only transformer\. Give .* as vae, such as ltxv-13b-0\.9\.8-distilled\.$"
    ):
        Engine.open(path)
    with pytest.raises(CheckpointError, match=r"as vae, such as ltxv-13b-0\.9\.8-distilled\.$"):
        Engine.open(write_released(tmp_path, "unnamed.gguf", TRANSFORMER_13B))
    config = official_metadata(TRANSFORMER_2B, VAE_0_9_5)
    with pytest.raises(CheckpointError, match=r"as vae, such as ltxv-2b-0\.9\.8-distilled\.$"):
        Engine.open(write_released(tmp_path, "own.gguf", **config))


# Text encoders


def test_text_encoder_keys_are_those_of_the_gguf_package() -> None:
    state = build_on_meta(lambda: T5Encoder(SMALL_T5)).state_dict()
    gguf_keys, official_keys = keys.map_keys(keys.T5_GGUF_KEYS, state), keys.map_keys(keys.T5_KEYS, state)
    oracle = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, SMALL_T5.num_layers)
    for name, gguf_key in gguf_keys.items():
        assert f"{oracle.get_name(official_keys[name].removesuffix('.weight'))}.weight" == gguf_key
    shapes = {gguf_key: tuple(state[name].shape) for name, gguf_key in gguf_keys.items()}
    assert shapes == gguf_files.t5_shapes(SMALL_T5)
    assert len(shapes) == len(state) == len(t5_shapes(SMALL_T5))


@pytest.fixture
def text(tmp_path: Path) -> tuple[Path, Path]:
    """An encoder with its tokenizer: in a folder, and in a GGUF file as llama.cpp's converter writes it."""
    encoder = tiny_models.build_random(lambda: T5Encoder(SMALL_T5))
    spiece = tmp_path / "spiece.model"
    spiece.write_bytes(tiny_models.sentencepiece_model())
    write_text_encoder(tmp_path / "folder", encoder, spiece, dtype=torch.float32)
    return tmp_path / "folder", write_text_encoder_gguf(tmp_path / "t5.gguf", encoder, "F32", spiece.read_bytes())


def write_text_encoder_gguf(
    path: Path, encoder: T5Encoder, type_name: str, spiece: bytes = SPIECE, **change: Any
) -> Path:
    state = encoder.state_dict()
    key_map = keys.map_keys(keys.T5_GGUF_KEYS, state)
    types = {name: "F32" if tensor.ndim == 1 or "bias" in name else type_name for name, tensor in state.items()}
    tensors = {key_map[name]: (tensor.numpy(), types[name]) for name, tensor in state.items()}
    fields = gguf_files.t5_fields(encoder.config, spiece) | change
    return gguf_files.write_gguf_file(path, "t5encoder", tensors, {k: v for k, v in fields.items() if v is not None})


def test_a_llama_cpp_text_encoder_opens_with_weights_and_tokenizer(
    text: tuple[Path, Path],
) -> None:
    folder, file = (TextEncoderCheckpoint.open(path) for path in text)
    assert file.config == folder.config == SMALL_T5
    assert have_same_weights(file.load(torch.float32), folder.load(torch.float32))
    for prompt in ("", "a red circle  moving\nright </s> x"):
        assert torch.equal(file.load_tokenizer().encode(prompt).ids, folder.load_tokenizer().encode(prompt).ids)
    assert is_text_encoder(text[1])
    assert file.describe().name == "text encoder"


def test_an_engine_takes_its_text_encoder_from_a_gguf_file(tmp_path: Path) -> None:
    home = tiny_models.write_model(tmp_path / "model")
    encoder = TextEncoderCheckpoint.open(home).load()
    path = write_text_encoder_gguf(tmp_path / "t5.gguf", encoder, "F32", tiny_models.sentencepiece_model())
    engine = Engine.open(home / tiny_models.MODEL_FILE, text_encoder=path)
    assert engine.spec.text_encoder_checkpoint.path == path
    assert engine.spec.component_paths(has_two_passes=False)["text_encoder"] == str(path)


def test_block_quantized_weights_of_a_text_encoder_are_accounted_for(tmp_path: Path) -> None:
    wide = T5Config(vocab_size=128, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=64)
    opened = TextEncoderCheckpoint.open(
        write_text_encoder_gguf(tmp_path / "t5.gguf", tiny_models.build_random(lambda: T5Encoder(wide)), "Q8_0")
    )
    assert opened.describe().dtype == "Q8_0"
    assert opened.describe().type_counts == {"Q8_0": 15, "float32": 6}
    module = build_on_meta(lambda: T5Encoder(wide))
    account(module, opened.source, keys.map_keys(opened.key_table, module.state_dict()))


@pytest.mark.parametrize("num_real", [24, 9, 1])
def test_block_quantized_text_encoder_leaves_out_padding(tmp_path: Path, num_real: int) -> None:
    wide = T5Config(vocab_size=128, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=64)
    opened = TextEncoderCheckpoint.open(
        write_text_encoder_gguf(tmp_path / "t5.gguf", tiny_models.build_random(lambda: T5Encoder(wide)), "Q8_0")
    )
    ids, mask = torch.arange(24)[None] + 3, torch.arange(24)[None] < num_real
    stored, dequantized = opened.load(torch.float32, keep_storage_dtype=True), opened.load(torch.float32)
    assert isinstance(stored.blocks[0].attention.q, DequantizingLinear)
    with torch.inference_mode():
        actual, expected = stored(ids, mask), dequantized._encode(ids, mask)
    assert relative_error(actual[mask], expected[mask]) < 1e-5
    assert actual[~mask].eq(0).all()


def test_a_tokenizer_that_is_not_in_the_file_is_read_beside_it(tmp_path: Path) -> None:
    path = write_text_encoder_gguf(
        tmp_path / "t5.gguf",
        tiny_models.build_random(lambda: T5Encoder(SMALL_T5)),
        "F16",
        **{"tokenizer.ggml.model": None},
    )
    opened = TextEncoderCheckpoint.open(path)
    with pytest.raises(CheckpointError, match="There is no tokenizer for"):
        opened.load_tokenizer()
    (tmp_path / "spiece.model").write_bytes(tiny_models.sentencepiece_model())
    assert opened.load_tokenizer().vocab_size == 40


@pytest.mark.parametrize(
    "change, error",
    [
        ({"t5encoder.block_count": None}, "lacks block_count of a T5 encoder"),
        (
            {"t5encoder.embedding_length": None, "t5encoder.feed_forward_length": None},
            "lacks embedding_length, feed_fo",
        ),
        ({"t5encoder.attention.head_count": 0}, r"t5\.gguf: The text encoder's num_heads is 0"),
        ({"t5encoder.block_count": 3}, r"tensors missing: enc\.blk\.2\.attn_norm\.weight"),
        ({"t5encoder.block_count": 1}, r"9 tensors unexpected: enc\.blk\.1\.attn_k\.weight"),
        ({"tokenizer.ggml.model": "gpt2"}, "has a tokenizer that is not T5's.*'gpt2'"),
        ({"tokenizer.ggml.scores": None}, "is incomplete"),
        ({"tokenizer.ggml.scores": [0.5]}, "tokenizer is damaged: .* differ in number: 160, 1, 160"),
    ],
)
def test_an_incomplete_text_encoder_is_refused(tmp_path: Path, change: Mapping[str, Any], error: str) -> None:
    path = write_text_encoder_gguf(
        tmp_path / "t5.gguf", tiny_models.build_random(lambda: T5Encoder(SMALL_T5)), "F16", **change
    )

    def open_and_load() -> None:
        opened = TextEncoderCheckpoint.open(path)
        opened.load_tokenizer()
        opened.load(torch.float32)

    with pytest.raises(CheckpointError, match=error):
        open_and_load()


# Files of other kinds


@pytest.mark.parametrize(
    "architecture, name, fields, error",
    [
        (
            "llama",
            "blk.0.attn_q.weight",
            {"llama.context_length": 8},
            r"a language model \(its architecture is llama\)",
        ),
        ("qwen3", "token_embd.weight", {"tokenizer.ggml.model": "gpt2"}, "a language model"),
        (
            "flux",
            "double_blocks.0.img_mlp.0.weight",
            {},
            r"another family \(its architecture is flux\).*0\.9 to 0\.9\.8",
        ),
        ("t5", "enc.blk.0.attn_q.weight", {}, "a whole T5.*Use the encoder alone"),
        ("t5encoder", "enc.blk.0.attn_q.weight", {}, "is a T5 text encoder, not a model.*text_encoder"),
        ("ltxv", "audio_adaln_single.linear.weight", {}, "is LTX-2, another family"),
        ("pig", "model.layers.0.self_attn.q_proj.weight", {}, "not a checkpoint of the LTX-Video family"),
        ("ltxv", "x", {"split.count": 3}, "one of 3 splits.*gguf-split --merge"),
        ("ltxv", "x", {"general.alignment": 33}, "aligned to 33 bytes"),
        ("ltxv", "x", {"split.count": "3"}, "its header cannot be read"),
        ("ltxv", "x", {"comfy.gguf.orig_shape.x": [5]}, r"original shape is given as \[5\]"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_its_kind(
    tmp_path: Path, architecture: str, name: str, fields: Mapping[str, Any], error: str
) -> None:
    path = gguf_files.write_gguf_file(tmp_path / "x.gguf", architecture, {name: (random_values(4, 32), "Q8_0")}, fields)
    with pytest.raises(CheckpointError, match=error):
        Checkpoint.open(path)


def test_a_transformer_is_not_a_text_encoder(tmp_path: Path) -> None:
    path = write_released(tmp_path, "x.gguf")
    with pytest.raises(CheckpointError, match=r"not a text encoder: its architecture is ltxv.*model.*q8-gguf"):
        TextEncoderCheckpoint.open(path)
    assert not is_text_encoder(path)


@pytest.mark.parametrize("kind", ["IQ4_XS", "TQ1_0", "F64", "Q8_K"])
def test_an_unsupported_type_is_refused_with_the_supported_ones(tmp_path: Path, kind: str) -> None:
    path = gguf_files.write_sparse_gguf(tmp_path / "x.gguf", "ltxv", {"a": ((2, 256), "Q8_0"), "odd": ((2, 256), kind)})
    with pytest.raises(CheckpointError, match=rf"tensor odd is stored as {kind}, which .* Q6_K, .*Use a file .*Q4_K_M"):
        Checkpoint.open(path)


def write_small_file(tmp_path: Path) -> Path:
    fields = {"config": "{}", "list": ["a", "bc"], "numbers": [1, 2], "ratio": 0.5}
    return gguf_files.write_gguf_file(
        tmp_path / "x.gguf", "ltxv", {"a": (random_values(4, 64), "Q8_0"), "b": (random_values(9), "F32")}, fields
    )


def overwrite(path: Path, at: int, *new: int) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = bytes(new)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "new, error", [((1,), "version 1 of the format"), ((0, 0, 0, 3), "is big-endian"), ((9,), "version 9")]
)
def test_an_unsupported_format_version_is_refused(tmp_path: Path, new: tuple[int, ...], error: str) -> None:
    path = write_small_file(tmp_path)
    overwrite(path, 4, *new)
    with pytest.raises(CheckpointError, match=error):
        Source.open(path)


def test_an_unknown_type_is_named_by_its_id(tmp_path: Path) -> None:
    path = write_small_file(tmp_path)
    at = path.read_bytes().index(b"\x01\0\0\0\0\0\0\0b") + 9 + 4 + 8  # behind the name, the count of axes and the axis
    overwrite(path, at, 201)
    with pytest.raises(CheckpointError, match="tensor b is stored as GGML type 201"):
        Source.open(path)


def test_a_file_truncated_anywhere_is_refused_as_truncated(tmp_path: Path) -> None:
    path = write_small_file(tmp_path)
    whole = path.read_bytes()
    expected_size = max(info.file_offset + info.size_bytes for info in Source.open(path).infos.values())
    for size in range(4, expected_size, 7):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"is truncated: .* bytes.*Download it again"):
            Source.open(path)


def test_more_entries_and_strings_than_any_model_has_are_refused(tmp_path: Path) -> None:
    path, name = tmp_path / "x.gguf", struct.pack("<Q", 1) + b"a"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 17, 0))
    with pytest.raises(CheckpointError, match="it states 131072 tensors"):
        read_gguf_header(path)
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + name + struct.pack("<IIQ", 9, 8, 1 << 21) + bytes(8 << 21)
    )
    with pytest.raises(CheckpointError, match="it states 2097152 strings in an array"):
        read_gguf_header(path)


def test_a_damaged_header_opens_or_raises_a_checkpoint_error(tmp_path: Path) -> None:
    path = write_small_file(tmp_path)
    whole, rng = path.read_bytes(), random.Random(0)
    end = min(info.file_offset for info in Source.open(path).infos.values())
    num_refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.randrange(4, end)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            source = Source.open(path)
        except CheckpointError:
            num_refused += 1
        else:
            assert all(isinstance(source.read(name), Tensor) for name in source.infos)
    assert num_refused > 100


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write_small_file(tmp_path)
    overwrite(path, path.read_bytes().index(b"\x01\0\0\0\0\0\0\0b") + 8, ord("a"))
    with pytest.raises(CheckpointError, match="two tensors have the same name"):
        Source.open(path)


@pytest.mark.parametrize("read", [Checkpoint.open, TextEncoderCheckpoint.open])
def test_a_gguf_file_is_recognized_by_its_magic_bytes(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = write_small_file(tmp_path).rename(tmp_path / "x.safetensors")
    assert Source.open(path).infos.keys() == {"a", "b"}
    with pytest.raises(CheckpointError):
        read(path)
