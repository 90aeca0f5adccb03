"""`kadr train-lora`: a LoRA from a folder of clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kadr.cli import run
from kadr.cli.flags import options, parse
from kadr.cli.terminal.errors import print_stderr, print_stdout
from kadr.cli.terminal.output import print_path
from kadr.cli.terminal.progress import show_progress
from kadr.errors import Cancelled, MediaError
from kadr.pipeline.display.progress_lines import format_duration

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine
    from kadr.training.lora_training import LoRATraining, TrainingResult

TRAIN_LORA_EPILOG = (
    "Run the same command again to resume an interrupted training. Encoded examples, the log and validation clips are "
    "beside the output, in a folder that ends in .training."
)
_flag = options.flag
Folder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="Clips and images, with a caption beside each (.txt).", show_default=False),
]
Output = Annotated[Path, _flag("--output", "PATH", "The .safetensors to write. [default: lora.safetensors]")]
SizeFlag = Annotated[
    str | None, _flag("--size", "WxH", "Size that clips are cropped and resized to. [default: the recipe's]")
]
Frames = Annotated[int | None, _flag("--frames", "N", "Frames of each clip, 8k+1. [default: the recipe's]")]
Rank = Annotated[int, _flag("--rank", "N", "Rank of the LoRA. [default: 32]")]
TargetModules = Annotated[
    str,
    _flag(
        "--target-modules", "attention|attention+feed-forward|all", "The layers that are trained. [default: attention]"
    ),
]
Steps = Annotated[int, _flag("--steps", "N", "Optimizer steps; a finished training resumes with more. [default: 1000]")]
BatchSize = Annotated[int, _flag("--batch-size", "N", "Examples per step. [default: 1]")]
LearningRate = Annotated[float, _flag("--learning-rate", "X", "Learning rate of AdamW. [default: 0.0002]")]
SigmaSampling = Annotated[
    str, _flag("--sigma-sampling", "shifted-logit-normal|uniform", "How sigmas are drawn. [default: the first]")
]
FirstFrameConditioningP = Annotated[
    float, _flag("--first-frame-conditioning-p", "P", "Probability that the first frame is a condition. [default: 0.1]")
]
CaptionDropoutP = Annotated[
    float, _flag("--caption-dropout-p", "P", "Probability that a caption is dropped. [default: 0]")
]
References = Annotated[
    str,
    _flag(
        "--references", "off|files|canny", "Learn to follow NAME.reference.mp4 beside NAME.mp4, or the clip's edges."
    ),
]
ValidationPrompts = Annotated[
    list[str] | None,
    _flag("--validation-prompt", "PROMPT", "Make a validation clip of this prompt; may be given many times."),
]
ValidateEvery = Annotated[int, _flag("--validate-every", "N", "Steps between validations. [default: 250]")]
SaveEvery = Annotated[int, _flag("--save-every", "N", "Steps between saved states. [default: 100]")]
SkipBroken = Annotated[bool, _flag("--skip-broken", None, "Skip clips that cannot be used, with a warning.")]
Quant = Annotated[str, _flag("--quant", "none|int8|fp8|Q8_0|...", "Quantize the base weights.")]
Device = Annotated[str, _flag("--device", "auto|cpu|cuda|mps", "Device to compute on. [default: auto]")]
Dtype = Annotated[str, _flag("--dtype", "auto|bfloat16|float32", "Dtype to compute in. [default: auto]")]
Seed = Annotated[int, _flag("--seed", "N", "Seed of everything random. [default: 0]")]
TextEncoder = Annotated[
    Path | None, _flag("--text-encoder", "NAME|PATH", "T5 text encoder: a .safetensors, a .gguf or a folder.")
]
Vae = Annotated[Path | None, _flag("--vae", "NAME|PATH", "Take the VAE from this checkpoint.")]


def train_lora(
    folder: Folder,
    model: options.Model = None,
    release: options.Release = None,
    output: Output = Path("lora.safetensors"),
    size: SizeFlag = None,
    frames: Frames = None,
    rank: Rank = 32,
    target_modules: TargetModules = "attention",
    steps: Steps = 1000,
    batch_size: BatchSize = 1,
    learning_rate: LearningRate = 2e-4,
    sigma_sampling: SigmaSampling = "shifted-logit-normal",
    first_frame_conditioning_p: FirstFrameConditioningP = 0.1,
    caption_dropout_p: CaptionDropoutP = 0.0,
    references: References = "off",
    validation_prompts: ValidationPrompts = None,
    validate_every: ValidateEvery = 250,
    save_every: SaveEvery = 100,
    skip_broken: SkipBroken = False,
    quant: Quant = "none",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    text_encoder: TextEncoder = None,
    vae: Vae = None,
    models_dir: options.ModelsDir = None,
    json: options.Json = False,
) -> None:
    """Train a LoRA on your own clips.

    Each clip has a caption beside it: a text file of the same name. Prints the path of the LoRA.
    """
    if not folder.is_dir():
        raise MediaError(f"there is no folder {folder}. Give one with clips, and a caption beside each (.txt).")
    for name, value in (("--validate-every", validate_every), ("--save-every", save_every)):
        if value < 1:
            raise typer.BadParameter(f"{value} is below 1.", param_hint=name)
    engine_options: dict[str, Any] = {
        "release": release,
        "text_encoder": text_encoder,
        "vae": vae,
        "models_dirs": models_dir or (),
        **({} if quant == "none" else {"quant": quant}),
    }
    engine = run.open_engine(model or "demo", device=device, dtype=dtype, **engine_options)
    settings = {
        "rank": rank,
        "target_modules": target_modules,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "sigma_sampling": sigma_sampling,
        "first_frame_conditioning_p": first_frame_conditioning_p,
        "caption_dropout_p": caption_dropout_p,
        "references": references,
        "seed": seed,
    }
    training = _build_training(
        engine,
        folder,
        output,
        {"size": parse.size(size), "frames": frames, **settings},
        validation_prompts=tuple(validation_prompts or ()),
        validate_every=validate_every,
        save_every=save_every,
        skip_broken=skip_broken,
    )
    _run(training, as_json=json)


def _build_training(engine: Engine, folder: Path, output: Path, settings: dict[str, Any], **more: Any) -> LoRATraining:
    from kadr.training.lora_training import LoRATraining
    from kadr.training.settings import TrainingSettings

    size, frames = settings.pop("size") or engine.spec.recipe.size, settings.pop("frames")
    frames = engine.spec.recipe.frames if frames is None else frames
    return LoRATraining(engine, folder, output, TrainingSettings(size=size, frames=frames, **settings), **more)


def _run(training: LoRATraining, *, as_json: bool) -> None:
    import time

    start = time.monotonic()
    try:
        with show_progress() as watch:
            result = training.run(watch)
    except (KeyboardInterrupt, Cancelled):
        print_stderr(f"the training so far is in {training.work_folder}; run the same command again to resume it")
        raise
    _print_result(result, time.monotonic() - start, as_json=as_json)


def _print_result(result: TrainingResult, seconds: float, *, as_json: bool) -> None:
    resumed = f" ({result.start_step} of them in earlier runs)" if result.start_step else ""
    clips = "clip" if result.num_examples == 1 else "clips"
    first = "" if result.first_loss is None else f"from {result.first_loss:.4f} "
    print_stderr(
        f"{result.steps} steps{resumed} on {result.num_examples} {clips}, in {format_duration(seconds)}; over fixed "
        f"examples and sigmas the loss went {first}to {result.last_loss:.4f}"
    )
    report = {
        "path": str(result.path),
        "steps": result.steps,
        "start_step": result.start_step,
        "num_examples": result.num_examples,
        "first_loss": result.first_loss,
        "last_loss": result.last_loss,
        "seconds": round(seconds, 3),
    }
    outcome = f"the LoRA is written to {result.path}, but its path could not be printed:"
    if as_json:
        print_stdout(json.dumps(report), outcome=outcome)
    else:
        print_path(result.path, outcome=outcome)
