"""Images are prepared as by the official package, except where that would surprise the user."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kadr.errors import MediaError
from kadr.media.image import blur, compress, crop_to_aspect, load_image, prepare_image
from kadr.media.postprocess import crop_margins, denormalize, to_uint8
from kadr.shapes import Size
from tests.oracles import relative_error


def photograph(width: int, height: int) -> np.ndarray:
    """Returns an image with flat areas, gradients, edges and grain: uint8 (height, width, 3)."""
    rows, columns = np.mgrid[:height, :width]
    gradients = np.stack(
        [columns * 255 / width, rows * 255 / height, 128 + 100 * np.sin((rows + columns) / 9)], axis=-1
    )
    gradients[height // 4 : height // 2, width // 4 : width // 2] = (250, 13, 77)
    grain = np.random.default_rng(0).normal(0, 6, gradients.shape)
    grain[height // 4 : height // 2] = 0
    return np.clip(gradients + grain, 0, 255).astype(np.uint8)


# --- the official package, as oracle ---------------------------------------------------------------------------------


def torchvision_blur(image: torch.Tensor, kernel_size: int, sigma: float) -> torch.Tensor:
    """Restates torchvision.transforms.functional.gaussian_blur; bit-equal to that of 0.29 when this was written."""
    half = (kernel_size - 1) * 0.5
    weights = torch.exp(-0.5 * (torch.linspace(-half, half, kernel_size) / sigma).pow(2))
    weights = weights / weights.sum()
    kernel = torch.outer(weights, weights).expand(3, 1, kernel_size, kernel_size)
    return F.conv2d(F.pad(image[None], [kernel_size // 2] * 4, mode="reflect"), kernel, groups=3)[0]


def functions_of(path: Path, names: set[str], scope: dict[str, Any]) -> dict[str, Any]:
    """Runs only some functions of a file, since importing inference.py needs transformers and more."""
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name in names]
    for function in functions:
        function.decorator_list = []
    exec(compile(ast.Module(functions, type_ignores=[]), str(path), "exec"), scope)
    return scope


@pytest.fixture(scope="module")
def official() -> Callable[[str, Size, int, Size], torch.Tensor]:
    """Returns (path, size, crf, size of the pass) -> (1, 3, 1, H, W), by the official package's own functions."""
    spec = importlib.util.find_spec("ltx_video")
    if spec is None:
        pytest.skip("the official package is not installed")
    root = Path(next(iter(spec.submodule_search_locations or ())))
    einops = pytest.importorskip("einops")
    crf_names = {"_encode_single_frame", "_decode_single_frame", "compress"}
    import io
    from typing import Union

    import av

    crf_scope = functions_of(
        root / "pipelines/crf_compressor.py", crf_names, {"av": av, "io": io, "np": np, "torch": torch}
    )
    resize = functions_of(
        root / "pipelines/pipeline_ltx_video.py", {"resize_tensor"}, {"F": F, "rearrange": einops.rearrange}
    )["resize_tensor"]

    def to_tensor(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy()).float().div(255)

    def run(path: str, size: Size, crf: int, sampled_size: Size) -> torch.Tensor:
        scope = {
            "Image": Image,
            "Union": Union,
            "torch": torch,
            "TVF": SimpleNamespace(to_tensor=to_tensor, gaussian_blur=torchvision_blur),
            "crf_compressor": SimpleNamespace(compress=partial(crf_scope["compress"], crf=crf)),
        }
        names = {"load_image_to_tensor_with_resize_and_crop", "calculate_padding"}
        functions_of(root / "inference.py", names, scope)
        tensor = scope["load_image_to_tensor_with_resize_and_crop"](path, size.height, size.width, just_crop=True)
        snapped = size.snap()
        padding = scope["calculate_padding"](size.height, size.width, snapped.height, snapped.width)
        return resize(F.pad(tensor, padding), sampled_size.height, sampled_size.width)

    return run


CASES = [
    ((640, 480), Size(704, 480)),  # wider than the image
    ((333, 517), Size(100, 75)),  # odd everywhere: margins, crops, halves
    ((301, 97), Size(64, 96)),  # taller than the image
    ((256, 256), Size(256, 256)),  # unchanged
    ((97, 61), Size(161, 223)),  # stretched up, with margins
]


@pytest.mark.parametrize(("image_size", "size"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("crf", [29, 0])
def test_a_prepared_image_equals_the_official_one(official, tmp_path, image_size, size, crf, parity):
    path = tmp_path / "image.png"
    Image.fromarray(photograph(*image_size)).save(path)
    expected = official(str(path), size, crf, size.snap())
    prepared = prepare_image(path, size, crf)
    assert prepared.dtype == torch.float32
    assert prepared.shape == (1, 3, 1, size.snap().height, size.snap().width)
    parity("image", f"H.264 at CRF {crf}" if crf else "uncompressed", "official", relative_error(prepared, expected))
    assert (prepared - expected).abs().max() <= (0 if crf else 1e-6)


def test_an_image_for_another_size_is_resized_once_as_officially(official, tmp_path):
    path, size, sampled_size = tmp_path / "image.png", Size(150, 100), Size(96, 64)
    Image.fromarray(photograph(300, 200)).save(path)
    assert torch.equal(
        prepare_image(path, size, sampled_size=sampled_size), official(str(path), size, 29, sampled_size)
    )


# --- laws ------------------------------------------------------------------------------------------------------------


def test_the_blur_is_the_gaussian_of_sigma_one_mirrored_at_the_edges():
    image = torch.rand(3, 7, 5, dtype=torch.float64)
    mirrored = np.pad(image.numpy(), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    edge = np.exp(-0.5) / (1 + 2 * np.exp(-0.5))
    weights = (edge, 1 - 2 * edge, edge)
    assert np.allclose(weights, (0.27407, 0.45186, 0.27407), atol=5e-6)
    expected = sum(
        weights[row] * weights[column] * mirrored[:, row : row + 7, column : column + 5]
        for row in range(3)
        for column in range(3)
    )
    assert np.allclose(blur(image).numpy(), expected, atol=1e-12)


def test_padding_is_grey_around_the_image():
    white = np.full((100, 100, 3), 255, np.uint8)
    prepared = prepare_image(white, Size(100, 100), crf=0)[0, :, 0]
    assert prepared.shape == (3, 128, 128)
    content = prepared[:, 14:-14, 14:-14]
    assert torch.allclose(content, torch.ones(()), atol=1e-6)
    assert prepared.count_nonzero() == content.numel()


def test_crf_0_changes_nothing_and_a_higher_crf_changes_more():
    image = torch.from_numpy(photograph(96, 64)).permute(2, 0, 1) / 255
    assert compress(image, 0) is image
    fine, coarse = ((compress(image, crf) - image).square().mean() for crf in (10, 45))
    assert fine < coarse


def test_an_odd_side_loses_its_last_pixel_in_compression():
    assert compress(torch.rand(3, 33, 47), 29).shape == (3, 32, 46)


def test_the_crop_is_centred_and_keeps_the_resolution():
    image = Image.fromarray(photograph(200, 100))
    cropped = crop_to_aspect(image, Size(512, 512))
    assert np.array_equal(np.asarray(cropped), np.asarray(image)[:, 50:150])


def test_path_pillow_image_and_array_give_the_same_result(tmp_path):
    pixels, path = photograph(64, 64), tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    first, *others = (prepare_image(p, Size(64, 64)) for p in (path, str(path), Image.fromarray(pixels), pixels))
    assert all(torch.equal(first, other) for other in others)


def test_exif_orientation_is_applied(tmp_path):
    image, path = Image.fromarray(photograph(60, 40)), tmp_path / "phone.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn a quarter clockwise to view
    image.save(path, exif=exif)
    assert np.array_equal(np.asarray(load_image(path)), np.rot90(np.asarray(image), k=-1))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_8_bit_mode_becomes_rgb(mode):
    image = Image.fromarray(photograph(8, 8)).convert("RGB" if mode == "LA" else mode)
    assert load_image(image.convert(mode) if mode != "LA" else image.convert("L").convert("LA")).mode == "RGB"


# --- refusals --------------------------------------------------------------------------------------------------------


def damaged_files(folder: Path) -> dict[str, Path]:
    paths = {name: folder / f"{name}.png" for name in ("absent", "empty", "text", "cut", "deep", "program")}
    paths["empty"].write_bytes(b"")
    paths["text"].write_text("this is not an image")
    Image.fromarray(photograph(64, 64)).save(paths["cut"])
    paths["cut"].write_bytes(paths["cut"].read_bytes()[:1000])
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(paths["deep"])
    paths["program"].write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    return paths | {"folder": folder}


@pytest.mark.parametrize("kind", ["absent", "empty", "text", "cut", "deep", "program", "folder"])
def test_an_unreadable_image_file_is_refused_by_name(tmp_path, kind):
    path = damaged_files(tmp_path)[kind]
    with pytest.raises(MediaError) as caught:
        prepare_image(path, Size(64, 64))
    assert str(path) in str(caught.value)
    assert ("no such file" if kind == "absent" else "PNG, JPEG") in str(caught.value)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (np.zeros((0, 8, 3), np.uint8), "8x0 pixels"),
        (Image.new("RGB", (0, 0)), "0x0 pixels"),
        (np.zeros((8, 8, 3), np.float32), "float32"),
        (np.zeros((8, 8), np.uint8), r"\(8, 8\)"),
        (np.zeros((4, 400, 3), np.uint8), "at least 2x2"),
        (np.zeros((1, 1, 3), np.uint8), "at least 2x2"),
    ],
)
def test_an_unusable_image_is_refused_with_its_size_or_dtype(image, complaint):
    with pytest.raises(MediaError, match=complaint):
        prepare_image(image, Size(32, 96))


@pytest.mark.parametrize("crf", [-1, 52])
def test_a_crf_out_of_range_is_refused(crf):
    with pytest.raises(MediaError, match=f"crf is {crf}.*51"):
        prepare_image(photograph(8, 8), Size(32, 32), crf)


def test_an_image_too_large_for_h264_is_refused_with_the_way_out():
    with pytest.raises(MediaError, match=r"20000x2 .*crf to 0"):
        compress(torch.zeros(3, 2, 20000), 29)


# --- and back --------------------------------------------------------------------------------------------------------


def test_frames_are_clamped_and_truncated_not_rounded():
    pixels = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 2.0]).view(1, 1, 1, 6).expand(3, 1, 1, 6)
    frames = to_uint8(denormalize(pixels))
    assert frames.dtype == torch.uint8
    assert frames.shape == (1, 1, 6, 3)
    assert frames[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_equal_those_of_the_official_script(dtype):
    pixels = (torch.randn(3, 4, 8, 8) * 0.7).to(dtype)
    images = (pixels * 0.5 + 0.5).clamp(0, 1)  # VaeImageProcessor.denormalize
    expected = (images.permute(1, 2, 3, 0).float().numpy() * 255).astype(np.uint8)  # the end of inference.py
    assert np.array_equal(to_uint8(denormalize(pixels)).numpy(), expected)


@pytest.mark.parametrize("size", [Size(64, 32), Size(65, 33), Size(33, 100), Size(1, 1)])
def test_cropping_undoes_padding(size):
    pixels = torch.rand(3, 2, size.height, size.width)
    assert torch.equal(crop_margins(F.pad(pixels, size.padding()), size), pixels)


def test_cropping_frames_of_another_size_is_refused():
    with pytest.raises(MediaError, match=r"64x64.*100x75.*128x96"):
        crop_margins(torch.zeros(3, 1, 64, 64), Size(100, 75))
