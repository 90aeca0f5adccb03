"""What a request would come to, from headers, the registry and the request alone: for models that are not here too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.detect.vae_families import FAMILY_SCHEDULES
from kadr.checkpoints.lora.file import LoraFile
from kadr.errors import CheckpointError, RequestError
from kadr.models import registry
from kadr.models.registry import DISTILLED_SIGMAS, Recipe, Release
from kadr.models.transformer import TransformerConfig
from kadr.pipeline.stages.encode import Media
from kadr.request.passes import (
    ResolvedPass,
    check_first_sigma,
    check_skip_blocks,
    resolve_passes,
    resolve_window_passes,
    unused_second_pass_options,
    warn_distilled_guidance,
    warn_step_cache,
    warn_unused_second_pass,
)
from kadr.request.request import Request
from kadr.request.resolve import resolve, warn_single_pass, with_second_model
from kadr.request.resolved_conditions import ResolvedCondition
from kadr.request.resolved_controls import ResolvedControl, warn_control_lora_mismatch
from kadr.sampling.schedules import Schedule
from kadr.shapes import Size, snap_frames
from kadr.spec.locate import find_release_on_disk, is_path
from kadr.spec.lora import Lora, refuse_merged_twice
from kadr.spec.loras import common_reference_downscale, is_in_context
from kadr.spec.model import Upscaling, require_matching_upscaler


@dataclass(frozen=True)
class DryRunComponent:
    """A part that a generation would open.

    Args:
        role: "model", "second model", "upscaler", "text encoder", "vae" or "LoRA".
        name: as it was asked for.
        path: None where it would be fetched.
        size_bytes: of what would be fetched, where that is known.
        strengths: of a LoRA, in each pass.
    """

    role: str
    name: str
    path: Path | None
    size_bytes: int | None = None
    strengths: tuple[float, float] | None = None


@dataclass(frozen=True)
class DryRunModel:
    """What a plan needs to know of a model: from its header, or from the registry where there is no file.

    Args:
        num_layers: of its transformer.
        release: the registry's entry; None for an unreleased one.
        config: of its transformer; None where there is no file.
    """

    component: DryRunComponent
    schedule: Schedule
    num_layers: int
    release: Release | None
    config: TransformerConfig | None = None


@dataclass(frozen=True)
class DryRun:
    """What a request would come to.

    Args:
        request: with everything it left out filled in.
        sampled_dimensions: the size and the frames of the model's own grid, before they are cropped and trimmed.
        passes: with the level and the strengths of every step. Of a long video its first window.
        conditions: the conditions, and where they stand.
        controls: the controls.
        evaluations: how often the transformer is asked.
        window_count: how many there are of a long video; 1 of any other.
    """

    components: tuple[DryRunComponent, ...]
    request: Request
    sampled_dimensions: tuple[Size, int]
    passes: tuple[ResolvedPass, ...]
    conditions: tuple[ResolvedCondition, ...]
    controls: tuple[ResolvedControl, ...]
    evaluations: int
    window_count: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        size, frames = self.sampled_dimensions
        return {
            "components": [{**asdict(part), "path": part.path and str(part.path)} for part in self.components],
            "size": {"asked": str(self.request.size), "made": str(size)},
            "frames": {"asked": self.request.frames, "made": frames},
            "fps": self.request.fps,
            "evaluations": self.evaluations,
            "window_count": self.window_count,
            "passes": [_pass_json(plan) for plan in self.passes],
            "conditions": [
                {"media": item.condition.media, "first": item.start_frame, "frames": len(item.frames)}
                for item in self.conditions
            ],
            "controls": [
                {"media": one.control.media, "kind": one.control.kind, "frames": len(one.frames)}
                for one in self.controls
            ],
            "request": self.request.to_json(),
        }


@dataclass(frozen=True)
class DryRunEngine:
    """As an `Engine`, for those who only want to know. No weight is read and nothing is fetched."""

    models: tuple[DryRunModel, DryRunModel]
    upscalers: tuple[tuple[DryRunComponent, Upscaling], ...]
    other_components: tuple[DryRunComponent, ...]
    recipe: Recipe
    loras: tuple[tuple[Lora, LoraFile | None], ...] = ()  # no file where it would be fetched
    is_merged: bool = False

    @classmethod
    def open(
        cls,
        model: str | Path = "demo",
        *,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        upscaler: str | Path | Sequence[str | Path] = (),
        second_model: str | Path | None = None,
        recipe: Recipe | None = None,
        loras: Sequence[Any] = (),
        lora_partial: bool = False,
        merge_loras: bool = False,
    ) -> DryRunEngine:
        """As `Engine.open`, without fetching what is not here.

        Raises:
            RequestError: an unknown name.
            CheckpointError: a path that is not there, a file that is not of this family, or a LoRA for another model.
        """
        first = _inspect_model("model", model, needs_vae=vae is None)
        second = first if second_model is None else _inspect_model("second model", second_model)
        wanted = [upscaler] if isinstance(upscaler, str | Path) else list(upscaler)
        own = recipe or (first.release.recipe if first.release else Recipe())
        if second is not first:
            own = with_second_model(own, second.release)
        named = first.release if first.release and first.release.name == str(model) else None
        others = [_inspect_text_encoder(text_encoder, first)]
        if wanted_vae := vae or (named and named.vae):
            others.append(_inspect_component("vae", wanted_vae, "model")[0])
        uses = [Lora.parse(one) for one in loras]
        added = [_inspect_lora(use, (first, second), allow_partial=lora_partial) for use in uses]
        others += [part for part, _ in added]
        upscalers = tuple(_inspect_upscaler(one, first) for one in wanted)
        _refuse_duplicate_upscalers(upscalers)
        files = tuple(zip(uses, (file for _, file in added), strict=True))
        return cls((first, second), upscalers, tuple(others), own, files, merge_loras)

    def resolve(self, request: Request) -> Request:
        """As `Engine.resolve`."""
        return resolve(request, self.recipe)

    def run(self, request: Request) -> DryRun:
        """What the request would come to. Its pictures and clips are read.

        Raises:
            RequestError: the request does not fit this model.
            MediaError: a picture or clip cannot be read.
            CheckpointError: two passes are asked for, and there is no upscaler.
        """
        asked, request = request, self.resolve(request)
        warn_single_pass(asked, request, self.recipe)
        upscalers = self.upscalers
        if request.multi_scale and not upscalers:
            upscalers = (_default_upscaler(self.models[0]),)
        doubled = Upscaling(any(kind.spatial for _, kind in upscalers), any(kind.temporal for _, kind in upscalers))
        schedules = [model.schedule for model in self.models]
        passes = resolve_passes(request, schedules, upscaling=doubled)
        for plan, model in zip(passes, self.models, strict=False):
            check_skip_blocks(plan, model.num_layers)
            warn_distilled_guidance(plan, model.component.name, model.schedule, model.release)
            warn_step_cache(plan, request.step_cache)
        strength = any(use.second_strength not in (None, use.strength) for use, _ in self.loras)
        others = self.models[0] is not self.models[1]
        warn_unused_second_pass(
            request,
            unused_second_pass_options(
                has_upscaler=bool(self.upscalers), has_second_model=others, has_second_lora_strength=strength
            ),
        )
        check_first_sigma(passes[0], has_init_latents=request.input_video is not None)
        if self.is_merged and request.multi_scale and self.models[0] is self.models[1]:
            refuse_merged_twice(use for use, _ in self.loras)
        windows = resolve_window_passes(request, schedules[0])
        spans = () if request.windows is None else request.windows.spans(_sampled_dimensions(request)[1])
        acting = [file for use, file in self.loras if file is not None and any(use.pass_strengths())]
        # Refuses what does not fit, as a run does.
        media = Media(request, passes, windows, spans, reference_downscale=lambda: common_reference_downscale(acting))
        warn_control_lora_mismatch(
            request, has_loras=bool(self.loras), has_in_context_lora=any(map(is_in_context, acting))
        )
        used = self.models[:1] if self.models[0] is self.models[1] else self.models
        parts = [*(model.component for model in used), *(part for part, _ in upscalers), *self.other_components]
        evaluations = sum(step.model_evaluations for plan in windows or passes for step in plan.step_guidance)
        return DryRun(
            tuple(parts),
            request,
            _sampled_dimensions(request),
            windows[:1] or passes,
            tuple(media.resolved_conditions),
            tuple(media.resolved_controls),
            evaluations,
            window_count=len(windows) or 1,
        )


def _sampled_dimensions(request: Request) -> tuple[Size, int]:
    assert isinstance(request.size, Size)
    assert request.frames is not None
    return request.size.snap(), snap_frames(request.frames)


def _inspect_model(role: str, name: str | Path, *, needs_vae: bool = False) -> DryRunModel:
    part, released = _inspect_component(role, name, "model")
    if part.path is not None:
        checkpoint = Checkpoint.open(part.path, release=released)
        detected = checkpoint.info
        if detected.transformer is None:
            raise checkpoint.missing_component_error("transformer")
        if needs_vae and detected.vae is None and not (released and released.vae):
            raise checkpoint.missing_component_error("vae")
        config = detected.transformer
        return DryRunModel(part, detected.schedule, config.num_layers, released or detected.release, config)
    assert released is not None
    assert released.vae_family is not None
    assert released.num_layers is not None
    schedule = FAMILY_SCHEDULES[released.vae_family]
    if released.version.startswith("0.9.8-distilled"):
        schedule = replace(schedule, allowed_sigmas=DISTILLED_SIGMAS)  # as its header says
    return DryRunModel(part, schedule, released.num_layers, released)


def _inspect_lora(
    lora: Lora, models: Iterable[DryRunModel], *, allow_partial: bool
) -> tuple[DryRunComponent, LoraFile | None]:
    """The part, and its file where it is here; with `allow_partial`, without the layers that a model lacks."""
    part, _ = _inspect_component(registry.LORA, lora.path, registry.LORA)
    file = None if part.path is None else LoraFile.open(part.path, allow_partial=allow_partial)
    for model in models:
        if file is not None and model.config is not None and model.component.path is not None:
            file = file.without_missing_layers(model.config, model.component.path) if allow_partial else file
            file.check_fits(model.config, model.component.path)
    return replace(part, strengths=lora.pass_strengths()), file


def _inspect_upscaler(name: str | Path, model: DryRunModel) -> tuple[DryRunComponent, Upscaling]:
    part, released = _inspect_component("upscaler", name, "spatial upscaler", "temporal upscaler")
    if part.path is None:
        assert released is not None
        return part, Upscaling(released.kind.startswith("spatial"), released.kind.startswith("temporal"))
    config = require_matching_upscaler(
        Checkpoint.open(part.path), model.config, model.component.path or Path(model.component.name)
    )
    return part, Upscaling(config.spatial_upsample, config.temporal_upsample)


def _refuse_duplicate_upscalers(upscalers: Iterable[tuple[DryRunComponent, Upscaling]]) -> None:
    space = [part.name for part, kind in upscalers if kind.spatial]
    time = [part.name for part, kind in upscalers if kind.temporal]
    for name, given in (("spatial", space), ("temporal", time)):
        if len(given) > 1:
            raise CheckpointError(f"{given[1]} is a second {name} upscaler; give one of each kind at most.")


def _default_upscaler(model: DryRunModel) -> tuple[DryRunComponent, Upscaling]:
    released = model.release
    if released is None or released.upscaler is None:
        raise CheckpointError(
            "two passes need a latent upscaler, and none belongs to this model. Give one with --upscaler, or make a "
            "single pass."
        )
    return _inspect_upscaler(released.upscaler, model)


def _inspect_text_encoder(name_or_path: str | Path | None, model: DryRunModel) -> DryRunComponent:
    """The text encoder: the one that is given, the one beside the model, or the one of the registry."""
    role = "text encoder"
    if name_or_path is not None:
        return _inspect_component(role, name_or_path, role)[0]
    if model.component.path is not None:
        folder = model.component.path if model.component.path.is_dir() else model.component.path.parent
        if (folder / "text_encoder").is_dir():
            return DryRunComponent(role, "beside the model", folder)
    entry = (model.release and model.release.text_encoder) or registry.DEFAULT_TEXT_ENCODER
    return _inspect_component(role, entry, role)[0]


def _inspect_component(role: str, name_or_path: str | Path, *kinds: str) -> tuple[DryRunComponent, Release | None]:
    """Where a part is, and its entry in the registry if it is named by it."""
    if is_path(str(name_or_path)):
        path = Path(name_or_path).expanduser()
        if not path.exists():
            raise CheckpointError(f"the {role} is not at {path}. Give an existing path, or a name of `kadr models`.")
        return DryRunComponent(role, str(name_or_path), path), None
    released = registry.find_release(str(name_or_path))
    if released.kind not in kinds:
        raise RequestError(f"{released.name} is a {released.kind}; for the {role}, {_suggest_names(kinds)}.")
    here = find_release_on_disk(released)
    return DryRunComponent(role, released.name, here, None if here else released.size_bytes), released


def _suggest_names(kinds: Iterable[str]) -> str:
    names = [entry.name for entry in registry.RELEASES if entry.kind in kinds and entry.repo is not None]
    return f"give a path, or a name such as {names[0]}"


def _pass_json(resolved_pass: ResolvedPass) -> dict[str, Any]:
    guidance = resolved_pass.settings.guidance
    steps = zip(resolved_pass.sigmas.tolist(), resolved_pass.step_guidance, strict=True)
    return {
        "number": resolved_pass.number,
        "size": str(resolved_pass.size),
        "frames": resolved_pass.frames,
        "fps": resolved_pass.fps,
        "latents": [resolved_pass.grid.frames, resolved_pass.grid.height, resolved_pass.grid.width],
        "stochastic": bool(resolved_pass.settings.stochastic),
        "tone_map": resolved_pass.settings.tone_map,
        "mode": guidance.stg_mode,
        "cfg_star": bool(guidance.cfg_star),
        "apg": guidance.apg,
        "apg_norm": guidance.apg_norm,
        "steps": [
            {"level": level, **strengths._asdict(), "evaluations": strengths.model_evaluations}
            for level, strengths in steps
        ],
    }
