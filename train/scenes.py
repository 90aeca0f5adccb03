"""The demo scenes: one captioned shape that moves, grows, shrinks or stands still on a plain background.

Scene pixels are those of a square of 128 x 128 and clips have 25 frames; `render` scales a scene to any size. x points
right and y down, both measured from the top left corner, so the centre of the first pixel is (0.5, 0.5).
"""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

COLOURS = {
    "red": (215, 25, 35),
    "green": (45, 175, 60),
    "blue": (40, 85, 245),
    "yellow": (250, 230, 45),
    "white": (245, 245, 245),
    "orange": (255, 135, 20),
    "purple": (170, 50, 205),
    "cyan": (50, 215, 225),
}
BACKGROUNDS = {"black": (10, 10, 12), "gray": (95, 95, 95), "navy": (15, 20, 85), "brown": (85, 48, 18)}
DIRECTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
MOTIONS = (*DIRECTIONS, "growing", "shrinking", "standing still")
SIZES = {
    "small": (14.0, 18.0),
    "medium": (19.0, 24.0),
    "large": (25.0, 31.0),
}  # radius in the first frame, scene pixels
SPEEDS = {"slowly": (28.0, 36.0), "": (40.0, 50.0), "quickly": (56.0, 70.0)}  # path over a whole clip, scene pixels

SCENE_SIDE = 128  # scene pixels: side of the square that geometry is defined on
CLIP_FRAMES = 25  # frames for which a shape stays inside the square
MARGIN = 1.5  # scene pixels that stay free at the edge
GROWTH_RATIOS = (1.6, 2.2)  # last radius over first for growing, first over last for shrinking
MIN_RADIUS, MAX_RADIUS = 11.0, 50.0  # limits of the last radius, so that a shape stays visible and inside

SQUARE_SIDE = 0.9  # half a side of the square, in radii
TRIANGLE_EXTENT = 1.25  # from its centre to a corner, in radii: at 1 it would look smaller than the circle
RING_HOLE = 0.55  # radius of the hole, in radii

HELD_OUT_PERCENT = 12


class Extent(NamedTuple):
    """Distance that a shape of radius 1 extends from its centre."""

    side: float
    up: float
    down: float


SHAPES = {
    "circle": Extent(1.0, 1.0, 1.0),
    "square": Extent(SQUARE_SIDE, SQUARE_SIDE, SQUARE_SIDE),
    "triangle": Extent(TRIANGLE_EXTENT * math.sqrt(3) / 2, TRIANGLE_EXTENT, TRIANGLE_EXTENT / 2),
    "ring": Extent(1.0, 1.0, 1.0),
}


class SceneKey(NamedTuple):
    """The properties of a scene, in words: the combination that is trained on or held out."""

    colour: str
    shape: str
    background: str
    motion: str


SCENE_KEYS = tuple(itertools.starmap(SceneKey, itertools.product(COLOURS, SHAPES, BACKGROUNDS, MOTIONS)))


def is_held_out(key: SceneKey) -> bool:
    """Tells whether a combination is held out of training. A fixed function of the words, equal on every machine."""
    digest = hashlib.sha256("/".join(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True)
class Scene:
    """Exact parameters of a clip. Lengths are in scene pixels, rates in scene pixels per frame."""

    colour: str
    shape: str
    background: str
    motion: str
    size_name: str  # of the first frame
    speed_name: str  # "" for a medium speed, and for motions that do not travel
    x: float  # centre in the first frame
    y: float
    radius: float  # in the first frame
    dx: float = 0.0
    dy: float = 0.0
    growth: float = 0.0  # of the radius

    @property
    def key(self) -> SceneKey:
        return SceneKey(self.colour, self.shape, self.background, self.motion)

    @classmethod
    def sample(cls, rng: Random, *, held_out: bool = False) -> "Scene":
        """Draws a scene of the training combinations, or of the held-out ones."""
        while is_held_out(key := rng.choice(SCENE_KEYS)) != held_out:
            pass
        return cls.from_key(key, rng)

    @classmethod
    def from_key(cls, scene_key: SceneKey, rng: Random) -> "Scene":
        """Draws a scene of a combination."""
        size_name = rng.choice(_possible_sizes(scene_key.motion))
        speed_name = rng.choice(tuple(SPEEDS)) if scene_key.motion in DIRECTIONS else ""
        radius = rng.uniform(*SIZES[size_name])
        growth = _growth(scene_key.motion, radius, rng)
        steps = CLIP_FRAMES - 1
        reach = Extent(*(r * max(radius, radius + growth * steps) + MARGIN for r in SHAPES[scene_key.shape]))
        dx, dy = _velocity(scene_key.motion, speed_name, reach, rng)
        return cls(
            *scene_key,
            size_name=size_name,
            speed_name=speed_name,
            x=rng.uniform(reach.side - min(0, dx * steps), SCENE_SIDE - reach.side - max(0, dx * steps)),
            y=rng.uniform(reach.up - min(0, dy * steps), SCENE_SIDE - reach.down - max(0, dy * steps)),
            radius=radius,
            dx=dx,
            dy=dy,
            growth=growth,
        )


def _possible_sizes(motion: str) -> tuple[str, ...]:
    """Returns the sizes that fit a motion: a large shape has no room to grow, a small one would shrink to a dot."""
    return {"growing": ("small", "medium"), "shrinking": ("medium", "large")}.get(motion, tuple(SIZES))


def _growth(motion: str, radius: float, rng: Random) -> float:
    """Draws the change of the radius per frame."""
    low, high = GROWTH_RATIOS
    if motion == "growing":
        last = radius * rng.uniform(low, min(high, MAX_RADIUS / radius))
    elif motion == "shrinking":
        last = radius / rng.uniform(low, min(high, radius / MIN_RADIUS))
    else:
        last = radius
    return (last - radius) / (CLIP_FRAMES - 1)


def _velocity(motion: str, speed_name: str, reach: Extent, rng: Random) -> tuple[float, float]:
    """Draws the travel per frame, limited to the room that the shape has."""
    x_direction, y_direction = DIRECTIONS.get(motion, (0, 0))
    room = SCENE_SIDE - (2 * reach.side if x_direction else reach.up + reach.down)
    low, high = SPEEDS[speed_name]
    speed = rng.uniform(low, min(high, room)) / (CLIP_FRAMES - 1)
    return x_direction * speed, y_direction * speed


# Rendering


def render(
    scenes: list[Scene], frames: int, size: tuple[int, int] = (SCENE_SIDE, SCENE_SIDE), *, first_frame: int = 0
) -> Tensor:
    """Renders scenes as clips.

    Args:
        scenes: B scenes.
        frames: F. From frame `CLIP_FRAMES` of the scene on, the shape may leave the image.
        size: (H, W) in pixels. The square is scaled to the shorter side and centred along the longer one.
        first_frame: frame of the scene that the clip begins with.

    Returns:
        float32 (B, 3, F, H, W) in [-1, 1]: RGB, edges anti-aliased over one pixel.
    """
    height, width = size
    scale = min(size) / SCENE_SIDE
    time = torch.arange(first_frame, first_frame + frames, dtype=torch.float32).view(-1, 1, 1)
    rows = ((torch.arange(height) + 0.5 - height / 2) / scale + SCENE_SIDE / 2).view(1, -1, 1)
    columns = ((torch.arange(width) + 0.5 - width / 2) / scale + SCENE_SIDE / 2).view(1, 1, -1)
    clips = torch.empty(len(scenes), 3, frames, height, width)
    for clip, scene in zip(
        clips, scenes, strict=True
    ):  # one at a time: the working set of one clip fits in the CPU cache
        x = columns - (scene.x + scene.dx * time)
        y = rows - (scene.y + scene.dy * time)
        distance = signed_distance(scene.shape, x, y, scene.radius + scene.growth * time)
        coverage = distance.mul_(-scale).add_(0.5).clamp_(0, 1)
        for channel, ink, background in zip(clip, COLOURS[scene.colour], BACKGROUNDS[scene.background], strict=True):
            torch.mul(coverage, (ink - background) / 127.5, out=channel).add_(background / 127.5 - 1)
    return clips


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Computes the exact distance to the outline of a shape, negative inside, as a new tensor (F, H, W).

    x (F, 1, W) and y (F, H, 1) are relative to the centre; they and radius (F, 1, 1) have the same unit. The
    square and the triangle follow Inigo Quilez, "2D distance functions".
    """
    if shape == "circle":
        return (x * x + y * y).sqrt_().sub_(radius)
    if shape == "ring":  # the outline of a circle, drawn with a broad pen
        middle, half_pen = radius * (1 + RING_HOLE) / 2, radius * (1 - RING_HOLE) / 2
        return (x * x + y * y).sqrt_().sub_(middle).abs_().sub_(half_pen)
    if shape == "square":
        x, y = x.abs() - SQUARE_SIDE * radius, y.abs() - SQUARE_SIDE * radius
        outside = (x.clamp(min=0).square() + y.clamp(min=0).square()).sqrt_()
        return outside.add_(torch.maximum(x, y).clamp_(max=0))
    if shape == "triangle":
        return _triangle_distance(x, y, radius * TRIANGLE_EXTENT)
    raise ValueError(f"shape is {shape!r}; the demo scenes have {', '.join(SHAPES)}")


def _triangle_distance(x: Tensor, y: Tensor, reach: Tensor) -> Tensor:
    """Computes the distance to an equilateral triangle that points up, folded by symmetry to one side."""
    root = math.sqrt(3)
    half = reach * root / 2  # of a side
    x, y = x.abs() - half, reach / 2 - y  # from the bottom right corner, up is positive
    beyond = x + root * y > 0  # nearer to the right side than to the bottom one
    along = torch.where(beyond, (x - root * y).div_(2), x)
    above = torch.where(beyond, (-root * x - y).div_(2), y)
    along -= torch.maximum(along, -2 * half).clamp_(max=0)  # the nearest point of the side
    return torch.hypot(along, above).copysign_(-above)


# Captions

MOTION_PARTICIPLES = {
    "moving left": ("moving left", "moving to the left", "sliding left", "sliding to the left"),
    "moving right": ("moving right", "moving to the right", "sliding right", "sliding to the right"),
    "moving up": ("moving up", "moving upward", "rising"),
    "moving down": ("moving down", "moving downward", "falling"),
    "growing": ("growing", "getting bigger", "expanding"),
    "shrinking": ("shrinking", "getting smaller"),
    "standing still": ("standing still", "staying in place", "not moving"),
}
MOTION_VERBS = {
    "moving left": ("moves left", "moves to the left", "slides left", "slides to the left"),
    "moving right": ("moves right", "moves to the right", "slides right", "slides to the right"),
    "moving up": ("moves up", "moves upward", "rises"),
    "moving down": ("moves down", "moves downward", "falls"),
    "growing": ("grows", "gets bigger", "expands"),
    "shrinking": ("shrinks", "gets smaller"),
    "standing still": ("stands still", "stays in place", "does not move"),
}
CAPTION_TEMPLATES = (
    "{a_noun} {participle} on a {background} background",
    "{a_noun} {verb} on a {background} background",
    "a {background} background with {a_noun} {participle}",
    "{noun}, {participle}, {background} background",
    "on a {background} background, {a_noun} {verb}",
    "the {shape} is {colour} and {verb}; the background is {background}",
)


def plain_caption(scene: Scene) -> str:
    """Returns the canonical wording: a red circle moving right on a black background."""
    return f"{_with_article(f'{scene.colour} {scene.shape}')} {scene.motion} on a {scene.background} background"


def varied_caption(scene: Scene, rng: Random) -> str:
    """Draws a true sentence about the scene: the plain caption half of the time, otherwise another wording."""
    if rng.random() < 0.5:
        return plain_caption(scene)
    size = scene.size_name if rng.random() < 0.5 else ""
    speed = scene.speed_name if rng.random() < 0.5 else ""
    noun = f"{size} {scene.colour} {scene.shape}".strip()
    sentence = rng.choice(CAPTION_TEMPLATES).format(
        noun=noun,
        a_noun=_with_article(noun),
        shape=f"{size} {scene.shape}".strip(),
        colour=scene.colour,
        background=scene.background,
        participle=_with_speed(rng.choice(MOTION_PARTICIPLES[scene.motion]), speed),
        verb=_with_speed(rng.choice(MOTION_VERBS[scene.motion]), speed),
    )
    if rng.random() < 0.3:
        sentence = sentence[0].upper() + sentence[1:]
    return sentence + "." if rng.random() < 0.3 else sentence


def _with_article(noun: str) -> str:
    return f"{'an' if noun.startswith('orange') else 'a'} {noun}"


def _with_speed(motion: str, speed: str) -> str:
    """Inserts a speed: "moving quickly to the right", but "moving up quickly"."""
    if not speed:
        return motion
    verb, to, side = motion.partition(" to ")
    return f"{verb} {speed}{to}{side}"


def vocabulary_corpus(rounds: int = 8, seed: int = 0) -> Iterator[str]:
    """Yields sentences to train a tokenizer on: every combination `rounds` times, in varying wordings."""
    rng = Random(seed)
    for key in SCENE_KEYS * rounds:
        yield varied_caption(Scene.from_key(key, rng), rng)


def held_out_captions(count: int, seed: int) -> list[tuple[str, Scene]]:
    """Draws held-out captions with their scenes, with even counts of colours, shapes, backgrounds and motions."""
    rng = Random(seed)
    keys = [key for key in SCENE_KEYS if is_held_out(key)]
    rng.shuffle(keys)
    counts: Counter[str | SceneKey] = Counter()
    captions = []
    for _ in range(count):
        key = min(keys, key=lambda key: (counts[key], sum(counts[word] * _alternatives(word) for word in key)))
        counts.update((key, *key))
        scene = Scene.from_key(key, rng)
        captions.append((plain_caption(scene), scene))
    return captions


def _alternatives(word: str) -> int:
    """Returns the number of words of the same property: the more there are, the rarer each is."""
    return next(len(words) for words in (COLOURS, SHAPES, BACKGROUNDS, MOTIONS) if word in words)
