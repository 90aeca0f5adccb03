import torch
from diffusers import LTXImageToVideoPipeline
from diffusers.utils import export_to_video, load_image

pipe = LTXImageToVideoPipeline.from_pretrained("Lightricks/LTX-Video", torch_dtype=torch.float32)
pipe.to("cuda")

image = load_image("https://example.org/image.png")
video = pipe(
    image=image,
    prompt="the golden light of evening over the sea",
    negative_prompt="worst quality",
    width=704,
    height=480,
    num_frames=161,
    num_inference_steps=50,
    decode_timestep=0.03,
    decode_noise_scale=0.025,
    generator=torch.Generator("cuda").manual_seed(0),
).frames[0]
export_to_video(video, "output.mp4", fps=24)
