"""Scripts in the style of diffusers' documentation run through the door with only their imports changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kadr.diffusers.utils import export_to_video
from kadr.media.clip import read_video
from tests.diffusers.conftest import noise_clip, noise_image
from tests.lora_files import block_pairs, diffusers, write_lora_file

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.py"))
NEEDS_ACCELERATOR = ("offload", "single_file")  # diffusers offloads to nothing else, and fetches configs of the hub


@pytest.fixture(scope="module")
def places(folder: Path, upscaler: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Returns what a script names -> what stands for it here: a tiny model, files, the CPU, and a small size."""
    root = tmp_path_factory.mktemp("inputs")
    noise_image(1).save(root / "image.png")
    export_to_video(noise_clip(9), str(root / "clip.mp4"), fps=24)
    write_lora_file(root / "style.safetensors", block_pairs(), diffusers)
    return {
        r'"Lightricks/LTX-Video[\w.-]*"': f'"{folder}"',
        r'"Lightricks/ltxv-spatial-upscaler-0.9.7"': f'"{upscaler}"',
        r'"Lightricks/a-style"': f'"{root}"',
        r"https://example.org": str(root),
        r'"cuda"': '"cpu"',
        r"(?<![_\w])height=\d+": "height=64",
        r"(?<![_\w])width=\d+": "width=96",
        r"num_frames=\d+": "num_frames=17",
        r"num_inference_steps=\d+": "num_inference_steps=3",
        r"\[1000, 993, 987, 981, 975, 909, 725, 0.03\]": "[1000, 909, 725, 0.03]",
    }


def run_script(script: Path, places: dict[str, str], package: str) -> Any:
    """Runs a script with its imports from `package`, and returns its `video`."""
    source = script.read_text()
    for pattern, replacement in places.items():
        source = re.sub(pattern, replacement, source)
    source = source.replace("from diffusers.utils import", "from kadr.diffusers.utils import")
    source = re.sub(r"^from diffusers\b", f"from {package}", source, flags=re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(source, str(script), "exec"), names)
    return names["video"]


def to_array(video: Any) -> np.ndarray:
    if isinstance(video, torch.Tensor):
        return video.numpy()
    return np.stack([np.asarray(frame) / 255 if isinstance(frame, Image.Image) else frame for frame in video])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_of_diffusers_runs_through_the_door(
    script: Path, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if script.stem == "single_file":
        monkeypatch.setattr("kadr.diffusers.base.file_name", lambda link: str(home / "model.safetensors"))
    video = to_array(run_script(script, places, "kadr.diffusers"))
    assert np.isfinite(video).all()
    assert video.std() > 0.01
    if "export_to_video" in script.read_text():
        assert len(read_video(tmp_path / "output.mp4").frames) == len(video)
    if script.stem not in NEEDS_ACCELERATOR:
        expected = to_array(run_script(script, places, "diffusers"))
        assert video.shape == expected.shape
        # Pillow's frames are bytes: a value that differs in its last bit may round to the next one.
        assert np.abs(video - expected).max() < (1 / 255 + 1e-6 if video.dtype != np.float32 else 1e-4)
        assert np.abs(video - expected).mean() < 1e-5


def test_there_are_ten_scripts_or_more() -> None:
    assert len(SCRIPTS) >= 10
