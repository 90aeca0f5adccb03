"""A model, known from its headers: which components it has, and whether they fit each other."""

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
from kadr.spec.options import check_compile, refuse_merging, resolve_scheme

UPSCALER_HINT = "Give one such as ltxv-spatial-upscaler-0.9.8; `kadr models` lists them."
TEXT_ENCODER, VAE_ENCODER, VAE_DECODER = "text encoder", "VAE encoder", "VAE decoder"
TRANSFORMER, SECOND_TRANSFORMER = "transformer", "second transformer"
PASS_STAGES = ("denoise", "refine")
SPATIAL_UPSCALER, TEMPORAL_UPSCALER = "spatial", "temporal"


@dataclass(frozen=True)
class Upscaling:
    """What happens to the latents between two passes: which sides double."""

    spatial: bool
    temporal: bool


class ModelSpec:
    """A model whose headers are read, and how it is to be run here. No weight is in memory.

    Args:
        checkpoint: with the transformer, and the VAE unless `vae_checkpoint` brings it.
        text_encoder_folder: the text encoder's folder.
        vae_checkpoint: another checkpoint to take the VAE from.
        second: another checkpoint to take the second pass's transformer from.
        loras: for the transformers of both passes.
        quant, offload, compile_transformer: see `Engine.open`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: TextEncoderCheckpoint,
        vae: Checkpoint | None,
        *,
        device: str,
        dtype: str,
        second: Checkpoint | None = None,
        loras: Loras | None = None,
        quant: str | None = None,
        offload: str = OFFLOAD_AUTO,
        compiled: bool = False,
    ) -> None:
        self.checkpoint, self.text_encoder_folder, self.vae_checkpoint = checkpoint, text, vae or checkpoint
        self.transformer_checkpoints = (checkpoint, second or checkpoint)
        self.transformer_config = require_components(checkpoint, self.vae_checkpoint)
        require_matching_text_encoder(text, checkpoint)
        if second is not None:
            require_components(second, self.vae_checkpoint)
            require_matching_text_encoder(text, second)
        self.loras = loras or Loras(())
        self.loras.check_fits(self.transformer_checkpoints)
        self.upscaler_checkpoints: dict[str, Checkpoint] = {}
        checkpoints = {one.path: one for one in (*self.transformer_checkpoints, self.vae_checkpoint)}
        parameters = sum(source.num_parameters for one in checkpoints.values() for source in one.sources.values())
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device, parameters)
        self.quant, self.offload = resolve_scheme(quant, self.transformer_checkpoints, self.device), offload
        if self.loras.is_merged:
            refuse_merging(self.transformer_checkpoints)
        self.compile_transformer = check_compile(compiled, self.device)

    def add_upscaler(self, checkpoint: Checkpoint) -> None:
        """Take a latent upscaler for the way between two passes.

        Raises:
            CheckpointError: it is none, is for another model, or there is one of its kind already.
        """
        self.upscaler_checkpoints = order_upscalers([*self.upscaler_checkpoints.values(), checkpoint], self.checkpoint)

    @property
    def upscaling(self) -> Upscaling:
        """What the upscalers double."""
        configs = [made for one in self.upscaler_checkpoints.values() if (made := one.info.upscaler) is not None]
        return Upscaling(
            any(config.spatial_upsample for config in configs), any(config.temporal_upsample for config in configs)
        )

    @property
    def schedules(self) -> tuple[Schedule, Schedule]:
        """Of the first pass and of the second."""
        first, second = self.transformer_checkpoints
        return first.info.schedule, second.info.schedule

    def transformer_config_of(self, pass_index: int) -> TransformerConfig:
        """Of the transformer of a pass, 0 or 1."""
        config = self.transformer_checkpoints[pass_index].info.transformer
        assert config is not None
        return config

    def transformer_component(self, pass_index: int) -> str:
        """What the shelf calls the transformer of a pass."""
        return TRANSFORMER if self.transformer_checkpoints[pass_index] is self.checkpoint else SECOND_TRANSFORMER

    def component_paths(self) -> dict[str, str]:
        """Where the parts come from, for the record."""
        parts = {
            "model": self.checkpoint.path,
            "text_encoder": self.text_encoder_folder.tokenizer_root,
            "vae": self.vae_checkpoint.path,
        }
        if self.transformer_checkpoints[1] is not self.checkpoint:
            parts["second_model"] = self.transformer_checkpoints[1].path
        parts |= {f"{kind}_upscaler": checkpoint.path for kind, checkpoint in self.upscaler_checkpoints.items()}
        # Not resolved: in the hub's cache a link has the file's name, and what it points to has none.
        return {name: str(Path(path).absolute()) for name, path in parts.items()}

    def file_fingerprints(self, extra_paths: Iterable[Path] = ()) -> dict[str, Any]:
        """Size and time of change of every file that the pictures depend on. others: besides those of the model."""
        checkpoints = {id(one): one for one in (*self.transformer_checkpoints, self.vae_checkpoint)}.values()
        sources = [self.text_encoder_folder.source, *(source for one in checkpoints for source in one.sources.values())]
        files = {info.file for source in sources for info in source.infos.values()}
        files |= {file.source.path for file in self.loras.files}
        return {"files": {str(path.absolute()): _fingerprint(path) for path in sorted({*files, *extra_paths})}}


def _fingerprint(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def require_components(checkpoint: Checkpoint, vae_checkpoint: Checkpoint) -> TransformerConfig:
    """Check that there are a transformer and a VAE and that they fit each other.

    Raises:
        CheckpointError: they do not.
    """
    transformer = checkpoint.info.transformer
    if transformer is None:
        raise checkpoint.missing_component_error("transformer")
    if vae_checkpoint.info.vae is None:
        raise vae_checkpoint.missing_component_error("vae")
    if vae_checkpoint.info.vae.latent_channels != transformer.in_channels:
        raise CheckpointError(
            f"the VAE of {vae_checkpoint.path} has {vae_checkpoint.info.vae.latent_channels} latent channels, the transformer of "
            f"{checkpoint.path} {transformer.in_channels}. Take both from the same release."
        )
    return transformer


def require_matching_text_encoder(text_encoder_folder: TextEncoderCheckpoint, checkpoint: Checkpoint) -> None:
    """Check that a transformer reads what a text encoder writes.

    Raises:
        CheckpointError: it does not.
    """
    transformer = checkpoint.info.transformer
    if transformer is not None and transformer.caption_channels != text_encoder_folder.config.d_model:
        raise CheckpointError(
            f"the text encoder of {text_encoder_folder.path} is {text_encoder_folder.config.d_model} wide, and the transformer of {checkpoint.path} "
            f"reads text of {transformer.caption_channels}. Give the one it was trained with as --text-encoder."
        )


def require_matching_upscaler(
    upscaler: Checkpoint, transformer: TransformerConfig | None, model: Path
) -> UpscalerConfig:
    """What an upscaler does, if it is one for a model's latents.

    Raises:
        CheckpointError: it is none, or is for another model.
    """
    config = upscaler.info.upscaler
    if config is None:
        raise CheckpointError(f"{upscaler.path} is no latent upscaler. {UPSCALER_HINT}")
    if transformer is not None and config.in_channels != transformer.in_channels:
        raise CheckpointError(
            f"the upscaler {upscaler.path} is for latents of {config.in_channels} channels, and those of {model} have "
            f"{transformer.in_channels}. {UPSCALER_HINT}"
        )
    return config


def order_upscalers(upscalers: Sequence[Checkpoint], model: Checkpoint) -> dict[str, Checkpoint]:
    """The upscalers for a model's latents by what they double, in the order in which they work.

    Raises:
        CheckpointError: one is none, is for another model, or doubles what another doubles.
    """
    made: dict[str, Checkpoint] = {}
    doubled: set[str] = set()
    for upscaler in upscalers:
        config = require_matching_upscaler(upscaler, model.info.transformer, model.path)
        kinds = [
            kind
            for kind, doubles in (
                (SPATIAL_UPSCALER, config.spatial_upsample),
                (TEMPORAL_UPSCALER, config.temporal_upsample),
            )
            if doubles
        ]
        if again := [kind for kind in kinds if kind in doubled]:
            raise CheckpointError(f"{upscaler.path} is a second {again[0]} upscaler; give one of each kind at most.")
        doubled.update(kinds)
        made[kinds[0]] = upscaler
    # The picture first: it is the smaller one that the other then has to double.
    return dict(sorted(made.items(), key=lambda item: item[0] != SPATIAL_UPSCALER))
