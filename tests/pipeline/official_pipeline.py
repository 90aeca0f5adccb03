"""Official pipeline on a tiny checkpoint, with kadr's noise.

The official package's own loaders and transformers read the files. Noise that the official code draws from two
generators is replaced by kadr's named streams, so that both implementations use the same numbers at the same places.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import ltx_video.pipelines.pipeline_ltx_video as official_module
import pytest
import sentencepiece
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from ltx_video.models.autoencoders.causal_video_autoencoder import CausalVideoAutoencoder
from ltx_video.models.autoencoders.latent_upsampler import LatentUpsampler
from ltx_video.models.transformers.symmetric_patchifier import SymmetricPatchifier
from ltx_video.models.transformers.transformer3d import Transformer3DModel
from ltx_video.pipelines.pipeline_ltx_video import ConditioningItem, LTXMultiScalePipeline, LTXVideoPipeline
from ltx_video.schedulers.rf import RectifiedFlowScheduler
from ltx_video.utils.skip_layer_strategy import SkipLayerStrategy
from safetensors import safe_open
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from kadr.media.image import crop_to_aspect, load_image
from kadr.media.prepare import prepare_image
from kadr.pipeline.stages.prepared_frames import OpenedMedia
from kadr.request.request import Request
from kadr.request.resolved_conditions import ResolvedCondition, resolve_conditions
from kadr.request.resolved_media import resolve_input_video
from kadr.sampling.noise import NoiseStreams
from kadr.sampling.settings import Pass
from kadr.shapes import LatentGrid, Size, snap_frames
from tests.tiny_models import CHANNELS, MODEL_FILE

MODES = {
    "attention_values": SkipLayerStrategy.AttentionValues,
    "attention_skip": SkipLayerStrategy.AttentionSkip,
    "transformer_block": SkipLayerStrategy.TransformerBlock,
}
_ENHANCERS = ("image_caption_model", "image_caption_processor", "llm_model", "llm_tokenizer")


@dataclass(frozen=True)
class OfficialResult:
    """Output of the official pipeline.

    Args:
        latents: (1, C, f, h, w) after the last step.
        pixels: (1, 3, F, H, W) from the decoder: not cropped, not clamped.
        frames: uint8 (F, H, W, 3), cropped and trimmed as by the official script.
        noise_names: names of all noise drawn, in order.
    """

    latents: Tensor
    pixels: Tensor
    frames: Tensor
    noise_names: tuple[str, ...]


def open_pipeline(home: Path) -> LTXVideoPipeline:
    """Opens the pipeline like create_ltx_video_pipeline of inference.py, in float32."""
    path = home / MODEL_FILE
    pipeline = LTXVideoPipeline(
        tokenizer=_tokenizer(home),
        text_encoder=T5EncoderModel.from_pretrained(home, subfolder="text_encoder").float().eval(),
        vae=CausalVideoAutoencoder.from_pretrained(path).float().eval(),
        transformer=Transformer3DModel.from_pretrained(path).float().eval(),
        scheduler=RectifiedFlowScheduler.from_pretrained(path),
        patchifier=SymmetricPatchifier(patch_size=1),
        allowed_inference_steps=_allowed_timesteps(path),
        **{f"prompt_enhancer_{name}": None for name in _ENHANCERS},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_upsampler(path: Path) -> LatentUpsampler:
    """Opens the upscaler like create_latent_upsampler of inference.py."""
    return LatentUpsampler.from_pretrained(path).eval()


def run_official(
    pipeline: LTXVideoPipeline,
    request: Request,
    start_latents: Tensor | None = None,
    *,
    upsampler: LatentUpsampler | None = None,
) -> OfficialResult:
    """Runs a complete request like infer() of inference.py.

    Args:
        start_latents: normalised latents to start from.
        upsampler: upscaler for two passes; None for one.
    """
    size = request.size
    assert isinstance(size, Size)
    assert request.frames is not None
    height, width = (((side - 1) // 32 + 1) * 32 for side in (size.height, size.width))
    frames = ((request.frames - 2) // 8 + 1) * 8 + 1
    captured: dict[str, Tensor] = {}
    decode, step = official_module.vae_decode, pipeline.denoising_step

    def capture_pixels(*args: Any, **kwargs: Any) -> Tensor:
        return captured.setdefault("pixels", decode(*args, **kwargs))

    def capture_tokens(*args: Any, **kwargs: Any) -> Tensor:
        captured["tokens"] = step(*args, **kwargs)
        return captured["tokens"]

    common = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "frame_rate": request.fps,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "decode_timestep": request.decode_timestep,
        "decode_noise_scale": request.decode_noise,
        "conditioning_items": _conditioning_items(request, size),
        "media_items": _initial_video(request, size),
        "image_cond_noise_scale": request.image_noise,
        "is_video": True,
        "vae_per_channel_normalize": True,
        "output_type": "pt",
    }
    first = _official_pass(request.first_pass())
    with pytest.MonkeyPatch.context() as patch:
        noise = _NamedNoise(patch, request)
        patch.setattr(official_module, "vae_decode", capture_pixels)
        patch.setattr(pipeline, "denoising_step", capture_tokens)
        if upsampler is None:
            noise.begin_pass(height, width)
            images = pipeline(**common, **first, latents=start_latents).images
        else:
            assert request.second_pass is not None
            scales = LTXMultiScalePipeline(_NotifyingPipeline(pipeline, noise), upsampler)
            passes = {"first_pass": first, "second_pass": _official_pass(request.second_pass)}
            images = scales(0.6666666, **passes, **common).images
    grid = noise.grid
    latents = (
        captured["tokens"][:, -grid.num_tokens :].transpose(1, 2).unflatten(2, (grid.frames, grid.height, grid.width))
    )
    cropped = _crop_to_request(images, request.frames, size, height, width)
    return OfficialResult(latents, captured["pixels"], cropped, tuple(noise.noise_names))


def _official_pass(settings: Pass) -> dict[str, Any]:
    """Returns a pass as keywords of the official pipeline."""
    guidance = settings.guidance
    return {
        "num_inference_steps": settings.steps,
        "timesteps": None if settings.sigmas is None else list(settings.sigmas),
        "skip_initial_inference_steps": settings.skip_initial,
        "skip_final_inference_steps": settings.skip_final,
        "guidance_scale": _as_lists(guidance.cfg_scale),
        "stg_scale": _as_lists(guidance.stg_scale) or 0.0,
        "rescaling_scale": 1.0 if guidance.rescale is None else _as_lists(guidance.rescale),
        "skip_block_list": None if guidance.skip_blocks is None else _as_lists(guidance.skip_blocks),
        "guidance_timesteps": None if guidance.sigmas is None else list(guidance.sigmas),
        "skip_layer_strategy": MODES[guidance.stg_mode or "attention_values"],
        "cfg_star_rescale": bool(guidance.cfg_star),
        "stochastic_sampling": settings.sampler == "euler_stochastic",
        "tone_map_compression_ratio": settings.tone_map or 0.0,
    }


def _as_lists(value: Any) -> Any:
    """Converts nested tuples to lists."""
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


class _NotifyingPipeline:
    """Pipeline for the multi-scale one; tells the noise when a pass starts, and at what size."""

    def __init__(self, pipeline: LTXVideoPipeline, noise: _NamedNoise) -> None:
        self.pipeline, self.noise = pipeline, noise
        self.vae, self.vae_scale_factor = pipeline.vae, pipeline.vae_scale_factor

    def __call__(self, **kwargs: Any) -> Any:
        self.noise.begin_pass(kwargs["height"], kwargs["width"])
        return self.pipeline(**kwargs)


def _tokenizer(home: Path) -> T5Tokenizer:
    """Returns transformers' tokenizer with the same pieces; it reads spiece.model itself only with protobuf."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(home / "tokenizer" / "spiece.model"))
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def _allowed_timesteps(path: Path) -> list[float] | None:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["config"]).get("allowed_inference_steps")


def _conditioning_items(request: Request, size: Size) -> list[ConditioningItem] | None:
    assert request.image_crf is not None
    return [
        ConditioningItem(_condition_pixels(item, size, request.image_crf), item.start_frame, item.condition.strength)
        for item in resolve_conditions(request.conditions, request.frames or 1)
    ] or None


def _condition_pixels(item: ResolvedCondition, size: Size, crf: int) -> Tensor:
    """Prepares a condition like prepare_conditioning of inference.py: own resolution, margins of the output."""
    images = []
    for frame in OpenedMedia([item.media]).frames(item.media):
        cropped = crop_to_aspect(load_image(frame), size)
        left, right, top, bottom = size.padding()
        padded_size = Size(cropped.width // 2 * 2 + left + right, cropped.height // 2 * 2 + top + bottom)
        images.append(prepare_image(frame, size, crf, padded_size))
    return torch.cat(images, dim=2)


def _initial_video(request: Request, size: Size) -> Tensor | None:
    if request.input_video is None:
        return None
    assert request.image_crf is not None
    count = request.frames or 1
    media = resolve_input_video(request.input_video, count, snap_frames(count))
    frames = OpenedMedia([media]).frames(media)
    return torch.cat([prepare_image(frame, size, request.image_crf, resize=True) for frame in frames], dim=2)


class _NamedNoise:
    """Replaces every draw of the official code by the stream that kadr uses at that place."""

    def __init__(self, patch: pytest.MonkeyPatch, request: Request) -> None:
        self.streams = NoiseStreams(request.seed)
        self.frames = request.frames or 1
        conditions = resolve_conditions(request.conditions, self.frames)
        self.keyframe_indices = [index for index, item in enumerate(conditions) if item.start_frame > 0]
        self.noise_names: list[str] = []
        self.passes = 0
        self.injections = count(1)
        torch_randn = torch.randn

        def randn(*shape: Any, generator: torch.Generator | None = None, **options: Any) -> Tensor:
            if generator is not None:  # drawn by kadr
                return torch_randn(*shape, generator=generator, **options)
            return self.draw(f"injection {next(self.injections)}", shape[0])

        patch.setattr(official_module, "randn_tensor", self.randn_tensor)
        patch.setattr(torch, "randn_like", self.randn_like)
        patch.setattr(torch, "randn", randn)
        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())

    def begin_pass(self, height: int, width: int) -> None:
        """Starts a pass of this size."""
        self.grid = LatentGrid.for_video(Size(width, height), self.frames)
        self.prefix = "second " if self.passes else ""
        self.passes += 1
        self.has_initial = False
        self.keyframes, self.conditions, self.steps = iter(self.keyframe_indices), count(), count()

    def draw(self, name: str, shape: Any) -> Tensor:
        self.noise_names.append(name)
        return self.streams.draw(name, shape)

    def randn_tensor(self, shape: Any, **_: Any) -> Tensor:
        if len(shape) == 5:
            return self.draw(f"{self.prefix}keyframe {next(self.keyframes)}", shape)
        if self.has_initial:
            return self.draw_tokens(f"{self.prefix}condition {next(self.conditions)}", shape)
        self.has_initial = True
        grid = self.grid
        noise = self.draw(f"{self.prefix}initial", (1, CHANNELS, grid.frames, grid.height, grid.width))
        return noise.flatten(2).transpose(1, 2).reshape(*shape)

    def randn_like(self, like: Tensor) -> Tensor:
        if like.ndim == 5:
            return self.draw("decode", like.shape)
        return self.draw_tokens(f"{self.prefix}stochastic {next(self.steps)}", like.shape)

    def draw_tokens(self, name: str, shape: Any) -> Tensor:
        """Draws noise for all tokens. The official code puts appended tokens before the video, kadr after it."""
        noise = self.draw(name, shape)
        return torch.cat([noise[:, self.grid.num_tokens :], noise[:, : self.grid.num_tokens]], dim=1)


def _crop_to_request(images: Tensor, frames: int, size: Size, height: int, width: int) -> Tensor:
    """Crops like the end of infer(): (1, 3, F, H, W) in [0, 1] -> uint8 (F, H, W, 3)."""
    top, left = (height - size.height) // 2, (width - size.width) // 2
    bottom, right = height - size.height - top, width - size.width - left
    images = images[:, :, :frames, top : height - bottom, left : width - right]
    return (images[0].permute(1, 2, 3, 0).float() * 255).to(torch.uint8)
