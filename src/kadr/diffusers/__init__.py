"""Pipelines with the signatures of diffusers' LTX pipelines, on top of `kadr.Engine`; diffusers is not imported.

    from kadr.diffusers import LTXPipeline
    pipe = LTXPipeline.from_pretrained("Lightricks/LTX-Video", torch_dtype=torch.bfloat16).to("cuda")
    video = pipe("a fox runs through snow").frames[0]

With a `torch.Generator`, the latents are those of diffusers: see docs/guides/diffusers.md.
"""

from kadr.diffusers.condition import LTXConditionPipeline, LTXVideoCondition
from kadr.diffusers.image_to_video import LTXImageToVideoPipeline
from kadr.diffusers.latent_upsample import LTXLatentUpsamplePipeline
from kadr.diffusers.outputs import LTXPipelineOutput
from kadr.diffusers.text_to_video import LTXPipeline

__all__ = [
    "LTXConditionPipeline",
    "LTXImageToVideoPipeline",
    "LTXLatentUpsamplePipeline",
    "LTXPipeline",
    "LTXPipelineOutput",
    "LTXVideoCondition",
]
