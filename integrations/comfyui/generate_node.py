"""The node that makes a video."""

from __future__ import annotations

import logging
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .comfy_host import NodeProgress, collected_warnings, free_models, interruptible, wants_previews
from .frame_files import FrameFiles
from .kadr_package import import_kadr
from .model_options import ModelOptions
from .shared_engine import SHARED_ENGINE

if TYPE_CHECKING:
    from torch import Tensor

CATEGORY = "kadr"
MAX_SEED = 2**64 - 1
PASSES = {"the model's": None, "one": False, "two": True}
DEFAULT_FPS = 24.0  # of clips, where the request leaves the rate to the model
LOGGER = logging.getLogger("kadr.comfyui")


def _number(kind: str, highest: float, step: float, tooltip: str) -> tuple[str, dict[str, Any]]:
    """Returns an input whose 0 means the model's own."""
    zero = 0 if kind == "INT" else 0.0
    return kind, {"default": zero, "min": zero, "max": highest, "step": step, "tooltip": f"{tooltip} 0: the model's."}


class KadrGenerate:
    """Generates a video. What is left at 0 or empty is what the model's recipe says."""

    RETURN_TYPES = ("IMAGE", "FLOAT", "STRING")
    RETURN_NAMES = ("images", "fps", "notices")
    FUNCTION = "generate"
    CATEGORY = CATEGORY
    DESCRIPTION = "Makes a video with kadr: frames as an image batch, frames per second, and what was degraded."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs."""
        prompt = {"multiline": True, "dynamicPrompts": True}
        strength = {"default": 0.75, "min": 0.01, "max": 0.99, "step": 0.01}
        return {
            "required": {
                "model": ("KADR_MODEL",),
                "prompt": ("STRING", {**prompt, "default": "", "tooltip": "What to show."}),
                "width": _number("INT", 8192, 2, "Pixels, any number."),
                "height": _number("INT", 8192, 2, "Pixels, any number."),
                "frames": _number("INT", 100_000, 1, "Number of frames, any."),
                "fps": _number("FLOAT", 240.0, 0.001, "Frames per second; it changes the speed of motion."),
                "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
            },
            "optional": {
                "negative_prompt": ("STRING", {**prompt, "default": "", "tooltip": "Empty: the model's."}),
                "steps": _number("INT", 1000, 1, "Denoising steps."),
                "guidance": _number("FLOAT", 100.0, 0.1, "CFG scale; 1 is off."),
                "passes": (list(PASSES), {"tooltip": "two: sample small, upscale the latents, refine."}),
                "keep_loaded": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Keep the model in memory for the next video."},
                ),
                "conditions": ("KADR_CONDITIONS", {"tooltip": "Images and clips that the video must show."}),
                "controls": ("KADR_CONTROLS", {"tooltip": "Clips to follow; the model needs an in-context LoRA."}),
                "input_video": ("IMAGE", {"tooltip": "Frames to start from instead of noise."}),
                "denoise_strength": ("FLOAT", {**strength, "tooltip": "Of input_video: more changes more."}),
            },
        }

    def generate(self, model: ModelOptions, keep_loaded: bool = True, **inputs: Any) -> tuple[Tensor, float, str]:
        """Returns the frames, float32 (F, H, W, 3) in 0..1 on the CPU, frames per second, and notices line by line.

        Args:
            inputs: the others, see `build_request`.

        Raises:
            KadrNotInstalledError: kadr is not installed.
            kadr.KadrError: the request does not fit the model, a file is damaged, memory is short.
            comfy.model_management.InterruptProcessingException: ComfyUI's stop button was pressed.
        """
        import_kadr()
        import torch

        # ComfyUI runs nodes in inference mode. Weights that were loaded in it could not be used outside of it later.
        with torch.inference_mode(False), torch.no_grad(), collected_warnings() as warned:
            engine = SHARED_ENGINE.get(model)
            try:
                frames, fps, notices = _generate(engine, model, inputs)
            finally:
                if not keep_loaded:
                    engine.unload()
        lines = list(dict.fromkeys((*warned, *notices)))
        for line in lines:
            LOGGER.warning("%s", line)
        return frames, fps, "\n".join(lines)


def _generate(engine: Any, model: ModelOptions, inputs: dict[str, Any]) -> tuple[Tensor, float, tuple[str, ...]]:
    import folder_paths
    import torch

    temporary = Path(folder_paths.get_temp_directory())
    temporary.mkdir(parents=True, exist_ok=True)
    has_previews = wants_previews()
    watch = NodeProgress(has_previews=has_previews)
    with ExitStack() as stack:
        token = stack.enter_context(interruptible())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kadr-", dir=temporary))
        request = build_request(model, inputs, Path(folder))
        free_models()
        generation = stack.enter_context(engine.start(request, watch=watch, preview=has_previews, cancel=token))
        watch.use_plan(generation.plan)
        resolved, latents = generation.resolved, generation.denoise()
        frames = torch.empty(resolved.frames, resolved.size.height, resolved.size.width, 3)
        done = 0
        for chunk in generation.decode(latents):
            torch.div(chunk, 255, out=frames[done : done + len(chunk)])
            done += len(chunk)
        return frames, float(resolved.fps), generation.notices


def build_request(model: ModelOptions, inputs: dict[str, Any], folder: Path) -> Any:
    """Returns the `kadr.Request` of a node's inputs, whose images and clips are written into `folder`.

    Raises:
        ValueError: one of width and height is 0, or a batch of images has no three channels.
        kadr.RequestError: a value is out of its range.
    """
    from kadr import Request

    width, height = inputs.get("width", 0), inputs.get("height", 0)
    if bool(width) != bool(height):
        raise ValueError(f"width is {width} and height is {height}; give both, or 0 for both: the model's size.")
    files = FrameFiles(folder, inputs.get("fps") or DEFAULT_FPS)
    start = inputs.get("input_video")
    return Request(
        inputs["prompt"],
        size=(width, height) if width else None,
        frames=inputs.get("frames") or None,
        fps=inputs.get("fps") or None,
        seed=inputs.get("seed", 0),
        negative_prompt=inputs.get("negative_prompt") or None,
        steps=inputs.get("steps") or None,
        guidance=inputs.get("guidance") or None,
        multi_scale=PASSES[inputs.get("passes", "the model's")],
        conditions=files.conditions(inputs.get("conditions") or ()),
        controls=files.controls(inputs.get("controls") or ()),
        lora_strengths=model.strengths or None,
        input_video=None if start is None else files.write_clip(start),
        denoise_strength=None if start is None else inputs.get("denoise_strength"),
    )
