"""The engine: a model that is open, and what can be asked of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kadr.checkpoints.open import Checkpoint, TextEncoderFolder
from kadr.errors import Cancelled, KadrError, RequestError
from kadr.media.image import DEFAULT_CRF
from kadr.media.video import VideoWriter
from kadr.memory.device import pick_device, pick_dtype
from kadr.models.registry import Recipe
from kadr.pipeline.components import Components, require_parts
from kadr.pipeline.generate import Generation
from kadr.pipeline.locate import fetched_text, locate
from kadr.pipeline.progress import Progress, Watch, ignore
from kadr.pipeline.request import Request
from kadr.pipeline.result import Made, Video
from kadr.version import __version__


@dataclass(frozen=True)
class Engine:
    """A model, known from its headers. Weights are read when a stage needs them."""

    name: str
    components: Components
    recipe: Recipe

    @classmethod
    def open(
        cls,
        model: str | Path = "demo",
        *,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> Engine:
        """Open a model.

        Args:
            model: a name of the registry, an official .safetensors file, or a diffusers folder.
            text_encoder: a folder with a T5 encoder and its tokenizer; by default beside the model, else from the hub.
            vae: a checkpoint to take the VAE from instead of the model's own.
            device: "auto", "cpu", "cuda" or "mps".
            dtype: "auto", "bfloat16" or "float32".

        Raises:
            RequestError: an unknown name, device or dtype.
            CheckpointError: a file is missing, damaged, incomplete, or not of this family.
        """
        # What cannot work is refused before gigabytes are fetched for it: the names first, the text encoder last.
        pick_dtype(dtype, pick_device(device), 0)
        found = locate(model, text_encoder=text_encoder, vae=vae)
        checkpoint = Checkpoint.open(found.model, release=found.released)
        own_vae = Checkpoint.open(found.vae) if found.vae else None
        require_parts(checkpoint, own_vae or checkpoint)
        text = TextEncoderFolder.open(found.text_encoder or fetched_text(found.released))
        components = Components(checkpoint, text, own_vae, device=device, dtype=dtype)
        released = found.released or checkpoint.detected.released
        return cls(name=found.name, components=components, recipe=released.recipe if released else Recipe())

    def resolve(self, request: Request) -> Request:
        """The request with everything it left out taken from the model's recipe."""
        recipe = self.recipe
        return request.filled(
            {
                "size": recipe.size,
                "frames": recipe.frames,
                "fps": recipe.fps,
                "steps": recipe.steps,
                "levels": recipe.levels,
                "guidance": recipe.guidance,
                "negative_prompt": recipe.negative_prompt,
                "stochastic": recipe.stochastic,
                "image_noise": recipe.image_cond_noise,
                "image_crf": DEFAULT_CRF,
                "decode_timestep": recipe.decode_timestep,
                "decode_noise": recipe.decode_noise,
            }
        )

    def generate(self, request: Request, *, watch: Watch = ignore) -> Video:
        """Make one video.

        Args:
            request: `size` in pixels (any; snapped up to 32 and cropped back), `frames` (snapped to 8k+1 and trimmed
                back) at `fps`.
            watch: called after every step with a `Progress`. Raise from it to cancel.

        Returns:
            Video whose `frames` are uint8 (frames, height, width, 3): RGB, full range, on the CPU.

        Raises:
            RequestError: the request does not fit this model. Raised before any weight is moved.
            MediaError: a picture cannot be read.
            CheckpointError: the weights are damaged or incomplete.
            NonFiniteError: a stage produced NaN or infinity; it carries the stage.
            Cancelled: `watch` raised; its exception is the cause.
        """
        generation = self._begin(request, watch)
        latents = generation.latents()
        frames = torch.cat(list(generation.pixels(latents))).numpy()
        request = generation.request
        return Video(frames, latents[0].cpu(), float(request.fps or 0), request, self.record(request))

    def write(self, request: Request, path: str | Path, *, watch: Watch = ignore) -> Made:
        """Make one video straight into an mp4: frames are written as they are decoded.

        Memory does not grow with the length. The file is written beside `path` and renamed when it is whole.

        Raises:
            As `generate`, and MediaError where the file cannot be written: found before anything is computed where
            that can be known.
        """
        began = time.monotonic()
        generation = self._begin(request, watch)
        request = generation.request
        fps = float(request.fps or 0)
        with VideoWriter(path, generation.size, fps, metadata=self.record(request)) as writer:
            latents = generation.latents()
            for frames in generation.pixels(latents):
                writer.write(frames.numpy())
        return Made(
            path=Path(path),
            frames=generation.frames,
            size=generation.size,
            fps=fps,
            seconds=time.monotonic() - began,
            latents=latents[0].cpu(),
            request=request,
        )

    def denoise(
        self, request: Request, *, noise: Tensor | None = None, start: Tensor | None = None, watch: Watch = ignore
    ) -> Tensor:
        """Everything up to the decoder.

        Args:
            noise: (1, C, f, h, w), instead of the seed's.
            start: normalised latents (1, C, f, h, w) to begin from instead of pure noise; the request's levels must
                then begin below 1, through `skip_initial` or `levels`.

        Returns:
            Normalised latents (1, C, f, h, w), float32, on the device.
        """
        return self._begin(request, watch).latents(noise, start=start)

    def encode(self, request: Request, *, watch: Watch = ignore) -> Tensor:
        """The request's picture through the VAE's encoder: normalised latents (1, C, 1, h, w), float32, on the device.

        Raises:
            RequestError: the request has no picture.
        """
        if not request.conditions:
            raise RequestError("the request has no picture to encode; give it a Condition.")
        return self._begin(request, watch).pictures_encoded()[0]

    def decode(
        self, latents: Tensor, request: Request, *, noise: Tensor | None = None, watch: Watch = ignore
    ) -> Tensor:
        """Normalised latents (1, C, f, h, w) -> uint8 (F, H, W, 3) on the CPU, cropped and trimmed as requested.

        Args:
            request: the one the latents were made for; it holds the size, the frames and the decoder's settings.
            noise: shaped as the latents, instead of the seed's, for decoders that take noise.
        """
        return torch.cat(list(self._begin(request, watch, pictures=False).pixels(latents, noise)))

    def record(self, request: Request) -> dict[str, Any]:
        """What is stored beside the pictures: enough to make the same video again."""
        device, dtype = self.components.device, self.components.dtype
        # Absolute paths, so that the video can be made again from another folder.
        here = [replace(c, media=str(Path(c.media).expanduser().resolve())) for c in request.conditions]
        return {
            "version": __version__,
            "name": self.name,
            **self.components.sources(),
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "request": replace(request, conditions=tuple(here)).to_json(),
        }

    def _begin(self, request: Request, watch: Watch, *, pictures: bool = True) -> Generation:
        return Generation(self.components, self.resolve(request), _guarded(watch), pictures=pictures)


def _guarded(watch: Watch) -> Watch:
    """The watcher, whose exceptions become `Cancelled`."""

    def report(progress: Progress) -> None:
        try:
            watch(progress)
        except KadrError:
            raise
        except Exception as reason:
            raise Cancelled(f"cancelled at {progress.stage} {progress.step} of {progress.of}") from reason

    return report
