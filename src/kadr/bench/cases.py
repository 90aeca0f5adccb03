"""Benchmark cases by name: models, sizes, schedules, stages and variants of kadr. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kadr.errors import RequestError
from kadr.kernels.mode import ZENTORCH_VARIABLE
from kadr.sampling.settings import ATTENTION_VALUES, Guidance
from kadr.shapes import LatentGrid, Size
from kadr.validation import check_range

DEMO = "demo"
MODELS = (DEMO, "2b", "13b")  # the bundled model, and random weights of the released sizes
BENCH_STAGES = STARTUP, TEXT, ENCODE, DIT, DECODE, END_TO_END = (
    "start-up",
    "text",
    "encode",
    "dit",
    "decode",
    "end-to-end",
)
FPS = 24.0
TEXT_LENGTH = 256  # a prompt is padded to this length
PROMPT_TOKENS = 100  # the ones that are not padding: a prompt of some seventy words
MAX_BENCH_ROUNDS = 1000


@dataclass(frozen=True)
class VideoShape:
    """Size and frame count of a video."""

    size: Size
    frames: int

    def __str__(self) -> str:
        return f"{self.size}x{self.frames}"

    @property
    def grid(self) -> LatentGrid:
        return LatentGrid.for_video(self.size, self.frames)

    @classmethod
    def parse(cls, text: str) -> VideoShape:
        """Parses "512x320x25"; "512x320" is enough for the shapes in `VIDEO_SHAPES`.

        Raises:
            RequestError: the text is neither, or no video has this shape.
        """
        for known_shape in VIDEO_SHAPES:
            if text in (str(known_shape), str(known_shape.size)):
                return known_shape
        sides, cross, frames = text.rpartition("x")
        if not (cross and "x" in sides and frames.isdecimal()):
            known = ", ".join(map(str, VIDEO_SHAPES))
            raise RequestError(f"size is {text!r}; write WIDTHxHEIGHTxFRAMES, or one of {known}.")
        shape = cls(Size.parse(sides), int(frames))
        if (shape.size.snap(), shape.grid.video_frames) != (shape.size, shape.frames):
            raise RequestError(f"size is {text}; both sides must be multiples of 32, and the frames 8k+1.")
        return shape


VIDEO_SHAPES = (
    VideoShape(Size(256, 256), 9),
    VideoShape(Size(512, 320), 25),
    VideoShape(Size(768, 512), 121),
    VideoShape(Size(1216, 704), 121),
)
DEFAULT_SHAPES = {DEMO: VideoShape(Size(128, 128), 25)}  # of models with a size of their own


@dataclass(frozen=True)
class BenchSchedule:
    """Number of steps, and the guidance of each."""

    steps: int
    guidance: Guidance


_PLAIN_GUIDANCE = Guidance(cfg_scale=1.0, stg_scale=0.0)
_CFG = Guidance(cfg_scale=3.0, stg_scale=0.0)
_STG = Guidance(cfg_scale=3.0, stg_scale=1.0, rescale=0.7, stg_mode=ATTENTION_VALUES)
STG_BLOCK = 2 / 3  # the perturbed block, as a share of all: the 19th of 28
SCHEDULES: Mapping[str, BenchSchedule] = {
    "8": BenchSchedule(8, _PLAIN_GUIDANCE),
    "20-cfg": BenchSchedule(20, _CFG),
    "40-cfg-stg": BenchSchedule(40, _STG),
}


def schedule_for(name: str, num_layers: int) -> BenchSchedule:
    """Returns a schedule by name. Its STG perturbs one of `num_layers` transformer blocks."""
    schedule = SCHEDULES[name]
    if not schedule.guidance.stg_scale:
        return schedule
    return replace(schedule, guidance=replace(schedule.guidance, skip_blocks=(int(num_layers * STG_BLOCK),)))


@dataclass(frozen=True)
class Variant:
    """A configuration of kadr to measure.

    Args:
        dtype, quant, compile: see `Engine.open`; "auto" is the default of `Engine.open`.
        stages: the stages that this configuration changes; it runs in no others.
        zentorch: runs with zentorch's operators, or without them; None leaves that to the environment.
    """

    name: str
    dtype: str = "auto"
    quant: str | None = None
    compile: bool = False
    stages: tuple[str, ...] = BENCH_STAGES[1:]
    zentorch: bool | None = None

    @property
    def environment(self) -> Mapping[str, str]:
        """Environment variables of this configuration. They are read once, so it has a process of its own."""
        return {} if self.zentorch is None else {ZENTORCH_VARIABLE: str(int(self.zentorch))}


FLOAT32_VARIANT = Variant("float32", dtype="float32")
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("auto"),
        Variant("int8", quant="int8", stages=(DIT, END_TO_END)),
        Variant("fp8", quant="fp8", stages=(DIT, END_TO_END)),
        Variant("compile", compile=True, stages=(DIT, END_TO_END)),
        Variant("zentorch", zentorch=True),
        Variant("no-zentorch", zentorch=False),
        Variant("int8-zentorch", quant="int8", zentorch=True, stages=(DIT, END_TO_END)),
        Variant("int8-no-zentorch", quant="int8", zentorch=False, stages=(DIT, END_TO_END)),
        Variant("bfloat16", dtype="bfloat16"),
        FLOAT32_VARIANT,
    )
}
DEFAULT_VARIANTS = ("auto", "int8")


def parse_prompt_tokens(text: str) -> list[Any]:
    """Parses "100,256". What is no whole number stays text, which `Selection` refuses."""
    return [int(part) if part.isdecimal() and len(part) < 10 else part for part in text.split(",")]


@dataclass(frozen=True)
class Selection:
    """The cases to run.

    Args:
        shapes: empty for the model's own shape, or else the second of `VIDEO_SHAPES`.
        prompt_tokens: tokens of the text encoder's prompts that are not padding; elsewhere they are `PROMPT_TOKENS`.
        num_layers: number of blocks in a random model's transformer and text encoder; None is all.
        compare_with_reference: compare with float32, which takes twice the memory and the longest time.
        rounds: number of rounds. Every contender runs once in each.
        matmul_side: rows, columns and inner side of the yardstick; None is the default for the device.
    """

    models: Sequence[str] = (DEMO,)
    shapes: Sequence[VideoShape] = ()
    stages: Sequence[str] = BENCH_STAGES
    schedules: Sequence[str] = ("8",)
    prompt_tokens: Sequence[int] = (PROMPT_TOKENS,)
    variants: Sequence[str] = DEFAULT_VARIANTS
    num_layers: int | None = None
    rounds: int = 5
    compare_with_reference: bool = True
    device: str = "auto"
    matmul_side: int | None = None

    def __post_init__(self) -> None:
        for kind, names, known in (
            ("model", self.models, MODELS),
            ("stage", self.stages, BENCH_STAGES),
            ("schedule", self.schedules, tuple(SCHEDULES)),
            ("variant", self.variants, tuple(VARIANTS)),
        ):
            if unknown := [name for name in names if name not in known]:
                raise RequestError(f"there is no {kind} {unknown[0]!r}; known are {', '.join(known)}.")
        if self.num_layers is not None and (self.num_layers < 1 or DEMO in self.models):
            raise RequestError(
                "num_layers must be 1 or more, and works with 2b and 13b only: the demo is small already."
            )
        for tokens in self.prompt_tokens:
            check_range("prompt_tokens", tokens, 1, TEXT_LENGTH, is_whole=True)
        check_range("rounds", self.rounds, 1, MAX_BENCH_ROUNDS, is_whole=True)

    def shapes_for(self, model: str) -> Sequence[VideoShape]:
        return self.shapes or (DEFAULT_SHAPES.get(model, VIDEO_SHAPES[1]),)
