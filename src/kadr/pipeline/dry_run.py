"""Dry run of a request: what a generation would do, from headers, the registry and the request alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kadr.notebook.html import lines, table
from kadr.pipeline.display.dry_run_rows import STEP_HEAD, describe_request, pass_headline, step_rows
from kadr.request.passes import (
    Evaluation,
    ResolvedPass,
    check_first_sigma,
    unused_second_pass_options,
    warn_unused_second_pass,
)
from kadr.request.resolved_controls import warn_control_lora_mismatch
from kadr.request.resolved_request import ResolvedRequest
from kadr.spec.locate import ModelComponent
from kadr.spec.model import ModelSpec


@dataclass(frozen=True)
class DryRun:
    """Result of a dry run.

    Args:
        components: the components that would be opened; those without a path would be fetched.
        resolved: the request with nothing left open.
    """

    components: tuple[ModelComponent, ...]
    resolved: ResolvedRequest

    @property
    def passes(self) -> tuple[ResolvedPass, ...]:
        """The passes with the sigma and guidance of every step; the first window of a long video."""
        return self.resolved.window_passes[:1] or self.resolved.passes

    @property
    def window_count(self) -> int:
        """Number of windows; 1 without windows."""
        return len(self.resolved.window_passes) or 1

    def _repr_html_(self) -> str:
        parts = [table(describe_request(self.components, self.resolved))]
        for resolved_pass in self.passes:
            parts += [lines([pass_headline(resolved_pass)]), table(step_rows(resolved_pass), head=STEP_HEAD)]
        return "".join([*parts, lines([f"{self.resolved.model_evaluations} model evaluations."])])

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, as `--dry-run --json` prints it."""
        resolved = self.resolved
        return {
            "components": [component.to_json() for component in self.components],
            "size": {"requested": str(resolved.size), "sampled": str(resolved.sampled_size)},
            "frames": {"requested": resolved.frames, "sampled": resolved.sampled_frames},
            "fps": resolved.fps,
            "evaluations": resolved.model_evaluations,
            "window_count": self.window_count,
            "passes": [_pass_json(resolved_pass) for resolved_pass in self.passes],
            "conditions": [
                {"media": item.condition.media, "start_frame": item.start_frame, "frames": len(item.media)}
                for item in resolved.conditions
            ],
            "controls": [
                {"media": item.control.media, "kind": item.control.kind, "frames": len(item.media)}
                for item in resolved.controls
            ],
            "request": resolved.request.to_json(),
        }


def run_dry(spec: ModelSpec, resolved: ResolvedRequest) -> DryRun:
    """Returns what a generation of the request would do, and warns of what it would not use.

    Raises:
        RequestError: the first sigma does not fit what the first pass starts from.
    """
    check_first_sigma(resolved.passes[0], has_init_latents=resolved.input_video is not None)
    warn_unused_options(spec, resolved)
    strengths = resolved.request.lora_strengths
    warn_control_lora_mismatch(
        resolved.request, has_loras=bool(spec.loras), has_in_context_lora=spec.loras.has_in_context(strengths)
    )
    return DryRun(spec.required_components(has_two_passes=len(resolved.passes) > 1), resolved)


def warn_unused_options(spec: ModelSpec, resolved: ResolvedRequest) -> None:
    """Warns of options of a second pass that a single one does not use."""
    has_second_strength = any(lora.second_strength not in (None, lora.strength) for lora in spec.loras.entries)
    unused = unused_second_pass_options(
        has_upscaler=bool(spec.given_upscalers),
        has_second_model=spec.has_second_model,
        has_second_lora_strength=has_second_strength,
    )
    warn_unused_second_pass(resolved.request, unused)


def _pass_json(resolved_pass: ResolvedPass) -> dict[str, Any]:
    guidance = resolved_pass.settings.guidance
    return {
        "number": resolved_pass.number,
        "size": str(resolved_pass.size),
        "frames": resolved_pass.frames,
        "fps": resolved_pass.fps,
        "latent_grid": [resolved_pass.grid.frames, resolved_pass.grid.height, resolved_pass.grid.width],
        "sampler": resolved_pass.settings.sampler,
        "tone_map": resolved_pass.settings.tone_map,
        "stg_mode": guidance.stg_mode,
        "cfg_star": bool(guidance.cfg_star),
        "apg": guidance.apg,
        "apg_norm": guidance.apg_norm,
        "steps": [_step_json(step) for step in resolved_pass.evaluations],
    }


def _step_json(step: Sequence[Evaluation]) -> dict[str, Any]:
    first, *later = step
    return {
        "sigma": first.sigma,
        **first.guidance._asdict(),
        "evaluations": sum(evaluation.guidance.model_evaluations for evaluation in step),
        "intermediate": [{"sigma": sigma, **guidance._asdict()} for sigma, guidance in later],
    }
