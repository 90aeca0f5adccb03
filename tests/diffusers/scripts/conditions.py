import torch
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline, LTXVideoCondition
from diffusers.utils import export_to_video, load_image, load_video

pipe = LTXConditionPipeline.from_pretrained("Lightricks/LTX-Video-0.9.5", torch_dtype=torch.float32)
pipe.to("cuda")

video = load_video("https://example.org/clip.mp4")
image = load_image("https://example.org/image.png")
condition1 = LTXVideoCondition(image=image, frame_index=0)
condition2 = LTXVideoCondition(video=video, frame_index=8)

generator = torch.Generator("cuda").manual_seed(0)
video = pipe(
    conditions=[condition1, condition2],
    prompt="a red circle moving right",
    negative_prompt="worst quality, inconsistent motion, blurry, jittery, distorted",
    width=768,
    height=512,
    num_frames=161,
    num_inference_steps=40,
    generator=generator,
).frames[0]
export_to_video(video, "output.mp4", fps=24)
