"""Numbers out of GGML's blocks: bit for bit those of the gguf package."""

from __future__ import annotations

import mmap
from pathlib import Path

import gguf
import pytest
import torch

from kadr.kernels import dequant
from kadr.kernels.dequant import dequantize
from kadr.kernels.ggml_types import GGML_TYPES

HALVES = {  # where the float16 of a block start
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


def any_bytes(name: str, rows: int, blocks: int) -> torch.Tensor:
    """Blocks of random bytes: every code and every scale, as long as its float16 is finite."""
    packing, generator = GGML_TYPES[name], torch.Generator().manual_seed(len(name) + rows)
    made = torch.randint(0, 256, (rows, blocks, packing.type_size), dtype=torch.uint8, generator=generator)
    for start in HALVES[name]:
        upper = made[..., start + 1]
        upper[(upper & 0x7C) == 0x7C] ^= 0x40
    return made.flatten(1)


def by_gguf(packed: torch.Tensor, name: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("name", GGML_TYPES)
def test_any_bytes_become_the_numbers_of_gguf_rounded_once(name: str, dtype: torch.dtype) -> None:
    packed = any_bytes(name, 7, 9)
    right = by_gguf(packed, name).to(dtype)
    made = dequantize(packed, GGML_TYPES[name], torch.empty(right.shape, dtype=dtype))
    assert torch.equal(made.view(BITS[dtype]), right.view(BITS[dtype]))  # signs of zeros, and infinities, too


@pytest.mark.parametrize("name", GGML_TYPES)
def test_pieces_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = any_bytes(name, 5, 4)
    right = by_gguf(packed, name)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for piece in (1, right.shape[1]):  # a row at a time, and two with one left over
        monkeypatch.setattr(dequant, "CPU_SLICE_ELEMENTS", piece)
        assert torch.equal(dequantize(packed, GGML_TYPES[name], torch.full_like(right, torch.nan)), right)


@pytest.mark.parametrize("name", GGML_TYPES)
def test_a_part_of_a_buffer_is_filled_and_the_rest_of_it_left(name: str) -> None:
    packed = any_bytes(name, 3, 2)
    right = by_gguf(packed, name).bfloat16()
    buffer = torch.full((4, right.shape[1] + 32), 7.0, dtype=torch.bfloat16)
    part = buffer[1:, 32:]
    for _ in range(2):  # what the first run left does not matter to the second
        assert dequantize(packed, GGML_TYPES[name], part) is part
        assert torch.equal(part, right)
    assert (buffer[0] == 7).all()
    assert (buffer[:, :32] == 7).all()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", GGML_TYPES)
def test_a_mapped_file_is_only_read(name: str, rows: int, tmp_path: Path) -> None:
    """One block is a case of its own: as a matrix it is contiguous whichever way it is turned."""
    packed = any_bytes(name, rows, 1)
    (tmp_path / "weights").write_bytes(packed.numpy().tobytes())
    with (tmp_path / "weights").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # a write would not fail, and would be seen
    view = torch.frombuffer(mapped, dtype=torch.uint8).view(rows, -1)
    dequantize(view, GGML_TYPES[name], torch.empty(rows, GGML_TYPES[name].block_size))
    assert torch.equal(view, packed)


def test_rows_in_a_wider_buffer_are_unpacked() -> None:
    packed = any_bytes("Q6_K", 3, 4)
    part = packed[:, 210:630]
    assert torch.equal(dequantize(part, GGML_TYPES["Q6_K"], torch.empty(3, 512)), by_gguf(part.contiguous(), "Q6_K"))


def test_no_rows_make_no_numbers() -> None:
    made = dequantize(torch.empty(0, 288, dtype=torch.uint8), GGML_TYPES["Q4_K"], torch.empty(0, 512))
    assert made.shape == (0, 512)


@pytest.mark.parametrize("shape", [(3, 512), (2, 256), (2, 768)])
def test_a_buffer_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"Q4_K of shape \(2, 288\) does not dequantize to"):
        dequantize(torch.zeros(2, 288, dtype=torch.uint8), GGML_TYPES["Q4_K"], torch.empty(shape))


def test_half_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide into Q4_K blocks"):
        dequantize(torch.zeros(2, 72, dtype=torch.uint8), GGML_TYPES["Q4_K"], torch.empty(2, 128))
