"""LoRAs saved by PEFT and diffusers act alike in kadr, and kadr's act alike in diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import LTXPipeline
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from kadr.checkpoints.lora.file import LoraFile, write_lora
from kadr.models.lora_layers import attach_loras, set_lora_strengths
from kadr.models.transformer import Transformer, TransformerConfig
from tests.models.test_transformer import Inputs, run_diffusers, velocity
from tests.oracles import diffusers_transformer, relative_error
from tests.tiny_models import build_random

TINY = TransformerConfig(num_layers=3, num_heads=4, head_dim=10, caption_channels=24, in_channels=8)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "time_embed.linear"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def ours() -> Transformer:
    return build_random(lambda: Transformer(TINY))


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs.random(TINY)


def randomize_lora(module: torch.nn.Module) -> torch.nn.Module:
    """Fills the B matrices, which PEFT initializes with 0."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in module.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.2, generator=generator)
    return module


def velocity_with_lora(ours: Transformer, path: Path, inputs: Inputs, strength: float = 1.0) -> Tensor:
    module = build_random(lambda: Transformer(TINY))
    module.load_state_dict(ours.state_dict())
    file = LoraFile.open(path)
    file.check_fits(TINY, Path("model"))
    attach_loras(module, [file.load()], torch.float32)
    set_lora_strengths(module, [strength], CPU)
    return velocity(module, inputs)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 4},
        {"r": 4, "lora_alpha": 10},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"attn1.to_v": 12, "to_q": 5}},
    ],
    ids=["alpha equals rank", "another alpha", "rank-stabilized", "patterns"],
)
def test_lora_saved_by_peft_gives_the_same_velocity(
    config: dict, ours: Transformer, inputs: Inputs, tmp_path: Path
) -> None:
    theirs = randomize_lora(get_peft_model(diffusers_transformer(ours), LoraConfig(target_modules=TARGETS, **config)))
    theirs.save_pretrained(tmp_path)
    expected = run_diffusers(theirs, inputs)
    assert relative_error(velocity(ours, inputs), expected) > 0.05
    assert relative_error(velocity_with_lora(ours, tmp_path, inputs), expected) <= 1e-5


@pytest.mark.parametrize("alpha", [4, 10])
def test_lora_saved_by_diffusers_gives_the_same_velocity(
    alpha: int, ours: Transformer, inputs: Inputs, tmp_path: Path
) -> None:
    theirs, config = diffusers_transformer(ours), LoraConfig(r=4, lora_alpha=alpha, target_modules=TARGETS)
    theirs.add_adapter(config)
    randomize_lora(theirs)
    LTXPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(theirs),
        transformer_lora_adapter_metadata=config.to_dict() | {"target_modules": TARGETS},
    )
    assert relative_error(velocity_with_lora(ours, tmp_path, inputs), run_diffusers(theirs, inputs)) <= 1e-5


@pytest.mark.parametrize("family", ["Comfy", "diffusers"])
def test_lora_saved_by_kadr_gives_the_same_velocity_in_diffusers(
    family: str, ours: Transformer, inputs: Inputs, tmp_path: Path
) -> None:
    theirs = randomize_lora(
        get_peft_model(diffusers_transformer(ours), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[:6]))
    )
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "ours.safetensors"
    write_lora(path, LoraFile.open(tmp_path).load(), key_format=family)
    expected = velocity_with_lora(ours, path, inputs, 0.7)
    pipeline = LTXPipeline(None, None, None, None, diffusers_transformer(ours))
    pipeline.load_lora_weights(path, adapter_name="ours")
    pipeline.set_adapters(["ours"], [0.7])
    assert relative_error(run_diffusers(pipeline.transformer, inputs), expected) <= 1e-5


def test_two_loras_act_as_in_diffusers(ours: Transformer, inputs: Inputs, tmp_path: Path) -> None:
    files = []
    for number, rank in enumerate((4, 2)):
        adapter = get_peft_model(
            diffusers_transformer(ours), LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS[:4])
        )
        randomize_lora(adapter).save_pretrained(tmp_path / str(number))
        files.append(tmp_path / f"{number}.safetensors")
        write_lora(files[-1], LoraFile.open(tmp_path / str(number)).load(), key_format="diffusers")
    pipeline = LTXPipeline(None, None, None, None, diffusers_transformer(ours))
    for number, path in enumerate(files):
        pipeline.load_lora_weights(path, adapter_name=str(number))
    pipeline.set_adapters(["0", "1"], [0.8, -0.5])
    module = build_random(lambda: Transformer(replace(TINY)))
    module.load_state_dict(ours.state_dict())
    attach_loras(module, [LoraFile.open(path).load() for path in files], torch.float32)
    set_lora_strengths(module, [0.8, -0.5], CPU)
    assert relative_error(velocity(module, inputs), run_diffusers(pipeline.transformer, inputs)) <= 1e-5
