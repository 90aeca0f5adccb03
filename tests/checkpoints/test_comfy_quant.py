"""Marked layers of ComfyUI's mixed precision are read exactly, or refused by the name of their format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.keys import TRANSFORMER_KEYS, map_keys
from kadr.errors import CheckpointError
from tests.checkpoints import text_encoder_files as files
from tests.tiny_models import MODEL_FILE, write_model

LAYER = "model.diffusion_model.transformer_blocks.0.attn1.to_q"
COMFY_PREFIX = "diffusion_model."


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tensors(home: Path) -> files.Tensors:
    return load_file(home / MODEL_FILE)


@pytest.fixture
def metadata(home: Path) -> dict[str, str]:
    return {"config": json.dumps(json.loads(Checkpoint.open(home / MODEL_FILE).sources["vae"].metadata["config"]))}


def is_linear(name: str, tensor: Tensor) -> bool:
    return "transformer_blocks." in name and tensor.ndim == 2 and name.endswith(".weight")


def test_marked_layers_are_multiplied_by_their_scales(
    tmp_path: Path, tensors: files.Tensors, metadata: dict[str, str]
) -> None:
    stored = files.in_mixed_precision(tensors, is_linear)
    expected = files.dequantize(stored)
    path = files.write(tmp_path / "mixed.safetensors", stored, metadata)
    assert sum(name.endswith(".comfy_quant") for name in stored) == 10
    for keep_storage_dtype in (False, True):
        Checkpoint.open(path).load_transformer(torch.bfloat16, keep_storage_dtype=keep_storage_dtype)
    state = Checkpoint.open(path).load_transformer(torch.float32).state_dict()
    for key, file_key in map_keys(TRANSFORMER_KEYS, state).items():
        assert torch.equal(state[key], expected[f"model.diffusion_model.{file_key}"]), key


def test_marks_in_the_header_are_read_too(tmp_path: Path, tensors: files.Tensors, metadata: dict[str, str]) -> None:
    stored = files.in_mixed_precision(tensors, is_linear)
    layers = {
        name.removesuffix(".comfy_quant").removeprefix("model.diffusion_model."): {"format": "float8_e4m3fn"}
        for name in stored
        if name.endswith(".comfy_quant")
    }
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith(".comfy_quant")}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    path = files.write(tmp_path / "mixed.safetensors", stored, metadata | header)
    state = Checkpoint.open(path).load_transformer(torch.float32).state_dict()
    key = map_keys(TRANSFORMER_KEYS, state)
    expected = files.dequantize(stored)
    assert all(torch.equal(state[name], expected[f"model.diffusion_model.{key[name]}"]) for name in state)
    layers["transformer_blocks.0.attn1.to_q"] = {"format": "int8_blockwise", "group_size": 128}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    with pytest.raises(CheckpointError, match="the format 'int8_blockwise'"):
        Checkpoint.open(files.write(tmp_path / "int8.safetensors", stored, metadata | header))


@pytest.mark.parametrize(
    ("marker", "error"),
    [
        (files.mark(format="nvfp4"), r"attn1\.to_q' has the format 'nvfp4'; kadr reads float8_e4m3fn and float8_e5m2"),
        (files.mark(format="int8_tensorwise"), "the format 'int8_tensorwise'"),
        (files.mark(format="float8_e5m2"), "the format 'float8_e5m2' and a weight in float8_e4m3fn"),
        (files.mark(format="float8_e4m3fn", convrot=True), "'convrot' in its mark"),
        (files.mark(format=8), "a mark that is not a format"),
        (files.mark(), "a mark that is not a format"),
        (torch.tensor(list(b"[]"), dtype=torch.uint8), "a mark that is not a format"),
        (torch.tensor(list(b"{"), dtype=torch.uint8), "is not JSON"),
        (torch.tensor(list(b"[" * 4000), dtype=torch.uint8), "is not JSON"),
        (torch.zeros(5000, dtype=torch.uint8), "has 5,000 bytes, more than the 4,096"),
        (files.mark(format="\x1b[31m" + "x" * 500), r"the format '\\x1b\[31mxxx[x]*\.\.\."),
    ],
)
def test_a_mark_that_is_not_understood_is_refused(
    tmp_path: Path, tensors: files.Tensors, metadata: dict[str, str], marker: Tensor, error: str
) -> None:
    stored = files.in_mixed_precision(tensors, lambda name, tensor: name == f"{LAYER}.weight")
    stored[f"{LAYER}.comfy_quant"] = marker
    with pytest.raises(CheckpointError, match=error) as refusal:
        Checkpoint.open(files.write(tmp_path / "x.safetensors", stored, metadata))
    text = str(refusal.value)
    assert text.isprintable()
    assert len(text) - len(str(tmp_path)) < 450


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({".weight_scale": None}, "and no weight_scale"),
        ({".weight_scale": torch.ones(3)}, "a weight_scale of 3 values for 64 rows"),
        ({".weight": None}, "a mark and no weight"),
    ],
)
def test_a_marked_layer_without_what_its_format_needs_is_refused(
    tmp_path: Path, tensors: files.Tensors, metadata: dict[str, str], change: dict[str, Tensor | None], error: str
) -> None:
    stored = files.in_mixed_precision(tensors, lambda name, tensor: name == f"{LAYER}.weight")
    for suffix, tensor in change.items():
        del stored[LAYER + suffix]
        stored |= {} if tensor is None else {LAYER + suffix: tensor}
    with pytest.raises(CheckpointError, match=error):
        Checkpoint.open(files.write(tmp_path / "x.safetensors", stored, metadata))


def test_the_bare_prefix_of_comfy_opens_to_the_same_modules(
    tmp_path: Path, home: Path, tensors: files.Tensors, metadata: dict[str, str]
) -> None:
    renamed = {name.replace("model.diffusion_model.", COMFY_PREFIX): tensor for name, tensor in tensors.items()}
    assert any(name.startswith(COMFY_PREFIX) for name in renamed)
    bare = Checkpoint.open(files.write(tmp_path / "bare.safetensors", renamed, metadata))
    official = Checkpoint.open(home / MODEL_FILE)
    assert bare.info == official.info
    for name in ("load_transformer", "load_vae"):
        state, expected = (getattr(opened, name)().state_dict() for opened in (bare, official))
        assert list(state) == list(expected)
        assert all(torch.equal(state[key], expected[key]) for key in state)
    both = renamed | {"model.diffusion_model.proj_out.bias": torch.ones(8)}
    with pytest.raises(CheckpointError, match=r"model\.diffusion_model\.proj_out\.bias"):
        Checkpoint.open(files.write(tmp_path / "both.safetensors", both, metadata))
