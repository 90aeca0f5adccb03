"""The training itself. Everything that is drawn comes from named streams of the seed, by the number of the step: a run
that was cut off goes on as if it had not been."""

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
VALIDATION_EXAMPLES = 16  # examples and levels that the loss is measured with on the way


class LoRABatch(NamedTuple):
    """Examples of one shape.

    Args:
        clean_tokens: (B, N, C) fp32; reference: the same, of what is followed.
        prompt_embeds: (B, L, D), mask: (B, L).
    """

    example: CachedExample
    clean_tokens: Tensor
    reference_tokens: Tensor | None
    prompt_embeds: Tensor
    prompt_attention_mask: Tensor


class NoiseDraw(NamedTuple):
    """What a step draws.

    Args:
        noise: (B, N, C). level: (B, 1). given: (N), true for tokens that are given clean.
    """

    noise: Tensor
    sigma: Tensor
    clean_mask: Tensor


@dataclass
class LoRATrainer:
    """One training of matrices beside a transformer.

    Args:
        lora_layers: as `learn` put them there.
        null_text: (n, D), what the text encoder makes of no words; None where captions are never left out.
    """

    transformer: Transformer
    lora_layers: Mapping[str, TrainableLoRALinear]
    examples: Sequence[CachedExample]
    settings: TrainingSettings
    dtype: torch.dtype
    device: torch.device
    null_text: Tensor | None = None

    steps_done: int = field(default=0, init=False)  # steps, as far as the matrices are
    is_consistent: bool = field(
        default=True, init=False
    )  # matrices and moments are of one step: not so inside of an update

    def __post_init__(self) -> None:
        self.noise_streams = NoiseStreams(self.settings.seed)
        parameters = [parameter for layer in self.lora_layers.values() for parameter in (layer.down, layer.up)]
        self.parameters: list[nn.Parameter] = parameters
        self.optimizer = torch.optim.AdamW(
            parameters, lr=self.settings.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
        )

    def step(self, step_index: int) -> float:
        """Update the matrices, for the `step_index`th time from 0. Returns the loss before that."""
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
        """The loss over fixed examples, levels and noise: unlike that of a step, it can be compared with another."""
        total = 0.0
        for number in range(VALIDATION_EXAMPLES):
            batch = self._load_batch([self.examples[number * len(self.examples) // VALIDATION_EXAMPLES]], None)
            drawn = self._draw_noise(batch, f"held {number}", None)
            level = torch.full_like(drawn.sigma, (number + 0.5) / VALIDATION_EXAMPLES)
            total += self._batch_loss(batch, drawn._replace(sigma=level)).item()
        return total / VALIDATION_EXAMPLES

    def _examples_of_step(self, step_index: int) -> list[CachedExample]:
        """The examples of a step: all of them come once before one comes again, but where a last batch is filled up."""
        turn, place = divmod(step_index, self._batches_per_epoch)
        return self._epoch_batches(turn)[place]

    @cached_property
    def _batches_per_epoch(self) -> int:
        return len(self._epoch_batches(0))

    def _epoch_batches(self, epoch: int) -> list[list[CachedExample]]:
        rng, alike = Random(f"{self.settings.seed} order {epoch}"), dict[object, list[CachedExample]]()
        for example in self.examples:
            alike.setdefault((example.grid, example.fps), []).append(example)
        made = []
        for group in alike.values():
            rng.shuffle(group)
            for start in range(0, len(group), self.settings.batch_size):
                taken = group[start : start + self.settings.batch_size]
                made.append([taken[index % len(taken)] for index in range(self.settings.batch_size)])
        rng.shuffle(made)
        return made

    def _load_batch(self, examples: Sequence[CachedExample], step_index: int | None) -> LoRABatch:
        """Args: number: of the step, which decides whether captions are left out; None leaves none out."""
        read = [example.load_tensors() for example in examples]
        texts = [each["text"] for each in read]
        if step_index is not None and self.null_text is not None:
            rng = Random(f"{self.settings.seed} words {step_index}")
            texts = [self.null_text if rng.random() < self.settings.caption_dropout_p else text for text in texts]
        mask = pad_sequence([torch.ones(len(text), dtype=torch.bool) for text in texts], batch_first=True)
        references = [to_tokens(each["reference"]) for each in read if "reference" in each]
        return LoRABatch(
            examples[0],
            torch.cat([to_tokens(each["latents"]) for each in read]).to(self.device),
            torch.cat(references).to(self.device) if references else None,
            pad_sequence(texts, batch_first=True).to(self.device, self.dtype),
            mask.to(self.device),
        )

    def _draw_noise(self, batch: LoRABatch, name: str, step_index: int | None) -> NoiseDraw:
        count, tokens, _ = batch.clean_tokens.shape
        normal = self.noise_streams.draw(f"training level {name}", (count,))
        level = SIGMA_DISTRIBUTIONS[self.settings.sigma_sampling](normal, tokens)[:, None]
        grid, given = batch.example.grid, torch.zeros(tokens, dtype=torch.bool)
        if step_index is not None and grid.frames > 1:
            shown = (
                Random(f"{self.settings.seed} given {step_index}").random() < self.settings.first_frame_conditioning_p
            )
            given[: shown * grid.height * grid.width] = True
        noise = self.noise_streams.draw(f"training noise {name}", batch.clean_tokens.shape)
        return NoiseDraw(noise.to(self.device), level.to(self.device), given.to(self.device))

    def _batch_loss(self, batch: LoRABatch, draw: NoiseDraw) -> Tensor:
        tokens, level = add_noise(batch.clean_tokens, draw.noise, draw.sigma[..., None]), draw.sigma
        if bool(draw.clean_mask.any()):
            tokens = torch.where(draw.clean_mask[:, None], batch.clean_tokens, tokens)
            level = torch.where(draw.clean_mask, 0.0, level)
        # The places that the model is run with, and not those of the official trainer, which left out the causal shift.
        config, first = self.transformer.config, batch.example
        where = token_positions(first.grid, fps=first.fps, causal=config.causal_temporal_positioning)
        if batch.reference_tokens is not None:
            context = ReferenceTokens(batch.reference_tokens, where)
            tokens, level = context.append_to(tokens, level)
            where = torch.cat([where, where], dim=1)
        rope = self.transformer.compute_rope(where[None].to(self.device))
        said = self.transformer(tokens.to(self.dtype), rope, batch.prompt_embeds, batch.prompt_attention_mask, level)
        right = velocity_target(batch.clean_tokens, draw.noise)
        return masked_mse(said[:, : right.shape[1]], right, ~draw.clean_mask)
