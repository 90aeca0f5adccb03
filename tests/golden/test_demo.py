"""The bundled demo model: it follows its prompts, is an ordinary checkpoint, and is cheap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import kadr
from kadr import Engine, Request
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.media.clip import read_video
from kadr.sampling.positions import token_positions
from kadr.shapes import LatentGrid
from train.evaluate import (
    extension_error,
    first_frame_fidelity,
    keyframe_fidelity,
    prompt_adherence,
    recolour_rates,
    two_pass_sharpness,
)
from train.scenes import held_out_captions

ASSETS = Path(kadr.__file__).parent / "assets" / "demo"
PROMPT = "a red circle moving right on a black background"
TEXT_CAPTIONS, IMAGE_CAPTIONS, FEW_CAPTIONS = 60, 40, 12
SEED = 2026


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.open("demo", device="cpu")


@pytest.fixture(scope="module")
def distilled() -> Engine:
    return Engine.open("demo-distilled", device="cpu")


@pytest.fixture(scope="module")
def adherence(engine: Engine) -> dict[str, float]:
    return prompt_adherence(engine, held_out_captions(TEXT_CAPTIONS, SEED))


@pytest.mark.parametrize(("name", "share"), [("colour", 0.95), ("motion", 0.90), ("shape", 0.80), ("background", 0.95)])
def test_demo_follows_held_out_captions(adherence: dict[str, float], name: str, share: float) -> None:
    assert adherence[name] >= share


def test_guidance_improves_prompt_adherence(engine: Engine, adherence: dict[str, float]) -> None:
    unguided = prompt_adherence(engine, held_out_captions(TEXT_CAPTIONS, SEED), guidance=1.0)
    assert sum(adherence.values()) > sum(unguided.values())


def test_first_frame_condition_is_met_and_moves_as_in_the_caption(engine: Engine) -> None:
    figures = first_frame_fidelity(engine, held_out_captions(IMAGE_CAPTIONS, SEED + 1))
    assert figures["psnr_mean"] >= 28
    assert figures["motion"] >= 0.85


def test_keyframe_in_the_middle_is_met_with_continuous_motion(engine: Engine) -> None:
    figures = keyframe_fidelity(engine, held_out_captions(FEW_CAPTIONS, SEED + 2))
    assert figures["psnr_mean"] >= 25
    assert figures["joins"] >= 0.6


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_extension_continues_the_track_of_its_clip(engine: Engine, backward: bool) -> None:
    figures = extension_error(engine, held_out_captions(FEW_CAPTIONS, SEED + 3), input_frames=17, is_backward=backward)
    assert figures["near"] < 3
    assert figures["far"] < 8
    assert figures["follows"] >= 0.6


def test_video_to_video_changes_the_colour_and_keeps_the_motion(engine: Engine) -> None:
    figures = recolour_rates(engine, held_out_captions(FEW_CAPTIONS, SEED + 4))
    assert figures["colour"] >= 0.9
    assert figures["motion"] >= 0.85


def test_two_passes_are_sharper_than_the_first_resized(distilled: Engine) -> None:
    figures = two_pass_sharpness(distilled, held_out_captions(FEW_CAPTIONS // 2, SEED + 5))
    assert figures["two passes"] > 1.3 * figures["resized"]
    assert figures["sharper"] == 1.0
    assert figures["motion"] >= 0.8
    assert figures["colour"] >= 0.8


def test_distilled_demo_has_nine_tenths_of_the_prompt_adherence(distilled: Engine, adherence: dict[str, float]) -> None:
    distilled_adherence = prompt_adherence(
        distilled, held_out_captions(TEXT_CAPTIONS, SEED), multi_scale=False, size=(128, 128)
    )
    assert len(distilled.spec.recipe.first_pass.sigmas or ()) == 6
    for name, share in adherence.items():
        assert distilled_adherence[name] >= 0.9 * share, name


@pytest.mark.parametrize(
    ("names", "limit"),
    [
        (("demo.safetensors", "text_encoder/*", "tokenizer/*"), 25e6),
        (("demo-distilled.safetensors",), 11e6),
        (("demo-upscaler.safetensors",), 5e6),
    ],
)
def test_demo_models_are_small(names: tuple[str, ...], limit: float) -> None:
    assert 1e6 < sum(path.stat().st_size for name in names for path in ASSETS.glob(name)) <= limit


# A process starts with its parent's peak memory, and that of the test process is high: so one process in between.
PEAK_MEMORY_OF_CHILD = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def test_command_needs_30_seconds_and_1_5_gigabytes(tmp_path: Path) -> None:
    output = tmp_path / "demo.mp4"
    command = [sys.executable, "-m", "kadr", "generate", PROMPT, "--output", str(output), "--json"]
    start_time = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY_OF_CHILD, *command],
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert process.returncode == 0
    assert time.monotonic() - start_time < 30
    assert 1e8 < int(process.stderr.split()[-1]) * 1024 < 1.5e9
    assert json.loads(process.stdout)["path"] == str(output)
    clip = read_video(output)
    assert clip.frames.shape == (25, 128, 128, 3)
    assert clip.fps == 24


def test_velocity_of_the_shipped_file_equals_official() -> None:
    from ltx_video.models.transformers.transformer3d import Transformer3DModel

    official = Transformer3DModel.from_pretrained(ASSETS / "demo.safetensors").float().eval()
    ours = Checkpoint.open(ASSETS / "demo.safetensors").load_transformer(torch.float32)
    generator = torch.Generator().manual_seed(0)
    grid = LatentGrid(4, 4, 4)
    tokens = torch.randn(1, grid.num_tokens, 128, generator=generator)
    text = torch.randn(1, 12, ours.config.caption_channels, generator=generator)
    mask = torch.arange(12)[None] < 9
    sigma = torch.full((1, 1), 0.7)
    positions = token_positions(grid, fps=24, causal=True)[None]
    with torch.inference_mode():
        expected = official(
            tokens,
            indices_grid=positions,
            encoder_hidden_states=text,
            encoder_attention_mask=mask.long(),
            timestep=sigma,
            return_dict=False,
        )[0]
        ours_output = ours(tokens, ours.compute_rope(positions), text, mask, sigma)
    assert (ours_output - expected).norm() / expected.norm() < 1e-5


def test_pixels_of_the_shipped_file_equal_official() -> None:
    from ltx_video.models.autoencoders.causal_video_autoencoder import CausalVideoAutoencoder

    official = CausalVideoAutoencoder.from_pretrained(ASSETS / "demo.safetensors").float().eval()
    ours = Checkpoint.open(ASSETS / "demo.safetensors").load_vae(torch.float32)
    latents = torch.randn(1, 128, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([0.05])
    with torch.inference_mode():
        denormalised = ours.statistics.denormalise(latents)
        expected = official.decode(denormalised, target_shape=(1, 3, 25, 128, 128), timestep=timestep).sample
        ours_output = ours.decode(latents, timestep=timestep)
    assert (ours_output - expected).norm() / expected.norm() < 1e-5


def test_video_depends_only_on_the_seed(engine: Engine) -> None:
    first, again, other = (engine.generate(Request(prompt=PROMPT, seed=seed)).frames for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
