"""LoRAs of an engine: strengths of a request and of a pass, merged or beside, planned, remembered."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kadr import Engine, Lora, Progress, Request
from kadr.errors import CheckpointError, KadrWarning, RequestError
from kadr.models.transformer import Transformer
from kadr.pipeline import components
from kadr.sampling.settings import Pass
from kadr.spec import locate
from tests import lora_files, tiny_models
from tests.checkpoints.test_load import cast_as_released
from tests.lora_files import ATTENTION, FEED_FORWARD, block_pairs, write_lora_file

REQUEST = Request(prompt="a red circle", size=(64, 64), frames=9, steps=2, guidance=1.0)
TWO_PASSES = replace(REQUEST, multi_scale=True, sigmas=(1.0, 0.9), steps=None, second_pass=None, downscale_factor=0.5)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora_file(
        tmp_path_factory.mktemp("lora") / "one.safetensors", block_pairs((*ATTENTION, *FEED_FORWARD))
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora_file(
        tmp_path_factory.mktemp("lora") / "other.safetensors", block_pairs(seed=7), lora_files.kohya, alpha=2.0
    )


@pytest.fixture
def opened(home: Path) -> Callable[..., Engine]:
    def engine(**how: Any) -> Engine:
        return Engine.open(
            home / tiny_models.MODEL_FILE, **{"prompt_cache": False, "device": "cpu", "dtype": "float32", **how}
        )

    return engine


def relative(made: torch.Tensor, right: torch.Tensor) -> float:
    return float((made - right).norm() / right.norm())


def test_merged_and_beside_the_weights_give_one_video(opened: Callable[..., Engine], one: Path, other: Path) -> None:
    loras = [(one, 0.8), (other, -0.5)]
    beside, merged = (opened(loras=loras, merge_loras=how).denoise(REQUEST) for how in (False, True))
    assert relative(beside, opened().denoise(REQUEST)) > 0.05
    assert relative(beside, merged) < 1e-5


def test_a_request_says_how_strongly_and_0_is_without_to_the_bit(
    opened: Callable[..., Engine], one: Path, other: Path
) -> None:
    engine = opened(loras=[one, Lora(str(other), 0.0)])
    plain = opened().denoise(REQUEST)
    own = engine.denoise(REQUEST)
    half = engine.denoise(replace(REQUEST, lora_strengths=(0.5, 0)))
    assert torch.equal(engine.denoise(replace(REQUEST, lora_strengths=(0, 0))), plain)
    assert torch.equal(engine.denoise(REQUEST), own)
    assert 0 < relative(half, plain) < relative(own, plain)
    right = opened(loras=[(one, 0.5)]).denoise(REQUEST)
    assert relative(half, right) < 1e-6


def test_what_is_recorded_with_some_strengths_is_forgotten_also_where_a_step_is_cancelled(
    opened: Callable[..., Engine], one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[Transformer] = []
    monkeypatch.setattr(Transformer, "clear_cuda_graphs", lambda module: forgotten.append(module))
    engine = opened(loras=[one])

    def cancel(progress: Progress) -> None:
        if progress.stage == "denoise":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(REQUEST, watch=cancel)
    assert len(forgotten) == 1


def test_each_of_two_passes_has_a_strength_of_its_own(opened: Callable[..., Engine], one: Path, tmp_path: Path) -> None:
    upscaler = tiny_models.write_random_upscaler(tmp_path / "up.safetensors")
    request = replace(TWO_PASSES, second_pass=Pass(sigmas=(0.6,)))
    made = {
        strengths: opened(loras=[(one, *strengths)], upscaler=upscaler).denoise(request)
        for strengths in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0,))
    }
    assert torch.equal(made[1.0, 1.0], made[1.0,])
    assert relative(made[1.0, 0.0], made[1.0, 1.0]) > 1e-3
    assert relative(made[0.0, 1.0], made[1.0, 1.0]) > 1e-3
    asked = opened(loras=[one], upscaler=upscaler).denoise(replace(request, lora_strengths=((1.0, 0.0),)))
    assert torch.equal(asked, made[1.0, 0.0])


@pytest.mark.parametrize("scheme", ["int8", "Q8_0", "fp8-weights"])
def test_quantized_weights_take_a_lora_and_one_merged_before(
    scheme: str, opened: Callable[..., Engine], one: Path
) -> None:
    right = opened(loras=[one]).denoise(REQUEST)
    plain = opened().denoise(REQUEST)
    for merged in (False, True):
        made = opened(loras=[one], quant=scheme, merge_loras=merged).denoise(REQUEST)
        assert relative(made, right) < 0.5 * relative(plain, right)


def test_a_file_in_8_bit_floats_takes_a_lora_beside_and_none_merged(
    tmp_path: Path, one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "may_be_rotated", lambda checkpoint: False)  # nobody trained it
    tiny_models.write_model(tmp_path)
    right = Engine.open(
        tmp_path / tiny_models.MODEL_FILE, device="cpu", dtype="float32", loras=[one], prompt_cache=False
    ).denoise(REQUEST)
    cast_as_released(tmp_path / tiny_models.MODEL_FILE, torch.float8_e4m3fn)
    engine = Engine.open(
        tmp_path / tiny_models.MODEL_FILE, device="cpu", dtype="float32", loras=[one], prompt_cache=False
    )
    assert relative(engine.denoise(REQUEST), right) < 0.2
    with pytest.raises(CheckpointError, match="float8_e4m3fn, and to merge a LoRA its weights would be rounded"):
        Engine.open(tmp_path / tiny_models.MODEL_FILE, device="cpu", loras=[one], merge_loras=True)


def test_blocks_that_come_and_go_bring_their_loras(opened: Callable[..., Engine], one: Path) -> None:
    right = opened(loras=[one]).denoise(REQUEST)
    assert torch.equal(opened(loras=[one], offload="blocks").denoise(REQUEST), right)


def test_the_plan_counts_what_loras_take(opened: Callable[..., Engine], one: Path, other: Path) -> None:
    def denoise(**how: Any) -> Any:
        return next(stage for stage in opened(**how).plan(REQUEST).stages if stage.stage == "denoise").placement

    plain, beside, merged = denoise(), denoise(loras=[one, other]), denoise(loras=[one, other], merge_loras=True)
    taken = 4 * sum(down.numel() + up.numel() for down, up in block_pairs((*ATTENTION, *FEED_FORWARD)).values())
    taken += 4 * sum(down.numel() + up.numel() for down, up in block_pairs(seed=7).values())
    assert beside.own - plain.own == taken
    assert beside.working > plain.working
    assert beside.seconds > plain.seconds
    assert merged.own > plain.own
    assert merged.own + merged.mapped == plain.own + plain.mapped
    assert merged.working == plain.working


def test_merged_weights_are_not_streamed_on_a_cpu(opened: Callable[..., Engine], one: Path) -> None:
    """They lie in no file any more, so their pages cannot be let go of."""
    choice = opened(loras=[one], merge_loras=True, offload="blocks").plan(REQUEST).stages[-2].placement
    assert not choice.streamed_blocks
    assert opened(loras=[one], offload="blocks").plan(REQUEST).stages[-2].placement.streamed_blocks


def test_strengths_that_cannot_be_are_refused_before_anything_is_loaded(
    opened: Callable[..., Engine], one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(loras=[one])

    def take(*given: object, **more: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(engine.components.module_cache, "acquire", take)
    with pytest.raises(RequestError, match="2 strengths of LoRAs are given, and this engine has 1"):
        engine.generate(replace(REQUEST, lora_strengths=(1, 1)))
    with pytest.raises(RequestError, match="this engine has 0"):
        opened().plan(replace(REQUEST, lora_strengths=(1,)))
    with pytest.raises(RequestError, match="their strengths are fixed"):
        opened(loras=[one], merge_loras=True).plan(replace(REQUEST, lora_strengths=(0.5,)))
    for strength, says in (("1", "must be a number"), (float("nan"), "must be a number"), (100, "between -10 and 10")):
        with pytest.raises(RequestError, match=says):
            replace(REQUEST, lora_strengths=(strength,))
        with pytest.raises(RequestError, match=says):
            opened(loras=[(one, strength)])
    with pytest.raises(RequestError, match="one for each of two passes"):
        replace(REQUEST, lora_strengths=((1, 2, 3),))
    for no_list in (str(one), {str(one): 0.5}, None, 5):
        with pytest.raises(RequestError, match="must be a list"):
            opened(loras=no_list)
    with pytest.raises(RequestError, match="must be a path"):
        opened(loras=[3])


def test_one_transformer_cannot_have_two_strengths_merged(
    opened: Callable[..., Engine], one: Path, tmp_path: Path
) -> None:
    upscaler = tiny_models.write_random_upscaler(tmp_path / "up.safetensors")
    engine = opened(loras=[(one, 1, 0)], merge_loras=True, upscaler=upscaler)
    with pytest.raises(RequestError, match="strength 1 in the first pass and 0 in the second"):
        engine.plan(replace(TWO_PASSES, second_pass=Pass(sigmas=(0.6,))))
    single = engine.denoise(REQUEST)  # there is no second pass
    assert relative(single, opened(loras=[one]).denoise(REQUEST)) < 1e-5


def test_a_lora_of_another_model_is_refused_when_the_engine_opens(
    opened: Callable[..., Engine], tmp_path: Path
) -> None:
    wide = write_lora_file(tmp_path / "wide.safetensors", block_pairs(width=2048))
    with pytest.raises(CheckpointError, match=r"does not fit .*It looks like one for 2B"):
        opened(loras=[wide])
    strange = write_lora_file(
        tmp_path / "strange.safetensors",
        block_pairs(),
        extra_tensors={"diffusion_model.head.lora_A.weight": torch.ones(4, 64)},
    )
    with pytest.raises(CheckpointError, match="belong to no layer"):
        opened(loras=[strange])
    with pytest.warns(KadrWarning, match="left out: diffusion_model.head"):
        engine = opened(loras=[strange], lora_partial=True)
    assert relative(engine.denoise(REQUEST), opened().denoise(REQUEST)) > 0.01


def test_a_lora_may_be_named_as_the_registry_has_it(
    opened: Callable[..., Engine], one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, str]] = []
    monkeypatch.setattr(locate.hub, "fetch", lambda repo, file: fetched.append((repo, file)) or one)
    engine = opened(loras=[("ltxv-13b-0.9.7-ic-lora-canny", 0.5)])
    assert fetched == [
        ("Lightricks/LTX-Video-ICLoRA-canny-13b-0.9.7", "ltxv-097-ic-lora-canny-control-comfyui.safetensors")
    ]
    assert engine.metadata(REQUEST)["loras"] == [noted(one, 0.5)]
    with pytest.raises(RequestError, match=r"is a LoRA, and no model\. Give it as --lora"):
        Engine.open("ltxv-13b-0.9.7-ic-lora-canny")
    with pytest.raises(RequestError, match=r"is a spatial upscaler; for the LoRA give a path, or a name such as ltxv"):
        opened(loras=["ltxv-spatial-upscaler-0.9.8"])
    with pytest.raises(CheckpointError, match="the LoRA is not at nowhere"):
        opened(loras=["nowhere"])


def test_a_lora_that_is_not_there_is_told_before_a_model_is_fetched() -> None:
    with pytest.raises(CheckpointError, match=r"the LoRA is not at gone\.safetensors"):
        Engine.open("ltxv-13b-0.9.8-distilled", loras=["gone.safetensors"])  # no test reaches the network


def test_a_request_with_strengths_comes_back_from_json(one: Path) -> None:
    request = replace(REQUEST, lora_strengths=(1, (0.5, 0.25)))
    assert Request.from_json(request.to_json()) == request


def noted(path: Path, strength: float, second: float | None = None) -> dict[str, Any]:
    """What a video remembers of a LoRA."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"path": str(path), "strength": strength, "second": second, "sha256": sha256}


def test_what_was_added_is_remembered(opened: Callable[..., Engine], one: Path, other: Path) -> None:
    engine = opened(loras=[(one, 0.5), (other, 1.0, 0.25)], merge_loras=False)
    record = engine.metadata(engine.resolve(REQUEST))
    assert record["loras"] == [
        noted(one, 0.5),
        noted(other, 1.0, 0.25),
    ]
    assert "loras" not in opened().metadata(REQUEST)
