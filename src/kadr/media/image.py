"""Opens images: upright, in RGB with 8 bits per channel, and cropped to an aspect.

`media.prepare` then prepares them for the VAE encoder. A large photograph is held once, in Pillow's 4 bytes per pixel.
"""

from __future__ import annotations

import importlib
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kadr.errors import MediaError
from kadr.media.known_headers import find_known_header
from kadr.regular_file import open_regular
from kadr.shapes import Size

ImageInput: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"
Notify: TypeAlias = "Callable[[str], None]"  # called with a sentence about what kadr changes in an image

# A larger image is reduced before it is used: by 2, or, above 100 megapixels, by 4 in width and height. Pillow opens no
# more than 179 megapixels. Both are factors by which a JPEG is reduced while it is decoded.
MAX_FULL_PIXELS, MAX_HALVED_PIXELS = 50_000_000, 100_000_000
BACKGROUND = "white"  # behind transparent pixels, as programs that show images on a page have it

# Listed because Pillow would otherwise also try formats that start other programs, such as EPS.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "PPM")
_SUPPORTED_IMAGES = "Supported: PNG, JPEG, HEIC, WebP, AVIF, BMP, TIFF, GIF and PPM."
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_16_BIT_FORMATS = ("PNG", "PPM")  # whose pixels Pillow also opens in mode "I", with 32 bits
_ORIENTATION_TAG, _FIRST_SIDEWAYS = 0x0112, 5  # of EXIF: orientations from 5 on exchange width and height
_MAX_EXIF_BYTES = 1 << 16  # as a JPEG has at most
# Raised by Pillow's readers on damaged files; most are meant for their own dispatch and leak through.
_READ_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, RuntimeError),  # RuntimeError: of the AVIF decoder
    *(ArithmeticError, AssertionError, AttributeError, LookupError, TypeError),
)


def load_image(image: ImageInput, notify: Notify | None = None) -> Image.Image:
    """Opens an image as RGB, upright by its EXIF orientation. The official package ignores that orientation.

    Transparent pixels are composited on white; the official package shows whatever colour is stored in them. Of 16 bits
    per channel the upper 8 are used, as Pillow does of images in colour. Above 50 megapixels the image is reduced.

    Args:
        notify: called for an image that is reduced, or that has transparent pixels.

    Raises:
        MediaError: the image is missing, damaged, empty, too large, or of an unsupported format.
    """
    name = display_name(image)
    with _translate_errors(name):
        if isinstance(image, np.ndarray):
            return _upright_rgb(_from_array(image, name), name, notify)
        if isinstance(image, Image.Image):
            return _upright_rgb(image, name, notify)
        with _open_file(image, name) as file:
            return _upright_rgb(file, name, notify)


def probe_image(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Returns the width and height of an image, upright as from `load_image`, but not reduced. No pixel is decoded.

    Raises:
        MediaError: the image is missing, empty, too large, or of an unsupported format.
    """
    if (known := find_known_header(path)) is not None:
        return known.upright_width, known.upright_height
    name = display_name(path)
    with _translate_errors(name), _open_file(path, name) as file:
        _refuse_unsupported(file, name)
        width, height = file.size
        return (height, width) if _stored_orientation(file, path) >= _FIRST_SIDEWAYS else (width, height)


def reduction_factor(width: int, height: int) -> int:
    """Returns the factor by which width and height of an image are reduced before it is used; 1 for most."""
    pixels = width * height
    return 1 if pixels <= MAX_FULL_PIXELS else 2 if pixels <= MAX_HALVED_PIXELS else 4


@contextmanager
def _translate_errors(name: str) -> Iterator[None]:
    """Turns what Pillow raises in the block into MediaErrors about the image `name`."""
    try:
        yield
    except FileNotFoundError:
        raise MediaError(f"{name}: there is no such file.") from None
    except UnidentifiedImageError:
        raise MediaError(f"{name} is not a readable image. {_SUPPORTED_IMAGES}") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise MediaError(f"{name} has more than {limit} million pixels. Make it smaller first.") from None
    except _READ_ERRORS as error:
        reason = str(error) or "it is damaged"
        raise MediaError(f"{name} cannot be read as an image: {reason}. {_SUPPORTED_IMAGES}") from error


def crop_to_aspect(image: Image.Image, size: Size, *, name: str = "the image") -> Image.Image:
    """Crops the largest centred part with the aspect of `size`, at the image's own resolution.

    Args:
        name: of the image in messages.

    Raises:
        MediaError: less than 2x2 pixels would be left.
    """
    return image.crop(crop_box(*image.size, size, name=name))


def crop_box(width: int, height: int, size: Size, *, name: str) -> tuple[int, int, int, int]:
    """Returns the left, top, right and bottom of the part that `check_crop` measures, centred."""
    cropped_width, cropped_height = check_crop(width, height, size, name=name)
    left, top = (width - cropped_width) // 2, (height - cropped_height) // 2
    return left, top, left + cropped_width, top + cropped_height


def check_crop(width: int, height: int, size: Size, *, name: str) -> tuple[int, int]:
    """Returns the width and height of the largest part of an image with the aspect of `size`.

    Args:
        name: of the image in messages.

    Raises:
        MediaError: less than 2x2 pixels would be left.
    """
    cropped_width, cropped_height = largest_within(width, height, size.width / size.height)
    if min(cropped_width, cropped_height) < 2:
        raise MediaError(
            f"{name} is {width}x{height} pixels; cropped to the aspect of {size} it has "
            f"{cropped_width}x{cropped_height}, and at least 2x2 are needed. Use a larger image or a size of a similar "
            "aspect."
        )
    return cropped_width, cropped_height


def largest_within(width: int, height: int, aspect: float) -> tuple[int, int]:
    """Returns the width and height of the largest part with that aspect."""
    if width / height > aspect:
        return int(height * aspect), height
    return width, int(width / aspect)


def fit_within(image: Image.Image, side: int) -> Image.Image:
    """Returns an image whose longer side has at most so many pixels."""
    scale = min(1.0, side / max(image.size))
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def display_name(image: ImageInput) -> str:
    """Returns the name of an image in messages: its path, if it has one."""
    return "the image" if isinstance(image, (Image.Image, np.ndarray)) else os.fspath(image)


def _open_file(path: str | os.PathLike[str], name: str) -> Image.Image:
    """Opens a file as far as its header. A HEIC file needs a library of its own."""
    with open_regular(path) as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        image: Image.Image = _import_heif(name).HeifImageFile(path)
        if Image.MAX_IMAGE_PIXELS and image.size[0] * image.size[1] > 2 * Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError  # as Image.open does for the formats that it knows
        return image
    return Image.open(path, formats=_FORMATS)


def _import_heif(name: str) -> Any:
    """Imports the reader of HEIC files. It is not registered with Pillow, which would be for the whole process."""
    try:
        return importlib.import_module("pi_heif.as_plugin")
    except ImportError as error:
        raise MediaError(
            f"{name} is a HEIC image, and pi-heif, which reads them, is not installed: pip install 'kadr[heic]'. Or "
            "save it as JPEG."
        ) from error


def _from_array(image: np.ndarray, name: str) -> Image.Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise MediaError(f"{name} is an array {image.dtype} {image.shape}; give uint8 (height, width, 3).")
    _refuse_empty(image.shape[1], image.shape[0], name)
    return Image.fromarray(np.ascontiguousarray(image))


def _upright_rgb(image: Image.Image, name: str, notify: Notify | None) -> Image.Image:
    """Decodes an image. Each step replaces the one before it, so that few copies of the pixels exist at a time."""
    _refuse_unsupported(image, name)
    orientation, (width, height) = _orientation(image), image.size
    factor = reduction_factor(width, height)
    if factor > 1 and notify is not None:
        notify(
            f"{name} has {width * height / 1e6:.0f} million pixels; above {MAX_FULL_PIXELS / 1e6:.0f} million an image "
            f"is reduced before it is used, this one by {factor} in width and height."
        )
    if factor > 1 and hasattr(image, "filename"):  # a file: JPEG reduces while it is decoded
        image.draft(None, (width // factor, height // factor))
    image = _with_8_bit_channels(image)
    if factor > 1 and image.size == (width, height):
        image = image.reduce(factor)
    image = _without_alpha(image, name, notify)
    if orientation != 1:
        image.getexif()[_ORIENTATION_TAG] = orientation
        image = ImageOps.exif_transpose(image)
    return image


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 is upright."""
    return _checked_orientation(image.getexif())


def _checked_orientation(exif: Image.Exif) -> int:
    orientation = exif.get(_ORIENTATION_TAG, 1)
    return orientation if orientation in range(1, 9) else 1


def _stored_orientation(image: Image.Image, path: str | os.PathLike[str]) -> int:
    """Returns the EXIF orientation of a file without decoding it, as Pillow does to look behind the pixels of a PNG."""
    if image.format != "PNG":
        return _orientation(image)
    if "exif" not in image.info and (exif := _find_png_exif(path)) is not None:
        image.info["exif"] = b"Exif\0\0" + exif
    return _checked_orientation(Image.Image.getexif(image))


def _find_png_exif(path: str | os.PathLike[str]) -> bytes | None:
    """Returns the EXIF data of a PNG, which may also lie behind its pixels."""
    with open_regular(path) as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf" and length <= _MAX_EXIF_BYTES:
                return file.read(length)
            file.seek(length + 4, os.SEEK_CUR)
    return None


def _with_8_bit_channels(image: Image.Image) -> Image.Image:
    """Returns an image of a mode that can be resized: grey or colour with 8 bits per channel, without a palette."""
    if image.mode in ("I", *_16_BIT_MODES):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("P", "PA", "1"):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.load()
    return image


def _without_alpha(image: Image.Image, name: str, notify: Notify | None) -> Image.Image:
    """Returns the image as RGB, on white if any of its pixels is transparent."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image.convert("RGB")
    if notify is not None:
        notify(f"{name} has transparent pixels; the video shows them on {BACKGROUND}.")
    composite = Image.new("RGB", image.size, BACKGROUND)
    composite.paste(image, mask=alpha)
    return composite


def _refuse_unsupported(image: Image.Image, name: str) -> None:
    _refuse_empty(*image.size, name)
    if image.mode == "F" or (image.mode == "I" and image.format not in _16_BIT_FORMATS):
        raise MediaError(
            f"{name} has 32 bits per channel, of which nothing says which value is white. Save it with 8 or 16."
        )


def _refuse_empty(width: int, height: int, name: str) -> None:
    if not (width and height):
        raise MediaError(f"{name} is {width}x{height} pixels, so it is empty.")
