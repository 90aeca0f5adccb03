"""Messages name flags on the command line, and fields in Python and in tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import typer

import kadr
from kadr.cli.main import app
from kadr.errors import KadrWarning, RequestError
from kadr.request.request import Request
from kadr.sampling.settings import Guidance, Pass
from kadr.setting_names import FLAGS_BY_FIELD, name_settings_by_flags
from tests.cli.conftest import CommandResult
from tests.cli.conftest import kadr as kadr_command

__all__ = ["kadr_command"]  # the fixture
BOTH = [
    ("denoise_strength is 2; give at most 1.", "--denoise-strength is 2; give at most 1."),
    ("size is 63x63; sides are multiples.", "--size is 63x63; sides are multiples."),
    ("the size is 63x63, and the model has frames.", "the size is 63x63, and the model has frames."),
    ("Give more frames or seconds, or fewer prompts.", "Give more --frames or --seconds, or fewer prompts."),
    ("These would fit: size=1152x640 frames=121.", "These would fit: --size 1152x640 --frames 121."),
    ("Ask for a single pass (multi_scale=False).", "Ask for a single pass (--single-pass)."),
    ("weights in 8 bits, as quant=auto allows", "weights in 8 bits, as --quant auto allows"),
    ("Choose another --port.", "Choose another --port."),
    ("run `kadr plan --frames 9` for it", "run `kadr plan --frames 9` for it"),
    ("Make one: kadr generate x --frames 9. Then frames=9", "Make one: kadr generate x --frames 9. Then --frames 9"),
    ("models/text_encoder/model.safetensors is no file", "models/text_encoder/model.safetensors is no file"),
]


@pytest.mark.parametrize(("with_fields", "with_flags"), BOTH)
def test_a_message_names_what_its_reader_knows(with_fields: str, with_flags: str) -> None:
    assert str(RequestError(with_flags)) == str(KadrWarning(with_flags)) == with_fields
    name_settings_by_flags(True)
    assert str(RequestError(with_flags)) == str(KadrWarning(with_flags)) == with_flags


@pytest.mark.parametrize("message", ["denoise_strength is 2.", "skip_initial is 9 of 8 steps.", "fps are 0."])
def test_fields_become_flags_only_on_the_command_line(message: str) -> None:
    assert str(RequestError(message)) == message
    name_settings_by_flags(True)
    assert str(RequestError(message)).startswith("--")


def test_every_flag_and_field_of_the_table_exists() -> None:
    command = typer.main.get_command(app).commands["generate"]
    flags = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert set(FLAGS_BY_FIELD.values()) <= flags
    known = {field.name for kind in (Request, Guidance, Pass, kadr.Windows, kadr.Encoding) for field in fields(kind)}
    engine = {"model", "release", "device", "dtype", "quant", "offload", "loras", "lora_partial", "merge_loras"}
    engine |= {"upscaler", "second_model", "text_encoder", "vae", "models_dirs", "seconds", "resume"}
    roots = {field.partition("=")[0].rpartition(".")[2] for field in FLAGS_BY_FIELD}
    assert roots <= known | engine


def test_the_same_mistake_is_told_in_both_languages(kadr_command: Callable[..., CommandResult]) -> None:
    with pytest.raises(RequestError, match=r"^denoise_strength is"):
        Request(prompt="x", input_video="clip.mp4", denoise_strength=2)
    result = kadr_command("generate", "x", "--input-video", "clip.mp4", "--denoise-strength", "2")
    assert result.err.startswith("error: --denoise-strength is 2")
