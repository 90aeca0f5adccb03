"""One stage of one benchmark case: its inputs, its request and its FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kadr.bench.cases import (
    DECODE,
    DIT,
    ENCODE,
    END_TO_END,
    FLOAT32_VARIANT,
    FPS,
    PROMPT_TOKENS,
    STARTUP,
    TEXT,
    TEXT_LENGTH,
    VARIANTS,
    Variant,
    VideoShape,
    schedule_for,
)
from kadr.bench.model_files import ModelFiles
from kadr.bench.runner import Contender, SkippedContender
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.models.registry import Recipe
from kadr.models.transformer import TransformerConfig
from kadr.models.vae import VAEConfig
from kadr.pipeline.engine import Engine
from kadr.planning.costs.flops import perturbed_flops, text_encoder_flops, transformer_flops
from kadr.planning.costs.vae_flops import vae_decoder_flops, vae_encoder_flops
from kadr.request.passes import ResolvedPass
from kadr.request.request import Request
from kadr.sampling.positions import token_positions
from kadr.sampling.settings import ATTENTION_VALUES

SIGMA, DECODE_TIMESTEP = 0.7, 0.05
PROMPT, NEGATIVE_PROMPT = "a red circle moving right on a black background", "blurry"
SEED = 0
ContenderFactory = Callable[["StageCase", ExitStack], "Iterator[Contender | SkippedContender]"]


@dataclass(frozen=True)
class StageCase:
    """One stage of one case, the same for every contender.

    Args:
        schedule: name of the schedule, for the end-to-end stage.
        prompt_tokens: tokens of the prompt that are not padding.
    """

    files: ModelFiles
    shape: VideoShape
    stage: str
    device: torch.device
    schedule: str | None = None
    prompt_tokens: int = PROMPT_TOKENS

    def __str__(self) -> str:
        detail = f" {self.schedule}" if self.schedule else f" {self.prompt_tokens}" if self.stage == TEXT else ""
        return f"{self.files.name} {self.shape} {self.stage}{detail}"

    @property
    def identity(self) -> dict[str, Any]:
        """The fields of a result that tell its case from others, as plain data."""
        blocks = self.active_blocks
        return {
            "model": self.files.name,
            "blocks": None if blocks is None else list(blocks),
            "size": str(self.shape),
            "stage": self.stage,
            "schedule": self.schedule,
            "prompt_tokens": self.prompt_tokens,
        }

    @property
    def active_blocks(self) -> tuple[int, int] | None:
        """Blocks that run, and blocks of the full model, where fewer run in this stage; None where all do."""
        if self.stage == TEXT:
            return self.files.text_encoder_blocks
        return self.files.transformer_blocks if self.stage in (DIT, END_TO_END) else None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.files.path)

    @property
    def transformer_config(self) -> TransformerConfig:
        config = self.checkpoint.info.transformer
        assert config is not None
        return config

    @property
    def vae_config(self) -> VAEConfig:
        config = self.checkpoint.info.vae
        assert config is not None
        return config

    def open_engine(self, variant: Variant) -> Engine:
        """Opens the model as a user would; a random one is of no release, and the request sets what is measured."""
        return Engine.open(
            self.files.path,
            recipe=Recipe(),
            text_encoder=self.files.text_encoder_folder,
            device=str(self.device),
            dtype=variant.dtype,
            quant=variant.quant,
            compile_transformer=variant.compile,
            prompt_cache=self.files.scratch_folder / "prompts" if self.stage == END_TO_END else False,
        )

    @cached_property
    def dtype(self) -> torch.dtype:
        """Default dtype of the engine; peers compute in it too."""
        return self.open_engine(VARIANTS["auto"]).spec.dtype

    @cached_property
    def request(self) -> Request:
        """The end-to-end request. It adds no decode noise: engines add it in different places."""
        schedule = schedule_for(self.schedule or "8", self.transformer_config.num_layers)
        return Request(
            prompt=PROMPT,
            negative_prompt=NEGATIVE_PROMPT,
            size=self.shape.size,
            frames=self.shape.frames,
            fps=FPS,
            seed=SEED,
            steps=schedule.steps,
            guidance=schedule.guidance,
            decode_timestep=DECODE_TIMESTEP,
            decode_noise=0.0,
            tone_map=0.0,
        )

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """Inputs of the stage, in float32, on the device."""
        generator = torch.Generator().manual_seed(SEED)
        grid, channels = self.shape.grid, self.transformer_config.in_channels

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        inputs: dict[str, Tensor] = {"prompt_attention_mask": torch.arange(TEXT_LENGTH)[None] < self.prompt_tokens}
        if self.stage == DIT:
            inputs |= self._transformer_inputs(randn)
        elif self.stage == TEXT:
            inputs["input_ids"] = torch.randint(3, 100, (1, TEXT_LENGTH), generator=generator)
        elif self.stage == DECODE:
            inputs["latents"] = randn(1, channels, grid.frames, grid.height, grid.width)
            inputs["decode_timestep"] = torch.full((1,), DECODE_TIMESTEP)
        elif self.stage == ENCODE:
            inputs["pixels"] = randn(1, 3, self.shape.frames, self.shape.size.height, self.shape.size.width).tanh()
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _transformer_inputs(self, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
        grid, config = self.shape.grid, self.transformer_config
        return {
            "tokens": randn(1, grid.num_tokens, config.in_channels),
            "positions": token_positions(grid, fps=FPS, causal=config.causal_temporal_positioning)[None],
            "prompt_embeds": randn(1, TEXT_LENGTH, config.caption_channels),
            "sigma": torch.full((1, 1), SIGMA),
        }

    @cached_property
    def flops(self) -> int | None:
        """FLOPs of the stage by formula, two per product; None for the start-up, where they say nothing.

        Padding of the prompt is no part of the task.
        """
        grid = self.shape.grid
        if self.stage == STARTUP:
            return None
        if self.stage == TEXT:
            config = self.open_engine(FLOAT32_VARIANT).spec.text_encoder_checkpoint.config
            return text_encoder_flops(config, length=self.prompt_tokens)
        if self.stage == ENCODE:
            return vae_encoder_flops(self.vae_config, grid)
        if self.stage == DECODE:
            return vae_decoder_flops(self.vae_config, grid)
        if self.stage == DIT:
            return transformer_flops(self.transformer_config, grid.num_tokens, text_tokens=self.prompt_tokens)
        (resolved_pass,) = self.open_engine(FLOAT32_VARIANT).resolve(self.request).passes
        return pass_flops(self.transformer_config, resolved_pass) + vae_decoder_flops(self.vae_config, grid)


def pass_flops(config: TransformerConfig, resolved_pass: ResolvedPass) -> int:
    """Returns the FLOPs of all model evaluations of a pass."""
    total, tokens = 0, resolved_pass.grid.num_tokens
    for guidance in resolved_pass.evaluation_guidance:
        total += (1 + (guidance.cfg_scale > 1)) * transformer_flops(config, tokens, text_tokens=PROMPT_TOKENS)
        if guidance.stg_scale > 0 and guidance.skip_blocks:
            mode = resolved_pass.settings.guidance.stg_mode or ATTENTION_VALUES
            total += perturbed_flops(config, tokens, guidance.skip_blocks, mode, text_tokens=PROMPT_TOKENS)
    return total


def stored_bytes(module: nn.Module) -> int:
    """Returns the bytes of a module's weights, as they are stored."""
    return sum(tensor.nbytes for tensor in chain(module.parameters(), module.buffers()))
