"""The components that a GGUF file lacks, and where they come from, as `kadr quantize` writes that into its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

VAE_FIELD, TEXT_ENCODER_FIELD = "kadr.vae", "kadr.text_encoder"


@dataclass(frozen=True)
class ComponentOrigin:
    """The origin of a component.

    Args:
        name: of a release; None where `path` says it.
        path: absolute path of the file or folder that has it.
    """

    name: str | None = None
    path: str | None = None

    def to_fields(self, field: str) -> dict[str, str]:
        """Returns the fields of a GGUF file; `field` is `VAE_FIELD` or `TEXT_ENCODER_FIELD`."""
        entries = {f"{field}.name": self.name, f"{field}.path": self.path}
        return {key: value for key, value in entries.items() if value is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], field: str) -> ComponentOrigin | None:
        """Returns the origin that a header has; None where it has none."""
        name, path = metadata.get(f"{field}.name"), metadata.get(f"{field}.path")
        return cls(name, path) if name or path else None
