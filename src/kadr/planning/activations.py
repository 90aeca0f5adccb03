"""What a stage takes at work, besides its weights: bytes, products and seconds, from configs and sizes alone.

Bytes are those of the tensors that exist at the worst moment, counted along the code of `models`, and those that
kernels on a CPU take besides, measured. They hold where freed memory goes back to the system at once; see
`kernels.cpu.malloc`. FLOPs are twice the multiplications of matrices, convolutions and attentions (performance.md, B).
"""

from __future__ import annotations

from math import prod

from kadr.kernels.cpu import attention as cpu_attention
from kadr.models.t5 import T5Config
from kadr.models.transformer import TransformerConfig
from kadr.models.upscaler import UpscalerConfig
from kadr.shapes import LatentGrid

MAX_PROMPT_TOKENS = 256  # positions that a prompt is padded to
KERNEL_WORKSPACE_BYTES = 3 << 20  # bytes that kernels on a CPU take besides, whatever the size: measured, 2 to 3 MB
# Channels times frames times rows: up to here torch finds a convolution small (ConvParams::use_mkldnn).
IM2COL_LIMIT = 20480
_FP32_BYTES, _INT64_BYTES = 4, 8  # bytes of a float32 and of an int64
Shape3D = tuple[int, int, int]  # frames, rows, columns


def conv_workspace_bytes(
    channels: tuple[int, int], input_shape: Shape3D, output_shape: Shape3D, itemsize: int, taps: int = 27
) -> int:
    """What a convolution takes besides its input, its weights and its output, for one sample. Measured.

    oneDNN copies input and weights into its own order of channels while it computes, then the output from that order
    into the usual one. Those that torch finds small it does itself in float32, by unfolding the whole input.

    Args:
        channels: of the input and of the output.
        input_shape, output_shape: frames, rows and columns of the input and of the output.
        taps: places that an output sees; 9 for one over single frames, which are its samples.
    """
    lines = channels[0] * input_shape[1] * (input_shape[0] if taps == 27 else 1)
    if itemsize == _FP32_BYTES and lines <= IM2COL_LIMIT and (taps == 27 or input_shape[0] == 1):
        return taps * channels[0] * prod(output_shape) * itemsize
    return max(channels[0] * (prod(input_shape) + taps * channels[1]), channels[1] * prod(output_shape)) * itemsize


def winograd_workspace_bytes(
    channels: tuple[int, int], input_shape: Shape3D, output_shape: Shape3D, itemsize: int, winograd_frames: int
) -> int:
    """As `conv_workspace_bytes`, of `kernels.cpu.winograd.convolve`; its kernels lie as they are read, so none is copied.

    While the first frames of all groups are made. Of pairs: what goes into that product, sum and difference of the two
    products that both frames share, and the frames themselves before they are put among the others. Of fours: what goes
    into that product and into a later one, sums and differences of four products, the sum of two of those, the frames.

    Args:
        winograd_frames: frames of a group, 2 or 4.
    """
    groups, (given, made) = max(1, output_shape[0] // winograd_frames), {2: (1, 3), 4: (2, 6)}[winograd_frames]
    return (
        groups * (given * channels[0] * prod(input_shape[1:]) + made * channels[1] * prod(output_shape[1:])) * itemsize
    )


def rope_bytes(config: TransformerConfig, tokens: int, itemsize: int) -> tuple[int, int]:
    """Of the table of rotations: while it is made, and afterwards. Cosines and sines, made in float32."""
    return 3 * tokens * config.width * _FP32_BYTES, 2 * tokens * config.width * itemsize


def text_kv_bytes(
    config: TransformerConfig, itemsize: int, *, batch: int = 1, text_tokens: int = MAX_PROMPT_TOKENS
) -> int:
    """Of a text as the layers read it: the text itself, and keys and values of every layer, kept over the steps."""
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
    """Of one evaluation, besides weights, the table of rotations, tokens and text.

    Args:
        itemsize: bytes per number: 2 or 4.
        batch: samples evaluated together: 2 where guidance asks for both prompts at once.
        text_tokens: positions of the longest prompt.
        per_token_sigmas: tokens have noise levels of their own, as with conditions.
        perturbed_samples: samples that are evaluated a second time with some blocks disturbed.
        fused_gelu: in bfloat16 by oneDNN: there is no hidden layer without its GELU; see `kernels.matmul`.
    """
    width = config.width
    x, words, levels = batch * tokens * width, batch * text_tokens * width, batch * (tokens if per_token_sigmas else 1)
    # In the feed-forward: the layer's input, the sum so far, the bent sum; four times as much hidden, and its GELU.
    thinking = (3 + 4 + 4) * x
    attending = 0
    if fused_gelu:
        # Then the worst is in the attention, where RMSNorm holds float32 copies beside queries, keys and values.
        attending = _attention_logits_bytes(config, tokens)
        thinking = (11 if attending else 10) * x
    # While a layer reads the text for the first time: what the attention gave, the sum; then the norm of the keys.
    looking = 3 * x + _rms_norm_copies(itemsize) * words
    bends = (1 + 6 + 6) * levels * width  # the embedded level, its six rows for all layers, and those of a layer
    return (
        (max(thinking, looking) + bends + perturbed_samples * tokens * width) * itemsize
        + attending
        + KERNEL_WORKSPACE_BYTES
    )


def lora_activation_bytes(tokens: int, itemsize: int, *, max_rank: int, max_out_features: int, batch: int = 1) -> int:
    """What LoRAs add to an evaluation, at the worst layer: what comes of A, and of B before it is added.

    Args:
        max_rank: of all LoRAs of a layer together.
        max_out_features: what a changed layer gives at most.
    """
    return batch * tokens * (2 * max_rank * _FP32_BYTES + 2 * max_out_features * itemsize)


def _attention_logits_bytes(config: TransformerConfig, tokens: int) -> int:
    """Of `kernels.cpu.attention`: logits of some heads, in float32, and what becomes of them in bfloat16."""
    head = 4 * tokens**2
    if (
        tokens < cpu_attention.MIN_LENGTH
        or config.head_dim > cpu_attention.MAX_HEAD_DIM
        or head > cpu_attention.MAX_LOGIT_BYTES
    ):
        return 0
    return min(config.num_heads, cpu_attention.MAX_LOGIT_BYTES // head) * (head * 3 // 2 + 2 * tokens * config.head_dim)


def step_cache_bytes(
    config: TransformerConfig,
    tokens: int,
    itemsize: int,
    *,
    history_length: int,
    evaluations_per_step: int,
    batch: int = 1,
) -> int:
    """Of a step cache: the residuals that it keeps, and what a step holds back that would be gone without it.

    That is the tokens before and after the first layer, and what it added on the last computed step.

    Args:
        history_length: computed steps that are remembered.
        evaluations_per_step: evaluations of a step, the disturbed one among them.
        batch: samples evaluated together.
    """
    return (history_length * evaluations_per_step + 2 * batch + 1) * tokens * config.width * itemsize


def _rms_norm_copies(itemsize: int) -> int:
    """How many times its input, of `itemsize` bytes per number, RMSNorm holds at most, the input among them."""
    return 3 if itemsize == _FP32_BYTES else 6  # the root is taken of a float32 copy, and two of those exist at once


def text_encoder_activation_bytes(
    config: T5Config, itemsize: int, *, batch: int = 1, length: int = MAX_PROMPT_TOKENS
) -> int:
    """Of encoding a prompt, besides the weights. Arguments as for `transformer_activation_bytes`; length: in tokens, padded."""
    x, hidden = (batch * length * width for width in (config.d_model, config.d_ff))
    bias = batch * config.num_heads * length**2
    thinking = bias + 3 * x + 3 * hidden  # in the feed-forward: input, sum and its norm; gate, up and their product
    distances = 2 * length**2 * _INT64_BYTES  # while the bias is looked up: distances and their buckets
    return max((3 * bias + x) * itemsize + distances, thinking * itemsize) + KERNEL_WORKSPACE_BYTES


def upscaler_activation_bytes(config: UpscalerConfig, grid: LatentGrid, itemsize: int = _FP32_BYTES) -> int:
    """Of upscaling latents of `grid`, besides weights and latents."""
    time, rows, columns = config.scale_factors
    before = (grid.frames, grid.height, grid.width)
    after = (time * grid.frames - (time - 1), rows * grid.height, columns * grid.width)
    x, made = (config.mid_channels * prod(sides) * itemsize for sides in (before, after))
    square = (config.mid_channels, config.mid_channels)
    # Of the frames that come of the first one, one is dropped: it stays in memory.
    grown, wide = (
        x * prod(config.scale_factors),
        (config.mid_channels, config.mid_channels * prod(config.scale_factors)),
    )
    growing = (
        2 * x + grown + conv_workspace_bytes(wide, before, before, itemsize, 27 if config.temporal_upsample else 9)
    )
    thinking = grown + 2 * made + conv_workspace_bytes(square, after, after, itemsize)  # a block's second convolution
    adding = grown + 3 * made  # its input, what it made, the norm of that, and their sum
    return max(growing, thinking, adding) + KERNEL_WORKSPACE_BYTES
