import torch
from diffusers import LTXImageToVideoPipeline
from diffusers.utils import export_to_video, load_image

pipe = LTXImageToVideoPipeline.from_pretrained("Lightricks/LTX-Video", torch_dtype=torch.float32)
pipe.load_lora_weights("Lightricks/a-style", weight_name="style.safetensors")
pipe.fuse_lora(lora_scale=0.7)
pipe.to("cuda")

frames = pipe(
    image=load_image("https://example.org/image.png"),
    prompt="the sea in the evening",
    width=704,
    height=480,
    num_frames=161,
    num_inference_steps=50,
    generator=torch.Generator("cuda").manual_seed(3),
    output_type="np",
).frames
video = frames[0]
export_to_video(video, "output.mp4", fps=25)
