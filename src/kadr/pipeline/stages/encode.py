"""Encode stage: opens conditions, input video and controls before anything is loaded, then VAE-encodes them.

Inputs are encoded separately for each pass, or for each window of a long video.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kadr.media.image import Notify
from kadr.pipeline.finite_check import FiniteCheck
from kadr.pipeline.modules import Modules
from kadr.pipeline.progress import StageProgress, Watch
from kadr.pipeline.retry import retry_in_fp32, retry_on_oom
from kadr.pipeline.stages.control_networks import build_map_renderers, fetch_networks
from kadr.pipeline.stages.overrides import NO_OVERRIDES, Overrides
from kadr.pipeline.stages.prepared_controls import PreparedControl
from kadr.pipeline.stages.prepared_frames import OpenedMedia, PreparedFrames
from kadr.planning.costs.vae_activations import ENCODE_CHUNK_FRAMES
from kadr.request.pass_media import PassCondition, PassControl, PassFrames, PassMedia
from kadr.request.resolved_request import ResolvedRequest


@dataclass(frozen=True)
class EncodedInputs:
    """Latents of one pass's or window's images and clips.

    Args:
        conditions: conditions with their latents, each (1, C, n, h, w).
        init_latents: latents of the input video; None if there is none.
        reference_latents: latents of the controls, each (1, C, f, h, w).
    """

    conditions: list[tuple[PassCondition, Tensor]]
    init_latents: Tensor | None = None
    reference_latents: list[Tensor] = field(default_factory=list)


class Media:
    """Images, clips and input video of one request, opened.

    Args:
        notify: called with a sentence about what kadr changes in an image, such as its transparent pixels.
        overrides: pixels that take the place of files.

    Raises:
        MediaError: a file cannot be read, or an image or clip is too small.
    """

    def __init__(
        self, resolved: ResolvedRequest, notify: Notify | None = None, overrides: Overrides = NO_OVERRIDES
    ) -> None:
        self.resolved, self._overrides = resolved, overrides
        uses = [frames.media for item in resolved.media for frames in _frames_of(item)]
        uses += [control.media for item in resolved.media for control in item.controls]
        files = [media for media in uses if media.path not in overrides.pixels]
        self._opened = OpenedMedia([*files, *(control.media for control in resolved.controls)], notify)
        all_frames = [condition.frames for conditions in resolved.conditions_by_pass for condition in conditions]
        all_frames += [frames for item in resolved.media for frames in _frames_of(item)]
        self.prepared_frames = {frames: self._prepare(frames) for frames in dict.fromkeys(all_frames)}
        self.prepared_controls = {
            control: PreparedControl.from_media(control, self._opened)
            for control in dict.fromkeys(control for item in resolved.media for control in item.controls)
        }

    def _prepare(self, frames: PassFrames) -> PreparedFrames:
        pixels = self._overrides.pixels.get(frames.media.path)
        if pixels is not None:
            return PreparedFrames.from_pixels(frames, pixels)
        return PreparedFrames.from_media(frames, self.resolved.image_crf, self._opened)

    @torch.no_grad()
    def encode(
        self,
        modules: Modules,
        watch: Watch,
        *,
        control_networks: dict[str, list[Path]] | None = None,
        indices: Collection[int] | None = None,
    ) -> list[EncodedInputs]:
        """Encodes the inputs of each pass or window with the VAE encoder.

        Args:
            control_networks: network files for control maps, from `fetch_networks`; None: fetched here.
            indices: windows to encode; None: all. Of the others, only the conditions of the first window are encoded,
                because it may hold the anchor image.
        """
        media = self.resolved.media
        if not any(item.conditions or item.controls or item.input_video for item in media):
            return [EncodedInputs([]) for _ in self.resolved.window_passes or self.resolved.passes]
        if indices is not None:
            media = tuple(
                item if index in indices else PassMedia(() if index else item.conditions)
                for index, item in enumerate(media)
            )
        controls = self._with_map_renderers(
            fetch_networks(self.resolved.controls) if control_networks is None else control_networks, watch
        )

        def prepared(key: PassFrames | PassControl) -> PreparedFrames | PreparedControl:
            return self.prepared_frames[key] if isinstance(key, PassFrames) else controls[key]

        draw_noise = self._overrides.draw_media_noise
        encode = retry_on_oom(modules, "encode", partial(_encode_inputs, modules, media, prepared, watch, draw_noise))
        return retry_in_fp32(modules, "encode", encode)

    def _with_map_renderers(self, networks: dict[str, list[Path]], watch: Watch) -> dict[PassControl, PreparedControl]:
        """Returns the prepared controls with the networks' estimates of their frames."""
        controls = self.resolved.controls
        frames = [self._opened.frames(control.media) for control in controls]
        renderers = build_map_renderers(controls, frames, networks, watch)
        renderer_by_control = {control.control: item for control, item in zip(controls, renderers, strict=True)}
        return {
            control: replace(prepared, map_renderer=renderer_by_control[control.control])
            for control, prepared in self.prepared_controls.items()
        }


def _frames_of(media: PassMedia) -> list[PassFrames]:
    """Returns the frames of a pass's or window's conditions and input video."""
    input_video = [] if media.input_video is None else [media.input_video]
    return [*(condition.frames for condition in media.conditions), *input_video]


def _encode_inputs(
    modules: Modules,
    media: Sequence[PassMedia],
    prepared: Callable[[PassFrames | PassControl], PreparedFrames | PreparedControl],
    watch: Watch,
    draw_noise: Callable[[str, torch.Size], Tensor] | None,
    dtype: torch.dtype | None,
) -> list[EncodedInputs]:
    """Encodes the inputs of all passes or windows.

    Args:
        draw_noise: see `Overrides.draw_media_noise`.
        dtype: dtype to compute in, instead of the plan's.
    """
    encoded: dict[PassFrames | PassControl, Tensor] = {}  # several windows may show one image
    count = len({key for item in media for key in (*_frames_of(item), *item.controls)})
    device = modules.device
    progress, finite_check = StageProgress("encode", count, watch), FiniteCheck.for_device(device)
    stage_dtype = dtype or modules.stage_dtype("encode")
    with modules.vae_encoder(dtype) as vae:

        def encode(key: PassFrames | PassControl) -> Tensor:
            if key not in encoded:
                pixels = prepared(key)
                chunks = pixels.chunks(ENCODE_CHUNK_FRAMES, device=device, dtype=stage_dtype)
                draw = None if draw_noise is None else partial(draw_noise, key.media.path)
                latents = vae.encode_stream(chunks, len(pixels.frames), draw).float()
                encoded[key] = latents
                finite_check.check(latents, f"image or clip {len(encoded)} of {count}")
                progress.report(len(encoded))
            return encoded[key]

        encoded_inputs = [
            EncodedInputs(
                [(condition, encode(condition.frames)) for condition in item.conditions],
                None if item.input_video is None else encode(item.input_video),
                [encode(control) for control in item.controls],
            )
            for item in media
        ]
        finite_check.synchronize()
    return encoded_inputs
