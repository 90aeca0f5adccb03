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
from kadr.memory.module_cache import Shelf
from kadr.models.lora_layers import merge_loras, set_lora_strengths
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE
from kadr.pipeline.module_placement import placed
from kadr.pipeline.prompt_cache import PromptCache
from kadr.pipeline.rotation_check import needs_look, rotation_of
from kadr.planning.plan import AS_STORED, Choice, Plan
from kadr.quant.rotation import rotate_weights
from kadr.quant.weight_formats import FP8
from kadr.spec.loras import Loras, Strength
from kadr.spec.model import (
    DECODER,
    ENCODER,
    PASS_STAGES,
    TEXT_ENCODER,
    ModelSpec,
)
from kadr.spec.options import OFFLOAD_AUTO
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
        text: TextEncoderCheckpoint,
        vae: Checkpoint | None,
        *,
        device: str,
        dtype: str,
        second: Checkpoint | None = None,
        loras: Loras | None = None,
        quant: str | None = None,
        offload: str = OFFLOAD_AUTO,
        compiled: bool = False,
        prompt_cache: bool | Path = True,
    ) -> None:
        super().__init__(
            checkpoint,
            text,
            vae,
            device=device,
            dtype=dtype,
            second=second,
            loras=loras,
            quant=quant,
            offload=offload,
            compiled=compiled,
        )
        # However the text encoder is held, it computes the same numbers.
        self.prompts = PromptCache.of(prompt_cache, text, dtype=self.dtype, device=self.device.type)
        self.shelf = Shelf(self.device, pages=release_pages)
        self.plan: Plan | None = None
        self.borrowed: Transformer | None = None
        self.borrowed_lora: Path | None = None  # that it is written as
        self._rotations: dict[Path, int | None] = {}  # of the transformers that were looked at

    def follow(self, plan: Plan) -> None:
        """Lend modules as a plan has it, from now on."""
        self.plan = plan
        self.shelf.keep = plan.kept
        self.shelf.clear(but=plan.kept)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.text.load_tokenizer()

    def text_encoder(self, dtype: torch.dtype | None = None) -> AbstractContextManager[T5Encoder]:
        """Args: dtype: to compute in, instead of the plan's; this one is not kept. So for the others."""
        return self._lent(TEXT_ENCODER, "text", self.text.load, dtype)

    @contextmanager
    def transformer(
        self, number: int = 0, dtype: torch.dtype | None = None, strengths: Sequence[Strength] | None = None
    ) -> Iterator[Transformer]:
        """The transformer of a pass, 0 or 1; the one that is `borrowed`, where it is in memory for another end.

        Args:
            strengths: of the LoRAs; see `Loras.strengths`.
        """
        if self.borrowed is not None:
            yield self.borrowed
            return
        stage, acting = PASS_STAGES[number], self.loras.strengths(number, strengths)
        load = partial(self.load_transformer, number)
        with self._lent(self.transformer_name(number), stage, load, dtype, adapted=True) as module:
            set_lora_strengths(module, acting, self.device)
            try:
                yield module
            finally:
                module.clear_cuda_graphs()  # also where a step was cancelled: what is recorded has these strengths in it

    @contextmanager
    def lending(self, transformer: Transformer, lora: Path) -> Iterator[None]:
        """Lend this transformer in place of one that would be loaded, as long as the block runs.

        Args:
            lora: what it has learned, on disk: for the record.
        """
        self.borrowed, self.borrowed_lora = transformer, lora
        try:
            yield
        finally:
            self.borrowed = self.borrowed_lora = None

    def load_transformer(self, number: int, dtype: torch.dtype, *, as_stored: bool) -> Transformer:
        """The transformer of a pass as its file has it, with merged LoRAs in it; not held in any way yet."""
        checkpoint = self.transformers[number]
        if checkpoint.path not in self._rotations:
            looked = needs_look(checkpoint)
            self._rotations[checkpoint.path] = rotation_of(checkpoint, dtype, self.device) if looked else None
        # What is stored in 8-bit floats is multiplied as it is: to widen and to round it again would lose twice.
        as_stored = as_stored or (self.quant == FP8 and is_quantized(checkpoint.sources["transformer"]))
        as_stored = as_stored and not self.loras.merged  # they are added to plain weights
        module = checkpoint.load_transformer(dtype, keep_storage_dtype=as_stored)
        rotation = self._rotations[checkpoint.path]
        if rotation is not None:
            rotate_weights(module, rotation)
        if self.loras.merged:
            merge_loras(module, self.loras.additions(), self.loras.strengths(number))
        return module

    def upscaler(self, kind: str) -> AbstractContextManager[LatentUpscaler]:
        """A latent upscaler, in float32 as in the official package."""
        checkpoint = self.upscalers[kind]
        return self.shelf.take(f"{kind} upscaler", lambda: checkpoint.load_upscaler(torch.float32).to(self.device))

    def statistics(self) -> AbstractContextManager[VAE]:
        """The VAE with neither encoder nor decoder: the statistics of its latents."""
        load = partial(self.vae.load_vae, torch.float32, with_encoder=False, with_decoder=False)
        return self.shelf.take("statistics", lambda: load().to(self.device))

    def encoder(self, dtype: torch.dtype | None = None) -> AbstractContextManager[VAE]:
        """The VAE without its decoder."""
        return self._lent(ENCODER, "encode", self._vae_part(decoder=False), dtype)

    def decoder(self, dtype: torch.dtype | None = None) -> AbstractContextManager[VAE]:
        """The VAE without its encoder."""
        return self._lent(DECODER, "decode", self._vae_part(encoder=False), dtype)

    def _vae_part(self, **parts: bool) -> Callable[..., VAE]:
        def load(dtype: torch.dtype, *, as_stored: bool) -> VAE:
            return self.vae.load_vae(dtype, **parts)

        return load

    @contextmanager
    def _lent(
        self, name: str, stage: str, load: Callable[..., M], dtype: torch.dtype | None, *, adapted: bool = False
    ) -> Iterator[M]:
        """A module as the plan has it for a stage; in another dtype for this time only.

        Args:
            adapted: with the LoRAs beside its weights.
        """
        choice = self.choice(stage)
        if dtype is not None:
            # Weights that stay as they are stored take no more memory than before, whatever is computed in.
            choice = replace(choice, dtype=_name(dtype), hold=AS_STORED)

        def made() -> M:
            module = load(DTYPES[choice.dtype], as_stored=choice.hold == AS_STORED)
            loras = self.loras.additions() if adapted and not self.loras.merged else ()
            return placed(module, choice, self.device, compiled=self.compiled, loras=loras)

        if dtype is not None:
            self.shelf.clear(but=self.shelf.kept - {name})
            gc.collect()  # the one that was used before may hang in a circle of hooks
        kept_name = name if dtype is None else f"{name} in {choice.dtype}"
        with (
            self.shelf.take(
                kept_name, made, way=(choice.dtype, choice.hold, choice.streamed, choice.together)
            ) as module,
            retain_freed_memory(),
        ):
            yield module

    @property
    def held_bytes(self) -> int:
        """What the modules that are kept take of their own: it is there for those who use them."""
        stages = () if self.plan is None else self.plan.stages
        own = {stage.part: stage.choice.own for stage in stages}
        return sum(own.get(name, 0) for name in self.shelf.kept)

    def choice(self, stage: str) -> Choice:
        """How the module of a stage is held; the plain way where there is no plan."""
        planned = () if self.plan is None else self.plan.stages
        plain = Choice(dtype=_name(self.dtype))
        return next((each.choice for each in planned if each.stage == stage), plain)

    def dtype_of(self, stage: str) -> torch.dtype:
        """What a stage is computed in."""
        return DTYPES[self.choice(stage).dtype]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
