"""Each check of a model's components: one that it finds, and one that it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kadr.checkpoints.predict import predict_text_encoder
from kadr.diagnosis.diagnose import diagnose_request
from kadr.diagnosis.finding import ERROR, NOTE, QUALITY, Finding, Findings
from kadr.diagnosis.model_checks import check_model
from kadr.models.registry import TEXT_ENCODER_GGUF, find_release
from kadr.models.transformer import TRANSFORMER_2B
from kadr.models.vae.config import VAE_0_9_5
from kadr.request.request import Request
from kadr.sampling.settings import Pass
from kadr.spec.model import ModelSpec, SpecOptions
from kadr.spec.open import open_spec
from tests import lora_files
from tests.checkpoints.checkpoint_files import single_file_shapes, write_sparse
from tests.tiny_models import MODEL_FILE

KNOWN = "a red circle moving right on a black background"


@pytest.fixture(scope="module")
def released() -> ModelSpec:
    """A released model, as the registry predicts it."""
    return open_spec(SpecOptions(model="ltxv-2b-0.9.5", device="cpu"))


def opening(**options: object) -> tuple[Finding, ...]:
    """Returns the findings of opening a model, and of a request that is right for the demo."""
    findings = Findings()
    with findings.record():
        spec = open_spec(SpecOptions(**{"device": "cpu", **options}))  # type: ignore[arg-type]
        diagnose_request(spec, Request(prompt=KNOWN), findings)
    return findings.sorted()


def of_topic(spec: ModelSpec, topic: str) -> list[Finding]:
    return [finding for finding in check_model(spec, has_two_passes=False) if finding.topic == topic]


def test_another_text_encoder_than_t5_xxl_is_found(released: ModelSpec) -> None:
    assert of_topic(released, "text encoder") == []
    encoder = released.text_encoder_checkpoint
    smaller = replace(encoder, config=replace(encoder.config, num_layers=12))
    flan = replace(encoder, path=Path("/models/flan-t5-xxl.safetensors"))
    for other, message in ((smaller, "12 layers instead of 24"), (flan, "named flan")):
        (found,) = of_topic(replace(released, text_encoder_checkpoint=other), "text encoder")
        assert (found.kind, found.fix) == (QUALITY, "--text-encoder t5-v1.1-xxl")
        assert message in found.message


@pytest.mark.parametrize("stored, kind", [("Q8_0", None), ("Q4_K_M", NOTE), ("Q3_K_S", QUALITY)])
def test_a_text_encoder_of_few_bits_is_found(released: ModelSpec, stored: str, kind: str | None) -> None:
    release = replace(find_release(TEXT_ENCODER_GGUF), file=f"t5-v1_1-xxl-encoder-{stored}.gguf")
    spec = replace(released, text_encoder_checkpoint=predict_text_encoder(release))
    expected = [] if kind is None else [(kind, f"--text-encoder {TEXT_ENCODER_GGUF}")]
    assert [(finding.kind, finding.fix) for finding in of_topic(spec, "text encoder")] == expected


def test_a_model_of_no_known_release_is_noted(home: Path, released: ModelSpec) -> None:
    assert of_topic(released, "model") == []
    (found,) = of_topic(open_spec(SpecOptions(model=home / MODEL_FILE, device="cpu")), "model")
    assert (found.kind, found.fix) == (NOTE, "--release NAME")


def test_an_unclear_release_is_an_error_with_the_flag(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "video.safetensors", single_file_shapes(TRANSFORMER_2B, VAE_0_9_5))
    (found,) = opening(model=path)
    assert (found.kind, found.topic, found.fix) == (ERROR, "model", "--release NAME")
    assert "ltxv-2b-0.9.8-distilled" in found.message


def test_two_passes_without_an_upscaler_are_an_error_with_the_flags(home: Path) -> None:
    findings, spec = Findings(), open_spec(SpecOptions(model=home / MODEL_FILE, device="cpu"))
    request = Request(prompt=KNOWN, multi_scale=True, second_pass=Pass(sigmas=(0.5,)))
    diagnose_request(spec, request, findings)
    (found,) = [finding for finding in findings.sorted() if finding.kind == ERROR]
    assert (found.topic, found.fix) == ("upscaler", "--upscaler ltxv-spatial-upscaler-0.9.8, or --single-pass")


@pytest.mark.parametrize("base, is_found", [("demo", False), ("ltxv-2b-0.9.1", True), ("my own model", False)])
def test_a_lora_that_was_trained_on_another_release_is_found(tmp_path: Path, base: str, is_found: bool) -> None:
    config = open_spec(SpecOptions(device="cpu")).transformer_config
    pairs = lora_files.block_pairs(["attn1.to_q"], num_layers=1, width=config.width)
    path = lora_files.write_lora_file(tmp_path / "style.safetensors", pairs, metadata={"kadr_base_model": base})
    found = opening(loras=(str(path),))
    expected = [(QUALITY, "LoRA", "--model ltxv-2b-0.9.1")] if is_found else []
    assert [(finding.kind, finding.topic, finding.fix) for finding in found] == expected


def test_a_lora_of_another_size_is_an_error(tmp_path: Path) -> None:
    pairs = lora_files.block_pairs(["attn1.to_q"], num_layers=1, width=2048)
    (found,) = opening(loras=(str(lora_files.write_lora_file(tmp_path / "style.safetensors", pairs)),))
    assert (found.kind, found.topic) == (ERROR, "LoRA")
    assert "fits a 2B model" in found.message


def test_an_in_context_lora_without_a_control_is_found() -> None:
    (found,) = opening(loras=("demo-ic-lora-canny",))
    assert (found.kind, found.topic) == (QUALITY, "control")
