"""What a generation has to do, as far as memory and time depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from kadr.request.passes import ResolvedPass
from kadr.sampling.step_cache import StepCache
from kadr.shapes import LatentGrid


@dataclass(frozen=True)
class Workload:
    """What is to be done, as far as memory and time depend on it.

    Args:
        prompts_to_encode: how many are encoded; those that are remembered are not.
        prompt_tokens: how many tokens each has that the transformer reads.
        encode_grids: for each pass, the grids of what the VAE encodes.
        condition_tokens: for each pass, tokens that conditions add.
        has_conditions: for each pass, whether conditions give tokens noise levels of their own.
        guidance_batch: both prompts are evaluated in one batch.
        step_cache: what is kept from step to step.
        reference_tokens: for each pass, tokens of controls; () where there are none. Of a long video those of its windows count.
        stages: what is run; all of it where empty.
        windows: those of a long video, in the place of its only pass.
    """

    passes: tuple[ResolvedPass, ...]
    prompts_to_encode: int
    prompt_tokens: tuple[int, ...]
    encode_grids: tuple[tuple[LatentGrid, ...], ...]
    condition_tokens: tuple[int, ...]
    has_conditions: tuple[bool, ...]
    guidance_batch: bool = False
    step_cache: StepCache | None = None
    reference_tokens: tuple[int, ...] = ()
    stages: frozenset[str] = frozenset()
    windows: tuple[WindowWorkload, ...] = ()

    def extra_tokens(self, pass_index: int) -> int:
        """Tokens of a pass that are not of its video's grid."""
        return self.condition_tokens[pass_index] + (self.reference_tokens[pass_index] if self.reference_tokens else 0)

    def has_per_token_sigmas(self, pass_index: int) -> bool:
        """Whether the tokens of a pass have noise levels of their own."""
        return self.has_conditions[pass_index] or any(self.reference_tokens)


@dataclass(frozen=True)
class WindowWorkload:
    """What is to be done for one window.

    Args:
        prompt_tokens: how many tokens each prompt has that the transformer reads.
        condition_tokens: tokens that conditions, the overlap and what is remembered add.
        has_conditions: whether tokens have noise levels of their own.
        reference_tokens: tokens of controls.
    """

    resolved_pass: ResolvedPass
    prompt_tokens: tuple[int, ...]
    condition_tokens: int
    has_conditions: bool
    reference_tokens: int = 0
