import torch
from diffusers import LTXPipeline
from diffusers.utils import export_to_video

pipe = LTXPipeline.from_pretrained("Lightricks/LTX-Video", torch_dtype=torch.float32)
pipe.enable_model_cpu_offload()
pipe.vae.enable_tiling()

video = pipe("the blue sea", width=704, height=480, num_frames=161, num_inference_steps=50).frames[0]
export_to_video(video, "output.mp4", fps=24)
