"""LoRAs: all of their tensors reach the transformer, none is empty, and each changes the velocity."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from kadr.checkpoints.lora.file import LoraFile
from kadr.models.lora_layers import lora_linears
from kadr.quant.convert import in_block
from kadr.selftest.result import Check, NotRun, none_of
from kadr.selftest.subject import Subject

# |v with - v without| over |v without| at strength 1 and sigma 0.5: the demo's LoRAs have 0.05 to 0.5. Weights of
# another model or scale give more than the velocity itself.
MIN_LORA_EFFECT, MAX_LORA_EFFECT = 1e-3, 1.0
_LORA_SIGMA = 0.5


def check_loras(subject: Subject) -> Iterator[Check]:
    """Loads each LoRA of the model and compares velocities with and without it."""
    loras = subject.spec.loras
    if not loras:
        raise NotRun("no LoRA was given")
    num_blocks = subject.spec.transformer_config.num_layers
    for file in loras.files:
        name = Path(file.path).name
        yield none_of(f"unexpected keys of {name}", list(file.unexpected_keys))
        yield none_of(f"layers of {name} with a matrix of zeros", _empty_layers(file))
        yield none_of(f"targets of {name} that some blocks lack", _ragged_targets(file, num_blocks))
    if loras.is_merged:
        return  # they cannot be switched off
    prompt, latents, count = subject.embeddings[0], subject.latents, len(loras.entries)
    with subject.clip_denoiser() as model:
        attached = sum(len(layer.segments) for layer in lora_linears(model.module))
        expected = sum(len(file.layers) for file in loras.files)
        yield Check("layers with a LoRA attached", attached, expected, expected)
        plain, _ = model.predict_clip(_LORA_SIGMA, prompt, latents)
    for index, file in enumerate(loras.files):
        strengths = [float(index == position) for position in range(count)]
        with subject.clip_denoiser(lora_strengths=strengths) as model:
            adapted, _ = model.predict_clip(_LORA_SIGMA, prompt, latents)
        effect = float((adapted - plain).norm() / plain.norm())
        yield Check(f"effect of {Path(file.path).name}", effect, MIN_LORA_EFFECT, MAX_LORA_EFFECT)


def _empty_layers(file: LoraFile) -> list[str]:
    """Returns the layers whose product adds nothing: a trainer begins with B = 0, and loading half leaves it so."""
    return [name for name, weights in file.load().items() if not (bool(weights.down.any()) and bool(weights.up.any()))]


def _ragged_targets(file: LoraFile, num_blocks: int) -> list[str]:
    """Returns the layers of a block that are adapted in some blocks and not in all, as a file cut short has them."""
    blocks: dict[str, set[str]] = defaultdict(set)
    for name in filter(in_block, file.layers):
        _, index, target = name.split(".", 2)
        blocks[target].add(index)
    return [f"{target} in {len(found)} of {num_blocks}" for target, found in blocks.items() if len(found) < num_blocks]
