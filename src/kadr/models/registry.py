"""The released models and how each is meant to be run, as data.

Recipes are those of the official configs, in one pass. Where a config is made for two passes or schedules its guidance
(0.9.7 and 0.9.8 dev), the single-pass values of its first release stand here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches

from kadr.errors import RequestError
from kadr.shapes import Size

HUB = "Lightricks/LTX-Video"
TEXT_HUB = "PixArt-alpha/PixArt-XL-2-1024-MS"
NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"
_WIDE = Size(1216, 704)
DISTILLED_LEVELS = (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a request means when it does not say.

    Args:
        steps: of the sampler; as many as there are `levels` where those are given.
        guidance: scale of the classifier-free guidance; 1 is none.
        levels: the noise levels that the model was distilled for; None where its schedule makes them.
        stochastic: every step draws fresh noise instead of following the flow.
        fps: frames per second that the positions are made with.
        size, frames: a picture size and a frame count the model is good at.
        decode_timestep: the noise level told to the VAE's decoder, where it is conditioned on one.
        decode_noise: how much noise is mixed into the latents for it.
        image_cond_noise: how much noise conditioning pictures get, times the square of the level.
    """

    steps: int = 40
    guidance: float = 3.0
    negative_prompt: str = NEGATIVE
    levels: tuple[float, ...] | None = None
    stochastic: bool = False
    fps: float = 30.0
    size: Size = _WIDE
    frames: int = 121
    decode_timestep: float = 0.05
    decode_noise: float = 0.025
    image_cond_noise: float = 0.15

    def __post_init__(self) -> None:
        if self.levels is not None and len(self.levels) != self.steps:
            raise ValueError(f"{self.steps} steps, but {len(self.levels)} levels")


@dataclass(frozen=True, kw_only=True)
class Released:
    """One released model.

    Args:
        name: what `Engine.open` takes.
        version: of the family.
        repo: on the hub; None for a model that comes with kadr.
        file: within the repository, or within the package.
        size_bytes: of the file, to within a percent; None where it does not matter.
        layers: of the transformer; tells a file from another of the same name. None: any.
        vae_family: which VAE is in the file: "0.9", "0.9.1" or "0.9.5"; None: its own.
        text_encoder: repository with the folders text_encoder and tokenizer; None: they lie beside the file.
    """

    name: str
    version: str
    file: str
    licence: str
    repo: str | None = HUB
    size_bytes: int | None = None
    layers: int | None = None
    vae_family: str | None = "0.9.5"
    text_encoder: str | None = TEXT_HUB
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def stem(self) -> str:
        """The name of the file, without folder and suffix."""
        return self.file.rpartition("/")[2].removesuffix(".safetensors")


_RESEARCH = "RAIL-M for research, ltx-video-2b-v0.9.license.txt in the repository"
_OPEN_RAIL = "OpenRAIL-M, ltx-video-2b-v0.9.5.license.txt in the repository"
_OPEN_WEIGHTS = "LTXV Open Weights License 0.X, LTX-Video-Open-Weights-License-0.X.txt in the repository"
# The sizes are tensors times bytes: 1923 M or 13043 M numbers of transformer, 419 M, 935 M or 1247 M of VAE; float32 in
# the file of 0.9, bfloat16 in all others.
_2B, _13B = 6_341_000_000, 28_579_000_000
_DISTILLED = Recipe(steps=len(DISTILLED_LEVELS), guidance=1.0, levels=DISTILLED_LEVELS)
_13B_DEV = Recipe(steps=30)

RELEASED: tuple[Released, ...] = (
    Released(
        name="demo",
        version="demo",
        repo=None,
        file="assets/demo/demo.safetensors",
        licence="Apache-2.0",
        vae_family=None,
        text_encoder=None,
        recipe=Recipe(steps=24, negative_prompt="", fps=24.0, size=Size(128, 128), frames=25),
    ),
    Released(
        name="ltxv-2b-0.9",
        version="0.9",
        file="ltx-video-2b-v0.9.safetensors",
        size_bytes=9_371_000_000,
        licence=_RESEARCH,
        layers=28,
        vae_family="0.9",
    ),
    Released(
        name="ltxv-2b-0.9.1",
        version="0.9.1",
        file="ltx-video-2b-v0.9.1.safetensors",
        size_bytes=5_717_000_000,
        licence=_RESEARCH.replace("v0.9", "v0.9.1"),
        layers=28,
        vae_family="0.9.1",
    ),
    Released(
        name="ltxv-2b-0.9.5",
        version="0.9.5",
        file="ltx-video-2b-v0.9.5.safetensors",
        size_bytes=_2B,
        licence=_OPEN_RAIL,
        layers=28,
    ),
    Released(
        name="ltxv-2b-0.9.6-dev",
        version="0.9.6-dev",
        file="ltxv-2b-0.9.6-dev-04-25.safetensors",
        size_bytes=_2B,
        licence=_OPEN_WEIGHTS,
        layers=28,
    ),
    Released(
        name="ltxv-2b-0.9.6-distilled",
        version="0.9.6-distilled",
        file="ltxv-2b-0.9.6-distilled-04-25.safetensors",
        size_bytes=_2B,
        licence=_OPEN_WEIGHTS,
        layers=28,
        recipe=Recipe(steps=8, guidance=1.0, stochastic=True),
    ),
    Released(
        name="ltxv-2b-0.9.8-distilled",
        version="0.9.8-distilled",
        file="ltxv-2b-0.9.8-distilled.safetensors",
        size_bytes=_2B,
        licence=_OPEN_WEIGHTS,
        layers=28,
        recipe=_DISTILLED,
    ),
    *(
        Released(
            name=f"ltxv-13b-{version}",
            version=version,
            file=f"ltxv-13b-{version}.safetensors",
            size_bytes=_13B,
            licence=_OPEN_WEIGHTS,
            layers=48,
            recipe=_DISTILLED if version.endswith("distilled") else _13B_DEV,
        )
        for version in ("0.9.7-dev", "0.9.7-distilled", "0.9.8-dev", "0.9.8-distilled")
    ),
)
BY_NAME = {released.name: released for released in RELEASED}


def find(name: str) -> Released:
    """The released model of that name.

    Raises:
        RequestError: there is none; the message names the nearest.
    """
    if (released := BY_NAME.get(name)) is not None:
        return released
    begun = [known for known in BY_NAME if name and known.startswith(name)]
    near = list(dict.fromkeys([*begun, *get_close_matches(name.lower(), BY_NAME, n=3)]))[:3]
    advice = f"Did you mean {', '.join(near)}?" if near else f"Known are {', '.join(BY_NAME)}."
    raise RequestError(f"there is no model named {name!r}. {advice} A file is opened by its path.")


def by_file(stem: str) -> Released | None:
    """The model that was released under this file name (without folder and suffix), or is named so; else None."""
    return next((r for r in RELEASED if r.repo is not None and stem.lower() in (r.stem, r.name)), None)
