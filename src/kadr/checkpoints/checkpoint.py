"""A checkpoint on disk: what it is, at once and for nothing; its modules, when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kadr.checkpoints.detect.diffusers_folder import open_diffusers_folder
from kadr.checkpoints.detect.single_file import CheckpointInfo, detect_single_file
from kadr.checkpoints.detect.split import split_components
from kadr.checkpoints.detect.upscaler import MODEL_KIND
from kadr.checkpoints.load import load_transformer, load_upscaler, load_vae
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.models.registry import MODEL_RELEASES, Release
from kadr.models.transformer import Transformer
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE


@dataclass(frozen=True)
class ComponentDescription:
    """One component as it lies on disk.

    Args:
        name: "transformer", "vae", "upscaler" or "text encoder".
        sizes: what makes it the size it is, such as {"layers": 28, "width": 2048}.
        num_tensors, num_parameters, size_bytes: how many.
        dtype: what most of its bytes are stored as, such as "bfloat16" or "Q4_K".
        type_counts: what its tensors are stored as -> how many, most bytes first.
    """

    name: str
    sizes: Mapping[str, int]
    num_tensors: int
    num_parameters: int
    size_bytes: int
    dtype: str
    type_counts: Mapping[str, int]


@dataclass(frozen=True)
class CheckpointDescription:
    """What `kadr inspect` says of a checkpoint. `dataclasses.asdict` of it is ready for JSON.

    Args:
        kind: see `CheckpointInfo.kind`.
        registry_name: the registry's name; None where the checkpoint is not a released one, or may be several.
        sampler: None for an upscaler, which makes no noise levels.
        missing_components: what a generation needs and this checkpoint does not have; nothing for an upscaler, which is none of
            the things that generate.
    """

    path: str
    kind: str
    layout: str
    version: str
    registry_name: str | None
    vae_family: str | None
    sampler: str | None
    components: tuple[ComponentDescription, ...]
    missing_components: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A single file, a GGUF file or a diffusers folder, opened by its header.

    Args:
        sources: component -> its tensors; "transformer", "vae" or both; or "upsampler", in a folder beside a "vae".
    """

    path: Path
    info: CheckpointInfo
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
            detected, sources = open_diffusers_folder(path, release=release)
        else:
            source = Source.open(path)
            sources = split_components(source)
            detected = detect_single_file(source, sources, release=release)
        return cls(path, detected, sources)

    @property
    def size_bytes(self) -> int:
        return sum(source.size_bytes for source in self.sources.values())

    def load_transformer(self, dtype: torch.dtype | None = None, *, keep_storage_dtype: bool = False) -> Transformer:
        """The transformer on the CPU, sharing memory with the file where `dtype` (None: as stored) agrees.

        Args:
            keep_storage_dtype: see `load.fill`.

        Raises:
            CheckpointError: the checkpoint has none, or its tensors do not fit; see `load.fill`.
        """
        if self.info.transformer is None:
            raise self.missing_component_error("transformer")
        source = self.sources["transformer"]
        return load_transformer(
            self.info.transformer,
            source,
            dtype=dtype,
            is_diffusers=self._is_diffusers,
            keep_storage_dtype=keep_storage_dtype,
        )

    def load_vae(
        self, dtype: torch.dtype | None = None, *, with_encoder: bool = True, with_decoder: bool = True
    ) -> VAE:
        """The VAE on the CPU; the part that is not asked for is None in it. As `load_transformer`."""
        if self.info.vae is None:
            raise self.missing_component_error("vae")
        family = self.info.vae_family if self._is_diffusers else None
        return load_vae(
            self.info.vae,
            self.sources["vae"],
            dtype=dtype,
            diffusers_vae_family=family,
            with_encoder=with_encoder,
            with_decoder=with_decoder,
        )

    def load_upscaler(self, dtype: torch.dtype | None = torch.float32) -> LatentUpscaler:
        """The upscaler on the CPU, in float32 unless asked otherwise. As `load_transformer`."""
        if self.info.upscaler is None:
            raise self.missing_component_error("upsampler")
        return load_upscaler(self.info.upscaler, self.sources["upsampler"], dtype=dtype)

    def describe(self) -> CheckpointDescription:
        """Everything that the header tells."""
        detected = self.info
        model = detected.kind == MODEL_KIND
        sizes: dict[str, dict[str, int]] = {}
        if detected.transformer:
            config = detected.transformer
            sizes["transformer"] = {"layers": config.num_layers, "width": config.width, "heads": config.num_heads}
        if detected.vae:
            sizes["vae"] = {"latent_channels": detected.vae.latent_channels, "patch": detected.vae.patch_size}
        if detected.upscaler:
            larger = detected.upscaler
            sizes["upsampler"] = {
                "channels": larger.in_channels,
                "width": larger.mid_channels,
                "blocks": larger.num_blocks_per_stage,
            }
        missing = [name for name in ("transformer", "vae") if name not in self.sources]
        if not _has_text_encoder(self.path):
            missing.append("text encoder")
        return CheckpointDescription(
            path=str(self.path),
            kind=detected.kind,
            layout=detected.layout,
            version=detected.version,
            registry_name=detected.release.name if detected.release else None,
            vae_family=detected.vae_family,
            sampler=detected.schedule.sampler if model else None,
            components=tuple(
                describe_component(_DISPLAY_NAMES.get(name, name), self.sources[name], of) for name, of in sizes.items()
            ),
            missing_components=tuple(missing) if model else (),
        )

    @property
    def _is_diffusers(self) -> bool:
        return self.info.layout == "diffusers"

    def missing_component_error(self, component: str) -> CheckpointError:
        """The error to raise where a component is needed that this checkpoint does not have, saying what it is instead.

        Args:
            component: "transformer", "vae" or "upsampler".
        """
        kind, name = self.info.kind, _DISPLAY_NAMES.get(component, component)
        if kind != MODEL_KIND:
            return CheckpointError(
                f"{self.path} is a {kind}, not a model, and has no {name}: it makes a model's latents larger. Give it "
                f"as --upscaler, and {_SUGGESTIONS[component]}."
            )
        held = " and ".join(self.sources)
        such = f", such as {self._suggested_vae}" if component == "vae" else ""
        return CheckpointError(f"{self.path} has no {name}, only {held}. Give {_SUGGESTIONS[component]}{such}.")

    @property
    def _suggested_vae(self) -> str:
        """The entry of the registry whose VAE the model was made for, or the nearest that is known."""
        released, layers = self.info.release, getattr(self.info.transformer, "num_layers", None)
        if released is not None:
            return released.vae or released.name
        fitting = [
            r.name for r in MODEL_RELEASES if r.num_layers == layers and self.info.vae_family in (None, r.vae_family)
        ]
        return next((name for name in reversed(fitting) if not name.endswith("fp8")), "ltxv-2b-0.9.5")


_DISPLAY_NAMES = {"upsampler": "upscaler"}  # component -> as people call it, where the two differ
_SUGGESTIONS = {
    "transformer": "a checkpoint with a transformer as --model",
    "vae": "a checkpoint with a VAE as --vae",
    "upsampler": "one such as ltxv-spatial-upscaler-0.9.8 as --upscaler",
}


def _has_text_encoder(path: Path) -> bool:
    home = path if path.is_dir() else path.parent
    return (home / "text_encoder" / "config.json").is_file()


def describe_component(name: str, source: Source, sizes: Mapping[str, int]) -> ComponentDescription:
    """What a header tells of a component."""
    stored = source.type_counts
    dtype = next(iter(stored), "float32")
    return ComponentDescription(name, sizes, len(source.infos), source.num_parameters, source.size_bytes, dtype, stored)
