import torch
from diffusers import LTXPipeline

pipe = LTXPipeline.from_pretrained("Lightricks/LTX-Video", torch_dtype=torch.float32).to("cuda")

prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask = pipe.encode_prompt(
    prompt="a red circle moving right", negative_prompt="worst quality", do_classifier_free_guidance=True
)
(video,) = pipe(
    prompt_embeds=prompt_embeds,
    prompt_attention_mask=prompt_attention_mask,
    negative_prompt_embeds=negative_prompt_embeds,
    negative_prompt_attention_mask=negative_prompt_attention_mask,
    width=704,
    height=480,
    num_frames=161,
    num_inference_steps=50,
    guidance_scale=5.0,
    generator=torch.Generator("cuda").manual_seed(0),
    output_type="pt",
    return_dict=False,
)
video = video[0]
