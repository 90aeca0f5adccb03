"""The distilled demo transformer: few steps, no guidance.

A copy of the tuned transformer learns to say at once what its teacher says with guidance, at the few levels that it
will be asked at. The text encoder stays the teacher's, and is shared.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.text.tokenizer import Tokenizer
from kadr.training.objective import squared_error
from train import tuning
from train.checkpointing import Average, Log, resume, save
from train.optimizer import Optimizer, share_of_rate
from train.transformer import is_matrix
from train.tuning import Batch, Trainer, noised, shaken, tokenized, velocities, worlds

BATCHES = tuning.Recipe(batch=48, large_batch=12, caption_dropout=0.0)
LEVELS = (1.0, 0.92, 0.82, 0.68, 0.5, 0.28)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one distillation is.

    Args:
        guidance: the teacher's.
    """

    guidance: float = 3.0
    steps: int = 200
    matrix_rate: float = 1.2e-3
    other_rate: float = 4e-4
    average: float = 0.97
    batches: tuning.Recipe = BATCHES
    seed: int = 2


class Distiller:
    """One distillation: teacher, student and the batches both see."""

    def __init__(self, trainer: Trainer, recipe: Recipe) -> None:
        self.trainer, self.recipe = trainer, recipe
        self.text = trainer.model["text_encoder"].requires_grad_(False)
        self.teacher: Transformer = trainer.model["transformer"].requires_grad_(False)
        self.student: Transformer = copy.deepcopy(self.teacher).requires_grad_(True)
        self.empty = tokenized(trainer.tokenizer, [""])

    def loss(self, rng: Random, step: int) -> Tensor:
        """The loss of one batch, drawn from `rng` and torch's generator."""
        batch = self.trainer.batch(rng, step)
        level = torch.tensor([[rng.choice(LEVELS)] for _ in batch.chosen])
        state, _, level = noised(batch, torch.randn_like(batch.clean), level)
        state = self.trainer.given(rng, batch, state)
        tokens = shaken(state, level, self.recipe.batches.image_noise)
        with torch.no_grad():
            prompt, empty = (
                velocities(self.teacher, self.text, state, tokens, level, asked).float()
                for asked in (batch, self._unprompted(batch))
            )
            target = empty + self.recipe.guidance * (prompt - empty)
        said = velocities(self.student, self.text, state, tokens, level, batch).float()
        free = torch.ones(batch.grid.num_tokens, dtype=torch.bool)
        if state.conditioning_mask is not None:
            free = state.conditioning_mask[0, : batch.grid.num_tokens] == 0
        return squared_error(said[:, : batch.grid.num_tokens], target[:, : batch.grid.num_tokens], free)

    def _unprompted(self, batch: Batch) -> Batch:
        ids, mask = (part.expand(len(batch.ids), -1) for part in self.empty)
        return batch._replace(ids=ids, mask=mask)


def distill(folder: Path, vae: VAE, recipe: Recipe = Recipe()) -> Transformer:
    """Train, or go on from `folder`/distilled.pt; returns the averaged weights."""
    tokenizer = Tokenizer.open(folder / "tokenizer" / "spiece.model")
    trainer = Trainer(worlds(folder, vae, recipe.batches), tokenizer, recipe.batches)
    trainer.model.load_state_dict(torch.load(folder / "tuned.pt", weights_only=True)["average"])
    distiller = Distiller(trainer, recipe)
    student = distiller.student
    average = Average(student, recipe.average)
    optimizer = Optimizer(student, is_matrix=_is_matrix, matrix_rate=recipe.matrix_rate, other_rate=recipe.other_rate)
    parts = {"model": student, "average": average.model, "optimizer": optimizer}
    state = folder / "distilled.pt"
    start = resume(state, **parts)
    log = Log(folder / "distilled.csv", ("step", "loss", "seconds"), every=20)
    print(asdict(recipe), flush=True)
    began = time.monotonic()
    for step in range(start, recipe.steps):
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        loss = distiller.loss(Random(recipe.seed * 1_000_003 + step), step)
        loss.backward()
        optimizer.step(share_of_rate(step, recipe.steps, warmup=20, decay=0.6))
        average.update(student, step)
        log.add(step=step, loss=loss.item(), seconds=time.monotonic() - began)
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            save(state, step + 1, **parts)
    return average.model


def _is_matrix(name: str) -> bool:
    return is_matrix(f"transformer.{name}")
