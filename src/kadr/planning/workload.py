"""The workload of a generation: everything about a request that memory and time depend on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kadr.planning.costs.images import prepare_bytes, prepare_pixels
from kadr.request.pass_media import PassCondition, PassControl, PassFrames, PassMedia
from kadr.request.passes import ResolvedPass
from kadr.request.resolved_request import ResolvedRequest
from kadr.request.windows import Windows
from kadr.sampling.step_cache import StepCache
from kadr.shapes import LatentGrid


@dataclass(frozen=True)
class Workload:
    """The workload of a generation.

    Args:
        tokens_to_encode: number of tokens of each prompt whose embeddings are not in the prompt cache.
        prompt_tokens: for each prompt, the tokens that the transformer reads.
        encode_grids: for each pass, the latent grids of images and clips that the VAE encodes.
        condition_tokens: for each pass, the tokens that conditions add.
        has_conditions: for each pass, whether conditions give tokens their own sigmas.
        guidance_batch: both prompts are evaluated in one batch.
        step_cache: settings of the step cache; None without one.
        reference_tokens: for each pass, the tokens of controls; () without controls. For a long video, see `windows`.
        stages: names of the stages that run; empty for all of them.
        windows: windows of a long video, in place of its only pass.
        image_bytes: host bytes that preparing the largest image takes, before a module is loaded; 0 without images.
        frame_bytes: host bytes that preparing a frame of the largest clip takes, beside the VAE encoder.
        prepared_pixels: pixels of all images and frames that are blurred and compressed.
    """

    passes: tuple[ResolvedPass, ...]
    tokens_to_encode: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    encode_grids: tuple[tuple[LatentGrid, ...], ...]
    condition_tokens: tuple[int, ...]
    has_conditions: tuple[bool, ...]
    guidance_batch: bool = False
    step_cache: StepCache | None = None
    reference_tokens: tuple[int, ...] = ()
    stages: frozenset[str] = frozenset()
    windows: tuple[WindowWorkload, ...] = ()
    image_bytes: int = 0
    frame_bytes: int = 0
    prepared_pixels: int = 0

    def extra_tokens(self, pass_index: int) -> int:
        """Returns the tokens of a pass outside its video's grid."""
        return self.condition_tokens[pass_index] + (self.reference_tokens[pass_index] if self.reference_tokens else 0)

    def has_per_token_sigmas(self, pass_index: int) -> bool:
        """Returns whether the tokens of a pass have their own sigmas."""
        return self.has_conditions[pass_index] or any(self.reference_tokens)


@dataclass(frozen=True)
class WindowWorkload:
    """The workload of one window of a long video.

    Args:
        prompt_tokens: for each prompt, the tokens that the transformer reads.
        condition_tokens: tokens that conditions, the overlap and the anchor add.
        has_conditions: tokens have their own sigmas.
        reference_tokens: tokens of controls.
    """

    resolved_pass: ResolvedPass
    prompt_tokens: tuple[int, ...]
    condition_tokens: int
    has_conditions: bool
    reference_tokens: int = 0


def build_workload(
    resolved: ResolvedRequest,
    *,
    prompt_tokens: tuple[int, ...],
    tokens_to_encode: tuple[int, ...],
    stages: Collection[str] = (),
) -> Workload:
    """Returns the workload of a resolved request.

    Args:
        prompt_tokens: number of tokens of each of `ResolvedRequest.all_prompts`, or an upper bound.
        tokens_to_encode: see `Workload`; or an upper bound.
        stages: see `Workload`.
    """
    uses = _uses(resolved)
    return Workload(
        passes=resolved.passes,
        tokens_to_encode=tokens_to_encode if not stages or "text" in stages else (),
        prompt_tokens=prompt_tokens,
        encode_grids=tuple(_encode_grids(resolved, pass_index) for pass_index in range(len(resolved.passes))),
        condition_tokens=tuple(
            sum(condition.num_appended_tokens for condition in conditions) for conditions in _conditions(resolved)
        ),
        reference_tokens=() if resolved.spans else tuple(map(_count_reference_tokens, _media(resolved))),
        has_conditions=tuple(map(bool, _conditions(resolved))),
        guidance_batch=resolved.guidance_batch,
        step_cache=resolved.step_cache,
        stages=frozenset(stages),
        windows=_window_workloads(resolved, resolved.windows, prompt_tokens),
        image_bytes=max((prepare_bytes(use) for use in uses if not use.media.is_clip), default=0),
        frame_bytes=max((prepare_bytes(use) for use in uses if use.media.is_clip), default=0),
        prepared_pixels=sum(prepare_pixels(use) * len(use.media) for use in uses),
    )


def _uses(resolved: ResolvedRequest) -> list[PassFrames | PassControl]:
    """Returns every use of an image or clip that is prepared, each once."""
    conditions = [condition.frames for conditions in _conditions(resolved) for condition in conditions]
    conditions += [condition.frames for item in _media(resolved) for condition in item.conditions]
    input_videos = [item.input_video for item in _media(resolved) if item.input_video is not None]
    controls = [control for item in _media(resolved) for control in item.controls]
    return list(dict.fromkeys([*conditions, *input_videos, *controls]))


def _conditions(resolved: ResolvedRequest) -> tuple[tuple[PassCondition, ...], ...]:
    """Returns the conditions of each pass."""
    return resolved.conditions_by_pass or ((),) * len(resolved.passes)


def _media(resolved: ResolvedRequest) -> tuple[PassMedia, ...]:
    """Returns the media of each pass or window."""
    return resolved.media or (PassMedia(),) * len(resolved.window_passes or resolved.passes)


def _encode_grids(resolved: ResolvedRequest, pass_index: int) -> tuple[LatentGrid, ...]:
    """Returns the latent grids of everything encoded for a pass; of a long video, for all its windows."""
    media = _media(resolved) if resolved.spans else (_media(resolved)[pass_index],)
    input_videos = [item.input_video.grid for item in media if item.input_video is not None]
    references = [control.grid for item in media for control in item.controls]
    return (*(condition.grid for condition in _conditions(resolved)[pass_index]), *references, *input_videos)


def _count_reference_tokens(media: PassMedia) -> int:
    return sum(control.grid.num_tokens for control in media.controls)


def _window_workloads(
    resolved: ResolvedRequest, windows: Windows | None, prompt_tokens: tuple[int, ...]
) -> tuple[WindowWorkload, ...]:
    if windows is None:
        return ()
    workloads = []
    for resolved_pass, media in zip(resolved.window_passes, _media(resolved), strict=True):
        index, grid = resolved_pass.window_index, resolved_pass.grid
        guide_frames = (windows.latent_frames[1] if index else 0) + bool(windows.anchor_strength)
        workloads.append(
            WindowWorkload(
                resolved_pass=resolved_pass,
                prompt_tokens=(
                    prompt_tokens[resolved.prompt_index(index)],
                    *prompt_tokens[-1:] * resolved.uses_cfg,
                ),
                condition_tokens=sum(condition.num_appended_tokens for condition in media.conditions)
                + guide_frames * grid.height * grid.width,
                has_conditions=bool(media.conditions) or guide_frames > 0,
                reference_tokens=_count_reference_tokens(media),
            )
        )
    return tuple(workloads)
