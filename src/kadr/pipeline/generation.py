"""One generation, stage by stage: text, pictures, denoising, a second pass where one is asked for, decoding.

Data goes one way. A stage takes its module from the shelf and gives it back before the next one takes its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kadr.errors import RequestError
from kadr.pipeline.components import Components
from kadr.pipeline.longvideo.sampling import Guide, InMemory, Kept, Pieces, is_first_picture, missing, sample_windows
from kadr.pipeline.progress import Watch
from kadr.pipeline.retry import retry_in_fp32
from kadr.pipeline.stages.control_networks import fetch_networks
from kadr.pipeline.stages.decode import Decoding
from kadr.pipeline.stages.denoise import Denoising
from kadr.pipeline.stages.encode import Encoded, Media
from kadr.pipeline.stages.prepared_conditions import count_appended_tokens
from kadr.pipeline.stages.text import Prompts
from kadr.pipeline.stages.upscale import upscaled
from kadr.planning.workload import WindowWorkload, Workload
from kadr.request.passes import (
    ResolvedPass,
    check_first_sigma,
    check_skip_blocks,
    noise_stream_name,
    resolve_passes,
    resolve_window_passes,
    warn_step_cache,
)
from kadr.request.request import Request
from kadr.sampling.noise import NoiseStreams
from kadr.shapes import Size


class Generation:
    """One request on its way. The request is complete: nothing in it is None that has a default.

    Args:
        components: the model's parts, on disk until a stage needs them.
        watch: sees every step.
        media: read the request's pictures and clips; decoding alone does without.
    """

    def __init__(self, components: Components, request: Request, watch: Watch, *, media: bool = True) -> None:
        assert isinstance(request.size, Size)
        assert request.frames is not None
        self.components, self.request, self.watch = components, request, watch
        self.size, self.frames = request.size, request.frames
        self.passes = resolve_passes(request, components.schedules, upscaling=components.upscaling)
        for number, plan in enumerate(self.passes):
            check_skip_blocks(plan, components.transformer_config_of(number).num_layers)
            warn_step_cache(plan, request.step_cache)
            components.loras.strengths(number, request.lora_strengths)  # refuses what is none
        components.loras.check_merge(len(self.passes), components.transformer_checkpoints)
        self.windows = resolve_window_passes(request, components.schedules[0])
        self.spans = () if request.windows is None else request.windows.spans(self.frames)
        self.noise = NoiseStreams(request.seed)
        self.device = components.device
        self.guided = any(plan.uses_cfg for plan in self.passes)
        own = dict.fromkeys(request.prompts)
        self.prompts = Prompts(components, [*own, *([request.negative_prompt or ""] * self.guided)])
        # Media is read before any weight is: a file that cannot be read must cost nothing.
        downscale = partial(components.loras.reference_downscale, request.lora_strengths)
        self.media = Media(request, self.passes, self.windows, self.spans, downscale=downscale, read=media)
        self.denoising = Denoising(components, request, self.noise, watch, self.media.downscale)

    def shape(self, number: int) -> tuple[int, ...]:
        """Of the latents of a pass: (1, C, f, h, w)."""
        return self._shape(self.passes[number])

    def _shape(self, plan: ResolvedPass) -> tuple[int, ...]:
        grid = plan.grid
        return 1, self.components.transformer_config.in_channels, grid.frames, grid.height, grid.width

    def work(self, stages: Collection[str] = ()) -> Workload:
        """What is to be done, for the plan. stages: those to be run; () is all."""
        media, numbers = self.media, range(len(self.passes))
        context = [] if self.windows else [sum(each.grid.num_tokens for each in one.references) for one in media.shown]
        return Workload(
            passes=self.passes,
            prompts_to_encode=self.prompts.missing if not stages or "text" in stages else 0,
            prompt_tokens=self.prompts.lengths,
            encode_grids=tuple(media.grids(number) for number in numbers),
            condition_tokens=tuple(sum(map(count_appended_tokens, items)) for items in media.fitted),
            reference_tokens=tuple(context),
            has_conditions=tuple(bool(items) for items in media.fitted),
            guidance_batch=bool(self.request.guidance_batch),
            step_cache=self.request.step_cache,
            stages=frozenset(stages),
            windows=tuple(self._window_work(plan) for plan in self.windows),
        )

    def _window_work(self, plan: ResolvedPass) -> WindowWorkload:
        shown, windows = self.media.shown[plan.window_index], self.request.windows
        assert windows is not None
        guides = (windows.latent_frames[1] if plan.window_index else 0) + bool(windows.anchor_strength)
        context = sum(each.grid.num_tokens for each in shown.references)
        lengths = self.prompts.lengths
        return WindowWorkload(
            resolved_pass=plan,
            prompt_tokens=(lengths[self._prompt(plan.window_index)], *lengths[-1:] * self.guided),
            condition_tokens=sum(map(count_appended_tokens, shown.items)) + guides * plan.grid.height * plan.grid.width,
            has_conditions=bool(shown.items) or guides > 0,
            reference_tokens=context,
        )

    def _prompt(self, window: int) -> int:
        """Which of the prompts that are encoded a window shows; the last one holds for the rest."""
        prompts = self.request.prompts
        return self.prompts.texts.index(prompts[min(window, len(prompts) - 1)])

    @torch.no_grad()
    def latents(self, noise: Tensor | None = None, *, start: Tensor | None = None) -> Tensor:
        """Everything up to the decoder: normalised latents (1, C, f, h, w), fp32, on the device.

        Args:
            noise: shaped as the latents of the first pass, instead of the seed's.
            start: normalised latents to begin from, at the first level of a schedule that leaves out pure noise.
        """
        self._check_start(noise, start)
        if self.windows:
            return self.windowed(InMemory(), noise).whole().to(self.device)
        networks = fetch_networks(self.media.followed)
        texts = self.prompts.encoded(self.watch)
        media = self.media_encoded(networks)
        begun = self._begun(self.passes[0], noise, media[0].start if start is None else start)
        latents = self.denoising.sampled(self.passes[0], begun, media[0], texts)
        for number, plan in enumerate(self.passes[1:], 1):
            larger = retry_in_fp32("upscale", torch.float32, partial(upscaled, self.components, latents, self.watch))
            latents = self.denoising.sampled(plan, self._begun(plan, None, larger), media[number], texts)
        return latents

    @torch.no_grad()
    def windowed(self, kept: Kept, noise: Tensor | None = None) -> Pieces:
        """The latents of a long video; the windows that `kept` does not have are made, one by one.

        Args:
            noise: (1, C, f, h, w) of the whole video, instead of the seed's.
        """
        windows = self.request.windows
        assert windows is not None
        self._check_start(noise, None)
        wanted = missing(kept, self.spans)
        if not wanted:
            return Pieces(self.spans, kept.read)
        networks = fetch_networks(self.media.followed)
        texts = self.prompts.encoded(self.watch)
        media = self.media_encoded(networks, wanted)

        def sample(number: int, guides: Sequence[Guide]) -> Tensor:
            plan, span = self.windows[number], self.spans[number]
            own = None if noise is None else noise[:, :, span.start : span.end]
            read = [texts[self._prompt(number)], *texts[-1:] * plan.uses_cfg]
            return self.denoising.sampled(
                plan, self._begun(plan, own, media[number].start), media[number], read, guides
            )

        pictures = (held for item, held in media[0].items if is_first_picture(item))
        picture = next(pictures, None) if windows.anchor_strength else None
        return sample_windows(windows, self.spans, kept, sample, picture)

    def media_encoded(
        self, networks: dict[str, list[Path]] | None = None, wanted: Collection[int] | None = None
    ) -> list[Encoded]:
        """The request's media through the VAE's encoder, for each pass or window; see `Media.encoded`."""
        return self.media.encoded(self.components, self.watch, networks=networks, wanted=wanted)

    def kept_shapes(self) -> list[tuple[int, ...]]:
        """Of what each window keeps, (1, C, n, h, w)."""
        _, channels, _, height, width = self.shape(0)
        return [(1, channels, span.end - span.output_start, height, width) for span in self.spans]

    @torch.no_grad()
    def pixels(self, latents: Tensor | Pieces, noise: Tensor | None = None) -> Iterator[Tensor]:
        """Decode latents (1, C, f, h, w): yields uint8 (n, H, W, 3) on the CPU, cropped and trimmed as asked.

        Those of a long video may come piece by piece.
        """
        if isinstance(latents, Tensor):
            self._require_shape(len(self.passes) - 1, latents=latents, noise=noise)
            latents = Pieces.of(latents, self.spans) if self.spans else latents.to(self.device)
        decoding = Decoding(self.components, self.request, self.passes[-1], self.spans, self.noise, self.watch)
        yield from decoding.frames(latents, noise)

    def _check_start(self, noise: Tensor | None, start: Tensor | None) -> None:
        """Refuse noise and latents that do not fit, and schedules that do not fit what is started from."""
        self._require_shape(0, noise=noise, start=start)
        if start is not None and self.windows:
            raise RequestError(
                "latents to start from are given, and windows too; a long video begins at noise, or from a video."
            )
        if start is not None and self.media.film is not None:
            raise RequestError("latents to start from are given, and a video too; give the one or the other.")
        self.check_beginning(started=start is not None)

    def check_beginning(self, *, started: bool = False) -> None:
        """Refuse levels that do not fit what is begun from. started: latents to start from are given.

        Raises:
            RequestError: see `passes.check_beginning`.
        """
        check_first_sigma(self.passes[0], has_init_latents=started or self.media.film is not None)

    def _begun(self, plan: ResolvedPass, noise: Tensor | None, start: Tensor | None) -> Tensor:
        """The latents at the first level: noise, or what is there with so much noise mixed in."""
        if noise is None:
            noise = self.noise.draw(noise_stream_name(plan, "initial"), self._shape(plan))
        noise = noise.float().to(self.device)
        if start is None:
            return noise
        first = float(plan.sigmas[0])
        return first * noise + (1 - first) * start.to(noise)

    def _require_shape(self, number: int, **tensors: Tensor | None) -> None:
        plan, shape = self.passes[number], self.shape(number)
        for name, tensor in tensors.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise RequestError(
                    f"{name}: the shape is {tuple(tensor.shape)}; for {plan.size} and {plan.frames} frames it must be "
                    f"{shape}."
                )
