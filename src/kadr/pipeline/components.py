"""The parts of a model: known from their headers, in memory only while a stage runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path

import torch

from kadr.checkpoints.open import Checkpoint, TextEncoderFolder
from kadr.errors import CheckpointError
from kadr.memory.device import free_bytes, pick_device, pick_dtype
from kadr.memory.shelf import Shelf
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.models.upsampler import LatentUpsampler
from kadr.models.vae import VAE
from kadr.pipeline.passes import Upscaling
from kadr.sampling.schedule import Schedule
from kadr.text.tokenizer import Tokenizer

UPSCALERS = "Give one such as ltxv-spatial-upscaler-0.9.8; `kadr models` lists them."
ROOM = 4  # keep modules loaded when so many times their size is free
SPACE, TIME = "spatial", "temporal"


class Components:
    """What a generation takes its modules from.

    Args:
        checkpoint: with the transformer, and the VAE unless `vae` brings it.
        text: the text encoder's folder.
        vae: another checkpoint to take the VAE from.
        second: another checkpoint to take the second pass's transformer from.
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
    ) -> None:
        self.checkpoint, self.text, self.vae = checkpoint, text, vae or checkpoint
        self.transformers = (checkpoint, second or checkpoint)
        self.transformer_config = require_parts(checkpoint, self.vae)
        require_text(text, checkpoint)
        if second is not None:
            require_parts(second, self.vae)
            require_text(text, second)
        self.upscalers: dict[str, Checkpoint] = {}
        checkpoints = {one.path: one for one in (*self.transformers, self.vae)}
        parameters = sum(source.parameters for one in checkpoints.values() for source in one.sources.values())
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device, parameters)
        # Counted at the width they are computed in, whatever they are stored as.
        size = (parameters + text.source.parameters) * self.dtype.itemsize
        self.shelf = Shelf(keep=size * ROOM < free_bytes(self.device), device=self.device)

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

    def text_encoder(self) -> AbstractContextManager[T5Encoder]:
        return self.shelf.take("text encoder", partial(self.text.load, dtype=self.dtype))

    def transformer(self, number: int = 0) -> AbstractContextManager[Transformer]:
        """The transformer of a pass, 0 or 1."""
        checkpoint = self.transformers[number]
        name = "transformer" if checkpoint is self.checkpoint else "second transformer"
        return self.shelf.take(name, partial(checkpoint.load_transformer, dtype=self.dtype))

    def upscaler(self, kind: str) -> AbstractContextManager[LatentUpsampler]:
        """A latent upscaler, in float32 as in the official package."""
        return self.shelf.take(f"{kind} upscaler", partial(self.upscalers[kind].load_upsampler, dtype=torch.float32))

    def statistics(self) -> AbstractContextManager[VAE]:
        """The VAE with neither encoder nor decoder: the statistics of its latents."""
        load = partial(self.vae.load_vae, dtype=torch.float32, encoder=False, decoder=False)
        return self.shelf.take("statistics", load)

    def encoder(self) -> AbstractContextManager[VAE]:
        """The VAE without its decoder."""
        return self.shelf.take("encoder", partial(self.vae.load_vae, dtype=self.dtype, decoder=False))

    def decoder(self) -> AbstractContextManager[VAE]:
        """The VAE without its encoder."""
        return self.shelf.take("decoder", partial(self.vae.load_vae, dtype=self.dtype, encoder=False))

    def sources(self) -> dict[str, str]:
        """Where the parts come from, for the record."""
        parts = {"model": self.checkpoint.path, "text_encoder": self.text.home, "vae": self.vae.path}
        if self.transformers[1] is not self.checkpoint:
            parts["second_model"] = self.transformers[1].path
        parts |= {f"{kind}_upscaler": checkpoint.path for kind, checkpoint in self.upscalers.items()}
        # Not resolved: in the hub's cache a link has the file's name, and what it points to has none.
        return {name: str(Path(path).absolute()) for name, path in parts.items()}


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


def ordered_upscalers(upscalers: Sequence[Checkpoint], model: Checkpoint) -> dict[str, Checkpoint]:
    """The upscalers for a model's latents by what they double, in the order in which they work.

    Raises:
        CheckpointError: one is none, is for another model, or doubles what another doubles.
    """
    made: dict[str, Checkpoint] = {}
    doubled: set[str] = set()
    for upscaler in upscalers:
        config = upscaler.detected.upsampler
        if config is None:
            raise CheckpointError(f"{upscaler.path} is no latent upscaler. {UPSCALERS}")
        if model.detected.transformer is not None and config.channels != model.detected.transformer.channels:
            raise CheckpointError(
                f"the upscaler {upscaler.path} is for latents of {config.channels} channels, and those of "
                f"{model.path} have {model.detected.transformer.channels}. {UPSCALERS}"
            )
        kinds = [kind for kind, doubles in ((SPACE, config.space), (TIME, config.time)) if doubles]
        if again := [kind for kind in kinds if kind in doubled]:
            raise CheckpointError(f"{upscaler.path} is a second {again[0]} upscaler; give one of each kind at most.")
        doubled.update(kinds)
        made[kinds[0]] = upscaler
    # The picture first: it is the smaller one that the other then has to double.
    return dict(sorted(made.items(), key=lambda item: item[0] != SPACE))
