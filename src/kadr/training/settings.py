"""Settings of one training, with their limits, checked on construction."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.shapes import Size, snap_frames
from kadr.training.objective import SIGMA_DISTRIBUTIONS
from kadr.training.trainable_lora import TARGET_MODULES
from kadr.validation import check_range

OFF, FILES, CANNY = "off", "files", "canny"
REFERENCE_SOURCES = (OFF, FILES, CANNY)
# Field, lowest and highest value.
_TRAINING_LIMITS: tuple[tuple[str, float, float], ...] = (
    ("rank", 1, 1024),
    ("steps", 1, 1_000_000),
    ("batch_size", 1, 256),
    ("learning_rate", 1e-8, 1.0),
    ("warmup_steps", 0, 100_000),
    ("first_frame_conditioning_p", 0.0, 1.0),
    ("caption_dropout_p", 0.0, 1.0),
)
CHANGEABLE_ON_RESUME = ("steps",)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of one training run.

    Args:
        size: size that clips are cropped and resized to, rounded up to multiples of 32 as a video's is.
        frames: frames of each clip, 8k+1.
        rank: rank of the LoRA; alpha is the same, so that a strength of 1 is as trained.
        target_modules: the layers to adapt; see `trainable_lora.TARGET_MODULES`.
        steps: optimizer steps.
        batch_size: examples of a step.
        learning_rate: learning rate of AdamW, constant after `warmup_steps` steps, so that a finished run can be
            extended.
        sigma_sampling: distribution of the training sigmas; see `objective.SIGMA_DISTRIBUTIONS`.
        first_frame_conditioning_p: share of steps in which the first latent frame is clean and not part of the loss.
        caption_dropout_p: share of captions replaced by an empty one.
        references: "off"; "files": a reference file for each clip, whose clean tokens are appended to the clip's; or
            "canny": the clip's own edges as its reference.
        seed: seed of everything random.
    """

    size: Size
    frames: int
    rank: int = 32
    target_modules: str = "attention"
    steps: int = 1000
    batch_size: int = 1
    learning_rate: float = 2e-4
    warmup_steps: int = 10
    sigma_sampling: str = "shifted-logit-normal"
    first_frame_conditioning_p: float = 0.1
    caption_dropout_p: float = 0.0
    references: str = OFF
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in _TRAINING_LIMITS:
            check_range(name, getattr(self, name), low, high, is_whole=isinstance(low, int))
        for name, known in (
            ("target_modules", TARGET_MODULES),
            ("sigma_sampling", SIGMA_DISTRIBUTIONS),
            ("references", REFERENCE_SOURCES),
        ):
            if getattr(self, name) not in known:
                raise RequestError(f"{name} is {quote(getattr(self, name))}; it must be one of {', '.join(known)}.")
        if snap_frames(self.frames) != self.frames:
            below = max(1, snap_frames(self.frames) - 8)
            raise RequestError(f"frames is {self.frames}; training takes 8k+1 frames of a clip, such as {below}.")

    @property
    def is_in_context(self) -> bool:
        """True for an in-context LoRA, which learns to follow a reference."""
        return self.references != OFF

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as plain data."""
        return {**asdict(self), "size": str(self.size)}
