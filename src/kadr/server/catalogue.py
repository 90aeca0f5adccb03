"""`Catalogue`: the models and LoRAs that clients may name, and engines that know their headers."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from kadr.errors import KadrError
from kadr.jobs.job import canonical_json
from kadr.quoting import quote
from kadr.server.errors import ApiError
from kadr.spec.model_folders import LORA_KINDS, MODEL_KINDS, ModelFolders

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine

MAX_OPEN_ENGINES = 8  # headers only
_OPENAI_MODEL = re.compile(r"sora-2(-pro)?(-\d{4}-\d{2}-\d{2})?")  # what clients ask for that know no other


@dataclass
class _EngineSlot:
    """An engine that is open, or will be."""

    engine: Engine | None = None
    lock: Lock = field(default_factory=Lock)


@dataclass
class Catalogue:
    """The names that clients may use, and no others: no path of theirs is ever opened.

    Args:
        models: name -> what `Engine.open` takes; the first one is the default.
        folders: of the operator, in which further models and LoRAs are looked up.
        options: further arguments of `Engine.open`.
    """

    models: Mapping[str, str]
    folders: ModelFolders
    options: Mapping[str, Any] = field(default_factory=dict)
    _slots: OrderedDict[str, _EngineSlot] = field(default_factory=OrderedDict, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)

    @property
    def default(self) -> str:
        """Name of the model of requests that name none."""
        return next(iter(self.models))

    def model_names(self) -> list[str]:
        """Returns the names of all models, the default first."""
        return list(dict.fromkeys([*self.models, *self._names(MODEL_KINDS)]))

    def lora_names(self) -> list[str]:
        """Returns the names of all LoRAs."""
        return self._names(LORA_KINDS)

    def find_model(self, name: str | None) -> tuple[str, str]:
        """Returns the name of a model, and what `Engine.open` takes for it.

        Raises:
            ApiError: there is none of that name.
        """
        if name is None or _OPENAI_MODEL.fullmatch(name):
            name = self.default
        if name in self.models:
            return name, self.models[name]
        if (path := self._find(name, MODEL_KINDS)) is not None:
            return name, str(path)
        message = f"this server has no model {quote(name)}. GET /v1/models lists them."
        raise ApiError(404, message, code="model_not_found", param="model")

    def find_lora(self, name: str) -> str:
        """Returns the path of a LoRA.

        Raises:
            ApiError: there is none of that name.
        """
        if (path := self._find(name, LORA_KINDS)) is not None:
            return str(path)
        raise ApiError(
            404,
            f"this server has no LoRA {quote(name)}. GET /v1/loras lists them.",
            code="lora_not_found",
            param="loras",
        )

    def engine(self, options: Mapping[str, Any]) -> Engine:
        """Returns an engine that has read headers, for what it can resolve and plan; it loads no weight.

        Raises:
            KadrError: as `Engine.open`.
        """
        from kadr.pipeline.engine import Engine  # loads torch

        with self._lock:
            slot = self._slots.setdefault(canonical_json(options), _EngineSlot())
            self._slots.move_to_end(canonical_json(options))
            if len(self._slots) > MAX_OPEN_ENGINES:  # all but the default one make room
                plain = {"model": self.models[self.default], "loras": []}
                del self._slots[next(key for key in self._slots if key != canonical_json(plain))]
        with slot.lock:  # others need not wait while one is opened
            if slot.engine is None:
                slot.engine = Engine.open(**{**self.options, **options})
            return slot.engine

    def _find(self, name: str, kinds: Sequence[str]) -> Path | None:
        """Looks a name up in the operator's folders; what is not a plain name is as unknown as any other."""
        try:
            return self.folders.find(name, kinds)
        except KadrError:
            return None

    def _names(self, kinds: Sequence[str]) -> list[str]:
        return [entry.name for entry in self.folders.list_entries() if entry.kind in kinds and entry.problem is None]
