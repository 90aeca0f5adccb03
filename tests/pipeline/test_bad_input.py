"""Bad input is refused before any weight is loaded, with value, limit and remedy, and leaves no file."""

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


# --- images and files ----------------------------------------------------------------------------------------------


def write_broken_images(image_condition: Condition, folder: Path) -> dict[str, tuple[Path, str]]:
    """Returns name -> file, and text of the message beside its name."""
    whole = Path(image_condition.media).read_bytes()
    contents = {"cut.png": whole[: len(whole) // 2], "text.jpg": b"not an image", "empty.png": b""}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    expected_texts = {
        "cut.png": "cannot be read",
        "text.jpg": "not a readable image",
        "empty.png": "not a readable image",
        "dot.png": "2x2",
    }
    return {name: (folder / name, text) for name, text in expected_texts.items()} | {
        "gone.png": (folder / "gone.png", "no such file")
    }


@pytest.mark.parametrize("name", ["cut.png", "text.jpg", "empty.png", "dot.png", "gone.png"])
def test_unreadable_image_is_refused_before_any_load(
    engine_without_weights: Engine, image_condition: Condition, output_folder: Path, tmp_path: Path, name: str
) -> None:
    path, expected = write_broken_images(image_condition, tmp_path)[name]
    request = replace(REQUEST, conditions=(Condition(media=str(path)),))
    for make in (
        lambda: engine_without_weights.generate(request),
        lambda: engine_without_weights.write(request, output_folder / "a.mp4"),
    ):
        with pytest.raises(MediaError) as caught:
            make()
        assert str(path) in str(caught.value)
        assert expected in str(caught.value)
    assert list(output_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "expected"),
    [("gone/a.mp4", "mkdir -p"), ("a.avi", "these can be written"), (".", "is a folder"), ("file/a.mp4", "is a file")],
)
def test_unwritable_output_is_refused_before_any_load(
    engine_without_weights: Engine, output_folder: Path, target: str, expected: str
) -> None:
    (output_folder / "file").write_bytes(b"")
    with pytest.raises(MediaError) as caught:
        engine_without_weights.write(REQUEST, output_folder / target)
    assert expected in str(caught.value)
    assert [path.name for path in output_folder.iterdir()] == ["file"]


def test_odd_size_is_refused_for_mp4_with_the_nearest_even_ones(
    engine_without_weights: Engine, output_folder: Path
) -> None:
    with pytest.raises(MediaError, match=r"63x32.*62x32 or 64x32"):
        engine_without_weights.write(replace(REQUEST, size=Size(63, 32)), output_folder / "a.mp4")
    assert list(output_folder.iterdir()) == []


# --- requests that do not fit the model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"skip_final": 3}, "skip_initial is 0 and skip_final is 3; .* one of the 3 steps"),
        ({"skip_initial": 1}, "skip_initial is 1"),
        ({"steps": None, "sigmas": (0.5, 0.5)}, r"\[0.5, 0.5\]"),
        ({"steps": None, "sigmas": (1.0, math.nan)}, "nan"),
        ({"steps": None, "sigmas": ()}, r"\[\]"),
        ({"steps": None, "sigmas": (1.5,)}, "1.5"),
        ({"prompt": "half a \ud83d character"}, "half a character"),
    ],
    ids=str,
)
def test_request_that_does_not_fit_is_refused_before_any_load(
    engine_without_weights: Engine, fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(RequestError, match=expected):
        engine_without_weights.generate(replace(REQUEST, **fields))


@pytest.mark.parametrize(
    "shape", [(1, CHANNELS, 2, 2, 1), (1, CHANNELS, 3, 1, 2), (CHANNELS, 2, 1, 2), (1, 128, 2, 1, 2)]
)
def test_tensors_of_another_shape_are_refused_before_any_load(
    engine_without_weights: Engine, shape: tuple[int, ...]
) -> None:
    right, wrong = torch.zeros(SHAPE), torch.zeros(shape)
    with_init_latents = replace(REQUEST, skip_initial=1)
    for make in (
        lambda: engine_without_weights.denoise(REQUEST, noise=wrong),
        lambda: engine_without_weights.denoise(with_init_latents, init_latents=wrong),
        lambda: engine_without_weights.decode(wrong, REQUEST),
        lambda: engine_without_weights.decode(right, REQUEST, noise=wrong),
        lambda: engine_without_weights.decode(right, REQUEST, noise=torch.zeros(1)),
    ):
        with pytest.raises(RequestError) as caught:
            make()
        assert str(SHAPE) in str(caught.value)
        assert str(shape) in str(caught.value) or "(1,)" in str(caught.value)


def test_init_latents_need_a_first_sigma_below_1(engine_without_weights: Engine) -> None:
    with pytest.raises(RequestError, match="first sigma is 1"):
        engine_without_weights.denoise(REQUEST, init_latents=torch.zeros(SHAPE))


def test_encoding_without_a_condition_is_refused(engine_without_weights: Engine) -> None:
    with pytest.raises(RequestError, match="no image or clip to encode"):
        engine_without_weights.encode_first_condition(REQUEST)


# --- missing models ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Path:
        raise AssertionError(f"something was fetched: {args}")

    monkeypatch.setattr(hub, "fetch", refuse)
    monkeypatch.setattr(hub, "fetch_folder", refuse)


@pytest.mark.parametrize("name", ["gone.safetensors", "/gone/model.safetensors", "folder/", "~/gone.safetensors"])
@pytest.mark.usefixtures("no_hub")
def test_missing_model_path_is_named(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Engine.open(name)
    assert str(Path(name).expanduser()) in str(caught.value)
    assert "kadr models" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ltxv-2b-0.9.7", "ltxv-2b-0.9.5"),
        ("ltxv-13b-0.9.8-destilled", "ltxv-13b-0.9.8-distilled"),
        ("demoo", "demo"),
        ("LTXV-2B-0.9.5", "ltxv-2b-0.9.5"),
        ("xyzzy", "demo"),
    ],
)
@pytest.mark.usefixtures("no_hub")
def test_unknown_model_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(RequestError) as caught:
        Engine.open(name)
    assert repr(name) in str(caught.value)
    assert nearest in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"device": "gpu"}, "'gpu'.*auto, cpu, cuda, mps"),
        ({"dtype": "fp16"}, "'fp16'.*auto, bfloat16 or float32"),
        ({"text_encoder": "/gone/t5"}, "/gone/t5"),
        ({"vae": "/gone/vae.safetensors"}, "/gone/vae.safetensors"),
        ({"model": None}, "model is None; it must be a path"),
        ({"text_encoder": 5}, "text_encoder is 5; it must be a path"),
        ({"vae": ""}, "vae is ''; it must be a path"),
        ({"second_model": 5}, "second_model is 5; it must be a path"),
        ({"upscaler": None}, "upscaler is None; it must be a name, a path"),
        ({"loras": [("", 1)]}, "the path of a LoRA is ''"),
        ({"recipe": {"steps": 5}}, "recipe is .* it must be a Recipe"),
        ({"device": None}, "device is None; it must be one of"),
        ({"quant": 5}, "quant is 5; it must be one of"),
        ({"prompt_cache": None}, "prompt_cache is None; it must be a path"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_hub")
def test_bad_engine_option_is_refused_before_any_fetch(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(KadrError, match=expected):
        Engine.open(**{"model": "ltxv-2b-0.9.5", **options})


@pytest.mark.usefixtures("no_hub")
def test_file_that_is_not_a_model_is_refused_before_any_fetch(home: Path, tmp_path: Path) -> None:
    cut, empty = tmp_path / "cut.safetensors", tmp_path / "empty"
    cut.write_bytes((home / MODEL_FILE).read_bytes()[:-100])
    empty.mkdir()
    for path in (cut, empty):
        with pytest.raises(CheckpointError) as caught:
            Engine.open(path)
        assert str(path) in str(caught.value)


@pytest.mark.usefixtures("no_hub")
def test_missing_or_unfit_components_are_refused_before_any_fetch(home: Path, tmp_path: Path) -> None:
    narrow = build_random(lambda: VAE(replace(vae_config("0.9.5"), latent_channels=12)), seed=1)
    vae_path = tmp_path / "vae.safetensors"
    write_single_file(vae_path, vae=narrow, schedule=LINEAR_QUADRATIC, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"12 latent channels.* 8"):
        Engine.open(home / MODEL_FILE, vae=vae_path)
    with pytest.raises(CheckpointError, match="has no transformer"):
        Engine.open(vae_path)


# --- values of another type ----------------------------------------------------------------------------------------

ENGINE_METHODS: dict[str, Callable[[Engine, Any], object]] = {
    "resolve": Engine.resolve,
    "plan": Engine.plan,
    "dry_run": Engine.dry_run,
    "prepare": Engine.prepare,
    "generate": Engine.generate,
    "write": lambda engine, request: engine.write(request, "a.mp4"),
    "denoise": Engine.denoise,
    "decode": lambda engine, request: engine.decode(torch.zeros(SHAPE), request),
}


@pytest.mark.parametrize("method", ENGINE_METHODS.values(), ids=ENGINE_METHODS)
@pytest.mark.parametrize("value", [None, "a red circle", {"prompt": "a red circle"}, Request], ids=str)
def test_what_is_not_a_request_is_refused(
    engine_without_weights: Engine, method: Callable[[Engine, Any], object], value: Any
) -> None:
    with pytest.raises(RequestError, match="it must be a Request"):
        method(engine_without_weights, value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"watch": None}, "watch is None; it must be a function"),
        ({"cancel": True}, "cancel is True; it must be a CancelToken"),
        ({"stages": ("denose",)}, "'denose'.*it must be a list of stages: text, control"),
        ({"stages": "denoise"}, "stages is 'denoise'; it must be a list"),
    ],
    ids=str,
)
def test_argument_of_another_type_is_refused_before_any_load(
    engine_without_weights: Engine, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(RequestError, match=expected), engine_without_weights.start(REQUEST, **arguments):
        pass


@pytest.mark.parametrize("path", [None, 5, ""])
def test_output_that_is_not_a_path_is_refused_before_any_load(engine_without_weights: Engine, path: Any) -> None:
    with pytest.raises(RequestError, match=r"the path of the video is .* it must be a path"):
        engine_without_weights.write(REQUEST, path)


@pytest.mark.parametrize("prompts", [None, "a", [], ["a", 5]], ids=str)
def test_prompts_that_are_not_texts_are_refused_before_any_load(engine_without_weights: Engine, prompts: Any) -> None:
    with pytest.raises(RequestError, match="they must be a list of texts"):
        engine_without_weights.encode_prompts(REQUEST, prompts)


def test_latents_that_are_not_a_tensor_are_refused_before_any_load(engine_without_weights: Engine) -> None:
    array: Any = torch.zeros(SHAPE).numpy()
    for call in (
        lambda: engine_without_weights.decode(array, REQUEST),
        lambda: engine_without_weights.decode(None, REQUEST),  # type: ignore[arg-type]
        lambda: engine_without_weights.denoise(REQUEST, noise=array),
        lambda: engine_without_weights.denoise(REQUEST, init_latents=array),
    ):
        with pytest.raises(RequestError, match=r"it must be a torch.Tensor \(1, 8, 2, 1, 2\)"):
            call()


# --- damaged weights -----------------------------------------------------------------------------------------------


def damage_weight(get_weight: Callable[[nn.Module], Tensor], value: float = math.nan) -> WeightEdit:
    """Returns an edit that sets the first number of a weight."""
    return lambda module: get_weight(module).view(-1)[0].fill_(value) and None


DAMAGED: dict[str, tuple[dict[str, WeightEdit], str, str]] = {
    "text encoder": ({"text encoder": damage_weight(lambda t5: t5.final_norm.weight)}, "text", "prompt 1 of 1"),
    "text encoder, infinite": (
        {"text encoder": damage_weight(lambda t5: t5.final_norm.weight, math.inf)},
        "text",
        "prompt 1 of 1",
    ),
    "transformer": (
        {"transformer": damage_weight(lambda t: t.blocks[1].feed_forward.down.weight)},
        "denoise",
        "step 1 of 3",
    ),
    "encoder": ({"vae": damage_weight(lambda vae: vae.encoder.conv_in.bias)}, "encode", "image or clip 1 of 1"),
    "decoder": ({"vae": damage_weight(lambda vae: vae.decoder.conv_out.bias)}, "decode", "frame 1 of 9"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_weights_are_found_at_their_stage(
    damage: str, image_condition: Condition, tmp_path: Path, output_folder: Path
) -> None:
    weight_edits, stage, expected = DAMAGED[damage]
    engine = Engine.open(write_model(tmp_path / "model", weight_edits=weight_edits) / MODEL_FILE, device="cpu")
    stages: list[str] = []
    request = replace(REQUEST, conditions=(image_condition,))
    with pytest.raises(NonFiniteError) as caught:
        engine.write(request, output_folder / "a.mp4", watch=lambda progress: stages.append(progress.stage))
    assert caught.value.stage == stage == stages[-1]
    assert expected in str(caught.value)
    assert "kadr models verify" in str(caught.value)
    assert list(output_folder.iterdir()) == []


def test_damaged_encoder_is_unused_without_conditions(tmp_path: Path) -> None:
    weight_edits = {"vae": damage_weight(lambda vae: vae.encoder.conv_in.bias)}
    engine = Engine.open(write_model(tmp_path / "model", weight_edits=weight_edits) / MODEL_FILE, device="cpu")
    assert engine.generate(REQUEST).frames.shape == (9, 32, 64, 3)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_first_step_that_is_not_finite_ends_the_generation(
    engine: Engine, step: int, output_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = Transformer.forward

    def failing(self: Transformer, *args: Any) -> Tensor:
        calls.append(len(calls) + 1)
        return forward(self, *args) / (0.0 if len(calls) == step else 1.0)

    monkeypatch.setattr(Transformer, "forward", failing)
    with pytest.raises(NonFiniteError, match=f"step {step} of 3") as caught:
        engine.write(REQUEST, output_folder / "a.mp4")
    assert caught.value.stage == "denoise"
    assert len(calls) == step
    assert list(output_folder.iterdir()) == []


def test_decoder_that_fails_midway_leaves_no_partial_file(
    engine: Engine, output_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_chunks = VAE.decode_chunks

    def failing(self: VAE, *args: Any, **kwargs: Any) -> Any:
        for index, pixels in enumerate(decode_chunks(self, *args, **kwargs)):
            yield pixels / 0.0 if index == 1 else pixels

    monkeypatch.setattr(VAE, "decode_chunks", failing)
    with pytest.raises(NonFiniteError, match=r"frame \d+ of 70") as caught:
        engine.write(replace(REQUEST, frames=70, steps=1), output_folder / "a.mp4")
    assert caught.value.stage == "decode"
    assert list(output_folder.iterdir()) == []
