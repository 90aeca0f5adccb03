"""Guarantees for every test: at most two threads, no network, a cache of its own, a GPU only for tests marked gpu."""

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

# Set before torch and the hub are imported; processes that tests start inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["KADR_ZENTORCH"] = "0"  # results do not depend on what is installed; tests of zentorch turn it on
_threads = min(THREADS, int(os.environ.get("OMP_NUM_THREADS") or THREADS))
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # torch reads the latter for both
    os.environ[_name] = str(_threads)
if "torch" in sys.modules:  # a plugin has imported torch already
    sys.modules["torch"].set_num_threads(_threads)


class NetworkBlocked(RuntimeError):
    """A test tried to use the network. Not an OSError, so that no code takes it for an outage and retries."""


def is_local(host: Any) -> bool:
    """Tells if a host is this machine. Servers bind to None and ""."""
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
    """Refuses to look up or connect to any other machine, from the first fixture to the last."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host: Any) -> None:
        if not is_local(host):
            raise NetworkBlocked(f"tests do not use the network; this one connects to {host!r}")

    def wrap_connect(original: Any) -> Any:
        def checked_connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address[0])
            return original(self, address)

        return checked_connect

    def checked_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        check(host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", wrap_connect(connect))
        patch.setattr(socket.socket, "connect_ex", wrap_connect(connect_ex))
        patch.setattr(socket, "getaddrinfo", checked_getaddrinfo)
        yield


@pytest.fixture(scope="session", autouse=True)
def isolated_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Points the cache and the config file to temporary folders, away from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KADR_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        patch.delenv("KADR_MODELS", raising=False)
        yield


@pytest.fixture(autouse=True)
def named_by_fields() -> Iterator[None]:
    """Lets messages name fields again after a test that ran the command line in this process."""
    from kadr.setting_names import name_settings_by_flags

    yield
    name_settings_by_flags(False)


@pytest.fixture(autouse=True)
def freeze_garbage() -> Iterator[None]:
    """Limits garbage collection to objects of the test: scanning torch and the oracles takes a quarter of a second each
    time a module leaves memory."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """Turns garbage collection off: what is freed is freed with its last reference, and is in no reference cycle."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def parity(record_property: Callable[[str, object], None]) -> Callable[[str, str, str, float], float]:
    """Records the error between kadr and an oracle, and returns it.

        assert parity("VAE decode", family, "official", relative_error(ours, expected)) <= 1e-5

    `make parity` runs the tests that use this fixture and writes the largest error of each into docs/parity.md.
    """

    def record(stage: str, family: str, oracle: str, error: float) -> float:
        record_property("parity", (stage, family, oracle, error))
        return error

    return record


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked gpu if there is no CUDA device; imports torch only if a test is marked."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
