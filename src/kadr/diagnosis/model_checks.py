"""Checks of a model's components: its release, text encoder, quantization and LoRAs, and what is not on disk."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter

from kadr.checkpoints.source import Source
from kadr.diagnosis.finding import NOTE, QUALITY, Finding
from kadr.models.registry import DEFAULT_TEXT_ENCODER, TEXT_ENCODER_GGUF
from kadr.models.t5 import T5_XXL
from kadr.quant.weight_formats import BITS_PER_WEIGHT
from kadr.quoting import show
from kadr.spec.model import ModelSpec
from kadr.spec.weights import count_stored_types

# Measured on the demo, docs/reference/quantization.md: with fewer bits the frames differ visibly, or are worse.
GOOD_BITS, POOR_BITS = 5.0, 4.0
GOOD_FORMAT = "Q8_0"
OTHER_T5 = ("flan", "umt5", "mt5", "byt5")  # of the shapes of T5 v1.1, and of other training


def check_model(spec: ModelSpec, *, has_two_passes: bool) -> Iterator[Finding]:
    """Yields the findings about the components of a model."""
    yield from _check_release(spec)
    yield from _check_text_encoder(spec)
    yield from _check_quantization(spec)
    yield from _check_absent(spec, has_two_passes=has_two_passes)


def _check_release(spec: ModelSpec) -> Iterator[Finding]:
    if spec.release is None and spec.options.recipe is None:
        steps = spec.recipe.first_pass.steps
        message = (
            f"{spec.name} is no release that kadr knows, so it runs by default settings, {steps} steps with guidance. "
            "If it was trained from a release, name that."
        )
        yield Finding(NOTE, "model", message, "--release NAME")


def _check_text_encoder(spec: ModelSpec) -> Iterator[Finding]:
    encoder, config = spec.text_encoder_checkpoint, spec.text_encoder_checkpoint.config
    if spec.release is None or spec.release.text_encoder is None:
        return
    fix = f"--text-encoder {DEFAULT_TEXT_ENCODER}"
    name = str(encoder.path).lower()
    differences = [
        f"{getattr(config, field)} {noun} instead of {getattr(T5_XXL, field)}"
        for field, noun in (("num_layers", "layers"), ("num_heads", "heads"), ("vocab_size", "tokens"))
        if getattr(config, field) != getattr(T5_XXL, field)
    ]
    if differences:
        message = f"the text encoder {encoder.path} is not T5 v1.1 XXL: it has {', '.join(differences)}."
        yield Finding(QUALITY, "text encoder", message, fix)
    elif other := next((kind for kind in OTHER_T5 if kind in name), None):
        message = (
            f"the text encoder {encoder.path} is named {other}, which was trained otherwise than T5 v1.1 XXL: to the "
            "model, its embeddings mean something else."
        )
        yield Finding(QUALITY, "text encoder", message, fix)
    stored, bits = _stored_type(encoder.source)
    if bits < GOOD_BITS:
        message = (
            f"the text encoder is stored as {stored}, in {bits:g} bits per weight: prompts are followed less well."
        )
        yield Finding(_kind_of_bits(bits), "text encoder", message, f"--text-encoder {TEXT_ENCODER_GGUF}")


def _check_quantization(spec: ModelSpec) -> Iterator[Finding]:
    bits = BITS_PER_WEIGHT.get(spec.quant, 16.0)
    if bits < GOOD_BITS:
        yield _few_bits(f"--quant {spec.quant} stores the weights", bits, f"--quant {GOOD_FORMAT}")
    for checkpoint in spec.transformer_checkpoints[: 1 + spec.has_second_model]:
        stored, bits = _stored_type(checkpoint.sources["transformer"])
        if bits < GOOD_BITS:
            fix = f"--model {spec.release.name} --quant {GOOD_FORMAT}" if spec.release else ""
            yield _few_bits(f"{checkpoint.path} is stored as {stored},", bits, fix)


def _few_bits(subject: str, bits: float, fix: str) -> Finding:
    effect = "the video is visibly worse" if bits < POOR_BITS else "details differ from the model's own"
    return Finding(_kind_of_bits(bits), "quantization", f"{subject} in {bits:g} bits per weight: {effect}.", fix)


def _kind_of_bits(bits: float) -> str:
    return QUALITY if bits < POOR_BITS else NOTE


def _stored_type(source: Source) -> tuple[str, float]:
    """Returns the storage type of most linear weights, and its bits per weight."""
    counts = count_stored_types(source)
    stored = max(counts.items(), key=itemgetter(1))[0] if counts else "float32"
    return stored, BITS_PER_WEIGHT.get(stored, 16.0)


def _check_absent(spec: ModelSpec, *, has_two_passes: bool) -> Iterator[Finding]:
    for component in spec.required_components(has_two_passes=has_two_passes):
        if component.path is None:
            size = component.bytes_to_fetch
            much = f": {size / 1e9:.2g} GB are fetched first" if size else ""
            message = f"the {component.role} {show(component.name)} is not on disk{much}."
            yield Finding(NOTE, "files", message, f"kadr models pull {component.name}")
