"""Nodes that make conditions and controls of IMAGE batches. They are chained, and only collect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CATEGORY = "kadr"
CONTROL_KINDS = ["ready", "canny", "depth", "pose"]
MAX_FRAME = 100_000


@dataclass(frozen=True, eq=False)
class FrameCondition:
    """Frames that the video must show.

    Args:
        images: IMAGE, float32 (F, H, W, 3) in 0..1.
        frame, strength: see `kadr.Condition`.
    """

    images: Tensor
    frame: int
    strength: float


@dataclass(frozen=True, eq=False)
class FrameControl:
    """Frames that the video follows.

    Args:
        images: IMAGE, float32 (F, H, W, 3) in 0..1.
        kind: see `kadr.Control`.
    """

    images: Tensor
    kind: str


def _condition_inputs(images: str, tooltip: str) -> dict[str, Any]:
    return {
        "required": {
            images: ("IMAGE", {"tooltip": tooltip}),
            "frame": (
                "INT",
                {
                    "default": 0,
                    "min": -MAX_FRAME,
                    "max": MAX_FRAME,
                    "tooltip": "Frame of the video where it begins: 0 is the first, -1 the last.",
                },
            ),
            "strength": (
                "FLOAT",
                {"default": 1.0, "min": 0.05, "max": 1.0, "step": 0.05, "tooltip": "1 keeps it unchanged."},
            ),
        },
        "optional": {"conditions": ("KADR_CONDITIONS", {"tooltip": "Conditions before this one."})},
    }


class KadrImageCondition:
    """Adds an image that the video must show."""

    RETURN_TYPES = ("KADR_CONDITIONS",)
    RETURN_NAMES = ("conditions",)
    FUNCTION = "add"
    CATEGORY = CATEGORY
    DESCRIPTION = "An image that the video must show, at any frame. Chain several."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs."""
        return _condition_inputs("image", "One image.")

    def add(
        self, image: Tensor, frame: int, strength: float, conditions: tuple[FrameCondition, ...] = ()
    ) -> tuple[tuple[FrameCondition, ...]]:
        """Returns the conditions with this one.

        Raises:
            ValueError: the batch has several images.
        """
        if len(image) != 1:
            raise ValueError(
                f"the batch has {len(image)} images, and an image condition takes one. Use kadr: clip condition, or "
                "pick an image of the batch."
            )
        return ((*conditions, FrameCondition(image, frame, strength)),)


class KadrClipCondition:
    """Adds a clip that the video must show."""

    RETURN_TYPES = ("KADR_CONDITIONS",)
    RETURN_NAMES = ("conditions",)
    FUNCTION = "add"
    CATEGORY = CATEGORY
    DESCRIPTION = "Frames that the video must show one after another. Chain several."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs."""
        return _condition_inputs("images", "Frames of a clip, at the rate of the video; 9, 17, 25 and so on are used.")

    def add(
        self, images: Tensor, frame: int, strength: float, conditions: tuple[FrameCondition, ...] = ()
    ) -> tuple[tuple[FrameCondition, ...]]:
        """Returns the conditions with this one."""
        return ((*conditions, FrameCondition(images, frame, strength)),)


class KadrControl:
    """Adds a clip that the video follows through an in-context LoRA."""

    RETURN_TYPES = ("KADR_CONTROLS",)
    RETURN_NAMES = ("controls",)
    FUNCTION = "add"
    CATEGORY = CATEGORY
    DESCRIPTION = "Frames that the video follows through an in-context LoRA; give the model that LoRA. Chain several."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the inputs."""
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "Frames of a clip, at the rate of the video."}),
                "kind": (CONTROL_KINDS, {"tooltip": "The map that is made of the frames; ready: they are one."}),
            },
            "optional": {"controls": ("KADR_CONTROLS", {"tooltip": "Controls before this one."})},
        }

    def add(
        self, images: Tensor, kind: str, controls: tuple[FrameControl, ...] = ()
    ) -> tuple[tuple[FrameControl, ...]]:
        """Returns the controls with this one."""
        return ((*controls, FrameControl(images, kind)),)
