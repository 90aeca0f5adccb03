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
    from kadr.errors import KadrError, KadrWarning
    from kadr.pipeline.engine import Engine
    from kadr.pipeline.progress import Progress
    from kadr.pipeline.video import Video
    from kadr.request.inputs import Condition, Control
    from kadr.request.prompt_enhancement import enhance_prompt
    from kadr.request.request import Request
    from kadr.request.windows import Windows
    from kadr.sampling.step_cache import StepCache
    from kadr.shapes import Size
    from kadr.spec.lora import Lora
    from kadr.text.enhance import Enhancer

__all__ = [
    "Condition",
    "Control",
    "Engine",
    "Enhancer",
    "KadrError",
    "KadrWarning",
    "Lora",
    "Progress",
    "Request",
    "Size",
    "StepCache",
    "Video",
    "Windows",
    "__version__",
    "enhance_prompt",
]

# Loaded when first asked for: `import kadr` and `kadr --help` must not wait for torch.
_HOMES = {
    "Condition": "kadr.request.inputs",
    "Control": "kadr.request.inputs",
    "Engine": "kadr.pipeline.engine",
    "Enhancer": "kadr.text.enhance",
    "KadrError": "kadr.errors",
    "KadrWarning": "kadr.errors",
    "Lora": "kadr.spec.lora",
    "Progress": "kadr.pipeline.progress",
    "Request": "kadr.request.request",
    "Size": "kadr.shapes",
    "StepCache": "kadr.sampling.step_cache",
    "Video": "kadr.pipeline.video",
    "Windows": "kadr.request.windows",
    "enhance_prompt": "kadr.request.prompt_enhancement",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kadr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
