"""The official pipeline on one of our tiny checkpoints, fed with the noise that a seed of ours gives.

Everything is read from the files by the official package's own loaders and by transformers. What the official code
draws from two generators is replaced by our named streams, so that the same numbers go in at the same places.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
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
from ltx_video.models.transformers.symmetric_patchifier import SymmetricPatchifier
from ltx_video.models.transformers.transformer3d import Transformer3DModel
from ltx_video.pipelines.pipeline_ltx_video import ConditioningItem, LTXVideoPipeline
from ltx_video.schedulers.rf import RectifiedFlowScheduler
from safetensors import safe_open
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from kadr.media.image import prepare_picture
from kadr.pipeline.request import Request
from kadr.sampling.noise import NoiseStreams
from kadr.shapes import LatentGrid, Size
from tests.tiny import CHANNELS, MODEL

_ENHANCERS = ("image_caption_model", "image_caption_processor", "llm_model", "llm_tokenizer")


@dataclass(frozen=True)
class Run:
    """What came out of the official pipeline.

    Args:
        latents: (1, C, f, h, w), as the loop left them.
        pixels: (1, 3, F, H, W), as the decoder left them: whole, not clamped.
        frames: uint8 (F, H, W, 3), cropped and trimmed as the official script does.
        drawn: the names of all noise it asked for, in order.
    """

    latents: Tensor
    pixels: Tensor
    frames: Tensor
    drawn: tuple[str, ...]


def open_pipeline(home: Path) -> LTXVideoPipeline:
    """As create_ltx_video_pipeline of inference.py, in float32."""
    path = home / MODEL
    pipeline = LTXVideoPipeline(
        tokenizer=_tokenizer(home),
        text_encoder=T5EncoderModel.from_pretrained(home, subfolder="text_encoder").float().eval(),
        vae=CausalVideoAutoencoder.from_pretrained(path).float().eval(),
        transformer=Transformer3DModel.from_pretrained(path).float().eval(),
        scheduler=RectifiedFlowScheduler.from_pretrained(path),
        patchifier=SymmetricPatchifier(patch_size=1),
        allowed_inference_steps=_allowed(path),
        **{f"prompt_enhancer_{name}": None for name in _ENHANCERS},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: LTXVideoPipeline, request: Request, start: Tensor | None = None) -> Run:
    """What infer() of inference.py does with a request that leaves nothing to a recipe.

    Args:
        start: normalised latents to begin from.
    """
    size = request.size
    assert isinstance(size, Size)
    assert request.frames is not None
    height, width = (((side - 1) // 32 + 1) * 32 for side in (size.height, size.width))
    frames = ((request.frames - 2) // 8 + 1) * 8 + 1
    kept: dict[str, Tensor] = {}
    decode, step = official_module.vae_decode, pipeline.denoising_step

    def seen_decode(*given: Any, **more: Any) -> Tensor:
        return kept.setdefault("pixels", decode(*given, **more))

    def seen_step(*given: Any, **more: Any) -> Tensor:
        kept["tokens"] = step(*given, **more)
        return kept["tokens"]

    with pytest.MonkeyPatch.context() as patch, _our_noise(patch, request, frames, size) as drawn:
        patch.setattr(official_module, "vae_decode", seen_decode)
        patch.setattr(pipeline, "denoising_step", seen_step)
        images = pipeline(
            height=height,
            width=width,
            num_frames=frames,
            frame_rate=request.fps,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.steps,
            timesteps=None if request.levels is None else list(request.levels),
            skip_initial_inference_steps=request.skip_initial,
            skip_final_inference_steps=request.skip_final,
            latents=start,
            guidance_scale=request.guidance,
            stg_scale=0.0,
            rescaling_scale=1.0,
            stochastic_sampling=request.stochastic,
            decode_timestep=request.decode_timestep,
            decode_noise_scale=request.decode_noise,
            conditioning_items=_conditions(request, size),
            image_cond_noise_scale=request.image_noise,
            is_video=True,
            vae_per_channel_normalize=True,
            output_type="pt",
        ).images
    grid = LatentGrid(frames // 8 + 1, height // 32, width // 32)
    latents = kept["tokens"].transpose(1, 2).unflatten(2, (grid.frames, grid.height, grid.width))
    return Run(latents, kept["pixels"], _cropped(images, request.frames, size, height, width), tuple(drawn))


def _tokenizer(home: Path) -> T5Tokenizer:
    """Transformers' tokenizer with the same pieces. It would read spiece.model itself, but only where protobuf is."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(home / "tokenizer" / "spiece.model"))
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def _allowed(path: Path) -> list[float] | None:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["config"]).get("allowed_inference_steps")


def _conditions(request: Request, size: Size) -> list[ConditioningItem] | None:
    assert request.image_crf is not None
    return [
        ConditioningItem(prepare_picture(given.media, size, request.image_crf), given.frame, given.strength)
        for given in request.conditions
    ] or None


@contextmanager
def _our_noise(patch: pytest.MonkeyPatch, request: Request, frames: int, size: Size) -> Iterator[list[str]]:
    """Answer every draw of the official code with the stream that kadr uses at that place."""
    streams = NoiseStreams(request.seed)
    drawn: list[str] = []
    conditions, steps, injections = count(), count(), count(1)
    real = torch.randn

    def draw(name: str, shape: Any) -> Tensor:
        drawn.append(name)
        return streams.draw(name, shape)

    def randn_tensor(shape: Any, **_: Any) -> Tensor:
        if drawn:
            return draw(f"condition {next(conditions)}", shape)
        grid = LatentGrid.of(size, frames)
        first = draw("initial", (1, CHANNELS, grid.frames, grid.height, grid.width))
        return first.flatten(2).transpose(1, 2).reshape(*shape)

    def randn_like(like: Tensor) -> Tensor:
        return draw("decode" if like.ndim == 5 else f"stochastic {next(steps)}", like.shape)

    def randn(*shape: Any, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        if generator is not None:  # our own
            return real(*shape, generator=generator, **options)
        return draw(f"injection {next(injections)}", shape[0])

    patch.setattr(official_module, "randn_tensor", randn_tensor)
    patch.setattr(torch, "randn_like", randn_like)
    patch.setattr(torch, "randn", randn)
    patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    yield drawn


def _cropped(images: Tensor, frames: int, size: Size, height: int, width: int) -> Tensor:
    """The end of infer(): (1, 3, F, H, W) in [0, 1] -> uint8 (F, H, W, 3)."""
    top, left = (height - size.height) // 2, (width - size.width) // 2
    bottom, right = height - size.height - top, width - size.width - left
    images = images[:, :, :frames, top : height - bottom, left : width - right]
    return (images[0].permute(1, 2, 3, 0).float() * 255).to(torch.uint8)
