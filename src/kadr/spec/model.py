"""A model opened by its headers: its components, and checks that they fit each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError
from kadr.memory.device import pick_device, pick_dtype
from kadr.models.transformer import TransformerConfig
from kadr.models.upscaler import UpscalerConfig
from kadr.sampling.schedules import Schedule
from kadr.spec.loras import Loras
from kadr.spec.offload import OFFLOAD_AUTO
from kadr.spec.options import check_compile, refuse_merging, resolve_weight_format

UPSCALER_HINT = "Give one such as ltxv-spatial-upscaler-0.9.8; `kadr models` lists them."
TEXT_ENCODER, VAE_ENCODER, VAE_DECODER = "text encoder", "VAE encoder", "VAE decoder"
TRANSFORMER, SECOND_TRANSFORMER = "transformer", "second transformer"
PASS_STAGES = ("denoise", "refine")
SPATIAL_UPSCALER, TEMPORAL_UPSCALER = "spatial", "temporal"


@dataclass(frozen=True)
class Upscaling:
    """The axes of the latents that double between two passes."""

    spatial: bool
    temporal: bool


class ModelSpec:
    """A model's headers, and the options it runs with on this machine. No weight is in memory.

    Args:
        checkpoint: has the transformer, and the VAE unless `vae_checkpoint` has it.
        text_encoder_checkpoint: the text encoder.
        vae_checkpoint: another checkpoint for the VAE; None means `checkpoint`.
        device, dtype: see `Engine.open`.
        second_checkpoint: another checkpoint for the transformer of the second pass.
        loras: for the transformers of both passes.
        quant, offload, compile_transformer: see `Engine.open`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text_encoder_checkpoint: TextEncoderCheckpoint,
        vae_checkpoint: Checkpoint | None,
        *,
        device: str,
        dtype: str,
        second_checkpoint: Checkpoint | None = None,
        loras: Loras | None = None,
        quant: str | None = None,
        offload: str = OFFLOAD_AUTO,
        compile_transformer: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.text_encoder_checkpoint, self.vae_checkpoint = text_encoder_checkpoint, vae_checkpoint or checkpoint
        self.transformer_checkpoints = (checkpoint, second_checkpoint or checkpoint)
        self.transformer_config = require_components(checkpoint, self.vae_checkpoint)
        require_matching_text_encoder(text_encoder_checkpoint, checkpoint)
        if second_checkpoint is not None:
            require_components(second_checkpoint, self.vae_checkpoint)
            require_matching_text_encoder(text_encoder_checkpoint, second_checkpoint)
        self.loras = loras or Loras(())
        self.loras.check_fits(self.transformer_checkpoints)
        self.upscaler_checkpoints: dict[str, Checkpoint] = {}
        checkpoints = {opened.path: opened for opened in (*self.transformer_checkpoints, self.vae_checkpoint)}
        num_parameters = sum(
            source.num_parameters for opened in checkpoints.values() for source in opened.sources.values()
        )
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device, num_parameters)
        self.quant, self.offload = resolve_weight_format(quant, self.transformer_checkpoints, self.device), offload
        if self.loras.is_merged:
            refuse_merging(self.transformer_checkpoints)
        self.compile_transformer = check_compile(compile_transformer, self.device)

    def add_upscaler(self, checkpoint: Checkpoint) -> None:
        """Adds a latent upscaler to run between two passes.

        Raises:
            CheckpointError: it is not an upscaler, is for another model, or one of its kind is there already.
        """
        self.upscaler_checkpoints = order_upscalers([*self.upscaler_checkpoints.values(), checkpoint], self.checkpoint)

    @property
    def upscaling(self) -> Upscaling:
        """The axes that the upscalers double."""
        infos = [checkpoint.info for checkpoint in self.upscaler_checkpoints.values()]
        configs = [info.upscaler for info in infos if info.upscaler is not None]
        return Upscaling(
            any(config.spatial_upsample for config in configs), any(config.temporal_upsample for config in configs)
        )

    @property
    def schedules(self) -> tuple[Schedule, Schedule]:
        """Schedules of the first and the second pass."""
        first, second = self.transformer_checkpoints
        return first.info.schedule, second.info.schedule

    def transformer_config_of(self, pass_index: int) -> TransformerConfig:
        """Returns the config of the transformer of a pass, 0 or 1."""
        config = self.transformer_checkpoints[pass_index].info.transformer
        assert config is not None
        return config

    def transformer_component(self, pass_index: int) -> str:
        """Returns the name of the transformer of a pass in the module cache."""
        return TRANSFORMER if self.transformer_checkpoints[pass_index] is self.checkpoint else SECOND_TRANSFORMER

    def component_paths(self) -> dict[str, str]:
        """Returns the paths of all components, for a video's metadata."""
        paths = {
            "model": self.checkpoint.path,
            "text_encoder": self.text_encoder_checkpoint.tokenizer_root,
            "vae": self.vae_checkpoint.path,
        }
        if self.transformer_checkpoints[1] is not self.checkpoint:
            paths["second_model"] = self.transformer_checkpoints[1].path
        paths |= {f"{kind}_upscaler": checkpoint.path for kind, checkpoint in self.upscaler_checkpoints.items()}
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
            f"{transformer.caption_channels}. Give the text encoder it was trained with as --text-encoder."
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
