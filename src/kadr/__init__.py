"""kadr makes video from text, images and clips with the LTX-Video family of models.

import kadr
engine = kadr.Engine.open("demo")
video = engine.generate(kadr.Request(prompt="a red circle moving right on a black background"))
video.save("circle.mp4")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kadr.version import __version__

if TYPE_CHECKING:
    from kadr.cancellation import CancelToken
    from kadr.errors import (
        Busy,
        Cancelled,
        CheckpointError,
        EnhanceError,
        KadrError,
        KadrWarning,
        MediaError,
        NonFiniteError,
        PlanError,
        RequestError,
    )
    from kadr.media.clip import read_metadata
    from kadr.media.encoders.formats import Encoding
    from kadr.models.registry import Recipe
    from kadr.pipeline.display.progress_bar import ProgressBar
    from kadr.pipeline.dry_run import DryRun
    from kadr.pipeline.engine import Engine
    from kadr.pipeline.generation import Generation
    from kadr.pipeline.progress import Progress
    from kadr.pipeline.video import Video, VideoFile
    from kadr.planning.plan import Plan
    from kadr.request.inputs import Condition, Control
    from kadr.request.prompt_enhancement import enhance_prompt
    from kadr.request.request import Request
    from kadr.request.resolved_request import ResolvedRequest
    from kadr.request.windows import Windows
    from kadr.sampling.settings import Guidance, Pass
    from kadr.sampling.step_cache import StepCache
    from kadr.shapes import Size
    from kadr.spec.lora import Lora
    from kadr.spec.model import ModelSpec
    from kadr.text.enhance import Enhancer

# Loaded when first asked for: `import kadr` and `kadr --help` must not wait for torch.
_HOMES = {
    "Busy": "kadr.errors",
    "CancelToken": "kadr.cancellation",
    "Cancelled": "kadr.errors",
    "CheckpointError": "kadr.errors",
    "Condition": "kadr.request.inputs",
    "Control": "kadr.request.inputs",
    "DryRun": "kadr.pipeline.dry_run",
    "Encoding": "kadr.media.encoders.formats",
    "Engine": "kadr.pipeline.engine",
    "EnhanceError": "kadr.errors",
    "Enhancer": "kadr.text.enhance",
    "Generation": "kadr.pipeline.generation",
    "Guidance": "kadr.sampling.settings",
    "KadrError": "kadr.errors",
    "KadrWarning": "kadr.errors",
    "Lora": "kadr.spec.lora",
    "MediaError": "kadr.errors",
    "ModelSpec": "kadr.spec.model",
    "NonFiniteError": "kadr.errors",
    "Pass": "kadr.sampling.settings",
    "Plan": "kadr.planning.plan",
    "PlanError": "kadr.errors",
    "Progress": "kadr.pipeline.progress",
    "ProgressBar": "kadr.pipeline.display.progress_bar",
    "Recipe": "kadr.models.registry",
    "Request": "kadr.request.request",
    "RequestError": "kadr.errors",
    "ResolvedRequest": "kadr.request.resolved_request",
    "Size": "kadr.shapes",
    "StepCache": "kadr.sampling.step_cache",
    "Video": "kadr.pipeline.video",
    "VideoFile": "kadr.pipeline.video",
    "Windows": "kadr.request.windows",
    "enhance_prompt": "kadr.request.prompt_enhancement",
    "read_metadata": "kadr.media.clip",
}
__all__ = [
    "Busy",
    "CancelToken",
    "Cancelled",
    "CheckpointError",
    "Condition",
    "Control",
    "DryRun",
    "Encoding",
    "Engine",
    "EnhanceError",
    "Enhancer",
    "Generation",
    "Guidance",
    "KadrError",
    "KadrWarning",
    "Lora",
    "MediaError",
    "ModelSpec",
    "NonFiniteError",
    "Pass",
    "Plan",
    "PlanError",
    "Progress",
    "ProgressBar",
    "Recipe",
    "Request",
    "RequestError",
    "ResolvedRequest",
    "Size",
    "StepCache",
    "Video",
    "VideoFile",
    "Windows",
    "__version__",
    "enhance_prompt",
    "read_metadata",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kadr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
