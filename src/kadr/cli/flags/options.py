"""The flags, one entry each. What a verb takes is the list of its parameters; `generate` takes them in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


def flag(name: str, metavar: str | None, help: str) -> Any:
    return typer.Option(name, metavar=metavar, help=help, show_default=False)


# What several verbs take, or others than `generate`.
Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to show, in quotes.", show_default=False)]
Model = Annotated[
    str | None, flag("--model", "NAME|PATH", "A name of `kadr models`, a .safetensors, a .gguf or a diffusers folder.")
]
RerunDevice = Annotated[str | None, flag("--device", "auto|cpu|cuda|mps", "Where to compute, if not as it was made.")]
RerunSeed = Annotated[int | None, flag("--seed", "N", "Another seed than the video was made with.")]
RerunOutput = Annotated[
    Path | None, flag("--output", "PATH", "The .mp4 to write or replace; else a new name beside FILE.")
]
Resume = Annotated[
    bool, flag("--resume", None, "Go on with a long video that was cut off: its finished windows are beside it.")
]
Json = Annotated[bool, flag("--json", None, "Print one JSON object instead.")]

_Float = float | None
_Int = int | None
_Text = str | None
_Switch = bool | None


@dataclass(frozen=True)
class VideoFlags:
    """The video"""

    size: Annotated[_Text, flag("--size", "WxH", "Width and height in pixels, such as 704x480.")] = None
    frames: Annotated[_Int, flag("--frames", "N", "How many frames.")] = None
    seconds: Annotated[_Float, flag("--seconds", "S", "How long, instead of --frames.")] = None
    fps: Annotated[_Float, flag("--fps", "N", "Frames per second; the model makes the motion for it.")] = None
    seed: Annotated[int, flag("--seed", "N", "The same seed gives the same noise on every device. [default: 0]")] = 0
    negative_prompt: Annotated[_Text, flag("--negative-prompt", "TEXT", "What to guide away from.")] = None


@dataclass(frozen=True)
class EnhanceFlags:
    """Prompt enhancement"""

    enhance: Annotated[
        _Text, flag("--enhance", "URL", "Have a chat model write the prompt out: an OpenAI-compatible endpoint.")
    ] = None
    enhance_model: Annotated[
        _Text, flag("--enhance-model", "NAME", "The model's name there. Its key is taken from KADR_ENHANCE_KEY.")
    ] = None
    enhance_required: Annotated[
        bool, flag("--enhance-required", None, "Stop where the endpoint fails, instead of using your own words.")
    ] = False
    enhance_timeout: Annotated[
        _Float, flag("--enhance-timeout", "S", "Seconds to wait for an answer. [default: 60]")
    ] = None


@dataclass(frozen=True)
class WindowFlags:
    """Long videos; any of these, or several --prompt, makes the video window by window"""

    window: Annotated[_Int, flag("--window", "N", "Frames of a window; left out, as many as the model is good at.")] = (
        None
    )
    overlap: Annotated[
        _Int, flag("--overlap", "N", "Frames that a window has in common with the one before, a multiple of 8.")
    ] = None
    overlap_strength: Annotated[
        _Float, flag("--overlap-strength", "S", "How firmly a window is held to the end of the one before, up to 1.")
    ] = None
    adain: Annotated[
        _Float, flag("--adain", "A", "How far each window's colours are moved to those of the first, 0 to 1.")
    ] = None
    anchor_strength: Annotated[
        _Float, flag("--anchor-strength", "S", "How firmly every window is shown the picture at frame 0; 0 does not.")
    ] = None


@dataclass(frozen=True)
class OutputFlags:
    """What comes out"""

    output: Annotated[
        Path | None, flag("--output", "PATH", "The .mp4 to write or replace; else out.mp4, out-2.mp4, ...")
    ] = None
    resume: Resume = False
    json: Json = False
    dry_run: Annotated[bool, flag("--dry-run", None, "Print what would be done, step by step; make nothing.")] = False
    save_latents: Annotated[
        Path | None, flag("--save-latents", "PATH", "Also write the latents, before decoding, as .safetensors.")
    ] = None


@dataclass(frozen=True)
class ModelFlags:
    """The model"""

    model: Model = None
    config: Annotated[
        Path | None, flag("--config", "FILE.yaml", "Take model and recipe from an official pipeline config.")
    ] = None
    upscaler: Annotated[
        list[str] | None, flag("--upscaler", "NAME|PATH", "Latent upscaler for two passes; may be given twice.")
    ] = None
    second_model: Annotated[_Text, flag("--second-model", "NAME|PATH", "Another model for the second pass.")] = None
    text_encoder: Annotated[
        Path | None, flag("--text-encoder", "NAME|PATH", "Folder of the T5 encoder and its tokenizer, or a .gguf.")
    ] = None
    vae: Annotated[Path | None, flag("--vae", "NAME|PATH", "Take the VAE from this checkpoint.")] = None
    lora: Annotated[
        list[str] | None,
        flag(
            "--lora", "NAME|PATH [STRENGTH [SECOND]]", "A LoRA, at strength 1.0 if not said; SECOND in a second pass."
        ),
    ] = None
    lora_partial: Annotated[
        bool, flag("--lora-partial", None, "Leave out what a LoRA has for layers that are not there.")
    ] = False
    merge_loras: Annotated[
        bool, flag("--merge-loras", None, "Add LoRAs to the weights once, instead of beside them at every step.")
    ] = False
    device: Annotated[
        str, flag("--device", "auto|cpu|cuda|mps", "Where to compute; auto takes the fastest there is.")
    ] = "auto"
    dtype: Annotated[
        str, flag("--dtype", "auto|bfloat16|float32", "Numbers to compute with; auto suits the device.")
    ] = "auto"
    no_prompt_cache: Annotated[
        bool, flag("--no-prompt-cache", None, "Encode the prompts anew, and do not keep what they come to.")
    ] = False
    quant: Annotated[
        str,
        flag(
            "--quant",
            "none|auto|int8|fp8|Q8_0|...",
            "Hold the transformer's weights in fewer bits: int8, int8-weights, fp8, fp8-weights, Q8_0, Q6_K, Q5_K "
            "and so on; auto does so where nothing else fits. [default: none]",
        ),
    ] = "none"
    compile_transformer: Annotated[
        bool,
        flag("--compile", None, "Compile the transformer's layers, on CUDA: the first video waits a minute for it."),
    ] = False
    offload: Annotated[
        str,
        flag(
            "--offload",
            "auto|none|stages|blocks",
            "What is done where memory is short: modules leave it after their stage, or blocks of them come and go.",
        ),
    ] = "auto"


@dataclass(frozen=True)
class MediaFlags:
    """Pictures and clips"""

    image: Annotated[
        list[str] | None,
        flag("--image", "PATH [FRAME [STRENGTH]]", "A picture to show; at frame 0 with strength 1.0 if not said."),
    ] = None
    video: Annotated[
        list[str] | None,
        flag("--video", "PATH[#A:B] [FRAME [STRENGTH]]", "A clip to show, or frames A to B of it; likewise."),
    ] = None
    control: Annotated[
        list[str] | None,
        flag("--control", "[KIND:]PATH[#A:B]", "A clip for an in-context LoRA to follow. KIND: canny, depth or pose."),
    ] = None
    input_video: Annotated[Path | None, flag("--input-video", "PATH", "Make the video from this one.")] = None
    denoise_strength: Annotated[
        _Float, flag("--denoise-strength", "S", "How much of --input-video is made anew, between 0 and 1.")
    ] = None
    image_noise: Annotated[
        _Float, flag("--image-noise", "X", "Noise on pictures at each step, times level squared.")
    ] = None
    image_crf: Annotated[
        _Int, flag("--image-crf", "N", "H.264 quality that pictures are passed through first; 0 is off.")
    ] = None


@dataclass(frozen=True)
class DenoisingFlags:
    """Denoising"""

    steps: Annotated[_Int, flag("--steps", "N", "Steps of denoising.")] = None
    sigmas: Annotated[_Text, flag("--sigmas", "1.0,0.9,...", "Noise levels themselves, instead of --steps.")] = None
    skip_initial: Annotated[int, flag("--skip-initial", "N", "Leave out the first N noise levels.")] = 0
    skip_final: Annotated[int, flag("--skip-final", "N", "Leave out the last N noise levels.")] = 0
    stochastic: Annotated[
        _Switch, flag("--stochastic/--no-stochastic", None, "Fresh noise at every step, as some models want.")
    ] = None
    cache: Annotated[
        str, flag("--cache", "none|first-block|taylor", "Skip layers on some of many steps: faster, not the same.")
    ] = "none"
    cache_threshold: Annotated[
        _Float, flag("--cache-threshold", "X", "Of first-block: the change below which a step is skipped.")
    ] = None
    cache_interval: Annotated[_Int, flag("--cache-interval", "N", "Of taylor: every N-th step is computed.")] = None


@dataclass(frozen=True)
class GuidanceFlags:
    """Guidance; X,... is one value, or one for each level of --guidance-sigmas"""

    guidance: Annotated[_Text, flag("--guidance", "X,...", "How far to go beyond the prompt; 1 is off.")] = None
    guidance_sigmas: Annotated[
        _Text, flag("--guidance-sigmas", "1.0,0.9,...", "The noise levels that lists are for, falling.")
    ] = None
    stg: Annotated[_Text, flag("--stg", "X,...", "Guidance away from disturbed blocks; 0 is off.")] = None
    rescale: Annotated[_Text, flag("--rescale", "X,...", "Contrast taken back where --stg acts; 1 is off.")] = None
    skip_blocks: Annotated[
        _Text, flag("--skip-blocks", "N,.../...", "Blocks that --stg disturbs; / between the lists of two levels.")
    ] = None
    stg_mode: Annotated[
        _Text, flag("--stg-mode", "NAME", "How: attention_values, attention_skip or transformer_block.")
    ] = None
    cfg_star: Annotated[
        _Switch, flag("--cfg-star/--no-cfg-star", None, "Scale the negative prompt's velocity to the prompt's.")
    ] = None
    apg: Annotated[_Float, flag("--apg", "X", "Keep this share of the guidance along the picture; below 0 is off.")] = (
        None
    )
    apg_norm: Annotated[_Float, flag("--apg-norm", "X", "Limit on the norm of the guidance with --apg.")] = None
    guidance_batch: Annotated[
        bool, flag("--guidance-batch", None, "Evaluate with and without prompt at once: faster, more memory.")
    ] = False


@dataclass(frozen=True)
class SecondPassFlags:
    """The second pass"""

    multi_scale: Annotated[
        _Switch, flag("--multi-scale/--single-pass", None, "Make it smaller first, upscale, refine; or in one pass.")
    ] = None
    second_steps: Annotated[_Int, flag("--second-steps", "N", "Steps of the second pass.")] = None
    second_sigmas: Annotated[_Text, flag("--second-sigmas", "0.9,0.7,...", "Its noise levels themselves.")] = None
    second_skip_initial: Annotated[_Int, flag("--second-skip-initial", "N", "Leave out its first N levels.")] = None
    second_guidance: Annotated[_Float, flag("--second-guidance", "X", "Its guidance.")] = None
    second_tone_map: Annotated[_Float, flag("--second-tone-map", "X", "Its tone map.")] = None


@dataclass(frozen=True)
class DecodingFlags:
    """Decoding"""

    tone_map: Annotated[
        _Float, flag("--tone-map", "X", "How strongly extremes are pressed together before decoding, 0 to 1.")
    ] = None
    decode_timestep: Annotated[_Float, flag("--decode-timestep", "X", "Noise level that the decoder is told.")] = None
    decode_noise: Annotated[_Float, flag("--decode-noise", "X", "Share of noise mixed in before decoding.")] = None


@dataclass(frozen=True)
class GenerateFlags:
    """All that `kadr generate` takes, in the order of its help."""

    video: VideoFlags
    enhance: EnhanceFlags
    windows: WindowFlags
    output: OutputFlags
    model: ModelFlags
    media: MediaFlags
    denoising: DenoisingFlags
    guidance: GuidanceFlags
    second_pass: SecondPassFlags
    decoding: DecodingFlags


@dataclass(frozen=True)
class PlanOutputFlags:
    """What comes out"""

    json: Json = False


@dataclass(frozen=True)
class PlanFlags:
    """All that `kadr plan` takes: what `kadr generate` does, and nothing to write or to ask others."""

    video: VideoFlags
    windows: WindowFlags
    output: PlanOutputFlags
    model: ModelFlags
    media: MediaFlags
    denoising: DenoisingFlags
    guidance: GuidanceFlags
    second_pass: SecondPassFlags
    decoding: DecodingFlags
