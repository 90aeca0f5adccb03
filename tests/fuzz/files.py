"""Valid files to start from, and strategies for hostile ones of the same kinds."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from kadr.media.clip import read_metadata
from kadr.media.writer import VideoWriter
from kadr.shapes import Size
from tests import tiny_models
from tests.fuzz.values import damage, json_values, nested, replace_value, texts
from tests.stored_files import STORED_FILES

ASSETS = Path(__file__).parents[2] / "src" / "kadr" / "assets" / "demo"
HEADER_DAMAGE = 4096  # bytes at the beginning of a container that are worth damaging


@cache
def tiny_folder() -> dict[str, bytes]:
    """The files of a whole tiny model, by their names."""
    with TemporaryDirectory() as name:
        folder = tiny_models.write_model(Path(name))
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@cache
def tiny_upscaler() -> bytes:
    with TemporaryDirectory() as name:
        return tiny_models.write_random_upscaler(Path(name) / "upscaler.safetensors").read_bytes()


@cache
def demo_lora() -> bytes:
    return (ASSETS / "demo-lora-teal.safetensors").read_bytes()


@cache
def stored_video() -> tuple[bytes, dict[str, Any]]:
    """A video of kadr and its metadata, small enough to be made again at once."""
    path = STORED_FILES / "video.mp4"
    metadata = read_metadata(path)
    metadata["model"], metadata["vae"], metadata["text_encoder"] = "gone", "gone", "gone"
    metadata["request"] |= {"size": "32x32", "frames": 1, "steps": 1}
    return path.read_bytes(), metadata


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: str, tensors: bytes) -> bytes:
    raw = header.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + tensors


@st.composite
def safetensors(draw: Any, original: Callable[[], bytes]) -> bytes:
    """A safetensors file with one thing wrong: a tensor's entry, a value of its config, its length, any byte."""
    data = original()
    header, tensors = split_safetensors(data)
    kind = draw(
        st.sampled_from(("config", "config", "config", "entry", "entry", "metadata", "name", "length", "bytes", "raw"))
    )
    metadata = header.get("__metadata__", {})
    if kind == "config" and "config" in metadata:
        metadata["config"] = replace_value(json.loads(metadata["config"]), draw)
        return join_safetensors(json.dumps(header), tensors)
    if kind == "entry":
        return join_safetensors(replace_value(header, draw), tensors)
    if kind == "name":
        old = draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
        header = {(draw(texts()) if name == old else name): entry for name, entry in header.items()}
        return join_safetensors(json.dumps(header), tensors)
    if kind == "length":
        length = draw(st.sampled_from((0, 1, 2, len(data), len(data) - 8, 2**31, 2**63 - 1, 2**64 - 1)))
        return length.to_bytes(8, "little") + data[8:]
    if kind == "raw":
        return join_safetensors(draw(json_values()), tensors)
    if kind == "bytes":
        return damage(data, draw, within=HEADER_DAMAGE)
    header["__metadata__"] = metadata | {draw(st.sampled_from(("config", "format", "x", "alpha"))): draw(texts(200))}
    text = json.dumps(header)
    if draw(st.booleans()):
        text = text.replace(json.dumps(header["__metadata__"]), draw(json_values()), 1)
    return join_safetensors(text, tensors)


def gguf_string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


_GGUF_NAMES = ("general.architecture", "general.name", "general.alignment", "config", "split.count", "kadr.schema")
_GGUF_VALUES = st.one_of(
    texts(100).map(lambda text: struct.pack("<I", 8) + gguf_string(text)),
    st.integers(0, 2**32 - 1).map(lambda number: struct.pack("<II", 4, number)),
    st.integers(-(2**63), 2**63 - 1).map(lambda number: struct.pack("<Iq", 11, number)),
    st.floats(width=32).map(lambda number: struct.pack("<If", 6, number)),
    st.integers(0, 2**64 - 1).map(lambda length: struct.pack("<IIQ", 9, 8, length)),
    st.integers(0, 2**64 - 1).map(lambda length: struct.pack("<IIQ", 9, 9, length)),
    st.integers(13, 2**32 - 1).map(lambda kind: struct.pack("<I", kind)),
    json_values().map(lambda text: struct.pack("<I", 8) + gguf_string(text)),
)


@st.composite
def gguf(draw: Any) -> bytes:
    """A GGUF file: a valid one with damage, or a header of hostile fields and tensors."""
    if draw(st.booleans()):
        return damage((STORED_FILES / "transformer.gguf").read_bytes(), draw, within=HEADER_DAMAGE)
    fields = draw(st.lists(st.tuples(st.one_of(st.sampled_from(_GGUF_NAMES), texts()), _GGUF_VALUES), max_size=4))
    if draw(st.booleans()):
        fields = [
            ("general.architecture", struct.pack("<I", 8) + gguf_string(draw(st.sampled_from(("ltxv", "t5encoder")))))
        ]
    tensors = draw(st.lists(st.tuples(texts(), st.lists(st.integers(0, 2**64 - 1), max_size=9)), max_size=4))
    counts = draw(st.sampled_from(((len(tensors), len(fields)), (2**63, 0), (1 << 20, 1 << 20))))
    body = b"".join(gguf_string(name) + value for name, value in fields)
    for name, shape in tensors:
        kind, offset = draw(st.integers(0, 40)), draw(st.sampled_from((0, 32, 2**63)))
        body += gguf_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    version = draw(st.sampled_from((3, 3, 3, 2, 1, 0, 3 << 24)))
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + body + bytes(draw(st.integers(0, 64)))


def write_video(comment: Any, *, frames: int = 1, fps: float = 24) -> bytes:
    with TemporaryDirectory() as name:
        path = Path(name) / "clip.mp4"
        with VideoWriter(path, Size(32, 32), fps=fps, metadata=comment) as writer:
            writer.write(np.zeros((frames, 32, 32, 3), np.uint8))
        return path.read_bytes()


def tag_video(comment: str) -> bytes:
    """Returns a video whose comment tag is any text."""
    import av

    stream, source = io.BytesIO(), io.BytesIO(stored_video()[0])
    with av.open(source) as before, av.open(stream, "w", format="mp4") as after:
        after.metadata["comment"] = comment
        track = after.add_stream_from_template(before.streams.video[0])
        for packet in before.demux(before.streams.video[0]):
            if packet.dts is not None:
                packet.stream = track
                after.mux(packet)
    return stream.getvalue()


@st.composite
def stored_videos(draw: Any) -> bytes:
    """A video of kadr whose metadata are hostile."""
    data, metadata = stored_video()
    kind = draw(st.sampled_from(("metadata", "request", "request", "raw", "bytes")))
    if kind == "bytes":
        return damage(data, draw)
    if kind == "raw":
        return tag_video(f'{{"kadr": {draw(json_values())}}}')
    if kind == "metadata":
        return tag_video(f'{{"kadr": {replace_value(metadata, draw)}}}')
    request = replace_value(metadata["request"], draw)
    rest = json.dumps({name: value for name, value in metadata.items() if name != "request"})
    return tag_video(f'{{"kadr": {{"request": {request}, {rest[1:]}}}')


@cache
def image(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 36)) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind)
    return stream.getvalue()


_IMAGE_KINDS = (
    ("PNG", "RGB"),
    ("PNG", "P"),
    ("PNG", "LA"),
    ("PNG", "I;16"),
    ("JPEG", "L"),
    ("JPEG", "CMYK"),
    ("GIF", "P"),
)
_IMAGE_KINDS += (("TIFF", "F"), ("TIFF", "1"), ("BMP", "RGB"), ("WEBP", "RGBA"), ("PPM", "RGB"))


@st.composite
def images(draw: Any) -> bytes:
    """An image with damage, of an odd mode, or that states a size it cannot have."""
    data = image(*draw(st.sampled_from(_IMAGE_KINDS)))
    kind = draw(st.sampled_from(("damage", "damage", "bomb", "thin", "none")))
    if kind == "bomb":
        width, height = draw(st.sampled_from(((2**31 - 1, 2**31 - 1), (100_000, 100_000), (0, 1), (1, 2**31 - 1))))
        return image("PNG")[:16] + struct.pack(">II", width, height) + image("PNG")[24:]
    if kind == "thin":
        return image("PNG", "RGB", draw(st.sampled_from(((1, 1), (1, 4000), (4000, 1), (2, 3)))))
    return damage(data, draw) if kind == "damage" else data


@st.composite
def clips(draw: Any) -> bytes:
    """A clip with damage, of an odd frame rate, or of a single frame."""
    kind = draw(st.sampled_from(("damage", "damage", "rate", "other")))
    if kind == "rate":
        return write_video(None, frames=draw(st.integers(1, 9)), fps=draw(st.sampled_from((1, 0.5, 23.976, 999))))
    if kind == "other":
        return draw(
            st.sampled_from(
                (b"", b"RIFF\0\0\0\0AVI ", image("GIF", "P"), b"\x1a\x45\xdf\xa3" + bytes(50), b"#EXTM3U\n")
            )
        )
    return damage(stored_video()[0], draw)


YAML = """pipeline_type: base
checkpoint_path: demo
guidance_scale: 1
stg_scale: 0
num_inference_steps: 2
timesteps: [1.0, 0.5]
skip_block_list: []
decode_timestep: 0.05
decode_noise_scale: 0.025
text_encoder_model_name_or_path: x
precision: bfloat16
sampler: from_checkpoint
stochastic_sampling: false
"""
_LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(30))
_RAW_YAML = (
    *(
        _LAUGHS,
        "a: &a [*a]",
        "&a a: *a",
        "<<: 5",
        "? [1, 2]\n: 3",
        "{" * 2000,
        nested(5000),
        "- " * 3000 + "x",
        "\t",
        "%YAML 9.9",
    ),
    *(
        "!!python/object/apply:os.system ['false']",
        "a: !!binary '!'",
        "a: 2020-99-99",
        "a: !!int x",
        "\x1b[31m: 1",
        "\u2028: 1",
    ),
    *(
        f"guidance_scale: {'9' * 5000}",
        f"guidance_scale: 0x{'f' * 5000}",
        "guidance_scale: 1:99999999999:1",
        "? ",
        "---\n---\n",
        "!x",
    ),
    *(
        "guidance_scale: .inf",
        "guidance_scale: .nan",
        "guidance_scale: 1e400",
        "1: 2",
        "null: 1",
        "true: [",
        "a: 'b",
        "x" * 70_000,
    ),
)


@st.composite
def yaml_files(draw: Any) -> bytes:
    """A pipeline config with one line replaced, or YAML that abuses the format."""
    kind = draw(st.sampled_from(("value", "value", "raw", "damage")))
    if kind == "damage":
        return damage(YAML.encode(), draw)
    if kind == "raw":
        return draw(st.sampled_from(_RAW_YAML)).encode("utf-8", "surrogatepass")
    lines = YAML.splitlines()
    index = draw(st.integers(0, len(lines) - 1))
    value = draw(st.one_of(json_values(), st.sampled_from(_RAW_YAML)))
    lines[index] = f"{lines[index].partition(':')[0]}: {value}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")
