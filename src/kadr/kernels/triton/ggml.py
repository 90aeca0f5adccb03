"""Numbers out of the block formats of GGML that most files use; `dequant` says their layouts in words."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kadr.kernels.ggml_types import GGMLType
from kadr.kernels.triton.common import device_of, warps_for

ELEMENTS_PER_PROGRAM = 4096  # that a program unpacks


@triton.jit
def _load_fp16(at):
    """The float16 whose two bytes begin at `at`, in fp32. Bytewise: a block may begin at any."""
    lower, upper = tl.load(at).to(tl.uint16), tl.load(at + 1).to(tl.uint16)
    return (lower | (upper << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _q8_0(block):
    """block (N, 1): where each begins -> (N, 32)."""
    code = tl.load(block + 2 + tl.arange(0, 32)[None]).to(tl.int8, bitcast=True)
    return code.to(tl.float32) * _load_fp16(block)


@triton.jit
def _q4_k(block):
    """block (N, 1, 1, 1) -> (N, 4, 2, 32): pairs of groups that share their bytes, the group in the pair, the code."""
    pair = tl.arange(0, 4)[None, :, None, None]
    upper = tl.arange(0, 2)[None, None, :, None]
    group = pair * 2 + upper
    # The first four groups have 6 bits of scale and of offset each; of the others, 4 lie together and 2 above those.
    late = group >= 4
    first = tl.load(block + 4 + group % 4).to(tl.int32)
    second = tl.load(block + 8 + group % 4).to(tl.int32)
    third = tl.load(block + 12 + group % 4).to(tl.int32)
    scale = tl.where(late, (third & 15) | ((first >> 6) << 4), first & 63)
    offset = tl.where(late, (third >> 4) | ((second >> 6) << 4), second & 63)
    scale = scale.to(tl.float32) * _load_fp16(block)
    offset = offset.to(tl.float32) * _load_fp16(block + 2)
    packed = tl.load(block + 16 + pair * 32 + tl.arange(0, 32)[None, None, None]).to(tl.int32)
    return ((packed >> (4 * upper)) & 15).to(tl.float32) * scale - offset


@triton.jit
def _q6_k(block):
    """block (N, 1, 1, 1) -> (N, 2, 4, 32): halves of a block, quarters of a half, the code."""
    half = tl.arange(0, 2)[None, :, None, None]
    quarter = tl.arange(0, 4)[None, None, :, None]
    code = tl.arange(0, 32)[None, None, None]
    lower = tl.load(block + half * 64 + (quarter % 2) * 32 + code).to(tl.int32) >> (4 * (quarter // 2))
    upper = tl.load(block + 128 + half * 32 + code).to(tl.int32) >> (2 * quarter)
    number = ((lower & 15) | ((upper & 3) << 4)) - 32
    scale = tl.load(block + 192 + half * 8 + quarter * 2 + code // 16).to(tl.int8, bitcast=True)
    return number.to(tl.float32) * (scale.to(tl.float32) * _load_fp16(block + 208))


@triton.jit
def _dequantize(
    out,
    quantized_weight,
    blocks,  # in a row
    out_row,  # numbers, and bytes, from one row to the next
    weight_row,
    TYPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TYPE_SIZE: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
):
    """Some blocks of one row; past its end the last one again, which is not stored."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCKS_PER_PROGRAM + tl.arange(0, BLOCKS_PER_PROGRAM)
    start = quantized_weight + row * weight_row + tl.minimum(index, blocks - 1) * TYPE_SIZE
    if TYPE == "Q8_0":
        numbers = _q8_0(start[:, None])
    elif TYPE == "Q4_K":
        numbers = _q4_k(start[:, None, None, None])
    else:
        numbers = _q6_k(start[:, None, None, None])
    numbers = tl.reshape(numbers, (BLOCKS_PER_PROGRAM, BLOCK_SIZE)).to(out.dtype.element_ty)
    place = out + row * out_row + index[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None]
    tl.store(place, numbers, (index < blocks)[:, None])


def dequantize(quantized_weight: Tensor, ggml_type: GGMLType, out: Tensor) -> Tensor:
    """See `dequant.dequantize`. packing: one of `fused.PACKED`."""
    rows, columns = out.shape
    blocks = columns // ggml_type.block_size
    count = ELEMENTS_PER_PROGRAM // ggml_type.block_size
    with device_of(out):
        _dequantize[(rows, triton.cdiv(blocks, count))](
            out,
            quantized_weight,
            blocks,
            out.stride(0),
            quantized_weight.stride(0),
            TYPE=ggml_type.name,
            BLOCK_SIZE=ggml_type.block_size,
            TYPE_SIZE=ggml_type.type_size,
            BLOCKS_PER_PROGRAM=count,
            num_warps=warps_for(ELEMENTS_PER_PROGRAM),
        )
    return out
