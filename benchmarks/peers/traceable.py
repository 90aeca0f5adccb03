"""Modules of diffusers and transformers as a tracer needs them: in float32, with tensors as positional arguments.

Exported from bfloat16, products with 8-bit weights would take four times as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from benchmarks.peers import diffusers
from kadr.bench.cases import DECODE, DIT, ENCODE, FLOAT32_VARIANT, TEXT
from kadr.bench.stage_case import StageCase
from kadr.planning.costs.parameters import text_encoder_parameters, transformer_parameters
from kadr.planning.costs.vae_stages import vae_decoder_parameters, vae_encoder_parameters

EXAMPLE_TOKENS = 48  # of the transformer
EXAMPLE_LATENTS = (3, 4, 5)  # frames, rows and columns; the sides differ, so that none is taken for another
EXAMPLE_PIXELS = (17, 128, 160)


class Traceable:
    """The module of a stage, its inputs, and what is left to do with its output."""

    reason = ""  # it cannot be had
    parameters: int  # of the module

    def __init__(self, stage_case: StageCase) -> None:
        self.stage_case = stage_case

    def load(self) -> nn.Module:
        """Returns the module."""
        raise NotImplementedError

    def inputs(self, module: Any, *, is_example: bool = False) -> tuple[Tensor, ...]:
        """Returns the arguments of the module, or some of the same kind and smaller."""
        raise NotImplementedError

    def finish(self, output: Tensor) -> Tensor:
        """Returns the result of the stage."""
        return output


class PositionalTransformer(nn.Module):
    """The transformer with positional arguments.

    RoPE's cosines and sines and the sinusoidal timestep embedding are arguments. Exported with the rest they would be
    computed in bfloat16, where angles in the thousands are wrong: the velocity is then 14 % off.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.compute_rope, self.compute_sinusoid = [module.rope], [module.time_embed.emb.time_proj]
        del module.rope, module.time_embed.emb.time_proj

    def forward(
        self,
        tokens: Tensor,
        prompt_embeds: Tensor,
        prompt_attention_mask: Tensor,
        cosine: Tensor,
        sine: Tensor,
        sinusoid: Tensor,
    ) -> Tensor:
        emb = self.module.time_embed.emb
        self.module.__dict__["rope"], emb.__dict__["time_proj"] = lambda *_: (cosine, sine), lambda _: sinusoid
        return self.module(tokens, prompt_embeds, sinusoid[:, :1], prompt_attention_mask, return_dict=False)[0]


class TraceableTransformer(Traceable):
    def __init__(self, stage_case: StageCase) -> None:
        super().__init__(stage_case)
        self.parameters = transformer_parameters(stage_case.transformer_config).total

    def load(self) -> nn.Module:
        return PositionalTransformer(diffusers.load_transformer(self.stage_case).float())

    def inputs(self, module: Any, *, is_example: bool = False) -> tuple[Tensor, ...]:
        inputs, count = self.stage_case.inputs, EXAMPLE_TOKENS if is_example else None
        tokens, positions = inputs["tokens"][:, :count], inputs["positions"][..., :count]
        (compute_rope,), (compute_sinusoid,) = module.compute_rope, module.compute_sinusoid
        cosine, sine = compute_rope(tokens, None, None, None, None, positions)
        sinusoid = compute_sinusoid(inputs["sigma"].flatten() * 1000)
        return tokens, inputs["prompt_embeds"], inputs["prompt_attention_mask"].float(), cosine, sine, sinusoid


class _TraceableVAE(Traceable):
    def __init__(self, stage_case: StageCase) -> None:
        super().__init__(stage_case)
        if stage_case.checkpoint.info.vae_family is None:
            self.reason = diffusers.NO_VAE

    def load(self) -> nn.Module:
        vae = diffusers.load_vae(self.stage_case, lambda module: module).float()
        self.mean, self.deviation = (row[None, :, None, None, None] for row in (vae.latents_mean, vae.latents_std))
        half: nn.Module = vae.decoder if self.stage_case.stage == DECODE else vae.encoder
        return half


class TraceableDecoder(_TraceableVAE):
    def __init__(self, stage_case: StageCase) -> None:
        super().__init__(stage_case)
        self.parameters = vae_decoder_parameters(stage_case.vae_config).total

    def inputs(self, module: Any, *, is_example: bool = False) -> tuple[Tensor, ...]:
        inputs = self.stage_case.inputs
        latents = self.deviation * inputs["latents"] + self.mean
        if is_example:
            latents = torch.randn(*latents.shape[:2], *EXAMPLE_LATENTS)
        return (latents, inputs["decode_timestep"]) if self.stage_case.vae_config.timestep_conditioning else (latents,)


class TraceableEncoder(_TraceableVAE):
    def __init__(self, stage_case: StageCase) -> None:
        super().__init__(stage_case)
        self.parameters = vae_encoder_parameters(stage_case.vae_config).total

    def inputs(self, module: Any, *, is_example: bool = False) -> tuple[Tensor, ...]:
        return (torch.randn(1, 3, *EXAMPLE_PIXELS) if is_example else self.stage_case.inputs["pixels"],)

    def finish(self, output: Tensor) -> Tensor:
        """Returns normalized latents: the means of the moments."""
        return (output[:, : self.mean.shape[1]] - self.mean) / self.deviation


class PositionalTextEncoder(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.module(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]


class TraceableTextEncoder(Traceable):
    def __init__(self, stage_case: StageCase) -> None:
        super().__init__(stage_case)
        spec = stage_case.open_engine(FLOAT32_VARIANT).spec
        self.parameters = text_encoder_parameters(spec.text_encoder_checkpoint.config).total

    def load(self) -> nn.Module:
        folder: Path = self.stage_case.files.text_encoder_folder / "text_encoder"
        return PositionalTextEncoder(T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval())

    def inputs(self, module: Any, *, is_example: bool = False) -> tuple[Tensor, ...]:
        return self.stage_case.inputs["input_ids"], self.stage_case.inputs["prompt_attention_mask"].long()

    def finish(self, output: Tensor) -> Tensor:
        return output[self.stage_case.inputs["prompt_attention_mask"]]


TRACEABLES: Mapping[str, type[Traceable]] = {
    TEXT: TraceableTextEncoder,
    ENCODE: TraceableEncoder,
    DIT: TraceableTransformer,
    DECODE: TraceableDecoder,
}
