"""`LTXLatentUpsamplePipeline`: doubles the sides of latents between two passes, as diffusers' pipeline does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kadr.diffusers.base import LTXBasePipeline, VAEHandle
from kadr.diffusers.locate_model import dtype_name, model_name
from kadr.diffusers.lora import refuse_options
from kadr.diffusers.outputs import LATENT, LTXPipelineOutput, check_output_type
from kadr.errors import RequestError
from kadr.pipeline.engine import Engine
from kadr.quoting import quote
from kadr.request.request import Request
from kadr.sampling.latents import adain, tone_map
from kadr.sampling.settings import Pass
from kadr.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, Size
from kadr.validation import check_range


class LTXLatentUpsamplePipeline(LTXBasePipeline):
    """Latents to latents with twice the sides. `vae` of another pipeline says which model they belong to."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *, vae: Any = None, torch_dtype: Any = None, **options: Any
    ) -> LTXLatentUpsamplePipeline:
        """Opens an upscaler by its path, its registry name or its repository, for the model of another pipeline.

        Args:
            vae: `pipe.vae` of that pipeline.
            torch_dtype: see `LTXPipeline.from_pretrained`; None takes that of the other pipeline.

        Raises:
            RequestError: `vae` is missing or not of a pipeline of kadr.
        """
        if not isinstance(vae, VAEHandle):
            raise RequestError(f"vae is {quote(vae)}; it must be pipe.vae of the pipeline whose latents are upsampled.")
        refuse_options("from_pretrained", options)
        base = vae.pipeline
        dtype = base._dtype if torch_dtype is None else dtype_name(torch_dtype)
        base_options = {**base._options, "upscaler": model_name(pretrained_model_name_or_path)}
        pipeline = cls(base._model, dtype, **base_options)
        pipeline._device, pipeline._offload = base._device, base._offload
        return pipeline

    def __call__(
        self,
        video: Any = None,
        height: int = 512,
        width: int = 704,
        latents: Tensor | None = None,
        decode_timestep: float | list[float] = 0.0,
        decode_noise_scale: float | list[float] | None = None,
        adain_factor: float = 0.0,
        tone_map_compression_ratio: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Upsamples latents, or the latents of a video.

        Args:
            video: refused: give latents.
            height, width: of a video; latents have their own.
            decode_timestep, decode_noise_scale, generator: of the decoder and of a video; latents need none.
            latents: normalised (B, C, f, h, w), as `LTXConditionPipeline` returns them.
            output_type: only "latent"; the second pass, or kadr's own decoder, makes frames of them.

        Raises:
            RequestError: neither or both of video and latents are given, or another output type.
        """
        check_output_type(output_type)
        if output_type != LATENT:
            raise RequestError(
                f"output_type is {quote(output_type)}; kadr's upsampler returns latents: give output_type='latent', "
                "and pass them to LTXConditionPipeline with a denoise_strength below 1."
            )
        if (video is None) == (latents is None):
            raise RequestError("give video or latents, and not both.")
        check_range("tone_map_compression_ratio", tone_map_compression_ratio, 0.0, 1.0)
        if video is not None:
            raise RequestError(
                "video is given; kadr's upsampler takes latents. Make them with output_type='latent', or start from "
                "the video with `kadr generate --input-video`."
            )
        assert latents is not None
        upscaled = [
            _upscale(self.engine, item[None].float(), adain_factor, tone_map_compression_ratio) for item in latents
        ]
        result = torch.cat(upscaled)
        return LTXPipelineOutput(result) if return_dict else (result,)


def _upscale(engine: Engine, latents: Tensor, adain_factor: float, compression: float) -> Tensor:
    """Upscales normalised latents (1, C, f, h, w); diffusers compares statistics and tone maps before it normalises."""
    frames, height, width = latents.shape[2:]
    request = Request(
        "",
        size=Size(2 * SPATIAL_COMPRESSION * width, 2 * SPATIAL_COMPRESSION * height),
        frames=TEMPORAL_COMPRESSION * (frames - 1) + 1,
        multi_scale=True,
        downscale_factor=0.5,
        second_pass=Pass(sigmas=(0.9094,)),
    )
    with engine.start(request, stages=("upscale",)) as generation, torch.no_grad():
        modules = generation.modules
        with modules.latent_statistics() as vae:
            statistics, small = vae.statistics, vae.statistics.denormalise(latents.to(modules.device))
            with modules.upscaler("spatial") as upscaler:
                upscaled = upscaler(small)
            if adain_factor > 0:
                upscaled = adain(upscaled, small, adain_factor)
            return statistics.normalise(tone_map(upscaled, compression)).cpu()
