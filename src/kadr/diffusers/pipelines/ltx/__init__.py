"""The LTX pipelines, at the path that they have in diffusers."""

from kadr.diffusers import (
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXLatentUpsamplePipeline,
    LTXPipeline,
    LTXPipelineOutput,
)

__all__ = [
    "LTXConditionPipeline",
    "LTXImageToVideoPipeline",
    "LTXLatentUpsamplePipeline",
    "LTXPipeline",
    "LTXPipelineOutput",
]
