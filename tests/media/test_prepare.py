"""Images are prepared as by the official package, except where that would surprise the user."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
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
from kadr.media.postprocess import crop_margins, denormalize, to_uint8
from kadr.media.prepare import blur, blurred_strips, compress, prepare_image
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


def blur_floats(pixels: np.ndarray) -> torch.Tensor:
    """Returns the blurred image before it is truncated, float32 (H, W, 3)."""
    return torch.cat([blurred for _, blurred in blurred_strips(pixels)])


def test_the_blur_is_the_gaussian_of_sigma_one_mirrored_at_the_edges():
    image = photograph(5, 7)
    mirrored = np.pad(image.astype(float) / 255, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    edge = np.exp(-0.5) / (1 + 2 * np.exp(-0.5))
    weights = (edge, 1 - 2 * edge, edge)
    assert np.allclose(weights, (0.27407, 0.45186, 0.27407), atol=5e-6)
    expected = sum(
        weights[row] * weights[column] * mirrored[row : row + 7, column : column + 5]
        for row in range(3)
        for column in range(3)
    )
    assert np.allclose(blur_floats(image).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_blurring_in_strips_equals_blurring_at_once(rows, monkeypatch):
    image = photograph(64, 43)  # with 7 rows, the last strip has a single one
    expected = blur_floats(image)
    monkeypatch.setattr("kadr.media.prepare.STRIP_PIXELS", rows * 64)
    assert torch.equal(blur_floats(image), expected)
    assert torch.equal(torch.from_numpy(blur(image)), (expected * 255).to(torch.uint8))


def test_padding_is_grey_around_the_image():
    white = np.full((100, 100, 3), 255, np.uint8)
    prepared = prepare_image(white, Size(100, 100), crf=0)[0, :, 0]
    assert prepared.shape == (3, 128, 128)
    content = prepared[:, 14:-14, 14:-14]
    assert torch.allclose(content, torch.ones(()), atol=1e-6)
    assert prepared.count_nonzero() == content.numel()


def test_a_higher_crf_changes_more():
    image = photograph(96, 64)
    fine, coarse = (np.square(compress(image, crf) - image.astype(float)).mean() for crf in (10, 45))
    assert 0 < fine < coarse


def test_an_odd_side_loses_its_last_pixel_in_compression():
    assert compress(photograph(47, 33), 29).shape == (32, 46, 3)


def test_path_pillow_image_and_array_give_the_same_result(tmp_path):
    pixels, path = photograph(64, 64), tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    first, *others = (prepare_image(p, Size(64, 64)) for p in (path, str(path), Image.fromarray(pixels), pixels))
    assert all(torch.equal(first, other) for other in others)


MEASURE = """
import sys, pathlib, resource
from kadr.kernels.cpu.malloc import tune_malloc
tune_malloc()
from kadr.media.prepare import prepare_image
from kadr.shapes import Size
def peak():
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
prepare_image(sys.argv[2], Size(64, 64), int(sys.argv[3]))  # loads the libraries
before = peak()
prepare_image(sys.argv[1], Size(64, 64), int(sys.argv[3]))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("crf", [29, 0])  # of 12 megapixels: below that, libraries' own 40 to 70 MB count
def test_a_photograph_takes_at_most_24_bytes_per_pixel(tmp_path, crf):
    side, small, large = 3464, tmp_path / "small.jpg", tmp_path / "large.jpg"
    Image.fromarray(photograph(64, 64)).resize((side, side)).save(large)
    Image.fromarray(photograph(64, 64)).save(small)
    command = [sys.executable, "-c", MEASURE, str(large), str(small), str(crf)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    measured = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert 4 <= int(measured) / side**2 <= 24


# --- refusals --------------------------------------------------------------------------------------------------------


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
        compress(np.zeros((2, 20000, 3), np.uint8), 29)


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
