"""The stage of pictures and clips: looked into before anything is loaded, and through the VAE's encoder.

What is encoded is fitted to what is sampled by itself: a pass, or a window of a long video.
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
from kadr.request.passes import ResolvedPass
from kadr.request.request import Request
from kadr.request.resolved_conditions import open_input_video, resolve_conditions
from kadr.request.resolved_controls import resolve_controls
from kadr.request.windows import Span
from kadr.shapes import LatentGrid, Size

ENCODE_CHUNK_FRAMES = 8  # pixel frames that go through the encoder at a time


@dataclass(frozen=True)
class PassInputs:
    """What one pass or window is shown.

    Args:
        conditions: the conditions, where they stand in it.
        input_video: of the video that it starts from; None where there is none.
        controls: the controls.
    """

    conditions: Sequence[PreparedCondition]
    input_video: PreparedFrames | None
    controls: Sequence[PreparedControl]


@dataclass(frozen=True)
class EncodedInputs:
    """What the VAE made of that.

    Args:
        conditions: the conditions with their latents, each (1, C, n, h, w).
        init_latents: latents of the video to start from; None where there is none.
        reference_latents: latents of the controls, each (1, C, f, h, w).
    """

    conditions: list[tuple[PreparedCondition, Tensor]]
    init_latents: Tensor | None = None
    reference_latents: list[Tensor] = field(default_factory=list)


class Media:
    """The pictures and clips of one request, in which nothing is open that has a default.

    Args:
        window_passes: of a long video, with their `spans`; both empty for any other.
        reference_downscale: says how many times smaller than the video references are, if there are any.
        read_files: look into them; decoding alone does without.

    Raises:
        MediaError: one cannot be read, or is too small.
        RequestError: one has no place.
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
        self.prepared_conditions = [self._prepare_conditions(plan) for plan in passes]
        stretches = window_passes or passes
        own = (
            [conditions_in_window(self.prepared_conditions[0], span) for span in spans]
            if spans
            else self.prepared_conditions
        )
        self.pass_inputs = [
            PassInputs(items, self._prepare_input_video(plan), self._prepare_controls(plan))
            for items, plan in zip(own, stretches, strict=True)
        ]

    def _prepare_conditions(self, resolved_pass: ResolvedPass) -> list[PreparedCondition]:
        return [
            prepare_condition(item, self.request, resolved_pass)
            for item in place_in_pass(self.resolved_conditions, self.request, resolved_pass)
        ]

    def _prepare_controls(self, resolved_pass: ResolvedPass) -> list[PreparedControl]:
        return [
            prepare_control(one, self.request, resolved_pass, self.reference_downscale)
            for one in self.resolved_controls
        ]

    def _prepare_input_video(self, resolved_pass: ResolvedPass) -> PreparedFrames | None:
        """What a pass or window makes of the video to start from; of every second frame, where it makes only those."""
        if self.input_video is None or resolved_pass.number > 1:
            return None
        request = self.request
        assert isinstance(request.size, Size)
        assert request.image_crf is not None
        film = self.input_video.select(resolved_pass.clip_frame_indices(request.fps, len(self.input_video)))
        return PreparedFrames.from_frames(film, request.size, request.image_crf, resolved_pass.size, resize=True)

    def grids(self, pass_index: int) -> tuple[LatentGrid, ...]:
        """Of all that is encoded for a pass; of a long video, for all of it."""
        shown = self.pass_inputs if self.has_windows else [self.pass_inputs[pass_index]]
        starts = [one.input_video.grid for one in shown if one.input_video is not None]
        references = [each.grid for one in shown for each in one.controls]
        return (*(item.grid for item in self.prepared_conditions[pass_index]), *references, *starts)

    @torch.no_grad()
    def encode(
        self,
        components: Components,
        watch: Watch,
        *,
        control_networks: dict[str, list[Path]] | None = None,
        indices: Collection[int] | None = None,
    ) -> list[EncodedInputs]:
        """All of it through the encoder, for each pass or window.

        Args:
            control_networks: that find what controls show, as `fetched` gives them.
            indices: the windows that are to be made; None: all. Of what the others were shown, the conditions of the
                first one alone are encoded, because a picture may be remembered.
        """
        if not any(one.conditions or one.controls or one.input_video for one in self.pass_inputs):
            return [EncodedInputs([]) for _ in self.pass_inputs]
        ways = build_map_renderers(
            self.resolved_controls,
            fetch_networks(self.resolved_controls) if control_networks is None else control_networks,
            watch,
        )
        shown = []
        for number, one in enumerate(self.pass_inputs):
            drawn = [replace(each, map_renderer=way) for each, way in zip(one.controls, ways, strict=True)]
            if indices is None or number in indices:
                shown.append(PassInputs(one.conditions, one.input_video, drawn))
            else:
                shown.append(PassInputs([] if number else one.conditions, None, []))
        run = retry_on_oom(components, "encode", partial(_encode_inputs, components, shown, watch))
        return retry_in_fp32("encode", components.stage_dtype("encode"), run)


def _encode_inputs(
    components: Components, pass_inputs: Sequence[PassInputs], watch: Watch, dtype: torch.dtype | None
) -> list[EncodedInputs]:
    """All that is shown through the encoder. dtype: to compute in, instead of the plan's."""
    known: dict[int, Tensor] = {}  # by the identity of its pixels: a picture may stand in several windows
    count = len({id(item.pixels) for one in pass_inputs for item in one.conditions})
    count += sum(len(one.controls) + (one.input_video is not None) for one in pass_inputs)
    device = components.device
    stage, watchman = StageProgress("encode", count, watch), FiniteCheck.for_device(device)
    own, done = dtype or components.stage_dtype("encode"), 0
    with components.vae_encoder(dtype) as vae:

        def encode(pixels: PreparedFrames | PreparedControl) -> Tensor:
            nonlocal done
            if id(pixels) in known:
                return known[id(pixels)]
            chunks = pixels.chunks(ENCODE_CHUNK_FRAMES, device=device, dtype=own)
            latents = vae.encode_stream(chunks, len(pixels.frames)).float()
            done += 1
            watchman.check(latents, f"picture or clip {done} of {count}")
            stage.report(done)
            known[id(pixels)] = latents
            return latents

        made = [
            EncodedInputs(
                [(item, encode(item.pixels)) for item in one.conditions],
                None if one.input_video is None else encode(one.input_video),
                [encode(each) for each in one.controls],
            )
            for one in pass_inputs
        ]
        watchman.synchronize()
    return made
