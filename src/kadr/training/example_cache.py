"""Examples as the network sees them: encoded once, and kept in a folder that later trainings find again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from kadr.checkpoints.save import write_tensors
from kadr.errors import CheckpointError, MediaError
from kadr.pipeline.progress import StageProgress, Watch
from kadr.request.inputs import Control
from kadr.request.request import Request
from kadr.shapes import LatentGrid
from kadr.training.dataset import Example
from kadr.training.settings import CANNY, FILES, TrainingSettings

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine

CACHE_VERSION = 2  # of what a file holds


@dataclass(frozen=True)
class CachedExample:
    """An example on disk.

    Args:
        file: with "latents" (1, C, f, h, w), normalised, "text" (n, D), and "reference" as the latents where there is
            one; fp32.
        fps: that its positions are made with.
        grid: of the latents.
    """

    example: Example
    file: Path
    fps: float
    grid: LatentGrid

    def load_tensors(self) -> dict[str, Tensor]:
        """The tensors.

        Raises:
            CheckpointError: the file went away, or was changed.
        """
        try:
            return load_file(self.file)
        except Exception as error:  # safetensors has one of its own, the system others
            raise CheckpointError(
                f"{self.file} cannot be read: {error}. Remove it; it is made again when the training goes on."
            ) from error


def encode_examples(
    engine: Engine, examples: Sequence[Example], settings: TrainingSettings, folder: Path, watch: Watch
) -> list[CachedExample]:
    """The examples through the VAE and the text encoder, those that are not there yet.

    Raises:
        MediaError: the folder cannot be written, or a clip cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"{folder} cannot be made: {error.strerror or error}. Give another --output.") from error
    files = [folder / f"{_cache_key(engine, example, settings)}.safetensors" for example in examples]
    absent = [(example, file) for example, file in zip(examples, files, strict=True) if not file.is_file()]
    if absent:
        texts = _encode_captions(engine, [example for example, _ in absent], settings, watch)
        stage = StageProgress("encode", len(absent), watch)
        for done, ((example, file), text) in enumerate(zip(absent, texts, strict=True), 1):
            write_tensors(file, {"text": text, **_encode_latents(engine, example, settings)}, dtype=torch.float32)
            stage.report(done)
    return [_cached_example(engine, *pair, settings) for pair in zip(examples, files, strict=True)]


def example_request(example: Example, settings: TrainingSettings) -> Request:
    """What a generation would be asked to make such a clip, with its reference."""
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
    return [rows.float() for rows in engine.encode_prompts(request, [one.caption for one in examples], watch=watch)]


def _encode_latents(engine: Engine, example: Example, settings: TrainingSettings) -> dict[str, Tensor]:
    """The clip goes to the encoder as references do. As a condition it would be blurred, and made smaller without
    regard to what lies between the pixels: a LoRA would learn that."""
    request = example_request(example, settings)
    own = Control(str(example.media), frame_range=_frame_range(example))
    media = engine.encode_media(replace(request, controls=(own, *request.controls)))
    return dict(zip(("latents", "reference"), media.reference_latents, strict=False))


def _cached_example(engine: Engine, example: Example, file: Path, settings: TrainingSettings) -> CachedExample:
    request = engine.resolve(example_request(example, settings))
    assert request.fps is not None
    grid = LatentGrid.for_video(settings.size.snap(), example.frames)
    return CachedExample(example, file, float(request.fps), grid)


def _cache_key(engine: Engine, example: Example, settings: TrainingSettings) -> str:
    """A name that changes with all that decides what is encoded."""
    told = {
        "version": CACHE_VERSION,
        "request": example_request(example, settings).to_json(),
        "files": [_file_stamp(path) for path in (example.media, example.reference) if path is not None],
        "vae": _file_stamp(engine.components.vae_checkpoint.path),
        "text": _file_stamp(engine.components.text_encoder_folder.tokenizer_root),
        "dtype": str(engine.components.dtype),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def _file_stamp(path: Path) -> tuple[str, int, int]:
    """What tells a file from another, or from itself after a change."""
    state = Path(path).stat()
    return str(Path(path).resolve()), state.st_size, state.st_mtime_ns
