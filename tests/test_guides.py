"""The blocks of README and of the guides run as printed, in order, each page in a folder of its own, offline."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kadr.errors import CheckpointError
from kadr.media.clip import read_video
from kadr.media.writer import VideoWriter
from kadr.shapes import Size
from tests import lora_files
from tests.page_commands import (
    ROOT,
    Block,
    Call,
    PageRunner,
    blocks_of,
    run_as_process,
    run_in_process,
    run_python,
    section_of,
)
from tests.page_server import PageServer
from tests.request.official_configs import OFFICIAL_CONFIGS

README = "README.md"
PAGES = (README, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "guides").glob("*.md")))
DEMO_FOLDER = ROOT / "src" / "kadr" / "assets" / "demo"
LONG_PAGES = {
    README,
    *(f"docs/guides/{name}.md" for name in ("conditions", "control", "long-video", "python")),
    *(f"docs/guides/{name}.md" for name in ("recipes", "serve", "train-lora")),
}
NOT_FETCHED = "could not be fetched"


@dataclass(frozen=True)
class Refusal:
    """The end of a command of a page without the network, and the reason.

    Args:
        error: a part of its only error line; "" where it is not run as written.
        leaves: writes what the command would have written, for the commands after it.
    """

    reason: str
    error: str = NOT_FETCHED
    leaves: Callable[[Path], None] = lambda folder: None


def write_lora(path: Path, width: int) -> None:
    """Writes a LoRA for one layer of a transformer of this width."""
    pairs = lora_files.block_pairs(["attn1.to_q"], num_layers=1, width=width)
    lora_files.write_lora_file(path, pairs, lora_files.comfy)


def write_clip(path: Path, frames: int) -> None:
    """Writes a clip in which a bright square crosses the frame."""
    with VideoWriter(path, Size(128, 96), 24) as writer:
        for number in range(frames):
            frame = np.full((1, 96, 128, 3), 40, np.uint8)
            frame[:, 30:60, number % 98 : number % 98 + 30] = 200
            writer.write(frame)


LARGE = "the model is gigabytes on the hub"
# page -> command -> how it ends. With --dry-run, which fetches nothing, each of the videos is accepted.
REFUSALS: Mapping[str, Mapping[str, Refusal]] = {
    README: {
        "models pull ltxv-2b-0.9.8-distilled": Refusal(LARGE),
        "models verify ltxv-2b-0.9.8-distilled": Refusal(LARGE, "not on disk, or not all of it"),
        "generate 'a fox runs through snow, low winter sun' --model ltxv-2b-0.9.8-distilled": Refusal(LARGE),
        "generate 'a fox runs through snow' --model weights/ltxv-2b-0.9.8-distilled.safetensors": Refusal(
            "the demo lies in the place of the file, and would take minutes at the size of the recipe", error=""
        ),
        "quantize ltxv-2b-0.9.8-distilled 2b-Q4_K_M.gguf --type Q4_K_M": Refusal(LARGE),
        "generate 'it starts to rain' --image photo.jpg --seconds 4 --model ltxv-2b-0.9.8-distilled": Refusal(LARGE),
        "generate 'it starts to rain' --config ltxv-13b-0.9.8-dev.yaml": Refusal(LARGE),
    },
    "docs/guides/control.md": {
        "generate 'a marble statue turns its head' --model ltxv-13b-0.9.8-dev --frames 97 "
        "--lora ltxv-13b-0.9.7-ic-lora-canny --control canny:clip.mp4": Refusal(LARGE),
        "generate 'a fox runs through snow' --model ltxv-13b-0.9.8-dev --size 1216x704 --single-pass --guidance 1 "
        "--stg 0 --lora ltxv-13b-0.9.8-ic-lora-detailer --input-video draft.mp4 --control draft.mp4 "
        "--sigmas 0.99,0.9094": Refusal(LARGE),
    },
    "docs/guides/enhance.md": {
        "generate 'a fox in snow' --model ltxv-2b-0.9.8-distilled --enhance http://localhost:11434/v1 "
        "--enhance-model qwen3:8b": Refusal("calls a chat model, if this machine has one; and " + LARGE, error=""),
    },
    "docs/guides/long-video.md": {
        "generate 'a fox runs through snow' --model ltxv-13b-0.9.8-dev --size 1216x704 --window 121 --guidance 1 "
        "--stg 0 --lora ltxv-13b-0.9.8-ic-lora-detailer --input-video draft.mp4 --control draft.mp4 "
        "--sigmas 0.99,0.9094 --adain 0": Refusal(LARGE),
    },
    "docs/guides/lora.md": {
        "generate 'a fox runs through snow' --model ltxv-13b-0.9.8-distilled --lora cakeify.safetensors 0.8 "
        "--lora slow-camera.safetensors": Refusal(LARGE),
    },
    "docs/guides/outputs.md": {
        "generate 'a fox runs' --model ltxv-13b-0.9.8-dev --input-video fox.mp4 --denoise-strength 0.7 --fps 30 "
        "--keep-audio": Refusal(LARGE),
    },
    "docs/guides/train-lora.md": {
        "train-lora clips --model ltxv-2b-0.9.8-distilled --output sketch.safetensors --size 704x480 --frames 49 "
        "--quant int8 --validation-prompt 'a cat sleeps on a sofa, in the style of SKETCH'": Refusal(
            LARGE, leaves=lambda folder: write_lora(folder / "sketch.safetensors", 2048)
        ),
        "generate 'a horse at sea, in the style of SKETCH' --model ltxv-2b-0.9.8-distilled "
        "--lora sketch.safetensors": Refusal(LARGE),
    },
}
# page -> program -> why it is not run: a script that does nothing, and that its page must call, stands in its place.
STAND_INS: Mapping[str, Mapping[str, str]] = {
    "docs/guides/deploy.md": {
        "docker": "needs Docker's engine and a registry of images; make image takes the image's steps without them",
        "git": "pulls from the network",
        "sudo": "changes this machine: its services, /opt and /etc",
    },
}
# Pages whose Python ends where it would fetch a model, or, with "", is not run because it calls a chat model.
PYTHON_ENDS = {
    "docs/guides/control.md": NOT_FETCHED,
    "docs/guides/enhance.md": "",
    "docs/guides/lora.md": NOT_FETCHED,
}
PRINTED_BY_PYTHON_GUIDE = (
    "enough for today",
    "the user closed the window",
    "the engine is making another video.",
    "MediaError: missing.png: there is no such file.",
)
VIDEOS_OF_PYTHON_GUIDE = {
    *("circle", "two", "guided", "between", "corner", "blue"),
    *("long", "resumed", "teal", "half", "watched"),
}


def prepare_readme(folder: Path) -> None:
    """Makes what README presupposes: a clone whose .venv is ready, and files of the reader's own."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for stamp in (".made", ".core"):
        (folder / ".venv" / stamp).touch()
    shutil.copytree(DEMO_FOLDER, folder / "weights", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(DEMO_FOLDER / "text_encoder", folder / "weights" / "text_encoder", dirs_exist_ok=True)
    shutil.copy(DEMO_FOLDER / "demo.safetensors", folder / "weights" / "ltxv-2b-0.9.8-distilled.safetensors")
    Image.new("RGB", (704, 480), "gray").save(folder / "photo.jpg")
    (folder / "ltxv-13b-0.9.8-dev.yaml").write_text(OFFICIAL_CONFIGS["ltxv-13b-0.9.8-dev"])


def prepare_control(folder: Path) -> None:
    """Makes the clip that is followed and the one that gets details."""
    write_clip(folder / "clip.mp4", 97)
    write_clip(folder / "draft.mp4", 121)


def prepare_long_video(folder: Path) -> None:
    """Makes the clip that gets details."""
    write_clip(folder / "draft.mp4", 121)


def prepare_deploy(folder: Path) -> None:
    """Makes what the page presupposes of a clone."""
    shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("__pycache__", "kadr.env"))


def prepare_lora(folder: Path) -> None:
    """Makes two LoRAs for 13B."""
    for name in ("cakeify", "slow-camera"):
        write_lora(folder / f"{name}.safetensors", 4096)


def prepare_model_folders(folder: Path) -> None:
    """Makes ComfyUI's folders, with the demo in place of large models."""
    models = folder / "home" / "ComfyUI" / "models"
    for name in ("unet", "vae", "loras"):
        (models / name).mkdir(parents=True)
    assert (
        run_in_process(["quantize", "demo", str(models / "unet" / "ltxv-13b-Q4_K_M.gguf"), "--type", "Q8_0"]).code == 0
    )
    shutil.copy(DEMO_FOLDER / "demo.safetensors", models / "vae" / "ltxv_vae.safetensors")
    shutil.copy(DEMO_FOLDER / "demo-lora-teal.safetensors", models / "loras" / "style.safetensors")


def prepare_outputs(folder: Path) -> None:
    """Makes the clip whose sound is kept."""
    write_clip(folder / "fox.mp4", 97)


def prepare_train_lora(folder: Path) -> None:
    """Makes a folder of clips with captions."""
    (folder / "clips").mkdir()
    for name in ("fox-1", "fox-2"):
        write_clip(folder / "clips" / f"{name}.mp4", 49)
        (folder / "clips" / f"{name}.txt").write_text("a fox runs through deep snow, in the style of SKETCH")


PREPARATIONS: Mapping[str, Callable[[Path], None]] = {
    README: prepare_readme,
    "docs/guides/control.md": prepare_control,
    "docs/guides/deploy.md": prepare_deploy,
    "docs/guides/long-video.md": prepare_long_video,
    "docs/guides/lora.md": prepare_lora,
    "docs/guides/model-folders.md": prepare_model_folders,
    "docs/guides/outputs.md": prepare_outputs,
    "docs/guides/train-lora.md": prepare_train_lora,
}


class Reader:
    """Someone who runs the blocks of a page in an empty folder."""

    def __init__(self, page: str, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.refused: list[str] = []
        self.lacks_curl = False
        self.runner = PageRunner(folder, self.run_kadr)
        home = str(folder / "home")
        self.runner.environment["HOME"] = home
        self.server = PageServer(folder / "queue", {"HOME": home})
        self.calls_of_stand_ins = folder / ".venv" / "stand-ins"
        for program in STAND_INS.get(page, {}):
            script = self.runner.folder / ".venv" / "bin" / program
            script.write_text(f"#!/bin/bash\necho {program} >> {shlex.quote(str(self.calls_of_stand_ins))}\n")
            script.chmod(0o755)

    def read(self) -> None:
        """Runs the page, but for the section of README that installs kadr: tests/contracts/test_wheel.py runs that."""
        text = (ROOT / self.page).read_text("utf-8")
        installing = blocks_of(section_of(text, "Install")) if self.page == README else []
        PREPARATIONS.get(self.page, lambda folder: None)(self.folder)
        namespace: dict[str, Any] = {"__name__": "guide"}
        for block in blocks_of(text):
            if block.text in [each.text for each in installing]:
                continue
            block = block._replace(text=self.server.localize(block.text))
            if block.language == "python":
                self.run_python(block, namespace)
            elif "curl " in block.text and shutil.which("curl") is None:
                self.lacks_curl = True
            else:
                self.runner.run_shell(block.text)

    def run_python(self, block: Block, namespace: dict[str, Any]) -> None:
        """Runs one Python block, or the part of it that needs no network."""
        end = PYTHON_ENDS.get(self.page)
        if end is None:
            run_python(block, namespace, self.page)
        elif end:
            with pytest.raises(CheckpointError, match=end):
                run_python(block, namespace, self.page)

    def run_kadr(self, arguments: list[str]) -> Call:
        """Runs one command: README's first two as processes of their own, those of `REFUSALS` as far as they go."""
        if self.page == README and len(self.runner.calls) < 2:
            return run_as_process(arguments, self.folder)
        if arguments[0] == "serve":
            return self.server.run(arguments)
        words = shlex.join(arguments)
        refusal = REFUSALS.get(self.page, {}).get(words)
        if refusal is None:
            return run_in_process(arguments)
        self.refused.append(words)
        if refusal.error:
            call = run_in_process(arguments)
            errors = [line for line in call.err.splitlines() if line.startswith("error: ")]
            assert (call.code, len(errors)) == (1, 1), f"{words}: {call.err}"
            assert refusal.error in errors[0]
        if arguments[0] == "generate":
            dry_run = run_in_process([*arguments, "--dry-run"])
            assert dry_run.code == 0, f"{words}: {dry_run.err}"
        refusal.leaves(self.folder)
        return Call(words, 0, "", "")


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in LONG_PAGES else page for page in PAGES]
)
def test_every_block_of_a_page_runs_in_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    reader = Reader(page, tmp_path)
    try:
        reader.read()
    finally:
        reader.server.stop()
    assert set(reader.refused) == set(REFUSALS.get(page, {})), "REFUSALS names commands that the page does not have"
    calls = reader.calls_of_stand_ins.read_text().split() if page in STAND_INS else []
    assert set(calls) == set(STAND_INS.get(page, {})), "STAND_INS names programs that the page does not call"
    videos = {path.stem: read_video(path).frames for path in tmp_path.glob("*.mp4")}
    assert all(frames.std() > 1 for frames in videos.values()), "a video of one colour"
    if page == "docs/guides/python.md":
        output = capsys.readouterr().out
        assert [text for text in PRINTED_BY_PYTHON_GUIDE if text not in output] == []
        assert set(videos) == VIDEOS_OF_PYTHON_GUIDE
    if reader.lacks_curl:
        pytest.skip("this machine has no curl for some of the blocks")


def test_page_with_a_failing_block_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = PageRunner(tmp_path, run_in_process)
    with pytest.raises(AssertionError, match=r"exit code 1 of\n(.*\n)*.*missing\.mp4"):
        runner.run_shell("kadr --version\nkadr inspect missing.mp4\nkadr models\n")
    assert [call.words for call in runner.calls] == ["--version", "inspect missing.mp4"]
    with pytest.raises(ZeroDivisionError):
        run_python(blocks_of("# A page\n\n```python\nx = 1 / 0\n```\n")[0], {}, "page.md")


def test_shell_of_a_page_is_that_of_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = PageRunner(tmp_path, run_in_process)
    runner.run_shell(
        "for verb in inspect plan; do\n    .venv/bin/kadr $verb \\\n        --help > $verb.txt   # help\ndone\n"
    )
    assert [call.words for call in runner.calls] == ["inspect --help", "plan --help"]
    assert "PROMPT" in (tmp_path / "plan.txt").read_text()


def test_pages_of_the_tables_exist() -> None:
    assert {*REFUSALS, *STAND_INS, *PREPARATIONS, *PYTHON_ENDS, *LONG_PAGES} <= set(PAGES)
