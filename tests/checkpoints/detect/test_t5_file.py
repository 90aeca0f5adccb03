"""A T5 encoder in a .safetensors opens to the same module as its transformers folder, within its storage dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.save import write_text_encoder
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint, is_text_encoder
from kadr.errors import CheckpointError
from kadr.models.t5 import T5Encoder
from tests.checkpoints import text_encoder_files as files
from tests.checkpoints.checkpoint_files import SMALL_T5
from tests.tiny_models import build_random, sentencepiece_model

STORED: dict[str, Callable[[files.Tensors], files.Tensors]] = {
    "t5xxl_fp16": files.in_fp16,
    "t5xxl_fp8_e4m3fn": files.in_fp8,
    "t5xxl_fp8_e4m3fn_scaled": files.in_scaled_fp8,
    "t5xxl_mixed": files.in_mixed_precision,
}


@pytest.fixture(scope="module")
def encoder() -> T5Encoder:
    return build_random(lambda: T5Encoder(SMALL_T5))


@pytest.fixture
def tensors(encoder: T5Encoder) -> files.Tensors:
    return files.encoder_tensors(encoder)


def load(path: Path, dtype: torch.dtype = torch.float32, **options: bool) -> dict[str, torch.Tensor]:
    return TextEncoderCheckpoint.open(path).load(dtype, **options).state_dict()


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("prefix", ["", "t5xxl.transformer.", "text_encoders.t5xxl.transformer."])
def test_a_file_opens_to_the_module_of_its_weights(
    tmp_path: Path, tensors: files.Tensors, name: str, prefix: str
) -> None:
    stored = STORED[name](tensors)
    path = files.write(tmp_path / f"{name}.safetensors", files.with_prefix(prefix, stored))
    opened = TextEncoderCheckpoint.open(path)
    assert opened.config == SMALL_T5
    reference = build_random(lambda: T5Encoder(SMALL_T5), seed=9)
    expected = files.dequantize(stored)
    for dtype in (torch.float32, torch.bfloat16):
        state = opened.load(dtype).state_dict()
        assert list(state) == list(reference.state_dict())
        for key, file_key in files.map_keys(files.T5_KEYS, state).items():
            assert torch.equal(state[key], expected[file_key].to(dtype)), key


def test_a_file_in_fp32_equals_the_folder(tmp_path: Path, encoder: T5Encoder, tensors: files.Tensors) -> None:
    (tmp_path / "spiece.model").write_bytes(sentencepiece_model())
    write_text_encoder(tmp_path / "home", encoder, tmp_path / "spiece.model", dtype=torch.float32)
    folder = TextEncoderCheckpoint.open(tmp_path / "home")
    file = TextEncoderCheckpoint.open(files.write(tmp_path / "t5xxl.safetensors", tensors))
    assert file.config == folder.config
    ids, mask = torch.arange(8)[None] % 40, torch.ones(1, 8, dtype=torch.bool)
    with torch.inference_mode():
        of_file, of_folder = (opened.load(torch.float32)(ids, mask) for opened in (file, folder))
    assert torch.allclose(of_file, of_folder, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_real", [8, 5, 1])
@pytest.mark.parametrize("name", STORED)
def test_weights_in_their_storage_dtype_compute_the_same(
    tmp_path: Path, tensors: files.Tensors, name: str, num_real: int
) -> None:
    opened = TextEncoderCheckpoint.open(files.write(tmp_path / "x.safetensors", STORED[name](tensors)))
    ids, mask = torch.arange(8)[None] % 40, torch.arange(8)[None] < num_real
    with torch.inference_mode():
        stored, converted = (opened.load(torch.bfloat16, keep_storage_dtype=keep)(ids, mask) for keep in (True, False))
    assert torch.equal(stored, converted)


def test_the_embedding_may_have_only_its_tied_name_and_comfy_adds_a_scale(
    tmp_path: Path, tensors: files.Tensors
) -> None:
    tied = {("encoder.embed_tokens.weight" if name == "shared.weight" else name): t for name, t in tensors.items()}
    path = files.write(tmp_path / "x.safetensors", tied | {"logit_scale": torch.ones(())})
    assert torch.equal(load(path)["embedding.weight"], tensors["shared.weight"])


def test_a_strange_tensor_in_a_file_is_refused(tmp_path: Path, tensors: files.Tensors) -> None:
    path = files.write(tmp_path / "x.safetensors", tensors | {"lm_head.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match=r"1 tensors unexpected: lm_head\.weight"):
        load(path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": (32, 2)}, "umT5"),
        ({"encoder.block.0.layer.1.DenseReluDense.wi.weight": (48, 32)}, "the first T5"),
        ({"shared.weight": None}, r"has no matrix shared\.weight"),
        ({"shared.weight": (160,)}, r"has no matrix shared\.weight"),
        ({"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 3)}, "3 heads, which do not"),
        ({"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 0)}, "0 heads"),
        ({"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (3, 2)}, "a multiple of 4"),
    ],
)
def test_another_encoder_is_refused_with_its_kind(
    tmp_path: Path, tensors: files.Tensors, change: dict[str, tuple[int, ...] | None], error: str
) -> None:
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=error):
        TextEncoderCheckpoint.open(files.write(tmp_path / "x.safetensors", tensors))


def test_an_encoders_file_is_told_from_a_models(tmp_path: Path, tensors: files.Tensors) -> None:
    alone = files.write(tmp_path / "t5.safetensors", tensors)
    prefixed = files.write(tmp_path / "p.safetensors", files.with_prefix("text_encoders.t5xxl.transformer.", tensors))
    other = files.write(tmp_path / "x.safetensors", {"model.diffusion_model.proj_out.bias": torch.ones(2)})
    whole = files.write(
        tmp_path / "all.safetensors",
        {"vae.decoder.conv_in.conv.bias": torch.ones(2)}
        | files.with_prefix("text_encoders.t5xxl.transformer.", tensors),
    )
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no header")
    found = [is_text_encoder(path) for path in (alone, prefixed, other, whole, broken, tmp_path / "none.safetensors")]
    assert found == [True, True, False, False, False, False]
    for path in (alone, prefixed):
        with pytest.raises(CheckpointError, match=r"is a T5 text encoder, not a model.*text_encoder"):
            Checkpoint.open(path)
    with pytest.raises(CheckpointError, match=r"has no T5 text encoder in it, but .*proj_out.*text_encoder"):
        TextEncoderCheckpoint.open(other)


def test_a_folder_without_config_names_the_files_in_it(tmp_path: Path, tensors: files.Tensors) -> None:
    files.write(tmp_path / "text_encoders" / "t5xxl_fp16.safetensors", files.in_fp16(tensors))
    with pytest.raises(CheckpointError, match=r"one of those in it: t5xxl_fp16\.safetensors") as error:
        TextEncoderCheckpoint.open(tmp_path / "text_encoders")
    name = str(error.value).rpartition(": ")[2].rstrip(".")
    assert replace(TextEncoderCheckpoint.open(tmp_path / "text_encoders" / name).config) == SMALL_T5
