import torch
from diffusers import LTXConditionPipeline, LTXLatentUpsamplePipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from diffusers.utils import export_to_video, load_image

pipeline = LTXConditionPipeline.from_pretrained("Lightricks/LTX-Video-0.9.7-dev", torch_dtype=torch.float32)
pipe_upsample = LTXLatentUpsamplePipeline.from_pretrained(
    "Lightricks/ltxv-spatial-upscaler-0.9.7", vae=pipeline.vae, torch_dtype=torch.float32
)
pipeline.to("cuda")
pipe_upsample.to("cuda")
pipeline.vae.enable_tiling()


def round_to_nearest_resolution_acceptable_by_vae(height, width):
    height = height - (height % pipeline.vae_spatial_compression_ratio)
    width = width - (width % pipeline.vae_spatial_compression_ratio)
    return height, width


condition = LTXVideoCondition(image=load_image("https://example.org/image.png"), frame_index=0)
expected_height, expected_width = 130, 200
downscaled_height, downscaled_width = round_to_nearest_resolution_acceptable_by_vae(65, 100)
latents = pipeline(
    conditions=[condition],
    prompt="the blue sea",
    negative_prompt="worst quality",
    width=downscaled_width,
    height=downscaled_height,
    num_frames=17,
    num_inference_steps=30,
    generator=torch.Generator().manual_seed(0),
    output_type="latent",
).frames

upscaled_height, upscaled_width = downscaled_height * 2, downscaled_width * 2
upscaled_latents = pipe_upsample(latents=latents, adain_factor=1.0, output_type="latent").frames

video = pipeline(
    conditions=[condition],
    prompt="the blue sea",
    negative_prompt="worst quality",
    width=upscaled_width,
    height=upscaled_height,
    num_frames=17,
    denoise_strength=0.7,
    num_inference_steps=10,
    latents=upscaled_latents,
    decode_timestep=0.05,
    decode_noise_scale=0.025,
    image_cond_noise_scale=0.025,
    generator=torch.Generator().manual_seed(0),
    output_type="pil",
).frames[0]
video = [frame.resize((expected_width, expected_height)) for frame in video]
export_to_video(video, "output.mp4", fps=24)
