"""The self-test fails on each injected fault, and the first stage that fails is the one that has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kadr import Engine
from kadr.checkpoints.source import Source
from kadr.kernels import fused, int8
from kadr.models.registry import find_release
from kadr.selftest.result import StageResult
from kadr.selftest.run import run_selftest
from kadr.selftest.stages import text_encoder, weights
from tests.selftest import faulty_models as faults
from tests.selftest.faulty_models import DEMO, TEAL_LORA
from tests.tiny_models import MODEL_FILE, write_model

DEMO_PARTS = {"text_encoder": DEMO.parent, "release": "demo"}


def first_failure(model: str | Path = "demo", **options: Any) -> StageResult:
    """Returns the first stage that fails."""
    engine = Engine.open(model, device="cpu", dtype="float32", prompt_cache=False, **options)
    report = run_selftest(engine)
    assert not report.passed
    return next(stage for stage in report.stages if stage.verdict == "fail")


def failed_checks(stage: StageResult) -> list[str]:
    return [check.name for check in stage.checks if not check.passed]


def test_swap_of_a_released_model_shows_in_its_error(tmp_path: Path) -> None:
    path = faults.rewrite(tmp_path / "swapped.safetensors", faults.swap("6.ff.net.2", "4.ff.net.2"))
    stage = first_failure(path, **DEMO_PARTS)
    assert stage.name == "transformer"
    assert failed_checks(stage) == ["error over that recorded of demo"]


def test_swap_of_unlike_tensors_shows_without_a_release(tmp_path: Path) -> None:
    path = faults.rewrite(tmp_path / "swapped.safetensors", faults.swap("3.attn1.to_k", "6.attn1.to_out.0"))
    recipe = find_release("demo").recipe
    stage = first_failure(path, text_encoder=DEMO.parent, recipe=recipe)
    assert (stage.name, failed_checks(stage)) == ("transformer", ["error at sigma 0.25"])


def test_one_nan_is_found_and_named(tmp_path: Path) -> None:
    path = faults.rewrite(tmp_path / "nan.safetensors", faults.put_nan)
    stage = first_failure(path, **DEMO_PARTS)
    assert stage.name == "weights"
    (check,) = [check for check in stage.checks if not check.passed]
    assert check.figure == 1
    assert "transformer_blocks.3.ff.net.2.weight of the transformer" in check.detail


def test_wrong_latent_statistics_fail_the_vae(tmp_path: Path) -> None:
    path = faults.rewrite(tmp_path / "statistics.safetensors", faults.scale_latent_statistics)
    stage = first_failure(path, **DEMO_PARTS)
    assert stage.name == "VAE"
    assert failed_checks(stage) == ["median std of the latents' channels"]


def test_rotated_fp8_weights_fail_the_transformer(tmp_path: Path) -> None:
    path = faults.rewrite(tmp_path / "rotated.safetensors", faults.rotate_fp8_weights)
    stage = first_failure(path, **DEMO_PARTS)
    assert stage.name == "transformer"
    assert "correlation of velocity and noise" in failed_checks(stage)


def test_lora_with_empty_layers_fails(tmp_path: Path) -> None:
    path = faults.rewrite(tmp_path / "half.safetensors", faults.empty_half_of_lora, source=TEAL_LORA)
    stage = first_failure(loras=[path])
    # A matrix of zeros is also one among all weights, which are read first.
    assert stage.name == "weights"
    assert all("LoRA half.safetensors" in check.detail for check in stage.checks if not check.passed)


def test_lora_without_half_of_its_blocks_fails(tmp_path: Path) -> None:
    path = faults.rewrite(tmp_path / "half.safetensors", faults.drop_half_of_lora, source=TEAL_LORA)
    stage = first_failure(loras=[path])
    assert stage.name == "LoRAs"
    assert failed_checks(stage) == ["targets of half.safetensors that some blocks lack"]


def test_lora_layers_that_are_not_attached_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from kadr.pipeline.loading import module_placement

    def attach_half(module: torch.nn.Module, loras: Any, dtype: torch.dtype) -> None:
        halves = [dict(list(lora.items())[::2]) for lora in loras]
        attach(module, halves, dtype)

    attach = module_placement.attach_loras
    monkeypatch.setattr(module_placement, "attach_loras", attach_half)
    stage = first_failure(loras=[TEAL_LORA])
    assert stage.name == "LoRAs"
    assert failed_checks(stage) == ["layers with a LoRA attached"]


def test_shifted_token_ids_fail_the_tokenizer(tmp_path: Path) -> None:
    folder = faults.shift_token_ids(faults.copy_text_encoder(tmp_path))
    assert first_failure(text_encoder=folder).name == "tokenizer"


@pytest.mark.parametrize("change", [faults.empty_text_layer, faults.drop_text_layer])
def test_text_encoder_without_a_layer_fails(change: Callable[..., None], tmp_path: Path) -> None:
    assert first_failure(text_encoder=faults.copy_text_encoder(tmp_path, change)).name == "weights"


def test_text_encoder_that_ignores_context_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "XXL_WIDTH", 128)  # the demo's, whose words hardly change each other
    stage = first_failure()
    assert (stage.name, failed_checks(stage)) == ("text encoder", ["effect of other words on the first"])


def test_truncated_text_encoder_whose_config_agrees_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "XXL_WIDTH", 128)
    stage = first_failure()
    assert (stage.name, failed_checks(stage)) == ("weights", ["blocks of the text encoder"])


def test_scrambled_decoder_channels_fail_the_vae(tmp_path: Path) -> None:
    path = faults.rewrite(tmp_path / "scrambled.safetensors", faults.scramble_decoder_channels)
    stage = first_failure(path, **DEMO_PARTS)
    assert stage.name == "VAE"
    assert "share of the variance lost" in failed_checks(stage)


def zero_one_row(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Any, **options: Any) -> Tensor:
        output = kernel(*arguments, **options).clone()
        output[..., 5, :] = 0
        return output

    return run


def test_kernel_that_zeros_one_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "norm_rope", zero_one_row(fused.norm_rope))
    stage = first_failure()
    assert stage.name == "kernels"
    assert "norm_rope: error of its worst row" in failed_checks(stage)


@pytest.mark.filterwarnings("ignore:this CPU has no instructions for int8")
def test_quantized_scale_that_is_off_by_2_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = int8.quantize_rows

    def quantize_wrongly(weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = quantize(weight)
        return codes, scale * (2 if weight.shape[0] > weight.shape[1] else 1)  # those of feed_forward.up

    monkeypatch.setattr(int8, "quantize_rows", quantize_wrongly)
    stage = first_failure(quant="int8-weights")
    assert stage.name == "linear layers"
    assert failed_checks(stage) == ["feed_forward.up: error of its worst row or column"]


def test_rope_constants_of_no_release_fail_the_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    metadata = dict(Source.open(DEMO).metadata)
    config = json.loads(metadata["config"])
    config["transformer"]["positional_embedding_theta"] = 1000.0
    path = tmp_path / "theta.safetensors"
    save_file(load_file(DEMO), path, {**metadata, "config": json.dumps(config)})
    stage = first_failure(path, **DEMO_PARTS)
    assert (stage.name, failed_checks(stage)) == ("files", ["RoPE theta"])


def test_untrained_model_fails_vae_and_transformer(tmp_path: Path) -> None:
    path, recipe = write_model(tmp_path) / MODEL_FILE, find_release("demo").recipe
    engine = Engine.open(path, recipe=recipe, device="cpu", prompt_cache=False)
    report = run_selftest(engine)
    verdicts = {stage.name: stage.verdict for stage in report.stages}
    assert {"VAE", "transformer", "sample"} <= set(report.failed_stages)
    # What does not depend on training is right.
    assert verdicts["weights"] == verdicts["kernels"] == verdicts["linear layers"] == verdicts["placements"] == "pass"
    assert verdicts["tokenizer"] == "not run"
