"""What is measured, by name: models, sizes, schedules, stages and ways to run them. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kadr.errors import RequestError
from kadr.sampling.settings import ATTENTION_VALUES, Guidance
from kadr.shapes import LatentGrid, Size

DEMO = "demo"
MODELS = (DEMO, "2b", "13b")  # the bundled model, and random weights at the sizes of the released ones
STAGES = STARTUP, TEXT, ENCODE, DIT, DECODE, END_TO_END = "start-up", "text", "encode", "dit", "decode", "end-to-end"
FPS = 24.0


@dataclass(frozen=True)
class Clip:
    """The size of a video."""

    size: Size
    frames: int

    def __str__(self) -> str:
        return f"{self.size}x{self.frames}"

    @property
    def grid(self) -> LatentGrid:
        return LatentGrid.for_video(self.size, self.frames)

    @classmethod
    def parse(cls, text: str) -> Clip:
        """Read "512x320x25"; of the fixed sizes "512x320" is enough.

        Raises:
            RequestError: it is neither.
        """
        for clip in CLIPS:
            if text in (str(clip), str(clip.size)):
                return clip
        sides, cross, frames = text.rpartition("x")
        if not (cross and "x" in sides and frames.isdecimal()):
            known = ", ".join(map(str, CLIPS))
            raise RequestError(f"size is {text!r}; write WIDTHxHEIGHTxFRAMES, or one of {known}.")
        made = cls(Size.parse(sides), int(frames))
        if (made.size.snap(), made.grid.video_frames) != (made.size, made.frames):
            raise RequestError(f"size is {text}; both sides must be multiples of 32, and the frames 8k+1.")
        return made


CLIPS = (
    Clip(Size(256, 256), 9),
    Clip(Size(512, 320), 25),
    Clip(Size(768, 512), 121),
    Clip(Size(1216, 704), 121),
)
OWN = {DEMO: Clip(Size(128, 128), 25)}  # where a model has a size of its own


@dataclass(frozen=True)
class Steps:
    """A schedule: how many steps, and the guidance of each."""

    steps: int
    guidance: Guidance


_ALONE = Guidance(cfg_scale=1.0, stg_scale=0.0)
_CFG = Guidance(cfg_scale=3.0, stg_scale=0.0)
_STG = Guidance(cfg_scale=3.0, stg_scale=1.0, rescale=0.7, stg_mode=ATTENTION_VALUES)
STG_BLOCK = 2 / 3  # which block is disturbed, as a share of them: the 19th of 28
SCHEDULES: Mapping[str, Steps] = {"8": Steps(8, _ALONE), "20-cfg": Steps(20, _CFG), "40-cfg-stg": Steps(40, _STG)}


def schedule(name: str, layers: int) -> Steps:
    """The schedule of that name, for a transformer of so many layers."""
    made = SCHEDULES[name]
    if not made.guidance.stg_scale:
        return made
    return replace(made, guidance=replace(made.guidance, skip_blocks=(int(layers * STG_BLOCK),)))


@dataclass(frozen=True)
class Way:
    """A way to run kadr.

    Args:
        dtype, quant, compiled: see `Engine.open`; the dtype that is "auto" is what a user gets who says nothing.
        stages: that it changes; where it changes none, it is not run.
    """

    name: str
    dtype: str = "auto"
    quant: str | None = None
    compiled: bool = False
    stages: tuple[str, ...] = STAGES[1:]


REFERENCE = Way("float32", dtype="float32")
WAYS = {
    way.name: way
    for way in (
        Way("auto"),
        Way("int8", quant="int8", stages=(DIT, END_TO_END)),
        Way("fp8", quant="fp8", stages=(DIT, END_TO_END)),
        Way("compile", compiled=True, stages=(DIT, END_TO_END)),
        Way("bfloat16", dtype="bfloat16"),
        REFERENCE,
    )
}
USUAL_WAYS = ("auto", "int8")


@dataclass(frozen=True)
class Selection:
    """Which cases are run.

    Args:
        clips: none is the model's own size, else the second of `CLIPS`.
        num_layers: only so many of a random model's transformer and text encoder; None is all.
        reference: compare with float32, which takes twice the memory and the longest.
        rounds: in each of which every contender runs once.
        matmul: rows, columns and inner side of the yardstick; None is what suits the device.
    """

    models: Sequence[str] = (DEMO,)
    clips: Sequence[Clip] = ()
    stages: Sequence[str] = STAGES
    schedules: Sequence[str] = ("8",)
    ways: Sequence[str] = USUAL_WAYS
    layers: int | None = None
    rounds: int = 5
    reference: bool = True
    device: str = "auto"
    matmul: int | None = None

    def __post_init__(self) -> None:
        for what, given, known in (
            ("model", self.models, MODELS),
            ("stage", self.stages, STAGES),
            ("schedule", self.schedules, tuple(SCHEDULES)),
            ("way", self.ways, tuple(WAYS)),
        ):
            if strange := [name for name in given if name not in known]:
                raise RequestError(f"there is no {what} {strange[0]!r}; known are {', '.join(known)}.")
        if self.layers is not None and (self.layers < 1 or DEMO in self.models):
            raise RequestError("layers must be 1 or more, and only of 2b and 13b: the demo is small as it is.")
        if self.rounds < 1:
            raise RequestError(f"rounds is {self.rounds}; it must be 1 or more.")

    def clips_of(self, model: str) -> Sequence[Clip]:
        return self.clips or (OWN.get(model, CLIPS[1]),)
