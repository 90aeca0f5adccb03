"""The flags, one line each: what a verb takes is the list of its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _flag(name: str, metavar: str | None, help: str) -> Any:
    return typer.Option(name, metavar=metavar, help=help, show_default=False)


Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to show, in quotes.", show_default=False)]

# the model
Model = Annotated[
    str | None, _flag("--model", "NAME|PATH", "A name of `kadr models`, a .safetensors or a diffusers folder.")
]
TextEncoder = Annotated[Path | None, _flag("--text-encoder", "PATH", "Folder of the T5 encoder and its tokenizer.")]
Vae = Annotated[Path | None, _flag("--vae", "PATH", "Take the VAE from this checkpoint.")]
Device = Annotated[str, _flag("--device", "auto|cpu|cuda|mps", "Where to compute; auto takes the fastest there is.")]
SameDevice = Annotated[str | None, _flag("--device", "auto|cpu|cuda|mps", "Where to compute, if not as it was made.")]
Dtype = Annotated[str, _flag("--dtype", "auto|bfloat16|float32", "Numbers to compute with; auto suits the device.")]

# the video
SizeText = Annotated[str | None, _flag("--size", "WxH", "Width and height in pixels, such as 704x480.")]
Frames = Annotated[int | None, _flag("--frames", "N", "How many frames.")]
Seconds = Annotated[float | None, _flag("--seconds", "S", "How long, instead of --frames.")]
Fps = Annotated[float | None, _flag("--fps", "N", "Frames per second; the model makes the motion for it.")]
Seed = Annotated[int, _flag("--seed", "N", "The same seed gives the same noise on every device. [default: 0]")]
NewSeed = Annotated[int | None, _flag("--seed", "N", "Another seed than the video was made with.")]
Negative = Annotated[str | None, _flag("--negative-prompt", "TEXT", "What to guide away from.")]

# denoising
Steps = Annotated[int | None, _flag("--steps", "N", "Steps of denoising.")]
Levels = Annotated[str | None, _flag("--levels", "1.0,0.9,...", "The noise levels themselves, instead of --steps.")]
SkipInitial = Annotated[int, _flag("--skip-initial", "N", "Leave out the first N noise levels.")]
SkipFinal = Annotated[int, _flag("--skip-final", "N", "Leave out the last N noise levels.")]
Guidance = Annotated[float | None, _flag("--guidance", "X", "How far to go beyond the prompt; 1 is off.")]
GuidanceBatch = Annotated[
    bool, _flag("--guidance-batch", None, "Evaluate with and without prompt at once: faster, more memory.")
]
Stochastic = Annotated[
    bool | None, _flag("--stochastic/--no-stochastic", None, "Fresh noise at every step, as some models were made for.")
]

# pictures
Image = Annotated[
    list[str] | None,
    _flag("--image", "PATH [FRAME [STRENGTH]]", "A picture to show; at frame 0 with strength 1.0 if not said."),
]
ImageNoise = Annotated[
    float | None, _flag("--image-noise", "X", "Noise on pictures at each step, times level squared.")
]
ImageCrf = Annotated[
    int | None, _flag("--image-crf", "N", "H.264 quality that pictures are passed through first; 0 is off.")
]

# decoding
DecodeTimestep = Annotated[float | None, _flag("--decode-timestep", "X", "The noise level that the decoder is told.")]
DecodeNoise = Annotated[float | None, _flag("--decode-noise", "X", "Share of noise mixed in before decoding.")]

# what comes out
Output = Annotated[Path | None, _flag("--output", "PATH", "The .mp4 to write or replace; else out.mp4, out-2.mp4, ...")]
Again = Annotated[Path | None, _flag("--output", "PATH", "The .mp4 to write or replace; else a new name beside FILE.")]
SaveLatents = Annotated[
    Path | None, _flag("--save-latents", "PATH", "Also write the latents, before decoding, as .safetensors.")
]
Json = Annotated[bool, _flag("--json", None, "Print one JSON object instead.")]
