"""A source reads headers strictly and maps the bytes instead of reading them."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from tests.checkpoints.checkpoint_files import write_framed, write_sparse

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def random_tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def mapped_ranges(path: Path) -> list[range]:
    """Returns the address ranges of a file in this process's memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    bounds = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    return [range(int(start, 16), int(end, 16)) for start, end in bounds]


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")


# Reading


def test_every_dtype_comes_back_as_it_was_written(tmp_path: Path) -> None:
    tensors = {str(dtype): (random_tensor(3, 5, dtype=torch.float32) * 10).to(dtype) for dtype in DTYPES}
    save_file(tensors, tmp_path / "x.safetensors", {"who": "a test"})
    source = Source.open(tmp_path / "x.safetensors")
    assert source.metadata == {"who": "a test"}
    assert source.infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = source.read(name)
        assert read.dtype == source.infos[name].dtype == tensor.dtype
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_scalars_and_empty_tensors_come_back(tmp_path: Path) -> None:
    save_file({"one": torch.tensor(7.0), "none": torch.zeros(3, 0)}, tmp_path / "x.safetensors")
    source = Source.open(tmp_path / "x.safetensors")
    assert source.read("one").shape == ()
    assert source.read("one").item() == 7.0
    assert source.read("none").shape == (3, 0)


def test_a_tensor_at_an_unaligned_offset_comes_back(tmp_path: Path) -> None:
    values = random_tensor(4, dtype=torch.float32)
    text = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    text += b" " * (1 - len(text) % 2)  # an odd length
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + values.numpy().tobytes())
    assert Source.open(path).infos["x"].file_offset % 4
    assert torch.equal(Source.open(path).read("x"), values)


def test_sizes_are_counted_from_the_header(tmp_path: Path) -> None:
    save_file({"a": random_tensor(10, 10), "b": random_tensor(3, dtype=torch.float32)}, tmp_path / "x.safetensors")
    source = Source.open(tmp_path / "x.safetensors")
    assert (source.size_bytes, source.num_parameters, source.dtype) == (212, 103, torch.bfloat16)


# Mapping


@needs_proc
def test_a_tensor_shares_memory_with_its_file_until_it_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": random_tensor(300, 200), "b": random_tensor(64)}, path)
    source = Source.open(path)
    assert mapped_ranges(path) == []
    first, second = source.read("a"), source.read("b")
    (addresses,) = mapped_ranges(path)
    assert first.data_ptr() in addresses
    assert second.data_ptr() in addresses
    view = first[1:]
    del first, second
    assert mapped_ranges(path)
    del view
    gc.collect()
    assert mapped_ranges(path) == []


def test_reading_26_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    shapes = {f"layer.{i}": (16384, 8192) for i in range(104)}
    source = Source.open(write_sparse(tmp_path / "large.safetensors", shapes))
    assert source.size_bytes > 26e9
    before = psutil.Process().memory_info().rss
    tensors = [source.read(name) for name in source.infos]
    assert all(tensor[-1, -1] == 0 for tensor in tensors)  # one page each
    assert psutil.Process().memory_info().rss - before < 20e6


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": random_tensor(8)}, path)
    before = path.read_bytes()
    Source.open(path).read("a").fill_(1.0)
    assert path.read_bytes() == before


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    path, new = tmp_path / "x.safetensors", tmp_path / "new.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    old = Source.open(path).read("a")
    save_file({"a": torch.ones(4)}, new)
    new.replace(path)
    assert Source.open(path).read("a").tolist() == [1.0] * 4
    assert old.tolist() == [0.0] * 4


def test_a_file_that_shrank_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": random_tensor(1000)}, path)
    source = Source.open(path)
    os.truncate(path, 200)
    with pytest.raises(CheckpointError, match="shrank to 200 bytes"):
        source.read("a")


# Folders


def write_shards(
    folder: Path, *, index: str = "model.safetensors.index.json", stem: str = "model"
) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    tensors = {"a": random_tensor(3), "b": random_tensor(4, 2), "c": random_tensor(5)}
    files = {name: f"{stem}-0000{i}-of-00003.safetensors" for i, name in enumerate(tensors, start=1)}
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / files[name])
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return tensors


@pytest.mark.parametrize(
    ("index", "stem"),
    [
        ("model.safetensors.index.json", "model"),
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model.fp16"),
        ("model.fp16.safetensors.index.json", "model.fp16"),
    ],
)
def test_shards_open_as_one_source(tmp_path: Path, index: str, stem: str) -> None:
    tensors = write_shards(tmp_path, index=index, stem=stem)
    source = Source.open(tmp_path)
    assert source.infos.keys() == tensors.keys()
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "model.bf16.safetensors"),
        (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
        (["diffusion_pytorch_model.safetensors", "notes.safetensors"], "diffusion_pytorch_model.safetensors"),
    ],
)
def test_the_unmarked_weights_are_taken_before_a_variant(tmp_path: Path, present: list[str], expected: str) -> None:
    for name in present:
        save_file({name: random_tensor(1)}, tmp_path / name)
    assert list(Source.open(tmp_path).infos) == [expected]


def test_an_error_names_a_missing_shard(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of its 3 shards: model-00002-of-00003\.safetensors"):
        Source.open(tmp_path)


def test_shards_with_more_tensors_than_any_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = write_shards(tmp_path)
    monkeypatch.setattr("kadr.checkpoints.header.MAX_TENSORS", len(tensors) - 1)  # and in each shard fewer
    with pytest.raises(CheckpointError, match=rf"states {len(tensors)} tensors; kadr reads at most {len(tensors) - 1}"):
        Source.open(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"a": random_tensor(3)}, tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="tensor a is in two"):
        Source.open(tmp_path)


@pytest.mark.parametrize(
    "index",
    ["", "[]", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": "../other/model.safetensors"}}'],
)
def test_an_invalid_shard_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="as an index of shards"):
        Source.open(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights"):
        Source.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle"):
        Source.open(tmp_path)


# Other formats and damaged files


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("x.safetensors", b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        ("x.safetensors", b"\n <html lang=en>", "a web page"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("x.safetensors", b"GGUF\x03\x00\x00\x00" + bytes(64), "a GGUF file without tensors"),
        ("x.gguf", bytes(64), "is not a GGUF file"),
        ("x.safetensors", b"PK\x03\x04" + bytes(64), "a pickle"),
        ("x.ckpt", b"\x80\x02}q\x00." + bytes(64), "a pickle"),
        ("x.pt", bytes(64), "a pickle"),
        ("x.safetensors", b"\x80\x02}q\x00." + bytes(64), "a pickle"),
        ("x.safetensors", b"", r"\(0 bytes\) is not a safetensors file"),
        ("x.safetensors", b"\x02\x00\x00\x00", "is not a safetensors file"),
        ("x.safetensors", bytes(64), "is not a safetensors file"),
        ("x.safetensors", b'{"error": "not found"}', "is not a safetensors file"),
        ("x.safetensors", (1 << 40).to_bytes(8, "little") + b"{", "is not a safetensors file"),
        ("x.safetensors", (900).to_bytes(8, "little") + b'{"a":' + bytes(50), "truncated: it has 63 bytes, .* 908"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_its_kind(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=error):
        Source.open(tmp_path / name)


def test_a_missing_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Source.open(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("change", "error"), [(-1, "is truncated"), (1, "is too long")])
def test_a_file_of_another_length_than_its_header_states_is_refused(tmp_path: Path, change: int, error: str) -> None:
    path = write_sparse(tmp_path / "x.safetensors", {"a": (1000,)})
    size = path.stat().st_size
    os.truncate(path, size + change)
    with pytest.raises(CheckpointError, match=f"{error}: it has {size + change:,} bytes, its header states {size:,}"):
        Source.open(path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b'{"a": nonsense}', "header cannot be read"),
        (b'{"a": "\xff\xfe"}', "header cannot be read"),
        (b'{"__metadata__": [1]}', "not a list of tensors"),
        (b'{"a": 3}', "at the tensor a"),
        (b'{"a": {"dtype": "F32"}}', "at the tensor a"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "does not fill bytes 0 to 4"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}', "at the tensor a"),
        (b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "at the tensor a"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}', "at the tensor a"),
        (b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}', "stored as F4"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, text: bytes, error: str) -> None:
    with pytest.raises(CheckpointError, match=error):
        Source.open(write_framed(tmp_path / "x.safetensors", text, 4))


def test_a_header_longer_than_the_first_read_is_parsed(tmp_path: Path) -> None:
    shapes = {f"a tensor with a rather long name, number {i}": (1,) for i in range(50)}
    assert Source.open(write_sparse(tmp_path / "x.safetensors", shapes)).infos.keys() == shapes.keys()
