"""Checks of LoRAs that fit a model's layers and were made for another one, or for other settings."""

from __future__ import annotations

from collections.abc import Iterator

from kadr.checkpoints.detect.releases import narrow_by_name
from kadr.checkpoints.lora.file import LoraFile
from kadr.diagnosis.finding import QUALITY, Finding
from kadr.diagnosis.recipe import count_steps, distilling_loras, is_distilled_model
from kadr.models.registry import DISTILLED_SIGMAS, MODEL_RELEASES, Release
from kadr.quoting import quote, show
from kadr.request.passes import ResolvedPass
from kadr.request.resolved_request import ResolvedRequest
from kadr.spec.model import ModelSpec

BASE_MODEL_KEYS = ("kadr_base_model", "ss_sd_model_name", "base_model")  # in headers: kadr's, kohya's, others'
COMPATIBLE_VERSIONS = ({"0.9.7", "0.9.8"},)  # the released LoRAs of one are used with the other
MAX_DISTILLED_STEPS = 2 * len(DISTILLED_SIGMAS)


def check_loras(spec: ModelSpec, resolved: ResolvedRequest) -> Iterator[Finding]:
    """Yields the findings about LoRAs."""
    for file in spec.loras.files:
        yield from _check_base(file, spec.release)
    distilling = distilling_loras(spec, resolved, 0)
    if not distilling:
        return
    name = show(distilling[0])
    if is_distilled_model(spec, 0):
        message = f"the LoRA {name} makes a model run in few steps, and {spec.name} is distilled already. Leave it out."
        yield Finding(QUALITY, "LoRA", message)
    elif _is_guided(resolved.passes[0]) or count_steps(resolved.passes[0].settings) > MAX_DISTILLED_STEPS:
        sigmas = ",".join(f"{sigma:g}" for sigma in DISTILLED_SIGMAS)
        message = f"the LoRA {name} makes the model run in few steps without guidance, and the recipe has many, guided."
        yield Finding(QUALITY, "LoRA", message, f"--single-pass --guidance 1 --stg 0 --sigmas {sigmas}")


def _is_guided(resolved_pass: ResolvedPass) -> bool:
    return any(guidance.model_evaluations > 1 for guidance in resolved_pass.evaluation_guidance)


def _check_base(file: LoraFile, release: Release | None) -> Iterator[Finding]:
    base = next((file.source.metadata[key] for key in BASE_MODEL_KEYS if key in file.source.metadata), None)
    bases = narrow_by_name(MODEL_RELEASES, base) if base else None
    if release is None or not bases or any(_are_compatible(other, release) for other in bases):
        return
    message = (
        f"the LoRA {file.path} was trained on {quote(base)}, and not on {release.name}: it does little there, or harm."
    )
    yield Finding(QUALITY, "LoRA", message, f"--model {bases[-1].name}")


def _are_compatible(base: Release, release: Release) -> bool:
    versions = {base.version.partition("-")[0], release.version.partition("-")[0]}
    is_same_version = len(versions) == 1 or any(versions <= compatible for compatible in COMPATIBLE_VERSIONS)
    return is_same_version and base.num_layers == release.num_layers
