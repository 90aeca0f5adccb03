"""Encodes examples once with the VAE and the text encoder, and caches the results in a folder for later runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kadr.checkpoints.save import write_tensors
from kadr.checkpoints.source import read_tensors
from kadr.errors import CheckpointError, MediaError
from kadr.pipeline.progress import StageProgress, Watch
from kadr.request.inputs import Control
from kadr.request.request import Request
from kadr.schema import EXAMPLE_CACHE_NUMBER
from kadr.shapes import LatentGrid
from kadr.training.dataset import Example
from kadr.training.settings import CANNY, FILES, TrainingSettings

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine


@dataclass(frozen=True)
class CachedExample:
    """An encoded example on disk.

    Args:
        file: a safetensors file, all fp32: "latents" (1, C, f, h, w), normalised; "prompt_embeds" (n, D); and
            "reference", shaped as the latents, where the example has one.
        fps: frame rate for the token positions.
        grid: latent grid of the example.
    """

    example: Example
    file: Path
    fps: float
    grid: LatentGrid

    def load_tensors(self) -> dict[str, Tensor]:
        """Loads the tensors of the file.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        try:
            return read_tensors(self.file)[0]
        except ValueError as error:
            raise CheckpointError(
                f"{self.file} cannot be read: {error}. Remove it; resuming the training writes it again."
            ) from error


def encode_examples(
    engine: Engine, examples: Sequence[Example], settings: TrainingSettings, folder: Path, watch: Watch
) -> list[CachedExample]:
    """Encodes the examples that are not cached yet with the VAE and the text encoder.

    Raises:
        MediaError: the folder cannot be written, or a clip cannot be used.
    """
    _create_folder(folder)
    files = [folder / f"{_cache_key(engine, example, settings)}.safetensors" for example in examples]
    missing = [(example, file) for example, file in zip(examples, files, strict=True) if not file.is_file()]
    if missing:
        captions = _encode_captions(engine, [example for example, _ in missing], settings, watch)
        stage = StageProgress("encode", len(missing), watch)
        for done, ((example, file), embeds) in enumerate(zip(missing, captions, strict=True), 1):
            tensors = {"prompt_embeds": embeds, **_encode_latents(engine, example, settings)}
            write_tensors(file, tensors, dtype=torch.float32)
            stage.report(done)
    return [_cached_example(engine, *pair, settings) for pair in zip(examples, files, strict=True)]


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"{folder} cannot be created: {error.strerror or error}. Choose another --output.") from error


def example_request(example: Example, settings: TrainingSettings) -> Request:
    """Returns the request that would generate such a clip, with the example's reference as its control."""
    controls: tuple[Control, ...] = ()
    if settings.references == FILES:
        assert example.reference is not None
        controls = (Control(str(example.reference), frame_range=_frame_range(example)),)
    elif settings.references == CANNY:
        controls = (Control(str(example.media), kind=CANNY, frame_range=_frame_range(example)),)
    return Request(
        prompt=example.caption,
        size=settings.size,
        frames=example.frames,
        fps=None if example.fps is None else float(example.fps),
        controls=controls,
        multi_scale=False,
    )


def _frame_range(example: Example) -> tuple[int, int] | None:
    return None if example.fps is None else (0, example.frames)


def _encode_captions(
    engine: Engine, examples: Sequence[Example], settings: TrainingSettings, watch: Watch
) -> list[Tensor]:
    request = example_request(examples[0], settings)
    captions = [example.caption for example in examples]
    return [embeds.float() for embeds in engine.encode_prompts(request, captions, watch=watch)]


def _encode_latents(engine: Engine, example: Example, settings: TrainingSettings) -> dict[str, Tensor]:
    """Encodes the clip, and its reference, as controls are encoded.

    As a condition the clip would be blurred, and resized without antialiasing: a LoRA would learn both.
    """
    request = example_request(example, settings)
    clip = Control(str(example.media), frame_range=_frame_range(example))
    media = engine.encode_media(replace(request, controls=(clip, *request.controls)))
    return dict(zip(("latents", "reference"), media.reference_latents, strict=False))


def _cached_example(engine: Engine, example: Example, file: Path, settings: TrainingSettings) -> CachedExample:
    fps = engine.resolve(example_request(example, settings)).fps
    return CachedExample(example, file, fps, LatentGrid.for_video(settings.size.snap(), example.frames))


def _cache_key(engine: Engine, example: Example, settings: TrainingSettings) -> str:
    """Returns a file name that changes with everything that decides the encoded tensors."""
    inputs = {
        "version": EXAMPLE_CACHE_NUMBER,
        "request": example_request(example, settings).to_json(),
        "files": [_file_stamp(path) for path in (example.media, example.reference) if path is not None],
        "vae": _file_stamp(engine.spec.vae_checkpoint.path),
        "text_encoder": _file_stamp(engine.spec.text_encoder_checkpoint.tokenizer_root),
        "dtype": str(engine.spec.dtype),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def _file_stamp(path: Path) -> tuple[str, int, int]:
    """Returns path, size and modification time: they tell a file from another, or from itself after a change."""
    stat = Path(path).stat()
    return str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns
