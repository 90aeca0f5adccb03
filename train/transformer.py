"""The demo text encoder and transformer, trained together on the latents of the demo VAE.

Rectified flow: x_t = (1 - t) x + t n, and the network learns n - x. Captions are dropped now and then, for guidance;
the first latent frame is given clean now and then, for image-to-video.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import sentencepiece
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.t5 import initialise_t5 as initialise_t5
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.models.vae import VAE
from kadr.nn.linear import Linear
from kadr.nn.rope import Rope
from kadr.nn.timestep_embedding import TimestepEmbedding
from kadr.sampling.positions import token_positions
from kadr.sampling.state import to_tokens
from kadr.shapes import LatentGrid
from kadr.text.tokenizer import Tokenizer
from kadr.training.objective import add_noise, masked_mse, stratified_sigmas, velocity_target
from train.checkpointing import EMA, CurveLog, load_state, save_state
from train.optimizer import MuonAdamW, lr_multiplier
from train.scenes import CLIP_FRAMES, Scene, render, varied_caption, vocabulary_corpus

DEMO_T5 = T5Config(vocab_size=192, d_model=128, num_layers=2, num_heads=4, d_kv=32, d_ff=256)
DEMO_TRANSFORMER = TransformerConfig(
    num_layers=8, num_heads=6, head_dim=32, caption_channels=128, causal_temporal_positioning=True
)
FPS = 24
GRID = LatentGrid(frames=4, height=4, width=4)


@dataclass(frozen=True, kw_only=True)
class TransformerTrainingConfig:
    """What one training of text encoder and transformer is.

    The shipped weights were trained with `steps` at 2300 until step 400, at 1700 until 700, and at 1300 from there on:
    the number decides only when the rate begins to fall, so up to step 780 the runs are one.
    """

    num_scenes: int = 12288
    steps: int = 1300
    batch_size: int = 64
    muon_lr: float = 4e-3  # Muon, scaled to the update size of AdamW
    adamw_lr: float = 2e-3  # AdamW, for everything that is not a matrix inside the layers
    caption_dropout: float = 0.1
    first_frame_conditioning_p: float = 0.25  # batches whose first latent frame is given
    image_noise: float = 0.15  # times t squared: what sampling adds to given frames
    ema_decay: float = 0.999
    seed: int = 0


def train_tokenizer(folder: Path) -> Path:
    """Train a SentencePiece model on the captions of the world; letters are spelled out where a word is unknown."""
    path = folder / "spiece"
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(vocabulary_corpus()),
        model_prefix=str(path),
        model_type="unigram",
        normalization_rule_name="identity",  # the default one carries a table ten times the size of everything else
        vocab_size=DEMO_T5.vocab_size,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        required_chars="".join(chr(code) for code in range(ord("a"), ord("z") + 1)) + ",.;A",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()
    return path.with_suffix(".model")


@dataclass(frozen=True)
class EncodedScenes:
    """Scenes and their normalised latents (N, 128, 4, 4, 4), float16."""

    scenes: list[Scene]
    latents: Tensor

    @classmethod
    @torch.no_grad()
    def encode(cls, vae: VAE, config: TransformerTrainingConfig, batch_size: int = 16) -> EncodedScenes:
        rng = Random(config.seed + 7)
        scenes = [Scene.sample(rng) for _ in range(config.num_scenes)]
        made = []
        for start in range(0, len(scenes), batch_size):
            pixels = render(scenes[start : start + batch_size], CLIP_FRAMES)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mean = vae.encode_moments(pixels).mean
            made.append(vae.statistics.normalise(mean.float()).half())
            if start % (batch_size * 100) == 0:
                print(f"encoded {start} of {len(scenes)} scenes", flush=True)
        return cls(scenes, torch.cat(made))


def initialise(text_encoder: T5Encoder, transformer: Transformer, seed: int) -> None:
    """T5's own scheme for the text; Xavier matrices, closed gates and a silent last layer for the transformer."""
    generator = torch.Generator().manual_seed(seed)
    initialise_t5(text_encoder, generator)
    for module in transformer.modules():
        if isinstance(module, Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
        if isinstance(module, TimestepEmbedding):
            nn.init.normal_(module.linear_1.weight, std=0.02, generator=generator)
            nn.init.normal_(module.linear_2.weight, std=0.02, generator=generator)
    nn.init.zeros_(transformer.adaln_linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    for layer in transformer.blocks:
        nn.init.zeros_(layer.scale_shift_table)
        nn.init.zeros_(layer.cross_attention.out.weight)
    nn.init.zeros_(transformer.scale_shift_table)


def build_modules() -> nn.ModuleDict:
    """The two networks, before any training."""
    return nn.ModuleDict({"text": T5Encoder(DEMO_T5), "transformer": Transformer(DEMO_TRANSFORMER)})


class TransformerTrainer:
    """One training: the two networks, the world, and the noise levels it draws."""

    def __init__(self, scenes: EncodedScenes, tokenizer: Tokenizer, config: TransformerTrainingConfig) -> None:
        self.scenes, self.tokenizer, self.config = scenes, tokenizer, config
        self.modules = build_modules()
        initialise(self.modules["text"], self.modules["transformer"], config.seed)
        places = token_positions(GRID, fps=FPS, causal=DEMO_TRANSFORMER.causal_temporal_positioning)
        self.rope: Rope = self.modules["transformer"].rope(places[None])
        self.first_frame_mask = torch.arange(GRID.num_tokens) < GRID.height * GRID.width

    def draw_captions(self, rng: Random, scene_indices: list[int]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, L), cut to the longest caption of the batch: padding would change nothing."""
        texts = [
            "" if rng.random() < self.config.caption_dropout else varied_caption(self.scenes.scenes[i], rng)
            for i in scene_indices
        ]
        encoded = [self.tokenizer.encode(text) for text in texts]
        ids, mask = torch.cat([e.ids for e in encoded]), torch.cat([e.mask for e in encoded])
        longest = int(mask.sum(1).max())
        return ids[:, :longest], mask[:, :longest]

    def loss(self, rng: Random) -> Tensor:
        """The loss of one batch, drawn from `rng` and torch's generator."""
        recipe = self.config
        chosen = [rng.randrange(len(self.scenes.scenes)) for _ in range(recipe.batch_size)]
        clean = to_tokens(self.scenes.latents[chosen].float())
        ids, mask = self.draw_captions(rng, chosen)
        noise = torch.randn_like(clean)
        level = own = stratified_sigmas(recipe.batch_size)[:, None]  # (B, 1)
        noisy = add_noise(clean, noise, level[..., None])
        given = torch.zeros_like(self.first_frame_mask)  # (N)
        # Whole batches with a given frame, the others without: only tokens of unlike levels need levels of their own.
        if rng.random() < recipe.first_frame_conditioning_p:
            given = self.first_frame_mask
            shaken = clean + recipe.image_noise * level[..., None] ** 2 * torch.randn_like(clean)
            noisy = torch.where(given[:, None], shaken, noisy)
            own = torch.where(given, 0.0, level)
        # On a CPU the fused attention's backward takes three times as long as plain products at 64 tokens.
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            text = self.modules["text"](ids, mask)
            said = self.modules["transformer"](noisy, self.rope, text, mask, own)
        return masked_mse(said, velocity_target(clean, noise), ~given)


def uses_muon(name: str) -> bool:
    """Which parameters Muon takes."""
    return ".blocks." in name and "scale_shift_table" not in name


def train(
    state_folder: Path, vae: VAE, config: TransformerTrainingConfig = TransformerTrainingConfig()
) -> nn.ModuleDict:
    """Train, or go on from `state_folder`/transformer.pt; returns the averaged weights."""
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer.open(train_tokenizer(state_folder / "tokenizer"))
    trainer = TransformerTrainer(_load_or_encode_scenes(state_folder, vae, config), tokenizer, config)
    model = trainer.modules
    average = EMA(model, config.ema_decay)
    optimizer = MuonAdamW(model, uses_muon=uses_muon, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr)
    parts = {"model": model, "average": average.model, "optimizer": optimizer}
    state = state_folder / "transformer.pt"
    start = load_state(state, **parts)
    log = CurveLog(state_folder / "transformer.csv", ("step", "loss", "seconds"), every=50)
    for name, part in model.items():
        print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M parameters", flush=True)
    print(asdict(config), flush=True)
    began = time.monotonic()
    for step in range(start, config.steps):
        torch.manual_seed(config.seed * 1_000_003 + step)
        loss = trainer.loss(Random(config.seed * 1_000_003 + step))
        loss.backward()
        optimizer.step(lr_multiplier(step, config.steps, warmup=100, decay=0.4))
        average.update(model, step)
        log.add(step=step, loss=loss.item(), seconds=time.monotonic() - began)
        if (step + 1) % 100 == 0 or step + 1 == config.steps:
            save_state(state, step + 1, **parts)
    return average.model


def _load_or_encode_scenes(state_folder: Path, vae: VAE, config: TransformerTrainingConfig) -> EncodedScenes:
    """The encoded scenes, kept in `state_folder` so that a resumed training need not encode them again."""
    path = state_folder / "world.pt"
    if path.exists():
        rng = Random(config.seed + 7)
        return EncodedScenes([Scene.sample(rng) for _ in range(config.num_scenes)], torch.load(path, weights_only=True))
    world = EncodedScenes.encode(vae, config)
    torch.save(world.latents, path)
    return world
