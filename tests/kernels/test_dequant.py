"""Dequantizing GGML's blocks gives the values of the gguf package, bit for bit."""

from __future__ import annotations

import mmap
from pathlib import Path

import gguf
import pytest
import torch

from kadr.kernels import dequant
from kadr.kernels.dequant import dequantize
from kadr.kernels.ggml_types import GGML_TYPES

FP16_OFFSETS = {  # byte offsets of the float16 factors in a block
    "Q8_0": (0,),
    "Q6_K": (208,),
    "Q5_K": (0, 2),
    "Q5_1": (0, 2),
    "Q5_0": (0,),
    "Q4_K": (0, 2),
    "Q4_1": (0, 2),
    "Q4_0": (0,),
    "Q3_K": (108,),
    "Q2_K": (80, 82),
}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def random_blocks(name: str, rows: int, blocks: int) -> torch.Tensor:
    """Returns blocks of random bytes: every code and every scale, as long as its float16 is finite."""
    ggml_type, generator = GGML_TYPES[name], torch.Generator().manual_seed(len(name) + rows)
    output = torch.randint(0, 256, (rows, blocks, ggml_type.type_size), dtype=torch.uint8, generator=generator)
    for start in FP16_OFFSETS[name]:
        upper = output[..., start + 1]
        upper[(upper & 0x7C) == 0x7C] ^= 0x40
    return output.flatten(1)


def dequantize_by_gguf(quantized: torch.Tensor, name: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(quantized.numpy(), gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("name", GGML_TYPES)
def test_any_bytes_dequantize_to_ggufs_values_rounded_once(name: str, dtype: torch.dtype) -> None:
    quantized = random_blocks(name, 7, 9)
    expected = dequantize_by_gguf(quantized, name).to(dtype)
    output = dequantize(quantized, GGML_TYPES[name], torch.empty(expected.shape, dtype=dtype))
    assert torch.equal(output.view(BITS[dtype]), expected.view(BITS[dtype]))  # signs of zeros, and infinities, too


@pytest.mark.parametrize("name", GGML_TYPES)
def test_the_slice_size_does_not_change_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = random_blocks(name, 5, 4)
    expected = dequantize_by_gguf(quantized, name)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for slice_elements in (1, expected.shape[1]):  # one row at a time; two with a remainder of one
        monkeypatch.setattr(dequant, "CPU_SLICE_ELEMENTS", slice_elements)
        assert torch.equal(dequantize(quantized, GGML_TYPES[name], torch.full_like(expected, torch.nan)), expected)


@pytest.mark.parametrize("name", GGML_TYPES)
def test_a_view_of_a_buffer_is_filled_and_the_rest_unchanged(name: str) -> None:
    quantized = random_blocks(name, 3, 2)
    expected = dequantize_by_gguf(quantized, name).bfloat16()
    buffer = torch.full((4, expected.shape[1] + 32), 7.0, dtype=torch.bfloat16)
    view = buffer[1:, 32:]
    for _ in range(2):  # the output of the first run does not change the second
        assert dequantize(quantized, GGML_TYPES[name], view) is view
        assert torch.equal(view, expected)
    assert (buffer[0] == 7).all()
    assert (buffer[:, :32] == 7).all()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", GGML_TYPES)
def test_a_mapped_file_is_only_read(name: str, rows: int, tmp_path: Path) -> None:
    """A single block is a special case: it is contiguous transposed too."""
    quantized = random_blocks(name, rows, 1)
    (tmp_path / "weights").write_bytes(quantized.numpy().tobytes())
    with (tmp_path / "weights").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # a write would succeed, and would show
    mapped_blocks = torch.frombuffer(mapped, dtype=torch.uint8).view(rows, -1)
    dequantize(mapped_blocks, GGML_TYPES[name], torch.empty(rows, GGML_TYPES[name].block_size))
    assert torch.equal(mapped_blocks, quantized)


def test_rows_of_a_wider_buffer_are_dequantized() -> None:
    quantized = random_blocks("Q6_K", 3, 4)
    view = quantized[:, 210:630]
    assert torch.equal(
        dequantize(view, GGML_TYPES["Q6_K"], torch.empty(3, 512)), dequantize_by_gguf(view.contiguous(), "Q6_K")
    )


def test_no_rows_dequantize_to_no_values() -> None:
    output = dequantize(torch.empty(0, 288, dtype=torch.uint8), GGML_TYPES["Q4_K"], torch.empty(0, 512))
    assert output.shape == (0, 512)


@pytest.mark.parametrize("shape", [(3, 512), (2, 256), (2, 768)])
def test_an_out_buffer_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"Q4_K of shape \(2, 288\) does not dequantize to"):
        dequantize(torch.zeros(2, 288, dtype=torch.uint8), GGML_TYPES["Q4_K"], torch.empty(shape))


def test_half_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide into Q4_K blocks"):
        dequantize(torch.zeros(2, 72, dtype=torch.uint8), GGML_TYPES["Q4_K"], torch.empty(2, 128))
