"""Verbs and flags of the command line. Scripts depend on them: change this list only with a reason."""

from pathlib import Path

import pytest
import typer

from kadr.cli.flags.official import (
    ALIASES,
    CONDITIONING_FRAMES,
    CONDITIONING_PATHS,
    CONDITIONING_STRENGTHS,
    OFFLOAD_TO_CPU,
    SIZE_FLAGS,
)
from kadr.cli.main import app

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
_MODEL = """--model --release --config --upscaler --second-model --text-encoder --vae --models-dir --lora --lora-partial
    --merge-loras --dtype --no-prompt-cache --quant --compile --offload --device"""
_REST = """--image --video --control --input-video --denoise-strength --image-noise --image-crf --steps --sigmas
    --skip-initial --skip-final --sampler --cache --cache-threshold --cache-interval --guidance --guidance-sigmas
    --stg --rescale --skip-blocks --stg-mode --cfg-star --no-cfg-star --apg --apg-norm --guidance-batch
    --multi-scale --single-pass --second-steps --second-sigmas --second-skip-initial --second-sampler
    --second-guidance --second-tone-map --tone-map --decode-timestep --decode-noise"""
_WINDOWS = "--window --overlap --overlap-strength --adain --anchor-strength"
VERBS = {
    "generate": f"""PROMPT --size --frames --seconds --fps --seed --negative-prompt --variations --prompt-file
        --enhance --enhance-model --enhance-required --enhance-timeout {_WINDOWS} --output
        --codec --crf --keep-audio --no-metadata --resume --preview --json --dry-run --save-latents {_MODEL} {_REST}""",
    "plan": f"""PROMPT --size --frames --seconds --fps --seed --negative-prompt {_WINDOWS} --json --calibrate
        {_MODEL} {_REST}""",
    "doctor": f"""PROMPT --size --frames --seconds --fps --seed --negative-prompt --variations --prompt-file
        --enhance --enhance-model --enhance-required --enhance-timeout {_WINDOWS} --output
        --codec --crf --keep-audio --no-metadata --resume --preview --json --dry-run --save-latents {_MODEL} {_REST}""",
    "batch": f"""FILE --out --retry-failed --dry-run --json --size --frames --seconds --fps --seed --negative-prompt
        {_WINDOWS} {_MODEL} {_REST}""",
    "rerun": """FILE --output --seed --model --release --device --resume --codec --crf --keep-audio --no-metadata
        --preview --json""",
    "inspect": "NAME|PATH --release --models-dir --json",
    "train-lora": """DIR --model --release --output --size --frames --rank --target-modules --steps --batch-size
        --learning-rate --sigma-sampling --first-frame-conditioning-p --caption-dropout-p --references
        --validation-prompt --validate-every --save-every --skip-broken --quant --device --dtype --seed
        --text-encoder --vae --models-dir --json""",
    "quantize": "IN OUT --type --release --models-dir --force",
    "convert": "IN OUT --dtype --models-dir --force",
    "bench": """--model --size --stage --schedule --prompt-tokens --suite --variant --num-layers --rounds
        --no-reference --device --model-folder --json""",
    "selftest": """MODEL --lora --release --text-encoder --vae --upscaler --models-dir --device --dtype --quant
        --offload --json""",
    "serve": """--model --models-dir --data --host --port --tokens --new-token --admin --allow-host --allow-origin
        --device --dtype --quant --offload --text-encoder --vae --upscaler --max-queued --max-queued-per-client
        --keep-days --keep-gb --max-upload-mb --paused --hide-prompts""",
    "models": "--models-dir --json",
}
OFFICIAL = """--num_frames --frame_rate --num_inference_steps --guidance_scale --negative_prompt --output_path
    --image_cond_noise_scale --skip_initial_inference_steps --skip_final_inference_steps --decode_timestep
    --decode_noise_scale --width --height --conditioning_media_paths --conditioning_start_frames
    --conditioning_strengths --pipeline_config --input_media_path --spatial_upscaler_model_path --stg_scale --stg_mode
    --rescaling_scale --skip_block_list --guidance_timesteps --timesteps --tone_map_compression_ratio
    --offload_to_cpu"""


def test_verbs_are_these() -> None:
    assert list(typer.main.get_command(app).commands) == list(VERBS)


@pytest.mark.parametrize("verb, flags", VERBS.items())
def test_flags_of_a_verb_are_these(verb: str, flags: str) -> None:
    command = typer.main.get_command(app).commands[verb]
    actual = []
    for parameter in command.params:
        is_option = parameter.param_type_name == "option"
        actual += [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.metavar]
    assert actual == flags.split() + ([] if verb == "models" else ["--quiet", "-q"])  # models is a group of verbs


def test_official_flags_are_these() -> None:
    assert {
        *ALIASES,
        *SIZE_FLAGS,
        CONDITIONING_PATHS,
        CONDITIONING_FRAMES,
        CONDITIONING_STRENGTHS,
        OFFLOAD_TO_CPU,
    } == set(OFFICIAL.split())


def test_every_flag_is_in_the_reference() -> None:
    text = REFERENCE.read_text("utf-8")
    flags = [flag for flags in (*VERBS.values(), OFFICIAL) for flag in flags.split()]
    assert [flag for flag in flags if flag.strip("-") not in text] == []
