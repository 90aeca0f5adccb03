"""The modules of one generation, each loaded for its stage and placed as the plan says."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from kadr.errors import RequestError
from kadr.kernels.cpu.malloc import retain_freed_memory
from kadr.memory.device import DTYPES, move_module
from kadr.memory.module_cache import ModuleCache
from kadr.models.lora_layers import set_lora_strengths
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE
from kadr.pipeline.loading.module_loader import ModuleLoader
from kadr.pipeline.loading.module_placement import place_module
from kadr.pipeline.notices import Notices
from kadr.pipeline.progress import OnLoad, ignore_loads
from kadr.planning.placement import AS_STORED, Placement
from kadr.planning.plan import Plan
from kadr.quant.layers import uses_scratch
from kadr.spec.model import PASS_STAGES, TEXT_ENCODER, UPSCALERS, VAE_DECODER, VAE_ENCODER, ModelSpec

M = TypeVar("M", bound=nn.Module)
STATISTICS = "statistics"  # of the latents: a few kilobytes, always kept


class TrainedTransformer(NamedTuple):
    """A transformer in training, used by a generation instead of one that it would load.

    Args:
        lora_path: file of the LoRA that it is trained with, for the video's metadata.
    """

    module: Transformer
    lora_path: Path


class Modules:
    """The modules of one generation.

    Args:
        module_cache: of the engine; the generation has it for itself.
        plan: where each module is placed; replaced by `apply_plan` where a stage runs out of memory.
        transformer: used for every pass instead of loading one.
        on_load: called with True before a module is loaded, and with False when that is over.
    """

    def __init__(
        self,
        loader: ModuleLoader,
        module_cache: ModuleCache,
        plan: Plan,
        notices: Notices,
        transformer: TrainedTransformer | None = None,
        on_load: OnLoad = ignore_loads,
    ) -> None:
        self.loader, self.module_cache, self.notices = loader, module_cache, notices
        self.trained_transformer, self._on_load = transformer, on_load
        self._is_closed = False
        self.plan = plan
        self.apply_plan(plan)

    def close(self) -> None:
        """Refuses to acquire modules from now on: the engine may be another generation's."""
        self._is_closed = True

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.loader.spec

    @property
    def device(self) -> torch.device:
        """Device that the modules run on."""
        return self.spec.device

    def apply_plan(self, plan: Plan) -> None:
        """Places modules as the plan says from now on, and frees cached ones that it does not keep."""
        self.plan = plan
        names = plan.cached_components | {STATISTICS}
        if UPSCALERS in plan.cached_components:
            names |= {f"{kind} upscaler" for kind in self.spec.upscalers(has_two_passes=True)}
        self.module_cache.names_to_keep = names
        self.module_cache.clear(keep=names)

    def text_encoder(self, dtype: torch.dtype | None = None) -> AbstractContextManager[T5Encoder]:
        """Acquires the text encoder.

        Args:
            dtype: dtype of the computation instead of the plan's; such a module is not cached.
        """
        return self._acquire(TEXT_ENCODER, "text", self.loader.load_text_encoder, dtype)

    @contextmanager
    def transformer(
        self, pass_index: int = 0, dtype: torch.dtype | None = None, lora_strengths: Sequence[float] | None = None
    ) -> Iterator[Transformer]:
        """Acquires the transformer of a pass, 0 or 1, or the one in training.

        Args:
            dtype: as for `text_encoder`.
            lora_strengths: strength of each LoRA; None means the engine's.
        """
        if self.trained_transformer is not None:
            yield self.trained_transformer.module
            return
        strengths = self.spec.loras.strengths(pass_index) if lora_strengths is None else lora_strengths
        load = partial(self.loader.load_transformer, pass_index)
        stage, component = PASS_STAGES[pass_index], self.spec.transformer_component(pass_index)
        with (
            self._acquire(component, stage, load, dtype, with_loras=True) as module,
            _use_strengths(module, strengths, self.device),
        ):
            yield module

    def upscaler(self, kind: str) -> AbstractContextManager[LatentUpscaler]:
        """Acquires a latent upscaler."""
        private_bytes = self.placement("upscale").private_bytes

        def load() -> LatentUpscaler:
            with self._announce_load():
                return move_module(self.loader.load_upscaler(kind), self.device)

        return self.module_cache.acquire(f"{kind} upscaler", load, private_bytes=private_bytes)

    def latent_statistics(self) -> AbstractContextManager[VAE]:
        """Acquires the VAE without encoder and decoder: the statistics of its latents."""
        load = self.loader.load_latent_statistics
        return self.module_cache.acquire(STATISTICS, lambda: load().to(self.device))

    def vae_encoder(self, dtype: torch.dtype | None = None) -> AbstractContextManager[VAE]:
        """Acquires the VAE without its decoder; dtype as for `text_encoder`."""
        return self._acquire(VAE_ENCODER, "encode", self.loader.load_vae_encoder, dtype)

    def vae_decoder(self, dtype: torch.dtype | None = None) -> AbstractContextManager[VAE]:
        """Acquires the VAE without its encoder; dtype as for `text_encoder`."""
        return self._acquire(VAE_DECODER, "decode", self.loader.load_vae_decoder, dtype)

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
            placement = replace(placement, dtype=str(dtype).removeprefix("torch."), weight_format=AS_STORED)

        def load_placed() -> M:
            with self._announce_load():
                module = load(DTYPES[placement.dtype], keep_storage_dtype=placement.weight_format == AS_STORED)
                loras = self.loader.load_loras() if with_loras else ()
                compiles = self.spec.compile_transformer
                return place_module(module, placement, self.device, compile_transformer=compiles, loras=loras)

        if dtype is not None:
            self.module_cache.clear(keep=self.module_cache.cached_names - {name})
            gc.collect()  # a library may have put the one used before into a reference cycle
        cache_name = name if dtype is None else f"{name} in {placement.dtype}"
        configuration = (
            placement.dtype,
            placement.weight_format,
            placement.streamed_blocks,
            placement.pins_blocks,
            placement.winograd_frames,
        )
        acquired = self.module_cache.acquire(
            cache_name, load_placed, configuration=configuration, private_bytes=placement.private_bytes
        )
        with acquired as module, retain_freed_memory():
            yield module

    @contextmanager
    def _announce_load(self) -> Iterator[None]:
        self._on_load(True)
        try:
            yield
        finally:
            self._on_load(False)

    def placement(self, stage: str) -> Placement:
        """Returns the plan's placement of a stage.

        Raises:
            RequestError: the generation was started for other stages, or has ended.
        """
        if self._is_closed:
            raise RequestError("the generation has ended; use it inside the block of `Engine.start`.")
        planned = [stage_plan.stage for stage_plan in self.plan.stages]
        if stage not in planned:
            raise RequestError(
                f"the generation was started for {', '.join(planned) or 'no stage'}, and {stage} is not planned. Start "
                "it without `stages`."
            )
        return self.plan.stage(stage).placement

    def stage_dtype(self, stage: str) -> torch.dtype:
        """Returns the dtype of a stage's computation."""
        return DTYPES[self.placement(stage).dtype]


@contextmanager
def _use_strengths(transformer: Transformer, strengths: Sequence[float], device: torch.device) -> Iterator[None]:
    """Sets the strengths of the LoRAs, and clears CUDA graphs that have recorded what is no longer so."""
    if set_lora_strengths(transformer, strengths, device):
        transformer.clear_cuda_graphs()
    try:
        yield
    finally:
        if uses_scratch(transformer):
            transformer.clear_cuda_graphs()  # the module cache frees the scratch buffers, whose addresses they have
