"""A model known from headers and the registry, and checks that its components fit each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.predict import predict_checkpoint
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError
from kadr.models.registry import DEFAULT_TEXT_ENCODER, UPSCALER, Recipe, Release
from kadr.models.t5 import T5_XXL
from kadr.models.training_range import LTX_VIDEO_RANGE, TrainingRange
from kadr.models.transformer import TransformerConfig
from kadr.models.upscaler import UpscalerConfig
from kadr.models.vae import VAEConfig
from kadr.sampling.schedules import Schedule
from kadr.spec.locate import MODEL, SECOND_MODEL, TOKENIZER_ROLE, UPSCALER_ROLE, ModelComponent, locate_release
from kadr.spec.loras import Loras
from kadr.spec.offload import OFFLOAD_AUTO
from kadr.text.tokenizer import Tokenizer

UPSCALER_HINT = "Give one such as ltxv-spatial-upscaler-0.9.8; `kadr models` lists them."
TEXT_ENCODER, VAE_ENCODER, VAE_DECODER, UPSCALERS = "text encoder", "VAE encoder", "VAE decoder", "upscaler"
TRANSFORMER, SECOND_TRANSFORMER = "transformer", "second transformer"
PASS_STAGES = ("denoise", "refine")
SPATIAL_UPSCALER, TEMPORAL_UPSCALER = "spatial", "temporal"


@dataclass(frozen=True)
class Upscaling:
    """The axes of the latents that double between two passes."""

    spatial: bool
    temporal: bool


@dataclass(frozen=True)
class SpecOptions:
    """Arguments that a model was opened by; see `Engine.open`."""

    model: str | Path = "demo"
    release: str | None = None
    text_encoder: str | Path | None = None
    vae: str | Path | None = None
    upscaler: str | Path | Sequence[str | Path] = ()
    second_model: str | Path | None = None
    recipe: Recipe | None = None
    models_dirs: Sequence[str | Path] = ()
    loras: Sequence[Any] = ()
    lora_partial: bool = False
    merge_loras: bool = False
    device: str = "auto"
    dtype: str = "auto"
    quant: str | None = None
    offload: str = OFFLOAD_AUTO
    compile_transformer: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelSpec:
    """A model known from headers and the registry, and the options it runs with on this machine. No weight is read.

    A header that is not on disk is predicted from the registry; see `checkpoints.predict`.

    Args:
        options: what it was opened by.
        components: its components, and the path of each that is on disk.
        release: registry entry of the model; None for an unreleased one.
        recipe: defaults for what requests leave out.
        transformer_checkpoints: of the first pass and of the second; mostly the same one twice.
        given_upscalers: upscalers that were given, by kind, in the order in which they run.
        names_and_releases: of the models of the first pass and of the second.
        notices: what of the options this device lacks, and what is used instead.
        quant, offload, compile_transformer: see `Engine.open`; a scheme that this device supports.
    """

    options: SpecOptions
    components: tuple[ModelComponent, ...]
    release: Release | None
    recipe: Recipe
    transformer_checkpoints: tuple[Checkpoint, Checkpoint]
    text_encoder_checkpoint: TextEncoderCheckpoint
    vae_checkpoint: Checkpoint
    given_upscalers: Mapping[str, Checkpoint]
    names_and_releases: tuple[tuple[str, Release | None], tuple[str, Release | None]]
    loras: Loras
    device: torch.device
    dtype: torch.dtype
    quant: str
    offload: str
    compile_transformer: bool
    notices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name or path that the model was opened by."""
        return self.names_and_releases[0][0]

    @property
    def trained_at(self) -> TrainingRange:
        """Videos that the model was trained with; those of the family for an unreleased one."""
        return LTX_VIDEO_RANGE if self.release is None else self.release.trained_at

    @property
    def checkpoint(self) -> Checkpoint:
        """Checkpoint of the first pass's transformer."""
        return self.transformer_checkpoints[0]

    @property
    def has_second_model(self) -> bool:
        """True if the second pass has a transformer of its own."""
        return self.transformer_checkpoints[1] is not self.checkpoint

    def upscalers(self, *, has_two_passes: bool) -> Mapping[str, Checkpoint]:
        """Returns the upscalers between two passes by kind: those given, else the one released for the model.

        Raises:
            CheckpointError: there are two passes, and no upscaler.
        """
        return self.given_upscalers if self.given_upscalers or not has_two_passes else self._released_upscalers

    @cached_property
    def _released_upscalers(self) -> Mapping[str, Checkpoint]:
        component = self.default_upscaler
        if component is None:
            raise CheckpointError(
                "two passes need a latent upscaler, and none belongs to this model. Give one with --upscaler, or ask "
                "for a single pass (--single-pass).",
                topic="upscaler",
                fix=f"--upscaler {UPSCALER}, or --single-pass",
            )
        return order_upscalers([open_checkpoint(component)], self.checkpoint)

    @property
    def default_upscaler(self) -> ModelComponent | None:
        """The upscaler that was released for the model; None if there is none."""
        if self.release is None or self.release.upscaler is None:
            return None
        return locate_release(self.release.upscaler, UPSCALER_ROLE)

    def upscaling(self, *, has_two_passes: bool) -> Upscaling:
        """Returns the axes that the upscalers double.

        Raises:
            CheckpointError: as `upscalers`.
        """
        infos = [checkpoint.info for checkpoint in self.upscalers(has_two_passes=has_two_passes).values()]
        configs = [info.upscaler for info in infos if info.upscaler is not None]
        return Upscaling(
            any(config.spatial_upsample for config in configs), any(config.temporal_upsample for config in configs)
        )

    def required_components(self, *, has_two_passes: bool) -> tuple[ModelComponent, ...]:
        """Returns the components that a generation opens."""
        if not has_two_passes or self.given_upscalers or (default := self.default_upscaler) is None:
            return self.components
        models = [item for item in self.components if item.role in (MODEL, SECOND_MODEL)]
        return (*models, default, *(item for item in self.components if item not in models))

    @property
    def schedules(self) -> tuple[Schedule, Schedule]:
        """Schedules of the first and the second pass."""
        first, second = self.transformer_checkpoints
        return first.info.schedule, second.info.schedule

    @property
    def transformer_config(self) -> TransformerConfig:
        """Config of the first pass's transformer."""
        return self.transformer_config_of(0)

    def transformer_config_of(self, pass_index: int) -> TransformerConfig:
        """Returns the config of the transformer of a pass, 0 or 1."""
        checkpoint = self.transformer_checkpoints[pass_index]
        if checkpoint.info.transformer is None:
            raise checkpoint.missing_component_error("transformer")
        return checkpoint.info.transformer

    @property
    def vae_config(self) -> VAEConfig:
        """Config of the VAE."""
        if self.vae_checkpoint.info.vae is None:
            raise self.vae_checkpoint.missing_component_error("vae")
        return self.vae_checkpoint.info.vae

    def transformer_component(self, pass_index: int) -> str:
        """Returns the name of the transformer of a pass in the module cache."""
        return SECOND_TRANSFORMER if pass_index and self.has_second_model else TRANSFORMER

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer of the text encoder; None where it is not on disk."""
        is_absent = any(item.role == TOKENIZER_ROLE and item.path is None for item in self.components)
        if is_absent or not self.text_encoder_checkpoint.is_on_disk:
            return None
        return self.text_encoder_checkpoint.load_tokenizer()

    def component_paths(self, *, has_two_passes: bool) -> dict[str, str]:
        """Returns the paths of the components that a generation opens, for a video's metadata."""
        paths = {
            "model": self.checkpoint.path,
            "text_encoder": self.text_encoder_checkpoint.tokenizer_root,
            "vae": self.vae_checkpoint.path,
        }
        if self.has_second_model:
            paths["second_model"] = self.transformer_checkpoints[1].path
        upscalers = self.upscalers(has_two_passes=has_two_passes)
        paths |= {f"{kind}_upscaler": checkpoint.path for kind, checkpoint in upscalers.items()}
        # Not resolved: in the hub's cache the link has the file's name, and its target is named by a checksum.
        return {name: str(Path(path).absolute()) for name, path in paths.items()}

    def file_fingerprints(self, extra_paths: Iterable[Path] = ()) -> dict[str, Any]:
        """Returns size and mtime of every file that the frames depend on.

        Args:
            extra_paths: files besides those of the model.
        """
        checkpoints = {id(opened): opened for opened in (*self.transformer_checkpoints, self.vae_checkpoint)}.values()
        sources = [
            self.text_encoder_checkpoint.source,
            *(source for opened in checkpoints for source in opened.sources.values()),
        ]
        files = {info.file for source in sources for info in source.infos.values()}
        files |= {file.source.path for file in self.loras.files}
        return {"files": {str(path.absolute()): _fingerprint(path) for path in sorted({*files, *extra_paths})}}


def _fingerprint(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def open_checkpoint(component: ModelComponent, *, known_release: bool = True) -> Checkpoint:
    """Opens the header of a component, or predicts that of one that is not on disk.

    Args:
        known_release: the component is the release that it is named by, whatever its header says.

    Raises:
        CheckpointError: see `Checkpoint.open`.
    """
    if component.path is not None:
        return Checkpoint.open(component.path, release=component.release if known_release else None)
    return predict_checkpoint(component.known_release)


def require_components(checkpoint: Checkpoint, vae_checkpoint: Checkpoint) -> TransformerConfig:
    """Checks that there are a transformer and a VAE that fit each other, and returns the transformer's config.

    Raises:
        CheckpointError: one is missing, or they do not fit.
    """
    transformer = checkpoint.info.transformer
    if transformer is None:
        raise checkpoint.missing_component_error("transformer")
    if vae_checkpoint.info.vae is None:
        raise vae_checkpoint.missing_component_error("vae")
    if vae_checkpoint.info.vae.latent_channels != transformer.in_channels:
        raise CheckpointError(
            f"the VAE of {vae_checkpoint.path} has {vae_checkpoint.info.vae.latent_channels} latent channels, the "
            f"transformer of {checkpoint.path} {transformer.in_channels}. Use both of the same release."
        )
    return transformer


def require_matching_text_encoder(text_encoder_checkpoint: TextEncoderCheckpoint, checkpoint: Checkpoint) -> None:
    """Checks that a transformer takes the width of a text encoder's prompt embeddings.

    Raises:
        CheckpointError: it does not.
    """
    transformer = checkpoint.info.transformer
    if transformer is not None and transformer.caption_channels != text_encoder_checkpoint.config.d_model:
        raise CheckpointError(
            f"the text encoder of {text_encoder_checkpoint.path} has width {text_encoder_checkpoint.config.d_model}, "
            f"but the transformer of {checkpoint.path} takes prompt embeddings of width "
            f"{transformer.caption_channels}. Give the text encoder it was trained with as --text-encoder.",
            topic="text encoder",
            fix=f"--text-encoder {DEFAULT_TEXT_ENCODER}" if transformer.caption_channels == T5_XXL.d_model else "",
        )


def require_matching_upscaler(
    upscaler: Checkpoint, transformer: TransformerConfig | None, model: Path
) -> UpscalerConfig:
    """Checks that a checkpoint is an upscaler for a model's latents, and returns its config.

    Raises:
        CheckpointError: it is not an upscaler, or is for another model.
    """
    config = upscaler.info.upscaler
    if config is None:
        raise CheckpointError(f"{upscaler.path} is not a latent upscaler. {UPSCALER_HINT}")
    if transformer is not None and config.in_channels != transformer.in_channels:
        raise CheckpointError(
            f"the upscaler {upscaler.path} is for latents of {config.in_channels} channels, and those of {model} have "
            f"{transformer.in_channels}. {UPSCALER_HINT}"
        )
    return config


def order_upscalers(upscalers: Sequence[Checkpoint], model: Checkpoint) -> dict[str, Checkpoint]:
    """Returns the upscalers of a model by kind, in the order in which they run.

    Raises:
        CheckpointError: one is not an upscaler, is for another model, or doubles an axis that another doubles.
    """
    upscaler_by_kind: dict[str, Checkpoint] = {}
    doubled: set[str] = set()
    for upscaler in upscalers:
        config = require_matching_upscaler(upscaler, model.info.transformer, model.path)
        doubles = {SPATIAL_UPSCALER: config.spatial_upsample, TEMPORAL_UPSCALER: config.temporal_upsample}
        kinds = [kind for kind, is_doubled in doubles.items() if is_doubled]
        if repeated := [kind for kind in kinds if kind in doubled]:
            raise CheckpointError(f"{upscaler.path} is a second {repeated[0]} upscaler; give one of each kind at most.")
        doubled.update(kinds)
        upscaler_by_kind[kinds[0]] = upscaler
    # The spatial one first.
    return dict(sorted(upscaler_by_kind.items(), key=lambda item: item[0] != SPATIAL_UPSCALER))
