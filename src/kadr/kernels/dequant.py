"""Dequantizes GGML's block formats.

Every format is value = scale * code, or scale * code + offset. A scale belongs to a block of 32 elements; in the K
formats to a group of 16 or 32 inside a block of 256, and is itself a small integer times the block's own factor. Codes
of neighbouring elements lie in different bytes, which suits vector instructions; `_unpack_bits` puts them in order.

Products of a float16 factor with such small integers are exact in fp32, so a value is rounded at most once there (by
the offset), and once more where `out` is narrower. The layouts are in
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kadr.kernels.ggml_types import GGMLType

# Elements dequantized at a time. On a CPU for each thread: the temporaries stay in a core's cache. On an accelerator a
# slice must take longer than the launch of a dozen operations.
CPU_SLICE_ELEMENTS, ACCELERATOR_SLICE_ELEMENTS = 262_144, 4_194_304


def dequantize(quantized_weight: Tensor, ggml_type: GGMLType, out: Tensor) -> Tensor:
    """Writes the values of `quantized_weight` into `out`.

    Args:
        quantized_weight: uint8 (rows, bytes per row), only read.
        ggml_type: its block format.
        out: (rows, columns) in fp32, bf16 or fp16, on the same device.

    Returns:
        `out`.

    Raises:
        ValueError: the two shapes do not match.
    """
    rows, columns = out.shape
    if quantized_weight.shape != (rows, ggml_type.row_bytes(columns)):
        raise ValueError(
            f"{ggml_type.name} of shape {tuple(quantized_weight.shape)} does not dequantize to {tuple(out.shape)}"
        )
    dequantize_blocks = _DEQUANTIZERS[ggml_type.name]
    elements = CPU_SLICE_ELEMENTS * torch.get_num_threads() if out.device.type == "cpu" else ACCELERATOR_SLICE_ELEMENTS
    step = max(1, elements // max(1, columns))
    for start in range(0, rows, step):
        rows_slice = slice(start, start + step)
        blocks = quantized_weight[rows_slice].reshape(-1, ggml_type.type_size)
        out[rows_slice] = dequantize_blocks(blocks).view(-1, columns)
    return out


def _q8_0(blocks: Tensor) -> Tensor:
    """Scale; 32 codes in int8."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_read_fp16(blocks, 0))


def _q4_0(blocks: Tensor) -> Tensor:
    """Scale; 16 bytes: the first 16 codes in the low nibbles, the others in the high. Code 8 is 0."""
    return _subtract(_unpack_bits(blocks[:, 2:], 4), 8).float().mul_(_read_fp16(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    """Scale, offset; codes as in Q4_0, from 0."""
    return _unpack_bits(blocks[:, 4:], 4).float().mul_(_read_fp16(blocks, 0)).add_(_read_fp16(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    """Scale; 4 bytes with the fifth bit of each code, in order; the other four as in Q4_0. Code 16 is 0."""
    codes = _unpack_bits(blocks[:, 6:], 4).bitwise_or_(_fifth_bits(blocks[:, 2:6]))
    return _subtract(codes, 16).float().mul_(_read_fp16(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    """Scale, offset; codes as in Q5_0, from 0."""
    codes = _unpack_bits(blocks[:, 8:], 4).bitwise_or_(_fifth_bits(blocks[:, 4:8]))
    return codes.float().mul_(_read_fp16(blocks, 0)).add_(_read_fp16(blocks, 2))


def _q2_k(blocks: Tensor) -> Tensor:
    """16 bytes, one per group of 16: scale in the low nibble, offset in the high; 64 bytes of codes; two factors."""
    codes = _unpack_bits(blocks[:, 16:80], 2, width=32)
    scales, offsets = _unpack_bits(blocks[:, :16], 4).float().view(-1, 2, 16).unbind(1)
    return _apply_scales(codes, scales.mul_(_read_fp16(blocks, 80)), offsets.mul_(_read_fp16(blocks, 82)))


def _q3_k(blocks: Tensor) -> Tensor:
    """32 bytes with the third bit of each code, 64 with the other two; 16 scales of 6 bits; factor.

    Code 4 is 0. Scales are stored plus 32: 8 bytes with four bits of each, 4 with the other two.
    """
    codes = _unpack_bits(blocks[:, 32:96], 2, width=32).bitwise_or_(_unpack_bits(blocks[:, :32], 1).mul_(4))
    scales = _unpack_bits(blocks[:, 96:104], 4).bitwise_or_(_unpack_bits(blocks[:, 104:108], 2).mul_(16))
    return _apply_scales(_subtract(codes, 4), _subtract(scales, 32).float().mul_(_read_fp16(blocks, 108)))


def _q4_k(blocks: Tensor) -> Tensor:
    """Factors of scales and of offsets; 8 of each in 12 bytes; 128 bytes of codes, 32 to the nibbles of 32 bytes."""
    return _apply_scales(_unpack_bits(blocks[:, 16:], 4, width=32), *_scales_and_offsets(blocks))


def _q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes of fifth bits before the other four."""
    codes = _unpack_bits(blocks[:, 48:], 4, width=32).bitwise_or_(_unpack_bits(blocks[:, 16:48], 1).mul_(16))
    return _apply_scales(codes, *_scales_and_offsets(blocks))


def _q6_k(blocks: Tensor) -> Tensor:
    """128 bytes with four bits of each code, 64 with the other two; 16 scales in int8; factor. Code 32 is 0."""
    codes = _unpack_bits(blocks[:, :128], 4, width=64).bitwise_or_(
        _unpack_bits(blocks[:, 128:192], 2, width=32).mul_(16)
    )
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_read_fp16(blocks, 208))
    return _apply_scales(_subtract(codes, 32), scales)


def _unpack_bits(packed: Tensor, bits: int, width: int | None = None) -> Tensor:
    """Unpacks integers of `bits` bits, several to a byte.

    Args:
        packed: uint8 (N, bytes). A run of `width` bytes (all of them if None) holds the first `width` integers in its
            lowest bits, the next in those above, and so on; then comes the next run.

    Returns:
        uint8 (N, bytes * 8 / bits).
    """
    runs = packed.unflatten(1, (-1, width or packed.shape[1])).view(torch.int16).contiguous()  # two bytes at a time
    planes = [runs >> shift if shift else runs for shift in range(0, 8, bits)]
    return torch.stack(planes, 2).bitwise_and_(257 * ((1 << bits) - 1)).view(torch.uint8).flatten(1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """Unpacks uint8 (N, 4), a bit for each of 32 codes, to uint8 (N, 32): 16 where the bit is set, else 0."""
    bytes_of_8 = _fifth_bit_table(packed.device).index_select(0, packed.flatten().int())
    return bytes_of_8.view(torch.uint8).view(-1, 32)


@cache
def _fifth_bit_table(device: torch.device) -> Tensor:
    """Returns int64 (256): for each byte value its eight bits, each as a byte of 16 or 0."""
    all_bytes = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    bits = (all_bytes >> torch.arange(8, dtype=torch.uint8, device=device)).bitwise_and_(1)
    return bits.mul_(16).view(torch.int64).flatten()


def _scales_and_offsets(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Reads the scales and offsets of Q4_K and Q5_K, fp32 (N, 8) each, from the first 16 bytes of a block.

    After the factors come 4 bytes of scales, 4 of offsets, and 4 bytes whose nibbles are the lower bits of scales and
    offsets 4 to 7; their upper two bits are on top of the first eight bytes. Computed four bytes at a time.
    """
    words = blocks[:, 4:16].view(torch.int32).contiguous()
    first, last = words[:, :2], words[:, 2]
    lower = torch.stack((last, last >> 4), 1).bitwise_and_(0x0F0F0F0F)
    upper = (first >> 2).bitwise_and_(0x30303030)
    both = torch.stack((first & 0x3F3F3F3F, lower.bitwise_or_(upper)), 2)
    scales, offsets = both.view(torch.uint8).float().unbind(1)
    return scales.mul_(_read_fp16(blocks, 0)), offsets.mul_(_read_fp16(blocks, 2))


def _apply_scales(codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Returns scale * code - offset. codes (N, 256) of bytes; scales and offsets fp32 (N, groups)."""
    values = codes.float().unflatten(1, (scales.shape[1], -1)).mul_(scales[..., None])
    return values if offsets is None else values.sub_(offsets[..., None])


def _subtract(codes: Tensor, offset: int) -> Tensor:
    """Returns codes - offset: uint8 -> int8 in the same memory."""
    return codes.view(torch.int8).sub_(offset)


def _read_fp16(blocks: Tensor, start: int) -> Tensor:
    """Returns the float16 at byte `start` of each block as fp32 (N, 1)."""
    return blocks[:, start : start + 2].view(torch.float16).float()


_DEQUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q6_K": _q6_k,
    "Q5_K": _q5_k,
    "Q5_1": _q5_1,
    "Q5_0": _q5_0,
    "Q4_K": _q4_k,
    "Q4_1": _q4_1,
    "Q4_0": _q4_0,
    "Q3_K": _q3_k,
    "Q2_K": _q2_k,
}
