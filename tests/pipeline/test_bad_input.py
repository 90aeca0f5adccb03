"""What cannot work is said before it costs anything, with value, limit and way out, and leaves nothing behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kadr import Condition, Engine, Request, Size
from kadr.checkpoints import hub
from kadr.checkpoints.save import write_single_file
from kadr.errors import CheckpointError, KadrError, MediaError, NonFiniteError, RequestError
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from tests.tiny_models import CHANNELS, LINEAR_QUADRATIC, MODEL_FILE, WeightEdit, build_random, vae_config, write_model

REQUEST = Request(prompt="a red circle", size=Size(64, 32), frames=9, fps=24, steps=3, guidance=1.0)
SHAPE = (1, CHANNELS, 2, 1, 2)


# --- pictures and files --------------------------------------------------------------------------------------------


def broken_pictures(photo: Condition, folder: Path) -> dict[str, tuple[Path, str]]:
    """Name -> file, and what the message must say beside its name."""
    whole = Path(photo.media).read_bytes()
    contents = {"cut.png": whole[: len(whole) // 2], "text.jpg": b"not a picture", "empty.png": b""}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    says = {"cut.png": "cannot be read", "text.jpg": "not a picture", "empty.png": "not a picture", "dot.png": "2x2"}
    return {name: (folder / name, what) for name, what in says.items()} | {
        "gone.png": (folder / "gone.png", "no such file")
    }


@pytest.mark.parametrize("name", ["cut.png", "text.jpg", "empty.png", "dot.png", "gone.png"])
def test_a_picture_that_cannot_be_read_is_refused_before_any_weight_is_loaded(
    untouched: Engine, photo: Condition, out: Path, tmp_path: Path, name: str
) -> None:
    path, says = broken_pictures(photo, tmp_path)[name]
    request = replace(REQUEST, conditions=(Condition(media=str(path)),))
    for make in (lambda: untouched.generate(request), lambda: untouched.write(request, out / "a.mp4")):
        with pytest.raises(MediaError) as caught:
            make()
        assert str(path) in str(caught.value)
        assert says in str(caught.value)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "says"),
    [("gone/a.mp4", "mkdir -p"), ("a.avi", "only .mp4"), (".", "is a folder"), ("file/a.mp4", "is a file")],
)
def test_a_file_that_cannot_be_written_is_refused_before_any_weight_is_loaded(
    untouched: Engine, out: Path, target: str, says: str
) -> None:
    (out / "file").write_bytes(b"")
    with pytest.raises(MediaError) as caught:
        untouched.write(REQUEST, out / target)
    assert says in str(caught.value)
    assert [path.name for path in out.iterdir()] == ["file"]


def test_a_size_that_no_mp4_has_is_refused_with_the_nearest(untouched: Engine, out: Path) -> None:
    with pytest.raises(MediaError, match=r"63x32.*62x32 or 64x32"):
        untouched.write(replace(REQUEST, size=Size(63, 32)), out / "a.mp4")
    assert list(out.iterdir()) == []


# --- requests that do not fit the model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"skip_final": 3}, "3 steps, less 0 at the front and 3 at the back"),
        ({"skip_initial": 1}, "skip_initial is 1"),
        ({"steps": None, "levels": (0.5, 0.5)}, r"\[0.5, 0.5\]"),
        ({"steps": None, "levels": (1.0, math.nan)}, "nan"),
        ({"steps": None, "levels": ()}, r"\[\]"),
        ({"steps": None, "levels": (1.5,)}, "1.5"),
        ({"prompt": "half a \ud83d character"}, "half a character"),
    ],
    ids=str,
)
def test_a_request_that_does_not_fit_is_refused_before_any_weight_is_loaded(
    untouched: Engine, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        untouched.generate(replace(REQUEST, **change))


@pytest.mark.parametrize(
    "shape", [(1, CHANNELS, 2, 2, 1), (1, CHANNELS, 3, 1, 2), (CHANNELS, 2, 1, 2), (1, 128, 2, 1, 2)]
)
def test_noise_and_latents_of_another_shape_are_refused_before_any_weight_is_loaded(
    untouched: Engine, shape: tuple[int, ...]
) -> None:
    right, wrong = torch.zeros(SHAPE), torch.zeros(shape)
    begun = replace(REQUEST, skip_initial=1)
    for make in (
        lambda: untouched.denoise(REQUEST, noise=wrong),
        lambda: untouched.denoise(begun, init_latents=wrong),
        lambda: untouched.decode(wrong, REQUEST),
        lambda: untouched.decode(right, REQUEST, noise=wrong),
        lambda: untouched.decode(right, REQUEST, noise=torch.zeros(1)),
    ):
        with pytest.raises(RequestError) as caught:
            make()
        assert str(SHAPE) in str(caught.value)
        assert str(shape) in str(caught.value) or "(1,)" in str(caught.value)


def test_latents_to_start_from_need_a_schedule_that_leaves_something_of_them(untouched: Engine) -> None:
    with pytest.raises(RequestError, match="first level is 1"):
        untouched.denoise(REQUEST, init_latents=torch.zeros(SHAPE))


def test_encoding_without_a_picture_is_refused(untouched: Engine) -> None:
    with pytest.raises(RequestError, match="no image or clip to encode"):
        untouched.encode_first_condition(REQUEST)


# --- models that are not there -------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **more: Any) -> Path:
        raise AssertionError(f"something was fetched: {given}")

    monkeypatch.setattr(hub, "fetch", refuse)
    monkeypatch.setattr(hub, "fetch_folder", refuse)


@pytest.mark.parametrize("name", ["gone.safetensors", "/gone/model.safetensors", "folder/", "~/gone.safetensors"])
@pytest.mark.usefixtures("no_hub")
def test_a_model_path_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Engine.open(name)
    assert str(Path(name).expanduser()) in str(caught.value)
    assert "kadr models" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("ltxv-2b-0.9.7", "ltxv-2b-0.9.5"),
        ("ltxv-13b-0.9.8-destilled", "ltxv-13b-0.9.8-distilled"),
        ("demoo", "demo"),
        ("LTXV-2B-0.9.5", "ltxv-2b-0.9.5"),
        ("xyzzy", "demo"),
    ],
)
@pytest.mark.usefixtures("no_hub")
def test_an_unknown_model_name_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(RequestError) as caught:
        Engine.open(name)
    assert repr(name) in str(caught.value)
    assert near in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "gpu"}, "'gpu'.*auto, cpu, cuda, mps"),
        ({"dtype": "fp16"}, "'fp16'.*auto, bfloat16 or float32"),
        ({"text_encoder": "/gone/t5"}, "/gone/t5"),
        ({"vae": "/gone/vae.safetensors"}, "/gone/vae.safetensors"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_hub")
def test_an_option_that_cannot_work_is_refused_before_anything_is_fetched(options: dict[str, str], says: str) -> None:
    with pytest.raises(KadrError, match=says):
        Engine.open("ltxv-2b-0.9.5", **options)


@pytest.mark.usefixtures("no_hub")
def test_a_file_that_is_no_model_is_refused_before_a_text_encoder_is_fetched_for_it(home: Path, tmp_path: Path) -> None:
    cut, empty = tmp_path / "cut.safetensors", tmp_path / "empty"
    cut.write_bytes((home / MODEL_FILE).read_bytes()[:-100])
    empty.mkdir()
    for path in (cut, empty):
        with pytest.raises(CheckpointError) as caught:
            Engine.open(path)
        assert str(path) in str(caught.value)


@pytest.mark.usefixtures("no_hub")
def test_parts_that_are_missing_or_do_not_fit_are_refused_before_a_text_encoder_is_fetched(
    home: Path, tmp_path: Path
) -> None:
    narrow = build_random(lambda: VAE(replace(vae_config("0.9.5"), latent_channels=12)), seed=1)
    alone = tmp_path / "vae.safetensors"
    write_single_file(alone, vae=narrow, schedule=LINEAR_QUADRATIC, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"12 latent channels.* 8"):
        Engine.open(home / MODEL_FILE, vae=alone)
    with pytest.raises(CheckpointError, match="has no transformer"):
        Engine.open(alone)


# --- damaged weights -----------------------------------------------------------------------------------------------


def spoil(where: Callable[[nn.Module], Tensor], value: float = math.nan) -> WeightEdit:
    return lambda module: where(module).view(-1)[0].fill_(value) and None


DAMAGED: dict[str, tuple[dict[str, WeightEdit], str, str]] = {
    "text encoder": ({"text encoder": spoil(lambda t5: t5.final_norm.weight)}, "text", "prompt 1 of 1"),
    "text encoder, infinite": (
        {"text encoder": spoil(lambda t5: t5.final_norm.weight, math.inf)},
        "text",
        "prompt 1 of 1",
    ),
    "transformer": ({"transformer": spoil(lambda t: t.layers[1].feed_forward.down.weight)}, "denoise", "step 1 of 3"),
    "encoder": ({"vae": spoil(lambda vae: vae.encoder.conv_in.bias)}, "encode", "image or clip 1 of 1"),
    "decoder": ({"vae": spoil(lambda vae: vae.decoder.conv_out.bias)}, "decode", "frame 1 of 9"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_weights_are_found_at_the_first_number_that_is_none(
    damage: str, photo: Condition, tmp_path: Path, out: Path
) -> None:
    change, stage, where = DAMAGED[damage]
    engine = Engine.open(write_model(tmp_path / "model", weight_edits=change) / MODEL_FILE, device="cpu")
    stages: list[str] = []
    request = replace(REQUEST, conditions=(photo,))
    with pytest.raises(NonFiniteError) as caught:
        engine.write(request, out / "a.mp4", watch=lambda progress: stages.append(progress.stage))
    assert caught.value.stage == stage == stages[-1]
    assert where in str(caught.value)
    assert "kadr models verify" in str(caught.value)
    assert list(out.iterdir()) == []


def test_a_damaged_encoder_is_no_matter_where_there_is_no_picture(tmp_path: Path) -> None:
    change = {"vae": spoil(lambda vae: vae.encoder.conv_in.bias)}
    engine = Engine.open(write_model(tmp_path / "model", weight_edits=change) / MODEL_FILE, device="cpu")
    assert engine.generate(REQUEST).frames.shape == (9, 32, 64, 3)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_first_step_that_is_not_finite_is_named_and_no_other_is_made(
    engine: Engine, step: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = Transformer.forward

    def failing(self: Transformer, *given: Any) -> Tensor:
        calls.append(len(calls) + 1)
        return forward(self, *given) / (0.0 if len(calls) == step else 1.0)

    monkeypatch.setattr(Transformer, "forward", failing)
    with pytest.raises(NonFiniteError, match=f"step {step} of 3") as caught:
        engine.write(REQUEST, out / "a.mp4")
    assert caught.value.stage == "denoise"
    assert len(calls) == step
    assert list(out.iterdir()) == []


def test_a_decoder_that_fails_on_the_way_leaves_no_part_of_a_file(
    engine: Engine, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = VAE.decode_chunks

    def failing(self: VAE, *given: Any, **more: Any) -> Any:
        for count, pixels in enumerate(stream(self, *given, **more)):
            yield pixels / 0.0 if count == 1 else pixels

    monkeypatch.setattr(VAE, "decode_chunks", failing)
    with pytest.raises(NonFiniteError, match=r"frame \d+ of 70") as caught:
        engine.write(replace(REQUEST, frames=70, steps=1), out / "a.mp4")
    assert caught.value.stage == "decode"
    assert list(out.iterdir()) == []
