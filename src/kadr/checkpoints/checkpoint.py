"""A checkpoint: described from its header at once; modules load on demand."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kadr.checkpoints.detect.diffusers_folder import open_diffusers_folder
from kadr.checkpoints.detect.single_file import CheckpointInfo, detect_single_file
from kadr.checkpoints.detect.split import TEXT_ENCODER_COMPONENT, split_components
from kadr.checkpoints.detect.upscaler import MODEL_KIND
from kadr.checkpoints.gguf.origins import TEXT_ENCODER_FIELD, VAE_FIELD, ComponentOrigin
from kadr.checkpoints.load import (
    account_upscaler,
    account_vae,
    load_transformer,
    load_upscaler,
    load_vae,
    read_transformer_weights,
)
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.models.registry import MODEL_RELEASES, Release
from kadr.models.transformer import Transformer
from kadr.models.upscaler import LatentUpscaler
from kadr.models.vae import VAE


@dataclass(frozen=True)
class ComponentDescription:
    """One component as it is stored on disk.

    Args:
        name: "transformer", "vae", "upscaler" or "text encoder".
        sizes: the config fields that set its size, such as {"num_layers": 28, "width": 2048}.
        dtype: storage type of most of its bytes, such as "bfloat16" or "Q4_K".
        type_counts: storage type -> number of tensors, most bytes first.
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
    """The description that `kadr inspect` prints; `dataclasses.asdict` makes it JSON.

    Args:
        kind: see `CheckpointInfo.kind`.
        registry_name: name in the registry; None for an unreleased checkpoint, or where several releases match.
        release_candidates: names of those releases.
        sampler: None for an upscaler, which has no schedule.
        missing_components: components that a generation needs and this checkpoint lacks; empty for an upscaler.
        origins: missing component -> the release or path that the file takes it from, where it remembers one.
    """

    path: str
    kind: str
    layout: str
    version: str
    registry_name: str | None
    release_candidates: tuple[str, ...]
    vae_family: str | None
    sampler: str | None
    components: tuple[ComponentDescription, ...]
    missing_components: tuple[str, ...]
    origins: Mapping[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A single file, a GGUF file or a diffusers folder, opened by its header or predicted (`checkpoints.predict`).

    Args:
        path: the file or folder; of a predicted one, the file in its repository.
        sources: component -> its tensors; "transformer", "vae" or both; or "upscaler", in a folder beside a "vae".
        holds_text_encoder: the file has a text encoder in it too, which `TextEncoderCheckpoint.open` opens.
    """

    path: Path
    info: CheckpointInfo
    sources: Mapping[str, Source]
    holds_text_encoder: bool = False

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, release: Release | None = None) -> Checkpoint:
        """Reads headers and configs, no tensor.

        Args:
            path: a .safetensors of a model or an upscaler in the official layout; a .gguf of a transformer; a
                diffusers folder, or the folder of one of its components.
            release: the released model or upscaler that this is, where the checkpoint alone does not say.

        Raises:
            CheckpointError: kadr does not run this checkpoint; the message says what it is.
        """
        path = Path(path)
        if path.is_dir():
            return cls(path, *open_diffusers_folder(path, release=release))
        source = Source.open(path)
        sources = split_components(source)
        holds_text_encoder = sources.pop(TEXT_ENCODER_COMPONENT, None) is not None
        return cls(path, detect_single_file(source, sources, release=release), sources, holds_text_encoder)

    @property
    def is_on_disk(self) -> bool:
        """False for a predicted checkpoint, which `load_*` refuses to load."""
        return all(source.is_on_disk for source in self.sources.values())

    @property
    def size_bytes(self) -> int:
        return sum(source.size_bytes for source in self.sources.values())

    def load_transformer(self, dtype: torch.dtype | None = None, *, keep_storage_dtype: bool = False) -> Transformer:
        """Loads the transformer on the CPU; tensors already stored in `dtype` share memory with the file.

        Args:
            dtype: None keeps the stored dtypes.
            keep_storage_dtype: see `load.load_weights`.

        Raises:
            CheckpointError: the checkpoint has none or is not on disk, or its tensors do not fit; see
                `load.load_weights`.
        """
        config = self.info.transformer
        if config is None:
            raise self.missing_component_error("transformer")
        source = self.sources["transformer"]
        return load_transformer(
            config, source, dtype=dtype, is_diffusers=self._is_diffusers, keep_storage_dtype=keep_storage_dtype
        )

    def read_transformer_weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Reads single tensors of the transformer by kadr's names, dequantized to fp32; see `load_transformer`."""
        config = self.info.transformer
        if config is None:
            raise self.missing_component_error("transformer")
        return read_transformer_weights(config, self.sources["transformer"], names, is_diffusers=self._is_diffusers)

    def load_vae(
        self, dtype: torch.dtype | None = None, *, with_encoder: bool = True, with_decoder: bool = True
    ) -> VAE:
        """Loads the VAE on the CPU, like `load_transformer`; a half that is not wanted is None in it."""
        if self.info.vae is None:
            raise self.missing_component_error("vae")
        return load_vae(
            self.info.vae,
            self.sources["vae"],
            dtype=dtype,
            diffusers_vae_family=self.info.vae_family if self._is_diffusers else None,
            with_encoder=with_encoder,
            with_decoder=with_decoder,
        )

    def load_upscaler(self, dtype: torch.dtype | None = torch.float32) -> LatentUpscaler:
        """Loads the upscaler on the CPU, in float32 by default; otherwise like `load_transformer`."""
        if self.info.upscaler is None:
            raise self.missing_component_error("upscaler")
        return load_upscaler(self.info.upscaler, self.sources["upscaler"], dtype=dtype)

    def account_late_components(self) -> None:
        """Checks from the header that VAE and upscaler have the tensors of their configs.

        They are loaded after denoising, which is late to find that the file does not fit. Predicted ones fit.

        Raises:
            CheckpointError: tensors are missing, unexpected or of another shape.
        """
        if not self.is_on_disk:
            return
        if self.info.vae is not None:
            family = self.info.vae_family if self._is_diffusers else None
            account_vae(self.info.vae, self.sources["vae"], diffusers_vae_family=family)
        if self.info.upscaler is not None:
            account_upscaler(self.info.upscaler, self.sources["upscaler"])

    def describe(self) -> CheckpointDescription:
        """Describes the checkpoint from its header."""
        info = self.info
        is_model = info.kind == MODEL_KIND
        sizes: dict[str, dict[str, int]] = {}
        if info.transformer:
            transformer = info.transformer
            sizes["transformer"] = {
                "num_layers": transformer.num_layers,
                "width": transformer.width,
                "num_heads": transformer.num_heads,
            }
        if info.vae:
            sizes["vae"] = {"latent_channels": info.vae.latent_channels, "patch_size": info.vae.patch_size}
        if info.upscaler:
            upscaler = info.upscaler
            sizes["upscaler"] = {
                "in_channels": upscaler.in_channels,
                "mid_channels": upscaler.mid_channels,
                "num_blocks_per_stage": upscaler.num_blocks_per_stage,
            }
        missing = [name for name in ("transformer", "vae") if name not in self.sources]
        if not self.holds_text_encoder and not (self.is_on_disk and _has_text_encoder(self.path)):
            missing.append("text encoder")
        return CheckpointDescription(
            path=str(self.path),
            kind=info.kind,
            layout=info.layout,
            version=info.version,
            registry_name=info.release.name if info.release else None,
            release_candidates=tuple(release.name for release in info.release_candidates),
            vae_family=info.vae_family,
            sampler=info.schedule.sampler if is_model else None,
            components=tuple(
                describe_component(name, self.sources[name], component_sizes) for name, component_sizes in sizes.items()
            ),
            missing_components=tuple(missing) if is_model else (),
            origins=self._remembered_origins(missing),
        )

    def _remembered_origins(self, missing: Collection[str]) -> dict[str, str]:
        """Returns missing component -> its name or path, for those that the file remembers."""
        metadata = self.sources["transformer"].metadata if "transformer" in self.sources else {}
        fields = {"vae": VAE_FIELD, "text encoder": TEXT_ENCODER_FIELD}
        found = {name: ComponentOrigin.from_metadata(metadata, fields[name]) for name in missing if name in fields}
        return {name: origin.name or origin.path or "" for name, origin in found.items() if origin is not None}

    @property
    def _is_diffusers(self) -> bool:
        return self.info.layout == "diffusers"

    def missing_component_error(self, component: str) -> CheckpointError:
        """Builds the error for a component that is needed and missing; it says what the checkpoint has instead.

        Args:
            component: "transformer", "vae" or "upscaler".
        """
        kind = self.info.kind
        if kind != MODEL_KIND:
            return CheckpointError(
                f"{self.path} is a {kind}, not a model, and has no {component}: it upscales a model's latents. Give it "
                f"as --upscaler, and {_SUGGESTIONS[component]}."
            )
        present = " and ".join(self.sources)
        example = f", such as {self._suggested_vae}" if component == "vae" else ""
        return CheckpointError(
            f"{self.path} has no {component}, only {present}. Give {_SUGGESTIONS[component]}{example}."
        )

    @property
    def _suggested_vae(self) -> str:
        """Registry name of the VAE the model was trained with, or of the closest known one."""
        release, num_layers = self.info.release, getattr(self.info.transformer, "num_layers", None)
        if release is not None:
            return release.vae or release.name
        fitting = [
            model.name
            for model in MODEL_RELEASES
            if model.num_layers == num_layers and self.info.vae_family in (None, model.vae_family)
        ]
        return next((name for name in reversed(fitting) if not name.endswith("fp8")), "ltxv-2b-0.9.5")


_SUGGESTIONS = {
    "transformer": "a checkpoint with a transformer as --model",
    "vae": "a checkpoint with a VAE as --vae",
    "upscaler": "one such as ltxv-spatial-upscaler-0.9.8 as --upscaler",
}


def _has_text_encoder(path: Path) -> bool:
    folder = path if path.is_dir() else path.parent
    return (folder / "text_encoder" / "config.json").is_file()


def describe_component(name: str, source: Source, sizes: Mapping[str, int]) -> ComponentDescription:
    """Describes a component from its header."""
    counts = source.type_counts
    dtype = next(iter(counts), "float32")
    return ComponentDescription(name, sizes, len(source.infos), source.num_parameters, source.size_bytes, dtype, counts)
