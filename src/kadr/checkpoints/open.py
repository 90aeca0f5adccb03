"""A checkpoint on disk: what it is, at once and for nothing; its modules, when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kadr.checkpoints.components import split
from kadr.checkpoints.detect import Detected, detect
from kadr.checkpoints.folder import open_folder, read_json
from kadr.checkpoints.load import load_text_encoder, load_transformer, load_upsampler, load_vae
from kadr.checkpoints.source import Source
from kadr.checkpoints.upscaler import MODEL
from kadr.errors import CheckpointError
from kadr.models.registry import Released
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import Transformer
from kadr.models.upsampler import LatentUpsampler
from kadr.models.vae import VAE
from kadr.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Part:
    """One component as it lies on disk.

    Args:
        name: "transformer", "vae", "upscaler" or "text encoder".
        sizes: what makes it the size it is, such as {"layers": 28, "width": 2048}.
        tensors, parameters, bytes: how many.
        dtype: what most of its bytes are stored as, such as "bfloat16".
    """

    name: str
    sizes: Mapping[str, int]
    tensors: int
    parameters: int
    bytes: int
    dtype: str


@dataclass(frozen=True)
class Description:
    """What `kadr inspect` says of a checkpoint. `dataclasses.asdict` of it is ready for JSON.

    Args:
        kind: see `Detected.kind`.
        model: the registry's name; None where the checkpoint is not a released one, or may be several.
        sampler: None for an upscaler, which makes no noise levels.
        missing: what a generation needs and this checkpoint does not have; nothing for an upscaler, which is none of
            the things that generate.
    """

    path: str
    kind: str
    layout: str
    version: str
    model: str | None
    vae_family: str | None
    sampler: str | None
    parts: tuple[Part, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A single file or a diffusers folder, opened by its header.

    Args:
        sources: component -> its tensors; "transformer", "vae" or both; or "upsampler", in a folder beside a "vae".
    """

    path: Path
    detected: Detected
    sources: Mapping[str, Source]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, release: Released | None = None) -> Checkpoint:
        """Read headers and configs, no tensor.

        Args:
            path: a .safetensors in the official layout, of a model or an upscaler; a diffusers folder, or the folder of
                one of its components.
            release: the released model or upscaler that this is, where the checkpoint alone does not say.

        Raises:
            CheckpointError: it is not a checkpoint kadr runs; the message says what it is.
        """
        path = Path(path)
        if path.is_dir():
            detected, sources = open_folder(path, release=release)
        else:
            source = Source.open(path)
            sources = split(source)
            detected = detect(source, sources, release=release)
        return cls(path, detected, sources)

    @property
    def size_bytes(self) -> int:
        return sum(source.size_bytes for source in self.sources.values())

    def load_transformer(self, dtype: torch.dtype | None = None) -> Transformer:
        """The transformer on the CPU, sharing memory with the file where `dtype` (None: as stored) agrees.

        Raises:
            CheckpointError: the checkpoint has none, or its tensors do not fit; see `load.fill`.
        """
        if self.detected.transformer is None:
            raise self.lacks("transformer")
        source = self.sources["transformer"]
        return load_transformer(self.detected.transformer, source, dtype=dtype, diffusers=self._diffusers)

    def load_vae(self, dtype: torch.dtype | None = None, *, encoder: bool = True, decoder: bool = True) -> VAE:
        """The VAE on the CPU; the part that is not asked for is None in it. As `load_transformer`."""
        if self.detected.vae is None:
            raise self.lacks("vae")
        family = self.detected.vae_family if self._diffusers else None
        return load_vae(
            self.detected.vae,
            self.sources["vae"],
            dtype=dtype,
            diffusers_family=family,
            encoder=encoder,
            decoder=decoder,
        )

    def load_upsampler(self, dtype: torch.dtype | None = torch.float32) -> LatentUpsampler:
        """The upscaler on the CPU, in float32 unless asked otherwise. As `load_transformer`."""
        if self.detected.upsampler is None:
            raise self.lacks("upsampler")
        return load_upsampler(self.detected.upsampler, self.sources["upsampler"], dtype=dtype)

    def describe(self) -> Description:
        """Everything that the header tells."""
        detected = self.detected
        model = detected.kind == MODEL
        sizes: dict[str, dict[str, int]] = {}
        if detected.transformer:
            config = detected.transformer
            sizes["transformer"] = {"layers": config.layers, "width": config.width, "heads": config.heads}
        if detected.vae:
            sizes["vae"] = {"latent_channels": detected.vae.latent_channels, "patch": detected.vae.patch}
        if detected.upsampler:
            larger = detected.upsampler
            sizes["upsampler"] = {"channels": larger.channels, "width": larger.width, "blocks": larger.blocks}
        missing = [name for name in ("transformer", "vae") if name not in self.sources]
        if not _has_text_encoder(self.path):
            missing.append("text encoder")
        return Description(
            path=str(self.path),
            kind=detected.kind,
            layout=detected.layout,
            version=detected.version,
            model=detected.released.name if detected.released else None,
            vae_family=detected.vae_family,
            sampler=detected.schedule.sampler if model else None,
            parts=tuple(_part(_NAMES.get(name, name), self.sources[name], of) for name, of in sizes.items()),
            missing=tuple(missing) if model else (),
        )

    @property
    def _diffusers(self) -> bool:
        return self.detected.layout == "diffusers"

    def lacks(self, component: str) -> CheckpointError:
        """The error to raise where a component is needed that this checkpoint does not have, saying what it is instead.

        Args:
            component: "transformer", "vae" or "upsampler".
        """
        kind, name = self.detected.kind, _NAMES.get(component, component)
        if kind != MODEL:
            return CheckpointError(
                f"{self.path} is a {kind}, not a model, and has no {name}: it makes a model's latents larger. Give it "
                f"as --upscaler, and {_WAYS_OUT[component]}."
            )
        held = " and ".join(self.sources)
        return CheckpointError(f"{self.path} has no {name}, only {held}. Give {_WAYS_OUT[component]}.")


@dataclass(frozen=True)
class TextEncoderFolder:
    """A T5 encoder and its tokenizer, opened by their headers.

    Args:
        path: of the weights and config.json.
        home: where the tokenizer is looked for.
    """

    path: Path
    home: Path
    config: T5Config
    source: Source

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TextEncoderFolder:
        """Read config and headers, no tensor.

        Args:
            path: the encoder's own folder, with the tokenizer in it or in the folder `tokenizer` in or beside it; or
                the folder that holds `text_encoder` and `tokenizer`.

        Raises:
            CheckpointError: it is no text encoder that kadr runs.
        """
        home = Path(path)
        folder = home / "text_encoder" if (home / "text_encoder").is_dir() else home
        if not (folder / "config.json").is_file():
            state = "has no config.json" if folder.is_dir() else "is not a folder"
            raise CheckpointError(
                f"{folder} {state}, so it is no text encoder. Give the folder with text_encoder/ and tokenizer/ in it, "
                "such as that of PixArt-alpha/PixArt-XL-2-1024-MS."
            )
        try:
            config = T5Config.from_header(read_json(folder / "config.json"))
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        return cls(folder, home, config, Source.open(folder))

    @property
    def size_bytes(self) -> int:
        return self.source.size_bytes

    def load(self, dtype: torch.dtype | None = None) -> T5Encoder:
        """The encoder on the CPU, sharing memory with the files where `dtype` (None: as stored) agrees.

        Raises:
            CheckpointError: its tensors do not fit the config; see `load.fill`.
        """
        return load_text_encoder(self.config, self.source, dtype=dtype)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to it.

        Raises:
            CheckpointError: there is none, or the encoder's vocabulary is too small for it.
        """
        tokenizer = Tokenizer.open(self.home)
        if tokenizer.size > self.config.vocabulary:
            raise CheckpointError(
                f"the tokenizer of {self.home} numbers up to {tokenizer.size - 1}, the encoder's vocabulary ends at "
                f"{self.config.vocabulary - 1}. Take both from the same place."
            )
        return tokenizer

    def describe(self) -> Part:
        """What the header tells."""
        sizes = {"layers": self.config.layers, "width": self.config.width, "vocabulary": self.config.vocabulary}
        return _part("text encoder", self.source, sizes)


_NAMES = {"upsampler": "upscaler"}  # component -> as people call it, where the two differ
_WAYS_OUT = {
    "transformer": "a checkpoint with a transformer as --model",
    "vae": "a checkpoint with a VAE as --vae",
    "upsampler": "one such as ltxv-spatial-upscaler-0.9.8 as --upscaler",
}


def _has_text_encoder(path: Path) -> bool:
    home = path if path.is_dir() else path.parent
    return (home / "text_encoder" / "config.json").is_file()


def _part(name: str, source: Source, sizes: Mapping[str, int]) -> Part:
    dtype = str(source.dtype).removeprefix("torch.")
    return Part(name, sizes, len(source.infos), source.parameters, source.size_bytes, dtype)
