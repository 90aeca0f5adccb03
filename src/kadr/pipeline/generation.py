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
from kadr.pipeline.longvideo.sampling import (
    Guide,
    InMemoryWindowStore,
    WindowedLatents,
    WindowStore,
    is_anchor_image,
    missing_windows,
    sample_windows,
)
from kadr.pipeline.progress import Watch
from kadr.pipeline.retry import retry_in_fp32
from kadr.pipeline.stages.control_networks import fetch_networks
from kadr.pipeline.stages.decode import DecodeStage
from kadr.pipeline.stages.denoise import DenoiseStage
from kadr.pipeline.stages.encode import EncodedInputs, Media
from kadr.pipeline.stages.prepared_conditions import count_appended_tokens
from kadr.pipeline.stages.text import PromptEncoder
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
        read_media: read the request's pictures and clips; decoding alone does without.
    """

    def __init__(self, components: Components, request: Request, watch: Watch, *, read_media: bool = True) -> None:
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
        self.window_passes = resolve_window_passes(request, components.schedules[0])
        self.spans = () if request.windows is None else request.windows.spans(self.frames)
        self.noise_streams = NoiseStreams(request.seed)
        self.device = components.device
        self.uses_cfg = any(plan.uses_cfg for plan in self.passes)
        own = dict.fromkeys(request.prompts)
        self.prompt_encoder = PromptEncoder(components, [*own, *([request.negative_prompt or ""] * self.uses_cfg)])
        # Media is read before any weight is: a file that cannot be read must cost nothing.
        downscale = partial(components.loras.reference_downscale, request.lora_strengths)
        self.media = Media(
            request, self.passes, self.window_passes, self.spans, reference_downscale=downscale, read_files=read_media
        )
        self.denoise_stage = DenoiseStage(
            components, request, self.noise_streams, watch, self.media.reference_downscale
        )

    def latents_shape(self, pass_index: int) -> tuple[int, ...]:
        """Of the latents of a pass: (1, C, f, h, w)."""
        return self._latents_shape(self.passes[pass_index])

    def _latents_shape(self, resolved_pass: ResolvedPass) -> tuple[int, ...]:
        grid = resolved_pass.grid
        return 1, self.components.transformer_config.in_channels, grid.frames, grid.height, grid.width

    def build_workload(self, stages: Collection[str] = ()) -> Workload:
        """What is to be done, for the plan. stages: those to be run; () is all."""
        media, numbers = self.media, range(len(self.passes))
        context = (
            []
            if self.window_passes
            else [sum(each.grid.num_tokens for each in one.controls) for one in media.pass_inputs]
        )
        return Workload(
            passes=self.passes,
            prompts_to_encode=self.prompt_encoder.uncached_count if not stages or "text" in stages else 0,
            prompt_tokens=self.prompt_encoder.token_counts,
            encode_grids=tuple(media.grids(number) for number in numbers),
            condition_tokens=tuple(sum(map(count_appended_tokens, items)) for items in media.prepared_conditions),
            reference_tokens=tuple(context),
            has_conditions=tuple(bool(items) for items in media.prepared_conditions),
            guidance_batch=bool(self.request.guidance_batch),
            step_cache=self.request.step_cache,
            stages=frozenset(stages),
            windows=tuple(self._build_window_workload(plan) for plan in self.window_passes),
        )

    def _build_window_workload(self, resolved_pass: ResolvedPass) -> WindowWorkload:
        shown, windows = self.media.pass_inputs[resolved_pass.window_index], self.request.windows
        assert windows is not None
        guides = (windows.latent_frames[1] if resolved_pass.window_index else 0) + bool(windows.anchor_strength)
        context = sum(each.grid.num_tokens for each in shown.controls)
        lengths = self.prompt_encoder.token_counts
        return WindowWorkload(
            resolved_pass=resolved_pass,
            prompt_tokens=(lengths[self._prompt_index(resolved_pass.window_index)], *lengths[-1:] * self.uses_cfg),
            condition_tokens=sum(map(count_appended_tokens, shown.conditions))
            + guides * resolved_pass.grid.height * resolved_pass.grid.width,
            has_conditions=bool(shown.conditions) or guides > 0,
            reference_tokens=context,
        )

    def _prompt_index(self, window_index: int) -> int:
        """Which of the prompts that are encoded a window shows; the last one holds for the rest."""
        prompts = self.request.prompts
        return self.prompt_encoder.prompts.index(prompts[min(window_index, len(prompts) - 1)])

    @torch.no_grad()
    def denoise(self, noise: Tensor | None = None, *, init_latents: Tensor | None = None) -> Tensor:
        """Everything up to the decoder: normalised latents (1, C, f, h, w), fp32, on the device.

        Args:
            noise: shaped as the latents of the first pass, instead of the seed's.
            init_latents: normalised latents to begin from, at the first level of a schedule that leaves out pure noise.
        """
        self._check_initial_tensors(noise, init_latents)
        if self.window_passes:
            return self.denoise_windows(InMemoryWindowStore(), noise).to_tensor().to(self.device)
        networks = fetch_networks(self.media.resolved_controls)
        texts = self.prompt_encoder.encode(self.watch)
        media = self.encode_media(networks)
        begun = self._add_initial_noise(
            self.passes[0], noise, media[0].init_latents if init_latents is None else init_latents
        )
        latents = self.denoise_stage.denoise_pass(self.passes[0], begun, media[0], texts)
        for number, plan in enumerate(self.passes[1:], 1):
            larger = retry_in_fp32("upscale", torch.float32, partial(upscaled, self.components, latents, self.watch))
            latents = self.denoise_stage.denoise_pass(
                plan, self._add_initial_noise(plan, None, larger), media[number], texts
            )
        return latents

    @torch.no_grad()
    def denoise_windows(self, store: WindowStore, noise: Tensor | None = None) -> WindowedLatents:
        """The latents of a long video; the windows that `store` does not have are made, one by one.

        Args:
            noise: (1, C, f, h, w) of the whole video, instead of the seed's.
        """
        windows = self.request.windows
        assert windows is not None
        self._check_initial_tensors(noise, None)
        wanted = missing_windows(store, self.spans)
        if not wanted:
            return WindowedLatents(self.spans, store.read)
        networks = fetch_networks(self.media.resolved_controls)
        texts = self.prompt_encoder.encode(self.watch)
        media = self.encode_media(networks, wanted)

        def sample(number: int, guides: Sequence[Guide]) -> Tensor:
            plan, span = self.window_passes[number], self.spans[number]
            own = None if noise is None else noise[:, :, span.start : span.end]
            read = [texts[self._prompt_index(number)], *texts[-1:] * plan.uses_cfg]
            return self.denoise_stage.denoise_pass(
                plan, self._add_initial_noise(plan, own, media[number].init_latents), media[number], read, guides
            )

        pictures = (held for item, held in media[0].conditions if is_anchor_image(item))
        picture = next(pictures, None) if windows.anchor_strength else None
        return sample_windows(windows, self.spans, store, sample, picture)

    def encode_media(
        self, control_networks: dict[str, list[Path]] | None = None, indices: Collection[int] | None = None
    ) -> list[EncodedInputs]:
        """The request's media through the VAE's encoder, for each pass or window; see `Media.encode`."""
        return self.media.encode(self.components, self.watch, control_networks=control_networks, indices=indices)

    def window_latents_shapes(self) -> list[tuple[int, ...]]:
        """Of what each window keeps, (1, C, n, h, w)."""
        _, channels, _, height, width = self.latents_shape(0)
        return [(1, channels, span.end - span.output_start, height, width) for span in self.spans]

    @torch.no_grad()
    def decode(self, latents: Tensor | WindowedLatents, noise: Tensor | None = None) -> Iterator[Tensor]:
        """Decode latents (1, C, f, h, w): yields uint8 (n, H, W, 3) on the CPU, cropped and trimmed as asked.

        Those of a long video may come piece by piece.
        """
        if isinstance(latents, Tensor):
            self._require_shape(len(self.passes) - 1, latents=latents, noise=noise)
            latents = WindowedLatents.from_latents(latents, self.spans) if self.spans else latents.to(self.device)
        decoding = DecodeStage(
            self.components, self.request, self.passes[-1], self.spans, self.noise_streams, self.watch
        )
        yield from decoding.decode(latents, noise)

    def _check_initial_tensors(self, noise: Tensor | None, init_latents: Tensor | None) -> None:
        """Refuse noise and latents that do not fit, and schedules that do not fit what is started from."""
        self._require_shape(0, noise=noise, start=init_latents)
        if init_latents is not None and self.window_passes:
            raise RequestError(
                "latents to start from are given, and windows too; a long video begins at noise, or from a video."
            )
        if init_latents is not None and self.media.input_video is not None:
            raise RequestError("latents to start from are given, and a video too; give the one or the other.")
        self.check_first_sigma(has_init_latents=init_latents is not None)

    def check_first_sigma(self, *, has_init_latents: bool = False) -> None:
        """Refuse levels that do not fit what is begun from. started: latents to start from are given.

        Raises:
            RequestError: see `passes.check_beginning`.
        """
        check_first_sigma(self.passes[0], has_init_latents=has_init_latents or self.media.input_video is not None)

    def _add_initial_noise(
        self, resolved_pass: ResolvedPass, noise: Tensor | None, clean_latents: Tensor | None
    ) -> Tensor:
        """The latents at the first level: noise, or what is there with so much noise mixed in."""
        if noise is None:
            noise = self.noise_streams.draw(
                noise_stream_name(resolved_pass, "initial"), self._latents_shape(resolved_pass)
            )
        noise = noise.float().to(self.device)
        if clean_latents is None:
            return noise
        first = float(resolved_pass.sigmas[0])
        return first * noise + (1 - first) * clean_latents.to(noise)

    def _require_shape(self, pass_index: int, **tensors: Tensor | None) -> None:
        plan, shape = self.passes[pass_index], self.latents_shape(pass_index)
        for name, tensor in tensors.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise RequestError(
                    f"{name}: the shape is {tuple(tensor.shape)}; for {plan.size} and {plan.frames} frames it must be "
                    f"{shape}."
                )
