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
from kadr.training.example_cache import Encoded
from kadr.training.objective import DISTRIBUTIONS, noised, squared_error, velocity
from kadr.training.settings import TrainingSettings
from kadr.training.trainable_lora import Learning

WEIGHT_DECAY, BETAS, LARGEST_GRADIENT = 0.01, (0.9, 0.999), 1.0
HELD = 16  # examples and levels that the loss is measured with on the way


class Batch(NamedTuple):
    """Examples of one shape.

    Args:
        clean: (B, N, C) fp32; reference: the same, of what is followed.
        text: (B, L, D), mask: (B, L).
    """

    first: Encoded
    clean: Tensor
    reference: Tensor | None
    text: Tensor
    mask: Tensor


class Draw(NamedTuple):
    """What a step draws.

    Args:
        noise: (B, N, C). level: (B, 1). given: (N), true for tokens that are given clean.
    """

    noise: Tensor
    level: Tensor
    given: Tensor


@dataclass
class Trainer:
    """One training of matrices beside a transformer.

    Args:
        layers: as `learn` put them there.
        wordless: (n, D), what the text encoder makes of no words; None where captions are never left out.
    """

    module: Transformer
    layers: Mapping[str, Learning]
    examples: Sequence[Encoded]
    settings: TrainingSettings
    dtype: torch.dtype
    device: torch.device
    wordless: Tensor | None = None

    done: int = field(default=0, init=False)  # steps, as far as the matrices are
    whole: bool = field(default=True, init=False)  # matrices and moments are of one step: not so inside of an update

    def __post_init__(self) -> None:
        self.noise = NoiseStreams(self.settings.seed)
        parameters = [parameter for layer in self.layers.values() for parameter in (layer.down, layer.up)]
        self.parameters: list[nn.Parameter] = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=self.settings.rate, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def step(self, number: int) -> float:
        """Update the matrices, for the `number`th time from 0. Returns the loss before that."""
        batch = self._batch(self._chosen(number), number)
        loss = self._loss(batch, self._drawn(batch, f"step {number}", number))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, LARGEST_GRADIENT)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * min(1.0, (number + 1) / (self.settings.warmup + 1))
        self.whole = False
        self.optimizer.step()
        self.done, self.whole = number + 1, True
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.no_grad()
    def measure(self) -> float:
        """The loss over fixed examples, levels and noise: unlike that of a step, it can be compared with another."""
        total = 0.0
        for number in range(HELD):
            batch = self._batch([self.examples[number * len(self.examples) // HELD]], None)
            drawn = self._drawn(batch, f"held {number}", None)
            level = torch.full_like(drawn.level, (number + 0.5) / HELD)
            total += self._loss(batch, drawn._replace(sigma=level)).item()
        return total / HELD

    def _chosen(self, number: int) -> list[Encoded]:
        """The examples of a step: all of them come once before one comes again, but where a last batch is filled up."""
        turn, place = divmod(number, self._in_a_turn)
        return self._batches(turn)[place]

    @cached_property
    def _in_a_turn(self) -> int:
        return len(self._batches(0))

    def _batches(self, turn: int) -> list[list[Encoded]]:
        rng, alike = Random(f"{self.settings.seed} order {turn}"), dict[object, list[Encoded]]()
        for example in self.examples:
            alike.setdefault((example.grid, example.fps), []).append(example)
        made = []
        for group in alike.values():
            rng.shuffle(group)
            for start in range(0, len(group), self.settings.batch):
                taken = group[start : start + self.settings.batch]
                made.append([taken[index % len(taken)] for index in range(self.settings.batch)])
        rng.shuffle(made)
        return made

    def _batch(self, examples: Sequence[Encoded], number: int | None) -> Batch:
        """Args: number: of the step, which decides whether captions are left out; None leaves none out."""
        read = [example.read() for example in examples]
        texts = [each["text"] for each in read]
        if number is not None and self.wordless is not None:
            rng = Random(f"{self.settings.seed} words {number}")
            texts = [self.wordless if rng.random() < self.settings.caption_dropout else text for text in texts]
        mask = pad_sequence([torch.ones(len(text), dtype=torch.bool) for text in texts], batch_first=True)
        references = [to_tokens(each["reference"]) for each in read if "reference" in each]
        return Batch(
            examples[0],
            torch.cat([to_tokens(each["latents"]) for each in read]).to(self.device),
            torch.cat(references).to(self.device) if references else None,
            pad_sequence(texts, batch_first=True).to(self.device, self.dtype),
            mask.to(self.device),
        )

    def _drawn(self, batch: Batch, name: str, number: int | None) -> Draw:
        count, tokens, _ = batch.clean.shape
        normal = self.noise.draw(f"training level {name}", (count,))
        level = DISTRIBUTIONS[self.settings.levels](normal, tokens)[:, None]
        grid, given = batch.first.grid, torch.zeros(tokens, dtype=torch.bool)
        if number is not None and grid.frames > 1:
            shown = Random(f"{self.settings.seed} given {number}").random() < self.settings.first_frame
            given[: shown * grid.height * grid.width] = True
        noise = self.noise.draw(f"training noise {name}", batch.clean.shape)
        return Draw(noise.to(self.device), level.to(self.device), given.to(self.device))

    def _loss(self, batch: Batch, drawn: Draw) -> Tensor:
        tokens, level = noised(batch.clean, drawn.noise, drawn.level[..., None]), drawn.level
        if bool(drawn.given.any()):
            tokens = torch.where(drawn.given[:, None], batch.clean, tokens)
            level = torch.where(drawn.given, 0.0, level)
        # The places that the model is run with, and not those of the official trainer, which left out the causal shift.
        config, first = self.module.config, batch.first
        where = token_positions(first.grid, fps=first.fps, causal=config.causal_temporal_positioning)
        if batch.reference is not None:
            context = ReferenceTokens(batch.reference, where)
            tokens, level = context.append_to(tokens, level)
            where = torch.cat([where, where], dim=1)
        rope = self.module.compute_rope(where[None].to(self.device))
        said = self.module(tokens.to(self.dtype), rope, batch.text, batch.mask, level)
        right = velocity(batch.clean, drawn.noise)
        return squared_error(said[:, : right.shape[1]], right, ~drawn.given)
