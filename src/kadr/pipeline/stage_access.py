"""Single stages of a generation, for those who work on latents, embeddings or encoded media themselves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from kadr.cancellation import CancelToken
from kadr.errors import RequestError
from kadr.pipeline.generation import Generation
from kadr.pipeline.modules import TrainedTransformer
from kadr.pipeline.progress import Watch, ignore_progress
from kadr.pipeline.stages.encode import EncodedInputs
from kadr.request.request import Request
from kadr.request.resolved_request import ResolvedRequest

LATENT_STAGES = ("text", "encode", "denoise", "upscale", "refine")  # those before the VAE decoder


class StageAccess:
    """Runs some stages of a request; the base of `Engine`. Errors are those of `Engine.generate`."""

    @abstractmethod
    def start(
        self,
        request: Request | ResolvedRequest,
        *,
        watch: Watch = ignore_progress,
        stages: Collection[str] = (),
        prompts: Sequence[str] | None = None,
        transformer: TrainedTransformer | None = None,
        cancel: CancelToken | None = None,
        wait: bool = True,
    ) -> AbstractContextManager[Generation]:
        """See `Engine.start`."""

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
            raise RequestError(f'prompts are {prompts!r}; they must be a list of texts, such as ["a red circle"].')
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
