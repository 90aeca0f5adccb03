"""Pipes and devices in place of files: as inputs they are refused at once, and a full stdout is explained."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from PIL import Image

from kadr.models.registry import find_release
from kadr.spec.locate import find_release_on_disk
from tests import tiny_models
from tests.cli.conftest import CommandResult, FakeEngine

Run = Callable[..., CommandResult]
PROMPT = "a red circle moving right on a black background"
FULL_DEVICE = Path("/dev/full")
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")


@pytest.fixture
def pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Makes a named pipe that nobody writes to. A command that waits for it fails after ten seconds."""

    def refuse_to_wait(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("the command waits for a named pipe")

    def make(name: str) -> str:
        os.mkfifo(tmp_path / name)
        return name

    monkeypatch.chdir(tmp_path)
    previous = signal.signal(signal.SIGALRM, refuse_to_wait)
    signal.alarm(10)
    yield make
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize(
    "args",
    [
        ("generate", PROMPT, "--model", "pipe.safetensors"),
        ("generate", PROMPT, "--model", "pipe.gguf"),
        ("generate", PROMPT, "--second-model", "pipe.safetensors"),
        ("generate", PROMPT, "--vae", "pipe.safetensors"),
        ("generate", PROMPT, "--upscaler", "pipe.safetensors"),
        ("generate", PROMPT, "--lora", "pipe.safetensors"),
        ("generate", PROMPT, "--text-encoder", "pipe.gguf"),
        ("generate", PROMPT, "--image", "pipe.png"),
        ("generate", PROMPT, "--video", "pipe.mp4"),
        ("generate", PROMPT, "--input-video", "pipe.mp4"),
        ("generate", PROMPT, "--control", "canny:pipe.mp4"),
        ("generate", PROMPT, "--config", "pipe.yaml"),
        ("generate", "--prompt-file", "pipe.txt"),
        ("plan", PROMPT, "--image", "pipe.png"),
        ("rerun", "pipe.mp4"),
        ("inspect", "pipe.mp4"),
        ("inspect", "pipe.safetensors"),
        ("quantize", "pipe.safetensors", "out.gguf", "--type", "Q8_0"),
    ],
    ids=lambda args: " ".join(args).replace(PROMPT, "PROMPT"),
)
def test_an_input_that_is_a_named_pipe_is_refused(kadr: Run, pipe: Callable[[str], str], args: tuple[str, ...]) -> None:
    name = pipe(next(arg for arg in args if "pipe" in arg).removeprefix("canny:"))
    result = kadr(*args)
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert (result.code, result.out, len(lines)) == (1, "", 1)
    assert name in lines[0]
    assert "it is a named pipe" in lines[0] or "--text-encoder" in args
    assert sorted(os.listdir()) == [name]  # nothing was written


@pytest.mark.parametrize(
    "args",
    [
        ("generate", PROMPT, "--config", "/dev/zero"),
        ("generate", "--prompt-file", "/dev/zero"),
        ("inspect", "/dev/zero"),
    ],
)
def test_an_endless_device_is_refused_before_it_is_read(kadr: Run, pipe: object, args: tuple[str, ...]) -> None:
    result = kadr(*args)
    assert result.code == 1
    assert "/dev/zero cannot be read: it is a device" in result.err


@pytest.mark.parametrize("name", ["folder", "folder.safetensors", "absent/latents.safetensors"])
def test_latents_that_cannot_be_saved_are_refused_first(kadr: Run, engine: FakeEngine, name: str) -> None:
    if "absent" not in name:
        Path(name).mkdir()
    result = kadr("generate", PROMPT, "--save-latents", name)
    assert result.code == 1
    assert ("does not exist" if "absent" in name else "is a folder. Name a file in it") in result.err
    assert engine.written_requests == []
    assert not Path("out.mp4").exists()


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("args", [(), ("--json",)])
def test_a_full_stdout_does_not_call_a_written_video_a_bug(
    kadr: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    with FULL_DEVICE.open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        result = kadr("generate", PROMPT, *args)
    assert Path("out.mp4").is_file()
    assert result.code == 1
    assert result.err.splitlines()[-1] == (
        "error: the video is written to out.mp4, but its path could not be printed: stdout cannot be written: No space "
        "left on device. Redirect it to a place with room."
    )


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("args", [("models",), ("models", "--json"), ("--version",), ("--help",)])
def test_a_full_stdout_is_an_error_of_one_line(
    kadr: Run, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    with FULL_DEVICE.open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        result = kadr(*args)
    assert result.code == 1
    assert result.err == (
        "error: stdout cannot be written: No space left on device. Redirect it to a place with room.\n"
    )


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="the system has no /dev/full")
def test_a_full_stderr_does_not_stop_a_video(kadr: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    full = FULL_DEVICE.open("w", buffering=1)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        result = kadr("generate", PROMPT)
    with pytest.raises(OSError, match="No space left"):
        full.close()
    assert (result.code, result.out) == (0, "out.mp4\n")


@pytest.mark.parametrize(
    ("file", "args"),
    [
        ("m/text_encoder/config.json", ("inspect", "m/text_encoder")),
        ("m/text_encoder/model.safetensors.index.json", ("inspect", "m/text_encoder")),
        ("m/tokenizer/spiece.model", ("quantize", "m", "x.gguf", "--type", "F16")),
        ("lora/adapter_config.json", ("inspect", "lora")),
        ("m/image.txt", ("train-lora", "m")),
        (
            "out.windows/request.json",
            ("generate", PROMPT, "--size", "32x32", "--frames", "33", "--window", "17", "--resume"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_huge_file_beside_the_weights_is_not_read(
    kadr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, args: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.write_model(tmp_path / "m")
    Image.new("RGB", (32, 32)).save("m/image.png")
    Path("lora").mkdir()
    shutil.copy(find_release_on_disk(find_release("demo-lora-teal")), "lora/adapter_model.safetensors")
    Path("out.windows").mkdir()
    Path("out.windows/window-0001.safetensors").touch()
    with Path(file).open("wb") as opened:
        opened.truncate(1 << 40)  # takes no room on the disk
    result = kadr(*args)
    assert (result.code, result.out) == (1, "")
    assert "it has more than" in result.err
