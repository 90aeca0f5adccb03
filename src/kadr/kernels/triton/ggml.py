"""Dequantizes the GGML block formats that most files use; `dequant` describes their layouts."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kadr.kernels.ggml_types import GGMLType
from kadr.kernels.triton.common import device_of, warps_for

GGML_ELEMENTS_PER_PROGRAM = 4096


@triton.jit
def _load_fp16(at):
    """Loads the float16 at the address `at` as fp32, byte by byte: blocks need not be aligned."""
    lower, upper = tl.load(at).to(tl.uint16), tl.load(at + 1).to(tl.uint16)
    return (lower | (upper << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _q8_0(block):
    """Dequantizes blocks at the addresses (N, 1) -> (N, 32)."""
    code = tl.load(block + 2 + tl.arange(0, 32)[None]).to(tl.int8, bitcast=True)
    return code.to(tl.float32) * _load_fp16(block)


@triton.jit
def _q4_k(block):
    """Dequantizes blocks at (N, 1, 1, 1) -> (N, 4, 2, 32): pairs of groups that share bytes, group of a pair, code."""
    pair = tl.arange(0, 4)[None, :, None, None]
    upper = tl.arange(0, 2)[None, None, :, None]
    group = pair * 2 + upper
    # Groups 0 to 3 have 6 bits of scale and of offset in one byte each; groups 4 to 7 have 4 bits in one, 2 in another.
    is_split = group >= 4
    first = tl.load(block + 4 + group % 4).to(tl.int32)
    second = tl.load(block + 8 + group % 4).to(tl.int32)
    third = tl.load(block + 12 + group % 4).to(tl.int32)
    scale = tl.where(is_split, (third & 15) | ((first >> 6) << 4), first & 63)
    offset = tl.where(is_split, (third >> 4) | ((second >> 6) << 4), second & 63)
    scale = scale.to(tl.float32) * _load_fp16(block)
    offset = offset.to(tl.float32) * _load_fp16(block + 2)
    packed = tl.load(block + 16 + pair * 32 + tl.arange(0, 32)[None, None, None]).to(tl.int32)
    return ((packed >> (4 * upper)) & 15).to(tl.float32) * scale - offset


@triton.jit
def _q6_k(block):
    """Dequantizes blocks at (N, 1, 1, 1) -> (N, 2, 4, 32): half of a block, quarter of a half, code."""
    half = tl.arange(0, 2)[None, :, None, None]
    quarter = tl.arange(0, 4)[None, None, :, None]
    code = tl.arange(0, 32)[None, None, None]
    lower = tl.load(block + half * 64 + (quarter % 2) * 32 + code).to(tl.int32) >> (4 * (quarter // 2))
    upper = tl.load(block + 128 + half * 32 + code).to(tl.int32) >> (2 * quarter)
    value = ((lower & 15) | ((upper & 3) << 4)) - 32
    scale = tl.load(block + 192 + half * 8 + quarter * 2 + code // 16).to(tl.int8, bitcast=True)
    return value.to(tl.float32) * (scale.to(tl.float32) * _load_fp16(block + 208))


@triton.jit
def _dequantize(
    out,
    quantized_weight,
    blocks,  # per row
    out_row,  # row strides, in elements and in bytes
    weight_row,
    TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
):
    """Dequantizes some blocks of one row; past its end it loads the last block again and does not store it."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCKS_PER_PROGRAM + tl.arange(0, BLOCKS_PER_PROGRAM)
    start = quantized_weight + row * weight_row + tl.minimum(index, blocks - 1) * TYPE_SIZE
    if TYPE == "Q8_0":
        values = _q8_0(start[:, None])
    elif TYPE == "Q4_K":
        values = _q4_k(start[:, None, None, None])
    else:
        values = _q6_k(start[:, None, None, None])
    values = tl.reshape(values, (BLOCKS_PER_PROGRAM, BLOCK_SIZE)).to(out.dtype.element_ty)
    address = out + row * out_row + index[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None]
    tl.store(address, values, (index < blocks)[:, None])


def dequantize(quantized_weight: Tensor, ggml_type: GGMLType, out: Tensor) -> Tensor:
    """See `dequant.dequantize`. ggml_type: one of `fused.GGML_KERNEL_TYPES`."""
    rows, columns = out.shape
    blocks = columns // ggml_type.block_size
    blocks_per_program = GGML_ELEMENTS_PER_PROGRAM // ggml_type.block_size
    with device_of(out):
        _dequantize[(rows, triton.cdiv(blocks, blocks_per_program))](
            out,
            quantized_weight,
            blocks,
            out.stride(0),
            quantized_weight.stride(0),
            TYPE=ggml_type.name,
            BLOCK_SIZE=ggml_type.block_size,
            TYPE_SIZE=ggml_type.type_size,
            BLOCKS_PER_PROGRAM=blocks_per_program,
            num_warps=warps_for(GGML_ELEMENTS_PER_PROGRAM),
        )
    return out
