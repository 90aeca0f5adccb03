"""Linear layers: each kind, as it is placed and quantized, against a matmul with the weight of the file."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kadr.models.transformer import Transformer
from kadr.nn.linear import LoRALinear, uses_8bit_matmul
from kadr.quant.weight_formats import AUTO_QUANT, BITS_PER_WEIGHT, FP8, FP8_WEIGHT_ONLY, NONE
from kadr.selftest import figures
from kadr.selftest.result import Check, NotRun, at_most
from kadr.selftest.subject import NOISE, ClipDenoiser, Subject

ROWS = 64
# Largest relative error of a row or column of the output. float32 and bfloat16 as in `kernels`; 8-bit activations add
# 0.01 (int8) or 0.03 (fp8).
MAX_LAYER_ERRORS = {torch.float32: 1e-3, torch.bfloat16: 0.03}
MAX_8BIT_ERROR = 0.1
# Weights of b bits in steps over 3 standard deviations have a relative error of 1.7 / 2^b, fp8 with its 3 bits of
# mantissa 0.04; rows with outliers have twice that, and limits are six times. They end below the error of a scale that
# is off by 2, which is 1 or 0.5; only 2 bits have 0.44 themselves.
ERROR_OF_BITS, MAX_FORMAT_ERROR, MAX_2_BIT_ERROR, MAX_FP8_ERROR = 6 * 1.73, 0.48, 0.6, 0.1
OUTER_LAYERS = ("proj_in", "adaln_linear", "caption_proj.up", "caption_proj.down", "proj_out")
_TARGETS = tuple(
    f"{attention}.{part}" for attention in ("self_attention", "cross_attention") for part in ("q", "k", "v", "out")
) + ("feed_forward.up", "feed_forward.down")


def check_layers(subject: Subject) -> Iterator[Check]:
    """Multiplies random rows with the layers of the first, middle and last block, and those around the blocks."""
    if subject.spec.loras.is_merged:
        raise NotRun("LoRAs are merged into the weights, which are then not those of the file")
    with subject.clip_denoiser() as model:
        placement = model.placement
        if placement.streamed_blocks and subject.device.type != "cpu":
            raise NotRun("the blocks are streamed, and are on the device only while they run")
        limit = MAX_LAYER_ERRORS[model.dtype] + _format_error(placement.weight_format)
        blocks = sorted({0, len(model.module.blocks) // 2, len(model.module.blocks) - 1})
        for target in _TARGETS:
            yield _check_target(subject, model, [f"blocks.{block}.{target}" for block in blocks], target, limit)
        yield _check_target(
            subject, model, list(OUTER_LAYERS), "layers around the blocks", MAX_LAYER_ERRORS[model.dtype]
        )


def _format_error(weight_format: str) -> float:
    """Returns the largest error of weights that kadr quantized; 0 for those as the file has them."""
    if weight_format in (FP8, FP8_WEIGHT_ONLY):
        return MAX_FP8_ERROR
    if weight_format in (NONE, AUTO_QUANT) or weight_format not in BITS_PER_WEIGHT:
        return 0.0
    bits = BITS_PER_WEIGHT[weight_format]
    return min(MAX_FORMAT_ERROR if bits >= 3 else MAX_2_BIT_ERROR, ERROR_OF_BITS / 2**bits)


def _check_target(subject: Subject, model: ClipDenoiser, names: list[str], title: str, limit: float) -> Check:
    keys = [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    weights = subject.engine.loader.read_transformer_weights(0, keys, subject.spec.dtype)
    worst, place, is_8bit = -1.0, "", False
    for name in names:
        layer = _base_layer(model.module, name)
        is_8bit |= uses_8bit_matmul(layer)
        for kind, (error, index) in _layer_errors(subject, model, layer, weights, name).items():
            if error > worst:
                worst, place = error, f"{kind} {index} of {name}"
    return at_most(f"{title}: error of its worst row or column", worst, limit + MAX_8BIT_ERROR * is_8bit, place)


def _layer_errors(
    subject: Subject, model: ClipDenoiser, layer: nn.Module, weights: dict[str, Tensor], name: str
) -> dict[str, figures.WorstRow]:
    weight, bias = (weights[f"{name}.{part}"].to(subject.device) for part in ("weight", "bias"))
    x = NOISE.draw(name, (1, ROWS, weight.shape[1])).to(subject.device, model.dtype)
    actual, expected = layer(x)[0].float().cpu(), F.linear(x.float(), weight, bias)[0].cpu()
    return {"row": figures.worst_row(actual, expected), "column": figures.worst_row(actual.T, expected.T)}


def _base_layer(module: Transformer, name: str) -> nn.Module:
    """Returns a layer, without LoRAs."""
    layer = module.get_submodule(name)
    return layer.base if isinstance(layer, LoRALinear) else layer
