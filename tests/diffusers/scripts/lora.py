import torch
from diffusers import LTXPipeline
from diffusers.utils import export_to_video

pipeline = LTXPipeline.from_pretrained("Lightricks/LTX-Video", torch_dtype=torch.float32)
pipeline.load_lora_weights("Lightricks/a-style", weight_name="style.safetensors", adapter_name="style")
pipeline.set_adapters("style", adapter_weights=0.8)
pipeline.to("cuda")

video = pipeline(
    prompt="a red circle in golden light",
    negative_prompt="worst quality",
    width=704,
    height=480,
    num_frames=161,
    num_inference_steps=50,
    guidance_scale=4.0,
    attention_kwargs={"scale": 0.5},
    generator=torch.Generator("cuda").manual_seed(0),
).frames[0]
export_to_video(video, "output.mp4", fps=24)
pipeline.unload_lora_weights()
