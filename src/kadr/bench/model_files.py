"""Files of the models to measure: the bundled one, and random weights of the released sizes.

All models are opened from files, as a user opens one.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from kadr.bench.cases import DEMO, TEXT, Selection
from kadr.cancellation import remove_if_ended
from kadr.checkpoints.save import write_single_file, write_text_encoder
from kadr.errors import CheckpointError
from kadr.models.registry import find_release
from kadr.models.t5 import T5_XXL, T5Config, T5Encoder
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, Transformer, TransformerConfig
from kadr.models.vae import VAE
from kadr.models.vae.config import VAE_0_9_5
from kadr.planning.costs.parameters import text_encoder_parameters, transformer_parameters
from kadr.planning.costs.vae_stages import vae_decoder_parameters, vae_encoder_parameters
from kadr.sampling.schedules import Schedule
from kadr.spec.locate import fetch_release

# The text encoder where it is not measured: of the width that the transformer needs, and otherwise tiny.
T5_STUB = replace(T5_XXL, vocab_size=512, num_layers=1, num_heads=1, d_ff=64)
TRANSFORMERS = {"2b": TRANSFORMER_2B, "13b": TRANSFORMER_13B}
POOL_NUMEL = (1 << 24) + 1  # random numbers; odd, so that the rows of a tensor that repeats the pool differ
BIAS_SCALE = 0.02  # small, and not zero


class RandomWeights:
    """Random weights by tensor name, all slices of one pool: only the disk limits how fast they are written."""

    def __init__(self) -> None:
        self.pool = torch.randn(POOL_NUMEL, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Returns random weights of the shape of `tensor`, scaled to keep the size of activations."""
        if name.endswith(("norm.weight", "norm_q.weight", "norm_k.weight", "std-of-means")):
            return torch.ones(tensor.shape)
        if name.endswith("timestep_scale_multiplier"):
            return torch.full(tensor.shape, 1000.0)
        start = crc32(name.encode()) % POOL_NUMEL
        count = tensor.numel()
        values = self.pool.roll(-start).repeat(-(-count // POOL_NUMEL))[:count]
        return values.view(tensor.shape) * (BIAS_SCALE if tensor.ndim < 2 else tensor[0].numel() ** -0.5)


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk.

    Args:
        path: the checkpoint.
        text_encoder_folder: folder with `text_encoder` and `tokenizer`.
        scratch_folder: folder for temporary files.
        transformer_blocks: blocks in the file, and blocks of the full model; None where the model is complete.
        text_encoder_blocks: the same for the text encoder.
    """

    name: str
    path: Path
    text_encoder_folder: Path
    scratch_folder: Path
    transformer_blocks: tuple[int, int] | None = None
    text_encoder_blocks: tuple[int, int] | None = None


@contextmanager
def open_model_files(name: str, selection: Selection, models_folder: Path | None = None) -> Iterator[ModelFiles]:
    """Yields the files of a model, which exist until the `with` block ends.

    Args:
        models_folder: keeps random models, and is searched for them; None is a temporary folder.

    Raises:
        CheckpointError: the disk has no room for them.
    """
    with tempfile.TemporaryDirectory(prefix="kadr-bench-") as scratch, remove_if_ended(partial(shutil.rmtree, scratch)):
        if name == DEMO:
            path = fetch_release(find_release(DEMO))
            yield ModelFiles(name, path, path.parent, Path(scratch))
        else:
            yield write_random_model(name, selection, models_folder or Path(scratch) / "models", Path(scratch))


def write_random_model(name: str, selection: Selection, models_folder: Path, scratch_folder: Path) -> ModelFiles:
    """Writes a model of the 0.9.8 layout in bfloat16, with official names and header. Existing files stay."""
    full = TRANSFORMERS[name]
    config = replace(full, num_layers=min(selection.num_layers or full.num_layers, full.num_layers))
    cut = "" if config == full else f"-{config.num_layers}-blocks"
    text_config = text_encoder_config(selection)
    path = models_folder / f"random-{name}{cut}.safetensors"
    text_folder = models_folder / ("t5-stub" if text_config is T5_STUB else f"t5-{text_config.num_layers}-blocks")
    needs_model, needs_text = not path.exists(), not (text_folder / "text_encoder" / "config.json").exists()
    models_folder.mkdir(parents=True, exist_ok=True)
    _require_disk_space(
        models_folder,
        (_model_bytes(config) if needs_model else 0) + (_text_encoder_bytes(text_config) if needs_text else 0),
    )
    random_weights = RandomWeights() if needs_model or needs_text else None
    if needs_model:
        with torch.device("meta"):
            transformer, vae = Transformer(config), VAE(VAE_0_9_5)
        schedule = Schedule(sampler="LinearQuadratic")
        write_single_file(path, transformer=transformer, vae=vae, schedule=schedule, materialize=random_weights)
    if needs_text:
        with torch.device("meta"):
            encoder = T5Encoder(text_config)
        tokenizer = fetch_release(find_release(DEMO)).parent / "tokenizer" / "spiece.model"
        write_text_encoder(text_folder, encoder, tokenizer, materialize=random_weights)
    return ModelFiles(
        name,
        path,
        text_folder,
        scratch_folder,
        transformer_blocks=None if config == full else (config.num_layers, full.num_layers),
        text_encoder_blocks=None
        if text_config.num_layers == T5_XXL.num_layers
        else (text_config.num_layers, T5_XXL.num_layers),
    )


def text_encoder_config(selection: Selection) -> T5Config:
    """Returns the text encoder of random models: T5-XXL where it is measured, or else a stub."""
    if TEXT not in selection.stages:
        return T5_STUB
    return replace(T5_XXL, num_layers=min(selection.num_layers or T5_XXL.num_layers, T5_XXL.num_layers))


def _require_disk_space(folder: Path, required_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if required_bytes > free:
        raise CheckpointError(
            f"the random weights take {required_bytes / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free. Use "
            "fewer blocks (--num-layers), or another folder (--model-folder, or TMPDIR)."
        )


def _model_bytes(config: TransformerConfig) -> int:
    halves = vae_encoder_parameters(VAE_0_9_5).total + vae_decoder_parameters(VAE_0_9_5).total
    return 2 * (transformer_parameters(config).total + halves)


def _text_encoder_bytes(config: T5Config) -> int:
    return 2 * text_encoder_parameters(config).total
