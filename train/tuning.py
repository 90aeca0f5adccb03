"""The demo transformer's second training: conditions anywhere in the video, and twice the size.

It starts from the EMA weights of the first. Some batches have a condition: a first frame, a keyframe, a clip at the
beginning or a clip at the end; some are scenes at 256 x 256.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.sampling.conditioning import append_keyframe, insert_clip, replace_latents
from kadr.sampling.positions import token_positions
from kadr.sampling.state import LatentState, to_tokens
from kadr.shapes import LatentGrid
from kadr.text.tokenizer import Tokenizer
from kadr.training import objective
from kadr.training.objective import masked_mse, stratified_sigmas, velocity_target
from train.checkpointing import EMA, CurveLog, load_state, save_state
from train.optimizer import MuonAdamW, lr_multiplier
from train.scenes import CLIP_FRAMES, Scene, render, varied_caption
from train.transformer import DEMO_TRANSFORMER, FPS, GRID, build_modules, uses_muon

LARGE_GRID = LatentGrid(frames=4, height=8, width=8)
ENDING_FRAMES = (9, 17)  # frames of the clips that are conditions at the end of a video


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Settings of the tuning.

    The shipped weights were tuned with `steps` at 500, learning rates of 1.2e-3 and 4e-4, one large batch in five and
    two batches in six without a condition; then further with these settings.

    Args:
        num_scenes: scenes of the first training that conditions are encoded for.
        num_large_scenes: scenes encoded at twice the size.
        large_every: one batch in this many is of large scenes.
    """

    num_scenes: int = 4096
    num_large_scenes: int = 2048
    large_every: int = 7
    steps: int = 1250
    batch_size: int = 64
    large_batch_size: int = 16
    muon_lr: float = 2e-3
    adamw_lr: float = 6e-4
    caption_dropout: float = 0.1
    image_noise: float = 0.15
    ema_decay: float = 0.99
    seed: int = 1


class TuningData(NamedTuple):
    """Scenes and normalised latents, float16.

    Args:
        clip_latents: (N, C, 4, 4, 4), of whole clips.
        image_frames: (N), the frame of each scene that `image_latents` (N, C, 1, 4, 4) show.
        ending_latents: by number of frames, 9 or 17, those of the end encoded as a clip, (N, C, 2 or 3, 4, 4).
        large_latents: (L, C, 4, 8, 8) of `large_scenes`.
    """

    scenes: list[Scene]
    clip_latents: Tensor
    image_frames: Tensor
    image_latents: Tensor
    ending_latents: dict[int, Tensor]
    large_scenes: list[Scene]
    large_latents: Tensor


@torch.no_grad()
def encode_scenes(
    vae: VAE, scenes: list[Scene], frames: int, starts: list[int], side: int = 128, batch_size: int = 16
) -> Tensor:
    """Encodes clips that begin at frames `starts`: normalised latents, float16 (N, C, f, side / 32, side / 32)."""
    batches = []
    for begin in range(0, len(scenes), batch_size):
        batch = list(zip(scenes, starts, strict=True))[begin : begin + batch_size]
        pixels = torch.cat([render([scene], frames, (side, side), first_frame=start) for scene, start in batch])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean = vae.encode_moments(pixels).mean
        batches.append(vae.statistics.normalise(mean.float()).half())
    return torch.cat(batches)


def load_or_encode(state_folder: Path, vae: VAE, config: TuningConfig) -> TuningData:
    """Returns the latents, stored in `state_folder`/conditions.pt so that a resumed tuning reuses them."""
    path = state_folder / "conditions.pt"
    first_rng = Random(7)  # the same scenes as in the first training
    scenes = [Scene.sample(first_rng) for _ in range(config.num_scenes)]
    rng = Random(config.seed + 70)
    large_scenes = [Scene.sample(rng) for _ in range(config.num_large_scenes)]
    frames = [rng.randrange(1, CLIP_FRAMES) for _ in scenes]
    if not path.exists():
        latents = {"images": encode_scenes(vae, scenes, 1, frames)}
        for count in ENDING_FRAMES:
            latents[f"ending {count}"] = encode_scenes(vae, scenes, count, [CLIP_FRAMES - count] * len(scenes))
            print(f"encoded endings of {count} frames", flush=True)
        latents["large"] = encode_scenes(vae, large_scenes, CLIP_FRAMES, [0] * len(large_scenes), 256, 4)
        torch.save(latents, path)
    stored = torch.load(path, weights_only=True)
    clips = torch.load(state_folder / "scenes.pt", weights_only=True)[: config.num_scenes]
    endings = {count: stored[f"ending {count}"] for count in ENDING_FRAMES}
    return TuningData(scenes, clips, torch.tensor(frames), stored["images"], endings, large_scenes, stored["large"])


class TuningBatch(NamedTuple):
    """Clean latents (B, C, f, h, w), text ids and mask (B, L), and the kind of condition of the batch."""

    clean_latents: Tensor
    input_ids: Tensor
    prompt_attention_mask: Tensor
    grid: LatentGrid
    condition_kind: str
    scene_indices: list[int]


CONDITION_KINDS = ("none", "first frame", "keyframe", "keyframe", "beginning", "ending", "ending")


class TuningTrainer:
    """A tuning: the two networks, the encoded scenes and the batches that it draws."""

    def __init__(self, data: TuningData, tokenizer: Tokenizer, config: TuningConfig) -> None:
        self.data, self.tokenizer, self.config = data, tokenizer, config
        self.modules = build_modules()

    def draw_batch(self, rng: Random, step: int) -> TuningBatch:
        """Draws a batch: large on every `large_every`th step, otherwise with one kind of condition."""
        config, data = self.config, self.data
        is_large = step % config.large_every == 0
        scenes, latents = (data.large_scenes, data.large_latents) if is_large else (data.scenes, data.clip_latents)
        batch_size = config.large_batch_size if is_large else config.batch_size
        kind = rng.choice(("none", "none", "first frame") if is_large else CONDITION_KINDS)
        if kind == "keyframe":  # one position for the whole batch, because it shares the RoPE table
            frame = rng.randrange(1, CLIP_FRAMES)
            pool = (data.image_frames == frame).nonzero().flatten().tolist()
        else:
            pool = range(len(scenes))
        scene_indices = [rng.choice(pool) for _ in range(batch_size)]
        ids, mask = self.draw_captions(rng, [scenes[i] for i in scene_indices])
        return TuningBatch(
            latents[scene_indices].float(), ids, mask, LARGE_GRID if is_large else GRID, kind, scene_indices
        )

    def draw_captions(self, rng: Random, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        """Returns ids and mask (B, L), cut to the longest caption of the batch: padding would change nothing."""
        texts = ["" if rng.random() < self.config.caption_dropout else varied_caption(scene, rng) for scene in scenes]
        return tokenize(self.tokenizer, texts)

    def add_conditions(self, rng: Random, batch: TuningBatch, state: LatentState) -> LatentState:
        """Returns the state with the batch's condition."""
        if batch.condition_kind == "none":
            return state
        if batch.condition_kind in ("first frame", "beginning"):
            count = 1 if batch.condition_kind == "first frame" else rng.choice((2, 3))
            return replace_latents(state, batch.clean_latents[:, :, :count], 1.0)
        if batch.condition_kind == "keyframe":
            latents = self.data.image_latents[batch.scene_indices].float()
            start = int(self.data.image_frames[batch.scene_indices[0]])
            positions = grid_positions(LatentGrid(1, 4, 4), start)
            return append_keyframe(state, latents, positions, 1.0, torch.zeros_like(latents))
        count = rng.choice(ENDING_FRAMES)
        latents, start = self.data.ending_latents[count][batch.scene_indices].float(), CLIP_FRAMES - count
        noise = torch.zeros_like(latents[:, :, :2])
        positions = grid_positions(LatentGrid(2, 4, 4), start)
        return insert_clip(state, latents, positions, 1.0, noise, latent_frame=start // 8)

    def loss(self, rng: Random, step: int) -> Tensor:
        """Returns the loss of one batch, drawn from `rng` and torch's generator."""
        batch = self.draw_batch(rng, step)
        state, target, sigma = noisy_state(batch, torch.randn_like(batch.clean_latents))
        state = self.add_conditions(rng, batch, state)
        tokens = tokens_with_image_noise(state, sigma, self.config.image_noise)
        predicted = predict_velocity(
            self.modules["transformer"], self.modules["text_encoder"], state, tokens, sigma, batch
        )
        loss_mask = torch.ones(batch.grid.num_tokens, dtype=torch.bool)
        if state.conditioning_mask is not None:
            loss_mask = state.conditioning_mask[0, : batch.grid.num_tokens] == 0
        return masked_mse(predicted[:, : batch.grid.num_tokens], target, loss_mask)


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokenizes texts to ids and mask (B, L), cut to the longest."""
    encoded = [tokenizer.encode(text) for text in texts]
    ids, mask = torch.cat([e.ids for e in encoded]), torch.cat([e.mask for e in encoded])
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest]


def grid_positions(grid: LatentGrid, start: int = 0) -> Tensor:
    """Returns the positions of a grid that begins at pixel frame `start`."""
    return token_positions(grid, fps=FPS, causal=DEMO_TRANSFORMER.causal_temporal_positioning, first_frame=start)


def noisy_state(batch: TuningBatch, noise: Tensor, sigma: Tensor | None = None) -> tuple[LatentState, Tensor, Tensor]:
    """Returns the state at a sigma (B, 1), random if None, the target velocity (B, N, C), and that sigma."""
    sigma = stratified_sigmas(len(batch.clean_latents))[:, None] if sigma is None else sigma
    noisy = objective.add_noise(batch.clean_latents, noise, sigma[:, :, None, None, None])
    return (
        LatentState.from_latents(noisy, grid_positions(batch.grid), batch.grid),
        to_tokens(velocity_target(batch.clean_latents, noise)),
        sigma,
    )


def tokens_with_image_noise(state: LatentState, sigma: Tensor, scale: float) -> Tensor:
    """Returns the tokens with the image noise that sampling adds to conditions."""
    if state.conditioning_mask is None:
        return state.tokens
    noise = scale * sigma[..., None] ** 2 * torch.randn_like(state.tokens)
    return torch.where(state.conditioning_mask[..., None] == 1, state.clean_tokens + noise, state.tokens)


def predict_velocity(
    transformer: Transformer,
    text_encoder: nn.Module,
    state: LatentState,
    tokens: Tensor,
    sigma: Tensor,
    batch: TuningBatch,
) -> Tensor:
    """Predicts the velocity of tokens (B, N, C)."""
    # On a CPU the fused attention's backward takes three times as long as plain matmuls at 64 tokens.
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        prompt_embeds = text_encoder(batch.input_ids, batch.prompt_attention_mask)
        return transformer(
            tokens,
            transformer.compute_rope(state.positions[None]),
            prompt_embeds,
            batch.prompt_attention_mask,
            state.sigma_per_token(sigma),
        )


def tune(state_folder: Path, vae: VAE, config: TuningConfig = TuningConfig()) -> nn.ModuleDict:
    """Trains, or resumes from `state_folder`/tuned.pt; returns the EMA weights."""
    tokenizer = Tokenizer.open(state_folder / "tokenizer" / "spiece.model")
    trainer = TuningTrainer(load_or_encode(state_folder, vae, config), tokenizer, config)
    model = trainer.modules
    model.load_state_dict(torch.load(state_folder / "transformer.pt", weights_only=True)["ema"])
    ema = EMA(model, config.ema_decay)
    optimizer = MuonAdamW(model, uses_muon=uses_muon, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr)
    checkpoint = {"model": model, "ema": ema.model, "optimizer": optimizer}
    state_file = state_folder / "tuned.pt"
    start_step = load_state(state_file, **checkpoint)
    log = CurveLog(state_folder / "tuned.csv", ("step", "loss", "seconds"), every=20)
    print(asdict(config), flush=True)
    start_time = time.monotonic()
    for step in range(start_step, config.steps):
        torch.manual_seed(config.seed * 1_000_003 + step)
        loss = trainer.loss(Random(config.seed * 1_000_003 + step), step)
        loss.backward()
        optimizer.step(lr_multiplier(step, config.steps, warmup=30, decay=0.6))
        ema.update(model, step)
        log.add(step=step, loss=loss.item(), seconds=time.monotonic() - start_time)
        if (step + 1) % 50 == 0 or step + 1 == config.steps:
            save_state(state_file, step + 1, **checkpoint)
    return ema.model
