"""The demo scenes match their captions, and the judge names what they show."""

import itertools
import math
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from train.judge import Verdict, name_scene
from train.scenes import (
    BACKGROUNDS,
    CLIP_FRAMES,
    COLOURS,
    MOTION_PARTICIPLES,
    MOTION_VERBS,
    MOTIONS,
    SCENE_KEYS,
    SCENE_SIDE,
    SHAPES,
    SIZES,
    SPEEDS,
    SQUARE_SIDE,
    TRIANGLE_EXTENT,
    Scene,
    SceneKey,
    held_out_captions,
    is_held_out,
    plain_caption,
    render,
    signed_distance,
    varied_caption,
    vocabulary_corpus,
)


def random_scenes(count: int, seed: int) -> list[Scene]:
    rng = Random(seed)
    return [Scene.from_key(rng.choice(SCENE_KEYS), rng) for _ in range(count)]


def as_frames(clips: Tensor) -> np.ndarray:
    """Converts float (B, 3, F, H, W) in [-1, 1] to uint8 (B, F, H, W, 3)."""
    return ((clips + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).numpy()


def blur(clips: Tensor, sigma: float) -> Tensor:
    """Blurs each frame with a Gaussian."""
    reach = math.ceil(2.5 * sigma)
    weights = torch.softmax(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2), 0).tolist()
    for axis in (-2, -1):  # by shifts: a convolution with one channel is slow
        first, last = clips.narrow(axis, 0, 1), clips.narrow(axis, -1, 1)
        padded = torch.cat((*[first] * reach, clips, *[last] * reach), axis)
        clips = sum(padded.narrow(axis, shift, clips.shape[axis]) * weight for shift, weight in enumerate(weights))
    return clips


def judge_accuracy(scenes: list[Scene], degrade: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Returns the share of clips that the judge names right, for each field of a `SceneKey`, (4,).

    It gets every other frame, those that it would sample, and one clip at a time, which fits in the CPU cache.
    """
    clips = ((scene, as_frames(degrade(render([scene], CLIP_FRAMES)[:, :, ::2]))[0]) for scene in scenes)
    return np.mean([np.equal(name_scene(frames), scene.key) for scene, frames in clips], axis=0)


# Rendering


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_stays_inside_the_frame_for_the_whole_clip(shape):
    rng = Random(0)
    scenes = [Scene.from_key(SceneKey("white", shape, "black", motion), rng) for motion in MOTIONS * 3]
    ink = render(scenes, CLIP_FRAMES)[:, 0] > -0.9  # (B, F, H, W); the black is at -0.92
    assert ink.any(dim=(-1, -2)).all()
    assert not ink[..., [0, -1], :].any()
    assert not ink[..., [0, -1]].any()


def test_scenes_depend_only_on_the_seed():
    first, again, other = (render(random_scenes(3, seed), 5, (32, 32)) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_clip_that_starts_later_is_the_end_of_a_longer_one():
    scenes = random_scenes(12, 1)
    assert torch.equal(render(scenes, 9, (64, 64), first_frame=8), render(scenes, 17, (64, 64))[:, :, 8:])


def test_clip_is_float32_in_minus_1_to_1_with_axes_bcfhw():
    clips = render(random_scenes(2, 2), 9, (64, 96))
    assert clips.shape == (2, 3, 9, 64, 96)
    assert clips.dtype == torch.float32
    assert clips.abs().max() <= 1


def test_larger_image_shows_the_same_scene():
    scenes = random_scenes(8, 3)
    halved = functional.avg_pool3d(render(scenes, 5, (128, 192)), (1, 2, 2))
    assert (halved - render(scenes, 5, (64, 96))).abs().mean() < 2e-3


def test_narrow_clip_centres_the_scene_on_the_long_side():
    scene = Scene("red", "circle", "black", "standing still", "medium", "", SCENE_SIDE / 2, SCENE_SIDE / 2, 20)
    image = render([scene], 1, (48, 160))[0, 0, 0]
    assert torch.allclose(image, image.flip(1), atol=1e-5)
    assert torch.allclose(image, image.flip(0), atol=1e-5)


@pytest.mark.parametrize("shape", ["square", "triangle"])
def test_signed_distance_is_the_distance_to_the_outline(shape):
    side, reach = 20 * SQUARE_SIDE, 20 * TRIANGLE_EXTENT
    corners = {
        "square": [(-side, -side), (side, -side), (side, side), (-side, side)],
        "triangle": [(math.sin(turn) * reach, -math.cos(turn) * reach) for turn in np.arange(3) * math.tau / 3],
    }[shape]
    ends = torch.tensor(corners, dtype=torch.float32)
    along = torch.linspace(0, 1, 2000)[:, None, None]
    outline = (ends * (1 - along) + ends.roll(-1, 0) * along).flatten(0, 1)
    coordinates = torch.arange(-40, 40, 5) + 0.3
    distance = signed_distance(
        shape, coordinates.view(1, 1, -1), coordinates.view(1, -1, 1), torch.full((1, 1, 1), 20.0)
    )[0]
    grid = torch.stack(torch.meshgrid(coordinates, coordinates, indexing="xy"), -1).flatten(0, 1)
    expected = (grid[:, None] - outline).norm(dim=-1).amin(1).view_as(distance)
    assert torch.allclose(distance.abs(), expected, atol=1e-2)
    assert distance[8, 8] < 0 < distance[0, 0]


def test_unknown_shape_is_named_in_the_error():
    with pytest.raises(ValueError, match="hexagon"):
        signed_distance("hexagon", torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


# The judge


def test_judge_is_right_about_rendered_scenes():
    assert (judge_accuracy(random_scenes(200, 4), lambda clips: clips) >= 0.99).all()


def test_judge_is_right_about_blurred_and_noisy_clips():
    generator = torch.Generator().manual_seed(5)
    errors = []

    def degrade(clips: Tensor) -> Tensor:
        degraded = (blur(clips, 1.5) + torch.randn(clips.shape, generator=generator) * 0.085).clamp(-1, 1)
        errors.append((degraded - clips).square().mean())
        return degraded

    assert (judge_accuracy(random_scenes(200, 5), degrade) >= 0.99).all()
    assert 10 * torch.log10(4 / torch.stack(errors).mean()) < 26.5  # PSNR in dB


def test_judge_names_only_the_background_of_an_empty_clip():
    empty = np.broadcast_to(np.uint8(BACKGROUNDS["navy"]), (17, 64, 64, 3))
    assert name_scene(empty) == Verdict(None, None, "navy", None)


def test_judge_names_nothing_in_noise():
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    assert name_scene(noise) == Verdict(None, None, None, None)


def test_judge_does_not_name_other_colours():
    frames = np.full((17, 64, 64, 3), (255, 190, 200), np.uint8)
    frames[:, 20:40, 20:40] = (60, 60, 0)
    verdict = name_scene(frames)
    assert verdict == Verdict(None, "square", None, "standing still")


# Captions


def test_plain_caption_reads_as_documented():
    rng = Random(0)
    assert plain_caption(Scene.from_key(SceneKey("red", "circle", "black", "moving right"), rng)) == (
        "a red circle moving right on a black background"
    )
    assert plain_caption(Scene.from_key(SceneKey("orange", "ring", "navy", "standing still"), rng)) == (
        "an orange ring standing still on a navy background"
    )


def test_half_of_the_captions_are_plain():
    rng = Random(1)
    scenes = random_scenes(2000, 6)
    plain = sum(varied_caption(scene, rng) == plain_caption(scene) for scene in scenes)
    assert 0.45 < plain / len(scenes) < 0.55


def test_caption_names_everything_that_is_true_and_nothing_else():
    rng = Random(2)
    for scene in random_scenes(2000, 7):
        text = varied_caption(scene, rng).lower().rstrip(".").replace(",", "").replace(";", "")
        words = set(text.split())
        assert words & COLOURS.keys() - {scene.background} == {scene.colour}, text
        assert words & BACKGROUNDS.keys() == {scene.background}, text
        assert words & SHAPES.keys() == {scene.shape}, text
        assert words & SIZES.keys() <= {scene.size_name}, text
        assert words & SPEEDS.keys() <= {scene.speed_name}, text
        unhurried = " ".join(word for word in text.split() if word not in SPEEDS)
        motions = {
            motion
            for motion in MOTIONS
            if any(phrase in unhurried for phrase in MOTION_PARTICIPLES[motion] + MOTION_VERBS[motion])
        }
        assert motions == {scene.motion}, text


def test_size_and_speed_words_agree_with_the_numbers():
    for scene in random_scenes(1000, 8):
        low, high = SIZES[scene.size_name]
        assert low <= scene.radius <= high
        path = math.hypot(scene.dx, scene.dy) * (CLIP_FRAMES - 1)
        low, high = SPEEDS[scene.speed_name] if path else (0, 0)
        assert low - 1e-6 <= path <= high + 1e-6
        last = scene.radius + scene.growth * (CLIP_FRAMES - 1)
        assert max(last / scene.radius, scene.radius / last) > 1.6 - 1e-6 or scene.growth == 0


def test_vocabulary_corpus_has_every_word_of_the_captions():
    rng = Random(3)
    corpus = {word for line in vocabulary_corpus() for word in line.lower().rstrip(".").split()}
    captions = [varied_caption(scene, rng).lower().rstrip(".") for scene in random_scenes(3000, 9)]
    assert {word for text in captions for word in text.split()} <= corpus


# Held out


def test_about_an_eighth_of_the_combinations_is_held_out():
    assert 0.10 < sum(map(is_held_out, SCENE_KEYS)) / len(SCENE_KEYS) < 0.14


def test_held_out_combinations_never_change():
    assert [SCENE_KEYS.index(key) for key in SCENE_KEYS if is_held_out(key)][:5] == [13, 15, 22, 31, 37]


def test_every_pair_of_properties_occurs_in_training():
    trained = [key for key in SCENE_KEYS if not is_held_out(key)]
    for first, second in itertools.combinations(range(4), 2):
        assert {(key[first], key[second]) for key in trained} == {(key[first], key[second]) for key in SCENE_KEYS}


def test_training_never_samples_a_held_out_combination():
    rng = Random(4)
    assert not any(is_held_out(Scene.sample(rng).key) for _ in range(3000))
    assert all(is_held_out(Scene.sample(rng, held_out=True).key) for _ in range(300))


def test_held_out_captions_are_held_out_distinct_and_even():
    captions = held_out_captions(56, seed=0)
    assert all(is_held_out(scene.key) and text == plain_caption(scene) for text, scene in captions)
    assert len({scene.key for _, scene in captions}) == 56
    for field, words in enumerate((COLOURS, SHAPES, BACKGROUNDS, MOTIONS)):
        counts = [sum(scene.key[field] == word for _, scene in captions) for word in words]
        assert max(counts) - min(counts) <= 3, dict(zip(words, counts, strict=True))
