"""Diagnoses a request for a model: the checks of this folder, and every warning and error that it would meet.

Reads headers only: no weight is loaded, nothing is fetched, and the model need not be on disk.
"""

from __future__ import annotations

from kadr.diagnosis.finding import Findings
from kadr.diagnosis.guidance_checks import check_guidance
from kadr.diagnosis.lora_checks import check_loras
from kadr.diagnosis.model_checks import check_model
from kadr.diagnosis.prompt_checks import check_prompts
from kadr.diagnosis.schedule_checks import check_schedules
from kadr.diagnosis.video_checks import check_video
from kadr.pipeline.dry_run import run_dry
from kadr.pipeline.plan_request import plan_request
from kadr.pipeline.prompt_cache import PromptCache
from kadr.pipeline.stages.text import PromptEncoder
from kadr.request.prompt_words import warn_of_prompts
from kadr.request.request import Request
from kadr.request.resolve import resolve
from kadr.request.resolved_request import ResolvedRequest
from kadr.spec.model import ModelSpec


def diagnose_request(
    spec: ModelSpec, request: Request, findings: Findings, *, has_prompt: bool = True, is_enhanced: bool = False
) -> None:
    """Adds to `findings` what is wrong with a request for a model; an error it meets is one of them.

    Args:
        has_prompt: False where no prompt is given yet, so an empty one is not a finding.
        is_enhanced: a chat model will rewrite the prompt, so what is written now is not looked at.
    """
    resolved = None
    with findings.record():
        resolved = resolve(request, spec)
    if resolved is None:
        findings.add(check_model(spec, has_two_passes=False))
        return
    with findings.record():
        run_dry(spec, resolved)
    findings.add(check_guidance(spec, request, resolved))
    findings.add(check_schedules(spec, resolved))
    findings.add(check_video(spec, resolved))
    findings.add(check_loras(spec, resolved))
    findings.add(check_model(spec, has_two_passes=len(resolved.passes) > 1))
    if has_prompt and not is_enhanced:
        findings.add(check_prompts(spec, resolved))
        with findings.record():
            warn_of_prompts(resolved, spec)
    with findings.record():
        _plan(spec, resolved)


def _plan(spec: ModelSpec, resolved: ResolvedRequest) -> None:
    """Plans the request: warns of prompts that are too long and of hours, and refuses what does not fit in memory."""
    checkpoint = spec.text_encoder_checkpoint
    cache = PromptCache.open(True, checkpoint, dtype=spec.dtype, device=spec.device.type)
    plan_request(spec, resolved, PromptEncoder(spec.tokenizer, cache, resolved.all_prompts), warns_if_long=True)
