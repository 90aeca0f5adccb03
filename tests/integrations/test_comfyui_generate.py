"""kadr's nodes make videos in a stand-in of ComfyUI: of the demo, and of a tiny model where only the way matters."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kadr
from tests import lora_files
from tests.integrations.comfy_standin import PACK, Comfy, Interrupted, installed
from tests.tiny_models import MODEL_FILE

TEXT, IMAGE = "kadr_text_to_video", "kadr_image_to_video"
SMALL = {"width": 64, "height": 64, "frames": 9, "steps": 2}


@pytest.fixture
def comfy(tmp_path: Path, home: Path) -> Iterator[Comfy]:
    host = Comfy(tmp_path)
    for name in (MODEL_FILE, "text_encoder", "tokenizer"):
        os.symlink(home / name, host.models / "checkpoints" / name)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(host.input / "example.png")
    with installed(host):
        host.load()
        yield host
        if (engine := shared(host)._engine) is not None:
            engine.unload()


def shared(comfy: Comfy) -> Any:
    """Returns the pack's engine for all runs."""
    return sys.modules[comfy.nodes["KadrGenerate"].__module__].SHARED_ENGINE


def workflow(name: str, **inputs: Any) -> dict[str, Any]:
    """Returns an example workflow, with other inputs for its generating node."""
    loaded: dict[str, Any] = json.loads((PACK / "example_workflows" / "api" / f"{name}.json").read_text("utf-8"))
    loaded["2"]["inputs"].update(inputs)
    return loaded


def tiny(home: Path, name: str = TEXT, **inputs: Any) -> dict[str, Any]:
    """Returns an example workflow for the tiny model."""
    loaded = workflow(name, **{**SMALL, **inputs})
    loaded["1"]["inputs"]["model"] = MODEL_FILE
    return loaded


def to_bytes(images: torch.Tensor) -> np.ndarray:
    """Returns an IMAGE batch as ComfyUI's Save Image writes it: cut off, not rounded."""
    return np.clip(255.0 * images.cpu().numpy(), 0, 255).astype(np.uint8)


def frames_of(comfy: Comfy, loaded: dict[str, Any]) -> np.ndarray:
    ((images, _),) = comfy.run(loaded)
    return to_bytes(images)


def test_a_video_of_the_demo_is_that_of_the_engine_bit_for_bit(comfy: Comfy):
    inputs = {"width": 128, "height": 128, "frames": 9, "seed": 3}
    ((images, fps),) = comfy.run(workflow(TEXT, **inputs))
    assert (images.dtype, images.device.type, tuple(images.shape), fps) == (
        torch.float32,
        "cpu",
        (9, 128, 128, 3),
        24.0,
    )
    assert not images.is_inference()
    request = kadr.Request("a red circle moving right on a black background", size=(128, 128), frames=9, seed=3)
    assert np.array_equal(to_bytes(images), kadr.Engine.open("demo", device="cpu").generate(request).frames)


def test_the_bar_goes_through_all_stages_once_with_previews_if_wanted(comfy: Comfy):
    comfy.run(workflow(TEXT, width=128, height=128, frames=9))
    assert all(preview is None for _, _, preview in comfy.bar)
    values = [value for value, total, _ in comfy.bar if total == 1000]
    assert values == sorted(values)
    assert (len(values), values[0], values[-1]) == (len(comfy.bar), 0, 1000)
    assert len(set(values)) > 6
    comfy.bar.clear()
    comfy.arguments.preview_method = "auto"
    comfy.run(workflow(TEXT, width=128, height=128, frames=9, seed=1))
    previews = [preview for _, _, preview in comfy.bar if preview is not None]
    assert len(previews) >= 4
    for kind, image, side in previews:
        assert (kind, side, isinstance(image, Image.Image), image.size) == ("JPEG", 512, True, (32, 32))
    assert np.ptp(np.asarray(previews[-1][1])) > 100  # the circle on its background


def test_equal_inputs_are_cached_and_all_runs_share_one_engine(comfy: Comfy, home: Path):
    loaded = tiny(home)
    first = frames_of(comfy, loaded)
    assert comfy.executed == ["1", "2", "3", "4"]
    engine = shared(comfy)._engine
    assert comfy.log == ["unload", "empty cache"]  # ComfyUI's models leave before kadr's come
    comfy.run(loaded)
    assert (comfy.executed, comfy.log) == ([], ["unload", "empty cache"])
    other = frames_of(comfy, tiny(home, seed=1))
    assert comfy.executed == ["2", "3", "4"]
    assert shared(comfy)._engine is engine
    assert not np.array_equal(first, other)


def test_a_file_that_was_replaced_is_opened_again(comfy: Comfy, home: Path, tmp_path: Path):
    comfy.run(tiny(home))
    engine = shared(comfy)._engine
    copied = comfy.models / "checkpoints" / MODEL_FILE
    contents = (home / MODEL_FILE).read_bytes()
    copied.unlink()
    copied.write_bytes(contents)
    comfy.run(tiny(home))
    assert comfy.executed == ["1", "2", "3", "4"]
    assert shared(comfy)._engine is not engine
    assert not engine._model.module_cache.cached_names


def test_the_model_leaves_memory_where_that_is_asked(comfy: Comfy, home: Path):
    comfy.run(tiny(home))
    assert shared(comfy)._engine._model.module_cache.cached_names
    comfy.run(tiny(home, keep_loaded=False))
    assert not shared(comfy)._engine._model.module_cache.cached_names


def test_loras_are_chained_and_strengths_do_not_reload_the_model(comfy: Comfy, home: Path):
    for number, target in enumerate(("attn1.to_q", "attn2.to_v")):
        pairs = lora_files.block_pairs([target], seed=number)
        lora_files.write_lora_file(comfy.models / "loras" / f"{number}.safetensors", pairs, lora_files.comfy)
    loaded = tiny(home, model=["8", 0])
    loaded["7"] = {"class_type": "KadrLora", "inputs": {"model": ["1", 0], "lora": "0.safetensors", "strength": 1.0}}
    loaded["8"] = {"class_type": "KadrLora", "inputs": {"model": ["7", 0], "lora": "1.safetensors", "strength": -0.5}}
    with_loras = frames_of(comfy, loaded)
    engine = shared(comfy)._engine
    paths = [str(comfy.models / "loras" / f"{number}.safetensors") for number in range(2)]
    direct = kadr.Engine.open(home / MODEL_FILE, device="cpu", loras=[(paths[0], 1.0), (paths[1], -0.5)])
    request = kadr.Request(loaded["2"]["inputs"]["prompt"], size=(64, 64), frames=9, steps=2)
    assert np.array_equal(with_loras, direct.generate(request).frames)
    loaded["7"]["inputs"]["strength"] = loaded["8"]["inputs"]["strength"] = 0.0
    assert np.array_equal(frames_of(comfy, loaded), kadr.Engine.open(home / MODEL_FILE).generate(request).frames)
    assert shared(comfy)._engine is engine
    assert comfy.executed == ["7", "8", "2", "3", "4"]


def test_conditions_are_chained_and_reach_the_model_without_loss(comfy: Comfy, home: Path, tmp_path: Path):
    loaded = tiny(home, IMAGE, frames=17, steps=1)
    loaded["9"] = {"class_type": "Clip", "inputs": {}}
    clip = np.random.default_rng(1).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    comfy.nodes["Clip"] = node_of(torch.from_numpy(clip).float() / 255)
    inputs = {"images": ["9", 0], "frame": 8, "strength": 0.8, "conditions": ["6", 0]}
    loaded["10"] = {"class_type": "KadrClipCondition", "inputs": inputs}
    loaded["2"]["inputs"]["conditions"] = ["10", 0]
    frames = frames_of(comfy, loaded)
    with kadr_writer(tmp_path / "clip.mkv") as writer:
        writer.write(clip)
    conditions = [
        kadr.Condition(str(comfy.input / "example.png")),
        kadr.Condition(str(tmp_path / "clip.mkv"), frame=8, strength=0.8),
    ]
    request = kadr.Request(
        loaded["2"]["inputs"]["prompt"], size=(64, 64), frames=17, steps=1, conditions=tuple(conditions)
    )
    assert np.array_equal(frames, kadr.Engine.open(home / MODEL_FILE, device="cpu").generate(request).frames)
    assert list(comfy.temp.iterdir()) == []


def test_controls_and_an_input_video_reach_the_request(comfy: Comfy, home: Path, tmp_path: Path):
    comfy.run(tiny(home))
    module = sys.modules[comfy.nodes["KadrGenerate"].__module__]
    options = comfy.nodes["KadrModel"]().load(MODEL_FILE, "as in the file", "auto", "auto")[0]
    clip, image = torch.rand(9, 32, 48, 3), torch.rand(1, 32, 48, 3)
    (controls,) = comfy.nodes["KadrControl"]().add(clip, "canny")
    (controls,) = comfy.nodes["KadrControl"]().add(clip, "ready", controls)
    inputs = {"prompt": "a", "controls": controls, "input_video": image, "denoise_strength": 0.4, "passes": "two"}
    request = module.build_request(options, inputs, tmp_path)
    assert [item.kind for item in request.controls] == ["canny", "ready"]
    assert len({item.media for item in request.controls}) == 1  # the same batch is one file
    assert (request.input_video, request.denoise_strength) == (str(tmp_path / "1.mkv"), 0.4)
    assert (request.multi_scale, request.size, request.frames, request.steps, request.guidance) == (True, *[None] * 4)
    assert request.negative_prompt is request.fps is None


def test_the_stop_button_ends_a_video_and_the_next_one_is_made(comfy: Comfy, home: Path):
    loaded = workflow(IMAGE, width=256, height=256, frames=257, steps=500)
    comfy.stop_after = 4
    with pytest.raises(Interrupted):
        comfy.run(loaded)
    assert comfy.bar[-1][0] < 900
    assert not comfy.is_interrupted
    assert list(comfy.temp.iterdir()) == []
    assert len(frames_of(comfy, tiny(home))) == 9


@pytest.mark.parametrize(
    ("shape", "node", "message"),
    [
        (
            (1, 64, 64, 4),
            "KadrClipCondition",
            r"\(1, 64, 64, 4\); it must be \(frames, height, width, 3\).*Split Image",
        ),
        ((5, 64, 64, 3), "KadrImageCondition", "the batch has 5 images, and an image condition takes one"),
    ],
)
def test_batches_that_cannot_be_used_are_refused_with_the_way_out(comfy: Comfy, home: Path, shape, node, message):
    loaded = tiny(home, conditions=["10", 0])
    comfy.nodes["Batch"] = node_of(torch.zeros(shape))
    loaded["9"] = {"class_type": "Batch", "inputs": {}}
    name = next(iter(comfy.nodes[node].INPUT_TYPES()["required"]))
    loaded["10"] = {"class_type": node, "inputs": {name: ["9", 0], "frame": 0, "strength": 1.0}}
    with pytest.raises(ValueError, match=message):
        comfy.run(loaded)


def test_warnings_and_notices_are_an_output_of_the_node(comfy: Comfy, home: Path, caplog: pytest.LogCaptureFixture):
    (model,) = comfy.nodes["KadrModel"]().load(MODEL_FILE, "as in the file", "auto", "auto")
    (conditions,) = comfy.nodes["KadrImageCondition"]().add(torch.rand(1, 64, 160, 3), 0, 1.0)
    *_, notices = comfy.nodes["KadrGenerate"]().generate(model, prompt="a", seed=0, **SMALL, conditions=conditions)
    assert [line for line in notices.splitlines() if "loses 60%" in line]
    assert [record.message for record in caplog.records if record.name == "kadr.comfyui"] == notices.splitlines()
    *_, notices = comfy.nodes["KadrGenerate"]().generate(model, prompt="a", seed=0, **SMALL)
    assert "loses" not in notices


def test_errors_of_a_request_reach_the_page_as_they_are(comfy: Comfy, home: Path):
    with pytest.raises(ValueError, match="width is 64 and height is 0; give both, or 0 for both"):
        comfy.run(tiny(home, height=0))
    with pytest.raises(kadr.RequestError, match=r"fps is 0\.05"):
        comfy.run(tiny(home, fps=0.05))
    (comfy.models / "checkpoints" / "bad.safetensors").write_bytes(b"not a model")
    broken = copy.deepcopy(tiny(home))
    broken["1"]["inputs"]["model"] = "bad.safetensors"
    with pytest.raises(kadr.CheckpointError, match=r"bad\.safetensors"):
        comfy.run(broken)
    assert len(frames_of(comfy, tiny(home))) == 9


def node_of(images: torch.Tensor) -> type:
    """Returns a node without inputs that gives these images."""

    class Images:
        RETURN_TYPES = ("IMAGE",)
        FUNCTION = "give"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {}}

        def give(self) -> tuple[torch.Tensor]:
            return (images,)

    return Images


def kadr_writer(path: Path) -> Any:
    from kadr.media.writer import VideoWriter

    return VideoWriter(path, kadr.Size(64, 64), 24)
