"""The workload of a generation: everything about a request that memory and time depend on."""

from __future__ import annotations

from dataclasses import dataclass

from kadr.request.passes import ResolvedPass
from kadr.sampling.step_cache import StepCache
from kadr.shapes import LatentGrid


@dataclass(frozen=True)
class Workload:
    """The workload of a generation.

    Args:
        prompts_to_encode: number of prompts whose embeddings are not in the prompt cache.
        prompt_tokens: for each prompt, the tokens that the transformer reads.
        encode_grids: for each pass, the latent grids of images and clips that the VAE encodes.
        condition_tokens: for each pass, the tokens that conditions add.
        has_conditions: for each pass, whether conditions give tokens their own sigmas.
        guidance_batch: both prompts are evaluated in one batch.
        step_cache: settings of the step cache; None without one.
        reference_tokens: for each pass, the tokens of controls; () without controls. For a long video, see `windows`.
        stages: names of the stages that run; empty for all of them.
        windows: windows of a long video, in place of its only pass.
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
        """Returns the tokens of a pass outside its video's grid."""
        return self.condition_tokens[pass_index] + (self.reference_tokens[pass_index] if self.reference_tokens else 0)

    def has_per_token_sigmas(self, pass_index: int) -> bool:
        """Returns whether the tokens of a pass have their own sigmas."""
        return self.has_conditions[pass_index] or any(self.reference_tokens)


@dataclass(frozen=True)
class WindowWorkload:
    """The workload of one window of a long video.

    Args:
        prompt_tokens: for each prompt, the tokens that the transformer reads.
        condition_tokens: tokens that conditions, the overlap and the anchor add.
        has_conditions: tokens have their own sigmas.
        reference_tokens: tokens of controls.
    """

    resolved_pass: ResolvedPass
    prompt_tokens: tuple[int, ...]
    condition_tokens: int
    has_conditions: bool
    reference_tokens: int = 0
