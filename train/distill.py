"""Guidance distillation of the demo transformer: few steps, no CFG.

A copy of the tuned transformer learns to predict in one evaluation what its teacher predicts with CFG, at the few
sigmas that it will sample at. Student and teacher share the frozen text encoder.
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
from kadr.training.objective import masked_mse
from train import tuning
from train.checkpointing import EMA, CurveLog, load_state, save_state
from train.optimizer import MuonAdamW, lr_multiplier
from train.transformer import uses_muon
from train.tuning import (
    TuningBatch,
    TuningTrainer,
    load_or_encode,
    noisy_state,
    predict_velocity,
    tokenize,
    tokens_with_image_noise,
)

BATCH_CONFIG = tuning.TuningConfig(batch_size=48, large_batch_size=12, caption_dropout=0.0)
SIGMAS = (1.0, 0.92, 0.82, 0.68, 0.5, 0.28)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of a distillation.

    Args:
        guidance: the teacher's CFG scale.
    """

    guidance: float = 3.0
    steps: int = 200
    muon_lr: float = 1.2e-3
    adamw_lr: float = 4e-4
    ema_decay: float = 0.97
    batch_config: tuning.TuningConfig = BATCH_CONFIG
    seed: int = 2


class Distiller:
    """A distillation: teacher, student and the batches of both."""

    def __init__(self, tuning_trainer: TuningTrainer, config: DistillConfig) -> None:
        self.tuning_trainer, self.config = tuning_trainer, config
        self.text_encoder = tuning_trainer.modules["text_encoder"].requires_grad_(False)
        self.teacher: Transformer = tuning_trainer.modules["transformer"].requires_grad_(False)
        self.student: Transformer = copy.deepcopy(self.teacher).requires_grad_(True)
        self.null_text = tokenize(tuning_trainer.tokenizer, [""])

    def loss(self, rng: Random, step: int) -> Tensor:
        """Returns the loss of one batch, drawn from `rng` and torch's generator."""
        batch = self.tuning_trainer.draw_batch(rng, step)
        sigma = torch.tensor([[rng.choice(SIGMAS)] for _ in batch.scene_indices])  # (B, 1)
        state, _, sigma = noisy_state(batch, torch.randn_like(batch.clean_latents), sigma)
        state = self.tuning_trainer.add_conditions(rng, batch, state)
        tokens = tokens_with_image_noise(state, sigma, self.config.batch_config.image_noise)
        with torch.no_grad():
            cond, uncond = (
                predict_velocity(self.teacher, self.text_encoder, state, tokens, sigma, text_batch).float()
                for text_batch in (batch, self._with_null_text(batch))
            )
            target = uncond + self.config.guidance * (cond - uncond)
        predicted = predict_velocity(self.student, self.text_encoder, state, tokens, sigma, batch).float()
        loss_mask = torch.ones(batch.grid.num_tokens, dtype=torch.bool)
        if state.conditioning_mask is not None:
            loss_mask = state.conditioning_mask[0, : batch.grid.num_tokens] == 0
        return masked_mse(predicted[:, : batch.grid.num_tokens], target[:, : batch.grid.num_tokens], loss_mask)

    def _with_null_text(self, batch: TuningBatch) -> TuningBatch:
        ids, mask = (tensor.expand(len(batch.input_ids), -1) for tensor in self.null_text)
        return batch._replace(input_ids=ids, prompt_attention_mask=mask)


def distill(state_folder: Path, vae: VAE, config: DistillConfig = DistillConfig()) -> Transformer:
    """Trains, or resumes from `state_folder`/distilled.pt; returns the EMA weights."""
    tokenizer = Tokenizer.open(state_folder / "tokenizer" / "spiece.model")
    trainer = TuningTrainer(load_or_encode(state_folder, vae, config.batch_config), tokenizer, config.batch_config)
    trainer.modules.load_state_dict(torch.load(state_folder / "tuned.pt", weights_only=True)["ema"])
    distiller = Distiller(trainer, config)
    student = distiller.student
    ema = EMA(student, config.ema_decay)
    optimizer = MuonAdamW(student, uses_muon=_uses_muon, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr)
    checkpoint = {"model": student, "ema": ema.model, "optimizer": optimizer}
    state_file = state_folder / "distilled.pt"
    start_step = load_state(state_file, **checkpoint)
    log = CurveLog(state_folder / "distilled.csv", ("step", "loss", "seconds"), every=20)
    print(asdict(config), flush=True)
    start_time = time.monotonic()
    for step in range(start_step, config.steps):
        torch.manual_seed(config.seed * 1_000_003 + step)
        loss = distiller.loss(Random(config.seed * 1_000_003 + step), step)
        loss.backward()
        optimizer.step(lr_multiplier(step, config.steps, warmup=20, decay=0.6))
        ema.update(student, step)
        log.add(step=step, loss=loss.item(), seconds=time.monotonic() - start_time)
        if (step + 1) % 50 == 0 or step + 1 == config.steps:
            save_state(state_file, step + 1, **checkpoint)
    return ema.model


def _uses_muon(name: str) -> bool:
    return uses_muon(f"transformer.{name}")
