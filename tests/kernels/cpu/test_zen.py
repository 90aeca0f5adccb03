"""zentorch is used where it is installed for this torch, unless turned off; its attention is as exact as torch's."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kadr.errors import KadrWarning
from kadr.kernels.cpu import zen
from kadr.kernels.mode import ZENTORCH_VARIABLE
from tests.kernels.cpu.test_attention import exact, inputs, padding_mask, torch_error
from tests.oracles import relative_error


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets zentorch be looked for again, and used, on a CPU that has what it needs."""
    monkeypatch.delenv(ZENTORCH_VARIABLE)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    zen.is_available.cache_clear()
    yield
    zen.is_available.cache_clear()


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ZENTORCH_VARIABLE, "0")
    assert not zen.is_available()
    assert zen.version() is None
    assert not zen.is_attention_supported(*inputs(16, 16), None)


def test_where_it_is_not_installed_it_is_recommended_to_amds_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert not zen.is_available()
    cpus = ("AMD EPYC 9B45", "Intel(R) Xeon(R) 6975P-C", None)
    assert [zen.is_recommended(cpu) for cpu in cpus] == [True, False, False]


def test_a_library_for_another_torch_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_C.so").write_bytes(b"not a library")
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.warns(KadrWarning, match=r"zentorch is installed but not used: .*pip install 'kadr\[amd\]'"):
        assert not zen.is_available()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_its_attention_is_as_exact_as_torchs(
    dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv(ZENTORCH_VARIABLE, "1")
    if not zen.is_available():
        pytest.skip("zentorch is not installed for this torch and CPU")
    q, k, v = (tensor.to(dtype) for tensor in inputs(300, 100, head_dim=head_dim))
    for bias in (None, padding_mask(100, 37, keys=100).to(dtype)):
        error = relative_error(zen.attend(q, k, v, bias), exact(q, k, v, bias))
        assert zen.is_attention_supported(q, k, v, bias)
        assert error <= (1.2 * torch_error(q, k, v, bias) if dtype == torch.bfloat16 else 1e-5)
