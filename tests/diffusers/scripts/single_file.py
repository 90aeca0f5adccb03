import torch
from diffusers import LTXPipeline
from diffusers.utils import export_to_video

single_file_url = "https://huggingface.co/Lightricks/LTX-Video/blob/main/ltx-video-2b-v0.9.5.safetensors"
pipe = LTXPipeline.from_single_file(single_file_url, torch_dtype=torch.float32)
pipe.enable_sequential_cpu_offload()

video = pipe("the blue sea", width=704, height=480, num_frames=161, num_inference_steps=50).frames[0]
export_to_video(video, "output.mp4", fps=24)
