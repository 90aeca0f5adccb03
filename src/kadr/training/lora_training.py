"""Trains a LoRA: from a folder of clips to a file that every engine of the family reads."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kadr.cancellation import CancelToken, cancellable
from kadr.checkpoints.lora.file import write_lora
from kadr.errors import KadrWarning, MediaError, NonFiniteError, RequestError
from kadr.media.writer import VideoWriter
from kadr.memory.device import move_module
from kadr.memory.mapped_files import release_pages
from kadr.models.transformer import Transformer
from kadr.pipeline.engine import Engine
from kadr.pipeline.longvideo.folder_lock import lock_folder
from kadr.pipeline.modules import TrainedTransformer
from kadr.pipeline.progress import StageProgress, Watch, ignore_progress
from kadr.planning.placement import AS_STORED, CONVERTED
from kadr.quant.convert import quantize_blocks
from kadr.request.inputs import Control
from kadr.request.request import Request
from kadr.sampling.noise import NoiseStreams
from kadr.training.dataset import Example, read_dataset
from kadr.training.example_cache import encode_examples, example_request
from kadr.training.memory_check import base_weight_format, needs_gradient_checkpointing
from kadr.training.settings import FILES, TrainingSettings
from kadr.training.trainable_lora import (
    add_lora_layers,
    collect_lora_weights,
    enable_gradient_checkpointing,
    target_layers,
)
from kadr.training.trainer import LoRATrainer
from kadr.training.training_log import TrainingLog
from kadr.training.training_state import EXAMPLES_KEY, check_state, load_state, save_state
from kadr.version import __version__

VALIDATION_FPS = 24  # frame rate that the size of validation videos is checked with


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training.

    Args:
        path: path of the LoRA.
        steps: optimizer steps done, in all.
        start_step: steps done by earlier runs.
        num_examples: number of examples.
        first_loss, last_loss: the validation loss before and after; the first is None where the log of the run that
            measured it is gone.
    """

    path: Path
    steps: int
    start_step: int
    num_examples: int
    first_loss: float | None
    last_loss: float


@dataclass(frozen=True)
class LoRATraining:
    """A training of a LoRA and everything it needs.

    Args:
        engine: engine of the base model, opened with `quant` for a quantized base, and without LoRAs.
        dataset_folder: folder of clips and captions.
        output: the .safetensors file to write.
        validation_prompts: prompts of the validation videos.
        validate_every: steps between validations, each of which writes videos and measures the validation loss.
        save_every: steps between saved states.
        skip_broken: see `read_dataset`.
    """

    engine: Engine
    dataset_folder: Path
    output: Path
    settings: TrainingSettings
    validation_prompts: Sequence[str] = ()
    validate_every: int = 250
    save_every: int = 100
    skip_broken: bool = False

    def __post_init__(self) -> None:
        for name in ("dataset_folder", "output"):
            object.__setattr__(self, name, Path(getattr(self, name)))

    @property
    def work_folder(self) -> Path:
        """Folder of the cache, the state, the log and the validation videos."""
        return self.output.with_suffix(".training")

    def run(self, watch: Watch = ignore_progress, *, cancel: CancelToken | None = None) -> TrainingResult:
        """Trains, or resumes where an earlier run ended.

        Args:
            watch: as for `Engine.generate`.
            cancel: cancels the training, from any thread. The steps that are done are saved first.

        Raises:
            MediaError: a clip or a folder cannot be used.
            PlanError: the training does not fit in memory.
            RequestError: a validation video cannot be generated, or another run trains in the work folder.
            CheckpointError: the work folder holds another training; or as `Engine.generate`.
            NonFiniteError: the loss is NaN or infinite.
            Cancelled: `cancel` was cancelled, or `watch` raised it.
        """
        with cancellable(cancel):
            return self._run(watch)

    def _run(self, watch: Watch) -> TrainingResult:
        self._check()
        settings = self.settings
        examples = read_dataset(
            self.dataset_folder, settings.frames, references=settings.references == FILES, skip_broken=self.skip_broken
        )
        gradient_checkpointing = needs_gradient_checkpointing(self.engine, settings, examples)
        self.engine.prepare(example_request(examples[0], settings))
        with lock_folder(self.work_folder):
            identity = self._identity(examples)
            check_state(self._state_path, identity, settings.steps)
            cached_examples = encode_examples(self.engine, examples, settings, self.work_folder / "cache", watch)
            null_text = self._null_text(examples, watch)
            self.engine.unload()
            module = _load_transformer(self.engine)
            layers = add_lora_layers(
                module,
                target_layers(module.config, settings.target_modules),
                settings.rank,
                NoiseStreams(settings.seed),
            )
            if gradient_checkpointing:
                enable_gradient_checkpointing(module.blocks)
            dtype, device = self.engine.spec.dtype, self.engine.spec.device
            trainer = LoRATrainer(module, layers, cached_examples, settings, dtype, device, null_text)
            return self._train(trainer, identity, watch)

    @property
    def _state_path(self) -> Path:
        return self.work_folder / "state.safetensors"

    def _check(self) -> None:
        if self.engine.spec.loras:
            raise RequestError(
                "the model was opened with LoRAs, and the new one would be trained on top. Open it without LoRAs."
            )
        if self.output.suffix != ".safetensors":
            raise MediaError(f"{self.output} does not end in .safetensors. Name it {self.output.stem}.safetensors.")
        if not self.output.parent.is_dir() or not os.access(self.output.parent, os.W_OK):
            raise MediaError(f"the folder {self.output.parent} does not exist or cannot be written. Choose another.")
        if self.output.exists() and not self._state_path.is_file():
            raise MediaError(
                f"{self.output} already exists, and no training that can be resumed has written it. Choose another "
                "--output, or move the file away."
            )
        for number, prompt in enumerate(self.validation_prompts, 1):
            self.engine.resolve(self._validation_request(prompt, number, self.settings.frames, None))
        if self.validation_prompts:
            # Refuses sizes that it cannot write.
            VideoWriter(self.output.with_suffix(".mp4"), self.settings.size, VALIDATION_FPS)

    def _null_text(self, examples: Sequence[Example], watch: Watch) -> Tensor | None:
        if not self.settings.caption_dropout_p:
            return None
        request = example_request(examples[0], self.settings)
        return self.engine.encode_prompts(request, [""], watch=watch)[0].float()

    def _identity(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Returns what must be the same for a training to resume."""
        spec = self.engine.spec
        return {
            **self.settings.to_json(),
            "model": str(Path(spec.checkpoint.path).absolute()),
            "vae": str(Path(spec.vae_checkpoint.path).absolute()),
            "text_encoder": str(Path(spec.text_encoder_checkpoint.tokenizer_root).absolute()),
            "quant": spec.quant,
            "dtype": str(spec.dtype).removeprefix("torch."),
            EXAMPLES_KEY: {example.media.name: example.content_hash() for example in examples},
        }

    def _train(self, trainer: LoRATrainer, identity: Mapping[str, Any], watch: Watch) -> TrainingResult:
        settings = self.settings
        start = trainer.steps_done = load_state(self._state_path, trainer.lora_layers, trainer.optimizer)
        log = TrainingLog(self.work_folder / "log.csv", start)
        first_loss = trainer.validation_loss() if start == 0 else log.first_validation_loss
        stage, began = StageProgress("train", settings.steps, watch, start), time.monotonic()
        if start == 0:
            log.add(0, validation_loss=first_loss)
        last_loss = None
        with self._save_on_error(trainer, identity):
            for done in range(start + 1, settings.steps + 1):
                loss = trainer.step(done - 1)
                _require_finite(loss, done, self.work_folder)
                is_last, validates = done == settings.steps, done % self.validate_every == 0
                if is_last or done % self.save_every == 0:
                    save_state(self._state_path, done, trainer.lora_layers, trainer.optimizer, identity)
                last_loss = trainer.validation_loss() if is_last or validates else None
                log.add(done, loss=loss, validation_loss=last_loss, seconds=time.monotonic() - began)
                stage.report(done - start)
                if validates or is_last:
                    self._export(trainer, done, self._snapshot_path(done))
                if validates and not is_last:
                    self._write_validation_videos(trainer, done)
        last_loss = trainer.validation_loss() if last_loss is None else last_loss
        self._export(trainer, settings.steps, self.output)
        if start < settings.steps:
            self._write_validation_videos(trainer, settings.steps)
        _warn_if_loss_rose(first_loss, last_loss)
        return TrainingResult(self.output, settings.steps, start, len(trainer.examples), first_loss, last_loss)

    @contextmanager
    def _save_on_error(self, trainer: LoRATrainer, identity: Mapping[str, Any]) -> Iterator[None]:
        """Saves the steps that are done when anything ends the block early, Ctrl-C included."""
        start = trainer.steps_done
        try:
            yield
        except BaseException as error:
            if trainer.is_consistent and trainer.steps_done > start and not isinstance(error, NonFiniteError):
                save_state(self._state_path, trainer.steps_done, trainer.lora_layers, trainer.optimizer, identity)
            raise

    def _export(self, trainer: LoRATrainer, steps: int, path: Path) -> None:
        settings = self.settings
        metadata = {
            "kadr": __version__,
            "kadr_base_model": self.engine.spec.name,
            "kadr_steps": str(steps),
            "kadr_settings": json.dumps(settings.to_json()),
            **({"reference_downscale_factor": "1"} if settings.is_in_context else {}),
        }
        write_lora(path, collect_lora_weights(trainer.lora_layers), dtype=torch.bfloat16, metadata=metadata)

    def _snapshot_path(self, step: int) -> Path:
        """Returns the path of the LoRA as of a step."""
        return self.work_folder / f"step-{step:06d}.safetensors"

    def _validation_request(self, prompt: str, seed: int, frames: int, example: Example | None) -> Request:
        """Returns the request for a validation video; for an in-context LoRA, it follows an example's reference."""
        controls: tuple[Control, ...] = ()
        fps = None
        if example is not None:
            controls = example_request(example, self.settings).controls
            fps = None if example.fps is None else float(example.fps)
        return Request(
            prompt=prompt,
            size=self.settings.size,
            frames=frames,
            fps=fps,
            seed=seed,
            controls=controls,
            multi_scale=False,
        )

    def _write_validation_videos(self, trainer: LoRATrainer, step: int) -> None:
        """Writes a video of each validation prompt with the LoRA as of now."""
        for number, prompt in enumerate(self.validation_prompts, 1):
            example = trainer.examples[(number - 1) % len(trainer.examples)].example
            request = self._validation_request(prompt, number, example.frames, example)
            transformer = TrainedTransformer(trainer.transformer, self._snapshot_path(step))
            self.engine.write(request, self.work_folder / f"step-{step:06d}-{number}.mp4", transformer=transformer)


def _load_transformer(engine: Engine) -> Transformer:
    """Loads the transformer on its device in the requested weight format, not prepacked for any kernel."""
    spec, weight_format = engine.spec, base_weight_format(engine)
    module = engine.load_transformer(keep_storage_dtype=weight_format == AS_STORED)
    if weight_format not in (AS_STORED, CONVERTED):
        quantize_blocks(module, weight_format, device=spec.device, release=release_pages)
    return move_module(module, spec.device)


def _warn_if_loss_rose(first_loss: float | None, last_loss: float) -> None:
    if first_loss is not None and last_loss > first_loss:
        warnings.warn(
            f"the validation loss rose from {first_loss:.4f} to {last_loss:.4f}: the LoRA has learned nothing. Try a "
            "lower --learning-rate and another --output.",
            KadrWarning,
            stacklevel=3,
        )


def _require_finite(loss: float, step: int, work_folder: Path) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the loss is {loss} at step {step}. {work_folder} keeps the last saved state. Train again with a lower "
            "--learning-rate and another --output.",
            stage="train",
        )
