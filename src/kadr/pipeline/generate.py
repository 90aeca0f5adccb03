"""One generation, stage by stage: text, pictures, denoising, decoding.

Data goes one way. A stage takes its module from the shelf and gives it back before the next one takes its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from kadr.errors import KadrWarning, NonFiniteError, RequestError
from kadr.media.frames import crop_margins, to_uint8
from kadr.media.image import prepare_picture
from kadr.models.transformer import Transformer
from kadr.models.vae import VAE
from kadr.nn.rope import Rope
from kadr.pipeline.components import Components
from kadr.pipeline.progress import Stage, Watch
from kadr.pipeline.request import Request
from kadr.sampling.conditions import hold_first, shake
from kadr.sampling.guidance import Estimate, Text, classifier_free, plain
from kadr.sampling.loop import denoise
from kadr.sampling.noise import NoiseStreams
from kadr.sampling.positions import positions
from kadr.sampling.schedule import explicit
from kadr.sampling.state import LatentState
from kadr.sampling.steps import euler, stochastic
from kadr.shapes import LatentGrid, Size
from kadr.text.tokenizer import Tokens

T = TypeVar("T")
ENCODE_FRAMES = 8  # pixel frames that go through the encoder at a time


class Generation:
    """One request on its way. The request is complete: nothing in it is None that has a default.

    Args:
        components: the model's parts, on disk until a stage needs them.
        watch: sees every step.
        pictures: read the request's pictures; decoding alone does without.
    """

    def __init__(self, components: Components, request: Request, watch: Watch, *, pictures: bool = True) -> None:
        self.components, self.request, self.watch = components, request, watch
        self.size = request.size if isinstance(request.size, Size) else Size(*_given(request.size))
        self.frames = _given(request.frames)
        self.grid = LatentGrid.of(self.size, self.frames)
        self.shape = (1, components.transformer_config.channels, self.grid.frames, self.grid.height, self.grid.width)
        self.noise = NoiseStreams(request.seed)
        self.device, self.dtype = components.device, components.dtype
        self.levels = self._levels()
        # Pictures are read before any weight is: a file that cannot be read must cost nothing.
        wanted = request.conditions if pictures else ()
        self.pictures = [prepare_picture(c.media, self.size, _given(request.image_crf)) for c in wanted]

    @torch.no_grad()
    def latents(self, noise: Tensor | None = None, *, start: Tensor | None = None) -> Tensor:
        """Everything up to the decoder: normalised latents (1, C, f, h, w), fp32, on the device.

        Args:
            noise: shaped as the latents, instead of the seed's.
            start: normalised latents to begin from, at the first level of a schedule that leaves out pure noise.
        """
        begun = self._start(noise, start)
        text, negative = self._texts()
        state = self._conditioned(begun, self.pictures_encoded())
        with self.components.transformer() as transformer:
            rope = transformer.rope(state.positions[None].to(self.device))
            estimate = self._estimate(transformer, rope, text, negative)
            stage = Stage("denoise", len(self.levels), self.watch)

            def watch(index: int, now: Tensor, state: LatentState) -> None:
                _check(state.tokens, "denoise", f"step {index + 1} of {len(self.levels)}")
                stage.done(index + 1, float(now))

            state = denoise(
                estimate,
                state,
                self.levels.to(self.device),
                step=stochastic(partial(self._step_noise, "stochastic")) if self.request.stochastic else euler,
                prepare=shake(_given(self.request.image_noise), partial(self._step_noise, "condition")),
                watch=watch,
            )
        return state.latents()

    @torch.no_grad()
    def pictures_encoded(self) -> list[Tensor]:
        """The conditions' latents, each (1, C, 1, h, w)."""
        if not self.pictures:
            return []
        stage = Stage("encode", len(self.pictures), self.watch)
        made = []
        with self.components.encoder() as vae:
            for done, picture in enumerate(self.pictures, 1):
                latents = vae.encode(picture.to(self.device, self.dtype), chunk=ENCODE_FRAMES).float()
                _check(latents, "encode", f"picture {done} of {len(self.pictures)}")
                made.append(latents)
                stage.done(done)
        return made

    @torch.no_grad()
    def pixels(self, latents: Tensor, noise: Tensor | None = None) -> Iterator[Tensor]:
        """Decode latents (1, C, f, h, w): yields uint8 (n, H, W, 3) on the CPU, cropped and trimmed as asked."""
        self._require_shape(latents=latents, noise=noise)
        stage = Stage("decode", self.frames, self.watch)
        done = 0
        with self.components.decoder() as vae:
            level, latents = self._noised_for(vae, latents.to(self.device), noise)
            source = _Injection(self.noise)
            for chunk in vae.decode_stream(latents.to(self.dtype), level=level, noise=source):
                _check(chunk, "decode", f"frame {done + 1} of {self.frames}")
                frames = to_uint8(crop_margins(chunk[0], self.size).float())[: self.frames - done].cpu()
                done += len(frames)
                if len(frames):
                    yield frames
                    stage.done(done)

    def _levels(self) -> Tensor:
        schedule, request = self.components.schedule, self.request
        if request.levels is not None:
            return schedule.checked(explicit(request.levels))
        steps = _given(request.steps)
        return schedule.levels(
            steps, tokens=self.grid.tokens, skip_initial=request.skip_initial, skip_final=request.skip_final
        )

    def _texts(self) -> tuple[Text, Text | None]:
        """The prompt and, where guidance needs it, the negative prompt."""
        guided = _given(self.request.guidance) > 1
        prompts = [self.request.prompt] + ([self.request.negative_prompt or ""] if guided else [])
        tokens = [self._tokens(prompt) for prompt in prompts]
        stage = Stage("text", len(prompts), self.watch)
        texts = []
        with self.components.text_encoder() as encoder:
            for done, token in enumerate(tokens, 1):
                encoding = encoder(token.ids.to(self.device), token.mask.to(self.device))
                _check(encoding[token.mask.to(self.device)], "text", f"prompt {done} of {len(prompts)}")
                texts.append(Text(encoding, token.mask.to(self.device)))
                stage.done(done)
        return texts[0], texts[1] if guided else None

    def _tokens(self, prompt: str) -> Tokens:
        tokens = self.components.tokenizer.encode(prompt)
        if tokens.cut:
            limit = tokens.ids.shape[1]
            warnings.warn(
                f"the prompt is longer than {limit} tokens; cut off: {tokens.cut!r}", KadrWarning, stacklevel=2
            )
        return tokens

    def _start(self, noise: Tensor | None, start: Tensor | None) -> Tensor:
        """The latents at the first level: noise, or what was given with so much noise mixed in."""
        first = float(self.levels[0])
        noise = self.noise.draw("initial", self.shape) if noise is None else noise.float()
        self._require_shape(noise=noise, start=start)
        if start is None:
            if self.request.skip_initial:
                raise RequestError(
                    f"skip_initial is {self.request.skip_initial}, but there are no latents to start from. "
                    "Leave it out, or give `start`."
                )
            return noise.to(self.device)
        if first >= 1:
            raise RequestError("latents to start from are given, but the first level is 1: nothing of them would stay.")
        return (first * noise + (1 - first) * start.to(noise)).to(self.device)

    def _require_shape(self, **given: Tensor | None) -> None:
        for name, tensor in given.items():
            if tensor is not None and tuple(tensor.shape) != self.shape:
                raise RequestError(
                    f"{name}: the shape is {tuple(tensor.shape)}; for {self.size} and {self.frames} frames it must be "
                    f"{self.shape}."
                )

    def _conditioned(self, latents: Tensor, held: list[Tensor]) -> LatentState:
        causal = self.components.transformer_config.causal_positions
        where = positions(self.grid, fps=_given(self.request.fps), causal=causal)
        state = LatentState.of(latents, where, self.grid)
        for condition, picture in zip(self.request.conditions, held, strict=True):
            state = hold_first(state, picture, condition.strength)
        return state

    def _estimate(self, transformer: Transformer, rope: Rope, text: Text, negative: Text | None) -> Estimate:
        def model(tokens: Tensor, level: Tensor, text: Text) -> Tensor:
            return transformer(tokens.to(self.dtype), rope, text.encoding, text.mask, level)

        if negative is None:
            return plain(model, text)
        scale = _given(self.request.guidance)
        return classifier_free(model, text, negative, scale, together=self.request.guidance_batch)

    def _step_noise(self, name: str, index: int, shape: torch.Size) -> Tensor:
        return self.noise.draw(f"{name} {index}", shape)

    def _noised_for(self, vae: VAE, latents: Tensor, noise: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """The level the decoder is told, and the latents with the noise it expects mixed in, in normalised space."""
        if not vae.config.timestep_conditioning:
            return None, latents
        share = _given(self.request.decode_noise)
        noise = self.noise.draw("decode", latents.shape) if noise is None else noise
        level = torch.full((len(latents),), _given(self.request.decode_timestep), device=self.device)
        return level, (1 - share) * latents + share * noise.to(latents)


class _Injection:
    """Noise for the places where a decoder injects it, one stream each, in the order they come up."""

    def __init__(self, noise: NoiseStreams) -> None:
        self.noise, self.count = noise, 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.count += 1
        return self.noise.draw(f"injection {self.count}", shape)


def _given(value: T | None) -> T:
    """A value that the recipe has filled in."""
    assert value is not None
    return value


def _check(x: Tensor, stage: str, where: str) -> None:
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(
            f"{stage} gave numbers that are not finite at {where}. The weights are damaged, or the dtype is too "
            "narrow for them: verify the file, or try --dtype float32.",
            stage=stage,
        )
