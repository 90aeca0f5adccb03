"""The plan of a resolved request, and what would fit where it does not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from kadr.errors import PlanError
from kadr.kernels.choices import record_choices
from kadr.pipeline.stages.control_networks import networks_to_fetch
from kadr.pipeline.stages.text import PromptEncoder
from kadr.planning.backends import describe_attention
from kadr.planning.calibration.storage import current_calibration, load_kernels
from kadr.planning.costs.activations import MAX_PROMPT_TOKENS
from kadr.planning.plan import Plan
from kadr.planning.planner import Planner
from kadr.planning.suggest import suggest_smaller, warn_if_long
from kadr.planning.workload import Workload, build_workload
from kadr.quant.weight_formats import FP8, INT8
from kadr.request.resolved_request import ResolvedRequest
from kadr.spec.model import PASS_STAGES, ModelSpec


def plan_request(
    spec: ModelSpec,
    resolved: ResolvedRequest,
    prompt_encoder: PromptEncoder,
    *,
    stages: Collection[str] = (),
    cached: int = 0,
    loaded: frozenset[str] = frozenset(),
    reclaimable: int = 0,
    warns_if_long: bool = False,
) -> Plan:
    """Returns the plan of a request.

    Args:
        stages: the stages that will run; () for all.
        warns_if_long: warn if it will take over an hour, and say what takes less.
        cached, loaded, reclaimable: bytes and names of cached modules, and bytes of another process; see
            `planning.planner.Planner`.

    Raises:
        PlanError: it does not fit in memory; carries the shortfall in bytes and suggests what fits.
    """
    has_tokenizer = prompt_encoder.tokenizer is not None
    most_tokens = (MAX_PROMPT_TOKENS,) * len(prompt_encoder.prompts)
    workload = build_workload(
        resolved,
        prompt_tokens=prompt_encoder.token_counts if has_tokenizer else most_tokens,
        tokens_to_encode=prompt_encoder.uncached_token_counts if has_tokenizer else most_tokens,
        stages=stages,
    )
    calibration = current_calibration(spec.dtype, spec.device)
    try:
        plan = Planner(spec, workload, calibration, cached=cached, loaded=loaded, reclaimable=reclaimable).plan()
    except PlanError as error:
        ways_out = suggest_smaller(spec, workload, resolved, calibration, cached=cached, reclaimable=reclaimable)
        smaller = {} if ways_out.smaller is None else ways_out.smaller.fields
        raise PlanError(f"{error} {ways_out}", shortfall=error.shortfall, smaller=smaller) from error
    if warns_if_long:
        warn_if_long(spec, workload, resolved, calibration, plan)
    components = spec.required_components(has_two_passes=len(resolved.passes) > 1)
    return replace(
        plan,
        release=spec.release.name if spec.release else None,
        to_fetch=(
            *((item.name, item.bytes_to_fetch) for item in components if item.path is None),
            *networks_to_fetch(resolved.controls),
        ),
        notes=()
        if has_tokenizer
        else (f"text: prompts are taken to have {MAX_PROMPT_TOKENS} tokens, the most: the tokenizer is not on disk",),
        attention=_describe_attention(spec, workload, plan),
    )


def _describe_attention(spec: ModelSpec, workload: Workload, plan: Plan) -> str:
    weight_formats = {stage.placement.weight_format for stage in plan.stages if stage.stage in PASS_STAGES}
    if not weight_formats:
        return ""
    kernels = load_kernels(spec.dtype, spec.device) | record_choices(spec.device)
    return describe_attention(spec, workload, kernels, is_8bit=not weight_formats.isdisjoint((INT8, FP8)))
