"""The released models and the recipe of each, as data.

Recipes are those of the official configs, ltx_video's configs/*.yaml. The configs of 0.9.7 were removed there; the 13B
models of 0.9.7 and 0.9.8 have the same recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kadr.errors import RequestError
from kadr.models.training_range import DEMO_RANGE, LTX_VIDEO_RANGE, TrainingRange
from kadr.quoting import quote
from kadr.sampling.samplers import EULER_STOCHASTIC
from kadr.sampling.settings import Guidance, Pass
from kadr.shapes import Size
from kadr.validation import suggest_names

LTX_VIDEO_REPO = "Lightricks/LTX-Video"
TEXT_ENCODER_REPO = "PixArt-alpha/PixArt-XL-2-1024-MS"
TEXT_ENCODER_FILES = ("text_encoder/*", "tokenizer/*")
DEFAULT_NEGATIVE_PROMPT = "worst quality, inconsistent motion, blurry, jittery, distorted"
DEFAULT_DOWNSCALE = 0.6666666  # of both sides, in the first of two passes: the official configs' own digits
_DEFAULT_SIZE = Size(1216, 704)
_DEFAULT_PASS = Pass(steps=40, guidance=Guidance(cfg_scale=3.0))
DISTILLED_SIGMAS = (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Defaults for what a request leaves out.

    Args:
        first_pass: the only pass, or the first of two.
        second_pass: the pass at full size, on the upscaled latents of the first; None where there is none.
        single_pass: the only pass if it differs from `first_pass`, which may stop early; None: `first_pass`.
        multi_scale: run both passes unless the request says otherwise.
        downscale_factor: of both sides, in the first of two passes.
        fps: frames per second that positions are computed with.
        size, frames: a size and a frame count that the model is good at.
        decode_timestep: for a VAE decoder with timestep conditioning.
        decode_noise: share of noise mixed into the latents before such a decoder.
        image_noise: scale of the noise added to conditions, times sigma squared.
    """

    first_pass: Pass = _DEFAULT_PASS
    second_pass: Pass | None = None
    single_pass: Pass | None = None
    multi_scale: bool = False
    downscale_factor: float = DEFAULT_DOWNSCALE
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    fps: float = 30.0
    size: Size = _DEFAULT_SIZE
    frames: int = 121
    decode_timestep: float = 0.05
    decode_noise: float = 0.025
    image_noise: float = 0.15

    def __post_init__(self) -> None:
        if self.multi_scale and self.second_pass is None:
            raise RequestError("the recipe is multi-scale but has no second pass; give it one.")


@dataclass(frozen=True, kw_only=True)
class Release:
    """A released model, or a component that models need.

    Args:
        name: for `Engine.open`.
        version: of the LTX-Video family.
        kind: "model", "spatial upscaler", "temporal upscaler", "text encoder", "tokenizer" or "LoRA".
        repo: on the Hugging Face Hub; None: bundled with kadr.
        file: within the repository, or within the package; a pattern for a text encoder of many files.
        size_bytes: of the file, to within 1 %; None if not recorded.
        num_layers: transformer blocks; distinguishes files of the same name. None: any.
        vae_family: of the VAE in the file: "0.9", "0.9.1" or "0.9.5"; None: a VAE of none of these families.
        text_encoder: name of the release of the text encoder; None: it is beside the file.
        upscaler: name of the release of the spatial upscaler that the second pass needs.
        vae: name of the release with the VAE, if this one has none.
        recipe: defaults of a model.
        trained_at: sizes, frame counts and frame rates that a model was trained at.
        description: says in a sentence what it is.
        words: kind of words -> all words, or phrases, of that kind that the model was trained with; {} for a model that
            was trained with the whole language.
    """

    name: str
    version: str
    file: str
    licence: str
    description: str
    kind: str = "model"
    repo: str | None = LTX_VIDEO_REPO
    size_bytes: int | None = None
    num_layers: int | None = None
    vae_family: str | None = None
    text_encoder: str | None = None
    upscaler: str | None = None
    vae: str | None = None
    recipe: Recipe = field(default_factory=Recipe)
    trained_at: TrainingRange = LTX_VIDEO_RANGE
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    @property
    def known_words(self) -> frozenset[str]:
        """Single words that the model was trained with; empty for a model that was trained with the whole language."""
        return frozenset(word for phrase in self.phrases for word in phrase.split())

    @property
    def phrases(self) -> tuple[str, ...]:
        """All of `words`, each once."""
        return tuple(dict.fromkeys(phrase for phrases in self.words.values() for phrase in phrases))

    @property
    def file_stem(self) -> str:
        """Name of the file, without folder and suffix."""
        return self.file.rpartition("/")[2].removesuffix(".safetensors")

    @property
    def file_patterns(self) -> tuple[str, ...]:
        """Names or patterns of the files to fetch. A text encoder of many files comes with its tokenizer."""
        return TEXT_ENCODER_FILES if self.file in TEXT_ENCODER_FILES else (self.file,)

    @property
    def is_demo(self) -> bool:
        """True for what comes with kadr, to try it."""
        return self.repo is None

    @property
    def is_distilled(self) -> bool:
        """True for a model distilled to run in few steps and without guidance."""
        return "distilled" in self.version


_RESEARCH = "RAIL-M for research, ltx-video-2b-v0.9.license.txt in the repository"
_OPEN_RAIL = "OpenRAIL-M, ltx-video-2b-v0.9.5.license.txt in the repository"
_OPEN_WEIGHTS = "LTXV Open Weights License 0.X, LTX-Video-Open-Weights-License-0.X.txt in the repository"
LORA = "LoRA"
DEFAULT_TEXT_ENCODER, TEXT_ENCODER_GGUF = "t5-v1.1-xxl", "t5-v1.1-xxl-q8-gguf"
TOKENIZER = "t5-v1.1-tokenizer"
UPSCALER = "ltxv-spatial-upscaler-0.9.8"

_2B_GUIDANCE = Guidance(cfg_scale=3.0, stg_scale=1.0, rescale=0.7, skip_blocks=(19,))
_2B = Recipe(first_pass=Pass(steps=40, guidance=_2B_GUIDANCE))
_2B_DISTILLED = Recipe(
    first_pass=Pass(steps=8, guidance=Guidance(cfg_scale=1.0, stg_scale=0.0, rescale=1.0), sampler=EULER_STOCHASTIC)
)
_NO_GUIDANCE = Guidance(cfg_scale=1.0, stg_scale=0.0, rescale=1.0, skip_blocks=(42,))
_DISTILLED = Recipe(
    multi_scale=True,
    first_pass=Pass(sigmas=DISTILLED_SIGMAS[:7], guidance=_NO_GUIDANCE),
    second_pass=Pass(sigmas=(0.9094, 0.725, 0.4219), guidance=_NO_GUIDANCE),
    single_pass=Pass(sigmas=DISTILLED_SIGMAS, guidance=_NO_GUIDANCE),
)
_13B_DISTILLED = replace(
    _DISTILLED, second_pass=Pass(sigmas=(0.9094, 0.725, 0.4219), guidance=_NO_GUIDANCE, tone_map=0.6)
)
_13B_GUIDANCE = Guidance(
    sigmas=(1.0, 0.996, 0.9933, 0.985, 0.9767, 0.9008, 0.618),
    cfg_scale=(1.0, 1.0, 6.0, 8.0, 6.0, 1.0, 1.0),
    stg_scale=(0.0, 0.0, 4.0, 4.0, 4.0, 2.0, 1.0),
    rescale=(1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 1.0),
    skip_blocks=((), (11, 25, 35, 39), (22, 35, 39), (28,), (28,), (28,), (28,)),
    cfg_star=True,
)
_13B_DEV = Recipe(
    multi_scale=True,
    first_pass=Pass(steps=30, skip_final=3, guidance=_13B_GUIDANCE),
    single_pass=Pass(steps=30, guidance=_13B_GUIDANCE),
    second_pass=Pass(
        steps=30,
        skip_initial=17,
        guidance=Guidance(
            sigmas=(1.0,), cfg_scale=(1.0,), stg_scale=(1.0,), rescale=(1.0,), skip_blocks=(27,), cfg_star=True
        ),
    ),
)
# All words of the captions that the demo was trained with: `train.scenes` draws and captions them.
_DEMO_WORDS = {
    "colours": ("red", "green", "blue", "yellow", "white", "orange", "purple", "cyan"),
    "shapes": ("circle", "square", "triangle", "ring"),
    "backgrounds": ("black", "gray", "navy", "brown"),
    "motions": (
        *("moving left", "moving right", "moving up", "moving down", "moving to the left", "moving to the right"),
        *("moving upward", "moving downward", "sliding left", "sliding right", "rising", "falling", "growing"),
        *("getting bigger", "expanding", "shrinking", "getting smaller", "standing still", "staying in place"),
        *("not moving", "moves", "slides", "rises", "falls", "grows", "gets", "expands", "shrinks", "stands", "stays"),
        "does not move",
    ),
    "sizes": ("small", "medium", "large"),
    "speeds": ("slowly", "quickly"),
    "other words": ("a", "an", "the", "is", "and", "on", "with", "background"),
}
_DEMO_SCENES = "one coloured shape that moves, grows, shrinks or stands still on a plain background, and nothing else"
DEMO_SIGMAS = (1.0, 0.92, 0.82, 0.68, 0.5, 0.28)
_DEMO_DEFAULTS: dict[str, Any] = {"negative_prompt": "", "fps": 24.0, "frames": 25, "downscale_factor": 0.5}
_DEMO = Recipe(
    first_pass=Pass(steps=24, guidance=Guidance(cfg_scale=3.0)),
    second_pass=Pass(sigmas=DEMO_SIGMAS[4:], guidance=Guidance(cfg_scale=1.0)),
    size=Size(128, 128),
    **_DEMO_DEFAULTS,
)
_DEMO_DISTILLED = Recipe(
    multi_scale=True,
    first_pass=Pass(sigmas=DEMO_SIGMAS, guidance=Guidance(cfg_scale=1.0)),
    second_pass=Pass(sigmas=DEMO_SIGMAS[4:], guidance=Guidance(cfg_scale=1.0)),
    size=Size(256, 256),
    **_DEMO_DEFAULTS,
)


def _describe_model(name: str, version: str) -> str:
    """Describes a released model by what its name says."""
    parameters = "13 billion" if "13b" in name else "2 billion"
    kind = "distilled to few steps without guidance" if "distilled" in version else "trained to be guided"
    weights = ", with the matrices of the blocks in 8 bits" if name.endswith("-fp8") else ""
    return f"LTX-Video {version.partition('-')[0]} with {parameters} parameters, {kind}{weights}"


def _model_release(name: str, version: str, file: str, size: int, num_layers: int, **overrides: Any) -> Release:
    fields: dict[str, Any] = {
        "vae_family": "0.9.5",
        "text_encoder": DEFAULT_TEXT_ENCODER,
        "licence": _OPEN_WEIGHTS,
        "description": _describe_model(name, version),
        **overrides,
    }
    return Release(
        name=name, version=version, file=f"{file}.safetensors", size_bytes=size, num_layers=num_layers, **fields
    )


# Sizes are parameters times bytes: 1923 M or 13043 M of the transformer, 419 M, 935 M or 1247 M of the VAE; float32 in
# the file of 0.9, bfloat16 in all others. In those named fp8, the matrices of the blocks have one byte per weight.
_FILE_BYTES = {"2b": 6_341_000_000, "13b": 28_579_000_000, "2b-fp8": 4_461_000_000, "13b-fp8": 15_692_000_000}


def _multi_scale_release(size: str, version: str, recipe: Recipe, fp8: str) -> Release:
    name = f"ltxv-{size}-{version}{fp8}"
    num_layers = {"2b": 28, "13b": 48}[size]
    upscaler = f"ltxv-spatial-upscaler-{version.partition('-')[0]}"
    return _model_release(name, version, name, _FILE_BYTES[size + fp8], num_layers, upscaler=upscaler, recipe=recipe)


_DOUBLED = {"spatial": "width and height", "temporal": "frame rate"}


def _upscaler_release(kind: str, version: str, size: int) -> Release:
    return Release(
        name=f"ltxv-{kind}-upscaler-{version}",
        version=version,
        kind=f"{kind} upscaler",
        description=f"doubles the {_DOUBLED[kind]} of latents, between two passes of a 2B or 13B model",
        file=f"ltxv-{kind}-upscaler-{version}.safetensors",
        licence=_OPEN_WEIGHTS,
        size_bytes=size,
    )


def _lora_release(name: str, version: str, repo: str, file: str, size: int, description: str) -> Release:
    base_licence = f"{_OPEN_WEIGHTS.partition(',')[0]}, as of the model it is for; see the repository"
    licence = _OPEN_WEIGHTS if repo == LTX_VIDEO_REPO else base_licence
    return Release(
        name=name,
        version=version,
        kind=LORA,
        repo=repo,
        file=f"{file}.safetensors",
        licence=licence,
        size_bytes=size,
        description=description,
    )


# Each repository has two files that differ in tensor names; these are the ones that most engines read.
_IC_LORAS = {
    ("canny", "0.9.7"): ("ltxv-097-ic-lora-canny-control-comfyui", 81_800_000),
    ("depth", "0.9.7"): ("ltxv-097-ic-lora-depth-control-comfyui", 81_800_000),
    ("pose", "0.9.7"): ("ltxv-097-ic-lora-pose-control-comfyui", 151_000_000),
    ("detailer", "0.9.8"): ("ltxv-098-ic-lora-detailer-comfyui", 1_309_000_000),
}

RELEASES: tuple[Release, ...] = (
    Release(
        name="demo",
        version="demo",
        repo=None,
        file="assets/demo/demo.safetensors",
        licence="Apache-2.0",
        upscaler="demo-upscaler",
        recipe=_DEMO,
        trained_at=DEMO_RANGE,
        description=f"a small model that comes with kadr and draws {_DEMO_SCENES}",
        words=_DEMO_WORDS,
    ),
    Release(
        name="demo-distilled",
        version="demo-distilled",
        repo=None,
        file="assets/demo/demo-distilled.safetensors",
        licence="Apache-2.0",
        upscaler="demo-upscaler",
        vae="demo",
        recipe=_DEMO_DISTILLED,
        trained_at=DEMO_RANGE,
        description="the demo, distilled to few steps without guidance, in two passes",
        words=_DEMO_WORDS,
    ),
    _model_release(
        "ltxv-2b-0.9",
        "0.9",
        "ltx-video-2b-v0.9",
        9_371_000_000,
        28,
        licence=_RESEARCH,
        vae_family="0.9",
        recipe=_2B,
    ),
    _model_release(
        "ltxv-2b-0.9.1",
        "0.9.1",
        "ltx-video-2b-v0.9.1",
        5_717_000_000,
        28,
        licence=_RESEARCH.replace("v0.9", "v0.9.1"),
        vae_family="0.9.1",
        recipe=_2B,
    ),
    _model_release(
        "ltxv-2b-0.9.5", "0.9.5", "ltx-video-2b-v0.9.5", _FILE_BYTES["2b"], 28, licence=_OPEN_RAIL, recipe=_2B
    ),
    _model_release("ltxv-2b-0.9.6-dev", "0.9.6-dev", "ltxv-2b-0.9.6-dev-04-25", _FILE_BYTES["2b"], 28, recipe=_2B),
    _model_release(
        "ltxv-2b-0.9.6-distilled",
        "0.9.6-distilled",
        "ltxv-2b-0.9.6-distilled-04-25",
        _FILE_BYTES["2b"],
        28,
        recipe=_2B_DISTILLED,
    ),
    *(_multi_scale_release("2b", "0.9.8-distilled", _DISTILLED, fp8) for fp8 in ("", "-fp8")),
    *(
        _multi_scale_release("13b", version, recipe, fp8)
        for version, recipe in (
            ("0.9.7-dev", _13B_DEV),
            ("0.9.7-distilled", _DISTILLED),
            ("0.9.8-dev", _13B_DEV),
            ("0.9.8-distilled", _13B_DISTILLED),
        )
        for fp8 in ("", "-fp8")
    ),
    Release(
        name="demo-upscaler",
        version="demo",
        kind="spatial upscaler",
        description="doubles width and height of the demo's latents, between two passes",
        repo=None,
        file="assets/demo/demo-upscaler.safetensors",
        licence="Apache-2.0",
    ),
    *(
        Release(
            name=f"demo-{lora}",
            version="demo",
            kind=LORA,
            repo=None,
            file=f"assets/demo/demo-{lora}.safetensors",
            licence="Apache-2.0",
            description=description,
        )
        for lora, description in (
            ("lora-teal", "LoRA of the demo that draws red as teal, a colour that the demo does not know"),
            ("ic-lora-canny", "in-context LoRA of the demo that follows the edges of a control clip"),
        )
    ),
    *(_upscaler_release("spatial", version, 505_000_000) for version in ("0.9.7", "0.9.8")),
    *(_upscaler_release("temporal", version, 524_000_000) for version in ("0.9.7", "0.9.8")),
    _lora_release(
        "ltxv-13b-0.9.7-distilled-lora",
        "0.9.7",
        LTX_VIDEO_REPO,
        "ltxv-13b-0.9.7-distilled-lora128",
        1_325_000_000,
        "LoRA that makes a 13B dev model run in few steps without guidance, as its distilled one does",
    ),
    *(
        _lora_release(
            f"ltxv-13b-{version}-ic-lora-{control}",
            version,
            f"Lightricks/LTX-Video-ICLoRA-{control}-13b-{version}",
            file,
            size_bytes,
            f"in-context LoRA of the 13B models for the {control} of a control clip",
        )
        for (control, version), (file, size_bytes) in _IC_LORAS.items()
    ),
    Release(
        name=DEFAULT_TEXT_ENCODER,
        version="1.1",
        kind="text encoder",
        description="T5 v1.1 XXL, the text encoder of all released models, with its tokenizer",
        repo=TEXT_ENCODER_REPO,
        file="text_encoder/*",
        size_bytes=19_060_000_000,
        licence="Apache-2.0",
    ),
    Release(
        name=TEXT_ENCODER_GGUF,
        version="1.1",
        kind="text encoder",
        description="T5 v1.1 XXL in 8 bits, with its tokenizer, in one GGUF file",
        repo="city96/t5-v1_1-xxl-encoder-gguf",
        file="t5-v1_1-xxl-encoder-Q8_0.gguf",
        size_bytes=5_061_000_000,
        licence="Apache-2.0",
    ),
    Release(  # for a text encoder's file that comes without one
        name=TOKENIZER,
        version="1.1",
        kind="tokenizer",
        description="tokenizer of T5 v1.1, for files of the text encoder that come without one",
        repo=TEXT_ENCODER_REPO,
        file="tokenizer/spiece.model",
        size_bytes=792_000,
        licence="Apache-2.0",
    ),
)
RELEASES_BY_NAME = {release.name: release for release in RELEASES}
MODEL_RELEASES = tuple(release for release in RELEASES if release.kind == "model")


def find_release(name: str) -> Release:
    """Returns the release with this name.

    Raises:
        RequestError: there is none; the message suggests similar names.
    """
    if (release := RELEASES_BY_NAME.get(name)) is None:
        raise no_such_release_error(name)
    return release


def no_such_release_error(name: str) -> RequestError:
    """Returns the error for a name that no release has, with similar ones."""
    advice = suggest_names(name, RELEASES_BY_NAME)
    return RequestError(f"there is no model named {quote(name)}. {advice} To open a file, pass its path.")


def find_model_release(name: str) -> Release:
    """Returns the release of a model that `release` of `Engine.open` names.

    Raises:
        RequestError: there is none.
    """
    release = RELEASES_BY_NAME.get(name)
    if release is None or release.kind != "model":
        names = ", ".join(model.name for model in MODEL_RELEASES)
        raise RequestError(f"release is {quote(name)}; it must be the name of a released model: one of {names}.")
    return release


def required_releases(release: Release) -> tuple[Release, ...]:
    """Returns the releases that a model needs: itself and those that it names. A component needs only itself."""
    names = (release.upscaler, release.vae, release.text_encoder)
    return tuple(dict.fromkeys([release, *(RELEASES_BY_NAME[name] for name in names if name is not None)]))
