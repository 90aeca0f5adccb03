"""Seconds of model evaluations of the transformer, and of the text encoder."""

from __future__ import annotations

from dataclasses import dataclass

from kadr.models.t5 import T5Config
from kadr.models.transformer import TransformerConfig
from kadr.planning.calibration.calibration import PLAIN, Calibration
from kadr.planning.costs.flops import (
    lora_flops,
    perturbed_flops,
    self_attention_flops,
    text_encoder_flops,
    text_kv_flops,
    transformer_flops,
)
from kadr.request.passes import ResolvedPass
from kadr.sampling.settings import ATTENTION_VALUES


@dataclass(frozen=True, kw_only=True)
class EvaluationTimer:
    """Times of model evaluations of one transformer over so many tokens.

    Args:
        kernel: of its layers; see `planning.calibration`.
        weights_per_use: seconds of dequantizing or reading the weights, at each call.
        text_tokens: tokens of the longest prompt.
        num_sigmas: number of distinct sigmas among the tokens.
        lora_parameters: parameters of LoRAs that are computed beside the weights.
    """

    calibration: Calibration
    config: TransformerConfig
    kernel: str
    tokens: int
    text_tokens: int
    num_sigmas: int = 1
    weights_per_use: float = 0.0
    lora_parameters: int = 0

    def evaluation_seconds(self, *, batch: int = 1) -> float:
        """Returns the seconds of one call of the transformer for a batch of samples."""
        config, rows = self.config, batch * self.tokens
        attention = batch * self_attention_flops(config, self.tokens)
        total = transformer_flops(
            config, self.tokens, batch=batch, text_tokens=self.text_tokens, num_sigmas=batch * self.num_sigmas
        ) + lora_flops(self.lora_parameters, rows)
        return (
            self._block_seconds(total - attention, rows)
            + self.calibration.attention_seconds(attention, head_dim=config.head_dim, tokens=self.tokens)
            + self.weights_per_use
        )

    def perturbed_seconds(self, blocks: tuple[int, ...], mode: str) -> float:
        """Returns the seconds that STG adds to an evaluation: the share of its FLOPs."""
        added = perturbed_flops(self.config, self.tokens, blocks, mode, text_tokens=self.text_tokens)
        return (
            self.evaluation_seconds()
            * added
            / transformer_flops(self.config, self.tokens, text_tokens=self.text_tokens, num_sigmas=self.num_sigmas)
        )

    def text_kv_seconds(self, text_tokens: int) -> float:
        """Returns the seconds of filling the text KV cache for so many tokens of all prompts."""
        return self._block_seconds(text_kv_flops(self.config, text_tokens=text_tokens), text_tokens)

    def _block_seconds(self, flops: int, rows: int) -> float:
        return self.calibration.block_seconds(flops, kernel=self.kernel, width=self.config.width, rows=rows)


def pass_seconds(
    timer: EvaluationTimer, resolved_pass: ResolvedPass, prompt_tokens: tuple[int, ...], *, guidance_batch: bool
) -> float:
    """Returns the seconds of all model evaluations of a pass.

    Args:
        prompt_tokens: number of tokens of each prompt.
        guidance_batch: both prompts are evaluated in one batch.
    """
    total = timer.text_kv_seconds(sum(prompt_tokens))
    for guidance in resolved_pass.evaluation_guidance:
        if guidance.cfg_scale > 1 and guidance_batch:
            total += timer.evaluation_seconds(batch=2)
        else:
            total += (1 + (guidance.cfg_scale > 1)) * timer.evaluation_seconds()
        if guidance.stg_scale > 0 and guidance.skip_blocks:
            mode = resolved_pass.settings.guidance.stg_mode or ATTENTION_VALUES
            total += timer.perturbed_seconds(tuple(guidance.skip_blocks), mode)
    return total


def text_encoder_seconds(
    calibration: Calibration, config: T5Config, prompt_tokens: tuple[int, ...], weights_per_use: float
) -> float:
    """Returns the seconds of encoding prompts of so many tokens, one after the other."""
    return sum(
        calibration.block_seconds(
            text_encoder_flops(config, length=tokens), kernel=PLAIN, width=config.d_model, rows=tokens
        )
        + weights_per_use
        for tokens in prompt_tokens
    )
