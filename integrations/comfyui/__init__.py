"""kadr's nodes for ComfyUI. Importing them loads neither torch nor kadr; that is for the first node that runs."""

from __future__ import annotations

from typing import Any

from .generate_node import KadrGenerate
from .media_nodes import KadrClipCondition, KadrControl, KadrImageCondition
from .model_nodes import KadrLora, KadrModel

NODE_CLASS_MAPPINGS: dict[str, Any] = {
    "KadrModel": KadrModel,
    "KadrLora": KadrLora,
    "KadrImageCondition": KadrImageCondition,
    "KadrClipCondition": KadrClipCondition,
    "KadrControl": KadrControl,
    "KadrGenerate": KadrGenerate,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "KadrModel": "kadr: load model",
    "KadrLora": "kadr: LoRA",
    "KadrImageCondition": "kadr: image condition",
    "KadrClipCondition": "kadr: clip condition",
    "KadrControl": "kadr: control",
    "KadrGenerate": "kadr: generate video",
}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
