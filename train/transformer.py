"""Trains the demo text encoder and transformer, both at once, on latents of the demo VAE.

Rectified flow: x_t = (1 - t) x + t n, and the network learns n - x. Some captions are dropped, for CFG; in some batches
the first latent frame is a clean condition, for image-to-video.
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

from kadr.models.t5 import T5Config, T5Encoder, initialise_t5
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
    """Settings of the training of text encoder and transformer.

    The shipped weights were trained with `steps` at 2300 until step 400, at 1700 until 700, and at 1300 after that. The
    number only decides when the learning rate begins to decay, so up to step 780 these trainings are the same.
    """

    num_scenes: int = 12288
    steps: int = 1300
    batch_size: int = 64
    muon_lr: float = 4e-3  # Muon, scaled to the update size of AdamW
    adamw_lr: float = 2e-3  # AdamW, for everything that is not a matrix of a block
    caption_dropout: float = 0.1
    first_frame_conditioning_p: float = 0.25  # share of batches whose first latent frame is a condition
    image_noise: float = 0.15  # times sigma squared: the noise that sampling adds to conditions
    ema_decay: float = 0.999
    seed: int = 0


def train_tokenizer(folder: Path) -> Path:
    """Trains a SentencePiece model on the captions; it spells out unknown words letter by letter."""
    path = folder / "spiece"
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(vocabulary_corpus()),
        model_prefix=str(path),
        model_type="unigram",
        normalization_rule_name="identity",  # the default's table is ten times the size of the rest of the file
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
        """Draws the scenes of a training and encodes them."""
        rng = Random(config.seed + 7)
        scenes = [Scene.sample(rng) for _ in range(config.num_scenes)]
        batches = []
        for start in range(0, len(scenes), batch_size):
            pixels = render(scenes[start : start + batch_size], CLIP_FRAMES)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mean = vae.encode_moments(pixels).mean
            batches.append(vae.statistics.normalise(mean.float()).half())
            if start % (batch_size * 100) == 0:
                print(f"encoded {start} of {len(scenes)} scenes", flush=True)
        return cls(scenes, torch.cat(batches))


def initialise(text_encoder: T5Encoder, transformer: Transformer, seed: int) -> None:
    """Initialises the text encoder as T5, and the transformer with Xavier matrices, gates of 0 and outputs of 0."""
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
    for block in transformer.blocks:
        nn.init.zeros_(block.scale_shift_table)
        nn.init.zeros_(block.cross_attention.out.weight)
    nn.init.zeros_(transformer.scale_shift_table)


def build_modules() -> nn.ModuleDict:
    """Returns the two networks before any training."""
    return nn.ModuleDict({"text_encoder": T5Encoder(DEMO_T5), "transformer": Transformer(DEMO_TRANSFORMER)})


class TransformerTrainer:
    """A training: the two networks, the scenes, and the sigmas that it draws."""

    def __init__(self, scenes: EncodedScenes, tokenizer: Tokenizer, config: TransformerTrainingConfig) -> None:
        self.scenes, self.tokenizer, self.config = scenes, tokenizer, config
        self.modules = build_modules()
        initialise(self.modules["text_encoder"], self.modules["transformer"], config.seed)
        positions = token_positions(GRID, fps=FPS, causal=DEMO_TRANSFORMER.causal_temporal_positioning)
        self.rope: Rope = self.modules["transformer"].compute_rope(positions[None])
        self.first_frame_mask = torch.arange(GRID.num_tokens) < GRID.height * GRID.width

    def draw_captions(self, rng: Random, scene_indices: list[int]) -> tuple[Tensor, Tensor]:
        """Returns ids and mask (B, L), cut to the longest caption of the batch: padding would change nothing."""
        texts = [
            "" if rng.random() < self.config.caption_dropout else varied_caption(self.scenes.scenes[i], rng)
            for i in scene_indices
        ]
        encoded = [self.tokenizer.encode(text) for text in texts]
        ids, mask = torch.cat([e.ids for e in encoded]), torch.cat([e.mask for e in encoded])
        longest = int(mask.sum(1).max())
        return ids[:, :longest], mask[:, :longest]

    def loss(self, rng: Random) -> Tensor:
        """Returns the loss of one batch, drawn from `rng` and torch's generator."""
        config = self.config
        scene_indices = [rng.randrange(len(self.scenes.scenes)) for _ in range(config.batch_size)]
        clean = to_tokens(self.scenes.latents[scene_indices].float())
        ids, mask = self.draw_captions(rng, scene_indices)
        noise = torch.randn_like(clean)
        sigma = sigma_per_token = stratified_sigmas(config.batch_size)[:, None]  # (B, 1)
        noisy = add_noise(clean, noise, sigma[..., None])
        condition_mask = torch.zeros_like(self.first_frame_mask)  # (N), true = kept clean
        # All samples of a batch have the condition, or none: without it, one sigma per sample is enough.
        if rng.random() < config.first_frame_conditioning_p:
            condition_mask = self.first_frame_mask
            condition = clean + config.image_noise * sigma[..., None] ** 2 * torch.randn_like(clean)
            noisy = torch.where(condition_mask[:, None], condition, noisy)
            sigma_per_token = torch.where(condition_mask, 0.0, sigma)
        # On a CPU the fused attention's backward takes three times as long as plain matmuls at 64 tokens.
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            prompt_embeds = self.modules["text_encoder"](ids, mask)
            predicted = self.modules["transformer"](noisy, self.rope, prompt_embeds, mask, sigma_per_token)
        return masked_mse(predicted, velocity_target(clean, noise), ~condition_mask)


def uses_muon(name: str) -> bool:
    """Tells whether Muon takes a parameter of two or more axes."""
    return ".blocks." in name and "scale_shift_table" not in name


def train(
    state_folder: Path, vae: VAE, config: TransformerTrainingConfig = TransformerTrainingConfig()
) -> nn.ModuleDict:
    """Trains, or resumes from `state_folder`/transformer.pt; returns the EMA weights."""
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer.open(train_tokenizer(state_folder / "tokenizer"))
    trainer = TransformerTrainer(_load_or_encode_scenes(state_folder, vae, config), tokenizer, config)
    model = trainer.modules
    ema = EMA(model, config.ema_decay)
    optimizer = MuonAdamW(model, uses_muon=uses_muon, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr)
    checkpoint = {"model": model, "ema": ema.model, "optimizer": optimizer}
    state_file = state_folder / "transformer.pt"
    start_step = load_state(state_file, **checkpoint)
    log = CurveLog(state_folder / "transformer.csv", ("step", "loss", "seconds"), every=50)
    for name, module in model.items():
        print(f"{name}: {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters", flush=True)
    print(asdict(config), flush=True)
    start_time = time.monotonic()
    for step in range(start_step, config.steps):
        torch.manual_seed(config.seed * 1_000_003 + step)
        loss = trainer.loss(Random(config.seed * 1_000_003 + step))
        loss.backward()
        optimizer.step(lr_multiplier(step, config.steps, warmup=100, decay=0.4))
        ema.update(model, step)
        log.add(step=step, loss=loss.item(), seconds=time.monotonic() - start_time)
        if (step + 1) % 100 == 0 or step + 1 == config.steps:
            save_state(state_file, step + 1, **checkpoint)
    return ema.model


def _load_or_encode_scenes(state_folder: Path, vae: VAE, config: TransformerTrainingConfig) -> EncodedScenes:
    """Returns the encoded scenes, stored in `state_folder` so that a resumed training does not encode them again."""
    path = state_folder / "scenes.pt"
    if path.exists():
        rng = Random(config.seed + 7)
        return EncodedScenes([Scene.sample(rng) for _ in range(config.num_scenes)], torch.load(path, weights_only=True))
    encoded_scenes = EncodedScenes.encode(vae, config)
    torch.save(encoded_scenes.latents, path)
    return encoded_scenes
