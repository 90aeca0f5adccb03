"""The parts of a model: known from their headers, in memory only while a stage runs."""

from __future__ import annotations

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
        if second is not None:
            require_parts(second, self.vae)
        self.upscalers: dict[str, Checkpoint] = {}
        parameters = sum(source.parameters for source in checkpoint.sources.values())
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
        config = checkpoint.detected.upsampler
        if config is None:
            raise CheckpointError(f"{checkpoint.path} is no latent upscaler. {UPSCALERS}")
        if config.channels != self.transformer_config.channels:
            raise CheckpointError(
                f"the upscaler {checkpoint.path} is for latents of {config.channels} channels, and those of "
                f"{self.checkpoint.path} have {self.transformer_config.channels}. {UPSCALERS}"
            )
        kind = SPACE if config.space else TIME
        taken = {SPACE: self.upscaling.space, TIME: self.upscaling.time}
        if (config.space and taken[SPACE]) or (config.time and taken[TIME]):
            raise CheckpointError(f"{checkpoint.path} is a second {kind} upscaler; give one of each kind at most.")
        self.upscalers[kind] = checkpoint
        # The picture first: it is the smaller one that the other then has to double.
        self.upscalers = dict(sorted(self.upscalers.items(), key=lambda item: item[0] != SPACE))

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
