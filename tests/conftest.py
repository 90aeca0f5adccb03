"""What every test may count on: at most two threads, no network, its own cache, a GPU only where it asks for one."""

import gc
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

THREADS = 2
pytest_plugins = ["tests.tiny_engine"]

# Before torch and the hub are imported, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
_threads = min(THREADS, int(os.environ.get("OMP_NUM_THREADS") or THREADS))
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # torch takes the latter for both
    os.environ[_name] = str(_threads)
if "torch" in sys.modules:  # a plugin was faster
    sys.modules["torch"].set_num_threads(_threads)


class NetworkBlocked(RuntimeError):
    """A test tried to leave this machine. Not an OSError, so that no code takes it for bad weather and tries again."""


def is_local(host: Any) -> bool:
    """Whether a host stays on this machine. None and "" are what servers bind to."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuse to look up or connect to any other machine, from the first fixture to the last."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host: Any) -> None:
        if not is_local(host):
            raise NetworkBlocked(f"tests do not use the network; this one asked for {host!r}")

    def guarded(call: Any) -> Any:
        def guard(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address[0])
            return call(self, address)

        return guard

    def look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        check(host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(connect))
        patch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
        patch.setattr(socket, "getaddrinfo", look_up)
        yield


@pytest.fixture(scope="session", autouse=True)
def isolated_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in the home of who runs the tests, nor found there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KADR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def freeze_garbage() -> Iterator[None]:
    """Look for garbage among what the test itself makes: torch and the oracles alone would take a quarter of a second,
    each time a module leaves memory."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def parity(record_property: Callable[[str, object], None]) -> Callable[[str, str, str, float], float]:
    """Notes how far kadr is from an oracle, and returns the error that it is given.

        assert parity("VAE decode", family, "official", relative(ours, expected)) <= 1e-5

    `make parity` runs the tests that ask for this and writes the largest error of each into docs/parity.md.
    """

    def note(stage: str, family: str, oracle: str, error: float) -> float:
        record_property("parity", (stage, family, oracle, error))
        return error

    return note


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked gpu where there is no CUDA; torch is imported only if something is."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
