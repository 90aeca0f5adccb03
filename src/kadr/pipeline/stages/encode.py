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
from kadr.pipeline.longvideo.sampling import check_placed, in_window
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

ENCODE_FRAMES = 8  # pixel frames that go through the encoder at a time


@dataclass(frozen=True)
class Shown:
    """What one pass or window is shown.

    Args:
        items: the conditions, where they stand in it.
        start: of the video that it starts from; None where there is none.
        references: the controls.
    """

    items: Sequence[PreparedCondition]
    start: PreparedFrames | None
    references: Sequence[PreparedControl]


@dataclass(frozen=True)
class Encoded:
    """What the VAE made of that.

    Args:
        items: the conditions with their latents, each (1, C, n, h, w).
        start: latents of the video to start from; None where there is none.
        references: latents of the controls, each (1, C, f, h, w).
    """

    items: list[tuple[PreparedCondition, Tensor]]
    start: Tensor | None = None
    references: list[Tensor] = field(default_factory=list)


class Media:
    """The pictures and clips of one request, in which nothing is open that has a default.

    Args:
        windows: of a long video, with their `spans`; both empty for any other.
        downscale: says how many times smaller than the video references are, if there are any.
        read: look into them; decoding alone does without.

    Raises:
        MediaError: one cannot be read, or is too small.
        RequestError: one has no place.
    """

    def __init__(
        self,
        request: Request,
        passes: Sequence[ResolvedPass],
        windows: Sequence[ResolvedPass] = (),
        spans: Sequence[Span] = (),
        *,
        downscale: Callable[[], int] = lambda: 1,
        read: bool = True,
    ) -> None:
        self.request = request
        self.placed = resolve_conditions(request) if read else []
        if spans:
            check_placed(self.placed, spans)
        self.followed = resolve_controls(request) if read else []
        self.downscale = downscale() if self.followed else 1
        self.film = open_input_video(request) if read and request.input_video is not None else None
        self.windowed = bool(spans)
        self.fitted = [self._fitted(plan) for plan in passes]
        stretches = windows or passes
        own = [in_window(self.fitted[0], span) for span in spans] if spans else self.fitted
        self.shown = [
            Shown(items, self._start(plan), self._references(plan)) for items, plan in zip(own, stretches, strict=True)
        ]

    def _fitted(self, plan: ResolvedPass) -> list[PreparedCondition]:
        return [prepare_condition(item, self.request, plan) for item in place_in_pass(self.placed, self.request, plan)]

    def _references(self, plan: ResolvedPass) -> list[PreparedControl]:
        return [prepare_control(one, self.request, plan, self.downscale) for one in self.followed]

    def _start(self, plan: ResolvedPass) -> PreparedFrames | None:
        """What a pass or window makes of the video to start from; of every second frame, where it makes only those."""
        if self.film is None or plan.number > 1:
            return None
        request = self.request
        assert isinstance(request.size, Size)
        assert request.image_crf is not None
        film = self.film.select(plan.clip_frame_indices(request.fps, len(self.film)))
        return PreparedFrames.from_frames(film, request.size, request.image_crf, plan.size, resize=True)

    def grids(self, number: int) -> tuple[LatentGrid, ...]:
        """Of all that is encoded for a pass; of a long video, for all of it."""
        shown = self.shown if self.windowed else [self.shown[number]]
        starts = [one.start.grid for one in shown if one.start is not None]
        references = [each.grid for one in shown for each in one.references]
        return (*(item.grid for item in self.fitted[number]), *references, *starts)

    @torch.no_grad()
    def encoded(
        self,
        components: Components,
        watch: Watch,
        *,
        networks: dict[str, list[Path]] | None = None,
        wanted: Collection[int] | None = None,
    ) -> list[Encoded]:
        """All of it through the encoder, for each pass or window.

        Args:
            networks: that find what controls show, as `fetched` gives them.
            wanted: the windows that are to be made; None: all. Of what the others were shown, the conditions of the
                first one alone are encoded, because a picture may be remembered.
        """
        if not any(one.items or one.references or one.start for one in self.shown):
            return [Encoded([]) for _ in self.shown]
        ways = build_map_renderers(
            self.followed, fetch_networks(self.followed) if networks is None else networks, watch
        )
        shown = []
        for number, one in enumerate(self.shown):
            drawn = [replace(each, map_renderer=way) for each, way in zip(one.references, ways, strict=True)]
            if wanted is None or number in wanted:
                shown.append(Shown(one.items, one.start, drawn))
            else:
                shown.append(Shown([] if number else one.items, None, []))
        run = retry_on_oom(components, "encode", partial(_through, components, shown, watch))
        return retry_in_fp32("encode", components.stage_dtype("encode"), run)


def _through(components: Components, shown: Sequence[Shown], watch: Watch, dtype: torch.dtype | None) -> list[Encoded]:
    """All that is shown through the encoder. dtype: to compute in, instead of the plan's."""
    known: dict[int, Tensor] = {}  # by the identity of its pixels: a picture may stand in several windows
    count = len({id(item.pixels) for one in shown for item in one.items})
    count += sum(len(one.references) + (one.start is not None) for one in shown)
    device = components.device
    stage, watchman = StageProgress("encode", count, watch), FiniteCheck.for_device(device)
    own, done = dtype or components.stage_dtype("encode"), 0
    with components.vae_encoder(dtype) as vae:

        def encode(pixels: PreparedFrames | PreparedControl) -> Tensor:
            nonlocal done
            if id(pixels) in known:
                return known[id(pixels)]
            chunks = pixels.chunks(ENCODE_FRAMES, device=device, dtype=own)
            latents = vae.encode_stream(chunks, len(pixels.frames)).float()
            done += 1
            watchman.check(latents, f"picture or clip {done} of {count}")
            stage.report(done)
            known[id(pixels)] = latents
            return latents

        made = [
            Encoded(
                [(item, encode(item.pixels)) for item in one.items],
                None if one.start is None else encode(one.start),
                [encode(each) for each in one.references],
            )
            for one in shown
        ]
        watchman.synchronize()
    return made
