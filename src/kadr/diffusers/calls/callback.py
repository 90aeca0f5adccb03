"""`callback_on_step_end`: a script sees the latents of each step, may change them, and may end the sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kadr.diffusers.calls.schedule import Timesteps
from kadr.errors import RequestError
from kadr.pipeline.generation import Generation
from kadr.quoting import quote
from kadr.sampling.samplers import FinishStep, StopSampling
from kadr.sampling.state import LatentState

TENSOR_INPUTS = ("latents", "prompt_embeds", "negative_prompt_embeds")


@dataclass
class StepCallback:
    """The callback of a call.

    Args:
        function: (pipeline, step, timestep, tensors by name) -> tensors by name; None for none.
        tensor_inputs: names of `TENSOR_INPUTS` that it is given.
    """

    function: Callable[..., Any] | None = None
    tensor_inputs: Sequence[str] = ("latents",)
    _embeddings: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.function is not None and not callable(self.function):
            raise RequestError(f"callback_on_step_end is {quote(self.function)}; it must be a function.")
        self.tensor_inputs = tuple(getattr(self.function, "tensor_inputs", None) or self.tensor_inputs or ())
        if unknown := [name for name in self.tensor_inputs if name not in TENSOR_INPUTS]:
            raise RequestError(
                f"callback_on_step_end_tensor_inputs has {', '.join(map(quote, unknown))}; it may have "
                f"{', '.join(TENSOR_INPUTS)}."
            )

    def check_batch(self, batch: int) -> None:
        """Refuses a callback for several videos, which are sampled one by one.

        Raises:
            RequestError: there are several.
        """
        if self.function is not None and batch > 1:
            raise RequestError(
                f"callback_on_step_end is given for {batch} videos, which kadr samples one by one. Call the pipeline "
                "once for each."
            )

    def watch_embeddings(self, generation: Generation, uses_cfg: bool) -> None:
        """Takes the prompt embeddings of a generation, if the callback is given them."""
        if self.function is None or set(self.tensor_inputs) <= {"latents"}:
            return
        embeddings = [
            item.embeddings for item in generation.prompt_encoder.encode(generation.modules, generation.watch)
        ]
        cond, uncond = embeddings[0], embeddings[-1] if uses_cfg else None
        self._embeddings = {"prompt_embeds": cond if uncond is None else torch.cat([uncond, cond])}
        if uncond is not None:
            self._embeddings["negative_prompt_embeds"] = uncond

    def bind(self, pipeline: Any, timesteps: Timesteps, video_tokens: int) -> FinishStep | None:
        """Returns the function that a sampler calls after each step; None without a callback."""
        if self.function is None:
            return None

        def finish(index: int, state: LatentState, sigma: Tensor) -> LatentState:
            timestep = timesteps.timesteps[index].to(state.tokens.device)
            pipeline._current_timestep = timestep
            tensors = {**self._embeddings, "latents": _swap(state.tokens, video_tokens)}
            arguments = {name: tensors.get(name) for name in self.tensor_inputs}
            outputs = self.function(pipeline, index, timestep, arguments) or {}  # type: ignore[misc]
            self._check_embeddings(outputs, pipeline)
            latents = outputs.get("latents")
            if latents is not None:
                tokens = _checked(latents, state.tokens)
                state = replace(state, tokens=_swap(tokens, tokens.shape[1] - video_tokens))
            if pipeline._interrupt:
                raise StopSampling(state)
            return state

        return finish

    def _check_embeddings(self, outputs: Any, pipeline: Any) -> None:
        """Refuses other prompt embeddings; the conditional half alone is taken where guidance is off from now on."""
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            other, own = outputs.get(name), self._embeddings.get(name)
            if other is None or other is own:
                continue
            is_unguided = name == "prompt_embeds" and not pipeline.do_classifier_free_guidance
            if is_unguided and own is not None and torch.equal(other, own[-len(other) :]):
                continue
            raise RequestError(
                f"the callback returned other {name}; kadr projects prompts once, before the first step. Set "
                "pipe._guidance_scale to change the guidance, or call the pipeline again from the latents."
            )


def _swap(tokens: Tensor, count: int) -> Tensor:
    """Puts the first `count` tokens (B, N, C) behind the others: diffusers has those of keyframes first, kadr last."""
    return tokens if count in (0, tokens.shape[1]) else torch.cat([tokens[:, count:], tokens[:, :count]], dim=1)


def _checked(latents: Any, tokens: Tensor) -> Tensor:
    if not isinstance(latents, Tensor) or latents.shape != tokens.shape:
        shape = tuple(latents.shape) if isinstance(latents, Tensor) else quote(latents)
        raise RequestError(f"the callback returned latents {shape}; they must be {tuple(tokens.shape)}.")
    return latents.to(tokens)
