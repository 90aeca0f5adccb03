"""A training state that was loaded does not keep its file mapped, which Windows would then refuse to replace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kadr.training.trainable_lora import TrainableLoRALinear
from kadr.training.training_state import load_state, save_state

MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists the mapped files of a process")
def test_loaded_state_does_not_keep_its_file_mapped(tmp_path: Path) -> None:
    def new_layers() -> tuple[dict[str, TrainableLoRALinear], torch.optim.AdamW]:
        layers = {"a": TrainableLoRALinear(torch.nn.Linear(64, 48), torch.ones(4, 64), 48)}
        return layers, torch.optim.AdamW([layers["a"].down, layers["a"].up])

    layers, optimizer = new_layers()
    layers["a"](torch.ones(2, 64)).sum().backward()
    optimizer.step()
    path = tmp_path / "state.safetensors"
    save_state(path, 1, layers, optimizer, {})
    restored, restored_optimizer = new_layers()
    assert load_state(path, restored, restored_optimizer) == 1
    assert path.name not in MAPS.read_text("utf-8")
    assert torch.equal(restored["a"].up, layers["a"].up)
    moments = restored_optimizer.state[restored["a"].up]
    assert torch.equal(moments["exp_avg"], optimizer.state[layers["a"].up]["exp_avg"])
