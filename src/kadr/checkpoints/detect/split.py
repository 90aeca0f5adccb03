"""Splits a single file into its components by tensor names."""

from __future__ import annotations

from collections.abc import Mapping

from kadr.checkpoints.comfy_quant import check_quantized_layers
from kadr.checkpoints.detect.unsupported import T5_KIND, T5_WAY_OUT, refuse_unsupported
from kadr.checkpoints.keys import BARE_TRANSFORMER_PREFIX, TEXT_ENCODER_PREFIX, TRANSFORMER_PREFIX, VAE_PREFIX
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError

# Key prefix -> component. A file of a single component may lack the prefix; then the first word of its keys decides.
TEXT_ENCODER_COMPONENT = "text encoder"
COMPONENT_PREFIXES: Mapping[str, str] = {
    TRANSFORMER_PREFIX: "transformer",
    BARE_TRANSFORMER_PREFIX: "transformer",
    VAE_PREFIX: "vae",
    TEXT_ENCODER_PREFIX: TEXT_ENCODER_COMPONENT,
}
COMPONENT_BY_FIRST_WORD: Mapping[str, str] = {
    "patchify_proj": "transformer",
    "adaln_single": "transformer",
    "caption_projection": "transformer",
    "transformer_blocks": "transformer",
    "scale_shift_table": "transformer",
    "proj_out": "transformer",
    "encoder": "vae",
    "decoder": "vae",
    "per_channel_statistics": "vae",
    "initial_conv": "upscaler",
    "initial_norm": "upscaler",
    "res_blocks": "upscaler",
    "upsampler": "upscaler",
    "post_upsample_res_blocks": "upscaler",
    "final_conv": "upscaler",
    "scaled_fp8": "transformer",  # the marker of a file with scales; see `fp8_scales`
}


def split_components(source: Source) -> dict[str, Source]:
    """Splits a single file into its components, each under its keys without prefix.

    Returns:
        A "transformer", a "vae" or both, and the "text encoder" that a file may hold too; or an "upscaler".

    Raises:
        CheckpointError: it is a file of another kind, or has tensors of no component.
    """
    refuse_unsupported(source)
    check_quantized_layers(source, ("", *COMPONENT_PREFIXES))
    keys: dict[str, dict[str, str]] = {}  # component -> key without prefix -> key in the file
    unexpected = []
    for file_key in source.infos:
        prefix = next((prefix for prefix in COMPONENT_PREFIXES if file_key.startswith(prefix)), "")
        component = COMPONENT_PREFIXES[prefix] if prefix else COMPONENT_BY_FIRST_WORD.get(file_key.partition(".")[0])
        key = file_key.removeprefix(prefix)
        if component is None or key in keys.get(component, ()):  # of no component, or there with and without prefix
            unexpected.append(file_key)
        else:
            keys.setdefault(component, {})[key] = file_key
    if unexpected or not keys:
        raise CheckpointError(
            f"{source.path} is not a checkpoint of the LTX-Video family: {len(unexpected)} of its {len(source.infos)} "
            f"tensors belong to no component that kadr knows, such as {', '.join(unexpected[:5]) or 'none at all'}. "
            "Name an official .safetensors (`kadr models` lists them) or a diffusers folder."
        )
    if keys.keys() == {TEXT_ENCODER_COMPONENT}:
        raise CheckpointError(f"{source.path} is {T5_KIND}. {T5_WAY_OUT}")
    if "upscaler" in keys and len(keys) > 1:
        raise CheckpointError(
            f"{source.path} has tensors of an upscaler, such as {next(iter(keys['upscaler']))}, among those of a "
            "model. Use the two files as released."
        )
    return {component: source.rename_tensors(component_keys) for component, component_keys in keys.items()}
