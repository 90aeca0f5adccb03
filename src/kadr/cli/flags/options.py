"""Flags, one entry each. A verb lists its flags as parameters; `generate` and `plan` take them in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kadr.cli.flags.completion import completer_for
from kadr.sampling.samplers import SAMPLERS


def flag(name: str, metavar: str | None, help: str) -> Any:
    completer = completer_for(name, metavar)
    return typer.Option(name, metavar=metavar, help=help, show_default=False, autocompletion=completer)


# Flags of several verbs, or of verbs other than `generate`.
Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to show, in quotes.", show_default=False)]
PromptOrStdin = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT",
        help="What to show, in quotes; - reads prompts from stdin, one per line, and makes a video of each.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None, flag("--model", "NAME|PATH", "A name of `kadr models`, a .safetensors, a .gguf or a diffusers folder.")
]
Release = Annotated[
    str | None,
    flag("--release", "NAME", "The release that a file or folder is, where nothing in it tells: of `kadr models`."),
]
RerunDevice = Annotated[
    str | None, flag("--device", "auto|cpu|cuda|mps", "Device to compute on. [default: as FILE says]")
]
RerunSeed = Annotated[int | None, flag("--seed", "N", "Seed to use instead of the one in FILE.")]
RerunOutput = Annotated[
    Path | None,
    flag("--output", "PATH", "The file to write or replace, or - for stdout. [default: a new name beside FILE]"),
]
Codec = Annotated[str | None, flag("--codec", "h264|hevc|av1|vp9|ffv1", "Codec of an .mp4 (h264) or a .webm (vp9).")]
Crf = Annotated[
    int | None, flag("--crf", "N", "Quality of an .mp4 or .webm: 0 is the best, more is smaller. [default: 18, h264]")
]
KeepAudio = Annotated[bool, flag("--keep-audio", None, "Keep the sound of --input-video, or of the one --video.")]
NoMetadata = Annotated[bool, flag("--no-metadata", None, "Do not store the request in the file; it cannot be rerun.")]
ModelsDir = Annotated[
    list[str] | None,
    flag("--models-dir", "DIR", "Also look names up in this folder, arranged as ComfyUI's models; may be repeated."),
]
Resume = Annotated[bool, flag("--resume", None, "Resume a long video from the finished windows beside it.")]
Json = Annotated[bool, flag("--json", None, "Print one JSON object instead.")]
Preview = Annotated[bool, flag("--preview", None, "Show on the terminal what the video will be, while it is denoised.")]
Devices = Annotated[
    list[str] | None,
    flag("--device", "auto|cpu|cuda:N|mps", "Device of a worker; may be repeated, for one worker each."),
]

_Float = float | None
_Int = int | None
_Text = str | None
_Switch = bool | None


@dataclass(frozen=True)
class VideoFlags:
    """The video"""

    size: Annotated[_Text, flag("--size", "WxH", "Width and height in pixels, such as 704x480; auto fits --image.")] = (
        None
    )
    frames: Annotated[_Int, flag("--frames", "N", "Number of frames.")] = None
    seconds: Annotated[_Float, flag("--seconds", "S", "Length in seconds, instead of --frames.")] = None
    fps: Annotated[_Float, flag("--fps", "N", "Frames per second; the model matches the motion to it.")] = None
    seed: Annotated[int, flag("--seed", "N", "The same seed gives the same noise on every device. [default: 0]")] = 0
    negative_prompt: Annotated[_Text, flag("--negative-prompt", "TEXT", "What CFG guides away from.")] = None


@dataclass(frozen=True)
class SeriesFlags:
    """Several videos (each prompt with each seed; the model is opened once)"""

    variations: Annotated[
        int, flag("--variations", "N", "Make N videos of each prompt, with the seeds S, S+1, ... [default: 1]")
    ] = 1
    prompt_file: Annotated[
        Path | None,
        flag("--prompt-file", "FILE", "Make a video of each line, but for empty lines and those that begin with #."),
    ] = None


@dataclass(frozen=True)
class EnhanceFlags:
    """Prompt enhancement"""

    enhance: Annotated[
        _Text, flag("--enhance", "URL", "Let the chat model at this OpenAI-compatible endpoint rewrite the prompt.")
    ] = None
    enhance_model: Annotated[
        _Text, flag("--enhance-model", "NAME", "Name of that model. The key is read from KADR_ENHANCE_KEY.")
    ] = None
    enhance_required: Annotated[
        bool, flag("--enhance-required", None, "Stop if the endpoint fails, instead of using your own words.")
    ] = False
    enhance_timeout: Annotated[
        _Float, flag("--enhance-timeout", "S", "Seconds to wait for an answer. [default: 60]")
    ] = None


@dataclass(frozen=True)
class WindowFlags:
    """Long videos (any of these, or several --prompt, samples the video window by window)"""

    window: Annotated[_Int, flag("--window", "N", "Frames of a window. [default: the recipe's frames]")] = None
    overlap: Annotated[_Int, flag("--overlap", "N", "Frames that consecutive windows share, a multiple of 8.")] = None
    overlap_strength: Annotated[
        _Float, flag("--overlap-strength", "S", "Strength of the window before as a condition, up to 1.")
    ] = None
    adain: Annotated[
        _Float, flag("--adain", "A", "How far AdaIN moves a window's colours to those of the first, 0 to 1.")
    ] = None
    anchor_strength: Annotated[
        _Float, flag("--anchor-strength", "S", "Strength of the image at frame 0 in every window; 0 is off.")
    ] = None


@dataclass(frozen=True)
class OutputFlags:
    """Output"""

    output: Annotated[
        Path | None,
        flag(
            "--output",
            "PATH",
            "The file to write or replace: .mp4, .webm, .mkv, .gif, .webp, .png or .jpg (numbered: frame-%04d.png), or "
            "- for stdout; several videos are new files, clip-1.mp4, clip-2.mp4, ... for clip.mp4. "
            "[default: out.mp4, out-2.mp4, ...]",
        ),
    ] = None
    codec: Codec = None
    crf: Crf = None
    keep_audio: KeepAudio = False
    no_metadata: NoMetadata = False
    resume: Resume = False
    preview: Preview = False
    json: Annotated[bool, flag("--json", None, "Print one JSON object instead, on a line for each video.")] = False
    dry_run: Annotated[bool, flag("--dry-run", None, "Print every step of the run; make nothing.")] = False
    save_latents: Annotated[
        Path | None,
        flag(
            "--save-latents", "PATH", "Also write the latents, before decoding, as .safetensors, named like --output."
        ),
    ] = None


@dataclass(frozen=True)
class ModelFlags:
    """The model"""

    # Its devices are in the classes below: most verbs use one.

    model: Model = None
    release: Release = None
    config: Annotated[
        Path | None,
        flag("--config", "FILE.yaml|NAME", "Take model and recipe from an official pipeline config, a file or a name."),
    ] = None
    upscaler: Annotated[
        list[str] | None, flag("--upscaler", "NAME|PATH", "Latent upscaler between two passes; may be given twice.")
    ] = None
    second_model: Annotated[_Text, flag("--second-model", "NAME|PATH", "Use this model for the second pass.")] = None
    text_encoder: Annotated[
        Path | None,
        flag("--text-encoder", "NAME|PATH", "T5 text encoder: a .safetensors, a .gguf, a folder or a model's name."),
    ] = None
    vae: Annotated[Path | None, flag("--vae", "NAME|PATH", "Take the VAE from this checkpoint.")] = None
    models_dir: ModelsDir = None
    lora: Annotated[
        list[str] | None,
        flag(
            "--lora",
            "NAME|PATH [STRENGTH [SECOND]]",
            "A LoRA at strength 1.0 unless given; SECOND is its strength in a second pass.",
        ),
    ] = None
    lora_partial: Annotated[
        bool, flag("--lora-partial", None, "Ignore LoRA weights for layers that the model lacks.")
    ] = False
    merge_loras: Annotated[
        bool, flag("--merge-loras", None, "Merge LoRAs into the weights, instead of applying them at every step.")
    ] = False
    dtype: Annotated[str, flag("--dtype", "auto|bfloat16|float32", "Dtype to compute in; auto suits the device.")] = (
        "auto"
    )
    no_prompt_cache: Annotated[
        bool, flag("--no-prompt-cache", None, "Encode the prompts anew and do not store the embeddings.")
    ] = False
    quant: Annotated[
        str,
        flag(
            "--quant",
            "none|auto|int8|fp8|Q8_0|...",
            "Quantize the transformer's weights: int8, int8-weights, fp8, fp8-weights, Q8_0, Q6_K, Q5_K and so on; "
            "auto does so only where nothing else fits. [default: none]",
        ),
    ] = "none"
    compile_transformer: Annotated[
        bool,
        flag("--compile", None, "Compile the transformer blocks, on CUDA: the first video waits a minute for it."),
    ] = False
    offload: Annotated[
        str,
        flag(
            "--offload",
            "auto|none|stages|blocks",
            "Where memory is short: stages unloads each model after its stage, blocks streams transformer blocks.",
        ),
    ] = "auto"


@dataclass(frozen=True)
class OneDeviceModelFlags(ModelFlags):
    """The model"""

    device: Annotated[str, flag("--device", "auto|cpu|cuda|mps", "Device to compute on; auto picks the fastest.")] = (
        "auto"
    )


@dataclass(frozen=True)
class ManyDevicesModelFlags(ModelFlags):
    """The model"""

    device: Devices = None


@dataclass(frozen=True)
class MediaFlags:
    """Images and clips"""

    image: Annotated[
        list[str] | None,
        flag("--image", "PATH [FRAME [STRENGTH]]", "An image to show; at frame 0 with strength 1.0 unless given."),
    ] = None
    video: Annotated[
        list[str] | None,
        flag("--video", "PATH[#A:B] [FRAME [STRENGTH]]", "A clip to show, or its frames A to B; likewise."),
    ] = None
    control: Annotated[
        list[str] | None,
        flag("--control", "[KIND:]PATH[#A:B]", "A clip for an in-context LoRA to follow. KIND: canny, depth or pose."),
    ] = None
    input_video: Annotated[Path | None, flag("--input-video", "PATH", "Make the video from this clip.")] = None
    denoise_strength: Annotated[
        _Float, flag("--denoise-strength", "S", "How much of --input-video is made anew, between 0 and 1.")
    ] = None
    image_noise: Annotated[
        _Float, flag("--image-noise", "X", "Noise on conditions at each step, times sigma squared.")
    ] = None
    image_crf: Annotated[
        _Int, flag("--image-crf", "N", "H.264 quality that images are compressed with first; 0 is off.")
    ] = None


@dataclass(frozen=True)
class DenoisingFlags:
    """Denoising"""

    steps: Annotated[_Int, flag("--steps", "N", "Number of denoising steps.")] = None
    sigmas: Annotated[_Text, flag("--sigmas", "1.0,0.9,...", "The sigma schedule, instead of --steps.")] = None
    skip_initial: Annotated[int, flag("--skip-initial", "N", "Skip the first N sigmas.")] = 0
    skip_final: Annotated[int, flag("--skip-final", "N", "Skip the last N sigmas.")] = 0
    sampler: Annotated[_Text, flag("--sampler", "|".join(SAMPLERS), "How each step is made.")] = None
    cache: Annotated[
        str, flag("--cache", "none|first-block|taylor", "Skip transformer blocks on some steps: faster, other frames.")
    ] = "none"
    cache_threshold: Annotated[
        _Float, flag("--cache-threshold", "X", "For first-block: the change below which a step is skipped.")
    ] = None
    cache_interval: Annotated[_Int, flag("--cache-interval", "N", "For taylor: compute every N-th step.")] = None


@dataclass(frozen=True)
class GuidanceFlags:
    """Guidance (X,... is one value, or one for each of --guidance-sigmas)"""

    guidance: Annotated[_Text, flag("--guidance", "X,...", "CFG scale (classifier-free guidance); 1 is off.")] = None
    guidance_sigmas: Annotated[
        _Text, flag("--guidance-sigmas", "1.0,0.9,...", "Sigmas that lists of values are for, decreasing.")
    ] = None
    stg: Annotated[_Text, flag("--stg", "X,...", "STG scale (spatio-temporal guidance); 0 is off.")] = None
    rescale: Annotated[_Text, flag("--rescale", "X,...", "Rescaling of contrast where --stg acts; 1 is off.")] = None
    skip_blocks: Annotated[
        _Text, flag("--skip-blocks", "N,.../...", "Blocks that --stg perturbs; / between the lists of two sigmas.")
    ] = None
    stg_mode: Annotated[
        _Text,
        flag("--stg-mode", "NAME", "How blocks are perturbed: attention_values, attention_skip, transformer_block."),
    ] = None
    cfg_star: Annotated[
        _Switch,
        flag("--cfg-star/--no-cfg-star", None, "CFG-star: scale the unconditional prediction to the conditional one."),
    ] = None
    apg: Annotated[
        _Float, flag("--apg", "X", "APG: keep this share of the guidance parallel to the prediction; below 0 is off.")
    ] = None
    apg_norm: Annotated[_Float, flag("--apg-norm", "X", "APG: limit on the norm of the guidance.")] = None
    guidance_batch: Annotated[
        bool, flag("--guidance-batch", None, "Evaluate both prompts in one batch: faster, more memory.")
    ] = False


@dataclass(frozen=True)
class SecondPassFlags:
    """The second pass"""

    multi_scale: Annotated[
        _Switch, flag("--multi-scale/--single-pass", None, "Two passes: small, upscaled, refined; or a single pass.")
    ] = None
    second_steps: Annotated[_Int, flag("--second-steps", "N", "Its number of steps.")] = None
    second_sigmas: Annotated[_Text, flag("--second-sigmas", "0.9,0.7,...", "Its sigma schedule.")] = None
    second_skip_initial: Annotated[_Int, flag("--second-skip-initial", "N", "Skip its first N sigmas.")] = None
    second_sampler: Annotated[_Text, flag("--second-sampler", "NAME", "Its sampler.")] = None
    second_guidance: Annotated[_Float, flag("--second-guidance", "X", "Its CFG scale.")] = None
    second_tone_map: Annotated[_Float, flag("--second-tone-map", "X", "Its tone map.")] = None


@dataclass(frozen=True)
class DecodingFlags:
    """Decoding"""

    tone_map: Annotated[_Float, flag("--tone-map", "X", "Compress the latents' extremes before decoding, 0 to 1.")] = (
        None
    )
    decode_timestep: Annotated[_Float, flag("--decode-timestep", "X", "Timestep of the VAE's decoder.")] = None
    decode_noise: Annotated[
        _Float, flag("--decode-noise", "X", "Share of noise mixed into the latents before decoding.")
    ] = None


@dataclass(frozen=True)
class GenerateFlags:
    """Flags of `kadr generate`, in the order of its help."""

    video: VideoFlags
    series: SeriesFlags
    enhance: EnhanceFlags
    windows: WindowFlags
    output: OutputFlags
    model: OneDeviceModelFlags
    media: MediaFlags
    denoising: DenoisingFlags
    guidance: GuidanceFlags
    second_pass: SecondPassFlags
    decoding: DecodingFlags


@dataclass(frozen=True)
class PlanOutputFlags:
    """Output"""

    json: Json = False
    calibrate: Annotated[
        bool, flag("--calibrate", None, "First measure how fast this machine is, for about a minute, and remember it.")
    ] = False


@dataclass(frozen=True)
class PlanFlags:
    """Flags of `kadr plan`: those of `kadr generate` but for several videos, prompt enhancement and output."""

    video: VideoFlags
    windows: WindowFlags
    output: PlanOutputFlags
    model: OneDeviceModelFlags
    media: MediaFlags
    denoising: DenoisingFlags
    guidance: GuidanceFlags
    second_pass: SecondPassFlags
    decoding: DecodingFlags


@dataclass(frozen=True)
class BatchOutputFlags:
    """The batch"""

    out: Annotated[Path, flag("--out", "DIR", "Folder of the videos, made where it is missing.")]
    retry_failed: Annotated[bool, flag("--retry-failed", None, "Make rows again that failed in an earlier run.")] = (
        False
    )
    dry_run: Annotated[bool, flag("--dry-run", None, "Check every row; make nothing.")] = False
    json: Json = False


@dataclass(frozen=True)
class BatchFlags:
    """Flags of `kadr batch`: those of `kadr plan` are defaults of all rows, but for the output."""

    batch: BatchOutputFlags
    video: VideoFlags
    windows: WindowFlags
    model: ManyDevicesModelFlags
    media: MediaFlags
    denoising: DenoisingFlags
    guidance: GuidanceFlags
    second_pass: SecondPassFlags
    decoding: DecodingFlags
