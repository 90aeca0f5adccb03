import torch
from diffusers import LTXPipeline

pipe = LTXPipeline.from_pretrained("Lightricks/LTX-Video", torch_dtype=torch.float32)
pipe.to("cuda")
pipe.set_progress_bar_config(disable=True)

generators = [torch.Generator("cuda").manual_seed(seed) for seed in range(2)]
video = pipe(
    ["a red circle", "birds over the sea"],
    width=704,
    height=480,
    num_frames=161,
    num_inference_steps=50,
    guidance_scale=1.0,
    generator=generators,
    output_type="latent",
).frames
