"""Scaling of a LoRA file's layers: alpha, from a tensor in the file or from the adapter's config."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kadr.checkpoints.lora.key_formats import PEFT, strip_prefix, strip_role
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError, KadrWarning
from kadr.json_reader import parse_json
from kadr.quoting import quote
from kadr.regular_file import read_text
from kadr.validation import is_number

PEFT_WEIGHTS_FILE, PEFT_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # in a folder that PEFT wrote
LORA_ADAPTER_METADATA_KEY = "lora_adapter_metadata"  # diffusers' copy of that config, in the header
# Initializations for which PEFT subtracts the initial adapter from the base weights: on the unchanged base, such an
# adapter is wrong.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
MAX_ALPHA = 1e9  # a larger one is a sign of damage
_UNSUPPORTED_OPTIONS = ("use_dora", "lora_bias")


@dataclass(frozen=True)
class LoraScaling:
    """Source of the alphas: a tensor in the file, PEFT's config, or diffusers' copy of it in the header."""

    source: Source
    config: Mapping[str, Any]

    @classmethod
    def from_source(cls, source: Source, key_format: str) -> LoraScaling:
        """Reads the adapter's config of a file.

        Raises:
            CheckpointError: the config cannot be read, or the adapter is more than pairs of matrices for the unchanged
                model.
        """
        config = _read_adapter_config(source)
        if key_format == PEFT and not config and not any(name.endswith(".alpha") for name in source.infos):
            warnings.warn(
                f"{source.path} has PEFT's keys and no {PEFT_CONFIG_FILE} with alpha; alpha defaults to the rank. Keep "
                f"the config beside it under PEFT's name {PEFT_WEIGHTS_FILE}, or give the folder.",
                KadrWarning,
                stacklevel=5,
            )
        return cls(source, config)

    def layer_alpha_and_scale(self, keys_by_role: Mapping[str, str], rank: int) -> tuple[float | None, float]:
        """Returns a layer's alpha (None if the file does not state it) and the scale of up · down at strength 1.

        Raises:
            CheckpointError: alpha is not a finite number.
        """
        layer = strip_role(keys_by_role["down"])
        if "alpha" in keys_by_role:
            alpha: Any = self.source.read(keys_by_role["alpha"]).float().reshape(-1).tolist()
            alpha = alpha[0] if len(alpha) == 1 else alpha
        elif "lora_alpha" in self.config:
            alpha = self._alpha_by_pattern(strip_prefix(layer))
        else:
            return None, 1.0
        if not is_number(alpha) or abs(alpha) > MAX_ALPHA:
            value = repr(alpha)[:40]
            raise CheckpointError(f"{self.source.path}: alpha of {layer} is {value}, not a number. Download it again.")
        return float(alpha), alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _alpha_by_pattern(self, layer: str) -> Any:
        """Returns alpha by the first pattern that a layer's name ends with, as PEFT matches them; else `lora_alpha`."""
        patterns = self.config.get("alpha_pattern") or {}
        try:
            matches = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
            return next(matches, self.config["lora_alpha"])
        except (AttributeError, re.error) as error:
            raise CheckpointError(
                f"{self.source.path}: alpha_pattern of its config cannot be read: {error}. Download it again."
            ) from error


def _read_adapter_config(source: Source) -> Mapping[str, Any]:
    """Reads PEFT's config of the adapter; returns an empty one where there is none."""
    config_file = source.path.parent / PEFT_CONFIG_FILE
    try:
        if LORA_ADAPTER_METADATA_KEY in source.metadata:
            header_config = parse_json(source.metadata[LORA_ADAPTER_METADATA_KEY])
            config = {key.removeprefix("transformer."): value for key, value in header_config.items()}
        elif source.path.name == PEFT_WEIGHTS_FILE and config_file.is_file():
            config = dict(parse_json(read_text(config_file)))
        else:
            return {}
    except (ValueError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{source.path}: the adapter's config cannot be read: {error}. Download it again."
        ) from error
    _refuse_unsupported_options(source, config)
    return config


def _refuse_unsupported_options(source: Source, config: Mapping[str, Any]) -> None:
    for key in _UNSUPPORTED_OPTIONS:
        if config.get(key):
            raise CheckpointError(
                f"{source.path}: its config has {key} = {quote(config[key])}: more than pairs of matrices, "
                "which kadr does "
                "not support. Use a LoRA without it."
            )
    initialization = config.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.lower().startswith(_BASE_CHANGING_INITS):
        raise CheckpointError(
            f"{source.path}: its config has init_lora_weights = {quote(initialization)}: PEFT changed the "
            "base weights when "
            "training started, so it does not fit the unchanged model. Save it with PEFT's "
            "path_initial_model_for_weight_conversion, which converts it to an ordinary LoRA."
        )
