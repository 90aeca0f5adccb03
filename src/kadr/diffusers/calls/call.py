"""One call of a pipeline: its arguments, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kadr.diffusers.calls.callback import StepCallback
from kadr.diffusers.calls.prompts import Prompts
from kadr.diffusers.calls.schedule import Timesteps
from kadr.diffusers.outputs import check_output_type
from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.request.request import MAX_FPS
from kadr.sampling.settings import MAX_SCALE
from kadr.sampling.state import to_latents
from kadr.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, LatentGrid, Size
from kadr.validation import check_range, is_whole_number


@dataclass(frozen=True)
class Medium:
    """An image or clip that a video is conditioned on.

    Args:
        name: stands for a path.
        pixels: float32 (1, 3, 8k+1, H, W) in [-1, 1].
    """

    name: str
    pixels: Tensor
    frame: int = 0
    strength: float = 1.0

    @property
    def latent_frames(self) -> int:
        return (self.pixels.shape[2] - 1) // TEMPORAL_COMPRESSION + 1


@dataclass(frozen=True, kw_only=True)
class Call:
    """Arguments of a call that all pipelines have, and what each pipeline decides.

    Args:
        media: of each video; () without any.
        initial_latents: (B, C, f, h, w) at the first sigma, instead of noise.
        clean_latents: (B, C, f, h, w) that noise is mixed into at the first sigma.
        causal_positions, attends_padding: see `Overrides`.
        float_guidance: predictions are combined in float32 instead of the model's dtype.
        draws_media_first: the latents of media are sampled before the initial noise.
        packs_latents: latents are returned as tokens (B, N, C).
    """

    prompts: Prompts
    size: Size
    frames: int
    frame_rate: float
    timesteps: Timesteps
    guidance_scale: float
    guidance_rescale: float
    generator: Any
    decode_timestep: Any
    decode_noise_scale: Any
    output_type: str
    return_dict: bool
    attention_kwargs: dict[str, Any] | None
    callback: StepCallback
    causal_positions: bool
    attends_padding: bool
    float_guidance: bool
    draws_media_first: bool
    packs_latents: bool
    image_noise: float = 0.0
    media: Sequence[Sequence[Medium]] = ()
    initial_latents: Tensor | None = None
    clean_latents: Tensor | None = None

    def __post_init__(self) -> None:
        check_output_type(self.output_type)
        for name, maximum in (("guidance_scale", MAX_SCALE), ("guidance_rescale", 1.0), ("frame_rate", MAX_FPS)):
            value = getattr(self, name)
            if value is None:
                raise RequestError(f"{name} is None; leave it out for its default, or give a number.")
            check_range(name, value, 0.0, maximum)
        self.decode_settings()

    def decode_settings(self) -> list[tuple[float, float]]:
        """Returns the decode timestep of each video and its share of decode noise; as in diffusers, by default equal.

        Raises:
            RequestError: see `_values_of`.
        """
        timesteps = _values_of(self.decode_timestep, self.prompts, "decode_timestep")
        if self.decode_noise_scale is None:
            return list(zip(timesteps, timesteps, strict=True))
        scales = _values_of(self.decode_noise_scale, self.prompts, "decode_noise_scale")
        return list(zip(timesteps, scales, strict=True))

    @property
    def grid(self) -> LatentGrid:
        return LatentGrid.for_video(self.size, self.frames)

    def media_of(self, index: int) -> Sequence[Medium]:
        """Returns the media of one video; those of the only entry are every video's."""
        return self.media[index if len(self.media) > 1 else 0] if self.media else ()


def check_size(height: Any, width: Any, num_frames: Any) -> tuple[Size, int]:
    """Returns the size, and the number of frames rounded down to 8k+1.

    Raises:
        RequestError: a side is not a multiple of 32, or there is no frame.
    """
    for name, value in (("height", height), ("width", width)):
        if not is_whole_number(value) or value < 1 or value % SPATIAL_COMPRESSION:
            below = max(1, value // SPATIAL_COMPRESSION) * SPATIAL_COMPRESSION if is_whole_number(value) else 512
            raise RequestError(
                f"{name} is {quote(value)}; it must be a multiple of {SPATIAL_COMPRESSION}, such as {below}."
            )
    if not is_whole_number(num_frames) or num_frames < 1:
        raise RequestError(f"num_frames is {quote(num_frames)}; it must be a whole number, 1 or more.")
    return Size(width, height), (num_frames - 1) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION + 1


def unpack_latents(latents: Any, call_grid: LatentGrid, channels: int) -> Tensor:
    """Returns packed latents (B, N, C) as (B, C, f, h, w).

    Raises:
        RequestError: they have another shape.
    """
    expected = (call_grid.num_tokens, channels)
    if not isinstance(latents, Tensor) or latents.ndim != 3 or tuple(latents.shape[1:]) != expected:
        shape = tuple(latents.shape) if isinstance(latents, Tensor) else quote(latents)
        raise RequestError(f"latents are {shape}; they must be packed tokens (B, {expected[0]}, {expected[1]}).")
    return to_latents(latents.float(), call_grid)


def _values_of(value: Any, prompts: Prompts, name: str) -> list[float]:
    """Returns a value, or a list with one for each prompt, for every video.

    Raises:
        RequestError: it has another length, or a value is not in [0, 1].
    """
    values = list(value) if isinstance(value, list | tuple) else [value] * len(prompts.texts)
    if len(values) != len(prompts.texts):
        raise RequestError(f"{name} has {len(values)} values for {len(prompts.texts)} prompts; give one for each.")
    for item in values:
        if item is None:
            raise RequestError(f"{name} is {quote(value)}; it must be a number from 0 to 1, or one for each prompt.")
        check_range(name, item, 0.0, 1.0)
    return [float(item) for item in values for _ in range(prompts.videos_per_prompt)]
