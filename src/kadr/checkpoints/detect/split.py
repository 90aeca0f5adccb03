"""Which component of a single file a tensor belongs to, by its name."""

from __future__ import annotations

from collections.abc import Mapping

from kadr.checkpoints.detect.unsupported import refuse_unsupported
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError

# Prefix -> component. A file of one component may leave the prefix out; then these are the first words of its names.
COMPONENT_PREFIXES: Mapping[str, str] = {"model.diffusion_model.": "transformer", "vae.": "vae"}
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
    "initial_conv": "upsampler",
    "initial_norm": "upsampler",
    "res_blocks": "upsampler",
    "upsampler": "upsampler",
    "post_upsample_res_blocks": "upsampler",
    "final_conv": "upsampler",
    "scaled_fp8": "transformer",  # the marker of a file with scales; see `scales`
}


def split_components(source: Source) -> dict[str, Source]:
    """The components of a single file, each under its names without prefix.

    They are a "transformer", a "vae" or both; or an "upsampler".

    Raises:
        CheckpointError: it is a file of another kind, or holds tensors of no component.
    """
    refuse_unsupported(source)
    names: dict[str, dict[str, str]] = {}
    strangers = []
    for name in source.infos:
        prefix = next((prefix for prefix in COMPONENT_PREFIXES if name.startswith(prefix)), "")
        component = COMPONENT_PREFIXES[prefix] if prefix else COMPONENT_BY_FIRST_WORD.get(name.partition(".")[0])
        bare = name.removeprefix(prefix)
        if component is None or bare in names.get(component, ()):  # known to neither, or there with and without prefix
            strangers.append(name)
        else:
            names.setdefault(component, {})[bare] = name
    if strangers or not names:
        raise CheckpointError(
            f"{source.path} is not a checkpoint of the LTX-Video family: {len(strangers)} of its {len(source.infos)} "
            f"tensors are of no component that kadr knows, such as {', '.join(strangers[:5]) or 'none at all'}. "
            "Name an official .safetensors (`kadr models` lists them) or a diffusers folder."
        )
    if "upsampler" in names and len(names) > 1:
        raise CheckpointError(
            f"{source.path} has tensors of an upscaler, such as {next(iter(names['upsampler']))}, among those of a "
            "model. Take the two files as they were released."
        )
    return {component: source.rename_tensors(found) for component, found in names.items()}
