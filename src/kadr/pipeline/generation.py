"""One generation, stage by stage: text encoder -> condition encode -> sampler -> (upscale, sampler) -> VAE decode.

Data goes one way. Each stage acquires its module from the cache and releases it before the next stage acquires its own.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kadr.cancellation import CancelToken
from kadr.errors import RequestError
from kadr.pipeline.longvideo.sampling import (
    Guide,
    InMemoryWindowStore,
    WindowedLatents,
    WindowStore,
    missing_windows,
    sample_windows,
)
from kadr.pipeline.modules import Modules
from kadr.pipeline.progress import Watch
from kadr.pipeline.stages.control_networks import fetch_networks
from kadr.pipeline.stages.decode import DecodeStage
from kadr.pipeline.stages.denoise import DenoiseStage
from kadr.pipeline.stages.encode import EncodedInputs, Media
from kadr.pipeline.stages.overrides import NO_OVERRIDES, Overrides
from kadr.pipeline.stages.preview import PreviewMap
from kadr.pipeline.stages.text import PromptEncoder
from kadr.pipeline.stages.upscale import upscale_latents
from kadr.planning.plan import Plan
from kadr.request.passes import ResolvedPass, check_first_sigma, noise_stream_name
from kadr.request.resolved_request import ResolvedRequest
from kadr.sampling.noise import NoiseStreams
from kadr.spec.model import ModelSpec


class Generation:
    """One resolved request on its way, with its modules, its plan and its notices. `Engine.start` makes one.

    Args:
        modules: of the model, on disk until a stage needs them.
        prompt_encoder: of the request's prompts.
        watch: called after every step.
        token: cancels it; see `cancel`.
        preview_map: for the previews of each step; None for none.
        overrides: see `Overrides`.
    """

    def __init__(
        self,
        resolved: ResolvedRequest,
        modules: Modules,
        prompt_encoder: PromptEncoder,
        watch: Watch,
        token: CancelToken,
        preview_map: PreviewMap | None = None,
        overrides: Overrides = NO_OVERRIDES,
    ) -> None:
        self._token = token
        self.resolved, self.modules, self.prompt_encoder, self.watch = resolved, modules, prompt_encoder, watch
        self.noise_streams = overrides.noise_source or NoiseStreams(resolved.seed)
        self.device = modules.device
        # Opened before any weight: an unreadable file must cost nothing.
        self.media = Media(resolved, modules.notices.add, overrides)
        self.denoise_stage = DenoiseStage(modules, resolved, self.noise_streams, watch, preview_map, overrides)

    def cancel(self, reason: str = "") -> None:
        """Stops the work within a second or a layer, whichever is longer, with `Cancelled`, and leaves nothing.

        Any thread and any signal handler may call it, any number of times.
        """
        self._token.cancel(reason)

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.modules.spec

    @property
    def plan(self) -> Plan:
        """The plan; a smaller one after a stage ran out of memory."""
        return self.modules.plan

    @property
    def notices(self) -> tuple[str, ...]:
        """Says what was degraded so far."""
        return self.modules.notices.messages

    def latents_shape(self, resolved_pass: ResolvedPass) -> tuple[int, ...]:
        """Returns the shape of the latents of a pass, (1, C, f, h, w)."""
        grid = resolved_pass.grid
        return 1, self.spec.transformer_config.in_channels, grid.frames, grid.height, grid.width

    def encode_prompts(self) -> list[Tensor]:
        """Returns the prompt embeddings (n, D) of each prompt, for its n tokens, on the CPU."""
        prompt_embeddings = self.prompt_encoder.encode(self.modules, self.watch)
        return [item.embeddings[item.mask].cpu() for item in prompt_embeddings]

    @torch.no_grad()
    def denoise(self, noise: Tensor | None = None, *, init_latents: Tensor | None = None) -> Tensor:
        """Runs every stage before the decoder: normalised latents (1, C, f, h, w), fp32, on the device.

        Args:
            noise: initial noise in the shape of the first pass's latents, instead of the seed's.
            init_latents: normalised latents to start from, at the first sigma of a schedule that starts below 1.
        """
        self._check_initial_tensors(noise, init_latents)
        if self.resolved.window_passes:
            return self.denoise_windows(InMemoryWindowStore(), noise).to_tensor().to(self.device)
        control_networks = fetch_networks(self.resolved.controls)
        prompt_embeddings = self.prompt_encoder.encode(self.modules, self.watch)
        encoded_inputs = self.encode_media(control_networks)
        first_pass, *later_passes = self.resolved.passes
        noisy_latents = self._add_initial_noise(
            first_pass, noise, encoded_inputs[0].init_latents if init_latents is None else init_latents
        )
        latents = self.denoise_stage.denoise_pass(first_pass, noisy_latents, encoded_inputs[0], prompt_embeddings)
        for pass_index, resolved_pass in enumerate(later_passes, 1):
            upscaled = upscale_latents(self.modules, latents, self.watch)
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
        windows, spans = self.resolved.windows, self.resolved.spans
        if windows is None:
            raise RequestError("the request has no windows; a video in one piece is sampled by `denoise`.")
        self._check_initial_tensors(noise, None)
        missing = missing_windows(store, spans)
        if not missing:
            return WindowedLatents(spans, store.read)
        control_networks = fetch_networks(self.resolved.controls)
        prompt_embeddings = self.prompt_encoder.encode(self.modules, self.watch)
        encoded_inputs = self.encode_media(control_networks, missing)

        def sample(window_index: int, guides: Sequence[Guide]) -> Tensor:
            window_pass, span = self.resolved.window_passes[window_index], spans[window_index]
            window_inputs = encoded_inputs[window_index]
            window_noise = None if noise is None else noise[:, :, span.start : span.end]
            window_prompts = [
                prompt_embeddings[self.resolved.prompt_index(window_index)],
                *prompt_embeddings[-1:] * window_pass.uses_cfg,
            ]
            noisy_latents = self._add_initial_noise(window_pass, window_noise, window_inputs.init_latents)
            return self.denoise_stage.denoise_pass(window_pass, noisy_latents, window_inputs, window_prompts, guides)

        anchors = (latents for condition, latents in encoded_inputs[0].conditions if condition.is_anchor_image)
        anchor_latents = next(anchors, None) if windows.anchor_strength else None
        return sample_windows(windows, spans, store, sample, anchor_latents)

    def encode_media(
        self, control_networks: dict[str, list[Path]] | None = None, indices: Collection[int] | None = None
    ) -> list[EncodedInputs]:
        """Encodes the request's media with the VAE encoder, for each pass or window; see `Media.encode`."""
        return self.media.encode(self.modules, self.watch, control_networks=control_networks, indices=indices)

    def window_latents_shapes(self) -> list[tuple[int, ...]]:
        """Returns the shape of the latents stored for each window, (1, C, n, h, w)."""
        _, channels, _, height, width = self.latents_shape(self.resolved.passes[0])
        return [(1, channels, span.end - span.output_start, height, width) for span in self.resolved.spans]

    @torch.no_grad()
    def decode(
        self, latents: Tensor | WindowedLatents, noise: Tensor | None = None, *, as_float: bool = False
    ) -> Generator[Tensor, None, None]:
        """Decodes latents (1, C, f, h, w): yields uint8 (n, H, W, 3) on the CPU, cropped and trimmed as requested.

        Latents of a long video may come window by window.

        Args:
            noise: decode noise in the shape of the latents, instead of the seed's.
            as_float: yield float32 in [0, 1], not rounded to uint8.
        """
        if not isinstance(latents, WindowedLatents):
            self._require_shape(self.resolved.passes[-1], latents=latents, noise=noise)
            spans = self.resolved.spans
            latents = WindowedLatents.from_latents(latents, spans) if spans else latents.to(self.device)
        stage = DecodeStage(self.modules, self.resolved, self.noise_streams, self.watch, as_float)
        yield from stage.decode(latents, noise)

    def _check_initial_tensors(self, noise: Tensor | None, init_latents: Tensor | None) -> None:
        """Refuses noise and init_latents that do not fit the request, and sigmas that do not fit init_latents."""
        self._require_shape(self.resolved.passes[0], noise=noise, init_latents=init_latents)
        if init_latents is not None and self.resolved.window_passes:
            raise RequestError(
                "the request has init_latents and windows; a long video starts from noise or from an input video."
            )
        if init_latents is not None and self.resolved.input_video is not None:
            raise RequestError("the request has init_latents and an input video; give only one of them.")
        has_init_latents = init_latents is not None or self.resolved.input_video is not None
        check_first_sigma(self.resolved.passes[0], has_init_latents=has_init_latents)

    def _add_initial_noise(
        self, resolved_pass: ResolvedPass, noise: Tensor | None, clean_latents: Tensor | None
    ) -> Tensor:
        """Returns latents at the first sigma: pure noise, or clean latents mixed with that share of noise."""
        if noise is None:
            noise = self.noise_streams.draw(
                noise_stream_name(resolved_pass, "initial"), self.latents_shape(resolved_pass)
            )
        noise = noise.float().to(self.device)
        if clean_latents is None:
            return noise
        sigma = resolved_pass.sigmas[0]
        return sigma * noise + (1 - sigma) * clean_latents.to(noise)

    def _require_shape(self, resolved_pass: ResolvedPass, **tensors: Tensor | None) -> None:
        shape = self.latents_shape(resolved_pass)
        for name, tensor in tensors.items():
            if tensor is None and name != "latents":  # the others are optional
                continue
            if not isinstance(tensor, Tensor):
                raise RequestError(f"{name}: the type is {type(tensor).__name__}; it must be a torch.Tensor {shape}.")
            if tuple(tensor.shape) != shape:
                raise RequestError(
                    f"{name}: the shape is {tuple(tensor.shape)}; for {resolved_pass.size} and {resolved_pass.frames} "
                    f"frames it must be {shape}."
                )
