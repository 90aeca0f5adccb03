"""The parts of a model: known from their headers, in memory only while a stage runs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from kadr.checkpoints.mapped import release
from kadr.checkpoints.open import Checkpoint
from kadr.checkpoints.text_encoder import TextEncoderFolder
from kadr.errors import CheckpointError
from kadr.kernels.heap import at_work
from kadr.memory.device import DTYPES, pick_device, pick_dtype
from kadr.memory.module_cache import Shelf
from kadr.models.adapters import merge, set_strengths
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.models.upsampler import LatentUpsampler, UpsamplerConfig
from kadr.models.vae import VAE
from kadr.pipeline.holding import check_compiled, is_quantized, placed, refuse_merging, settled_scheme
from kadr.pipeline.prompt_cache import PromptCache
from kadr.pipeline.selfcheck import needs_look, rotation_of
from kadr.planning.plan import AS_STORED, OFFLOAD_AUTO, Choice, Plan
from kadr.quant.rotation import turn
from kadr.quant.scheme import FP8
from kadr.request.passes import Upscaling
from kadr.sampling.schedule import Schedule
from kadr.spec.loras import Loras, Strength
from kadr.text.tokenizer import Tokenizer

UPSCALERS = "Give one such as ltxv-spatial-upscaler-0.9.8; `kadr models` lists them."
TEXT_ENCODER, ENCODER, DECODER = "text encoder", "VAE encoder", "VAE decoder"
TRANSFORMER, SECOND_TRANSFORMER = "transformer", "second transformer"
PASS_STAGES = ("denoise", "refine")
M = TypeVar("M", bound=nn.Module)
SPACE, TIME = "spatial", "temporal"


class Components:
    """What a generation takes its modules from.

    Args:
        checkpoint: with the transformer, and the VAE unless `vae` brings it.
        text: the text encoder's folder.
        vae: another checkpoint to take the VAE from.
        second: another checkpoint to take the second pass's transformer from.
        loras: for the transformers of both passes.
        quant, offload, compiled, prompt_cache: see `Engine.open`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: TextEncoderFolder,
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
        self.checkpoint, self.text, self.vae = checkpoint, text, vae or checkpoint
        self.transformers = (checkpoint, second or checkpoint)
        self.transformer_config = require_parts(checkpoint, self.vae)
        require_text(text, checkpoint)
        if second is not None:
            require_parts(second, self.vae)
            require_text(text, second)
        self.loras = loras or Loras(())
        self.loras.check(self.transformers)
        self.upscalers: dict[str, Checkpoint] = {}
        checkpoints = {one.path: one for one in (*self.transformers, self.vae)}
        parameters = sum(source.parameters for one in checkpoints.values() for source in one.sources.values())
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device, parameters)
        self.quant, self.offload = settled_scheme(quant, self.transformers, self.device), offload
        if self.loras.merged:
            refuse_merging(self.transformers)
        self.compiled = check_compiled(compiled, self.device)
        # However the text encoder is held, it computes the same numbers.
        self.prompts = PromptCache.of(prompt_cache, text, dtype=self.dtype, device=self.device.type)
        self.shelf = Shelf(self.device, pages=release)
        self.plan: Plan | None = None
        self.borrowed: Transformer | None = None
        self.borrowed_lora: Path | None = None  # that it is written as
        self._rotations: dict[Path, int | None] = {}  # of the transformers that were looked at

    def follow(self, plan: Plan) -> None:
        """Lend modules as a plan has it, from now on."""
        self.plan = plan
        self.shelf.keep = plan.kept
        self.shelf.clear(but=plan.kept)

    def add_upscaler(self, checkpoint: Checkpoint) -> None:
        """Take a latent upscaler for the way between two passes.

        Raises:
            CheckpointError: it is none, is for another model, or there is one of its kind already.
        """
        self.upscalers = ordered_upscalers([*self.upscalers.values(), checkpoint], self.checkpoint)

    @property
    def upscaling(self) -> Upscaling:
        """What the upscalers double."""
        configs = [made for one in self.upscalers.values() if (made := one.detected.upsampler) is not None]
        return Upscaling(any(config.space for config in configs), any(config.time for config in configs))

    @property
    def schedules(self) -> tuple[Schedule, Schedule]:
        """Of the first pass and of the second."""
        first, second = self.transformers
        return first.detected.schedule, second.detected.schedule

    def config(self, number: int) -> TransformerConfig:
        """Of the transformer of a pass, 0 or 1."""
        config = self.transformers[number].detected.transformer
        assert config is not None
        return config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer()

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
            set_strengths(module, acting, self.device)
            try:
                yield module
            finally:
                module.forget()  # also where a step was cancelled: what is recorded has these strengths in it

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
        module = checkpoint.load_transformer(dtype, as_stored=as_stored)
        rotation = self._rotations[checkpoint.path]
        if rotation is not None:
            turn(module, rotation)
        if self.loras.merged:
            merge(module, self.loras.additions(), self.loras.strengths(number))
        return module

    def transformer_name(self, number: int) -> str:
        """What the shelf calls the transformer of a pass."""
        return TRANSFORMER if self.transformers[number] is self.checkpoint else SECOND_TRANSFORMER

    def upscaler(self, kind: str) -> AbstractContextManager[LatentUpsampler]:
        """A latent upscaler, in float32 as in the official package."""
        checkpoint = self.upscalers[kind]
        return self.shelf.take(f"{kind} upscaler", lambda: checkpoint.load_upsampler(torch.float32).to(self.device))

    def statistics(self) -> AbstractContextManager[VAE]:
        """The VAE with neither encoder nor decoder: the statistics of its latents."""
        load = partial(self.vae.load_vae, torch.float32, encoder=False, decoder=False)
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
            at_work(),
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

    def sources(self) -> dict[str, str]:
        """Where the parts come from, for the record."""
        parts = {"model": self.checkpoint.path, "text_encoder": self.text.home, "vae": self.vae.path}
        if self.transformers[1] is not self.checkpoint:
            parts["second_model"] = self.transformers[1].path
        parts |= {f"{kind}_upscaler": checkpoint.path for kind, checkpoint in self.upscalers.items()}
        # Not resolved: in the hub's cache a link has the file's name, and what it points to has none.
        return {name: str(Path(path).absolute()) for name, path in parts.items()}

    def state_of_files(self, others: Iterable[Path] = ()) -> dict[str, Any]:
        """Size and time of change of every file that the pictures depend on. others: besides those of the model."""
        checkpoints = {id(one): one for one in (*self.transformers, self.vae)}.values()
        sources = [self.text.source, *(source for one in checkpoints for source in one.sources.values())]
        files = {info.file for source in sources for info in source.infos.values()}
        files |= {file.source.path for file in self.loras.files}
        return {"files": {str(path.absolute()): _state(path) for path in sorted({*files, *others})}}


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_parts(checkpoint: Checkpoint, vae: Checkpoint) -> TransformerConfig:
    """Check that there are a transformer and a VAE and that they fit each other.

    Raises:
        CheckpointError: they do not.
    """
    transformer = checkpoint.detected.transformer
    if transformer is None:
        raise checkpoint.lacks("transformer")
    if vae.detected.vae is None:
        raise vae.lacks("vae")
    if vae.detected.vae.latent_channels != transformer.channels:
        raise CheckpointError(
            f"the VAE of {vae.path} has {vae.detected.vae.latent_channels} latent channels, the transformer of "
            f"{checkpoint.path} {transformer.channels}. Take both from the same release."
        )
    return transformer


def require_text(text: TextEncoderFolder, checkpoint: Checkpoint) -> None:
    """Check that a transformer reads what a text encoder writes.

    Raises:
        CheckpointError: it does not.
    """
    transformer = checkpoint.detected.transformer
    if transformer is not None and transformer.text_width != text.config.width:
        raise CheckpointError(
            f"the text encoder of {text.path} is {text.config.width} wide, and the transformer of {checkpoint.path} "
            f"reads text of {transformer.text_width}. Give the one it was trained with as --text-encoder."
        )


def fitting_upscaler(upscaler: Checkpoint, transformer: TransformerConfig | None, model: Path) -> UpsamplerConfig:
    """What an upscaler does, if it is one for a model's latents.

    Raises:
        CheckpointError: it is none, or is for another model.
    """
    config = upscaler.detected.upsampler
    if config is None:
        raise CheckpointError(f"{upscaler.path} is no latent upscaler. {UPSCALERS}")
    if transformer is not None and config.channels != transformer.channels:
        raise CheckpointError(
            f"the upscaler {upscaler.path} is for latents of {config.channels} channels, and those of {model} have "
            f"{transformer.channels}. {UPSCALERS}"
        )
    return config


def ordered_upscalers(upscalers: Sequence[Checkpoint], model: Checkpoint) -> dict[str, Checkpoint]:
    """The upscalers for a model's latents by what they double, in the order in which they work.

    Raises:
        CheckpointError: one is none, is for another model, or doubles what another doubles.
    """
    made: dict[str, Checkpoint] = {}
    doubled: set[str] = set()
    for upscaler in upscalers:
        config = fitting_upscaler(upscaler, model.detected.transformer, model.path)
        kinds = [kind for kind, doubles in ((SPACE, config.space), (TIME, config.time)) if doubles]
        if again := [kind for kind in kinds if kind in doubled]:
            raise CheckpointError(f"{upscaler.path} is a second {again[0]} upscaler; give one of each kind at most.")
        doubled.update(kinds)
        made[kinds[0]] = upscaler
    # The picture first: it is the smaller one that the other then has to double.
    return dict(sorted(made.items(), key=lambda item: item[0] != SPACE))
