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
    PassPlan,
    check_beginning,
    check_blocks,
    plan_passes,
    plan_windows,
    unused_parts,
    warn_cached,
    warn_guided,
    warn_unused,
)
from kadr.request.request import Request
from kadr.request.resolve import resolve, warn_single, with_second
from kadr.request.resolved_conditions import Placed
from kadr.request.resolved_controls import Followed, warn_unheard
from kadr.sampling.schedules import Schedule
from kadr.shapes import Size, snap_frames
from kadr.spec.locate import is_path, on_disk
from kadr.spec.loras import Lora, downscale_of, is_in_context, refuse_merged_twice
from kadr.spec.model import Upscaling, require_matching_upscaler


@dataclass(frozen=True)
class DryPart:
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
class Model:
    """What a plan needs to know of a model: from its header, or from the registry where there is no file.

    Args:
        layers: of its transformer.
        release: the registry's entry; None for an unreleased one.
        config: of its transformer; None where there is no file.
    """

    part: DryPart
    schedule: Schedule
    layers: int
    released: Release | None
    config: TransformerConfig | None = None


@dataclass(frozen=True)
class DryRun:
    """What a request would come to.

    Args:
        request: with everything it left out filled in.
        made: the size and the frames of the model's own grid, before they are cropped and trimmed.
        passes: with the level and the strengths of every step. Of a long video its first window.
        placed: the conditions, and where they stand.
        followed: the controls.
        evaluations: how often the transformer is asked.
        window_count: how many there are of a long video; 1 of any other.
    """

    parts: tuple[DryPart, ...]
    request: Request
    made: tuple[Size, int]
    passes: tuple[PassPlan, ...]
    placed: tuple[Placed, ...]
    followed: tuple[Followed, ...]
    evaluations: int
    windows: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        size, frames = self.made
        return {
            "components": [{**asdict(part), "path": part.path and str(part.path)} for part in self.parts],
            "size": {"asked": str(self.request.size), "made": str(size)},
            "frames": {"asked": self.request.frames, "made": frames},
            "fps": self.request.fps,
            "evaluations": self.evaluations,
            "window_count": self.windows,
            "passes": [_pass_told(plan) for plan in self.passes],
            "conditions": [
                {"media": item.condition.media, "first": item.start, "frames": len(item.frames)} for item in self.placed
            ],
            "controls": [
                {"media": one.control.media, "kind": one.control.kind, "frames": len(one.frames)}
                for one in self.followed
            ],
            "request": self.request.to_json(),
        }


@dataclass(frozen=True)
class DryEngine:
    """As an `Engine`, for those who only want to know. No weight is read and nothing is fetched."""

    models: tuple[Model, Model]
    upscalers: tuple[tuple[DryPart, Upscaling], ...]
    others: tuple[DryPart, ...]
    recipe: Recipe
    loras: tuple[tuple[Lora, LoraFile | None], ...] = ()  # no file where it would be fetched
    merged: bool = False

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
    ) -> DryEngine:
        """As `Engine.open`, without fetching what is not here.

        Raises:
            RequestError: an unknown name.
            CheckpointError: a path that is not there, a file that is not of this family, or a LoRA for another model.
        """
        first = _model("model", model, needs_vae=vae is None)
        second = first if second_model is None else _model("second model", second_model)
        wanted = [upscaler] if isinstance(upscaler, str | Path) else list(upscaler)
        own = recipe or (first.released.recipe if first.released else Recipe())
        if second is not first:
            own = with_second(own, second.released)
        named = first.released if first.released and first.released.name == str(model) else None
        others = [_text(text_encoder, first)]
        if wanted_vae := vae or (named and named.vae):
            others.append(_part("vae", wanted_vae, "model")[0])
        uses = [Lora.of(one) for one in loras]
        added = [_lora(use, (first, second), partial=lora_partial) for use in uses]
        others += [part for part, _ in added]
        upscalers = tuple(_upscaler(one, first) for one in wanted)
        _refuse_twice(upscalers)
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
        warn_single(asked, request, self.recipe)
        upscalers = self.upscalers
        if request.multi_scale and not upscalers:
            upscalers = (_own_upscaler(self.models[0]),)
        doubled = Upscaling(any(kind.space for _, kind in upscalers), any(kind.time for _, kind in upscalers))
        schedules = [model.schedule for model in self.models]
        passes = plan_passes(request, schedules, upscaling=doubled)
        for plan, model in zip(passes, self.models, strict=False):
            check_blocks(plan, model.layers)
            warn_guided(plan, model.part.name, model.schedule, model.released)
            warn_cached(plan, request.step_cache)
        strength = any(use.second not in (None, use.strength) for use, _ in self.loras)
        others = self.models[0] is not self.models[1]
        warn_unused(request, unused_parts(upscaler=bool(self.upscalers), model=others, strength=strength))
        check_beginning(passes[0], started=request.video is not None)
        if self.merged and request.multi_scale and self.models[0] is self.models[1]:
            refuse_merged_twice(use for use, _ in self.loras)
        windows = plan_windows(request, schedules[0])
        spans = () if request.windows is None else request.windows.spans(_made(request)[1])
        acting = [file for use, file in self.loras if file is not None and any(use.strengths())]
        # Refuses what does not fit, as a run does.
        media = Media(request, passes, windows, spans, downscale=lambda: downscale_of(acting))
        warn_unheard(request, loras=bool(self.loras), in_context=any(map(is_in_context, acting)))
        used = self.models[:1] if self.models[0] is self.models[1] else self.models
        parts = [*(model.part for model in used), *(part for part, _ in upscalers), *self.others]
        evaluations = sum(step.model_evaluations for plan in windows or passes for step in plan.steps)
        return DryRun(
            tuple(parts),
            request,
            _made(request),
            windows[:1] or passes,
            tuple(media.placed),
            tuple(media.followed),
            evaluations,
            windows=len(windows) or 1,
        )


def _made(request: Request) -> tuple[Size, int]:
    assert isinstance(request.size, Size)
    assert request.frames is not None
    return request.size.snap(), snap_frames(request.frames)


def _model(role: str, name: str | Path, *, needs_vae: bool = False) -> Model:
    part, released = _part(role, name, "model")
    if part.path is not None:
        checkpoint = Checkpoint.open(part.path, release=released)
        detected = checkpoint.info
        if detected.transformer is None:
            raise checkpoint.missing_component_error("transformer")
        if needs_vae and detected.vae is None and not (released and released.vae):
            raise checkpoint.missing_component_error("vae")
        config = detected.transformer
        return Model(part, detected.schedule, config.num_layers, released or detected.release, config)
    assert released is not None
    assert released.vae_family is not None
    assert released.num_layers is not None
    schedule = FAMILY_SCHEDULES[released.vae_family]
    if released.version.startswith("0.9.8-distilled"):
        schedule = replace(schedule, allowed_sigmas=DISTILLED_SIGMAS)  # as its header says
    return Model(part, schedule, released.num_layers, released)


def _lora(use: Lora, models: Iterable[Model], *, partial: bool) -> tuple[DryPart, LoraFile | None]:
    """The part, and its file where it is here; with `allow_partial`, without the layers that a model lacks."""
    part, _ = _part(registry.LORA, use.path, registry.LORA)
    file = None if part.path is None else LoraFile.open(part.path, allow_partial=partial)
    for model in models:
        if file is not None and model.config is not None and model.part.path is not None:
            file = file.without_missing_layers(model.config, model.part.path) if partial else file
            file.check_fits(model.config, model.part.path)
    return replace(part, strengths=use.strengths()), file


def _upscaler(name: str | Path, model: Model) -> tuple[DryPart, Upscaling]:
    part, released = _part("upscaler", name, "spatial upscaler", "temporal upscaler")
    if part.path is None:
        assert released is not None
        return part, Upscaling(released.kind.startswith("spatial"), released.kind.startswith("temporal"))
    config = require_matching_upscaler(
        Checkpoint.open(part.path), model.config, model.part.path or Path(model.part.name)
    )
    return part, Upscaling(config.spatial_upsample, config.temporal_upsample)


def _refuse_twice(upscalers: Iterable[tuple[DryPart, Upscaling]]) -> None:
    space = [part.name for part, kind in upscalers if kind.space]
    time = [part.name for part, kind in upscalers if kind.time]
    for name, given in (("spatial", space), ("temporal", time)):
        if len(given) > 1:
            raise CheckpointError(f"{given[1]} is a second {name} upscaler; give one of each kind at most.")


def _own_upscaler(model: Model) -> tuple[DryPart, Upscaling]:
    released = model.released
    if released is None or released.upscaler is None:
        raise CheckpointError(
            "two passes need a latent upscaler, and none belongs to this model. Give one with --upscaler, or make a "
            "single pass."
        )
    return _upscaler(released.upscaler, model)


def _text(given: str | Path | None, model: Model) -> DryPart:
    """The text encoder: the one that is given, the one beside the model, or the one of the registry."""
    role = "text encoder"
    if given is not None:
        return _part(role, given, role)[0]
    if model.part.path is not None:
        folder = model.part.path if model.part.path.is_dir() else model.part.path.parent
        if (folder / "text_encoder").is_dir():
            return DryPart(role, "beside the model", folder)
    entry = (model.released and model.released.text_encoder) or registry.TEXT_ENCODER
    return _part(role, entry, role)[0]


def _part(role: str, given: str | Path, *kinds: str) -> tuple[DryPart, Release | None]:
    """Where a part is, and its entry in the registry if it is named by it."""
    if is_path(str(given)):
        path = Path(given).expanduser()
        if not path.exists():
            raise CheckpointError(f"the {role} is not at {path}. Give an existing path, or a name of `kadr models`.")
        return DryPart(role, str(given), path), None
    released = registry.find_release(str(given))
    if released.kind not in kinds:
        raise RequestError(f"{released.name} is a {released.kind}; for the {role}, {_known(kinds)}.")
    here = on_disk(released)
    return DryPart(role, released.name, here, None if here else released.size_bytes), released


def _known(kinds: Iterable[str]) -> str:
    names = [entry.name for entry in registry.RELEASES if entry.kind in kinds and entry.repo is not None]
    return f"give a path, or a name such as {names[0]}"


def _pass_told(plan: PassPlan) -> dict[str, Any]:
    guidance = plan.settings.guidance
    steps = zip(plan.levels.tolist(), plan.steps, strict=True)
    return {
        "number": plan.number,
        "size": str(plan.size),
        "frames": plan.frames,
        "fps": plan.fps,
        "latents": [plan.grid.frames, plan.grid.height, plan.grid.width],
        "stochastic": bool(plan.settings.stochastic),
        "tone_map": plan.settings.tone_map,
        "mode": guidance.stg_mode,
        "cfg_star": bool(guidance.cfg_star),
        "apg": guidance.apg,
        "apg_norm": guidance.apg_norm,
        "steps": [
            {"level": level, **strengths._asdict(), "evaluations": strengths.model_evaluations}
            for level, strengths in steps
        ],
    }
