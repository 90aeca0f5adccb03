"""Edges, depth and poses of images, and control frames at the size of a reference."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kadr.errors import MediaError, RequestError
from kadr.media.control_maps import canny_edges, fit_to_reference, import_optional, normalize_image
from kadr.media.depth import DepthEstimator, DepthMaps
from kadr.media.pose import PERSON_CLASS, PoseEstimator
from kadr.shapes import Size
from tests import onnx_files

NOSE, LEFT_SHOULDER, RIGHT_SHOULDER = 0, 5, 6  # of COCO
RED_LIMB, NOSE_DOT = (153, 0, 0), (255, 0, 0)  # neck to right shoulder, dimmed as OpenPose does; the nose


def uniform_image(width: int, height: int, value: int = 0) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def noise_image(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- edges ---------------------------------------------------------------------------------------------------------


def test_edges_of_a_square_are_its_white_outline_one_pixel_wide() -> None:
    image = uniform_image(64, 48)
    image[10:30, 20:50] = 255
    edges = canny_edges(image)
    assert (edges.shape, edges.dtype) == (image.shape, np.uint8)
    assert set(np.unique(edges)) == {0, 255}
    assert (edges == edges[..., :1]).all()
    assert (edges[15:25, 19:21, 0] == 255).sum() == 10  # one of the two pixels beside the step
    inside, outside = edges[12:28, 22:48], edges[:, 52:]
    assert not inside.any()
    assert not outside.any()


def test_edges_depend_on_steepness_by_the_trainer_s_thresholds() -> None:
    steep, flat = uniform_image(32, 32), uniform_image(32, 32)
    steep[:, 16:], flat[:, 16:] = 60, 20  # Sobel multiplies by four: 240 is above 200, 80 below 100
    assert canny_edges(steep).any()
    assert not canny_edges(flat).any()


def test_edges_of_red_weigh_more_than_edges_of_blue() -> None:
    red, blue = uniform_image(32, 32), uniform_image(32, 32)
    red[:, 16:, 0] = blue[:, 16:, 2] = 200  # grey 60 and 23
    assert canny_edges(red).any()
    assert not canny_edges(blue).any()


# --- fitting to the reference ----------------------------------------------------------------------------------------


def test_an_image_of_the_reference_size_is_unchanged() -> None:
    image = noise_image(96, 64)
    assert np.array_equal(fit_to_reference(image, Size(96, 64), Size(96, 64)), image)


def test_an_image_is_cropped_to_its_centre_and_resized() -> None:
    image = uniform_image(120, 64, 50)
    image[:, :28], image[:, 92:] = 250, 250  # outside of a square
    assert (fit_to_reference(image, Size(64, 64), Size(32, 32)) == 50).all()
    assert fit_to_reference(image, Size(64, 64), Size(32, 64)).shape == (64, 32, 3)


def test_padding_repeats_the_outermost_pixels_and_has_no_edges() -> None:
    size = Size(50, 40)  # padded to 64x64: 7 left and right, 12 above and below
    image = np.repeat(np.linspace(10, 200, 50, dtype=np.uint8)[None, :, None], 40, axis=0).repeat(3, axis=2)
    fitted = fit_to_reference(image, size, size.snap())
    assert np.array_equal(fitted[12:52, 7:57], image)
    assert (fitted[:, :7] == 10).all()
    assert (fitted[:, 57:] == 200).all()
    assert not canny_edges(fitted).any()


def test_padding_of_a_smaller_pass_is_scaled_with_it() -> None:
    size = Size(50, 64)  # padding of 7 pixels at 64 wide is 3.5 at 32
    image = uniform_image(50, 64, 100)
    image[:, 25:] = 200
    fitted = fit_to_reference(image, size, Size(32, 32))
    assert (fitted[:, :14] == 100).all()
    assert (fitted[:, 18:] == 200).all()


def test_an_image_that_is_too_small_is_refused_by_name() -> None:
    with pytest.raises(MediaError, match=r"walk\.mp4 is 40x1 pixels"):
        fit_to_reference(uniform_image(40, 1), Size(64, 64), Size(64, 64), name="walk.mp4")


def test_normalized_images_are_in_minus_one_to_one() -> None:
    image = uniform_image(2, 1)
    image[0, 1] = 255
    normalized = normalize_image(image)
    assert normalized.shape == (3, 1, 2)
    assert normalized.dtype == torch.float32
    assert normalized[:, 0].tolist() == [[-1.0, 1.0]] * 3


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(RequestError, match=r"needs cv2, which is not installed: pip install 'kadr\[control\]'"):
        canny_edges(uniform_image(8, 8))
    assert import_optional("numpy", "control") is np


# --- depth -----------------------------------------------------------------------------------------------------------


def test_the_nearest_of_a_clip_is_white_and_the_farthest_black(tmp_path: Path) -> None:
    network = DepthEstimator(onnx_files.write_depth_model(tmp_path / "depth.onnx"))
    near, far = uniform_image(60, 40), uniform_image(60, 40)
    near[..., 0], far[..., 0] = 200, 100
    far[:, 30:, 0] = 0
    depth_maps = DepthMaps([network(near), network(far)])
    assert (depth_maps.render(0, 60, 40) == 255).all()
    second = depth_maps.render(1, 60, 40)
    assert second.shape == (40, 60, 3)
    assert (abs(second[:, :25].astype(int) - 127) <= 1).all()  # halfway in the clip, not in the frame
    assert (second[:, 35:] == 0).all()


@pytest.mark.parametrize(
    ("width", "height", "input_size"),
    [
        (704, 480, (756, 518)),  # the side that is nearer to 518 becomes 518
        (1920, 1080, (924, 518)),
        (64, 32, (518, 252)),
        (10, 1000, (14, 518)),
    ],
)
def test_the_network_input_has_whole_patches(
    width: int, height: int, input_size: tuple[int, int], tmp_path: Path
) -> None:
    network = DepthEstimator(onnx_files.write_depth_model(tmp_path / "depth.onnx"))
    assert network(noise_image(width, height)).shape == input_size[::-1]


def test_a_network_of_fixed_size_gets_that_size(tmp_path: Path) -> None:
    network = DepthEstimator(onnx_files.write_depth_model(tmp_path / "depth.onnx", fixed_side=28))
    depth = network(uniform_image(90, 40, 255))
    assert depth.shape == (28, 28)
    assert DepthMaps([depth]).render(0, 90, 40).shape == (40, 90, 3)


def test_images_are_scaled_as_the_network_was_trained(tmp_path: Path) -> None:
    network = DepthEstimator(onnx_files.write_depth_model(tmp_path / "depth.onnx"))
    assert float(network(uniform_image(28, 28, 255)).max()) == pytest.approx((1 - 0.485) / 0.229, rel=1e-3)


def test_a_clip_of_constant_depth_is_black_and_finite(tmp_path: Path) -> None:
    network = DepthEstimator(onnx_files.write_depth_model(tmp_path / "depth.onnx"))
    assert (DepthMaps([network(uniform_image(28, 28, 90))]).render(0, 28, 28) == 0).all()


def test_a_file_that_is_not_a_depth_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"half of it")
    with pytest.raises(MediaError, match=r"broken\.onnx cannot be read as a depth network"):
        DepthEstimator(tmp_path / "broken.onnx")
    endless = DepthEstimator(onnx_files.write_depth_model(tmp_path / "endless.onnx", scale=1e38))
    with pytest.raises(MediaError, match="not a finite number for every pixel"):
        endless(uniform_image(28, 28, 255))


# --- poses -----------------------------------------------------------------------------------------------------------


def pose_estimator(folder: Path, *classes: int) -> PoseEstimator:
    """Makes networks that find an object of each class, 240x320 in the middle of 640x640, with nose and shoulders."""
    boxes = [(200.0, 160.0, 440.0, 480.0, class_index) for class_index in classes]
    keypoints = {NOSE: (144.0, 100.0), RIGHT_SHOULDER: (94.0, 200.0), LEFT_SHOULDER: (194.0, 200.0)}
    return PoseEstimator(
        onnx_files.write_person_detector(folder / "people.onnx", boxes),
        onnx_files.write_pose_model(folder / "joints.onnx", keypoints),
    )


def test_a_skeleton_is_drawn_at_its_keypoints_in_openpose_colours(tmp_path: Path) -> None:
    people = pose_estimator(tmp_path, PERSON_CLASS)(uniform_image(640, 640))
    assert people.keypoints.shape == (1, 134, 2)
    # The box, widened by a quarter, is the network's input of 288x384.
    (x, y), (right, _) = people.keypoints[0, 0], people.keypoints[0, 2]
    assert (x, y) == (pytest.approx(320, abs=2), pytest.approx(160 + 320 / 2 - 1.25 * 320 / 2 + 100 / 384 * 400, abs=2))
    assert right == pytest.approx(x - 50 / 288 * 300, abs=2)
    drawn = people.render()
    assert (drawn.shape, drawn.dtype) == ((512, 512, 3), np.uint8)
    nose = round(y * 0.8), round(x * 0.8)
    assert tuple(drawn[nose]) == NOSE_DOT
    shoulders = round(people.keypoints[0, 2, 1] * 0.8)
    assert tuple(drawn[shoulders, round((x + right) / 2 * 0.8)]) == RED_LIMB
    assert (drawn.any(axis=2).mean()) < 0.05


def test_only_people_have_skeletons(tmp_path: Path) -> None:
    dog = 16
    assert len(pose_estimator(tmp_path, dog)(uniform_image(64, 64)).keypoints) == 0
    assert len(pose_estimator(tmp_path, dog, PERSON_CLASS)(uniform_image(64, 64)).keypoints) == 1


def test_without_people_nothing_is_drawn(tmp_path: Path) -> None:
    drawn = pose_estimator(tmp_path)(uniform_image(96, 64)).render()
    assert drawn.shape == (512, 768, 3)
    assert not drawn.any()


def test_the_pose_library_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pose_estimator(tmp_path, PERSON_CLASS)(uniform_image(64, 64))
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_not_a_pose_network_is_refused(tmp_path: Path) -> None:
    complete, broken = onnx_files.write_person_detector(tmp_path / "people.onnx", []), tmp_path / "broken.onnx"
    broken.write_bytes(b"half of it")
    with pytest.raises(MediaError, match=r"broken\.onnx cannot be read as pose networks"):
        PoseEstimator(complete, broken)


def test_skeletons_are_equally_thick_at_every_size(tmp_path: Path) -> None:
    """Skeletons are drawn at one size, as in the released workflow, and resized afterwards."""
    small, large = (pose_estimator(tmp_path, PERSON_CLASS)(uniform_image(side, side)).render() for side in (320, 1280))
    assert small.shape == large.shape
    assert abs(small.any(axis=2).mean() - large.any(axis=2).mean()) < 0.002


def test_the_pose_network_gets_bgr(tmp_path: Path) -> None:
    network, inputs = pose_estimator(tmp_path, PERSON_CLASS), []
    network.detector = lambda image: (inputs.append(image), (np.zeros((0, 4)), np.zeros(0)))[1]
    red = uniform_image(8, 8)
    red[..., 0] = 255
    network(red)
    assert inputs[0][0, 0].tolist() == [0, 0, 255]
