"""A cancelled generation stops in every stage, leaves nothing, and the next one of its engine is the same as ever."""

from __future__ import annotations

import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from kadr import Condition, Control, Engine, Progress, Request, Size
from kadr.cancellation import CancelToken, cancellable
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.gguf.convert import transformer_to_gguf
from kadr.errors import Cancelled
from kadr.media.clip import read_video
from kadr.media.writer import VideoWriter
from kadr.models.transformer import Transformer
from kadr.nn.conv import CausalConv3d
from kadr.nn.temporal_cache import TemporalCache
from kadr.quant.mixes import find_mix
from kadr.request.windows import Windows
from kadr.sampling.settings import Guidance, Pass
from tests.lora_files import block_pairs, write_lora_file
from tests.tiny_models import MODEL_FILE, write_random_upscaler

REQUEST = Request(prompt="a red circle", size=Size(64, 64), frames=17, fps=24, seed=7, sigmas=(1.0, 0.6), guidance=1.0)
MOMENTS = 4  # checks, drawn at random, at which each stage is cancelled


class CancelAt(CancelToken):
    """A token that is cancelled when it is looked at for the n-th time, and counts who looks.

    Attributes:
        modules: names of the modules that looked.
    """

    def __init__(self, count: float = float("inf")) -> None:
        self.num_checks, self.count, self.modules = 0, count, Counter[str]()
        super().__init__()

    @property
    def is_cancelled(self) -> bool:
        frame, self.num_checks = sys._getframe(1), self.num_checks + 1
        while frame.f_globals["__name__"] == "kadr.cancellation" and frame.f_back is not None:
            frame = frame.f_back
        self.modules[frame.f_globals["__name__"].removeprefix("kadr.")] += 1
        return self.num_checks >= self.count

    @is_cancelled.setter
    def is_cancelled(self, value: bool) -> None:
        if value:
            self.count = 0


class Mode(NamedTuple):
    """Options of the engine and fields of the request, and the modules that must look at the token."""

    engine: dict[str, object]
    request: dict[str, object]
    modules: set[str]


STAGES = {"checkpoints.load", "models.t5", "models.block_loop", "nn.conv", "media.writer"}


@pytest.fixture(scope="module")
def modes(home: Path, image_condition: Condition, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Mode]:
    folder = tmp_path_factory.mktemp("inputs")
    upscaler = write_random_upscaler(folder / "up.safetensors")
    lora = write_lora_file(folder / "lora.safetensors", block_pairs())
    clip = folder / "clip.mp4"
    with VideoWriter(clip, Size(64, 64), 24) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8))
    two_passes = {"multi_scale": True, "second_pass": Pass(sigmas=(0.8, 0.4)), "downscale_factor": 0.5}
    two_passes |= {"size": Size(128, 128)}
    stg = {"guidance": Guidance(cfg_scale=2.0, stg_scale=1.0, skip_blocks=(1,))}
    return {
        "text": Mode({}, {}, STAGES),
        "image": Mode({}, {"conditions": (image_condition,), **stg}, STAGES),
        "clip": Mode({}, {"conditions": (Condition(str(clip)),)}, {*STAGES, "media.clip"}),
        "two passes": Mode({"upscaler": upscaler}, two_passes, {*STAGES, "models.upscaler"}),
        "windows": Mode({}, {"frames": 41, "windows": Windows(frames=25, overlap=16)}, STAGES),
        "control": Mode({"loras": [lora]}, {"controls": (Control(str(clip), kind="canny"),)}, {*STAGES, "media.clip"}),
        "quantized": Mode({"quant": "Q8_0"}, {}, {*STAGES, "quant.ggml"}),
        "merged": Mode({"loras": [lora], "merge_loras": True}, {}, {*STAGES, "models.lora_layers"}),
    }


MODES = ("text", "image", "clip", "two passes", "windows", "control", "quantized", "merged")


@pytest.fixture(scope="module")
def open_engine(home: Path) -> Callable[..., Engine]:
    return lambda **options: Engine.open(home / MODEL_FILE, device="cpu", prompt_cache=False, **options)


@pytest.mark.filterwarnings("ignore::kadr.KadrWarning")
@pytest.mark.parametrize("name", MODES)
def test_each_stage_stops_and_the_engine_still_works(
    name: str, modes: dict[str, Mode], open_engine: Callable[..., Engine], output_folder: Path
) -> None:
    mode, output = modes[name], output_folder / "out.mp4"
    request, token = replace(REQUEST, **mode.request), CancelAt()
    open_engine(**mode.engine).write(request, output, cancel=token)
    assert token.modules.keys() >= mode.modules
    expected = read_video(output).frames
    output.unlink()
    draw = random.Random(name)
    for count in sorted({1, *draw.sample(range(1, token.num_checks), MOMENTS), token.num_checks - 1}):
        engine = open_engine(**mode.engine)  # one that has loaded nothing yet
        with pytest.raises(Cancelled):
            engine.write(request, output, cancel=CancelAt(count))
        left = {path.name for path in output_folder.rglob("*") if path.is_file()}
        if request.windows is None:
            assert list(output_folder.iterdir()) == []
        else:
            assert left <= {".lock", "request.json", "window-0001.safetensors", "window-0002.safetensors"}
            assert not left or "window-0001.safetensors" in left
        shutil.rmtree(output.with_suffix(".windows"), ignore_errors=True)
        engine.write(request, output)
        assert np.array_equal(read_video(output).frames, expected)
        output.unlink()


@pytest.mark.parametrize("name", ["text", "windows"])
@pytest.mark.parametrize("stage", ["denoise", "decode"])
@pytest.mark.parametrize("at_end", [False, True])
def test_process_that_ends_at_once_leaves_nothing_but_finished_windows(
    name: str, stage: str, at_end: bool, modes: dict[str, Mode], engine: Engine, output_folder: Path
) -> None:
    """Removes leftovers as the second signal does, at the start or at the end of a stage."""
    token, left = CancelToken(), list[set[str]]()

    def watch(progress: Progress) -> None:
        if progress.stage == stage and progress.step == (progress.of if at_end else 0):
            token.remove_leftovers()
            left.append({path.name for path in output_folder.rglob("*")})
            raise Cancelled

    with pytest.raises(Cancelled):
        engine.write(replace(REQUEST, **modes[name].request), output_folder / "out.mp4", watch=watch, cancel=token)
    has_windows = name == "windows" and (stage == "decode" or at_end)
    windows = {"out.windows", ".lock", "request.json", "window-0001.safetensors", "window-0002.safetensors"}
    assert left[0] <= (windows if has_windows else set())
    assert ("window-0001.safetensors" in left[0]) == has_windows


@pytest.mark.parametrize("name", ["image", "two passes"])
def test_another_thread_cancels_at_any_moment(
    name: str, modes: dict[str, Mode], open_engine: Callable[..., Engine]
) -> None:
    mode = modes[name]
    engine, request = open_engine(**mode.engine), replace(REQUEST, **mode.request)
    began = time.monotonic()
    expected = engine.generate(request)
    seconds, draw = time.monotonic() - began, random.Random(0)

    def generate_until_cancelled(token: CancelToken) -> None:
        while True:  # however fast the machine is today
            engine.generate(request, cancel=token)

    for _ in range(MOMENTS):
        token = CancelToken()
        timer = threading.Timer(draw.uniform(0, 0.5 * seconds), token.cancel)
        timer.start()
        with pytest.raises(Cancelled):
            generate_until_cancelled(token)
        timer.join()
    assert np.array_equal(engine.generate(request).frames, expected.frames)


def test_denoise_and_decode_are_cancelled_too(engine: Engine) -> None:
    token = CancelToken()
    latents = engine.denoise(REQUEST, cancel=token)
    engine.decode(latents, REQUEST, cancel=token)
    token.cancel("enough")
    for call in (lambda: engine.denoise(REQUEST, cancel=token), lambda: engine.decode(latents, REQUEST, cancel=token)):
        with pytest.raises(Cancelled, match="enough"):
            call()


def test_quantizing_a_file_stops_and_leaves_nothing(home: Path, output_folder: Path) -> None:
    checkpoint, path = Checkpoint.open(home / MODEL_FILE), output_folder / "out.gguf"
    token = CancelAt()
    with cancellable(token):
        transformer_to_gguf(checkpoint, path, find_mix("Q8_0"))
    assert token.modules["checkpoints.gguf.writer"] >= len(checkpoint.sources["transformer"].infos)
    path.unlink()
    for count in (2, token.num_checks // 2, token.num_checks):
        with pytest.raises(Cancelled), cancellable(CancelAt(count)):
            transformer_to_gguf(checkpoint, path, find_mix("Q8_0"))
        assert list(output_folder.iterdir()) == []


def test_backward_pass_looks_at_the_token_before_each_block(home: Path) -> None:
    transformer = Checkpoint.open(home / MODEL_FILE).load_transformer(torch.float32)
    token = CancelAt()
    with cancellable(token):
        loss = _forward(transformer)
        checks = token.num_checks
        loss.backward()
    assert token.num_checks - checks == len(transformer.blocks)
    token = CancelAt()
    with cancellable(token):
        loss = _forward(transformer)
        token.cancel()
        with pytest.raises(Cancelled):
            loss.backward()


def _forward(transformer: Transformer) -> torch.Tensor:
    """Returns a loss that every block has a gradient from."""
    config = transformer.config
    tokens = torch.randn(1, 4, config.in_channels, requires_grad=True)
    rope = transformer.compute_rope(torch.zeros(1, 3, 4))
    text = torch.randn(1, 3, config.caption_channels)
    return transformer(tokens, rope, text, None, torch.ones(1, 1)).square().sum()


def test_decoder_looks_at_the_token_before_each_convolution(home: Path) -> None:
    checkpoint = Checkpoint.open(home / MODEL_FILE)
    vae = checkpoint.load_vae(torch.float32, with_encoder=False)
    token = CancelAt()
    with torch.no_grad(), cancellable(token):
        latents = torch.randn(1, vae.config.latent_channels, 1, 2, 2)
        vae.decoder(latents, TemporalCache.single_chunk(None), torch.ones(1))
    assert token.modules["nn.conv"] == sum(isinstance(child, CausalConv3d) for child in vae.modules())
