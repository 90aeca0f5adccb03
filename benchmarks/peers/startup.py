"""The start of a diffusers program: `LTXPipeline` on the demo's transformer and text encoder, in a diffusers folder.

diffusers has no VAE of the demo's shape, so the folder gets one of the 0.9.5 layout with random weights that takes
fewer products; it cannot be compared by its pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline
from transformers import AutoTokenizer, T5EncoderModel

from benchmarks.peers.diffusers import load_transformer
from kadr.bench.runner import Contender, SkippedContender
from kadr.bench.stage_case import PROMPT, StageCase
from kadr.bench.startup import Program
from kadr.models.vae.config import VAE_0_9_5, VAEConfig
from kadr.planning.vae_flops import vae_decoder_flops
from tests.oracles import DIFFUSERS_VAES

NAME = "LTXPipeline"
# Run by its path, from a folder of its own: it finds diffusers there and nothing of ours.
PROGRAM = Path(__file__).parents[1] / "programs" / "start_diffusers.py"
WIDTH = 16  # of the decoder's last stage


def create_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
    folder = write_diffusers_folder(stage_case, stage_case.files.scratch_folder / "diffusers")
    words = [sys.executable, str(PROGRAM), str(folder), PROMPT, stage_case.device.type]
    more = vae_decoder_flops(thin_vae_config(), stage_case.shape.grid) / vae_decoder_flops(
        stage_case.vae_config, stage_case.shape.grid
    )
    note = f"its VAE's decoder has {100 * more:.0f} % of the products of the demo's"
    yield Program(words, {"HF_HUB_OFFLINE": "1"}).as_contender(NAME, "float32", note=note)


def thin_vae_config() -> VAEConfig:
    """A VAE of the 0.9.5 layout with one residual layer a stage."""
    encoder, decoder = (
        tuple(replace(block, num_layers=min(block.num_layers, 1)) for block in blocks)
        for blocks in (VAE_0_9_5.encoder_blocks, VAE_0_9_5.decoder_blocks)
    )
    return replace(
        VAE_0_9_5, encoder_blocks=encoder, decoder_blocks=decoder, encoder_base_channels=8, decoder_base_channels=WIDTH
    )


def write_diffusers_folder(stage_case: StageCase, folder: Path) -> Path:
    """The folder, as `from_pretrained` reads it."""
    config, released = thin_vae_config(), dict(DIFFUSERS_VAES["0.9.5"])
    for name, unit in (("block_out_channels", config.encoder_base_channels), ("decoder_block_out_channels", WIDTH)):
        released[name] = tuple(unit * multiple for multiple in released[name])
    for name in ("layers_per_block", "decoder_layers_per_block"):
        released[name] = (1,) * len(released[name])
    torch.manual_seed(0)
    pipeline = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLLTXVideo(latent_channels=config.latent_channels, patch_size=config.patch_size, **released),
        text_encoder=T5EncoderModel.from_pretrained(
            stage_case.files.text_encoder_folder / "text_encoder", dtype=torch.float32
        ),
        tokenizer=AutoTokenizer.from_pretrained(stage_case.files.text_encoder_folder / "tokenizer"),
        transformer=load_transformer(stage_case).float(),
    )
    pipeline.save_pretrained(folder)
    return folder
