"""One generation, stage by stage: text, pictures, denoising, a second pass where one is asked for, decoding.

Data goes one way. A stage takes its module from the shelf and gives it back before the next one takes its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from kadr.errors import RequestError
from kadr.media.frames import crop_margins, resize, to_uint8, to_unit
from kadr.models.transformer import Reading, Transformer
from kadr.models.vae.decoder import SLICE
from kadr.nn.rope import Rope
from kadr.pipeline.components import PASS_STAGES, Components
from kadr.pipeline.conditions import read_conditions, read_start
from kadr.pipeline.controls import Reference, drawings, fetched, read_controls, reference
from kadr.pipeline.fitting import Fitted, Pixels, added, fitted, put, settled
from kadr.pipeline.guard import Watchman, guarded, guarded_frames
from kadr.pipeline.long import (
    Guide,
    InMemory,
    Kept,
    Pieces,
    check_placed,
    in_window,
    is_first_picture,
    rechunked,
    sample_windows,
)
from kadr.pipeline.passes import PassPlan, check_beginning, check_blocks, plan_passes, plan_windows, warn_cached
from kadr.pipeline.planning import WindowWork, Work
from kadr.pipeline.progress import Stage, Watch
from kadr.pipeline.prompts import Prompts
from kadr.pipeline.request import Request
from kadr.pipeline.rescue import rescued, rescued_frames
from kadr.sampling.cache import PassCache
from kadr.sampling.conditions import shake
from kadr.sampling.context import Context
from kadr.sampling.guidance import Disturb, Estimate, Text, guided
from kadr.sampling.latents import adain, tone_map
from kadr.sampling.loop import denoise
from kadr.sampling.noise import NoiseStreams
from kadr.sampling.positions import positions
from kadr.sampling.state import LatentState
from kadr.sampling.steps import euler, stochastic
from kadr.shapes import Size

T = TypeVar("T")
ENCODE_FRAMES = 8  # pixel frames that go through the encoder at a time


@dataclass(frozen=True)
class Encoded:
    """What the VAE made of the request's media for one pass.

    Args:
        items: the conditions with their latents, each (1, C, n, h, w).
        start: latents of the video to start from; None where there is none.
        references: latents of the controls, each (1, C, f, h, w).
    """

    items: list[tuple[Fitted, Tensor]]
    start: Tensor | None = None
    references: list[Tensor] = field(default_factory=list)


class Generation:
    """One request on its way. The request is complete: nothing in it is None that has a default.

    Args:
        components: the model's parts, on disk until a stage needs them.
        watch: sees every step.
        media: read the request's pictures and clips; decoding alone does without.
    """

    def __init__(self, components: Components, request: Request, watch: Watch, *, media: bool = True) -> None:
        self.components, self.request, self.watch = components, request, watch
        self.size = request.size if isinstance(request.size, Size) else Size(*given(request.size))
        self.frames = given(request.frames)
        self.passes = plan_passes(request, components.schedules, upscaling=components.upscaling)
        for number, plan in enumerate(self.passes):
            check_blocks(plan, components.config(number).layers)
            warn_cached(plan, request.step_cache)
            components.loras.strengths(number, request.lora_strengths)  # refuses what is none
        self.windows = plan_windows(request, components.schedules[0])
        self.spans = () if request.windows is None else request.windows.spans(self.frames)
        self.noise = NoiseStreams(request.seed)
        self.device = components.device
        self.guided = any(plan.guided for plan in self.passes)
        own = dict.fromkeys(request.prompts)
        self.prompts = Prompts(components, [*own, *([request.negative_prompt or ""] * self.guided)])
        # Media is read before any weight is: a file that cannot be read must cost nothing.
        self.placed = read_conditions(request) if media else []
        if self.spans:
            check_placed(self.placed, self.spans)
        self.start = self._start_pixels() if media and request.video is not None else None
        self.fitted = [self._fitted(plan) for plan in self.passes]
        self.followed = read_controls(request) if media else []
        self.downscale = components.loras.reference_downscale if self.followed else 1
        self.references = [self._references(plan) for plan in self.passes]

    def shape(self, number: int) -> tuple[int, ...]:
        """Of the latents of a pass: (1, C, f, h, w)."""
        return self._shape(self.passes[number])

    def _shape(self, plan: PassPlan) -> tuple[int, ...]:
        grid = plan.grid
        return 1, self.components.transformer_config.channels, grid.frames, grid.height, grid.width

    def work(self, stages: Collection[str] = ()) -> Work:
        """What is to be done, for the plan. stages: those to be run; () is all."""
        media = [[item.grid for item in items] for items in self.fitted]
        seen = [[one.grid for one in references] for references in self.references]
        if self.start is not None:
            media[0].append(self.start.grid)
        return Work(
            passes=self.passes,
            prompts=self.prompts.missing if not stages or "text" in stages else 0,
            texts=self.prompts.lengths,
            media=tuple((*shown, *followed) for shown, followed in zip(media, seen, strict=True)),
            extra=tuple(sum(added(item) for item in items) for items in self.fitted),
            context=tuple(sum(grid.tokens for grid in grids) for grids in seen),
            held=tuple(bool(items) for items in self.fitted),
            together=bool(self.request.guidance_batch),
            cache=self.request.step_cache,
            stages=frozenset(stages),
            windows=tuple(self._window_work(plan) for plan in self.windows),
        )

    def _window_work(self, plan: PassPlan) -> WindowWork:
        items, windows = in_window(self.fitted[0], self.spans[plan.window]), self.request.windows
        assert windows is not None
        shown = (windows.latents[1] if plan.window else 0) + bool(windows.remember)
        lengths = self.prompts.lengths
        return WindowWork(
            plan=plan,
            texts=(lengths[self._prompt(plan.window)], *lengths[-1:] * self.guided),
            extra=sum(map(added, items.values())) + shown * plan.grid.height * plan.grid.width,
            held=bool(items) or shown > 0,
        )

    def _prompt(self, window: int) -> int:
        """Which of the prompts that are encoded a window shows; the last one holds for the rest."""
        prompts = self.request.prompts
        return self.prompts.texts.index(prompts[min(window, len(prompts) - 1)])

    @torch.no_grad()
    def latents(self, noise: Tensor | None = None, *, start: Tensor | None = None) -> Tensor:
        """Everything up to the decoder: normalised latents (1, C, f, h, w), fp32, on the device.

        Args:
            noise: shaped as the latents of the first pass, instead of the seed's.
            start: normalised latents to begin from, at the first level of a schedule that leaves out pure noise.
        """
        self._check_start(noise, start)
        if self.windows:
            return self.windowed(InMemory(), noise).whole().to(self.device)
        networks = fetched(self.followed)
        texts = self.prompts.encoded(self.watch)
        media = self.media_encoded(networks)
        begun = self._begun(self.passes[0], noise, media[0].start if start is None else start)
        latents = self._sampled(self.passes[0], begun, media[0], texts)
        for number, plan in enumerate(self.passes[1:], 1):
            larger = guarded("upscale", torch.float32, partial(self._upscaled, latents))
            begun = self._begun(plan, None, larger)
            latents = self._sampled(plan, begun, media[number], texts)
        return latents

    @torch.no_grad()
    def windowed(self, kept: Kept, noise: Tensor | None = None) -> Pieces:
        """The latents of a long video; the windows that `kept` does not have are made, one by one.

        Args:
            noise: (1, C, f, h, w) of the whole video, instead of the seed's.
        """
        windows = given(self.request.windows)
        if kept.finished == len(self.spans):
            return Pieces(self.spans, kept.read)
        texts = self.prompts.encoded(self.watch)
        media = self.media_encoded()[0].items
        latents = [held for _, held in media]

        def sample(number: int, guides: Sequence[Guide]) -> Tensor:
            plan, span = self.windows[number], self.spans[number]
            own = None if noise is None else noise[:, :, span.start : span.end]
            items = in_window((item for item, _ in media), span)
            shown = Encoded([(item, latents[index]) for index, item in items.items()])
            read = [texts[self._prompt(number)], *texts[-1:] * plan.guided]
            return self._sampled(plan, self._begun(plan, own, None), shown, read, guides)

        picture = next((held for item, held in media if is_first_picture(item)), None) if windows.remember else None
        return sample_windows(windows, self.spans, kept, sample, picture)

    @torch.no_grad()
    def media_encoded(self, networks: dict[str, list[Path]] | None = None) -> list[Encoded]:
        """The request's media through the VAE's encoder, for each pass. networks: as `fetched` gives them."""
        if not any(self.fitted) and not any(self.references) and self.start is None:
            return [Encoded([]) for _ in self.passes]
        drawn = drawings(self.followed, fetched(self.followed) if networks is None else networks, self.watch)
        references = [
            [replace(one, drawn=way) for one, way in zip(each, drawn, strict=True)] for each in self.references
        ]
        run = rescued(self.components, "encode", partial(self._media_encoded, references))
        return guarded("encode", self.components.dtype_of("encode"), run)

    def _media_encoded(self, drawn: list[list[Reference]], dtype: torch.dtype | None) -> list[Encoded]:
        count = sum(len(items) for items in self.fitted) + sum(len(references) for references in drawn)
        count += self.start is not None
        stage, watchman = Stage("encode", count, self.watch), Watchman.on(self.device)
        own, done, made = dtype or self.components.dtype_of("encode"), 0, []
        with self.components.encoder(dtype) as vae:

            def encode(pixels: Pixels | Reference) -> Tensor:
                nonlocal done
                chunks = pixels.chunks(ENCODE_FRAMES, device=self.device, dtype=own)
                latents = vae.encode_stream(chunks, len(pixels.frames)).float()
                done += 1
                watchman.look(latents, f"picture or clip {done} of {count}")
                stage.done(done)
                return latents

            for number, (items, references) in enumerate(zip(self.fitted, drawn, strict=True)):
                start = encode(self.start) if number == 0 and self.start is not None else None
                shown = [(item, encode(item.pixels)) for item in items]
                made.append(Encoded(shown, start, [encode(one) for one in references]))
            watchman.settle()
        return made

    @torch.no_grad()
    def pixels(self, latents: Tensor | Pieces, noise: Tensor | None = None) -> Iterator[Tensor]:
        """Decode latents (1, C, f, h, w): yields uint8 (n, H, W, 3) on the CPU, cropped and trimmed as asked.

        Those of a long video may come piece by piece.
        """
        if isinstance(latents, Tensor):
            self._require_shape(len(self.passes) - 1, latents=latents, noise=noise)
            latents = Pieces.of(latents, self.spans) if self.spans else latents.to(self.device)
        yield from guarded_frames(
            "decode",
            self.components.dtype_of("decode"),
            rescued_frames(self.components, "decode", partial(self._decoded, latents, noise)),
        )

    def _decoded(self, latents: Tensor | Pieces, noise: Tensor | None, dtype: torch.dtype | None) -> Iterator[Tensor]:
        """As `pixels`; dtype: to compute in, instead of the plan's."""
        stage, watchman = Stage("decode", self.frames, self.watch), Watchman.on(self.device)
        made, done = self.size.snapped(), 0
        own = dtype or self.components.dtype_of("decode")
        handed = self.components.choice("decode").frames or SLICE
        with self.components.decoder(dtype) as vae:
            conditioned, injected = vae.config.timestep_conditioning, _Injection(self.noise)
            level = torch.full((1,), given(self.request.decode_timestep), device=self.device) if conditioned else None
            chunks = rechunked((part.to(own) for part in self._noised(latents, noise, mixed=conditioned)), handed)
            for chunk in vae.decode_chunks(
                chunks, self.passes[-1].grid.frames, level=level, noise=injected, handed=handed
            ):
                watchman.look(chunk, f"frame {done + 1} of {self.frames}")
                unit = crop_margins(resize(to_unit(chunk[0]), made), self.size)
                frames = to_uint8(unit)[: self.frames - done].cpu()
                watchman.settle()  # the frames have come, so the answer has
                done += len(frames)
                if len(frames):
                    yield frames
                    stage.done(done)

    def _fitted(self, plan: PassPlan) -> list[Fitted]:
        return [fitted(item, self.request, plan) for item in settled(self.placed, self.request, plan)]

    def _references(self, plan: PassPlan) -> list[Reference]:
        return [reference(one, self.request, plan, self.downscale) for one in self.followed]

    def _start_pixels(self) -> Pixels:
        """Of the video to start from; of every second frame, where the first pass makes only those."""
        plan, film = self.passes[0], read_start(self.request)
        if plan.fps != given(self.request.fps):
            last = len(film) - 1
            film = film.chosen(min(2 * index, last) for index in range(plan.frames))
        return Pixels.of(film, self.size, given(self.request.image_crf), plan.size, resize=True)

    def _check_start(self, noise: Tensor | None, start: Tensor | None) -> None:
        """Refuse noise and latents that do not fit, and schedules that do not fit what is started from."""
        self._require_shape(0, noise=noise, start=start)
        if start is not None and self.windows:
            raise RequestError("latents to start from are given, and windows too; a long video begins at noise alone.")
        if start is not None and self.start is not None:
            raise RequestError("latents to start from are given, and a video too; give the one or the other.")
        check_beginning(self.passes[0], started=start is not None or self.start is not None)

    def _begun(self, plan: PassPlan, noise: Tensor | None, start: Tensor | None) -> Tensor:
        """The latents at the first level: noise, or what is there with so much noise mixed in."""
        if noise is None:
            noise = self.noise.draw(_stream(plan, "initial"), self._shape(plan))
        noise = noise.float().to(self.device)
        if start is None:
            return noise
        first = float(plan.levels[0])
        return first * noise + (1 - first) * start.to(noise)

    def _require_shape(self, number: int, **tensors: Tensor | None) -> None:
        plan, shape = self.passes[number], self.shape(number)
        for name, tensor in tensors.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise RequestError(
                    f"{name}: the shape is {tuple(tensor.shape)}; for {plan.size} and {plan.frames} frames it must be "
                    f"{shape}."
                )

    def _conditioned(
        self, plan: PassPlan, latents: Tensor, media: Encoded, guides: Sequence[Guide] = ()
    ) -> LatentState:
        causal = self.components.config(plan.number - 1).causal_positions
        state = LatentState.of(latents, positions(plan.grid, fps=plan.fps, causal=causal), plan.grid)
        for index, (item, held) in enumerate(media.items):
            name = _stream(plan, f"keyframe {index}")
            state = put(state, item, held, plan, causal=causal, draw=partial(self.noise.draw, name))
        for guide in guides:
            draw = partial(self.noise.draw, _stream(plan, guide.name))
            state = guide.shown(state, plan, causal=causal, draw=draw)
        return state

    def _context(self, plan: PassPlan, media: Encoded) -> Context | None:
        if not media.references:
            return None
        causal = self.components.config(plan.number - 1).causal_positions
        return Context.of(media.references, fps=plan.fps, causal=causal, downscale=self.downscale)

    def _sampled(
        self,
        plan: PassPlan,
        begun: Tensor,
        media: Encoded,
        texts: Sequence[Text],
        guides: Sequence[Guide] = (),
    ) -> Tensor:
        """The latents at the end of a pass or window, from those at its first level.

        Args:
            texts: of the prompt and, where guidance needs it, the negative prompt.
        """
        state, stage = self._conditioned(plan, begun, media, guides), PASS_STAGES[plan.number - 1]
        run = rescued(self.components, stage, partial(self._denoised, plan, state, self._context(plan, media), texts))
        return guarded(stage, self.components.dtype_of(stage), run).latents()

    def _denoised(
        self,
        plan: PassPlan,
        state: LatentState,
        context: Context | None,
        texts: Sequence[Text],
        dtype: torch.dtype | None,
    ) -> LatentState:
        number, count = plan.number - 1, len(plan.levels)
        name, watchman = PASS_STAGES[number], Watchman.on(self.device)
        own = dtype or self.components.dtype_of(name)
        with self.components.transformer(number, dtype, self.request.lora_strengths) as transformer:
            rope = transformer.rope(_positions(state, context)[None].to(self.device))
            long = (plan.window + 1, plan.windows) if plan.windows > 1 else None
            stage = Stage(name, count * plan.windows, self.watch, count * plan.window, long)

            def watch(index: int, now: Tensor, state: LatentState) -> None:
                place = f" of window {plan.window + 1}" if plan.windows > 1 else ""
                watchman.look(state.tokens, f"step {index + 1} of {count}{place}")
                stage.done(index + 1, float(plan.levels[index]))  # not `now`, which lies on the device

            state = denoise(
                self._estimate(
                    plan, transformer, rope, context, [text._replace(encoding=text.encoding.to(own)) for text in texts]
                ),
                state,
                plan.levels.to(self.device),
                step=stochastic(self._step_noise(plan, "stochastic")) if plan.settings.stochastic else euler,
                prepare=shake(given(self.request.image_noise), self._step_noise(plan, "condition")),
                watch=watch,
            )
            watchman.settle()
        return state

    def _estimate(
        self, plan: PassPlan, transformer: Transformer, rope: Rope, context: Context | None, texts: Sequence[Text]
    ) -> Estimate:
        dtype = texts[0].encoding.dtype
        caching = self.request.step_cache
        cached = None if caching is None else PassCache(caching, plan.steps)
        readings: dict[int, Reading] = {}  # by the identity of texts, which are there as long as the steps are

        def model(
            tokens: Tensor, level: Tensor, text: Text, disturb: Disturb | None = None
        ) -> tuple[Tensor, Tensor | None]:
            if id(text) not in readings:
                readings[id(text)] = transformer.read(*text)
            count = tokens.shape[1]
            if context is not None:
                tokens, level = context.behind(tokens, level)
            arguments = (tokens.to(dtype), rope, readings[id(text)], None, level)
            how: dict[str, Any] = {} if cached is None else {"cache": cached.stream(id(text))}
            if disturb is None:
                return transformer(*arguments, **how)[:, :count], None
            said, disturbed = transformer.with_disturbed(*arguments, **disturb._asdict() | how)
            return said[:, :count], disturbed[:, :count]

        text, negative = (*texts, None)[:2]
        assert text is not None
        together = self.request.guidance_batch
        estimate = guided(model, text, negative, plan.settings.guidance, plan.steps, together=together)
        return estimate if cached is None else cached.over(estimate)

    def _step_noise(self, plan: PassPlan, name: str) -> StepNoise:
        return StepNoise(self.noise, _stream(plan, name))

    def _upscaled(self, latents: Tensor, _: torch.dtype | None) -> Tensor:
        """The latents at the size of the second pass, with the statistics they had before; in float32, always."""
        with self.components.statistics() as vae:
            statistics = vae.statistics
            made = statistics.restore(latents.float())
            kinds = self.components.upscalers
            stage, watchman = Stage("upscale", len(kinds), self.watch), Watchman.on(self.device)
            for done, kind in enumerate(kinds, 1):
                with self.components.upscaler(kind) as upscaler:
                    made = upscaler(made)
                watchman.look(made, f"{kind} upscaler")
                stage.done(done)
            watchman.settle()
            return adain(statistics.normalise(made), latents)

    def _noised(self, latents: Tensor | Pieces, noise: Tensor | None, *, mixed: bool) -> Iterator[Tensor]:
        """The latents, tone mapped, with the noise mixed in that the decoder may expect; those of each window apart."""
        share, pressed = given(self.request.decode_noise), given(self.passes[-1].settings.tone_map)
        for number, part in enumerate([latents] if isinstance(latents, Tensor) else latents):
            part = part.to(self.device)
            if mixed:
                own = self.noise.draw(_in_window("decode", number), part.shape) if noise is None else noise
                if noise is not None and self.spans:
                    own = noise[:, :, (start := self.spans[number].kept_from) : start + part.shape[2]]
                part = (1 - share) * part + share * own.to(part)
            yield tone_map(part, pressed)


@dataclass(frozen=True)
class StepNoise:
    """Noise for each step of a sampling, one stream each."""

    noise: NoiseStreams
    name: str

    def __call__(self, index: int, shape: torch.Size) -> Tensor:
        return self.noise.draw(f"{self.name} {index}", shape)


class _Injection:
    """Noise for the places where a decoder injects it, one stream each, in the order they come up."""

    def __init__(self, noise: NoiseStreams) -> None:
        self.noise, self.count = noise, 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.count += 1
        return self.noise.draw(f"injection {self.count}", shape)


def _positions(state: LatentState, context: Context | None) -> Tensor:
    """Of all that the network sees, (3, N+M)."""
    if context is None:
        return state.positions
    return torch.cat([state.positions, context.positions.to(state.positions)], dim=1)


def _stream(plan: PassPlan, name: str) -> str:
    """The stream of a pass or window: those of the second pass, and of each later window, have names of their own."""
    return f"second {name}" if plan.number > 1 else _in_window(name, plan.window)


def _in_window(name: str, window: int) -> str:
    return f"window {window + 1} {name}" if window else name


def given(value: T | None) -> T:
    """A value that the recipe has filled in."""
    assert value is not None
    return value
