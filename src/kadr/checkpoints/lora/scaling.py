"""How strongly a LoRA file means its layers: alphas, from a tensor of their own or from the adapter's config."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kadr.checkpoints.lora.key_formats import PEFT, strip_prefix, strip_role
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError, KadrWarning

PEFT_WEIGHTS_FILE, PEFT_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # of a folder that PEFT wrote
LORA_ADAPTER_METADATA_KEY = "lora_adapter_metadata"  # diffusers' copy of that config, in the header
# Ways to begin with which PEFT takes away from the base what the adapter begins as: to the base as it is, the adapter
# means something else.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
MAX_ALPHA = 1e9  # an alpha that is no damage
_UNSUPPORTED_OPTIONS = ("use_dora", "lora_bias")


@dataclass(frozen=True)
class LoraScaling:
    """Where alphas come from: a tensor of their own, PEFT's config, or diffusers' copy of it in the header."""

    source: Source
    config: Mapping[str, Any]

    @classmethod
    def from_source(cls, source: Source, key_format: str) -> LoraScaling:
        """Of a file whose names are of a family.

        Raises:
            CheckpointError: the config cannot be read, or says that the adapter is more than pairs of matrices for the
                model as it is.
        """
        config = _read_adapter_config(source)
        if key_format == PEFT and not config and not any(name.endswith(".alpha") for name in source.infos):
            warnings.warn(
                f"{source.path} has the names of PEFT, and no {PEFT_CONFIG_FILE} that says its alpha; it is taken to be "
                f"the rank. Keep the config beside it, and the name {PEFT_WEIGHTS_FILE}, or give the folder.",
                KadrWarning,
                stacklevel=4,
            )
        return cls(source, config)

    def layer_alpha_and_scale(self, keys_by_role: Mapping[str, str], rank: int) -> tuple[float | None, float]:
        """Alpha, None where the file does not say, and what up · down is multiplied with at strength 1.

        Raises:
            CheckpointError: alpha is no finite number.
        """
        layer = strip_role(keys_by_role["down"])
        if "alpha" in keys_by_role:
            said: Any = self.source.read(keys_by_role["alpha"]).float().reshape(-1).tolist()
            said = said[0] if len(said) == 1 else said
        elif "lora_alpha" in self.config:
            said = self._alpha_by_pattern(strip_prefix(layer))
        else:
            return None, 1.0
        if not isinstance(said, int | float) or isinstance(said, bool) or not abs(said) <= MAX_ALPHA:
            told = repr(said)[:40]
            raise CheckpointError(f"{self.source.path}: alpha of {layer} is {told}, no number. Download it again.")
        return float(said), said / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _alpha_by_pattern(self, layer: str) -> Any:
        """Alpha by the first pattern that a layer's name ends with, as PEFT matches them; else that of all."""
        patterns = self.config.get("alpha_pattern") or {}
        try:
            found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
            return next(found, self.config["lora_alpha"])
        except (AttributeError, re.error) as error:
            raise CheckpointError(
                f"{self.source.path}: alpha_pattern of its config cannot be read: {error}. Download it again."
            ) from error


def _read_adapter_config(source: Source) -> Mapping[str, Any]:
    """PEFT's config of the adapter; empty where there is none."""
    beside = source.path.parent / PEFT_CONFIG_FILE
    try:
        if LORA_ADAPTER_METADATA_KEY in source.metadata:
            packed = json.loads(source.metadata[LORA_ADAPTER_METADATA_KEY])
            said = {key.removeprefix("transformer."): value for key, value in packed.items()}
        elif source.path.name == PEFT_WEIGHTS_FILE and beside.is_file():
            said = dict(json.loads(beside.read_text("utf-8")))
        else:
            return {}
    except (ValueError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{source.path}: the adapter's config cannot be read: {error}. Download it again."
        ) from error
    _refuse_unsupported_options(source, said)
    return said


def _refuse_unsupported_options(source: Source, config: Mapping[str, Any]) -> None:
    for key in _UNSUPPORTED_OPTIONS:
        if config.get(key):
            raise CheckpointError(
                f"{source.path}: its config has {key} = {config[key]!r}: more than pairs of matrices, which kadr does "
                "not read. Take the LoRA without it."
            )
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_BASE_CHANGING_INITS):
        raise CheckpointError(
            f"{source.path}: its config has init_lora_weights = {begun!r}: it was trained on a base from which its "
            "beginning was taken away, and does not fit the model as it is. Save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes an ordinary LoRA of it."
        )
