"""How many bytes of tensors exist while something runs: counted one by one, on any device, also on meta."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the tensors that are made inside its block: `peak_bytes` is the most bytes that there were at once.

    What kernels take for themselves is not among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._storages: dict[int, list[int]] = {}  # bytes, and how many tensors lie in it

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = function(*args, **(kwargs or {}))
        known, storages = {id(tensor) for tensor in given}, {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and id(tensor) not in known:
                self._add(tensor, storages)
        return made

    def _add(self, tensor: Tensor, given: set[int]) -> None:
        key = tensor.untyped_storage()._cdata
        if key not in self._storages:
            if key in given:  # a view of what was there before
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
