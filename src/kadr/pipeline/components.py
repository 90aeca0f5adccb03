"""The modules of a model: in memory only while a stage runs."""

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
from kadr.memory.device import DTYPES
from kadr.memory.module_cache import ModuleCache
from kadr.models.lora_layers import merge_loras, set_lora_strengths
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE
from kadr.pipeline.module_placement import place_module
from kadr.pipeline.prompt_cache import PromptCache
from kadr.pipeline.rotation_check import detect_rotation, may_be_rotated
from kadr.planning.plan import AS_STORED, Placement, Plan
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
    """What a generation takes its modules from.

    Args:
        prompt_cache: see `Engine.open`; the others as of `ModelSpec`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text_encoder_folder: TextEncoderCheckpoint,
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
            text_encoder_folder,
            vae_checkpoint,
            device=device,
            dtype=dtype,
            second=second_checkpoint,
            loras=loras,
            quant=quant,
            offload=offload,
            compiled=compile_transformer,
        )
        # However the text encoder is held, it computes the same numbers.
        self.prompt_cache = PromptCache.open(
            prompt_cache, text_encoder_folder, dtype=self.dtype, device=self.device.type
        )
        self.module_cache = ModuleCache(self.device, release_pages=release_pages)
        self.plan: Plan | None = None
        self.transformer_override: Transformer | None = None
        self.override_lora_path: Path | None = None  # that it is written as
        self._rotations: dict[Path, int | None] = {}  # of the transformers that were looked at

    def apply_plan(self, plan: Plan) -> None:
        """Lend modules as a plan has it, from now on."""
        self.plan = plan
        self.module_cache.names_to_keep = plan.cached_components
        self.module_cache.clear(keep=plan.cached_components)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.text_encoder_folder.load_tokenizer()

    def text_encoder(self, dtype: torch.dtype | None = None) -> AbstractContextManager[T5Encoder]:
        """Args: dtype: to compute in, instead of the plan's; this one is not kept. So for the others."""
        return self._acquire(TEXT_ENCODER, "text", self.text_encoder_folder.load, dtype)

    @contextmanager
    def transformer(
        self,
        pass_index: int = 0,
        dtype: torch.dtype | None = None,
        lora_strengths: Sequence[LoraStrength] | None = None,
    ) -> Iterator[Transformer]:
        """The transformer of a pass, 0 or 1; the one that is `borrowed`, where it is in memory for another end.

        Args:
            lora_strengths: of the LoRAs; see `Loras.strengths`.
        """
        if self.transformer_override is not None:
            yield self.transformer_override
            return
        stage, acting = PASS_STAGES[pass_index], self.loras.strengths(pass_index, lora_strengths)
        load = partial(self.load_transformer, pass_index)
        with self._acquire(self.transformer_component(pass_index), stage, load, dtype, with_loras=True) as module:
            set_lora_strengths(module, acting, self.device)
            try:
                yield module
            finally:
                module.clear_cuda_graphs()  # also where a step was cancelled: what is recorded has these strengths in it

    @contextmanager
    def override_transformer(self, transformer: Transformer, lora_path: Path) -> Iterator[None]:
        """Lend this transformer in place of one that would be loaded, as long as the block runs.

        Args:
            lora_path: what it has learned, on disk: for the record.
        """
        self.transformer_override, self.override_lora_path = transformer, lora_path
        try:
            yield
        finally:
            self.transformer_override = self.override_lora_path = None

    def load_transformer(self, pass_index: int, dtype: torch.dtype, *, keep_storage_dtype: bool) -> Transformer:
        """The transformer of a pass as its file has it, with merged LoRAs in it; not held in any way yet."""
        checkpoint = self.transformer_checkpoints[pass_index]
        if checkpoint.path not in self._rotations:
            looked = may_be_rotated(checkpoint)
            self._rotations[checkpoint.path] = detect_rotation(checkpoint, dtype, self.device) if looked else None
        # What is stored in 8-bit floats is multiplied as it is: to widen and to round it again would lose twice.
        keep_storage_dtype = keep_storage_dtype or (
            self.quant == FP8 and is_quantized(checkpoint.sources["transformer"])
        )
        keep_storage_dtype = keep_storage_dtype and not self.loras.is_merged  # they are added to plain weights
        module = checkpoint.load_transformer(dtype, keep_storage_dtype=keep_storage_dtype)
        rotation = self._rotations[checkpoint.path]
        if rotation is not None:
            rotate_weights(module, rotation)
        if self.loras.is_merged:
            merge_loras(module, self.loras.load(), self.loras.strengths(pass_index))
        return module

    def upscaler(self, kind: str) -> AbstractContextManager[LatentUpscaler]:
        """A latent upscaler, in float32 as in the official package."""
        checkpoint = self.upscaler_checkpoints[kind]
        return self.module_cache.acquire(
            f"{kind} upscaler", lambda: checkpoint.load_upscaler(torch.float32).to(self.device)
        )

    def latent_statistics(self) -> AbstractContextManager[VAE]:
        """The VAE with neither encoder nor decoder: the statistics of its latents."""
        load = partial(self.vae_checkpoint.load_vae, torch.float32, with_encoder=False, with_decoder=False)
        return self.module_cache.acquire("statistics", lambda: load().to(self.device))

    def vae_encoder(self, dtype: torch.dtype | None = None) -> AbstractContextManager[VAE]:
        """The VAE without its decoder."""
        return self._acquire(VAE_ENCODER, "encode", self._vae_loader(with_decoder=False), dtype)

    def vae_decoder(self, dtype: torch.dtype | None = None) -> AbstractContextManager[VAE]:
        """The VAE without its encoder."""
        return self._acquire(VAE_DECODER, "decode", self._vae_loader(with_encoder=False), dtype)

    def _vae_loader(self, **parts: bool) -> Callable[..., VAE]:
        def load(dtype: torch.dtype, *, keep_storage_dtype: bool) -> VAE:
            return self.vae_checkpoint.load_vae(dtype, **parts)

        return load

    @contextmanager
    def _acquire(
        self, name: str, stage: str, load: Callable[..., M], dtype: torch.dtype | None, *, with_loras: bool = False
    ) -> Iterator[M]:
        """A module as the plan has it for a stage; in another dtype for this time only.

        Args:
            with_loras: with the LoRAs beside its weights.
        """
        choice = self.placement(stage)
        if dtype is not None:
            # Weights that stay as they are stored take no more memory than before, whatever is computed in.
            choice = replace(choice, dtype=_dtype_name(dtype), weight_format=AS_STORED)

        def made() -> M:
            module = load(DTYPES[choice.dtype], keep_storage_dtype=choice.weight_format == AS_STORED)
            loras = self.loras.load() if with_loras and not self.loras.is_merged else ()
            return place_module(module, choice, self.device, compile_transformer=self.compile_transformer, loras=loras)

        if dtype is not None:
            self.module_cache.clear(keep=self.module_cache.cached_names - {name})
            gc.collect()  # the one that was used before may hang in a circle of hooks
        kept_name = name if dtype is None else f"{name} in {choice.dtype}"
        with (
            self.module_cache.acquire(
                kept_name,
                made,
                configuration=(choice.dtype, choice.weight_format, choice.streamed_blocks, choice.winograd_frames),
            ) as module,
            retain_freed_memory(),
        ):
            yield module

    @property
    def cached_private_bytes(self) -> int:
        """What the modules that are kept take of their own: it is there for those who use them."""
        stages = () if self.plan is None else self.plan.stages
        own = {stage.component: stage.placement.private_bytes for stage in stages}
        return sum(own.get(name, 0) for name in self.module_cache.cached_names)

    def placement(self, stage: str) -> Placement:
        """How the module of a stage is held; the plain way where there is no plan."""
        planned = () if self.plan is None else self.plan.stages
        plain = Placement(dtype=_dtype_name(self.dtype))
        return next((each.placement for each in planned if each.stage == stage), plain)

    def stage_dtype(self, stage: str) -> torch.dtype:
        """What a stage is computed in."""
        return DTYPES[self.placement(stage).dtype]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
