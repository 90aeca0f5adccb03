"""Encode stage: reads conditions, input video and controls before anything is loaded, then VAE-encodes them.

Inputs are prepared separately for each pass, or for each window of a long video.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kadr.pipeline.components import Components
from kadr.pipeline.finite_check import FiniteCheck
from kadr.pipeline.longvideo.sampling import check_inside_windows, conditions_in_window
from kadr.pipeline.progress import StageProgress, Watch
from kadr.pipeline.retry import retry_in_fp32, retry_on_oom
from kadr.pipeline.stages.control_networks import build_map_renderers, fetch_networks
from kadr.pipeline.stages.prepared_conditions import PreparedCondition, PreparedFrames, place_in_pass, prepare_condition
from kadr.pipeline.stages.prepared_controls import PreparedControl, prepare_control
from kadr.planning.vae_activations import ENCODE_CHUNK_FRAMES
from kadr.request.passes import ResolvedPass
from kadr.request.request import Request
from kadr.request.resolved_conditions import open_input_video, resolve_conditions
from kadr.request.resolved_controls import resolve_controls
from kadr.request.windows import Span
from kadr.shapes import LatentGrid, Size


@dataclass(frozen=True)
class PassInputs:
    """Prepared images and clips of one pass or window, not yet encoded.

    Args:
        conditions: conditions at their position in the pass or window.
        input_video: video to start from; None if there is none.
        controls: controls of the pass or window.
    """

    conditions: Sequence[PreparedCondition]
    input_video: PreparedFrames | None
    controls: Sequence[PreparedControl]


@dataclass(frozen=True)
class EncodedInputs:
    """Latents of one pass's or window's `PassInputs`.

    Args:
        conditions: conditions with their latents, each (1, C, n, h, w).
        init_latents: latents of the input video; None if there is none.
        reference_latents: latents of the controls, each (1, C, f, h, w).
    """

    conditions: list[tuple[PreparedCondition, Tensor]]
    init_latents: Tensor | None = None
    reference_latents: list[Tensor] = field(default_factory=list)


class Media:
    """Images, clips and input video of one complete request.

    Args:
        window_passes: passes of a long video's windows, with their `spans`; both empty for any other.
        reference_downscale: returns the factor by which references are smaller than the video; called only if the
            request has controls.
        read_files: read the files; decoding alone does not need them.

    Raises:
        MediaError: a file cannot be read, or an image or clip is too small.
        RequestError: a condition does not fit into the video.
    """

    def __init__(
        self,
        request: Request,
        passes: Sequence[ResolvedPass],
        window_passes: Sequence[ResolvedPass] = (),
        spans: Sequence[Span] = (),
        *,
        reference_downscale: Callable[[], int] = lambda: 1,
        read_files: bool = True,
    ) -> None:
        self.request = request
        self.resolved_conditions = resolve_conditions(request) if read_files else []
        if spans:
            check_inside_windows(self.resolved_conditions, spans)
        self.resolved_controls = resolve_controls(request) if read_files else []
        self.reference_downscale = reference_downscale() if self.resolved_controls else 1
        self.input_video = open_input_video(request) if read_files and request.input_video is not None else None
        self.has_windows = bool(spans)
        self.prepared_conditions = [self._prepare_conditions(resolved_pass) for resolved_pass in passes]
        conditions_per_pass = (
            [conditions_in_window(self.prepared_conditions[0], span) for span in spans]
            if spans
            else self.prepared_conditions
        )
        self.pass_inputs = [
            PassInputs(conditions, self._prepare_input_video(resolved_pass), self._prepare_controls(resolved_pass))
            for conditions, resolved_pass in zip(conditions_per_pass, window_passes or passes, strict=True)
        ]

    def _prepare_conditions(self, resolved_pass: ResolvedPass) -> list[PreparedCondition]:
        return [
            prepare_condition(condition, self.request, resolved_pass)
            for condition in place_in_pass(self.resolved_conditions, self.request, resolved_pass)
        ]

    def _prepare_controls(self, resolved_pass: ResolvedPass) -> list[PreparedControl]:
        return [
            prepare_control(control, self.request, resolved_pass, self.reference_downscale)
            for control in self.resolved_controls
        ]

    def _prepare_input_video(self, resolved_pass: ResolvedPass) -> PreparedFrames | None:
        """Returns the input video for a pass or window, with every second frame for a pass at half the frame rate."""
        if self.input_video is None or resolved_pass.number > 1:
            return None
        request = self.request
        assert isinstance(request.size, Size)
        assert request.image_crf is not None
        frames = self.input_video.select(resolved_pass.clip_frame_indices(request.fps, len(self.input_video)))
        return PreparedFrames.from_frames(frames, request.size, request.image_crf, resolved_pass.size, resize=True)

    def grids(self, pass_index: int) -> tuple[LatentGrid, ...]:
        """Returns the latent grids of everything encoded for a pass; of a long video, for all its windows."""
        pass_inputs = self.pass_inputs if self.has_windows else [self.pass_inputs[pass_index]]
        input_videos = [inputs.input_video.grid for inputs in pass_inputs if inputs.input_video is not None]
        references = [control.grid for inputs in pass_inputs for control in inputs.controls]
        return (*(condition.grid for condition in self.prepared_conditions[pass_index]), *references, *input_videos)

    @torch.no_grad()
    def encode(
        self,
        components: Components,
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
        if not any(inputs.conditions or inputs.controls or inputs.input_video for inputs in self.pass_inputs):
            return [EncodedInputs([]) for _ in self.pass_inputs]
        map_renderers = build_map_renderers(
            self.resolved_controls,
            fetch_networks(self.resolved_controls) if control_networks is None else control_networks,
            watch,
        )
        pass_inputs = []
        for index, inputs in enumerate(self.pass_inputs):
            controls = [
                replace(control, map_renderer=map_renderer)
                for control, map_renderer in zip(inputs.controls, map_renderers, strict=True)
            ]
            if indices is None or index in indices:
                pass_inputs.append(PassInputs(inputs.conditions, inputs.input_video, controls))
            else:
                pass_inputs.append(PassInputs([] if index else inputs.conditions, None, []))
        encode = retry_on_oom(components, "encode", partial(_encode_inputs, components, pass_inputs, watch))
        return retry_in_fp32("encode", components.stage_dtype("encode"), encode)


def _encode_inputs(
    components: Components, pass_inputs: Sequence[PassInputs], watch: Watch, dtype: torch.dtype | None
) -> list[EncodedInputs]:
    """Encodes the inputs of all passes or windows. dtype: dtype to compute in, instead of the plan's."""
    latents_by_id: dict[int, Tensor] = {}  # keyed by id of the pixels: several windows may show one image
    count = len({id(condition.pixels) for inputs in pass_inputs for condition in inputs.conditions})
    count += sum(len(inputs.controls) + (inputs.input_video is not None) for inputs in pass_inputs)
    device = components.device
    progress, finite_check = StageProgress("encode", count, watch), FiniteCheck.for_device(device)
    stage_dtype, done = dtype or components.stage_dtype("encode"), 0
    with components.vae_encoder(dtype) as vae:

        def encode(pixels: PreparedFrames | PreparedControl) -> Tensor:
            nonlocal done
            if id(pixels) in latents_by_id:
                return latents_by_id[id(pixels)]
            chunks = pixels.chunks(ENCODE_CHUNK_FRAMES, device=device, dtype=stage_dtype)
            latents = vae.encode_stream(chunks, len(pixels.frames)).float()
            done += 1
            finite_check.check(latents, f"image or clip {done} of {count}")
            progress.report(done)
            latents_by_id[id(pixels)] = latents
            return latents

        encoded_inputs = [
            EncodedInputs(
                [(condition, encode(condition.pixels)) for condition in inputs.conditions],
                None if inputs.input_video is None else encode(inputs.input_video),
                [encode(control) for control in inputs.controls],
            )
            for inputs in pass_inputs
        ]
        finite_check.synchronize()
    return encoded_inputs
