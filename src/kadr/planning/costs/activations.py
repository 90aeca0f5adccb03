"""Activation bytes of each component: its workspace besides weights, from configs and sizes alone.

Bytes are those of the tensors that exist at the worst moment, counted along the code of `models`, and the workspace of
CPU kernels, measured. They hold where freed memory goes back to the system at once; see `kernels.cpu.malloc`.
"""

from __future__ import annotations

from math import prod

from kadr.kernels.attention import MIN_CPU_LOGITS
from kadr.kernels.autotuner import CHECKED_HEADS, CHECKED_QUERIES
from kadr.kernels.cpu.attention import WEIGHT_BYTES
from kadr.kernels.cpu.tokens import SLICE_ELEMENTS
from kadr.models.t5 import T5Config
from kadr.models.transformer import TransformerConfig
from kadr.models.upscaler import UpscalerConfig
from kadr.shapes import LatentGrid

MAX_PROMPT_TOKENS = 256  # tokens that a prompt is padded to
KERNEL_WORKSPACE_BYTES = 3 << 20  # workspace of CPU kernels at any size; measured, 2 to 3 MB
# Channels times frames times rows up to which torch considers a convolution small (ConvParams::use_mkldnn).
IM2COL_LIMIT = 20480
_FP32_BYTES = 4
Shape3D = tuple[int, int, int]  # frames, rows, columns


def conv_workspace_bytes(
    channels: tuple[int, int], input_shape: Shape3D, output_shape: Shape3D, itemsize: int, taps: int = 27
) -> int:
    """Returns the workspace of a convolution for one sample, besides its input, weights and output. Measured.

    oneDNN reorders the channels of input and weights while it computes, then those of the output. Convolutions that
    torch considers small run in float32 by im2col over the whole input.

    Args:
        channels: of the input and of the output.
        input_shape, output_shape: frames, rows and columns of the input and of the output.
        taps: size of the kernel; 9 for a convolution over single frames, which are its samples.
    """
    lines = channels[0] * input_shape[1] * (input_shape[0] if taps == 27 else 1)
    if itemsize == _FP32_BYTES and lines <= IM2COL_LIMIT and (taps == 27 or input_shape[0] == 1):
        return taps * channels[0] * prod(output_shape) * itemsize
    return max(channels[0] * (prod(input_shape) + taps * channels[1]), channels[1] * prod(output_shape)) * itemsize


def winograd_workspace_bytes(
    channels: tuple[int, int], input_shape: Shape3D, output_shape: Shape3D, itemsize: int, winograd_frames: int
) -> int:
    """Returns the workspace of `kernels.cpu.winograd.convolve`, like `conv_workspace_bytes`; its weights are prepacked.

    The peak is at the first frames of all groups. For pairs, these exist: the input of that product, sum and
    difference of the two products that both frames share, and the frames before they are interleaved. For groups of
    four: the input of that product and of a later one, sums and differences of four products, the sum of two of those,
    and the frames.

    Args:
        winograd_frames: frames of a group, 2 or 4.
    """
    groups, (inputs, outputs) = max(1, output_shape[0] // winograd_frames), {2: (1, 3), 4: (2, 6)}[winograd_frames]
    input_numbers, output_numbers = channels[0] * prod(input_shape[1:]), channels[1] * prod(output_shape[1:])
    return groups * (inputs * input_numbers + outputs * output_numbers) * itemsize


def rope_bytes(config: TransformerConfig, tokens: int) -> tuple[int, int]:
    """Returns the bytes of the RoPE table while it is computed, and afterwards: cosines and sines of pairs, float32."""
    table, positions = tokens * config.width * _FP32_BYTES, 3 * tokens * _FP32_BYTES
    return table + table // 2 + 2 * positions, table  # beside the angles, the positions and their fractions


def text_kv_bytes(
    config: TransformerConfig, itemsize: int, *, batch: int = 1, text_tokens: int = MAX_PROMPT_TOKENS
) -> int:
    """Returns the bytes of the text KV cache: projected prompt embeddings, and keys and values of every block."""
    return batch * text_tokens * config.width * (1 + 2 * config.num_layers) * itemsize


def transformer_activation_bytes(
    config: TransformerConfig,
    tokens: int,
    itemsize: int,
    *,
    batch: int = 1,
    text_tokens: int = MAX_PROMPT_TOKENS,
    per_token_sigmas: bool = False,
    perturbed_samples: int = 0,
    fused_gelu: bool = False,
) -> int:
    """Returns the bytes of one model evaluation besides weights, RoPE table, tokens and text KV cache.

    Args:
        itemsize: bytes per number: 2 or 4.
        batch: samples per evaluation: 2 where guidance evaluates both prompts in one batch.
        text_tokens: tokens of the longest prompt.
        per_token_sigmas: every token has its own sigma, as with conditions.
        perturbed_samples: samples that STG evaluates a second time with some blocks perturbed.
        fused_gelu: GELU is fused into oneDNN's bfloat16 product, so no hidden layer exists without it; see
            `kernels.matmul`.
    """
    width = config.width
    x, text, sigmas = batch * tokens * width, batch * text_tokens * width, batch * (tokens if per_token_sigmas else 1)
    # Feed-forward: the block's input, the residual stream, the modulated one; four times as much hidden, and its GELU.
    largest = (3 + 4 + 4) * x * itemsize
    if fused_gelu:
        # The same without GELU's input, but with the output; or the self-attention: input, residual stream, queries,
        # keys, values and the output; or the norm before the feed-forward. The last two work on slices.
        norm_slice = min(tokens * width, SLICE_ELEMENTS) * _FP32_BYTES
        self_attention = 6 * x * itemsize + max(norm_slice, _cpu_attention_bytes(config, tokens))
        largest = max(8 * x * itemsize, self_attention, 5 * x * itemsize + (1 + per_token_sigmas) * norm_slice)
    # A block's first cross-attention: output of the self-attention, residual stream; then the norm of the keys.
    cross_attention = (3 * x + (2 if fused_gelu else _rms_norm_copies(itemsize)) * text) * itemsize
    adaln = (1 + 6 + 6) * sigmas * width  # the embedded timestep, its six rows for all blocks, and those of a block
    return (
        max(largest, cross_attention) + (adaln + perturbed_samples * tokens * width) * itemsize + KERNEL_WORKSPACE_BYTES
    )


def _cpu_attention_bytes(config: TransformerConfig, tokens: int) -> int:
    """Returns the bytes that `kernels.attention` works on: weights of some queries, or its first check in float32."""
    if config.num_heads * tokens**2 < MIN_CPU_LOGITS:
        return 0
    checked = 2 * CHECKED_HEADS * tokens * (config.head_dim + CHECKED_QUERIES) * _FP32_BYTES
    return max(min(2 * tokens**2, WEIGHT_BYTES), checked)


def lora_activation_bytes(tokens: int, itemsize: int, *, max_rank: int, max_out_features: int, batch: int = 1) -> int:
    """Returns the bytes that LoRAs add to a model evaluation, at the largest layer: outputs of A and of B.

    Args:
        max_rank: largest sum of the ranks of all LoRAs of a layer.
        max_out_features: largest output width of an adapted layer.
    """
    return batch * tokens * (2 * max_rank * _FP32_BYTES + 2 * max_out_features * itemsize)


def step_cache_bytes(
    config: TransformerConfig,
    tokens: int,
    itemsize: int,
    *,
    history_length: int,
    evaluations_per_step: int,
    batch: int = 1,
) -> int:
    """Returns the bytes of a step cache: its stored residuals, and tensors of a step that would be freed without it.

    Those are the tokens before and after the first block, and that block's residual on the last computed step.

    Args:
        history_length: computed steps that are stored.
        evaluations_per_step: model evaluations of a step, including the perturbed one.
        batch: samples per evaluation.
    """
    return (history_length * evaluations_per_step + 2 * batch + 1) * tokens * config.width * itemsize


def _rms_norm_copies(itemsize: int) -> int:
    """Returns the peak of RMSNorm as a multiple of its input, which is included, for `itemsize` bytes per number."""
    return 3 if itemsize == _FP32_BYTES else 6  # the root is taken of a float32 copy, and two of those exist at once


def text_encoder_activation_bytes(
    config: T5Config, itemsize: int, *, length: int, padded_length: int, batch: int = 1
) -> int:
    """Returns the bytes of encoding prompts with T5, besides its weights.

    Args:
        itemsize: bytes per number: 2 or 4.
        length: tokens of the longest prompt.
        padded_length: that length with its padding, which is not computed but zero in the result.
        batch: prompts at once.
    """
    x, hidden = (batch * length * width for width in (config.d_model, config.d_ff))
    bias = batch * config.num_heads * length**2
    feed_forward = bias + 3 * x + 3 * hidden  # input, residual stream and its norm; gate, up and their product
    masked_bias = x + bias + bias // batch  # while the mask is added to the bias, which all prompts share until then
    padding = x + batch * padded_length * config.d_model  # the result before and after padding
    return max(masked_bias, feed_forward, padding) * itemsize + KERNEL_WORKSPACE_BYTES


def upscaler_activation_bytes(config: UpscalerConfig, grid: LatentGrid, itemsize: int = _FP32_BYTES) -> int:
    """Returns the bytes of upscaling latents of `grid`, besides weights and latents."""
    time, rows, columns = config.scale_factors
    before = (grid.frames, grid.height, grid.width)
    after = (time * grid.frames - (time - 1), rows * grid.height, columns * grid.width)
    x, upscaled = (config.mid_channels * prod(sides) * itemsize for sides in (before, after))
    # A temporal upscaler drops one of the frames made of the first: it stays in memory, so count before dropping.
    expanded = x * prod(config.scale_factors)
    upsample_channels = (config.mid_channels, config.mid_channels * prod(config.scale_factors))
    block_channels = (config.mid_channels, config.mid_channels)
    taps = 27 if config.temporal_upsample else 9
    upsample = 2 * x + expanded + conv_workspace_bytes(upsample_channels, before, before, itemsize, taps)
    # A residual block's second convolution.
    convolution = expanded + 2 * upscaled + conv_workspace_bytes(block_channels, after, after, itemsize)
    residual = expanded + 3 * upscaled  # a residual block's input, its output, the norm of that, and their sum
    return max(upsample, convolution, residual) + KERNEL_WORKSPACE_BYTES
