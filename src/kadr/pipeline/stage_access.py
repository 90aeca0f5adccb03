"""Single stages of a generation, for those who work on latents, embeddings or encoded media themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kadr.cancellation import CancelToken, cancellable
from kadr.errors import RequestError
from kadr.models.transformer import Transformer
from kadr.pipeline.calibrate import remember_kernels, restore_calibrated_kernels
from kadr.pipeline.generation import Generation
from kadr.pipeline.loading.module_loader import ModuleLoader
from kadr.pipeline.modules import Modules, TrainedTransformer
from kadr.pipeline.notices import Notices
from kadr.pipeline.open_model import OpenModel
from kadr.pipeline.plan_request import plan_request
from kadr.pipeline.progress import STAGES, OnLoad, Watch, ignore_loads, ignore_progress
from kadr.pipeline.stages.encode import EncodedInputs
from kadr.pipeline.stages.overrides import NO_OVERRIDES, Overrides
from kadr.quoting import quote
from kadr.request.passes import check_first_sigma
from kadr.request.prompt_words import warn_of_prompts
from kadr.request.request import Request
from kadr.request.resolve import resolve
from kadr.request.resolved_controls import warn_control_lora_mismatch
from kadr.request.resolved_request import ResolvedRequest
from kadr.spec.model import ModelSpec

LATENT_STAGES = ("text", "encode", "denoise", "upscale", "refine")  # those before the VAE decoder


class StageAccess:
    """An open model, and single stages of its generations; the base of `Engine`, whose `generate` lists the errors.

    Args:
        spec: the model.
        prompt_cache: see `Engine.open`.
    """

    def __init__(self, spec: ModelSpec, *, prompt_cache: bool | Path = True) -> None:
        self._model = OpenModel(spec, prompt_cache)

    @property
    def spec(self) -> ModelSpec:
        """The model, known from headers; `prepare` replaces it where it fetches something."""
        return self._model.spec

    @property
    def loader(self) -> ModuleLoader:
        """Loads single modules on the CPU, without a placement; what is loaded must be on disk."""
        return self._model.loader

    def resolve(self, request: Request | ResolvedRequest) -> ResolvedRequest:
        """Returns the request with nothing left open; see `request.resolve.resolve`.

        Raises:
            RequestError: the request does not fit this model.
            MediaError: the header of an image or clip cannot be read.
            CheckpointError: the request has two passes, but there is no upscaler.
        """
        return request if isinstance(request, ResolvedRequest) else resolve(request, self.spec)

    @contextmanager
    def start(
        self,
        request: Request | ResolvedRequest,
        *,
        watch: Watch = ignore_progress,
        stages: Collection[str] = (),
        prompts: Sequence[str] | None = None,
        transformer: TrainedTransformer | None = None,
        preview: bool = False,
        on_load: OnLoad = ignore_loads,
        cancel: CancelToken | None = None,
        wait: bool = True,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Iterator[Generation]:
        """Yields the planned generation of a request, which has the engine for itself until the block ends.

        Nothing is loaded yet.

        Args:
            stages: the stages that will run; () for all.
            prompts: prompts to encode instead of the request's.
            transformer: used instead of the model's own.
            watch, preview, cancel, wait: see `generate`.
            on_load: see `write`.
            overrides: tensors and functions that take the place of what the generation computes itself.

        Raises:
            As `generate`.
        """
        _check_arguments(watch, stages, cancel)
        with cancellable(cancel) as token, self._model.exclusive(wait=wait):
            needs_media = not stages or not {"encode", "denoise"}.isdisjoint(stages)
            resolved = self._model.prepare(request, with_media=needs_media)
            if not stages:
                check_first_sigma(resolved.passes[0], has_init_latents=resolved.input_video is not None)
            encoder = self._model.prompt_encoder(resolved.all_prompts if prompts is None else prompts, overrides)
            cache = self._model.module_cache
            plan = plan_request(
                self.spec,
                resolved,
                encoder,
                stages=stages,
                cached=cache.private_bytes,
                loaded=cache.cached_names,
                warns_if_long=True,
            )
            restore_calibrated_kernels(self.spec)
            notices = Notices(self.spec.notices)
            modules = Modules(self._model.loader, self._model.module_cache, plan, notices, transformer, on_load)
            preview_map = self._model.open_preview_map(notices, watch) if preview else None
            generation = Generation(resolved, modules, encoder, watch, token, preview_map, overrides)
            if prompts is None and (not stages or "text" in stages):
                warn_of_prompts(resolved, self.spec)
            if transformer is None and (not stages or "denoise" in stages):
                self._warn_unused_controls(resolved)
            try:
                yield generation
            finally:
                modules.close()
                remember_kernels(self.spec)

    def denoise(
        self,
        request: Request | ResolvedRequest,
        *,
        noise: Tensor | None = None,
        init_latents: Tensor | None = None,
        watch: Watch = ignore_progress,
        cancel: CancelToken | None = None,
        wait: bool = True,
    ) -> Tensor:
        """Runs every stage before the VAE decoder.

        Args:
            noise: initial noise (1, C, f, h, w), instead of the seed's.
            init_latents: normalised latents (1, C, f, h, w) to start from instead of pure noise. The request's sigmas
                must then start below 1, by `skip_initial` or `sigmas`.
            watch, cancel, wait: see `Engine.generate`.

        Returns:
            Normalised latents (1, C, f, h, w), float32, on the device.
        """
        with self.start(request, watch=watch, stages=LATENT_STAGES, cancel=cancel, wait=wait) as generation:
            return generation.denoise(noise, init_latents=init_latents)

    def decode(
        self,
        latents: Tensor,
        request: Request | ResolvedRequest,
        *,
        noise: Tensor | None = None,
        watch: Watch = ignore_progress,
        cancel: CancelToken | None = None,
        wait: bool = True,
    ) -> Tensor:
        """Decodes normalised latents (1, C, f, h, w) to uint8 (F, H, W, 3) on the CPU, cropped and trimmed.

        Args:
            request: the request that the latents were sampled for; it sets size, frames and decoder settings.
            noise: decode noise in the shape of the latents, instead of the seed's, for decoders that take noise.
            watch, cancel, wait: see `Engine.generate`.
        """
        with self.start(request, watch=watch, stages=("decode",), cancel=cancel, wait=wait) as generation:
            return torch.cat(list(generation.decode(latents, noise)))

    def encode_prompts(
        self, request: Request | ResolvedRequest, prompts: Sequence[str], *, watch: Watch = ignore_progress
    ) -> list[Tensor]:
        """Returns the prompt embeddings (n, D) of each prompt, for its n tokens, on the CPU.

        Args:
            request: the request to plan for; its own prompt is not encoded.

        Raises:
            RequestError: `prompts` is not a list of texts.
        """
        if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise RequestError(f'prompts are {quote(prompts)}; they must be a list of texts, such as ["a red circle"].')
        with self.start(request, watch=watch, stages=("text",), prompts=prompts) as generation:
            return generation.encode_prompts()

    def encode_first_condition(self, request: Request | ResolvedRequest, *, watch: Watch = ignore_progress) -> Tensor:
        """Encodes the first condition of the request: normalised latents (1, C, n, h, w), on the device.

        Raises:
            RequestError: the request has no condition.
        """
        with self.start(request, watch=watch, stages=("encode",)) as generation:
            if not generation.resolved.conditions:
                raise RequestError("the request has no image or clip to encode; give it a Condition.")
            frames = generation.resolved.conditions_by_pass[0][0].frames
            matches = [[item.frames == frames for item in media.conditions] for media in generation.resolved.media]
            index = next(index for index, row in enumerate(matches) if any(row))
            return generation.encode_media(indices=(index,))[index].conditions[matches[index].index(True)][1]

    def encode_media(self, request: Request | ResolvedRequest, *, watch: Watch = ignore_progress) -> EncodedInputs:
        """Encodes conditions, input video and controls of the request, for its first pass or window."""
        with self.start(request, watch=watch, stages=("encode",)) as generation:
            return generation.encode_media(indices=(0,))[0]

    def load_transformer(self, *, keep_storage_dtype: bool = False) -> Transformer:
        """Loads the transformer of the first pass on the CPU, without a placement, as training takes it.

        Args:
            keep_storage_dtype: see `checkpoints.load.load_weights`.

        Raises:
            CheckpointError: the weights are damaged or incomplete, or cannot be fetched.
        """
        with self._model.exclusive(wait=True):
            self._model.fetch(has_two_passes=False)
            return self._model.loader.load_transformer(0, self.spec.dtype, keep_storage_dtype=keep_storage_dtype)

    def unload(self) -> None:
        """Frees the modules that stay in memory for the next video."""
        with self._model.exclusive(wait=True):
            self._model.module_cache.clear()

    def _warn_unused_controls(self, resolved: ResolvedRequest) -> None:
        loras, strengths = self.spec.loras, resolved.request.lora_strengths
        has_in_context = loras.has_in_context(strengths)
        warn_control_lora_mismatch(resolved.request, has_loras=bool(loras), has_in_context_lora=has_in_context)


def _check_arguments(watch: Any, stages: Any, cancel: Any) -> None:
    """Refuses arguments of `Engine.start` of another type, and unknown stages."""
    if not callable(watch):
        raise RequestError(
            f"watch is {quote(watch)}; it must be a function that takes a Progress. Leave it out for none."
        )
    if not isinstance(cancel, CancelToken | None):
        raise RequestError(f"cancel is {quote(cancel)}; it must be a CancelToken, or None.")
    if isinstance(stages, str) or not set(stages) <= set(STAGES):
        raise RequestError(f"stages is {quote(stages)}; it must be a list of stages: {', '.join(STAGES)}.")
