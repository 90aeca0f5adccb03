"""One generation, stage by stage: text encoder -> condition encode -> sampler -> (upscale, sampler) -> VAE decode.

Data goes one way. Each stage acquires its module from the cache and releases it before the next stage acquires its own.
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
from kadr.pipeline.stages.upscale import upscale_latents
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
    """One video on its way from a complete request, in which no field with a default is None.

    Args:
        components: components of the model, on disk until a stage needs them.
        watch: called after every step.
        read_media: read the request's images and clips; decoding alone does not need them.
    """

    def __init__(self, components: Components, request: Request, watch: Watch, *, read_media: bool = True) -> None:
        assert isinstance(request.size, Size)
        assert request.frames is not None
        self.components, self.request, self.watch = components, request, watch
        self.size, self.frames = request.size, request.frames
        self.passes = resolve_passes(request, components.schedules, upscaling=components.upscaling)
        for pass_index, resolved_pass in enumerate(self.passes):
            check_skip_blocks(resolved_pass, components.transformer_config_of(pass_index).num_layers)
            warn_step_cache(resolved_pass, request.step_cache)
            components.loras.strengths(pass_index, request.lora_strengths)  # refuses invalid strengths
        components.loras.check_merge(len(self.passes), components.transformer_checkpoints)
        self.window_passes = resolve_window_passes(request, components.schedules[0])
        self.spans = () if request.windows is None else request.windows.spans(self.frames)
        self.noise_streams = NoiseStreams(request.seed)
        self.device = components.device
        self.uses_cfg = any(resolved_pass.uses_cfg for resolved_pass in self.passes)
        prompts = dict.fromkeys(request.prompts)
        self.prompt_encoder = PromptEncoder(components, [*prompts, *([request.negative_prompt or ""] * self.uses_cfg)])
        # Read media before any weight: an unreadable file must cost nothing.
        reference_downscale = partial(components.loras.reference_downscale, request.lora_strengths)
        self.media = Media(
            request,
            self.passes,
            self.window_passes,
            self.spans,
            reference_downscale=reference_downscale,
            read_files=read_media,
        )
        self.denoise_stage = DenoiseStage(
            components, request, self.noise_streams, watch, self.media.reference_downscale
        )

    def latents_shape(self, pass_index: int) -> tuple[int, ...]:
        """Returns the shape of the latents of a pass, (1, C, f, h, w)."""
        return self._latents_shape(self.passes[pass_index])

    def _latents_shape(self, resolved_pass: ResolvedPass) -> tuple[int, ...]:
        grid = resolved_pass.grid
        return 1, self.components.transformer_config.in_channels, grid.frames, grid.height, grid.width

    def build_workload(self, stages: Collection[str] = ()) -> Workload:
        """Returns the workload to plan for. stages: the stages that will run, () for all."""
        media = self.media
        return Workload(
            passes=self.passes,
            prompts_to_encode=self.prompt_encoder.uncached_count if not stages or "text" in stages else 0,
            prompt_tokens=self.prompt_encoder.token_counts,
            encode_grids=tuple(media.grids(pass_index) for pass_index in range(len(self.passes))),
            condition_tokens=tuple(sum(map(count_appended_tokens, items)) for items in media.prepared_conditions),
            reference_tokens=self._count_reference_tokens(),
            has_conditions=tuple(bool(items) for items in media.prepared_conditions),
            guidance_batch=bool(self.request.guidance_batch),
            step_cache=self.request.step_cache,
            stages=frozenset(stages),
            windows=tuple(self._build_window_workload(window_pass) for window_pass in self.window_passes),
        )

    def _count_reference_tokens(self) -> tuple[int, ...]:
        """Counts the reference tokens of each pass; () for a video in windows."""
        if self.window_passes:
            return ()
        return tuple(sum(control.grid.num_tokens for control in inputs.controls) for inputs in self.media.pass_inputs)

    def _build_window_workload(self, resolved_pass: ResolvedPass) -> WindowWorkload:
        inputs, windows = self.media.pass_inputs[resolved_pass.window_index], self.request.windows
        assert windows is not None
        guide_frames = (windows.latent_frames[1] if resolved_pass.window_index else 0) + bool(windows.anchor_strength)
        token_counts = self.prompt_encoder.token_counts
        return WindowWorkload(
            resolved_pass=resolved_pass,
            prompt_tokens=(
                token_counts[self._prompt_index(resolved_pass.window_index)],
                *token_counts[-1:] * self.uses_cfg,
            ),
            condition_tokens=sum(map(count_appended_tokens, inputs.conditions))
            + guide_frames * resolved_pass.grid.height * resolved_pass.grid.width,
            has_conditions=bool(inputs.conditions) or guide_frames > 0,
            reference_tokens=sum(control.grid.num_tokens for control in inputs.controls),
        )

    def _prompt_index(self, window_index: int) -> int:
        """Returns the index of a window's prompt among the encoded ones; the last prompt covers all later windows."""
        prompts = self.request.prompts
        return self.prompt_encoder.prompts.index(prompts[min(window_index, len(prompts) - 1)])

    @torch.no_grad()
    def denoise(self, noise: Tensor | None = None, *, init_latents: Tensor | None = None) -> Tensor:
        """Runs every stage before the decoder: normalised latents (1, C, f, h, w), fp32, on the device.

        Args:
            noise: initial noise in the shape of the first pass's latents, instead of the seed's.
            init_latents: normalised latents to start from, at the first sigma of a schedule that starts below 1.
        """
        self._check_initial_tensors(noise, init_latents)
        if self.window_passes:
            return self.denoise_windows(InMemoryWindowStore(), noise).to_tensor().to(self.device)
        control_networks = fetch_networks(self.media.resolved_controls)
        prompt_embeddings = self.prompt_encoder.encode(self.watch)
        encoded_inputs = self.encode_media(control_networks)
        noisy_latents = self._add_initial_noise(
            self.passes[0], noise, encoded_inputs[0].init_latents if init_latents is None else init_latents
        )
        latents = self.denoise_stage.denoise_pass(self.passes[0], noisy_latents, encoded_inputs[0], prompt_embeddings)
        for pass_index, resolved_pass in enumerate(self.passes[1:], 1):
            upscale = partial(upscale_latents, self.components, latents, self.watch)
            upscaled = retry_in_fp32("upscale", torch.float32, upscale)
            noisy_latents = self._add_initial_noise(resolved_pass, None, upscaled)
            latents = self.denoise_stage.denoise_pass(
                resolved_pass, noisy_latents, encoded_inputs[pass_index], prompt_embeddings
            )
        return latents

    @torch.no_grad()
    def denoise_windows(self, store: WindowStore, noise: Tensor | None = None) -> WindowedLatents:
        """Samples the windows of a long video that `store` lacks, one by one, and returns the latents of all.

        Args:
            noise: initial noise (1, C, f, h, w) of the whole video, instead of the seed's.
        """
        windows = self.request.windows
        assert windows is not None
        self._check_initial_tensors(noise, None)
        missing = missing_windows(store, self.spans)
        if not missing:
            return WindowedLatents(self.spans, store.read)
        control_networks = fetch_networks(self.media.resolved_controls)
        prompt_embeddings = self.prompt_encoder.encode(self.watch)
        encoded_inputs = self.encode_media(control_networks, missing)

        def sample(window_index: int, guides: Sequence[Guide]) -> Tensor:
            window_pass, span = self.window_passes[window_index], self.spans[window_index]
            window_inputs = encoded_inputs[window_index]
            window_noise = None if noise is None else noise[:, :, span.start : span.end]
            window_prompts = [
                prompt_embeddings[self._prompt_index(window_index)],
                *prompt_embeddings[-1:] * window_pass.uses_cfg,
            ]
            noisy_latents = self._add_initial_noise(window_pass, window_noise, window_inputs.init_latents)
            return self.denoise_stage.denoise_pass(window_pass, noisy_latents, window_inputs, window_prompts, guides)

        anchors = (latents for condition, latents in encoded_inputs[0].conditions if is_anchor_image(condition))
        anchor_latents = next(anchors, None) if windows.anchor_strength else None
        return sample_windows(windows, self.spans, store, sample, anchor_latents)

    def encode_media(
        self, control_networks: dict[str, list[Path]] | None = None, indices: Collection[int] | None = None
    ) -> list[EncodedInputs]:
        """Encodes the request's media with the VAE encoder, for each pass or window; see `Media.encode`."""
        return self.media.encode(self.components, self.watch, control_networks=control_networks, indices=indices)

    def window_latents_shapes(self) -> list[tuple[int, ...]]:
        """Returns the shape of the latents stored for each window, (1, C, n, h, w)."""
        _, channels, _, height, width = self.latents_shape(0)
        return [(1, channels, span.end - span.output_start, height, width) for span in self.spans]

    @torch.no_grad()
    def decode(self, latents: Tensor | WindowedLatents, noise: Tensor | None = None) -> Iterator[Tensor]:
        """Decodes latents (1, C, f, h, w): yields uint8 (n, H, W, 3) on the CPU, cropped and trimmed as requested.

        Latents of a long video may come window by window.
        """
        if isinstance(latents, Tensor):
            self._require_shape(len(self.passes) - 1, latents=latents, noise=noise)
            latents = WindowedLatents.from_latents(latents, self.spans) if self.spans else latents.to(self.device)
        decode_stage = DecodeStage(
            self.components, self.request, self.passes[-1], self.spans, self.noise_streams, self.watch
        )
        yield from decode_stage.decode(latents, noise)

    def _check_initial_tensors(self, noise: Tensor | None, init_latents: Tensor | None) -> None:
        """Refuses noise and init_latents that do not fit the request, and sigmas that do not fit init_latents."""
        self._require_shape(0, noise=noise, init_latents=init_latents)
        if init_latents is not None and self.window_passes:
            raise RequestError(
                "the request has init_latents and windows; a long video starts from noise or from an input video."
            )
        if init_latents is not None and self.media.input_video is not None:
            raise RequestError("the request has init_latents and an input video; give only one of them.")
        self.check_first_sigma(has_init_latents=init_latents is not None)

    def check_first_sigma(self, *, has_init_latents: bool = False) -> None:
        """Refuses sigmas whose first value does not fit what the first pass starts from.

        Raises:
            RequestError: see `request.passes.check_first_sigma`.
        """
        check_first_sigma(self.passes[0], has_init_latents=has_init_latents or self.media.input_video is not None)

    def _add_initial_noise(
        self, resolved_pass: ResolvedPass, noise: Tensor | None, clean_latents: Tensor | None
    ) -> Tensor:
        """Returns latents at the first sigma: pure noise, or clean latents mixed with that share of noise."""
        if noise is None:
            noise = self.noise_streams.draw(
                noise_stream_name(resolved_pass, "initial"), self._latents_shape(resolved_pass)
            )
        noise = noise.float().to(self.device)
        if clean_latents is None:
            return noise
        sigma = float(resolved_pass.sigmas[0])
        return sigma * noise + (1 - sigma) * clean_latents.to(noise)

    def _require_shape(self, pass_index: int, **tensors: Tensor | None) -> None:
        resolved_pass, shape = self.passes[pass_index], self.latents_shape(pass_index)
        for name, tensor in tensors.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise RequestError(
                    f"{name}: the shape is {tuple(tensor.shape)}; for {resolved_pass.size} and {resolved_pass.frames} "
                    f"frames it must be {shape}."
                )
