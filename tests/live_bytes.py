"""Counts the bytes of live tensors while something runs, one by one, on any device, also on meta."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the tensors created inside its context: `peak_bytes` is their peak.

    Workspace of kernels is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._storages: dict[int, list[int]] = {}  # key -> [bytes, number of tensors in the storage]

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = function(*args, **(kwargs or {}))
        input_ids = {id(tensor) for tensor in inputs}
        input_storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and id(tensor) not in input_ids:
                self._add(tensor, input_storages)
        return outputs

    def _add(self, tensor: Tensor, input_storages: set[int]) -> None:
        key = tensor.untyped_storage()._cdata
        if key not in self._storages:
            if key in input_storages:  # a view of an input
                return
            self._storages[key] = [tensor.untyped_storage().nbytes(), 0]
            self.live_bytes += self._storages[key][0]
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._storages[key][1] += 1
        weakref.finalize(tensor, self._drop, key)

    def _drop(self, key: int) -> None:
        storage = self._storages[key]
        storage[1] -= 1
        if not storage[1]:
            self.live_bytes -= storage[0]
            del self._storages[key]
