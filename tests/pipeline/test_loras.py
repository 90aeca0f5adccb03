"""LoRAs of an engine: strengths of a request and of a pass, merged or not, their plan and metadata."""

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
from kadr.pipeline.loading import module_loader
from kadr.pipeline.metadata import video_metadata
from kadr.sampling.settings import Pass
from kadr.spec import locate
from tests import lora_files, tiny_models
from tests.checkpoints.test_load import cast_as_released
from tests.lora_files import ATTENTION, FEED_FORWARD, block_pairs, write_lora_file

REQUEST = Request(prompt="a red circle", size=(64, 64), frames=9, steps=2, guidance=1.0)
TWO_PASSES = replace(REQUEST, multi_scale=True, sigmas=(1.0, 0.9), steps=None, second_pass=None, downscale_factor=0.5)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora_file(
        tmp_path_factory.mktemp("lora") / "lora.safetensors", block_pairs((*ATTENTION, *FEED_FORWARD))
    )


@pytest.fixture(scope="module")
def other_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora_file(
        tmp_path_factory.mktemp("lora") / "other_lora.safetensors", block_pairs(seed=7), lora_files.kohya, alpha=2.0
    )


@pytest.fixture
def opened(home: Path) -> Callable[..., Engine]:
    def open_engine(**options: Any) -> Engine:
        defaults = {"prompt_cache": False, "device": "cpu", "dtype": "float32"}
        return Engine.open(home / tiny_models.MODEL_FILE, **{**defaults, **options})

    return open_engine


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_merged_loras_equal_unmerged_ones(opened: Callable[..., Engine], lora: Path, other_lora: Path) -> None:
    loras = [(lora, 0.8), (other_lora, -0.5)]
    unmerged, merged = (opened(loras=loras, merge_loras=merge).denoise(REQUEST) for merge in (False, True))
    assert relative_error(unmerged, opened().denoise(REQUEST)) > 0.05
    assert relative_error(unmerged, merged) < 1e-5


def test_request_sets_strengths_and_0_changes_no_bit(
    opened: Callable[..., Engine], lora: Path, other_lora: Path
) -> None:
    engine = opened(loras=[lora, Lora(str(other_lora), 0.0)])
    without_lora = opened().denoise(REQUEST)
    full = engine.denoise(REQUEST)
    half = engine.denoise(replace(REQUEST, lora_strengths=(0.5, 0)))
    assert torch.equal(engine.denoise(replace(REQUEST, lora_strengths=(0, 0))), without_lora)
    assert torch.equal(engine.denoise(REQUEST), full)
    assert 0 < relative_error(half, without_lora) < relative_error(full, without_lora)
    expected = opened(loras=[(lora, 0.5)]).denoise(REQUEST)
    assert relative_error(half, expected) < 1e-6


@pytest.fixture
def clearings(monkeypatch: pytest.MonkeyPatch) -> list[Transformer]:
    """Returns a list of the transformers whose CUDA graphs were cleared."""
    cleared: list[Transformer] = []
    monkeypatch.setattr(Transformer, "clear_cuda_graphs", lambda module: cleared.append(module))
    return cleared


def test_cuda_graphs_are_cleared_only_when_a_strength_changes(
    opened: Callable[..., Engine], lora: Path, clearings: list[Transformer]
) -> None:
    engine = opened(loras=[lora])
    for strength, count in ((1.0, 1), (1.0, 1), (0.5, 2), (0.5, 2), (0.0, 3)):
        engine.denoise(replace(REQUEST, lora_strengths=(strength,)))
        assert len(clearings) == count, strength
    assert all(module is clearings[0] for module in clearings)  # it was cached
    without_loras = opened()
    for _ in range(2):
        without_loras.denoise(REQUEST)
    assert len(clearings) == 3


def test_cuda_graphs_are_cleared_with_the_scratch_buffers_they_recorded(
    opened: Callable[..., Engine], clearings: list[Transformer]
) -> None:
    engine = opened(quant="Q8_0")
    for count in (1, 2):
        engine.denoise(REQUEST)
        assert len(clearings) == count


def test_a_cancelled_step_leaves_no_graph_of_other_strengths(
    opened: Callable[..., Engine], lora: Path, clearings: list[Transformer]
) -> None:
    engine = opened(loras=[lora])

    def cancel(progress: Progress) -> None:
        if progress.stage == "denoise":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(REQUEST, watch=cancel)
    clearings.clear()
    engine.denoise(replace(REQUEST, lora_strengths=(0.5,)))
    assert len(clearings) == 1


def test_each_of_two_passes_has_its_own_strength(opened: Callable[..., Engine], lora: Path, tmp_path: Path) -> None:
    upscaler = tiny_models.write_random_upscaler(tmp_path / "up.safetensors")
    request = replace(TWO_PASSES, second_pass=Pass(sigmas=(0.6,)))
    latents = {
        strengths: opened(loras=[(lora, *strengths)], upscaler=upscaler).denoise(request)
        for strengths in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0,))
    }
    assert torch.equal(latents[1.0, 1.0], latents[1.0,])
    assert relative_error(latents[1.0, 0.0], latents[1.0, 1.0]) > 1e-3
    assert relative_error(latents[0.0, 1.0], latents[1.0, 1.0]) > 1e-3
    by_request = opened(loras=[lora], upscaler=upscaler).denoise(replace(request, lora_strengths=((1.0, 0.0),)))
    assert torch.equal(by_request, latents[1.0, 0.0])


@pytest.mark.filterwarnings("ignore:this CPU has no instructions for int8")  # int8-weights stands in for it there
@pytest.mark.parametrize("scheme", ["int8", "Q8_0", "fp8-weights"])
def test_quantized_weights_take_loras_merged_or_not(scheme: str, opened: Callable[..., Engine], lora: Path) -> None:
    expected = opened(loras=[lora]).denoise(REQUEST)
    without_lora = opened().denoise(REQUEST)
    for merge in (False, True):
        quantized = opened(loras=[lora], quant=scheme, merge_loras=merge).denoise(REQUEST)
        assert relative_error(quantized, expected) < 0.5 * relative_error(without_lora, expected)


def test_fp8_file_takes_a_lora_only_unmerged(tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_loader, "may_be_rotated", lambda checkpoint: False)  # random weights
    tiny_models.write_model(tmp_path)
    expected = Engine.open(
        tmp_path / tiny_models.MODEL_FILE, device="cpu", dtype="float32", loras=[lora], prompt_cache=False
    ).denoise(REQUEST)
    cast_as_released(tmp_path / tiny_models.MODEL_FILE, torch.float8_e4m3fn)
    engine = Engine.open(
        tmp_path / tiny_models.MODEL_FILE, device="cpu", dtype="float32", loras=[lora], prompt_cache=False
    )
    assert relative_error(engine.denoise(REQUEST), expected) < 0.2
    with pytest.raises(CheckpointError, match="float8_e4m3fn; merging a LoRA would round its weights"):
        Engine.open(tmp_path / tiny_models.MODEL_FILE, device="cpu", loras=[lora], merge_loras=True)


def test_streamed_blocks_apply_their_loras(opened: Callable[..., Engine], lora: Path) -> None:
    expected = opened(loras=[lora]).denoise(REQUEST)
    assert torch.equal(opened(loras=[lora], offload="blocks").denoise(REQUEST), expected)


def test_plan_counts_bytes_and_seconds_of_loras(opened: Callable[..., Engine], lora: Path, other_lora: Path) -> None:
    def denoise_placement(**options: Any) -> Any:
        return next(stage for stage in opened(**options).plan(REQUEST).stages if stage.stage == "denoise").placement

    plain, unmerged = denoise_placement(), denoise_placement(loras=[lora, other_lora])
    merged = denoise_placement(loras=[lora, other_lora], merge_loras=True)
    lora_bytes = 4 * sum(down.numel() + up.numel() for down, up in block_pairs((*ATTENTION, *FEED_FORWARD)).values())
    lora_bytes += 4 * sum(down.numel() + up.numel() for down, up in block_pairs(seed=7).values())
    assert unmerged.private_bytes - plain.private_bytes == lora_bytes
    assert unmerged.workspace_bytes > plain.workspace_bytes
    assert unmerged.seconds > plain.seconds
    assert merged.private_bytes > plain.private_bytes
    assert merged.private_bytes + merged.mapped_bytes == plain.private_bytes + plain.mapped_bytes
    assert merged.workspace_bytes == plain.workspace_bytes


def test_merged_weights_are_not_streamed_on_a_cpu(opened: Callable[..., Engine], lora: Path) -> None:
    """Merged weights are in no file, so their pages cannot be dropped."""
    placement = opened(loras=[lora], merge_loras=True, offload="blocks").plan(REQUEST).stages[-2].placement
    assert not placement.streamed_blocks
    assert opened(loras=[lora], offload="blocks").plan(REQUEST).stages[-2].placement.streamed_blocks


def test_bad_strengths_are_refused_before_any_load(
    opened: Callable[..., Engine], lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(loras=[lora])

    def acquire(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(engine._model.module_cache, "acquire", acquire)
    with pytest.raises(RequestError, match="2 strengths of LoRAs are given, and this engine has 1"):
        engine.generate(replace(REQUEST, lora_strengths=(1, 1)))
    with pytest.raises(RequestError, match="this engine has 0"):
        opened().plan(replace(REQUEST, lora_strengths=(1,)))
    with pytest.raises(RequestError, match="which fixes their strengths"):
        opened(loras=[lora], merge_loras=True).plan(replace(REQUEST, lora_strengths=(0.5,)))
    for strength, expected in (
        ("1", "must be a number"),
        (float("nan"), "must be a number"),
        (100, "between -10 and 10"),
    ):
        with pytest.raises(RequestError, match=expected):
            replace(REQUEST, lora_strengths=(strength,))
        with pytest.raises(RequestError, match=expected):
            opened(loras=[(lora, strength)])
    with pytest.raises(RequestError, match="one for each of two passes"):
        replace(REQUEST, lora_strengths=((1, 2, 3),))
    for no_list in (str(lora), {str(lora): 0.5}, None, 5):
        with pytest.raises(RequestError, match="must be a list"):
            opened(loras=no_list)
    with pytest.raises(RequestError, match="must be a path"):
        opened(loras=[3])


def test_two_merged_strengths_of_one_transformer_are_refused(
    opened: Callable[..., Engine], lora: Path, tmp_path: Path
) -> None:
    upscaler = tiny_models.write_random_upscaler(tmp_path / "up.safetensors")
    engine = opened(loras=[(lora, 1, 0)], merge_loras=True, upscaler=upscaler)
    with pytest.raises(RequestError, match="strength 1 in the first pass and 0 in the second"):
        engine.plan(replace(TWO_PASSES, second_pass=Pass(sigmas=(0.6,))))
    single = engine.denoise(REQUEST)  # there is no second pass
    assert relative_error(single, opened(loras=[lora]).denoise(REQUEST)) < 1e-5


def test_lora_of_another_model_is_refused_at_open(opened: Callable[..., Engine], tmp_path: Path) -> None:
    wide = write_lora_file(tmp_path / "wide.safetensors", block_pairs(width=2048))
    with pytest.raises(CheckpointError, match=r"does not fit .*It fits a 2B model"):
        opened(loras=[wide])
    partial = write_lora_file(
        tmp_path / "partial.safetensors",
        block_pairs(),
        extra_tensors={"diffusion_model.head.lora_A.weight": torch.ones(4, 64)},
    )
    with pytest.raises(CheckpointError, match="belong to no layer"):
        opened(loras=[partial])
    with pytest.warns(KadrWarning, match="left out: diffusion_model.head"):
        engine = opened(loras=[partial], lora_partial=True)
    assert relative_error(engine.denoise(REQUEST), opened().denoise(REQUEST)) > 0.01


def test_lora_may_be_given_by_its_registry_name(
    opened: Callable[..., Engine], lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[tuple[str, str]] = []
    monkeypatch.setattr(locate.hub, "cached_file", lambda repo, file: looked_up.append((repo, file)) or lora)
    engine = opened(loras=[("ltxv-13b-0.9.7-ic-lora-canny", 0.5)])
    assert looked_up[:1] == [
        ("Lightricks/LTX-Video-ICLoRA-canny-13b-0.9.7", "ltxv-097-ic-lora-canny-control-comfyui.safetensors")
    ]
    assert video_metadata(engine.spec, engine.resolve(REQUEST))["loras"] == [lora_metadata(lora, 0.5)]
    with pytest.raises(RequestError, match=r"is a LoRA, not a model\. Give it as loras"):
        Engine.open("ltxv-13b-0.9.7-ic-lora-canny")
    with pytest.raises(RequestError, match=r"is a spatial upscaler; for the LoRA give a path, or a name such as ltxv"):
        opened(loras=["ltxv-spatial-upscaler-0.9.8"])
    with pytest.raises(CheckpointError, match=r"the LoRA nowhere.* does not exist"):
        opened(loras=["nowhere"])


def test_hundreds_of_loras_are_refused() -> None:
    with pytest.raises(RequestError, match="101 LoRAs are given; an engine takes at most 100"):
        Engine.open("demo", loras=["demo-lora-teal"] * 101)


def test_missing_lora_is_refused_before_a_model_is_fetched() -> None:
    with pytest.raises(CheckpointError, match=r"the LoRA gone\.safetensors does not exist"):
        Engine.open("ltxv-13b-0.9.8-distilled", loras=["gone.safetensors"])  # no test reaches the network


def test_request_with_strengths_survives_json(lora: Path) -> None:
    request = replace(REQUEST, lora_strengths=(1, (0.5, 0.25)))
    assert Request.from_json(request.to_json()) == request


def lora_metadata(path: Path, strength: float, second_strength: float | None = None) -> dict[str, Any]:
    """Returns the metadata of a LoRA in a video's file."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"path": str(path), "strength": strength, "second_strength": second_strength, "sha256": sha256}


def test_metadata_names_loras_and_their_hashes(opened: Callable[..., Engine], lora: Path, other_lora: Path) -> None:
    engine = opened(loras=[(lora, 0.5), (other_lora, 1.0, 0.25)], merge_loras=False)
    metadata = video_metadata(engine.spec, engine.resolve(REQUEST))
    assert metadata["loras"] == [
        lora_metadata(lora, 0.5),
        lora_metadata(other_lora, 1.0, 0.25),
    ]
    assert "loras" not in video_metadata(opened().spec, opened().resolve(REQUEST))
