"""Weights: every tensor of every component is read, finite, and not a matrix of zeros.

Loading accounts for tensors by the key tables: one that is missing or unexpected ends this stage with its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kadr.cancellation import check_cancelled
from kadr.checkpoints.header import TensorInfo
from kadr.checkpoints.load import COMPUTE_DTYPES
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.kernels.dequant import dequantize
from kadr.memory.mapped_files import release_pages
from kadr.selftest.result import Check, none_of
from kadr.selftest.subject import Subject

# T5 v1.1 of this width has this many blocks (reference: ltx-video.md, 3): a file with fewer, and a config that agrees,
# would load.
XXL_WIDTH, XXL_LAYERS = 4096, 24
_SLICE_ROWS = 4096  # of a tensor in GGML's blocks, dequantized at a time


def check_weights(subject: Subject) -> Iterator[Check]:
    """Reads all tensors once. Trained matrices and convolutions are never all zeros; biases and norms may be."""
    spec = subject.spec
    _account(subject)
    sources = _sources(subject)
    infos = {(name, key): info for name, source in sources.items() for key, info in source.infos.items()}
    broken, empty, count = [], [], 0
    for (name, key), info in infos.items():
        check_cancelled()
        is_finite, is_zero = _inspect(sources[name], key, info)
        count += 1
        if not is_finite:
            broken.append(f"{key} of the {name}")
        if is_zero and len(info.shape) > 1:
            empty.append(f"{key} of the {name}")
    yield Check("tensors read", count, 1, None)
    yield none_of("tensors with NaN or infinity", broken)
    yield none_of("matrices of zeros", empty)
    text_config = spec.text_encoder_checkpoint.config
    if text_config.d_model == XXL_WIDTH:
        yield Check("blocks of the text encoder", text_config.num_layers, XXL_LAYERS, XXL_LAYERS)


def _account(subject: Subject) -> None:
    """Loads the modules as views of their files, which refuses missing and unexpected tensors; reads no page."""
    spec = subject.spec
    dtype = spec.dtype
    for checkpoint in {id(item): item for item in spec.transformer_checkpoints}.values():
        checkpoint.read_transformer_weights(())
    spec.vae_checkpoint.account_late_components()
    spec.text_encoder_checkpoint.load(dtype, keep_storage_dtype=True)


def _sources(subject: Subject) -> dict[str, Source]:
    """Returns component -> its tensors."""
    spec = subject.spec
    sources = {"transformer": spec.checkpoint.sources["transformer"], "VAE": spec.vae_checkpoint.sources["vae"]}
    if spec.has_second_model:
        sources["second transformer"] = spec.transformer_checkpoints[1].sources["transformer"]
    sources["text encoder"] = spec.text_encoder_checkpoint.source
    for kind, checkpoint in released_upscalers(subject).items():
        sources[f"{kind} upscaler"] = checkpoint
    sources |= {f"LoRA {Path(file.path).name}": file.source for file in spec.loras.files}
    return {name: source for name, source in sources.items() if source.is_on_disk}


def released_upscalers(subject: Subject) -> dict[str, Source]:
    """Returns kind -> tensors of the model's upscalers that are on disk; empty where it has none."""
    try:
        upscalers = subject.spec.upscalers(has_two_passes=True)
    except CheckpointError:
        return {}
    return {kind: item.sources["upscaler"] for kind, item in upscalers.items() if item.is_on_disk}


def _inspect(source: Source, key: str, info: TensorInfo) -> tuple[bool, bool]:
    """Returns whether a tensor is finite, and whether it is all zeros."""
    tensor = source.read(key)
    if info.ggml_type is None and not info.dtype.is_floating_point:
        return True, False  # such as a counter
    is_finite, is_zero = True, True
    for rows in _float_slices(tensor, info):
        is_finite = is_finite and bool(torch.isfinite(rows).all())
        is_zero = is_zero and not bool(rows.any())
    release_pages([tensor])
    return is_finite, is_zero


def _float_slices(tensor: Tensor, info: TensorInfo) -> Iterator[Tensor]:
    """Yields a tensor as floats, some rows at a time."""
    rows_of_tensor = tensor if tensor.ndim else tensor[None]
    for rows in rows_of_tensor.split(_SLICE_ROWS):
        if info.ggml_type is not None:
            columns = rows.shape[-1] // info.ggml_type.row_bytes(info.ggml_type.block_size) * info.ggml_type.block_size
            yield dequantize(rows, info.ggml_type, torch.empty(len(rows), columns))
        else:
            yield rows if info.dtype in COMPUTE_DTYPES else rows.float()
