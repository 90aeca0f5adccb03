"""The parts of a model: known from their headers, in memory only while a stage runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path

from kadr.checkpoints.open import Checkpoint, TextEncoderFolder
from kadr.errors import CheckpointError
from kadr.memory.device import free_bytes, pick_device, pick_dtype
from kadr.memory.shelf import Shelf
from kadr.models.t5 import T5Encoder
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.models.vae import VAE
from kadr.sampling.schedule import Schedule
from kadr.text.tokenizer import Tokenizer

ROOM = 4  # keep modules loaded when so many times their size is free


class Components:
    """What a generation takes its modules from.

    Args:
        checkpoint: with the transformer, and the VAE unless `vae` brings it.
        text: the text encoder's folder.
        vae: another checkpoint to take the VAE from.
    """

    def __init__(
        self, checkpoint: Checkpoint, text: TextEncoderFolder, vae: Checkpoint | None, *, device: str, dtype: str
    ) -> None:
        self.checkpoint, self.text, self.vae = checkpoint, text, vae or checkpoint
        self.transformer_config = require_parts(checkpoint, self.vae)
        parameters = sum(source.parameters for source in checkpoint.sources.values())
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device, parameters)
        # Counted at the width they are computed in, whatever they are stored as.
        size = (parameters + text.source.parameters) * self.dtype.itemsize
        self.shelf = Shelf(keep=size * ROOM < free_bytes(self.device), device=self.device)

    @property
    def schedule(self) -> Schedule:
        return self.checkpoint.detected.schedule

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer()

    def text_encoder(self) -> AbstractContextManager[T5Encoder]:
        return self.shelf.take("text encoder", partial(self.text.load, dtype=self.dtype))

    def transformer(self) -> AbstractContextManager[Transformer]:
        return self.shelf.take("transformer", partial(self.checkpoint.load_transformer, dtype=self.dtype))

    def encoder(self) -> AbstractContextManager[VAE]:
        """The VAE without its decoder."""
        return self.shelf.take("encoder", partial(self.vae.load_vae, dtype=self.dtype, decoder=False))

    def decoder(self) -> AbstractContextManager[VAE]:
        """The VAE without its encoder."""
        return self.shelf.take("decoder", partial(self.vae.load_vae, dtype=self.dtype, encoder=False))

    def sources(self) -> dict[str, str]:
        """Where the parts come from, for the record."""
        parts = {"model": self.checkpoint.path, "text_encoder": self.text.home, "vae": self.vae.path}
        # Not resolved: in the hub's cache a link has the file's name, and what it points to has none.
        return {name: str(Path(path).absolute()) for name, path in parts.items()}


def require_parts(checkpoint: Checkpoint, vae: Checkpoint) -> TransformerConfig:
    """Check that there are a transformer and a VAE and that they fit each other.

    Raises:
        CheckpointError: they do not.
    """
    transformer = checkpoint.detected.transformer
    if transformer is None:
        raise CheckpointError(f"{checkpoint.path} holds no transformer; give a checkpoint that does as --model.")
    if vae.detected.vae is None:
        raise CheckpointError(f"{vae.path} holds no VAE; give one with --vae, such as the full checkpoint.")
    if vae.detected.vae.latent_channels != transformer.channels:
        raise CheckpointError(
            f"the VAE of {vae.path} has {vae.detected.vae.latent_channels} latent channels, the transformer of "
            f"{checkpoint.path} {transformer.channels}. Take both from the same release."
        )
    return transformer
