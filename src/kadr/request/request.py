"""Request for one video: validated when it is created, and convertible to JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kadr.errors import MediaError, RequestError
from kadr.quoting import quote
from kadr.regular_file import NotRegularFileError, require_regular
from kadr.request.inputs import Condition, Control, as_tuple_of
from kadr.request.windows import Windows, split_prompts
from kadr.sampling.settings import MAX_STEPS, Guidance, Pass, check_sampler, parse_sigmas
from kadr.sampling.step_cache import StepCache
from kadr.schema import REQUEST
from kadr.shapes import MAX_WINDOW_FRAMES, Size, snap_frames
from kadr.spec.lora import LoraStrength, parse_lora_strengths
from kadr.validation import check_bool, check_fields, check_path, check_range, is_same_file, is_whole_number

MAX_FPS = 240
MAX_SEED_BITS = 1024  # a video stores its seed in digits, and Python reads only so many of them
DEFAULT_DENOISE_STRENGTH = 0.75
AUTO_SIZE = "auto"  # the size that fits the first image or clip

# (field, lowest value, highest value, must be whole)
_REQUEST_LIMITS: tuple[tuple[str, float, float, bool], ...] = (
    ("fps", 0.1, MAX_FPS, False),
    ("steps", 1, MAX_STEPS, True),
    ("tone_map", 0.0, 1.0, False),
    ("downscale_factor", 0.1, 1.0, False),
    ("image_noise", 0.0, 10.0, False),
    ("image_crf", 0, 51, True),
    ("decode_timestep", 0.0, 1.0, False),
    ("decode_noise", 0.0, 1.0, False),
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Request for one video. A field that is None is taken from the model's recipe.

    Args:
        prompt: what to show. An empty one is a lone end of sequence, as in the official package. With windows, one
            prompt for each, separated by |; the last one covers all remaining windows.
        size: width and height in pixels, a `Size` or a pair. Rounded up to multiples of 32 for sampling, then cropped.
            "auto" keeps the aspect of the input video, or of the first image or clip, at the model's number of pixels.
        frames: number of frames; rounded up to 8k+1 for sampling, then trimmed.
        fps: frames per second. The temporal positions of the tokens are in seconds, so it changes the speed of motion.
        seed: any whole number of up to 1024 bits. The same seed gives the same noise on every device.
        steps: denoising steps.
        sigmas: the schedule itself, decreasing from at most 1, instead of `steps`.
        skip_initial, skip_final: steps left out at the front and at the back of the schedule.
        guidance: CFG scale, 1 is off; or a `Guidance`.
        guidance_batch: evaluate the conditional and unconditional predictions in one batch instead of in turn.
        negative_prompt: what to guide away from.
        sampler: a name of `kadr.sampling.samplers.SAMPLERS`; "euler_stochastic" is what some distilled models require.
        cache: skip transformer blocks on some steps, a `StepCache` or its kind; faster, but changes the video. None
            is off.
        tone_map: how strongly the latents' extremes are compressed before decoding, 0 to 1.
        multi_scale: sample at a smaller size first, upscale the latents, and refine them in a second pass.
        second_pass: settings of the second pass; those above are the settings of the first, or only, pass. Only latents
            that are decoded are tone-mapped: a second pass without a `tone_map` uses this one.
        downscale_factor: factor applied to width and height in the first of two passes.
        conditions: images and clips that the video must show.
        controls: clips to follow, through in-context LoRAs.
        lora_strengths: strengths of the engine's LoRAs, in their order: one number each, or (first pass, second pass);
            None keeps those that the engine was opened with.
        windows: sample a long video window by window; None samples it at once.
        input_video: path of a video to start from, instead of pure noise.
        denoise_strength: sigma at which sampling of `input_video` begins, rounded down to one of the schedule; higher
            changes more.
        image_noise: noise added to clean condition images at each step, times the square of sigma.
        image_crf: H.264 quality (CRF) that an image is compressed with before it is encoded, as the training clips
            were; 0 is off.
        decode_timestep: timestep that the decoder is conditioned on.
        decode_noise: share of noise mixed into the latents before they are decoded.
        original_prompt: the user's own words, where `prompt` was enhanced; no model reads them.
    """

    prompt: str = field(kw_only=False)
    size: Size | tuple[int, int] | str | None = None
    frames: int | None = None
    fps: float | None = None
    seed: int = 0
    steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    skip_initial: int = 0
    skip_final: int = 0
    guidance: Guidance | float | None = None
    guidance_batch: bool = False
    negative_prompt: str | None = None
    sampler: str | None = None
    cache: StepCache | str | None = None
    tone_map: float | None = None
    multi_scale: bool | None = None
    second_pass: Pass | None = None
    downscale_factor: float | None = None
    conditions: tuple[Condition, ...] = ()
    controls: tuple[Control, ...] = ()
    lora_strengths: tuple[LoraStrength, ...] | None = None
    windows: Windows | None = None
    input_video: str | None = None
    denoise_strength: float | None = None
    image_noise: float | None = None
    image_crf: int | None = None
    decode_timestep: float | None = None
    decode_noise: float | None = None
    original_prompt: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise RequestError(f"the prompt is {quote(self.prompt)}; it must be text: say what to show.")
        if not isinstance(self.negative_prompt, str | None):
            raise RequestError(f"the negative prompt is {quote(self.negative_prompt)}; it must be text.")
        if not isinstance(self.original_prompt, str | None):
            raise RequestError(f"original_prompt is {quote(self.original_prompt)}; it must be text, or None.")
        if not isinstance(self.size, Size | None) and self.size != AUTO_SIZE:
            object.__setattr__(self, "size", _parse_size(self.size))
        object.__setattr__(self, "windows", Windows.parse(self.windows))
        if self.frames is not None:
            snap_frames(self.frames)
        self._check_windows()
        if not is_whole_number(self.seed) or self.seed.bit_length() > MAX_SEED_BITS:
            raise RequestError(
                f"seed is {quote(self.seed)}; it must be a whole number of at most {MAX_SEED_BITS} bits."
            )
        object.__setattr__(self, "conditions", as_tuple_of(Condition, self.conditions, "conditions"))
        object.__setattr__(self, "controls", as_tuple_of(Control, self.controls, "controls"))
        object.__setattr__(self, "cache", StepCache.parse(self.cache))
        object.__setattr__(self, "lora_strengths", parse_lora_strengths(self.lora_strengths))
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", parse_sigmas(self.sigmas))
        if self.guidance is not None and not isinstance(self.guidance, Guidance):
            object.__setattr__(self, "guidance", Guidance(cfg_scale=self.guidance))
        for name, low, high, is_whole in _REQUEST_LIMITS:
            if (value := getattr(self, name)) is not None:
                check_range(name, value, low, high, is_whole=is_whole)
        for name in ("skip_initial", "skip_final"):
            check_range(name, getattr(self, name), 0, MAX_STEPS, is_whole=True)
        for name in ("guidance_batch", "multi_scale"):
            check_bool(name, getattr(self, name))
        check_sampler(self.sampler)
        if not isinstance(self.second_pass, Pass | None):
            raise RequestError(f"second_pass is {quote(self.second_pass)}; it must be a Pass.")
        if self.sigmas is not None and (self.steps is not None or self.skip_initial or self.skip_final):
            raise RequestError("both sigmas and steps or skipped steps are given; give one or the other.")
        self._check_input_video()

    def _check_windows(self) -> None:
        if self.windows is None:
            if self.frames is not None and self.frames > MAX_WINDOW_FRAMES:
                raise RequestError(
                    f"frames is {self.frames}; a video sampled at once has at most "
                    f"{MAX_WINDOW_FRAMES}. Use windows: --window."
                )
            return
        split_prompts(self.prompt)  # refuses empty ones

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts of the windows, as far as they differ; a single one where there are no windows."""
        return (self.prompt,) if self.windows is None else split_prompts(self.prompt)

    def _check_input_video(self) -> None:
        if self.input_video is None:
            if self.denoise_strength is not None:
                raise RequestError(f"denoise_strength is {quote(self.denoise_strength)}, but no input video is given.")
            return
        check_path("input_video", self.input_video)
        object.__setattr__(self, "input_video", str(self.input_video))
        if self.denoise_strength is not None:
            check_range("denoise_strength", self.denoise_strength, 0.0, 1.0)
            if self.denoise_strength in (0, 1):
                effect = "nothing would change" if self.denoise_strength == 0 else "nothing of the video would remain"
                raise RequestError(f"denoise_strength is {self.denoise_strength}: {effect}. Give one between 0 and 1.")

    @property
    def step_cache(self) -> StepCache | None:
        """Settings of the step cache; `cache` is a `StepCache` once the request is created."""
        return StepCache.parse(self.cache)

    def first_pass(self) -> Pass:
        """Returns the settings of the first pass, or of the only one."""
        return Pass(
            steps=self.steps,
            sigmas=self.sigmas,
            skip_initial=self.skip_initial,
            skip_final=self.skip_final,
            guidance=self.guidance if isinstance(self.guidance, Guidance) else Guidance(),
            sampler=self.sampler,
            tone_map=self.tone_map,
        )

    def with_passes(self, first_pass: Pass, second_pass: Pass | None) -> Request:
        """Returns the request with these settings for its passes."""
        return replace(
            self, **{f.name: getattr(first_pass, f.name) for f in fields(first_pass)}, second_pass=second_pass
        )

    def with_defaults(self, defaults: Mapping[str, Any]) -> Request:
        """Returns the request, with the fields it leaves out taken from `defaults`, field name -> value."""
        return replace(self, **{k: v for k, v in defaults.items() if v is not None and getattr(self, k) is None})

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, with its schema number, that `from_json` reads back to an equal request."""
        data = asdict(self)
        data["size"] = None if self.size is None else str(self.size)
        return REQUEST.stamp(json.loads(json.dumps(data)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Request:
        """Reads the result of `to_json`, of this kadr or of an earlier one.

        Raises:
            RequestError: its schema number is newer than this kadr's, a field is unknown or missing, or a value is out
                of its range.
        """
        if not isinstance(data, Mapping):
            raise RequestError(f"the request is {quote(data)}; it must be an object of fields, as `to_json` writes it.")
        data = REQUEST.upgrade(data)
        del data[REQUEST.key]
        return cls(**_parse_fields(check_fields(cls, data, "the request")))

    def media_paths(self) -> tuple[Path, ...]:
        """Returns the paths of the images and clips that the request reads."""
        input_videos = () if self.input_video is None else (self.input_video,)
        media = [*(condition.media for condition in self.conditions), *(control.media for control in self.controls)]
        return tuple(Path(path) for path in (*input_videos, *media))


def _parse_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a request, those that are objects of their own parsed from `to_json`'s form."""
    parsed = dict(data)
    if (size := parsed.get("size")) is not None:
        if not isinstance(size, str):
            raise RequestError(f"size is {quote(size)}; write WIDTHxHEIGHT in pixels, such as 704x480.")
        parsed["size"] = size if size == AUTO_SIZE else Size.parse(size)
    for name, kind in (("conditions", Condition), ("controls", Control)):
        if not isinstance(items := parsed.get(name, ()), list | tuple):
            raise RequestError(f"{name} are {quote(items)}; they must be a list.")
        parsed[name] = tuple(kind(**check_fields(kind, item, f"one of the {name}")) for item in items)
    if isinstance(parsed.get("guidance"), Mapping):
        parsed["guidance"] = Guidance(**check_fields(Guidance, parsed["guidance"], "guidance"))
    if isinstance(parsed.get("second_pass"), Mapping):
        parsed["second_pass"] = Pass.from_json(parsed["second_pass"])
    return parsed


def _parse_size(value: Any) -> Size:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise RequestError(
            f'size is {quote(value)}; it must be a Size, a pair (width, height) in pixels, or "{AUTO_SIZE}".'
        )
    return Size(*value)


def check_request(value: Any) -> Request:
    """Returns a value that is a request.

    Raises:
        RequestError: it is not.
    """
    if not isinstance(value, Request):
        raise RequestError(f'the request is {quote(value)}; it must be a Request, such as Request(prompt="a fox").')
    return value


def refuse_overwriting(request: Request, output: Path) -> None:
    """Refuses an output file that is an input of the request.

    Raises:
        RequestError: it is one.
    """
    for path in request.media_paths():
        if is_same_file(path, output):
            raise RequestError(
                f"{output} is an input of the video: it would be overwritten, and the video could not be made again. "
                "Name another --output."
            )


def refuse_missing_media(request: Request) -> None:
    """Refuses images and clips that do not exist or are not regular files, before anything is loaded or fetched.

    Raises:
        MediaError: names them.
    """
    for path in request.media_paths():
        try:
            require_regular(path)
        except NotRegularFileError as error:
            raise MediaError(f"{path} cannot be read: {error}.") from error
        except OSError:
            continue  # named below, with all the others
    absent = list(dict.fromkeys(str(path) for path in request.media_paths() if not path.is_file()))
    if absent:
        raise MediaError(f"there is no file {', '.join(absent)}. Check the path of the image or clip.")
