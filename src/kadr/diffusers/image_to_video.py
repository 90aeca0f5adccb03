"""`LTXImageToVideoPipeline`: an image as the first frame, as diffusers' pipeline of that name computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kadr.diffusers.calls.call import Call, Medium, check_size
from kadr.diffusers.calls.callback import StepCallback
from kadr.diffusers.calls.frames_in import image_pixels
from kadr.diffusers.calls.prompts import parse_prompts
from kadr.diffusers.calls.run import run
from kadr.diffusers.calls.schedule import parse_timesteps, shifted_timesteps
from kadr.diffusers.text import TextPipeline
from kadr.errors import RequestError
from kadr.shapes import LatentGrid, Size


class LTXImageToVideoPipeline(TextPipeline):
    """Image and text to video: the first latent frame is the image's and never moves. Otherwise as `LTXPipeline`."""

    _attends_padding, _default_length = True, 128

    def __call__(
        self,
        image: Any = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 512,
        width: int = 704,
        num_frames: int = 161,
        frame_rate: float = 25,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        guidance_scale: float = 3,
        guidance_rescale: float = 0.0,
        num_videos_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        decode_timestep: float | list[float] = 0.0,
        decode_noise_scale: float | list[float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 128,
    ) -> Any:
        """Makes videos; the arguments are those of diffusers' pipeline.

        Args:
            image: of every video, or a list with one for each; resized to the size of the video.
            timesteps: used as they are, where diffusers refuses them for this pipeline.
            latents: refused: their first frame would be the image.

        Returns:
            `LTXPipelineOutput`, or a tuple of its frames without `return_dict`. "latent" frames are packed (B, N, C).

        Raises:
            RequestError: an argument does not fit the model, or the door cannot do it. As `Engine.generate` otherwise.
        """
        if latents is not None:
            raise RequestError(
                "latents are given to LTXImageToVideoPipeline; kadr takes the first frame from the image. Leave them "
                "out, or give them to LTXConditionPipeline."
            )
        size, frames = check_size(height, width, num_frames)
        grid = LatentGrid.for_video(size, frames)
        schedule = self.engine.spec.schedules[0]
        prompts = parse_prompts(
            prompt,
            negative_prompt,
            num_videos_per_prompt,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            max_sequence_length,
        )
        call = Call(
            prompts=prompts,
            size=size,
            frames=frames,
            frame_rate=frame_rate,
            timesteps=shifted_timesteps(schedule, num_inference_steps, grid.num_tokens)
            if timesteps is None
            else parse_timesteps(timesteps),
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            generator=generator,
            decode_timestep=decode_timestep,
            decode_noise_scale=decode_noise_scale,
            output_type=output_type,
            return_dict=return_dict,
            attention_kwargs=attention_kwargs,
            callback=StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs),
            causal_positions=False,
            attends_padding=True,
            float_guidance=True,
            draws_media_first=True,
            packs_latents=True,
            media=_media(image, size, prompts.num_videos),
        )
        return run(self, call)


def _media(image: Any, size: Size, num_videos: int) -> list[list[Medium]]:
    """Returns the image of every video, or of each."""
    if image is None:
        raise RequestError("no image is given. Give one, or use LTXPipeline.")
    pixels = image_pixels(image, size)
    if len(pixels) not in (1, num_videos):
        raise RequestError(f"{len(pixels)} images are given for {num_videos} videos; give one, or one for each.")
    return [[Medium(f"image {index + 1}", pixels[index : index + 1, :, None])] for index in range(len(pixels))]
