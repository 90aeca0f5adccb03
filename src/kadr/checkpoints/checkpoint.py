"""A checkpoint on disk: what it is, at once and for nothing; its modules, when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kadr.checkpoints.detect.diffusers_folder import open_folder
from kadr.checkpoints.detect.single_file import Detected, detect
from kadr.checkpoints.detect.split import split
from kadr.checkpoints.detect.upscaler import MODEL
from kadr.checkpoints.load import load_transformer, load_upsampler, load_vae
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.models.registry import MODEL_RELEASES, Release
from kadr.models.transformer import Transformer
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE


@dataclass(frozen=True)
class Part:
    """One component as it lies on disk.

    Args:
        name: "transformer", "vae", "upscaler" or "text encoder".
        sizes: what makes it the size it is, such as {"layers": 28, "width": 2048}.
        tensors, parameters, bytes: how many.
        dtype: what most of its bytes are stored as, such as "bfloat16" or "Q4_K".
        types: what its tensors are stored as -> how many, most bytes first.
    """

    name: str
    sizes: Mapping[str, int]
    tensors: int
    parameters: int
    bytes: int
    dtype: str
    types: Mapping[str, int]


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
    """A single file, a GGUF file or a diffusers folder, opened by its header.

    Args:
        sources: component -> its tensors; "transformer", "vae" or both; or "upsampler", in a folder beside a "vae".
    """

    path: Path
    detected: Detected
    sources: Mapping[str, Source]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, release: Release | None = None) -> Checkpoint:
        """Read headers and configs, no tensor.

        Args:
            path: a .safetensors in the official layout, of a model or an upscaler; a .gguf of a transformer; a folder
                of diffusers, or the folder of one of its components.
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

    def load_transformer(self, dtype: torch.dtype | None = None, *, as_stored: bool = False) -> Transformer:
        """The transformer on the CPU, sharing memory with the file where `dtype` (None: as stored) agrees.

        Args:
            as_stored: see `load.fill`.

        Raises:
            CheckpointError: the checkpoint has none, or its tensors do not fit; see `load.fill`.
        """
        if self.detected.transformer is None:
            raise self.lacks("transformer")
        source = self.sources["transformer"]
        return load_transformer(
            self.detected.transformer, source, dtype=dtype, diffusers=self._diffusers, as_stored=as_stored
        )

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

    def load_upsampler(self, dtype: torch.dtype | None = torch.float32) -> LatentUpscaler:
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
            sizes["transformer"] = {"layers": config.num_layers, "width": config.width, "heads": config.num_heads}
        if detected.vae:
            sizes["vae"] = {"latent_channels": detected.vae.latent_channels, "patch": detected.vae.patch_size}
        if detected.upsampler:
            larger = detected.upsampler
            sizes["upsampler"] = {
                "channels": larger.in_channels,
                "width": larger.mid_channels,
                "blocks": larger.num_blocks_per_stage,
            }
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
            parts=tuple(part_of(_NAMES.get(name, name), self.sources[name], of) for name, of in sizes.items()),
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
        such = f", such as {self._vae_elsewhere}" if component == "vae" else ""
        return CheckpointError(f"{self.path} has no {name}, only {held}. Give {_WAYS_OUT[component]}{such}.")

    @property
    def _vae_elsewhere(self) -> str:
        """The entry of the registry whose VAE the model was made for, or the nearest that is known."""
        released, layers = self.detected.released, getattr(self.detected.transformer, "layers", None)
        if released is not None:
            return released.vae or released.name
        fitting = [
            r.name
            for r in MODEL_RELEASES
            if r.num_layers == layers and self.detected.vae_family in (None, r.vae_family)
        ]
        return next((name for name in reversed(fitting) if not name.endswith("fp8")), "ltxv-2b-0.9.5")


_NAMES = {"upsampler": "upscaler"}  # component -> as people call it, where the two differ
_WAYS_OUT = {
    "transformer": "a checkpoint with a transformer as --model",
    "vae": "a checkpoint with a VAE as --vae",
    "upsampler": "one such as ltxv-spatial-upscaler-0.9.8 as --upscaler",
}


def _has_text_encoder(path: Path) -> bool:
    home = path if path.is_dir() else path.parent
    return (home / "text_encoder" / "config.json").is_file()


def part_of(name: str, source: Source, sizes: Mapping[str, int]) -> Part:
    """What a header tells of a component."""
    stored = source.stored
    dtype = next(iter(stored), "float32")
    return Part(name, sizes, len(source.infos), source.parameters, source.size_bytes, dtype, stored)
