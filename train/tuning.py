"""The demo transformer's second training: conditions anywhere in the video, and twice the size.

It begins with the averaged weights of the first. One part of the batches is given a first picture, a picture in the
middle, a beginning or an end; another part shows the world at 256 x 256.
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
ENDING_FRAMES = (9, 17)  # frames of the clips that a video is made to end with


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """What one tuning is.

    The shipped weights were tuned with `steps` at 500, rates of 1.2e-3 and 4e-4, one batch in five large and two in six
    given nothing; then on from there as it stands here.

    Args:
        num_scenes: of the first training's world that conditions are encoded for.
        num_large_scenes: encoded at twice the size.
        large_every: one batch in so many is of them.
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
        clip_latents: (N, C, 4, 4, 4) whole clips.
        image_frames: (N) which frame of each scene `image_latents` (N, C, 1, 4, 4) shows.
        ending_latents: the last 9 and 17 frames as clips of their own, (N, C, 2 or 3, 4, 4).
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
    """Normalised latents of clips that begin at frames `starts`, float16 (N, C, f, side / 32, side / 32)."""
    made = []
    for begin in range(0, len(scenes), batch_size):
        chosen = list(zip(scenes, starts, strict=True))[begin : begin + batch_size]
        pixels = torch.cat([render([scene], frames, (side, side), first_frame=start) for scene, start in chosen])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean = vae.encode_moments(pixels).mean
        made.append(vae.statistics.normalise(mean.float()).half())
    return torch.cat(made)


def load_or_encode(state_folder: Path, vae: VAE, config: TuningConfig) -> TuningData:
    """The latents, kept in `state_folder`/conditions.pt so that a resumed training need not encode them again."""
    path = state_folder / "conditions.pt"
    first = Random(7)  # as the first training drew its world
    scenes = [Scene.sample(first) for _ in range(config.num_scenes)]
    other = Random(config.seed + 70)
    large_scenes = [Scene.sample(other) for _ in range(config.num_large_scenes)]
    frames = [other.randrange(1, CLIP_FRAMES) for _ in scenes]
    if not path.exists():
        made = {"pictures": encode_scenes(vae, scenes, 1, frames)}
        for count in ENDING_FRAMES:
            made[f"ending {count}"] = encode_scenes(vae, scenes, count, [CLIP_FRAMES - count] * len(scenes))
            print(f"encoded endings of {count} frames", flush=True)
        made["large"] = encode_scenes(vae, large_scenes, CLIP_FRAMES, [0] * len(large_scenes), 256, 4)
        torch.save(made, path)
    kept = torch.load(path, weights_only=True)
    clips = torch.load(state_folder / "world.pt", weights_only=True)[: config.num_scenes]
    endings = {count: kept[f"ending {count}"] for count in ENDING_FRAMES}
    return TuningData(scenes, clips, torch.tensor(frames), kept["pictures"], endings, large_scenes, kept["large"])


class TuningBatch(NamedTuple):
    """Clean latents (B, C, f, h, w), text ids and mask (B, L), and what is given: a map of states."""

    clean_latents: Tensor
    input_ids: Tensor
    prompt_attention_mask: Tensor
    grid: LatentGrid
    condition_kind: str
    scene_indices: list[int]


CONDITION_KINDS = ("nothing", "first", "picture", "picture", "beginning", "ending", "ending")


class TuningTrainer:
    """One tuning: the two networks, the worlds and the batches it draws."""

    def __init__(self, data: TuningData, tokenizer: Tokenizer, config: TuningConfig) -> None:
        self.data, self.tokenizer, self.config = data, tokenizer, config
        self.modules = build_modules()

    def draw_batch(self, rng: Random, step: int) -> TuningBatch:
        """Every `large_every`th batch is large; the others are given one thing each."""
        recipe, worlds = self.config, self.data
        large = step % recipe.large_every == 0
        scenes, latents = (worlds.large_scenes, worlds.large_latents) if large else (worlds.scenes, worlds.clip_latents)
        count = recipe.large_batch_size if large else recipe.batch_size
        kind = rng.choice(("nothing", "nothing", "first") if large else CONDITION_KINDS)
        if kind == "picture":  # one position for the whole batch: the table of rotations is shared
            frame = rng.randrange(1, CLIP_FRAMES)
            pool = (worlds.image_frames == frame).nonzero().flatten().tolist()
        else:
            pool = range(len(scenes))
        chosen = [rng.choice(pool) for _ in range(count)]
        ids, mask = self.draw_captions(rng, [scenes[i] for i in chosen])
        return TuningBatch(latents[chosen].float(), ids, mask, LARGE_GRID if large else GRID, kind, chosen)

    def draw_captions(self, rng: Random, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, L), cut to the longest caption of the batch: padding would change nothing."""
        texts = ["" if rng.random() < self.config.caption_dropout else varied_caption(scene, rng) for scene in scenes]
        return tokenize(self.tokenizer, texts)

    def add_conditions(self, rng: Random, batch: TuningBatch, state: LatentState) -> LatentState:
        """The state with what the batch is given put into it."""
        if batch.condition_kind == "nothing":
            return state
        if batch.condition_kind in ("first", "beginning"):
            count = 1 if batch.condition_kind == "first" else rng.choice((2, 3))
            return replace_latents(state, batch.clean_latents[:, :, :count], 1.0)
        if batch.condition_kind == "picture":
            latents, start = (
                self.data.image_latents[batch.scene_indices].float(),
                int(self.data.image_frames[batch.scene_indices[0]]),
            )
            return append_keyframe(
                state, latents, grid_positions(LatentGrid(1, 4, 4), start), 1.0, torch.zeros_like(latents)
            )
        count = rng.choice(ENDING_FRAMES)
        latents, start = self.data.ending_latents[count][batch.scene_indices].float(), CLIP_FRAMES - count
        noise = torch.zeros_like(latents[:, :, :2])
        return insert_clip(
            state, latents, grid_positions(LatentGrid(2, 4, 4), start), 1.0, noise, latent_frame=start // 8
        )

    def loss(self, rng: Random, step: int) -> Tensor:
        """The loss of one batch, drawn from `rng` and torch's generator."""
        batch = self.draw_batch(rng, step)
        state, target, level = noisy_state(batch, torch.randn_like(batch.clean_latents))
        state = self.add_conditions(rng, batch, state)
        tokens = tokens_with_image_noise(state, level, self.config.image_noise)
        said = predict_velocity(self.modules["transformer"], self.modules["text"], state, tokens, level, batch)
        free = torch.ones(batch.grid.num_tokens, dtype=torch.bool)
        if state.conditioning_mask is not None:
            free = state.conditioning_mask[0, : batch.grid.num_tokens] == 0
        return masked_mse(said[:, : batch.grid.num_tokens], target, free)


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L), cut to the longest."""
    encoded = [tokenizer.encode(text) for text in texts]
    ids, mask = torch.cat([e.ids for e in encoded]), torch.cat([e.mask for e in encoded])
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest]


def grid_positions(grid: LatentGrid, start: int = 0) -> Tensor:
    """Positions of a grid that begins at pixel frame `start`."""
    return token_positions(grid, fps=FPS, causal=DEMO_TRANSFORMER.causal_temporal_positioning, first_frame=start)


def noisy_state(batch: TuningBatch, noise: Tensor, sigma: Tensor | None = None) -> tuple[LatentState, Tensor, Tensor]:
    """The state at random levels (B, 1), the velocity (B, N, C) it should be seen to have, and the levels."""
    sigma = stratified_sigmas(len(batch.clean_latents))[:, None] if sigma is None else sigma
    between = objective.add_noise(batch.clean_latents, noise, sigma[:, :, None, None, None])
    return (
        LatentState.from_latents(between, grid_positions(batch.grid), batch.grid),
        to_tokens(velocity_target(batch.clean_latents, noise)),
        sigma,
    )


def tokens_with_image_noise(state: LatentState, sigma: Tensor, scale: float) -> Tensor:
    """The tokens, with the noise that sampling adds to those that are given."""
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
    """What the network makes of the tokens (B, N, C)."""
    # On a CPU the fused attention's backward takes three times as long as plain products at 64 tokens.
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        encoding = text_encoder(batch.input_ids, batch.prompt_attention_mask)
        return transformer(
            tokens,
            transformer.compute_rope(state.positions[None]),
            encoding,
            batch.prompt_attention_mask,
            state.sigma_per_token(sigma),
        )


def tune(state_folder: Path, vae: VAE, config: TuningConfig = TuningConfig()) -> nn.ModuleDict:
    """Train, or go on from `state_folder`/tuned.pt; returns the averaged weights."""
    tokenizer = Tokenizer.open(state_folder / "tokenizer" / "spiece.model")
    trainer = TuningTrainer(load_or_encode(state_folder, vae, config), tokenizer, config)
    model = trainer.modules
    model.load_state_dict(torch.load(state_folder / "transformer.pt", weights_only=True)["average"])
    average = EMA(model, config.ema_decay)
    optimizer = MuonAdamW(model, uses_muon=uses_muon, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr)
    parts = {"model": model, "average": average.model, "optimizer": optimizer}
    state = state_folder / "tuned.pt"
    start = load_state(state, **parts)
    log = CurveLog(state_folder / "tuned.csv", ("step", "loss", "seconds"), every=20)
    print(asdict(config), flush=True)
    began = time.monotonic()
    for step in range(start, config.steps):
        torch.manual_seed(config.seed * 1_000_003 + step)
        loss = trainer.loss(Random(config.seed * 1_000_003 + step), step)
        loss.backward()
        optimizer.step(lr_multiplier(step, config.steps, warmup=30, decay=0.6))
        average.update(model, step)
        log.add(step=step, loss=loss.item(), seconds=time.monotonic() - began)
        if (step + 1) % 50 == 0 or step + 1 == config.steps:
            save_state(state, step + 1, **parts)
    return average.model
