"""Images are opened upright, in RGB with 8 bits per channel; what kadr changes in one is said."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from kadr.errors import MediaError
from kadr.media import image as image_module
from kadr.media.image import crop_to_aspect, load_image, probe_image
from kadr.media.prepare import prepare_image
from kadr.shapes import Size
from tests.media.test_prepare import photograph

SIDEWAYS_HEIC = Path(__file__).parents[1] / "data" / "images" / "sideways.heic"  # 96x64, to be turned for viewing


def test_the_crop_is_centred_and_keeps_the_resolution():
    image = Image.fromarray(photograph(200, 100))
    cropped = crop_to_aspect(image, Size(512, 512))
    assert np.array_equal(np.asarray(cropped), np.asarray(image)[:, 50:150])


def test_exif_orientation_is_applied(tmp_path):
    image, path = Image.fromarray(photograph(60, 40)), tmp_path / "phone.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn a quarter clockwise to view
    image.save(path, exif=exif)
    assert np.array_equal(np.asarray(load_image(path)), np.rot90(np.asarray(image), k=-1))


@pytest.mark.parametrize("is_behind", [True, False])
def test_orientation_of_a_png_is_probed_without_decoding_it(tmp_path, monkeypatch, is_behind):
    path = tmp_path / "turned.png"
    Image.new("RGB", (64, 32)).save(path, exif=_turned())
    content = path.read_bytes()
    if is_behind:  # the pixels, where Pillow would look for it once they are decoded
        start, end = content.index(b"eXIf") - 4, content.index(b"IDAT") - 4
        exif, pixels = content[start:end], content[end:-12]
        path.write_bytes(content[:start] + pixels + exif + content[-12:])
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    assert probe_image(path) == (32, 64)
    monkeypatch.undo()
    assert load_image(path).size == (32, 64)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_8_bit_mode_becomes_rgb(mode):
    image = Image.fromarray(photograph(8, 8)).convert("RGB" if mode == "LA" else mode)
    assert load_image(image.convert(mode) if mode != "LA" else image.convert("L").convert("LA")).mode == "RGB"


@pytest.fixture
def notices() -> list[str]:
    return []


# --- HEIC, AVIF, 16 bits ---------------------------------------------------------------------------------------------


def test_a_heic_photograph_is_read_upright(notices):
    pytest.importorskip("pi_heif")
    image = load_image(SIDEWAYS_HEIC, notices.append)
    assert image.size == probe_image(SIDEWAYS_HEIC) == (64, 96)
    rows, columns = np.mgrid[:64, :96]
    stored = np.stack([columns * 255 / 96, rows * 255 / 64, np.full((64, 96), 60)], axis=-1)
    assert np.abs(np.asarray(image) - np.rot90(stored, k=-1)).max() < 12
    assert not notices


def test_without_its_reader_a_heic_photograph_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pi_heif.as_plugin", None)
    with pytest.raises(MediaError, match=r"sideways.heic is a HEIC image.*pip install 'kadr\[heic\]'"):
        probe_image(SIDEWAYS_HEIC)


def test_a_damaged_heic_photograph_is_refused_by_name(tmp_path):
    pytest.importorskip("pi_heif")
    path = tmp_path / "cut.heic"
    path.write_bytes(SIDEWAYS_HEIC.read_bytes()[:700])
    with pytest.raises(MediaError, match=r"cut\.heic"):
        load_image(path)


def test_a_png_without_its_palette_is_refused_by_name(tmp_path):
    palette = Image.new("P", (4, 4))
    palette.putpalette([1, 2, 3])
    palette.save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    start = content.index(b"PLTE") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    (tmp_path / "cut.png").write_bytes(content[:start] + content[end:])
    with pytest.raises(MediaError, match=r"cut\.png cannot be read as an image: it is damaged"):
        load_image(tmp_path / "cut.png")


def test_an_avif_image_is_read(tmp_path):
    pixels, path = photograph(64, 48), tmp_path / "image.avif"
    Image.fromarray(pixels).resize((64, 48)).save(path, quality=95)
    assert probe_image(path) == (64, 48)
    assert np.abs(np.asarray(load_image(path)).astype(int) - pixels).mean() < 6


def test_a_damaged_avif_image_is_refused(tmp_path):
    path = tmp_path / "image.avif"
    Image.fromarray(photograph(64, 48)).save(path)
    content = path.read_bytes()
    start = content.index(b"mdat")
    path.write_bytes(content[: start + 8] + bytes(len(content) - start - 8))
    with pytest.raises(MediaError, match=r"image\.avif cannot be read as an image: Failed to decode"):
        load_image(path)


def write_16_bit_png(path: Path, values: np.ndarray) -> None:
    """Writes uint16 (H, W, channels), which Pillow cannot write in colour."""
    height, width, channels = values.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_16_bit_png_keeps_its_upper_8_bits(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 65536, (16, 24, channels), dtype=np.uint16)
    if channels in (2, 4):
        values[..., -1] = 65535  # opaque
    write_16_bit_png(tmp_path / "deep.png", values)
    colour = values[..., : 3 if channels > 2 else 1]
    expected = np.broadcast_to((colour >> 8).astype(np.uint8), (16, 24, 3))
    assert np.array_equal(np.asarray(load_image(tmp_path / "deep.png")), expected)


def test_a_16_bit_ppm_keeps_its_upper_8_bits(tmp_path):
    (tmp_path / "deep.pgm").write_bytes(b"P5 2 2 65535 " + np.array([0, 255, 65535, 32768], ">u2").tobytes())
    assert np.asarray(load_image(tmp_path / "deep.pgm"))[..., 0].tolist() == [[0, 0], [255, 128]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_per_channel_are_refused(tmp_path, dtype):
    Image.fromarray(np.zeros((8, 8), dtype)).save(tmp_path / "deep.tiff")
    with pytest.raises(MediaError, match=r"deep\.tiff has 32 bits per channel.*8 or 16"):
        probe_image(tmp_path / "deep.tiff")


# --- transparency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_composited_on_white_and_said(tmp_path, mode, notices):
    pixels = np.zeros((2, 3, 4), np.uint8)  # black
    pixels[:, 1, 3], pixels[:, 2, 3] = 128, 255
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.fromarray(np.array([[0, 0, 1]] * 2, np.uint8), mode="P")
        image.putpalette(bytes([9, 9, 9, 0, 0, 0]))
        image.info["transparency"] = 0
    image = image if mode == "P" else image.convert(mode)
    image.save(tmp_path / "logo.png")
    composite = np.asarray(load_image(tmp_path / "logo.png", notices.append))
    assert composite[0, :, 0].tolist() == ([255, 255, 0] if mode == "P" else [255, 127, 0])
    assert len(notices) == 1
    assert "logo.png has transparent pixels" in notices[0]
    assert "white" in notices[0]


def test_an_opaque_alpha_channel_changes_and_says_nothing(notices):
    image = Image.fromarray(photograph(16, 16))
    opaque = image.copy()
    opaque.putalpha(255)
    assert np.array_equal(np.asarray(load_image(opaque, notices.append)), np.asarray(image))
    assert not notices


# --- large images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
@pytest.mark.parametrize("factor", [2, 4])
def test_an_image_above_the_limit_is_reduced_and_says_so(tmp_path, monkeypatch, suffix, mode, factor, notices):
    if suffix == "jpg" and mode not in ("RGB", "L"):
        pytest.skip("not a mode of JPEG")
    monkeypatch.setattr(image_module, "MAX_FULL_PIXELS", 5000)
    monkeypatch.setattr(image_module, "MAX_HALVED_PIXELS", 24000 // factor)
    path, pixels = tmp_path / f"large.{suffix}", photograph(161, 60)
    grey = Image.fromarray(pixels).convert("L")
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) << 8) if mode == "I;16" else grey.convert(mode)
    is_turned = mode == "RGB"
    image.save(path, **({"exif": _turned()} if is_turned else {}))
    expected = np.asarray(grey.convert("RGB").reduce(factor)).astype(float)
    expected = np.rot90(expected, k=-1) if is_turned else expected
    reduced = np.asarray(load_image(path, notices.append))
    assert reduced.shape == expected.shape
    assert np.abs(reduced - expected).mean() < 4
    assert probe_image(path) == ((60, 161) if is_turned else (161, 60))
    assert len(notices) == 1
    assert f"{path} has 0 million pixels" in notices[0]
    assert f"by {factor} in width and height" in notices[0]


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_an_image_larger_than_pillow_opens_is_refused_with_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    Image.fromarray(photograph(64, 64)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(MediaError, match=r"huge\.png has more than 0 million pixels"):
        probe_image(path)


# --- refusals --------------------------------------------------------------------------------------------------------


def damaged_files(folder: Path) -> dict[str, Path]:
    paths = {name: folder / f"{name}.png" for name in ("absent", "empty", "text", "cut", "program")}
    paths["empty"].write_bytes(b"")
    paths["text"].write_text("this is not an image")
    Image.fromarray(photograph(64, 64)).save(paths["cut"])
    paths["cut"].write_bytes(paths["cut"].read_bytes()[:1000])
    paths["program"].write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    return paths | {"folder": folder}


@pytest.mark.parametrize("kind", ["absent", "empty", "text", "cut", "program", "folder"])
def test_an_unreadable_image_file_is_refused_by_name(tmp_path, kind):
    path = damaged_files(tmp_path)[kind]
    with pytest.raises(MediaError) as caught:
        prepare_image(path, Size(64, 64))
    assert str(path) in str(caught.value)
    assert ("no such file" if kind == "absent" else "PNG, JPEG") in str(caught.value)
