import torch
from diffusers import LTXPipeline
from diffusers.utils import export_to_video

pipe = LTXPipeline.from_pretrained("Lightricks/LTX-Video", torch_dtype=torch.float32)
pipe.to("cuda")


def callback_dynamic_cfg(pipe, step_index, timestep, callback_kwargs):
    latents = callback_kwargs["latents"]
    if step_index == 0:
        callback_kwargs["latents"] = latents * 1.01
    if step_index == pipe.num_timesteps - 2:
        pipe._interrupt = True
    return callback_kwargs


video = pipe(
    prompt="a red circle moving right",
    negative_prompt="birds",
    width=704,
    height=480,
    num_frames=161,
    num_inference_steps=50,
    generator=torch.Generator("cuda").manual_seed(0),
    callback_on_step_end=callback_dynamic_cfg,
    callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
).frames[0]
export_to_video(video, "output.mp4", fps=24)
