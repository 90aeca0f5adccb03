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
from kadr.training.objective import spread, squared_error, velocity
from train.checkpointing import Average, Log, resume, save
from train.optimizer import Optimizer, share_of_rate
from train.scenes import CLIP_FRAMES, Scene, caption, render
from train.transformer import DEMO_TRANSFORMER, FRAMES_PER_SECOND, GRID, build, is_matrix

LARGE = LatentGrid(frames=4, height=8, width=8)
ENDINGS = (9, 17)  # frames of the clips that a video is made to end with


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one tuning is.

    The shipped weights were tuned with `steps` at 500, rates of 1.2e-3 and 4e-4, one batch in five large and two in six
    given nothing; then on from there as it stands here.

    Args:
        scenes: of the first training's world that conditions are encoded for.
        large_scenes: encoded at twice the size.
        large_every: one batch in so many is of them.
    """

    scenes: int = 4096
    large_scenes: int = 2048
    large_every: int = 7
    steps: int = 1250
    batch: int = 64
    large_batch: int = 16
    matrix_rate: float = 2e-3
    other_rate: float = 6e-4
    caption_dropout: float = 0.1
    image_noise: float = 0.15
    average: float = 0.99
    seed: int = 1


class Worlds(NamedTuple):
    """Scenes and normalised latents, float16.

    Args:
        clips: (N, C, 4, 4, 4) whole clips.
        frames: (N) which frame of each scene `pictures` (N, C, 1, 4, 4) shows.
        endings: the last 9 and 17 frames as clips of their own, (N, C, 2 or 3, 4, 4).
        large: (L, C, 4, 8, 8) of `large_scenes`.
    """

    scenes: list[Scene]
    clips: Tensor
    frames: Tensor
    pictures: Tensor
    endings: dict[int, Tensor]
    large_scenes: list[Scene]
    large: Tensor


@torch.no_grad()
def encoded(vae: VAE, scenes: list[Scene], frames: int, starts: list[int], side: int = 128, batch: int = 16) -> Tensor:
    """Normalised latents of clips that begin at frames `starts`, float16 (N, C, f, side / 32, side / 32)."""
    made = []
    for begin in range(0, len(scenes), batch):
        chosen = list(zip(scenes, starts, strict=True))[begin : begin + batch]
        pixels = torch.cat([render([scene], frames, (side, side), first_frame=start) for scene, start in chosen])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean = vae.encode_moments(pixels).mean
        made.append(vae.statistics.normalise(mean.float()).half())
    return torch.cat(made)


def worlds(folder: Path, vae: VAE, recipe: Recipe) -> Worlds:
    """The latents, kept in `folder`/conditions.pt so that a resumed training need not encode them again."""
    path = folder / "conditions.pt"
    first = Random(7)  # as the first training drew its world
    scenes = [Scene.sample(first) for _ in range(recipe.scenes)]
    other = Random(recipe.seed + 70)
    large_scenes = [Scene.sample(other) for _ in range(recipe.large_scenes)]
    frames = [other.randrange(1, CLIP_FRAMES) for _ in scenes]
    if not path.exists():
        made = {"pictures": encoded(vae, scenes, 1, frames)}
        for count in ENDINGS:
            made[f"ending {count}"] = encoded(vae, scenes, count, [CLIP_FRAMES - count] * len(scenes))
            print(f"encoded endings of {count} frames", flush=True)
        made["large"] = encoded(vae, large_scenes, CLIP_FRAMES, [0] * len(large_scenes), 256, 4)
        torch.save(made, path)
    kept = torch.load(path, weights_only=True)
    clips = torch.load(folder / "world.pt", weights_only=True)[: recipe.scenes]
    endings = {count: kept[f"ending {count}"] for count in ENDINGS}
    return Worlds(scenes, clips, torch.tensor(frames), kept["pictures"], endings, large_scenes, kept["large"])


class Batch(NamedTuple):
    """Clean latents (B, C, f, h, w), text ids and mask (B, L), and what is given: a map of states."""

    clean: Tensor
    ids: Tensor
    mask: Tensor
    grid: LatentGrid
    kind: str
    chosen: list[int]


KINDS = ("nothing", "first", "picture", "picture", "beginning", "ending", "ending")


class Trainer:
    """One tuning: the two networks, the worlds and the batches it draws."""

    def __init__(self, worlds: Worlds, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self.worlds, self.tokenizer, self.recipe = worlds, tokenizer, recipe
        self.model = build()

    def batch(self, rng: Random, step: int) -> Batch:
        """Every `large_every`th batch is large; the others are given one thing each."""
        recipe, worlds = self.recipe, self.worlds
        large = step % recipe.large_every == 0
        scenes, latents = (worlds.large_scenes, worlds.large) if large else (worlds.scenes, worlds.clips)
        count = recipe.large_batch if large else recipe.batch
        kind = rng.choice(("nothing", "nothing", "first") if large else KINDS)
        if kind == "picture":  # one position for the whole batch: the table of rotations is shared
            frame = rng.randrange(1, CLIP_FRAMES)
            pool = (worlds.frames == frame).nonzero().flatten().tolist()
        else:
            pool = range(len(scenes))
        chosen = [rng.choice(pool) for _ in range(count)]
        ids, mask = self.captions(rng, [scenes[i] for i in chosen])
        return Batch(latents[chosen].float(), ids, mask, LARGE if large else GRID, kind, chosen)

    def captions(self, rng: Random, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, L), cut to the longest caption of the batch: padding would change nothing."""
        texts = ["" if rng.random() < self.recipe.caption_dropout else caption(scene, rng) for scene in scenes]
        return tokenized(self.tokenizer, texts)

    def given(self, rng: Random, batch: Batch, state: LatentState) -> LatentState:
        """The state with what the batch is given put into it."""
        if batch.kind == "nothing":
            return state
        if batch.kind in ("first", "beginning"):
            count = 1 if batch.kind == "first" else rng.choice((2, 3))
            return replace_latents(state, batch.clean[:, :, :count], 1.0)
        if batch.kind == "picture":
            latents, start = self.worlds.pictures[batch.chosen].float(), int(self.worlds.frames[batch.chosen[0]])
            return append_keyframe(state, latents, places(LatentGrid(1, 4, 4), start), 1.0, torch.zeros_like(latents))
        count = rng.choice(ENDINGS)
        latents, start = self.worlds.endings[count][batch.chosen].float(), CLIP_FRAMES - count
        noise = torch.zeros_like(latents[:, :, :2])
        return insert_clip(state, latents, places(LatentGrid(2, 4, 4), start), 1.0, noise, latent_frame=start // 8)

    def loss(self, rng: Random, step: int) -> Tensor:
        """The loss of one batch, drawn from `rng` and torch's generator."""
        batch = self.batch(rng, step)
        state, target, level = noised(batch, torch.randn_like(batch.clean))
        state = self.given(rng, batch, state)
        tokens = shaken(state, level, self.recipe.image_noise)
        said = velocities(self.model["transformer"], self.model["text"], state, tokens, level, batch)
        free = torch.ones(batch.grid.num_tokens, dtype=torch.bool)
        if state.conditioning_mask is not None:
            free = state.conditioning_mask[0, : batch.grid.num_tokens] == 0
        return squared_error(said[:, : batch.grid.num_tokens], target, free)


def tokenized(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L), cut to the longest."""
    encoded = [tokenizer.encode(text) for text in texts]
    ids, mask = torch.cat([e.ids for e in encoded]), torch.cat([e.mask for e in encoded])
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest]


def places(grid: LatentGrid, start: int = 0) -> Tensor:
    """Positions of a grid that begins at pixel frame `start`."""
    return token_positions(
        grid, fps=FRAMES_PER_SECOND, causal=DEMO_TRANSFORMER.causal_temporal_positioning, first_frame=start
    )


def noised(batch: Batch, noise: Tensor, level: Tensor | None = None) -> tuple[LatentState, Tensor, Tensor]:
    """The state at random levels (B, 1), the velocity (B, N, C) it should be seen to have, and the levels."""
    level = spread(len(batch.clean))[:, None] if level is None else level
    between = objective.noised(batch.clean, noise, level[:, :, None, None, None])
    return (
        LatentState.from_latents(between, places(batch.grid), batch.grid),
        to_tokens(velocity(batch.clean, noise)),
        level,
    )


def shaken(state: LatentState, level: Tensor, scale: float) -> Tensor:
    """The tokens, with the noise that sampling adds to those that are given."""
    if state.conditioning_mask is None:
        return state.tokens
    noise = scale * level[..., None] ** 2 * torch.randn_like(state.tokens)
    return torch.where(state.conditioning_mask[..., None] == 1, state.clean_tokens + noise, state.tokens)


def velocities(
    transformer: Transformer, text: nn.Module, state: LatentState, tokens: Tensor, level: Tensor, batch: Batch
) -> Tensor:
    """What the network makes of the tokens (B, N, C)."""
    # On a CPU the fused attention's backward takes three times as long as plain products at 64 tokens.
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        encoding = text(batch.ids, batch.mask)
        return transformer(
            tokens, transformer.compute_rope(state.positions[None]), encoding, batch.mask, state.sigma_per_token(level)
        )


def tune(folder: Path, vae: VAE, recipe: Recipe = Recipe()) -> nn.ModuleDict:
    """Train, or go on from `folder`/tuned.pt; returns the averaged weights."""
    tokenizer = Tokenizer.open(folder / "tokenizer" / "spiece.model")
    trainer = Trainer(worlds(folder, vae, recipe), tokenizer, recipe)
    model = trainer.model
    model.load_state_dict(torch.load(folder / "transformer.pt", weights_only=True)["average"])
    average = Average(model, recipe.average)
    optimizer = Optimizer(model, is_matrix=is_matrix, matrix_rate=recipe.matrix_rate, other_rate=recipe.other_rate)
    parts = {"model": model, "average": average.model, "optimizer": optimizer}
    state = folder / "tuned.pt"
    start = resume(state, **parts)
    log = Log(folder / "tuned.csv", ("step", "loss", "seconds"), every=20)
    print(asdict(recipe), flush=True)
    began = time.monotonic()
    for step in range(start, recipe.steps):
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        loss = trainer.loss(Random(recipe.seed * 1_000_003 + step), step)
        loss.backward()
        optimizer.step(share_of_rate(step, recipe.steps, warmup=30, decay=0.6))
        average.update(model, step)
        log.add(step=step, loss=loss.item(), seconds=time.monotonic() - began)
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            save(state, step + 1, **parts)
    return average.model
