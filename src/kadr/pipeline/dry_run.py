"""Dry run of a request, from headers, the registry and the request alone; the model need not be on disk."""

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
    Evaluation,
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
    """A component that a generation would open.

    Args:
        role: "model", "second model", "upscaler", "text encoder", "vae" or "LoRA".
        name: path or registry name in the request.
        path: None if it would be fetched.
        size_bytes: bytes to fetch, if known.
        strengths: strengths of a LoRA in the first and the second pass.
    """

    role: str
    name: str
    path: Path | None
    size_bytes: int | None = None
    strengths: tuple[float, float] | None = None


@dataclass(frozen=True)
class DryRunModel:
    """A model as its header describes it, or the registry where there is no file.

    Args:
        num_layers: number of blocks of its transformer.
        release: registry entry; None for an unreleased model.
        config: config of its transformer; None where there is no file.
    """

    component: DryRunComponent
    schedule: Schedule
    num_layers: int
    release: Release | None
    config: TransformerConfig | None = None


@dataclass(frozen=True)
class DryRun:
    """Result of a dry run.

    Args:
        components: the components that would be opened.
        request: the resolved request.
        sampled_dimensions: size and frames that are sampled, before they are cropped and trimmed.
        passes: the passes with the sigma and guidance of every step; the first window of a long video.
        conditions: the conditions with their frames.
        controls: the controls with their frames.
        evaluations: number of model evaluations, over all passes and windows.
        window_count: number of windows; 1 without windows.
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
        """Returns plain data, as `--dry-run --json` prints it."""
        size, frames = self.sampled_dimensions
        return {
            "components": [
                {**asdict(component), "path": component.path and str(component.path)} for component in self.components
            ],
            "size": {"requested": str(self.request.size), "sampled": str(size)},
            "frames": {"requested": self.request.frames, "sampled": frames},
            "fps": self.request.fps,
            "evaluations": self.evaluations,
            "window_count": self.window_count,
            "passes": [_pass_json(resolved_pass) for resolved_pass in self.passes],
            "conditions": [
                {
                    "media": resolved.condition.media,
                    "start_frame": resolved.start_frame,
                    "frames": len(resolved.frames),
                }
                for resolved in self.conditions
            ],
            "controls": [
                {"media": resolved.control.media, "kind": resolved.control.kind, "frames": len(resolved.frames)}
                for resolved in self.controls
            ],
            "request": self.request.to_json(),
        }


@dataclass(frozen=True)
class DryRunEngine:
    """Counterpart of `Engine` for dry runs: reads no weight and fetches nothing.

    Args:
        models: model of the first pass and of the second.
        upscalers: the upscalers and what each doubles.
        other_components: text encoder, separate VAE and LoRAs.
        loras: the LoRAs and their files; no file where it would be fetched.
        is_merged: whether the LoRAs are merged into the weights.
    """

    models: tuple[DryRunModel, DryRunModel]
    upscalers: tuple[tuple[DryRunComponent, Upscaling], ...]
    other_components: tuple[DryRunComponent, ...]
    recipe: Recipe
    loras: tuple[tuple[Lora, LoraFile | None], ...] = ()
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
        """Opens headers as `Engine.open` does, without fetching what is not on disk.

        Raises:
            RequestError: a name is unknown.
            CheckpointError: a path does not exist, a file is not of this family, or a LoRA is for another model.
        """
        first = _inspect_model("model", model, needs_vae=vae is None)
        second = first if second_model is None else _inspect_model("second model", second_model)
        upscaler_names = [upscaler] if isinstance(upscaler, str | Path) else list(upscaler)
        recipe = recipe or (first.release.recipe if first.release else Recipe())
        if second is not first:
            recipe = with_second_model(recipe, second.release)
        named_release = first.release if first.release and first.release.name == str(model) else None
        components = [_inspect_text_encoder(text_encoder, first)]
        if vae_name := vae or (named_release and named_release.vae):
            components.append(_inspect_component("vae", vae_name, "model")[0])
        parsed_loras = [Lora.parse(lora) for lora in loras]
        inspected = [_inspect_lora(lora, (first, second), allow_partial=lora_partial) for lora in parsed_loras]
        components += [component for component, _ in inspected]
        upscalers = tuple(_inspect_upscaler(name, first) for name in upscaler_names)
        _refuse_duplicate_upscalers(upscalers)
        lora_files = tuple(zip(parsed_loras, (file for _, file in inspected), strict=True))
        return cls((first, second), upscalers, tuple(components), recipe, lora_files, merge_loras)

    def resolve(self, request: Request) -> Request:
        """Returns the request with nothing left open; see `Engine.resolve`."""
        return resolve(request, self.recipe)

    def run(self, request: Request) -> DryRun:
        """Returns what a generation of the request would do. Opens its images and clips.

        Raises:
            RequestError: the request does not fit this model.
            MediaError: an image or clip cannot be read.
            CheckpointError: two passes are requested, and there is no upscaler.
        """
        original, request = request, self.resolve(request)
        warn_single_pass(original, request, self.recipe)
        upscalers = self.upscalers
        if request.multi_scale and not upscalers:
            upscalers = (_default_upscaler(self.models[0]),)
        kinds = [kind for _, kind in upscalers]
        upscaling = Upscaling(any(kind.spatial for kind in kinds), any(kind.temporal for kind in kinds))
        schedules = [model.schedule for model in self.models]
        passes = resolve_passes(request, schedules, upscaling=upscaling)
        for resolved_pass, model in zip(passes, self.models, strict=False):
            check_skip_blocks(resolved_pass, model.num_layers)
            warn_distilled_guidance(resolved_pass, model.component.name, model.schedule, model.release)
            warn_step_cache(resolved_pass, request.step_cache)
        has_second_strength = any(lora.second_strength not in (None, lora.strength) for lora, _ in self.loras)
        has_second_model = self.models[0] is not self.models[1]
        warn_unused_second_pass(
            request,
            unused_second_pass_options(
                has_upscaler=bool(self.upscalers),
                has_second_model=has_second_model,
                has_second_lora_strength=has_second_strength,
            ),
        )
        check_first_sigma(passes[0], has_init_latents=request.input_video is not None)
        if self.is_merged and request.multi_scale and not has_second_model:
            refuse_merged_twice(lora for lora, _ in self.loras)
        windows = resolve_window_passes(request, schedules[0])
        spans = () if request.windows is None else request.windows.spans(_sampled_dimensions(request)[1])
        active_loras = [file for lora, file in self.loras if file is not None and any(lora.pass_strengths())]
        # Refuses media that do not fit, as a generation does.
        media = Media(
            request, passes, windows, spans, reference_downscale=lambda: common_reference_downscale(active_loras)
        )
        warn_control_lora_mismatch(
            request, has_loras=bool(self.loras), has_in_context_lora=any(map(is_in_context, active_loras))
        )
        models = self.models if has_second_model else self.models[:1]
        components = [
            *(model.component for model in models),
            *(component for component, _ in upscalers),
            *self.other_components,
        ]
        evaluations = sum(
            at.model_evaluations for resolved_pass in windows or passes for at in resolved_pass.evaluation_guidance
        )
        return DryRun(
            tuple(components),
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
    component, release = _inspect_component(role, name, "model")
    if component.path is not None:
        checkpoint = Checkpoint.open(component.path, release=release)
        info = checkpoint.info
        if info.transformer is None:
            raise checkpoint.missing_component_error("transformer")
        if needs_vae and info.vae is None and not (release and release.vae):
            raise checkpoint.missing_component_error("vae")
        config = info.transformer
        return DryRunModel(component, info.schedule, config.num_layers, release or info.release, config)
    assert release is not None
    assert release.vae_family is not None
    assert release.num_layers is not None
    schedule = FAMILY_SCHEDULES[release.vae_family]
    if release.version.startswith("0.9.8-distilled"):
        schedule = replace(schedule, allowed_sigmas=DISTILLED_SIGMAS)  # as in its header
    return DryRunModel(component, schedule, release.num_layers, release)


def _inspect_lora(
    lora: Lora, models: Iterable[DryRunModel], *, allow_partial: bool
) -> tuple[DryRunComponent, LoraFile | None]:
    """Returns the component and its file, if on disk; with `allow_partial`, without the layers that a model lacks."""
    component, _ = _inspect_component(registry.LORA, lora.path, registry.LORA)
    file = None if component.path is None else LoraFile.open(component.path, allow_partial=allow_partial)
    for model in models:
        if file is not None and model.config is not None and model.component.path is not None:
            file = file.without_missing_layers(model.config, model.component.path) if allow_partial else file
            file.check_fits(model.config, model.component.path)
    return replace(component, strengths=lora.pass_strengths()), file


def _inspect_upscaler(name: str | Path, model: DryRunModel) -> tuple[DryRunComponent, Upscaling]:
    component, release = _inspect_component("upscaler", name, "spatial upscaler", "temporal upscaler")
    if component.path is None:
        assert release is not None
        return component, Upscaling(release.kind.startswith("spatial"), release.kind.startswith("temporal"))
    config = require_matching_upscaler(
        Checkpoint.open(component.path), model.config, model.component.path or Path(model.component.name)
    )
    return component, Upscaling(config.spatial_upsample, config.temporal_upsample)


def _refuse_duplicate_upscalers(upscalers: Iterable[tuple[DryRunComponent, Upscaling]]) -> None:
    spatial = [component.name for component, upscaling in upscalers if upscaling.spatial]
    temporal = [component.name for component, upscaling in upscalers if upscaling.temporal]
    for kind, names in (("spatial", spatial), ("temporal", temporal)):
        if len(names) > 1:
            raise CheckpointError(f"{names[1]} is a second {kind} upscaler; give one of each kind at most.")


def _default_upscaler(model: DryRunModel) -> tuple[DryRunComponent, Upscaling]:
    release = model.release
    if release is None or release.upscaler is None:
        raise CheckpointError(
            "two passes need a latent upscaler, and none belongs to this model. Give one with --upscaler, or use a "
            "single pass."
        )
    return _inspect_upscaler(release.upscaler, model)


def _inspect_text_encoder(name_or_path: str | Path | None, model: DryRunModel) -> DryRunComponent:
    """Returns the requested text encoder, else the one beside the model, else the registry's."""
    role = "text encoder"
    if name_or_path is not None:
        return _inspect_component(role, name_or_path, role)[0]
    if model.component.path is not None:
        folder = model.component.path if model.component.path.is_dir() else model.component.path.parent
        if (folder / "text_encoder").is_dir():
            return DryRunComponent(role, "beside the model", folder)
    name = (model.release and model.release.text_encoder) or registry.DEFAULT_TEXT_ENCODER
    return _inspect_component(role, name, role)[0]


def _inspect_component(role: str, name_or_path: str | Path, *kinds: str) -> tuple[DryRunComponent, Release | None]:
    """Returns a component, and its registry entry if it is given by name."""
    if is_path(str(name_or_path)):
        path = Path(name_or_path).expanduser()
        if not path.exists():
            raise CheckpointError(
                f"the {role} {path} does not exist. Give an existing path, or a name of `kadr models`."
            )
        return DryRunComponent(role, str(name_or_path), path), None
    release = registry.find_release(str(name_or_path))
    if release.kind not in kinds:
        raise RequestError(f"{release.name} is a {release.kind}; for the {role}, {_suggest_names(kinds)}.")
    path_on_disk = find_release_on_disk(release)
    size_bytes = None if path_on_disk else release.size_bytes
    return DryRunComponent(role, release.name, path_on_disk, size_bytes), release


def _suggest_names(kinds: Iterable[str]) -> str:
    names = [release.name for release in registry.RELEASES if release.kind in kinds and release.repo is not None]
    return f"give a path, or a name such as {names[0]}"


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
