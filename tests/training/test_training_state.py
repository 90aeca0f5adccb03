"""The files of a training are read wherever they lie, and are not kept mapped: Windows would not replace them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from kadr.checkpoints.save import write_tensors
from kadr.shapes import LatentGrid
from kadr.training.example_cache import CachedExample
from kadr.training.trainable_lora import TrainableLoRALinear
from kadr.training.training_state import check_state, load_state, save_state

MAPS = Path("/proc/self/maps")


def new_layers() -> tuple[dict[str, TrainableLoRALinear], torch.optim.AdamW]:
    layers = {"a": TrainableLoRALinear(torch.nn.Linear(64, 48), torch.ones(4, 64), 48)}
    return layers, torch.optim.AdamW([layers["a"].down, layers["a"].up])


def saved(path: Path) -> tuple[dict[str, TrainableLoRALinear], torch.optim.AdamW]:
    """Saves the state of a training after one step, and returns it."""
    layers, optimizer = new_layers()
    layers["a"](torch.ones(2, 64)).sum().backward()
    optimizer.step()
    save_state(path, 1, layers, optimizer, {})
    return layers, optimizer


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists the mapped files of a process")
def test_loaded_state_does_not_keep_its_file_mapped(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    layers, optimizer = saved(path)
    restored, restored_optimizer = new_layers()
    assert load_state(path, restored, restored_optimizer) == 1
    assert path.name not in MAPS.read_text("utf-8")
    assert torch.equal(restored["a"].up, layers["a"].up)
    moments = restored_optimizer.state[restored["a"].up]
    assert torch.equal(moments["exp_avg"], optimizer.state[layers["a"].up]["exp_avg"])


@pytest.mark.skipif(sys.platform != "linux", reason="others allow only names that are UTF-8")
def test_files_of_a_training_may_lie_in_a_folder_that_is_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff.training")
    folder.mkdir()
    layers, _ = saved(folder / "state.safetensors")
    restored, optimizer = new_layers()
    check_state(folder / "state.safetensors", {}, 1)
    assert load_state(folder / "state.safetensors", restored, optimizer) == 1
    assert torch.equal(restored["a"].up, layers["a"].up)
    write_tensors(folder / "example.safetensors", {"latents": torch.ones(2, 3)}, dtype=torch.float32)
    example = CachedExample(None, folder / "example.safetensors", 24.0, LatentGrid(1, 1, 1))  # type: ignore[arg-type]
    assert torch.equal(example.load_tensors()["latents"], torch.ones(2, 3))
