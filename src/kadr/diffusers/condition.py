"""`LTXConditionPipeline`: images and clips anywhere in the video, as diffusers' pipeline of that name computes it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kadr.diffusers.calls.call import Call, Medium, check_size
from kadr.diffusers.calls.callback import StepCallback
from kadr.diffusers.calls.frames_in import clip_pixels, image_pixels
from kadr.diffusers.calls.prompts import parse_prompts
from kadr.diffusers.calls.run import run
from kadr.diffusers.calls.schedule import linear_quadratic_timesteps, parse_timesteps, skip_to_strength
from kadr.diffusers.text import TextPipeline
from kadr.errors import KadrWarning, RequestError
from kadr.quoting import quote
from kadr.shapes import LatentGrid, Size
from kadr.validation import check_range, is_whole_number


@dataclass
class LTXVideoCondition:
    """An image or a clip that the video must show.

    Args:
        image: as `LTXConditionPipeline` takes it.
        video: a list of frames, instead of an image.
        frame_index: frame of the video at which it begins.
        strength: in (0, 1].
    """

    image: Any = None
    video: Any = None
    frame_index: int = 0
    strength: float = 1.0


class LTXConditionPipeline(TextPipeline):
    """Text, images and clips to video. Prompts are masked, positions causal, and sigmas linear-quadratic."""

    _attends_padding, _default_length = False, 256

    def __call__(
        self,
        conditions: LTXVideoCondition | list[LTXVideoCondition] | None = None,
        image: Any = None,
        video: Any = None,
        frame_index: int | list[int] = 0,
        strength: float | list[float] = 1.0,
        denoise_strength: float = 1.0,
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
        image_cond_noise_scale: float = 0.15,
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
        max_sequence_length: int = 256,
    ) -> Any:
        """Makes videos; the arguments are those of diffusers' pipeline.

        Args:
            conditions: images and clips; or `image` or `video`, with `frame_index` and `strength`, one or a list each.
            denoise_strength: share of the steps that is run on `latents`, from their first sigma on.
            timesteps: from 1000 down; used as they are.
            latents: normalised (B, C, f, h, w), to start from; used where `denoise_strength` is below 1.

        Returns:
            `LTXPipelineOutput`, or a tuple of its frames without `return_dict`. "latent" frames are (B, C, f, h, w).

        Raises:
            RequestError: an argument does not fit the model, or the door cannot do it. As `Engine.generate` otherwise.
        """
        size, frames = check_size(height, width, num_frames)
        grid = LatentGrid.for_video(size, frames)
        check_range("denoise_strength", denoise_strength, 0.0, 1.0)
        check_range("image_cond_noise_scale", image_cond_noise_scale, 0.0, 10.0)
        steps = linear_quadratic_timesteps(num_inference_steps) if timesteps is None else parse_timesteps(timesteps)
        if denoise_strength < 1:
            steps = skip_to_strength(steps, denoise_strength)
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
            timesteps=steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            generator=generator,
            decode_timestep=decode_timestep,
            decode_noise_scale=decode_noise_scale,
            output_type=output_type,
            return_dict=return_dict,
            attention_kwargs=attention_kwargs,
            callback=StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs),
            causal_positions=True,
            attends_padding=False,
            float_guidance=False,
            draws_media_first=False,
            packs_latents=False,
            image_noise=image_cond_noise_scale,
            media=[media]
            if (media := _media(_conditions(conditions, image, video, frame_index, strength), size, frames))
            else (),
            clean_latents=_clean_latents(
                latents, grid, self.engine.spec.transformer_config.in_channels, denoise_strength
            ),
        )
        return run(self, call)


def _conditions(conditions: Any, image: Any, video: Any, frame_index: Any, strength: Any) -> list[LTXVideoCondition]:
    """Returns the conditions of a call, from either form of its arguments.

    Raises:
        RequestError: both forms are given, or lists of different lengths.
    """
    if conditions is not None:
        if image is not None or video is not None:
            raise RequestError("conditions are given with image or video; give one or the other.")
        return list(conditions) if isinstance(conditions, list | tuple) else [conditions]
    if image is None and video is None:
        return []
    # As in diffusers, a list is a list of conditions: a clip is given as a list that has it.
    images = image if isinstance(image, list) else [image]
    videos = video if isinstance(video, list) else [video]
    count = max(len(images) if image is not None else 0, len(videos) if video is not None else 0)
    columns = [
        value if isinstance(value, list) else [value] * count
        for value in (
            images if image is not None else None,
            videos if video is not None else None,
            frame_index,
            strength,
        )
    ]
    if any(len(column) != count for column in columns):
        raise RequestError("image, video, frame_index and strength are lists of different lengths; give one for each.")
    return [LTXVideoCondition(*row) for row in zip(*columns, strict=True)]


def _media(conditions: list[LTXVideoCondition], size: Size, frames: int) -> list[Medium]:
    """Returns the pixels of conditions, a clip trimmed to what fits in `frames`.

    Raises:
        RequestError: a condition has no image or clip, lies outside the video, or is a clip too short.
    """
    media = []
    for number, condition in enumerate(conditions, 1):
        frame = condition.frame_index
        if not is_whole_number(frame) or not 0 <= frame < frames:
            raise RequestError(f"frame_index is {quote(frame)}; it must be a whole number from 0 to {frames - 1}.")
        if condition.image is not None:
            pixels = image_pixels(condition.image, size)[:1, :, None]
        elif condition.video is not None:
            pixels = clip_pixels(condition.video, size, frames - frame)
        else:
            raise RequestError(f"condition {number} has neither an image nor a video; give one of them.")
        media.append(Medium(f"medium {number}", pixels, frame, condition.strength))
    return media


def _clean_latents(latents: Any, grid: LatentGrid, channels: int, denoise_strength: float) -> Tensor | None:
    """Returns latents (B, C, f, h, w) to start from; None, with a warning, where diffusers ignores them.

    Raises:
        RequestError: they have another shape.
    """
    if latents is None:
        return None
    expected = (channels, grid.frames, grid.height, grid.width)
    if not isinstance(latents, Tensor) or latents.ndim != 5 or tuple(latents.shape[1:]) != expected:
        shape = tuple(latents.shape) if isinstance(latents, Tensor) else quote(latents)
        raise RequestError(
            f"latents are {shape}; they must be normalised latents (B, {', '.join(map(str, expected))})."
        )
    if denoise_strength >= 1:
        message = (
            "latents are given and denoise_strength is 1: nothing of them remains, as in diffusers. Give a "
            "denoise_strength below 1."
        )
        warnings.warn(KadrWarning(message, topic="latents"), stacklevel=4)
        return None
    return latents.float()
