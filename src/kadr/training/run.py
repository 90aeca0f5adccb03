"""A training from a folder of clips to a file that every engine of the family reads."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kadr.checkpoints.lora import write_lora
from kadr.errors import MediaError, NonFiniteError, PlanError, RequestError
from kadr.memory.device import free_bytes
from kadr.memory.plan import AS_STORED, CONVERTED
from kadr.memory.training import TrainingBytes, training_bytes
from kadr.models.transformer import Transformer
from kadr.pipeline.engine import Engine
from kadr.pipeline.holding import is_quantized, weigh
from kadr.pipeline.progress import Stage, Watch, ignore
from kadr.pipeline.request import Control, Request
from kadr.quant.apply import requantize
from kadr.quant.scheme import AUTO, NONE
from kadr.sampling.noise import NoiseStreams
from kadr.shapes import LatentGrid
from kadr.training.cache import encoded, request_of
from kadr.training.dataset import Example, read_folder
from kadr.training.low_rank import learn, learned, recompute, target_layers
from kadr.training.settings import FILES, TrainingSettings
from kadr.training.state import load_state, save_state
from kadr.training.trainer import Trainer
from kadr.version import __version__

ROOMY = 0.7  # of the memory that is free, up to which nothing is computed twice


@dataclass(frozen=True)
class Trained:
    """What a training made.

    Args:
        path: of the LoRA.
        steps: done, in all.
        examples: it learned from.
        first, last: the loss over fixed examples and levels, before and after.
    """

    path: Path
    steps: int
    examples: int
    first: float
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

    @property
    def work(self) -> Path:
        """Where the cache, the state, the log and the clips made on the way are."""
        return self.output.with_suffix(".training")

    def run(self, watch: Watch = ignore) -> Trained:
        """Train, or go on where it ended.

        Raises:
            MediaError: a clip or a folder cannot be used.
            PlanError: it does not fit in memory.
            CheckpointError: the work folder holds another training; or as `Engine.generate`.
            NonFiniteError: the loss is NaN or infinite.
        """
        self._check()
        settings = self.settings
        found = read_folder(
            self.folder, settings.frames, references=settings.references == FILES, skip_broken=self.skip_broken
        )
        recomputed = self._recomputed(found)
        examples = encoded(self.engine, found, settings, self.work / "cache", watch)
        wordless = self._wordless(found, watch)
        self.engine.components.shelf.clear()
        module = self._loaded()
        layers = learn(module, self._targets(), settings.rank, NoiseStreams(settings.seed))
        if recomputed:
            recompute(module.layers)
        components = self.engine.components
        trainer = Trainer(module, layers, examples, settings, components.dtype, components.device, wordless)
        return self._trained(trainer, watch)

    def bytes(self, examples: Sequence[Example], *, recomputed: bool) -> TrainingBytes:
        """What the training takes, at its largest example. recomputed: see `training_bytes`."""
        components, settings = self.engine.components, self.settings
        weights = weigh(components.transformers[0].sources["transformer"], components.dtype, self._hold)
        grid = LatentGrid.of(settings.size.snapped(), max(example.frames for example in examples))
        parameters = sum(settings.rank * (inputs + outputs) for inputs, outputs in self._targets().values())
        return training_bytes(
            components.config(0),
            weights=weights.mapped + weights.own + weights.scratch,
            parameters=parameters,
            tokens=grid.tokens * (2 if settings.in_context else 1),
            batch=settings.batch,
            size=components.dtype.itemsize,
            recomputed=recomputed,
        )

    def _check(self) -> None:
        if self.engine.components.loras:
            raise RequestError(
                "the model is opened with LoRAs, and a new one would be learned on top. Open it without."
            )
        if self.output.suffix != ".safetensors":
            raise MediaError(f"{self.output} does not end in .safetensors. Name it {self.output.stem}.safetensors.")
        if not self.output.parent.is_dir() or not os.access(self.output.parent, os.W_OK):
            raise MediaError(f"the folder {self.output.parent} does not exist or cannot be written. Choose another.")

    def _recomputed(self, examples: Sequence[Example]) -> bool:
        """Whether layers are computed twice, because what they keep would not fit.

        Raises:
            PlanError: it does not fit then either.
        """
        free = free_bytes(self.engine.components.device)
        if self.bytes(examples, recomputed=False).total <= ROOMY * free:
            return False
        needed = self.bytes(examples, recomputed=True)
        if needed.total > free:
            raise PlanError(
                f"training takes about {needed.total / 1e9:.1f} GB ({needed.weights / 1e9:.1f} of weights, "
                f"{needed.learned / 1e9:.1f} of what learns, {needed.activations / 1e9:.1f} at work), and "
                f"{free / 1e9:.1f} are free on {self.engine.components.device}. Take a smaller --size or fewer "
                "--frames, or hold the weights in 8 bits with --quant int8.",
                shortfall=needed.total - free,
            )
        return True

    def _targets(self) -> dict[str, tuple[int, int]]:
        return target_layers(self.engine.components.config(0), self.settings.targets)

    def _wordless(self, examples: Sequence[Example], watch: Watch) -> Tensor | None:
        if not self.settings.caption_dropout:
            return None
        request = request_of(examples[0], self.settings)
        return self.engine.encode_prompts(request, [""], watch=watch)[0].float()

    @property
    def _hold(self) -> str:
        """How the transformer's weights are held; see `memory.plan.Choice`."""
        components = self.engine.components
        if is_quantized(components.transformers[0].sources["transformer"]):
            return AS_STORED
        return CONVERTED if components.quant in (NONE, AUTO) else components.quant

    def _loaded(self) -> Transformer:
        """The transformer on its device, its weights held as asked for, not in the order of any kernel."""
        components, hold = self.engine.components, self._hold
        module = components.load_transformer(0, components.dtype, as_stored=hold == AS_STORED)
        if hold not in (AS_STORED, CONVERTED):
            requantize(module, hold, device=components.device)
        return module.to(components.device)

    def _told(self) -> dict[str, Any]:
        """What a training goes on with, and no other."""
        model = self.engine.components.transformers[0].path
        quant = self.engine.components.quant
        return {**self.settings.to_json(), "model": str(Path(model).absolute()), "quant": quant}

    def _trained(self, trainer: Trainer, watch: Watch) -> Trained:
        settings, state, told = self.settings, self.work / "state.safetensors", self._told()
        start = trainer.done = load_state(state, trainer.layers, trainer.optimizer, told)
        log = Log(self.work / "log.csv", start)
        first = trainer.measure() if start == 0 else log.first()
        stage, began, last = Stage("train", settings.steps, watch), time.monotonic(), first
        if start == 0:
            log.add(0, held=first)
        with self._saved(trainer, state, told):
            for done in range(start + 1, settings.steps + 1):
                loss = trainer.step(done - 1)
                _require_finite(loss, done, self.work)
                ended, due = done == settings.steps, done % self.every == 0
                if ended or done % self.save_every == 0:
                    save_state(state, done, trainer.layers, trainer.optimizer, told)
                if ended or due:
                    last = trainer.measure()
                    self._shown(trainer, done)
                log.add(done, loss=loss, held=last if ended or due else None, seconds=time.monotonic() - began)
                stage.done(done)
        if start >= settings.steps:
            last = trainer.measure()
        self._export(trainer, max(start, settings.steps))
        return Trained(self.output, max(start, settings.steps), len(trainer.examples), first, last)

    @contextmanager
    def _saved(self, trainer: Trainer, state: Path, told: Mapping[str, Any]) -> Iterator[None]:
        """Whatever ends the block, Ctrl-C among it, the steps that are done are not lost."""
        start = trainer.done
        try:
            yield
        except BaseException as error:
            if trainer.whole and trainer.done > start and not isinstance(error, NonFiniteError):
                save_state(state, trainer.done, trainer.layers, trainer.optimizer, told)
            raise

    def _export(self, trainer: Trainer, steps: int) -> None:
        settings = self.settings
        metadata = {
            "kadr": __version__,
            "kadr_base_model": self.engine.name,
            "kadr_steps": str(steps),
            "kadr_settings": json.dumps(settings.to_json()),
            **({"reference_downscale_factor": "1"} if settings.in_context else {}),
        }
        write_lora(self.output, learned(trainer.layers), dtype=torch.bfloat16, metadata=metadata)

    def _shown(self, trainer: Trainer, step: int) -> None:
        """Make a clip of each prompt with what is learned by now."""
        for number, prompt in enumerate(self.prompts, 1):
            example = trainer.examples[(number - 1) % len(trainer.examples)].example
            controls: tuple[Control, ...] = request_of(example, self.settings).controls
            request = Request(
                prompt=prompt,
                size=self.settings.size,
                frames=example.frames,
                fps=None if example.fps is None else float(example.fps),
                seed=number,
                controls=controls,
                multi_scale=False,
            )
            with self.engine.components.lending(trainer.module):
                self.engine.write(request, self.work / f"step-{step:06d}-{number}.mp4")


def _require_finite(loss: float, step: int, work: Path) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the loss is {loss} at step {step}. The last state that was saved is kept in {work}; go on with a lower "
            "--rate and another --output.",
            stage="train",
        )


class Log:
    """A line of log.csv for each step; those of steps that will be done again are dropped."""

    NAMES = ("step", "loss", "held", "seconds")

    def __init__(self, path: Path, start: int) -> None:
        self.path, self.rows = path, list[Mapping[str, str]]()
        if start and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.NAMES)
            writer.writeheader()
            writer.writerows(self.rows)

    def first(self) -> float:
        """The first loss that was measured."""
        return next((float(row["held"]) for row in self.rows if row["held"]), float("nan"))

    def add(self, step: int, **values: float | None) -> None:
        told = {name: "" if values.get(name) is None else f"{values[name]:.6g}" for name in self.NAMES[1:]}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.NAMES).writerow({"step": step, **told})
