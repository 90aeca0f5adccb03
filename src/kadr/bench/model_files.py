"""The models that are measured: the bundled one, and random weights at the sizes of the released ones, on disk.

All go through the files, so that what is measured is what a user gets who opens a model.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from kadr.bench.cases import DEMO, TEXT, Selection
from kadr.checkpoints.save import write_single_file, write_text_encoder
from kadr.errors import CheckpointError
from kadr.models.registry import find_release
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, Transformer, TransformerConfig
from kadr.models.vae import VAE
from kadr.models.vae.config import VAE_0_9_5
from kadr.planning.parameters import text_encoder_parameters, transformer_parameters
from kadr.planning.vae_stages import vae_decoder_parameters, vae_encoder_parameters
from kadr.sampling.schedules import Schedule
from kadr.spec.locate import fetch_release

T5_XXL = T5Config(vocab_size=32128, d_model=4096, num_layers=24, num_heads=64, d_kv=64, d_ff=10240)
# Where nobody measures the text encoder: as wide as it must be, and next to nothing besides.
T5_STUB = replace(T5_XXL, vocab_size=512, num_layers=1, num_heads=1, d_ff=64)
TRANSFORMERS = {"2b": TRANSFORMER_2B, "13b": TRANSFORMER_13B}
POOL_NUMEL = (1 << 24) + 1  # numbers drawn once; odd, so that rows of a tensor that goes round are not alike
BIAS_SCALE = 0.02  # of biases: there, and small


class RandomWeights:
    """Numbers for tensors, by name: pieces of one pool, so that writing is limited by the disk."""

    def __init__(self) -> None:
        self.pool = torch.randn(POOL_NUMEL, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Numbers of the shape of `tensor` that keep activations near their size."""
        if name.endswith(("norm.weight", "norm_q.weight", "norm_k.weight", "std-of-means")):
            return torch.ones(tensor.shape)
        if name.endswith("timestep_scale_multiplier"):
            return torch.full(tensor.shape, 1000.0)
        start = crc32(name.encode()) % POOL_NUMEL
        count = tensor.numel()
        around = self.pool.roll(-start).repeat(-(-count // POOL_NUMEL))[:count]
        return around.view(tensor.shape) * (BIAS_SCALE if tensor.ndim < 2 else tensor[0].numel() ** -0.5)


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk.

    Args:
        path: its file.
        text_encoder_folder: the folder with `text_encoder` and `tokenizer`.
        scratch_folder: a folder for what is made on the way.
        transformer_blocks: of the transformer: how many there are, and how many the model would have; None where these are all.
        text_encoder_blocks: of the text encoder, likewise.
    """

    name: str
    path: Path
    text_encoder_folder: Path
    scratch_folder: Path
    transformer_blocks: tuple[int, int] | None = None
    text_encoder_blocks: tuple[int, int] | None = None


@contextmanager
def open_model_files(name: str, selection: Selection, models_folder: Path | None = None) -> Iterator[ModelFiles]:
    """The files of a model, for as long as the block runs.

    Args:
        models_folder: keeps random models, and has those that were kept; None is a temporary one.

    Raises:
        CheckpointError: there is no room for them.
    """
    with tempfile.TemporaryDirectory(prefix="kadr-bench-") as scratch:
        if name == DEMO:
            path = fetch_release(find_release(DEMO))
            yield ModelFiles(name, path, path.parent, Path(scratch))
        else:
            yield write_random_model(name, selection, models_folder or Path(scratch) / "models", Path(scratch))


def write_random_model(name: str, selection: Selection, models_folder: Path, scratch_folder: Path) -> ModelFiles:
    """Write a model of the 0.9.8 layout in bfloat16, with official names and header; what is there already stays."""
    full = TRANSFORMERS[name]
    config = replace(full, num_layers=min(selection.num_layers or full.num_layers, full.num_layers))
    cut = "" if config == full else f"-{config.num_layers}-layers"
    text = text_encoder_config(selection)
    path = models_folder / f"random-{name}{cut}.safetensors"
    home = models_folder / ("t5-standing-in" if text is T5_STUB else f"t5-{text.num_layers}-layers")
    absent, no_text = not path.exists(), not (home / "text_encoder" / "config.json").exists()
    models_folder.mkdir(parents=True, exist_ok=True)
    _require_disk_space(
        models_folder, (_model_bytes(config) if absent else 0) + (_text_encoder_bytes(text) if no_text else 0)
    )
    noise = RandomWeights() if absent or no_text else None
    if absent:
        with torch.device("meta"):
            transformer, vae = Transformer(config), VAE(VAE_0_9_5)
        schedule = Schedule(sampler="LinearQuadratic")
        write_single_file(path, transformer=transformer, vae=vae, schedule=schedule, materialize=noise)
    if no_text:
        with torch.device("meta"):
            encoder = T5Encoder(text)
        tokenizer = fetch_release(find_release(DEMO)).parent / "tokenizer" / "spiece.model"
        write_text_encoder(home, encoder, tokenizer, materialize=noise)
    return ModelFiles(
        name,
        path,
        home,
        scratch_folder,
        transformer_blocks=None if config == full else (config.num_layers, full.num_layers),
        text_encoder_blocks=None if text.num_layers == T5_XXL.num_layers else (text.num_layers, T5_XXL.num_layers),
    )


def text_encoder_config(selection: Selection) -> T5Config:
    """The text encoder of random models: T5-XXL where it is measured."""
    if TEXT not in selection.stages:
        return T5_STUB
    return replace(T5_XXL, num_layers=min(selection.num_layers or T5_XXL.num_layers, T5_XXL.num_layers))


def _require_disk_space(folder: Path, required_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if required_bytes > free:
        raise CheckpointError(
            f"the random weights take {required_bytes / 1e9:.1f} GB, and {folder} has room for {free / 1e9:.1f}. Take fewer "
            "layers, or another folder (--model-folder, or TMPDIR)."
        )


def _model_bytes(config: TransformerConfig) -> int:
    halves = vae_encoder_parameters(VAE_0_9_5).total + vae_decoder_parameters(VAE_0_9_5).total
    return 2 * (transformer_parameters(config).total + halves)


def _text_encoder_bytes(config: T5Config) -> int:
    return 2 * text_encoder_parameters(config).total
