"""A training from a folder of clips to a file that every engine of the family reads."""

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

from kadr.checkpoints.lora.file import write_lora
from kadr.checkpoints.memory_map import release_pages
from kadr.errors import KadrWarning, MediaError, NonFiniteError, RequestError
from kadr.media.writer import VideoWriter
from kadr.models.transformer import Transformer
from kadr.pipeline.engine import Engine
from kadr.pipeline.longvideo.folder_lock import lock_folder
from kadr.pipeline.progress import StageProgress, Watch, ignore_progress
from kadr.planning.plan import AS_STORED, CONVERTED
from kadr.quant.convert import quantize_blocks
from kadr.request.inputs import Control
from kadr.request.request import Request
from kadr.sampling.noise import NoiseStreams
from kadr.training.dataset import Example, read_folder
from kadr.training.example_cache import encoded, request_of
from kadr.training.memory_check import hold_of, must_recompute
from kadr.training.settings import FILES, TrainingSettings
from kadr.training.trainable_lora import learn, learned, recompute, target_layers
from kadr.training.trainer import Trainer
from kadr.training.training_log import Log
from kadr.training.training_state import CLIPS, check_state, load_state, save_state
from kadr.version import __version__

RATE = 24  # of a clip that is made on the way, as far as its size is checked


@dataclass(frozen=True)
class Trained:
    """What a training made.

    Args:
        path: of the LoRA.
        steps: done, in all.
        begun: of these, done by earlier runs.
        examples: it learned from.
        first, last: the loss over fixed examples and levels, before and after; the first is None where the log of the
            run that measured it is gone.
    """

    path: Path
    steps: int
    begun: int
    examples: int
    first: float | None
    last: float


@dataclass(frozen=True)
class Training:
    """A training, with all that it needs named.

    Args:
        engine: of the model that is trained, opened with `quant` for a base in fewer bits; without LoRAs of its own.
        folder: of clips and captions.
        output: the .safetensors to write.
        prompts: of clips that are made on the way.
        every: steps after which they are made and the loss is measured.
        save_every: steps after which the state is saved.
        skip_broken: see `read_folder`.
    """

    engine: Engine
    folder: Path
    output: Path
    settings: TrainingSettings
    prompts: Sequence[str] = ()
    every: int = 250
    save_every: int = 100
    skip_broken: bool = False

    def __post_init__(self) -> None:
        for name in ("folder", "output"):
            object.__setattr__(self, name, Path(getattr(self, name)))

    @property
    def work(self) -> Path:
        """Where the cache, the state, the log and the clips made on the way are."""
        return self.output.with_suffix(".training")

    def run(self, watch: Watch = ignore_progress) -> Trained:
        """Train, or go on where it ended.

        Raises:
            MediaError: a clip or a folder cannot be used.
            PlanError: it does not fit in memory.
            RequestError: something cannot be made that is to be made on the way, or another run trains there.
            CheckpointError: the work folder holds another training; or as `Engine.generate`.
            NonFiniteError: the loss is NaN or infinite.
        """
        self._check()
        settings = self.settings
        found = read_folder(
            self.folder, settings.frames, references=settings.references == FILES, skip_broken=self.skip_broken
        )
        recomputed = must_recompute(self.engine, settings, found)
        with lock_folder(self.work):
            told = self._told(found)
            check_state(self._state, told, settings.steps)
            examples = encoded(self.engine, found, settings, self.work / "cache", watch)
            wordless = self._wordless(found, watch)
            self.engine.components.module_cache.clear()
            module = self._loaded()
            layers = learn(
                module, target_layers(module.config, settings.targets), settings.rank, NoiseStreams(settings.seed)
            )
            if recomputed:
                recompute(module.blocks)
            components = self.engine.components
            trainer = Trainer(module, layers, examples, settings, components.dtype, components.device, wordless)
            return self._trained(trainer, told, watch)

    @property
    def _state(self) -> Path:
        return self.work / "state.safetensors"

    def _check(self) -> None:
        if self.engine.components.loras:
            raise RequestError(
                "the model is opened with LoRAs, and a new one would be learned on top. Open it without."
            )
        if self.output.suffix != ".safetensors":
            raise MediaError(f"{self.output} does not end in .safetensors. Name it {self.output.stem}.safetensors.")
        if not self.output.parent.is_dir() or not os.access(self.output.parent, os.W_OK):
            raise MediaError(f"the folder {self.output.parent} does not exist or cannot be written. Choose another.")
        if self.output.exists() and not self._state.is_file():
            raise MediaError(
                f"{self.output} is there, and is not of a training that goes on. Name another --output, or move it "
                "away."
            )
        for number, prompt in enumerate(self.prompts, 1):
            self.engine.resolve(self._validation(prompt, number, self.settings.frames, None))
        if self.prompts:
            VideoWriter(self.output.with_suffix(".mp4"), self.settings.size, RATE)  # refuses what it could not write

    def _wordless(self, examples: Sequence[Example], watch: Watch) -> Tensor | None:
        if not self.settings.caption_dropout:
            return None
        request = request_of(examples[0], self.settings)
        return self.engine.encode_prompts(request, [""], watch=watch)[0].float()

    def _loaded(self) -> Transformer:
        """The transformer on its device, its weights held as asked for, not in the order of any kernel."""
        components, hold = self.engine.components, hold_of(self.engine)
        module = components.load_transformer(0, components.dtype, as_stored=hold == AS_STORED)
        if hold not in (AS_STORED, CONVERTED):
            quantize_blocks(module, hold, device=components.device, release=release_pages)
        return module.to(components.device)

    def _told(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What a training goes on with, and no other."""
        components = self.engine.components
        return {
            **self.settings.to_json(),
            "model": str(Path(components.transformer_checkpoints[0].path).absolute()),
            "vae": str(Path(components.vae_checkpoint.path).absolute()),
            "text_encoder": str(Path(components.text_encoder_folder.tokenizer_root).absolute()),
            "quant": components.quant,
            "dtype": str(components.dtype).removeprefix("torch."),
            CLIPS: {example.media.name: example.mark() for example in examples},
        }

    def _trained(self, trainer: Trainer, told: Mapping[str, Any], watch: Watch) -> Trained:
        settings = self.settings
        start = trainer.done = load_state(self._state, trainer.layers, trainer.optimizer)
        log = Log(self.work / "log.csv", start)
        first = trainer.measure() if start == 0 else log.first
        stage, began = StageProgress("train", settings.steps, watch, start), time.monotonic()
        if start == 0:
            log.add(0, held=first)
        last = None
        with self._saved(trainer, told):
            for done in range(start + 1, settings.steps + 1):
                loss = trainer.step(done - 1)
                _require_finite(loss, done, self.work)
                ended, due = done == settings.steps, done % self.every == 0
                if ended or done % self.save_every == 0:
                    save_state(self._state, done, trainer.layers, trainer.optimizer, told)
                last = trainer.measure() if ended or due else None
                log.add(done, loss=loss, held=last, seconds=time.monotonic() - began)
                stage.report(done - start)
                if due or ended:
                    self._export(trainer, done, self._at(done))
                if due and not ended:
                    self._shown(trainer, done)
        last = trainer.measure() if last is None else last
        self._export(trainer, settings.steps, self.output)
        if start < settings.steps:
            self._shown(trainer, settings.steps)
        _warn_worse(first, last)
        return Trained(self.output, settings.steps, start, len(trainer.examples), first, last)

    @contextmanager
    def _saved(self, trainer: Trainer, told: Mapping[str, Any]) -> Iterator[None]:
        """Whatever ends the block, Ctrl-C among it, the steps that are done are not lost."""
        start = trainer.done
        try:
            yield
        except BaseException as error:
            if trainer.whole and trainer.done > start and not isinstance(error, NonFiniteError):
                save_state(self._state, trainer.done, trainer.layers, trainer.optimizer, told)
            raise

    def _export(self, trainer: Trainer, steps: int, path: Path) -> None:
        settings = self.settings
        metadata = {
            "kadr": __version__,
            "kadr_base_model": self.engine.model_name,
            "kadr_steps": str(steps),
            "kadr_settings": json.dumps(settings.to_json()),
            **({"reference_downscale_factor": "1"} if settings.in_context else {}),
        }
        write_lora(path, learned(trainer.layers), dtype=torch.bfloat16, metadata=metadata)

    def _at(self, step: int) -> Path:
        """The LoRA as it was at a step."""
        return self.work / f"step-{step:06d}.safetensors"

    def _validation(self, prompt: str, number: int, frames: int, example: Example | None) -> Request:
        """A clip that is made on the way; of an in-context LoRA, led by an example's reference."""
        controls: tuple[Control, ...] = ()
        fps = None
        if example is not None:
            controls = request_of(example, self.settings).controls
            fps = None if example.fps is None else float(example.fps)
        return Request(
            prompt=prompt,
            size=self.settings.size,
            frames=frames,
            fps=fps,
            seed=number,
            controls=controls,
            multi_scale=False,
        )

    def _shown(self, trainer: Trainer, step: int) -> None:
        """Make a clip of each prompt with what is learned by now."""
        for number, prompt in enumerate(self.prompts, 1):
            example = trainer.examples[(number - 1) % len(trainer.examples)].example
            request = self._validation(prompt, number, example.frames, example)
            with self.engine.components.override_transformer(trainer.module, self._at(step)):
                self.engine.write(request, self.work / f"step-{step:06d}-{number}.mp4")


def _warn_worse(first: float | None, last: float) -> None:
    if first is not None and last > first:
        warnings.warn(
            f"the loss over fixed clips and levels went up, from {first:.4f} to {last:.4f}: nothing was learned. Try a "
            "lower --rate and another --output.",
            KadrWarning,
            stacklevel=3,
        )


def _require_finite(loss: float, step: int, work: Path) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the loss is {loss} at step {step}. The last state that was saved is kept in {work}; go on with a lower "
            "--rate and another --output.",
            stage="train",
        )
