"""Pipeline configs of the official package, restated: name -> YAML.

The package has removed those of 0.9.7; their last version equals that of 0.9.8.
"""

from __future__ import annotations

COMMON_SETTINGS = """
stg_mode: "attention_values" # options: "attention_values", "attention_skip", "residual", "transformer_block"
decode_timestep: 0.05
decode_noise_scale: 0.025
text_encoder_model_name_or_path: "PixArt-alpha/PixArt-XL-2-1024-MS"
precision: "{precision}"
sampler: "from_checkpoint" # options: "uniform", "linear-quadratic", "from_checkpoint"
prompt_enhancement_words_threshold: 120
prompt_enhancer_image_caption_model_name_or_path: "MiaoshouAI/Florence-2-large-PromptGen-v2.0"
prompt_enhancer_llm_model_name_or_path: "unsloth/Llama-3.2-3B-Instruct"
stochastic_sampling: {stochastic}
"""
BASE = """pipeline_type: base
checkpoint_path: "{file}.safetensors"
{settings}"""
MULTI_SCALE = """pipeline_type: multi-scale
checkpoint_path: "{file}.safetensors"
downscale_factor: 0.6666666
spatial_upscaler_model_path: "ltxv-spatial-upscaler-{version}.safetensors"
"""
DEV_2B = """guidance_scale: 3
stg_scale: 1
rescaling_scale: 0.7
skip_block_list: [19]
num_inference_steps: 40"""
STOCHASTIC_2B = """guidance_scale: 1
stg_scale: 0
rescaling_scale: 1
num_inference_steps: 8"""
DEV = """
first_pass:
  guidance_scale: [1, 1, 6, 8, 6, 1, 1]
  stg_scale: [0, 0, 4, 4, 4, 2, 1]
  rescaling_scale: [1, 1, 0.5, 0.5, 1, 1, 1]
  guidance_timesteps: [1.0, 0.996, 0.9933, 0.9850, 0.9767, 0.9008, 0.6180]
  skip_block_list: [[], [11, 25, 35, 39], [22, 35, 39], [28], [28], [28], [28]]
  num_inference_steps: 30
  skip_final_inference_steps: 3
  cfg_star_rescale: true

second_pass:
  guidance_scale: [1]
  stg_scale: [1]
  rescaling_scale: [1]
  guidance_timesteps: [1.0]
  skip_block_list: [27]
  num_inference_steps: 30
  skip_initial_inference_steps: 17
  cfg_star_rescale: true
"""
DISTILLED = """
first_pass:
  timesteps: [1.0000, 0.9937, 0.9875, 0.9812, 0.9750, 0.9094, 0.7250]
  guidance_scale: 1
  stg_scale: 0
  rescaling_scale: 1
  skip_block_list: [42]

second_pass:
  timesteps: [0.9094, 0.7250, 0.4219]
  guidance_scale: 1
  stg_scale: 0
  rescaling_scale: 1
  skip_block_list: [42]
"""
TONE_MAP = "  tone_map_compression_ratio: 0.6\n"


def _base(file: str, settings: str, *, stochastic: str = "false") -> str:
    return BASE.format(file=file, settings=settings) + COMMON_SETTINGS.format(
        precision="bfloat16", stochastic=stochastic
    )


def _multi_scale(file: str, passes: str) -> str:
    version = next(part for part in file.split("-") if part.startswith("0."))
    precision = "float8_e4m3fn" if file.endswith("-fp8") else "bfloat16"
    top = MULTI_SCALE.format(file=file, version=version)
    return top + COMMON_SETTINGS.format(precision=precision, stochastic="false") + passes


OFFICIAL_CONFIGS: dict[str, str] = {
    "ltxv-2b-0.9": _base("ltx-video-2b-v0.9", DEV_2B),
    "ltxv-2b-0.9.1": _base("ltx-video-2b-v0.9.1", DEV_2B),
    "ltxv-2b-0.9.5": _base("ltx-video-2b-v0.9.5", DEV_2B),
    "ltxv-2b-0.9.6-dev": _base("ltxv-2b-0.9.6-dev-04-25", DEV_2B),
    "ltxv-2b-0.9.6-distilled": _base("ltxv-2b-0.9.6-distilled-04-25", STOCHASTIC_2B, stochastic="true"),
    **{
        file: _multi_scale(file, passes)
        for model, passes in {
            "ltxv-2b-0.9.8-distilled": DISTILLED,
            "ltxv-13b-0.9.7-dev": DEV,
            "ltxv-13b-0.9.7-distilled": DISTILLED,
            "ltxv-13b-0.9.8-dev": DEV,
            "ltxv-13b-0.9.8-distilled": DISTILLED + TONE_MAP,
        }.items()
        for file in (model, f"{model}-fp8")
    },
}
