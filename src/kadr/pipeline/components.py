"""The modules of a model, each loaded for its stage and placed as the plan says."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.memory_map import release_pages
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.kernels.cpu.malloc import retain_freed_memory
from kadr.memory.device import DTYPES, move_module
from kadr.memory.module_cache import ModuleCache
from kadr.models.lora_layers import merge_loras, set_lora_strengths
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE
from kadr.pipeline.module_placement import place_module
from kadr.pipeline.prompt_cache import PromptCache
from kadr.pipeline.rotation_check import detect_rotation, may_be_rotated
from kadr.planning.placement import AS_STORED, Placement
from kadr.planning.plan import Plan
from kadr.quant.rotation import rotate_weights
from kadr.quant.weight_formats import FP8
from kadr.spec.lora import LoraStrength
from kadr.spec.loras import Loras
from kadr.spec.model import (
    PASS_STAGES,
    TEXT_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    ModelSpec,
)
from kadr.spec.offload import OFFLOAD_AUTO
from kadr.spec.weights import is_quantized
from kadr.text.tokenizer import Tokenizer

M = TypeVar("M", bound=nn.Module)


class Components(ModelSpec):
    """A model whose modules can be acquired for a stage; its specification is the base class.

    Args:
        prompt_cache: see `Engine.open`. All other arguments are those of `ModelSpec`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text_encoder_checkpoint: TextEncoderCheckpoint,
        vae_checkpoint: Checkpoint | None,
        *,
        device: str,
        dtype: str,
        second_checkpoint: Checkpoint | None = None,
        loras: Loras | None = None,
        quant: str | None = None,
        offload: str = OFFLOAD_AUTO,
        compile_transformer: bool = False,
        prompt_cache: bool | Path = True,
    ) -> None:
        super().__init__(
            checkpoint,
            text_encoder_checkpoint,
            vae_checkpoint,
            device=device,
            dtype=dtype,
            second_checkpoint=second_checkpoint,
            loras=loras,
            quant=quant,
            offload=offload,
            compile_transformer=compile_transformer,
        )
        # No weight format in the key: the text encoder's placement does not change what it computes.
        self.prompt_cache = PromptCache.open(
            prompt_cache, text_encoder_checkpoint, dtype=self.dtype, device=self.device.type
        )
        self.module_cache = ModuleCache(self.device, release_pages=release_pages)
        self.plan: Plan | None = None
        self.transformer_override: Transformer | None = None
        self.override_lora_path: Path | None = None  # where its weights are saved
        self._rotations: dict[Path, int | None] = {}  # Hadamard rotation of each checked transformer

    def apply_plan(self, plan: Plan) -> None:
        """Places modules as the plan says from now on, and frees cached ones that it does not keep."""
        self.plan = plan
        self.module_cache.names_to_keep = plan.cached_components
        self.module_cache.clear(keep=plan.cached_components)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the text encoder."""
        return self.text_encoder_checkpoint.load_tokenizer()

    def text_encoder(self, dtype: torch.dtype | None = None) -> AbstractContextManager[T5Encoder]:
        """Acquires the text encoder.

        Args:
            dtype: dtype of the computation instead of the plan's; such a module is not cached.
        """
        return self._acquire(TEXT_ENCODER, "text", self.text_encoder_checkpoint.load, dtype)

    @contextmanager
    def transformer(
        self,
        pass_index: int = 0,
        dtype: torch.dtype | None = None,
        lora_strengths: Sequence[LoraStrength] | None = None,
    ) -> Iterator[Transformer]:
        """Acquires the transformer of a pass, 0 or 1, or the one set by `override_transformer`.

        Args:
            dtype: dtype of the computation instead of the plan's; such a module is not cached.
            lora_strengths: strengths of the LoRAs; see `Loras.strengths`.
        """
        if self.transformer_override is not None:
            yield self.transformer_override
            return
        strengths = self.loras.strengths(pass_index, lora_strengths)
        with self._acquire_transformer(pass_index, dtype) as module, _use_strengths(module, strengths, self.device):
            yield module

    def _acquire_transformer(self, pass_index: int, dtype: torch.dtype | None) -> AbstractContextManager[Transformer]:
        """Acquires the transformer of a pass; its LoRAs have the strengths that were set last."""
        stage, load = PASS_STAGES[pass_index], partial(self.load_transformer, pass_index)
        return self._acquire(self.transformer_component(pass_index), stage, load, dtype, with_loras=True)

    @contextmanager
    def override_transformer(self, transformer: Transformer, lora_path: Path) -> Iterator[None]:
        """Uses this transformer instead of loading one, while the context lasts.

        Args:
            lora_path: file of the LoRA that the transformer is being trained with, for the video's metadata.
        """
        self.transformer_override, self.override_lora_path = transformer, lora_path
        try:
            yield
        finally:
            self.transformer_override = self.override_lora_path = None

    def load_transformer(self, pass_index: int, dtype: torch.dtype, *, keep_storage_dtype: bool) -> Transformer:
        """Loads the transformer of a pass from its file and merges LoRAs; it has no placement yet."""
        checkpoint = self.transformer_checkpoints[pass_index]
        if checkpoint.path not in self._rotations:
            is_suspect = may_be_rotated(checkpoint)
            self._rotations[checkpoint.path] = detect_rotation(checkpoint, dtype, self.device) if is_suspect else None
        # Weights stored in 8-bit floats are multiplied as they are: widening and rounding again would lose twice.
        keep_storage_dtype = keep_storage_dtype or (
            self.quant == FP8 and is_quantized(checkpoint.sources["transformer"])
        )
        keep_storage_dtype = keep_storage_dtype and not self.loras.is_merged  # they are merged into unquantized weights
        module = checkpoint.load_transformer(dtype, keep_storage_dtype=keep_storage_dtype)
        rotation = self._rotations[checkpoint.path]
        if rotation is not None:
            rotate_weights(module, rotation)
        if self.loras.is_merged:
            merge_loras(module, self.loras.load(), self.loras.strengths(pass_index))
        return module

    def upscaler(self, kind: str) -> AbstractContextManager[LatentUpscaler]:
        """Acquires a latent upscaler, in float32 as in the official package."""
        checkpoint = self.upscaler_checkpoints[kind]
        return self.module_cache.acquire(
            f"{kind} upscaler", lambda: move_module(checkpoint.load_upscaler(torch.float32), self.device)
        )

    def latent_statistics(self) -> AbstractContextManager[VAE]:
        """Acquires the VAE without encoder and decoder: the statistics of its latents."""
        load = partial(self.vae_checkpoint.load_vae, torch.float32, with_encoder=False, with_decoder=False)
        return self.module_cache.acquire("statistics", lambda: load().to(self.device))

    def vae_encoder(self, dtype: torch.dtype | None = None) -> AbstractContextManager[VAE]:
        """Acquires the VAE without its decoder; dtype as for `text_encoder`."""
        return self._acquire(VAE_ENCODER, "encode", self._vae_loader(with_decoder=False), dtype)

    def vae_decoder(self, dtype: torch.dtype | None = None) -> AbstractContextManager[VAE]:
        """Acquires the VAE without its encoder; dtype as for `text_encoder`."""
        return self._acquire(VAE_DECODER, "decode", self._vae_loader(with_encoder=False), dtype)

    def _vae_loader(self, **options: bool) -> Callable[..., VAE]:
        def load(dtype: torch.dtype, *, keep_storage_dtype: bool) -> VAE:
            return self.vae_checkpoint.load_vae(dtype, **options)

        return load

    @contextmanager
    def _acquire(
        self, name: str, stage: str, load: Callable[..., M], dtype: torch.dtype | None, *, with_loras: bool = False
    ) -> Iterator[M]:
        """Acquires a module in the plan's placement of a stage; with `dtype` in that one, for this time only.

        Args:
            with_loras: attach unmerged LoRAs.
        """
        placement = self.placement(stage)
        if dtype is not None:
            # Weights kept as stored take no more memory than before, in any dtype of the computation.
            placement = replace(placement, dtype=_dtype_name(dtype), weight_format=AS_STORED)

        def load_placed() -> M:
            module = load(DTYPES[placement.dtype], keep_storage_dtype=placement.weight_format == AS_STORED)
            loras = self.loras.load() if with_loras and not self.loras.is_merged else ()
            return place_module(
                module, placement, self.device, compile_transformer=self.compile_transformer, loras=loras
            )

        if dtype is not None:
            self.module_cache.clear(keep=self.module_cache.cached_names - {name})
            gc.collect()  # the one used before may be in a reference cycle of hooks
        cache_name = name if dtype is None else f"{name} in {placement.dtype}"
        configuration = (
            placement.dtype,
            placement.weight_format,
            placement.streamed_blocks,
            placement.winograd_frames,
        )
        with (
            self.module_cache.acquire(cache_name, load_placed, configuration=configuration) as module,
            retain_freed_memory(),
        ):
            yield module

    @property
    def cached_private_bytes(self) -> int:
        """Private bytes of cached modules, free to the stage that reuses one."""
        stages = () if self.plan is None else self.plan.stages
        private_bytes = {stage.component: stage.placement.private_bytes for stage in stages}
        return sum(private_bytes.get(name, 0) for name in self.module_cache.cached_names)

    def placement(self, stage: str) -> Placement:
        """Returns the placement of a stage: the plan's, or the default one without a plan."""
        stages = () if self.plan is None else self.plan.stages
        default = Placement(dtype=_dtype_name(self.dtype))
        return next((planned.placement for planned in stages if planned.stage == stage), default)

    def stage_dtype(self, stage: str) -> torch.dtype:
        """Returns the dtype of a stage's computation."""
        return DTYPES[self.placement(stage).dtype]


@contextmanager
def _use_strengths(transformer: Transformer, strengths: Sequence[float], device: torch.device) -> Iterator[None]:
    """Sets the strengths of the LoRAs, and clears the CUDA graphs in the end."""
    set_lora_strengths(transformer, strengths, device)
    try:
        yield
    finally:
        transformer.clear_cuda_graphs()  # also after a cancelled step: graphs have these strengths recorded


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
