import torch
from diffusers import LTXConditionPipeline
from diffusers.utils import export_to_video

pipeline = LTXConditionPipeline.from_pretrained("Lightricks/LTX-Video-0.9.7-distilled", torch_dtype=torch.float32)
pipeline.to("cuda")
pipeline.vae.enable_tiling()

video = pipeline(
    prompt="birds fly slowly over the sea",
    width=768,
    height=512,
    num_frames=96,
    timesteps=[1000, 993, 987, 981, 975, 909, 725, 0.03],
    decode_timestep=0.05,
    decode_noise_scale=0.025,
    image_cond_noise_scale=0.0,
    guidance_scale=1.0,
    guidance_rescale=0.7,
    generator=torch.Generator().manual_seed(0),
    output_type="np",
).frames[0]
export_to_video(video, "output.mp4", fps=24)
