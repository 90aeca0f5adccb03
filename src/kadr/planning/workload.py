"""What a generation has to do, as far as memory and time depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from kadr.request.passes import PassPlan
from kadr.sampling.step_cache import StepCache
from kadr.shapes import LatentGrid


@dataclass(frozen=True)
class Work:
    """What is to be done, as far as memory and time depend on it.

    Args:
        prompts: how many are encoded; those that are remembered are not.
        texts: how many tokens each has that the transformer reads.
        media: for each pass, the grids of what the VAE encodes.
        extra: for each pass, tokens that conditions add.
        held: for each pass, whether conditions give tokens noise levels of their own.
        together: both prompts are evaluated in one batch.
        cache: what is kept from step to step.
        context: for each pass, tokens of controls; () where there are none. Of a long video those of its windows count.
        stages: what is run; all of it where empty.
        windows: those of a long video, in the place of its only pass.
    """

    passes: tuple[PassPlan, ...]
    prompts: int
    texts: tuple[int, ...]
    media: tuple[tuple[LatentGrid, ...], ...]
    extra: tuple[int, ...]
    held: tuple[bool, ...]
    together: bool = False
    cache: StepCache | None = None
    context: tuple[int, ...] = ()
    stages: frozenset[str] = frozenset()
    windows: tuple[WindowWork, ...] = ()

    def beside(self, number: int) -> int:
        """Tokens of a pass that are not of its video's grid."""
        return self.extra[number] + (self.context[number] if self.context else 0)

    def levels(self, number: int) -> bool:
        """Whether the tokens of a pass have noise levels of their own."""
        return self.held[number] or any(self.context)


@dataclass(frozen=True)
class WindowWork:
    """What is to be done for one window.

    Args:
        texts: how many tokens each prompt has that the transformer reads.
        extra: tokens that conditions, the overlap and what is remembered add.
        held: whether tokens have noise levels of their own.
        context: tokens of controls.
    """

    plan: PassPlan
    texts: tuple[int, ...]
    extra: int
    held: bool
    context: int = 0
