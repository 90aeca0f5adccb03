"""LoRAs of a pipeline: loaded by name, weighted and fused by the methods that diffusers has for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kadr.diffusers.locate_model import file_name, release_of_file
from kadr.errors import RequestError
from kadr.models.registry import RELEASES_BY_NAME
from kadr.quoting import quote


@dataclass
class Adapters:
    """The LoRAs of a pipeline.

    Args:
        paths: name -> path or registry name.
        weights: name -> strength, of those that are active.
        is_enabled: they act at all.
        fused_scale: factor that they were fused with; None where they are not.
    """

    paths: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    is_enabled: bool = True
    fused_scale: float | None = None

    def strengths(self, scale: float = 1.0) -> tuple[float, ...]:
        """Returns the strength of each, in the order of loading.

        Args:
            scale: of all of them, as `attention_kwargs` has it.
        """
        scale = scale * (self.is_enabled or self.fused_scale is not None)
        return tuple(self.weights.get(name, 0.0) * scale for name in self.paths)


class LoraMethods:
    """Methods of a pipeline for its LoRAs. What they change takes effect at the next call."""

    adapters: Adapters

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, adapter_name: str | None = None, **options: Any
    ) -> None:
        """Adds a LoRA, the only active one from now on, with strength 1.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder with `weight_name`, a registry name or a repository.

        Raises:
            RequestError: it is a dictionary of tensors, the name is taken, or the registry has no such repository.
        """
        weight_name = options.pop("weight_name", None)
        refuse_options("load_lora_weights", options, harmless=("low_cpu_mem_usage", "prefix"))
        self._refuse_if_fused("load another LoRA")
        if isinstance(pretrained_model_name_or_path_or_dict, Mapping):
            raise RequestError("a LoRA is given as tensors; save them as a .safetensors file and pass its path.")
        name = adapter_name or f"default_{len(self.adapters.paths)}"
        if name in self.adapters.paths:
            raise RequestError(f"the pipeline has a LoRA named {quote(name)} already; give another adapter_name.")
        self.adapters.paths[name] = _lora_path(str(pretrained_model_name_or_path_or_dict), weight_name)
        self.adapters.weights = {name: 1.0}  # diffusers, too, lets the last one act alone

    def set_adapters(self, adapter_names: str | list[str], adapter_weights: Any = None) -> None:
        """Makes these LoRAs the active ones, with these strengths, 1 where none is given.

        Raises:
            RequestError: an unknown name, or another number of strengths.
        """
        self._refuse_if_fused("change strengths")
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        self._check_names(names)
        if len(weights) != len(names):
            raise RequestError(f"{len(weights)} adapter_weights are given for {len(names)} LoRAs; give one for each.")
        if any(isinstance(weight, Mapping) for weight in weights):
            raise RequestError("adapter_weights has strengths for single blocks; kadr has one strength for each LoRA.")
        self.adapters.weights = {
            name: 1.0 if weight is None else float(weight) for name, weight in zip(names, weights, strict=True)
        }
        self.adapters.is_enabled = True

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """Removes LoRAs."""
        self._refuse_if_fused("delete LoRAs")
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names(names)
        for name in names:
            del self.adapters.paths[name]
            self.adapters.weights.pop(name, None)

    def unload_lora_weights(self) -> None:
        """Removes all LoRAs, fused ones too."""
        self.adapters = Adapters()

    def fuse_lora(self, components: list[str] | None = None, lora_scale: float = 1.0, **options: Any) -> None:
        """Adds the active LoRAs to the weights when these are loaded, times `lora_scale`.

        Raises:
            RequestError: other components than the transformer, or an unknown LoRA.
        """
        names = options.pop("adapter_names", None)
        refuse_options("fuse_lora", options, harmless=("safe_fusing",))
        if components not in (None, ["transformer"]):
            raise RequestError(f"components is {quote(components)}; only the transformer has LoRAs.")
        if names is not None:
            self._check_names(names)
            self.adapters.weights = {name: self.adapters.weights.get(name, 1.0) for name in names}
        self.adapters.fused_scale = float(lora_scale)

    def unfuse_lora(self, components: list[str] | None = None) -> None:
        """Takes the LoRAs out of the weights again."""
        self.adapters.fused_scale = None

    def disable_lora(self) -> None:
        """Lets no LoRA act until `enable_lora`."""
        self._refuse_if_fused("disable LoRAs")
        self.adapters.is_enabled = False

    def enable_lora(self) -> None:
        """Lets the active LoRAs act again."""
        self.adapters.is_enabled = True

    def get_active_adapters(self) -> list[str]:
        """Returns the names of the active LoRAs."""
        return list(self.adapters.weights) if self.adapters.is_enabled else []

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Returns the names of all LoRAs, by component."""
        return {"transformer": list(self.adapters.paths)} if self.adapters.paths else {}

    def _refuse_if_fused(self, what: str) -> None:
        if self.adapters.fused_scale is not None:
            raise RequestError(f"the LoRAs are fused; call unfuse_lora or unload_lora_weights before you {what}.")

    def _check_names(self, names: list[str]) -> None:
        if unknown := [name for name in names if name not in self.adapters.paths]:
            known = ", ".join(self.adapters.paths) or "none"
            raise RequestError(f"the pipeline has no LoRA named {', '.join(map(quote, unknown))}; it has: {known}.")


def _lora_path(name: str, weight_name: str | None) -> str:
    folder = Path(name)
    if folder.is_dir() and weight_name is not None:
        return str(folder / weight_name)
    if folder.exists() or name in RELEASES_BY_NAME:
        return name
    if (link := file_name(name)) != name:
        return link
    if name.count("/") == 1 and not name.startswith((".", "~")) and not name.endswith(".safetensors"):
        return release_of_file(name, weight_name)
    return name


def refuse_options(method: str, options: Mapping[str, Any], *, harmless: tuple[str, ...] = (), hint: str = "") -> None:
    """Refuses keyword arguments that the door cannot act on; those that are None, or harmless, pass.

    Raises:
        RequestError: names them.
    """
    refused = [name for name, value in options.items() if value is not None and name not in harmless]
    if refused:
        raise RequestError(f"{method} of kadr.diffusers does not take {', '.join(refused)}. {hint or 'Leave it out.'}")
