"""Start-up of a diffusers program: `LTXPipeline` with the demo's transformer and text encoder, in a diffusers folder.

diffusers has no VAE of the demo's shape, so the folder gets a cheaper one of the 0.9.5 layout with random weights. Its
frames cannot be compared.
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
from kadr.planning.costs.vae_flops import vae_decoder_flops
from tests.oracles import DIFFUSERS_VAES

NAME = "LTXPipeline"
# Run by its path: the folder on its import path has no module of ours that hides one of the same name.
PROGRAM = Path(__file__).parents[1] / "programs" / "start_diffusers.py"
DECODER_CHANNELS = 16  # of the decoder's last stage


def create_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
    folder = write_diffusers_folder(stage_case, stage_case.files.scratch_folder / "diffusers")
    command = [sys.executable, str(PROGRAM), str(folder), PROMPT, stage_case.device.type]
    grid = stage_case.shape.grid
    share = vae_decoder_flops(thin_vae_config(), grid) / vae_decoder_flops(stage_case.vae_config, grid)
    note = f"its VAE decoder takes {100 * share:.0f} % of the FLOPs of the demo's"
    yield Program(command, {"HF_HUB_OFFLINE": "1"}).as_contender(NAME, "float32", note=note)


def thin_vae_config() -> VAEConfig:
    """Returns a VAE of the 0.9.5 layout with one residual layer per stage."""
    encoder, decoder = (
        tuple(replace(block, num_layers=min(block.num_layers, 1)) for block in blocks)
        for blocks in (VAE_0_9_5.encoder_blocks, VAE_0_9_5.decoder_blocks)
    )
    return replace(
        VAE_0_9_5,
        encoder_blocks=encoder,
        decoder_blocks=decoder,
        encoder_base_channels=8,
        decoder_base_channels=DECODER_CHANNELS,
    )


def write_diffusers_folder(stage_case: StageCase, folder: Path) -> Path:
    """Writes the folder that `from_pretrained` reads."""
    config, vae_kwargs = thin_vae_config(), dict(DIFFUSERS_VAES["0.9.5"])
    for name, channels in (
        ("block_out_channels", config.encoder_base_channels),
        ("decoder_block_out_channels", DECODER_CHANNELS),
    ):
        vae_kwargs[name] = tuple(channels * multiple for multiple in vae_kwargs[name])
    for name in ("layers_per_block", "decoder_layers_per_block"):
        vae_kwargs[name] = (1,) * len(vae_kwargs[name])
    torch.manual_seed(0)
    pipeline = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLLTXVideo(latent_channels=config.latent_channels, patch_size=config.patch_size, **vae_kwargs),
        text_encoder=T5EncoderModel.from_pretrained(
            stage_case.files.text_encoder_folder / "text_encoder", dtype=torch.float32
        ),
        tokenizer=AutoTokenizer.from_pretrained(stage_case.files.text_encoder_folder / "tokenizer"),
        transformer=load_transformer(stage_case).float(),
    )
    pipeline.save_pretrained(folder)
    return folder
