"""The training loop's step. All noise comes from named streams of the seed and the step number: a resumed run
continues as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kadr.models.transformer import Transformer
from kadr.sampling.noise import NoiseStreams
from kadr.sampling.positions import token_positions
from kadr.sampling.reference_tokens import ReferenceTokens
from kadr.sampling.state import to_tokens
from kadr.training.example_cache import CachedExample
from kadr.training.objective import SIGMA_DISTRIBUTIONS, add_noise, masked_mse, velocity_target
from kadr.training.settings import TrainingSettings
from kadr.training.trainable_lora import TrainableLoRALinear

WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 0.01, (0.9, 0.999), 1.0
VALIDATION_EXAMPLES = 16  # examples, each with a fixed sigma, that the validation loss is averaged over


class LoRABatch(NamedTuple):
    """Encoded examples of one shape.

    Args:
        example: any of them, for grid and frame rate.
        clean_tokens: (B, N, C) fp32.
        reference_tokens: (B, N, C) fp32, of the references that an in-context LoRA follows; None without them.
        prompt_embeds: (B, L, D).
        prompt_attention_mask: (B, L), true for real positions.
    """

    example: CachedExample
    clean_tokens: Tensor
    reference_tokens: Tensor | None
    prompt_embeds: Tensor
    prompt_attention_mask: Tensor


class NoiseDraw(NamedTuple):
    """Everything random of a step.

    Args:
        noise: (B, N, C).
        sigma: (B, 1).
        clean_mask: (N), true for tokens that stay clean.
    """

    noise: Tensor
    sigma: Tensor
    clean_mask: Tensor


@dataclass
class LoRATrainer:
    """Trains LoRA matrices beside a frozen transformer.

    Args:
        lora_layers: as `add_lora_layers` returns them.
        null_text: (n, D), the prompt embeddings of an empty prompt; None where captions are never dropped.
    """

    transformer: Transformer
    lora_layers: Mapping[str, TrainableLoRALinear]
    examples: Sequence[CachedExample]
    settings: TrainingSettings
    dtype: torch.dtype
    device: torch.device
    null_text: Tensor | None = None

    steps_done: int = field(default=0, init=False)  # optimizer steps that the matrices have had
    is_consistent: bool = field(
        default=True, init=False
    )  # false inside an optimizer step, where only some matrices moved

    def __post_init__(self) -> None:
        self.noise_streams = NoiseStreams(self.settings.seed)
        parameters = [parameter for layer in self.lora_layers.values() for parameter in (layer.down, layer.up)]
        self.parameters: list[nn.Parameter] = parameters
        self.optimizer = torch.optim.AdamW(
            parameters, lr=self.settings.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
        )

    def step(self, step_index: int) -> float:
        """Does optimizer step `step_index`, counted from 0. Returns the loss before it."""
        batch = self._load_batch(self._examples_of_step(step_index), step_index)
        loss = self._batch_loss(batch, self._draw_noise(batch, f"step {step_index}", step_index))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * min(1.0, (step_index + 1) / (self.settings.warmup_steps + 1))
        self.is_consistent = False
        self.optimizer.step()
        self.steps_done, self.is_consistent = step_index + 1, True
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Returns the loss over training examples with fixed sigmas and noise.

        Unlike the loss of a step, it can be compared between steps. No examples are held out.
        """
        total = 0.0
        for index in range(VALIDATION_EXAMPLES):
            batch = self._load_batch([self.examples[index * len(self.examples) // VALIDATION_EXAMPLES]], None)
            draw = self._draw_noise(batch, f"held {index}", None)  # the stream's name decides bits
            sigma = torch.full_like(draw.sigma, (index + 0.5) / VALIDATION_EXAMPLES)
            total += self._batch_loss(batch, draw._replace(sigma=sigma)).item()
        return total / VALIDATION_EXAMPLES

    def _examples_of_step(self, step_index: int) -> list[CachedExample]:
        """Returns the examples of a step. Every example comes once per epoch, except those that fill a last batch."""
        epoch, batch_index = divmod(step_index, self._batches_per_epoch)
        return self._epoch_batches(epoch)[batch_index]

    @cached_property
    def _batches_per_epoch(self) -> int:
        return len(self._epoch_batches(0))

    def _epoch_batches(self, epoch: int) -> list[list[CachedExample]]:
        rng, by_shape = Random(f"{self.settings.seed} order {epoch}"), dict[object, list[CachedExample]]()
        for example in self.examples:
            by_shape.setdefault((example.grid, example.fps), []).append(example)
        batches = []
        for group in by_shape.values():
            rng.shuffle(group)
            for start in range(0, len(group), self.settings.batch_size):
                rest = group[start : start + self.settings.batch_size]
                batches.append([rest[index % len(rest)] for index in range(self.settings.batch_size)])
        rng.shuffle(batches)
        return batches

    def _load_batch(self, examples: Sequence[CachedExample], step_index: int | None) -> LoRABatch:
        """Loads examples. Args: step_index: decides which captions are dropped; None drops none."""
        tensors = [example.load_tensors() for example in examples]
        embeds = [each["prompt_embeds"] for each in tensors]
        if step_index is not None and self.null_text is not None:
            rng = Random(f"{self.settings.seed} words {step_index}")
            embeds = [self.null_text if rng.random() < self.settings.caption_dropout_p else rows for rows in embeds]
        mask = pad_sequence([torch.ones(len(rows), dtype=torch.bool) for rows in embeds], batch_first=True)
        references = [to_tokens(each["reference"]) for each in tensors if "reference" in each]
        return LoRABatch(
            examples[0],
            torch.cat([to_tokens(each["latents"]) for each in tensors]).to(self.device),
            torch.cat(references).to(self.device) if references else None,
            pad_sequence(embeds, batch_first=True).to(self.device, self.dtype),
            mask.to(self.device),
        )

    def _draw_noise(self, batch: LoRABatch, name: str, step_index: int | None) -> NoiseDraw:
        """Draws noise and sigmas. Args: step_index: decides if the first frame is clean; None leaves none clean."""
        count, tokens, _ = batch.clean_tokens.shape
        normal = self.noise_streams.draw(f"training level {name}", (count,))
        sigma = SIGMA_DISTRIBUTIONS[self.settings.sigma_sampling](normal, tokens)[:, None]
        grid, clean_mask = batch.example.grid, torch.zeros(tokens, dtype=torch.bool)
        if step_index is not None and grid.frames > 1:
            rng = Random(f"{self.settings.seed} given {step_index}")
            is_conditioned = rng.random() < self.settings.first_frame_conditioning_p
            clean_mask[: is_conditioned * grid.height * grid.width] = True
        noise = self.noise_streams.draw(f"training noise {name}", batch.clean_tokens.shape)
        return NoiseDraw(noise.to(self.device), sigma.to(self.device), clean_mask.to(self.device))

    def _batch_loss(self, batch: LoRABatch, draw: NoiseDraw) -> Tensor:
        tokens, sigma = add_noise(batch.clean_tokens, draw.noise, draw.sigma[..., None]), draw.sigma
        if bool(draw.clean_mask.any()):
            tokens = torch.where(draw.clean_mask[:, None], batch.clean_tokens, tokens)
            sigma = torch.where(draw.clean_mask, 0.0, sigma)
        # The positions of inference, not those of the official trainer, which left out the causal shift.
        config, example = self.transformer.config, batch.example
        positions = token_positions(example.grid, fps=example.fps, causal=config.causal_temporal_positioning)
        if batch.reference_tokens is not None:
            reference = ReferenceTokens(batch.reference_tokens, positions)
            tokens, sigma = reference.append_to(tokens, sigma)
            positions = torch.cat([positions, positions], dim=1)
        rope = self.transformer.compute_rope(positions[None].to(self.device))
        predicted = self.transformer(
            tokens.to(self.dtype), rope, batch.prompt_embeds, batch.prompt_attention_mask, sigma
        )
        target = velocity_target(batch.clean_tokens, draw.noise)
        return masked_mse(predicted[:, : target.shape[1]], target, ~draw.clean_mask)
