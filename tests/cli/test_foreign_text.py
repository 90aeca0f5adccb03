"""Escape sequences in files, names and answers do not reach the terminal; JSON output has them as data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kadr.cli.terminal.errors import print_stderr
from kadr.media.writer import VideoWriter
from kadr.request.request import Request
from kadr.shapes import Size
from tests import tiny_models
from tests.cli.conftest import CommandResult
from tests.fuzz.files import gguf_string, tag_video
from tests.fuzz.values import nested

Run = Callable[..., CommandResult]
ESCAPE = "\x1b[31m\x9b2J\u202egnp\x07"
SHOWN = "\\x1b[31m\\x9b2J\\u202egnp\\x07"


def require_shown_escaped(result: CommandResult) -> None:
    lines = [*result.out.splitlines(), *result.err.splitlines()]
    assert all(map(str.isprintable, lines))
    assert all(len(line) < 500 for line in result.err.splitlines())
    assert SHOWN in result.out + result.err


def write_video(path: Path) -> Path:
    request = Request(f"a circle {ESCAPE}", seed=3).to_json()
    with VideoWriter(
        path, Size(32, 32), fps=24, metadata={"version": ESCAPE, "model": ESCAPE, "request": request}
    ) as writer:
        writer.write(np.zeros((1, 32, 32, 3), np.uint8))
    return path


def test_prompt_of_a_video_is_escaped(kadr: Run, tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4")
    require_shown_escaped(kadr("inspect", video))
    assert json.loads(kadr("inspect", video, "--json").out)["request"]["prompt"] == f"a circle {ESCAPE}"
    require_shown_escaped(kadr("rerun", video, "--output", tmp_path / "b.mp4"))


def test_names_in_safetensors_are_escaped(kadr: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({ESCAPE: torch.zeros(1)}, path)
    require_shown_escaped(kadr("inspect", path))


def test_metadata_and_keys_of_a_lora_are_escaped(kadr: Run, tmp_path: Path) -> None:
    path = Path("src/kadr/assets/demo/demo-lora-teal.safetensors").resolve()
    from safetensors.torch import load_file

    copy = tmp_path / "lora.safetensors"
    save_file({**load_file(path), f"{ESCAPE}.lora_A.weight": torch.zeros(1, 1)}, copy, {ESCAPE: ESCAPE})
    require_shown_escaped(kadr("inspect", copy))
    assert json.loads(kadr("inspect", copy, "--json").out)["metadata"][ESCAPE] == ESCAPE


def test_architecture_of_a_gguf_is_escaped(kadr: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    field = gguf_string("general.architecture") + (8).to_bytes(4, "little") + gguf_string(ESCAPE)
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little") + field + bytes(64))
    require_shown_escaped(kadr("inspect", path))


@pytest.mark.parametrize(
    "args",
    [("inspect", ESCAPE), ("generate", "x", "--image", ESCAPE), ("generate", "x", "--size", ESCAPE), ("rerun", ESCAPE)]
    + [
        ("generate", "x", "--model", ESCAPE),
        ("generate", "x", f"--{ESCAPE}"),
        (ESCAPE,),
    ],
)
def test_names_on_the_command_line_are_escaped(kadr: Run, tmp_path: Path, args: tuple[str, ...]) -> None:
    require_shown_escaped(kadr(*args))


def test_keys_and_values_of_a_config_are_escaped(kadr: Run, tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text('"\\e[31m\\x9b2J\\u202egnp\\a": 1')
    require_shown_escaped(kadr("plan", "x", "--config", config))


def test_prompt_in_a_dry_run_is_escaped(kadr: Run) -> None:
    require_shown_escaped(kadr("generate", ESCAPE, "--dry-run", "--model", "demo"))


def test_message_is_printed_escaped_and_cut(capsys: pytest.CaptureFixture[str]) -> None:
    print_stderr(f"enhanced: {ESCAPE * 1000}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert len(line) < 500


@pytest.mark.parametrize(
    "args",
    [
        *(
            ("generate", "x", flag, "y" * 256)
            for flag in ("--model", "--config", "--vae", "--text-encoder", "--upscaler")
        ),
        *(
            ("generate", "x", flag, "y" * 256)
            for flag in ("--image", "--video", "--input-video", "--control", "--lora")
        ),
        ("generate", "x", "--output", "y" * 256 + ".mp4"),
        ("generate", "x", "--save-latents", "y" * 256 + ".safetensors"),
        *((verb, "y" * 256) for verb in ("inspect", "rerun", "train-lora")),
        ("quantize", "y/" + "y" * 256, "x.gguf", "--type", "Q8_0"),
        ("generate", "x", "--seconds", "1e308"),
        ("generate", "x", "--size", f"{'9' * 5000}x64"),
        ("generate", "x", "--seed", "9" * 5000),
        ("generate", "x", "--video", f"a.mp4#0:{'9' * 5000}"),
        ("inspect", "~nobody-of-this-name/a.mp4"),
    ],
)
def test_impossible_value_is_no_bug(
    kadr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = kadr(*args)
    assert result.code in (1, 2)
    assert "bug" not in result.err
    assert result.err.splitlines()[-1].lower().startswith("error: ")
    assert all(len(line) < 500 for line in result.err.splitlines())


@pytest.mark.parametrize(
    "comment", [nested(10**5), f'{{"kadr": {{"request": {nested(900)}}}}}', f'{{"kadr": {{"x": {"9" * 5000}}}}}']
)
def test_deep_and_long_metadata_of_a_video_are_no_bug(kadr: Run, tmp_path: Path, comment: str) -> None:
    (tmp_path / "a.mp4").write_bytes(tag_video(comment))
    for verb in ("inspect", "rerun"):
        result = kadr(verb, tmp_path / "a.mp4")
        assert (result.code, result.err.startswith("error: "), "bug" in result.err) == (1, True, False)


def test_yaml_aliases_and_depth_are_refused(kadr: Run, tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    for text, reason in (("a: &a [x]\nb: *a", "alias"), ("[" * 5000, "deep"), ("a: 2020-99-99", "not YAML")):
        config.write_text(text)
        result = kadr("plan", "x", "--config", config)
        assert (result.code, reason in result.err, "bug" in result.err) == (1, True, False)


def test_vae_that_does_not_fit_its_config_is_refused_before_denoising(kadr: Run, tmp_path: Path) -> None:
    home = tiny_models.write_model(tmp_path)
    model = home / tiny_models.MODEL_FILE
    data = model.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    config = json.loads(header["__metadata__"]["config"])
    config["vae"]["decoder_base_channels"] = 16
    header["__metadata__"]["config"] = json.dumps(config)
    raw = json.dumps(header).encode()
    model.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])
    result = kadr("plan", "x", "--model", model)
    assert (result.code, "does not fit its vae" in result.err) == (1, True)
