"""The module cache frees modules after use, except those it is told to keep."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from kadr.memory.module_cache import ModuleCache

pytestmark = pytest.mark.usefixtures("no_garbage_collection")
CPU = torch.device("cpu")


def cache_that_keeps(*names: str) -> ModuleCache:
    cache = ModuleCache(CPU)
    cache.names_to_keep = frozenset(names)
    return cache


class CountingLoader:
    """Counts the modules it loads, and those still alive."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.count = 0

    def __call__(self) -> nn.Linear:
        module = nn.Linear(3, 3)
        self.alive.add(module)
        self.count += 1
        return module


def use(cache: ModuleCache, name: str, load: CountingLoader) -> None:
    with cache.acquire(name, load) as module:
        assert isinstance(module, nn.Linear)
        assert len(load.alive) == 1


def test_module_not_kept_is_freed_after_use() -> None:
    cache, load = cache_that_keeps(), CountingLoader()
    for turn in range(3):
        use(cache, "a", load)
        assert (load.count, len(load.alive)) == (turn + 1, 0)


def test_kept_module_is_loaded_once() -> None:
    cache, load, other = cache_that_keeps("a", "b"), CountingLoader(), CountingLoader()
    for _ in range(3):
        use(cache, "a", load)
        use(cache, "b", other)
    assert (load.count, len(load.alive)) == (other.count, len(other.alive)) == (1, 1)


def test_clear_frees_kept_modules() -> None:
    cache, load = cache_that_keeps("a", "b"), CountingLoader()
    use(cache, "a", load)
    cache.clear()
    assert not load.alive
    use(cache, "a", load)
    assert load.count == 2


def test_module_not_kept_is_freed_after_an_error() -> None:
    cache, load = cache_that_keeps(), CountingLoader()
    with pytest.raises(ZeroDivisionError), cache.acquire("a", load):
        raise ZeroDivisionError
    gc.collect()  # the frames of the error
    assert not load.alive


def test_kept_module_outlives_an_error() -> None:
    cache, load = cache_that_keeps("a", "b"), CountingLoader()
    with pytest.raises(ZeroDivisionError), cache.acquire("a", load):
        raise ZeroDivisionError
    use(cache, "a", load)
    assert load.count == 1


def test_failed_load_leaves_nothing_and_may_be_retried() -> None:
    cache, load = cache_that_keeps("a", "b"), CountingLoader()

    def fail() -> nn.Linear:
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"), cache.acquire("a", fail):
        pass
    use(cache, "a", load)
    assert load.count == 1


def test_acquired_modules_are_ready_for_inference() -> None:
    with cache_that_keeps().acquire("a", CountingLoader()) as module:
        assert not module.training
        assert not any(weight.requires_grad for weight in module.parameters())
        assert all(weight.device == CPU for weight in module.parameters())


def test_other_configuration_is_freed_before_the_new_one_loads() -> None:
    cache, load = cache_that_keeps("a"), CountingLoader()
    with cache.acquire("a", load, configuration="wide"):
        pass
    with cache.acquire("a", load, configuration="narrow"):
        assert (load.count, len(load.alive)) == (2, 1)
    with cache.acquire("a", load, configuration="narrow"):
        assert load.count == 2


def test_mapped_pages_are_released_even_if_the_module_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[torch.Tensor] = []
    monkeypatch.setattr("kadr.memory.module_cache.release_pages", released.extend)
    cache = ModuleCache(CPU)
    cache.names_to_keep = {"a"}
    with cache.acquire("a", CountingLoader()) as module:
        assert not released
    assert {tensor.data_ptr() for tensor in released} == {weight.data_ptr() for weight in module.parameters()}
    assert cache.cached_names == {"a"}


def test_clear_can_keep_some_modules() -> None:
    cache, load, other = cache_that_keeps("a", "b"), CountingLoader(), CountingLoader()
    use(cache, "a", load)
    use(cache, "b", other)
    cache.clear(keep=["b", "c"])
    assert (len(load.alive), len(other.alive)) == (0, 1)
