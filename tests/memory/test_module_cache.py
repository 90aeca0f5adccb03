"""The shelf lends modules and, unless told to keep them, lets go of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from kadr.memory.module_cache import ModuleCache

CPU = torch.device("cpu")


def shelf_that_keeps(*names: str) -> ModuleCache:
    shelf = ModuleCache(CPU, release_pages=lambda tensors: None)
    shelf.names_to_keep = frozenset(names)
    return shelf


class Loads:
    """Counts what was loaded, and what of it is still alive."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.count = 0

    def __call__(self) -> nn.Linear:
        module = nn.Linear(3, 3)
        self.alive.add(module)
        self.count += 1
        return module


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """A module must go when the last one looks away, not when Python next tidies up."""
    gc.freeze()  # what is already there, so that looking for what is not takes no time
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def used(shelf: ModuleCache, name: str, load: Loads) -> None:
    with shelf.acquire(name, load) as module:
        assert isinstance(module, nn.Linear)
        assert len(load.alive) == 1


def test_what_is_not_kept_is_gone_after_its_block() -> None:
    shelf, load = shelf_that_keeps(), Loads()
    for turn in range(3):
        used(shelf, "a", load)
        assert (load.count, len(load.alive)) == (turn + 1, 0)


def test_what_is_kept_is_loaded_once() -> None:
    shelf, load, other = shelf_that_keeps("a", "b"), Loads(), Loads()
    for _ in range(3):
        used(shelf, "a", load)
        used(shelf, "b", other)
    assert (load.count, len(load.alive)) == (other.count, len(other.alive)) == (1, 1)


def test_clearing_lets_go_of_what_was_kept_and_it_is_loaded_again() -> None:
    shelf, load = shelf_that_keeps("a", "b"), Loads()
    used(shelf, "a", load)
    shelf.clear()
    assert not load.alive
    used(shelf, "a", load)
    assert load.count == 2


def test_what_is_not_kept_is_gone_after_an_error_too() -> None:
    shelf, load = shelf_that_keeps(), Loads()
    with pytest.raises(ZeroDivisionError), shelf.acquire("a", load):
        raise ZeroDivisionError
    gc.collect()  # the error's own frames
    assert not load.alive


def test_what_is_kept_outlives_an_error() -> None:
    shelf, load = shelf_that_keeps("a", "b"), Loads()
    with pytest.raises(ZeroDivisionError), shelf.acquire("a", load):
        raise ZeroDivisionError
    used(shelf, "a", load)
    assert load.count == 1


def test_a_load_that_fails_leaves_nothing_and_may_be_tried_again() -> None:
    shelf, load = shelf_that_keeps("a", "b"), Loads()

    def fail() -> nn.Linear:
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"), shelf.acquire("a", fail):
        pass
    used(shelf, "a", load)
    assert load.count == 1


def test_modules_are_lent_ready_for_inference() -> None:
    with shelf_that_keeps().acquire("a", Loads()) as module:
        assert not module.training
        assert not any(weight.requires_grad for weight in module.parameters())
        assert all(weight.device == CPU for weight in module.parameters())


def test_what_was_kept_in_another_way_is_gone_before_it_is_loaded_anew() -> None:
    shelf, load = shelf_that_keeps("a"), Loads()
    with shelf.acquire("a", load, configuration="wide"):
        pass
    with shelf.acquire("a", load, configuration="narrow"):
        assert (load.count, len(load.alive)) == (2, 1)
    with shelf.acquire("a", load, configuration="narrow"):
        assert load.count == 2


def test_pages_of_files_are_let_go_of_even_where_the_module_stays() -> None:
    gone: list[torch.Tensor] = []
    shelf = ModuleCache(CPU, release_pages=gone.extend)
    shelf.names_to_keep = {"a"}
    with shelf.acquire("a", Loads()) as module:
        assert not gone
    assert {tensor.data_ptr() for tensor in gone} == {weight.data_ptr() for weight in module.parameters()}
    assert shelf.cached_names == {"a"}


def test_clearing_may_spare_some() -> None:
    shelf, load, other = shelf_that_keeps("a", "b"), Loads(), Loads()
    used(shelf, "a", load)
    used(shelf, "b", other)
    shelf.clear(keep=["b", "c"])
    assert (len(load.alive), len(other.alive)) == (0, 1)
