"""A request with nothing left open: every sigma, strength, frame and window decided, for one model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kadr.request.pass_media import PassCondition, PassMedia
from kadr.request.passes import ResolvedPass
from kadr.request.request import Request
from kadr.request.resolved_conditions import ResolvedCondition
from kadr.request.resolved_controls import ResolvedControl
from kadr.request.resolved_media import ResolvedMedia
from kadr.request.windows import Span, Windows
from kadr.sampling.step_cache import StepCache
from kadr.shapes import Size, snap_frames


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A request resolved for a model by `request.resolve.resolve`: equal for equal requests, models and media headers.

    Args:
        request: the request with every field that has a default filled in; a video stores it.
        prompts: prompts of the windows, as far as they differ; a single one where there are no windows.
        size, frames, fps: of the video, as requested.
        passes: one or two; of a long video, a pass that stands for its windows.
        window_passes, spans: the windows of a long video, each as a pass, and the latent frames of each; else ().
        conditions, controls, input_video: media of the whole video.
        conditions_by_pass: the conditions in each of `passes`; () where media were not resolved.
        media: what is encoded for each of `passes`, or for each window; () where media were not resolved.
        reference_downscale: factor by which the references of in-context LoRAs are smaller than the video.
        lora_strengths: of each LoRA of the model, for each pass.
        image_noise, image_crf, decode_timestep, decode_noise, guidance_batch, step_cache: see `Request`.
    """

    request: Request
    prompts: tuple[str, ...]
    negative_prompt: str
    size: Size
    frames: int
    fps: float
    seed: int
    passes: tuple[ResolvedPass, ...]
    windows: Windows | None
    window_passes: tuple[ResolvedPass, ...]
    spans: tuple[Span, ...]
    conditions: tuple[ResolvedCondition, ...] = ()
    controls: tuple[ResolvedControl, ...] = ()
    input_video: ResolvedMedia | None = None
    conditions_by_pass: tuple[tuple[PassCondition, ...], ...] = ()
    media: tuple[PassMedia, ...] = ()
    reference_downscale: int = 1
    lora_strengths: tuple[tuple[float, ...], ...]
    image_noise: float
    image_crf: int
    decode_timestep: float
    decode_noise: float
    guidance_batch: bool
    step_cache: StepCache | None

    def without_media(self) -> ResolvedRequest:
        """Returns the request without its images and clips, for stages that do not read them."""
        return replace(
            self, conditions=(), controls=(), input_video=None, conditions_by_pass=(), media=(), reference_downscale=1
        )

    @property
    def sampled_size(self) -> Size:
        """Size that is sampled, before the crop: both sides multiples of 32."""
        return self.size.snap()

    @property
    def sampled_frames(self) -> int:
        """Number of frames that are sampled, before they are trimmed: 8k+1."""
        return snap_frames(self.frames)

    @property
    def uses_cfg(self) -> bool:
        """True if any step needs the negative prompt."""
        return any(resolved_pass.uses_cfg for resolved_pass in self.passes)

    @property
    def all_prompts(self) -> tuple[str, ...]:
        """The prompts to encode: each once, and the negative prompt last where a step needs it."""
        return (*dict.fromkeys(self.prompts), *([self.negative_prompt] * self.uses_cfg))

    def prompt_index(self, window_index: int) -> int:
        """Returns the index in `all_prompts` of a window's prompt; the last prompt covers all later windows."""
        return self.all_prompts.index(self.prompts[min(window_index, len(self.prompts) - 1)])

    @property
    def model_evaluations(self) -> int:
        """Number of model evaluations, over all passes and windows."""
        passes = self.window_passes or self.passes
        return sum(at.model_evaluations for resolved_pass in passes for at in resolved_pass.evaluation_guidance)
