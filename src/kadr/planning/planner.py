"""The plan of a request: its stages with the ways each can be run, from headers, the request and what is free here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kadr.checkpoints.source import Source
from kadr.kernels.cpu.winograd import F23, F43
from kadr.memory.device import free_bytes, has_fast_int8, resident_bytes
from kadr.models.transformer import CUDA_GRAPH_MAX_TOKENS
from kadr.models.vae.decoder import CHUNK_FRAMES
from kadr.planning import activations, backends
from kadr.planning.calibration import measure_rate
from kadr.planning.flops import (
    disturbed_flops,
    lora_flops,
    reading_flops,
    seconds,
    text_flops,
    transformer_flops,
    upsampler_flops,
)
from kadr.planning.plan import AS_STORED, CONVERTED, Choice, Needs, Plan, make_plan
from kadr.planning.vae_activations import decode_bytes, encode_bytes
from kadr.planning.vae_flops import decoder_flops, encoder_flops
from kadr.planning.weight_bytes import Weights, weigh
from kadr.planning.workload import WindowWork, Work
from kadr.quant.prepack import should_prepack_convs, should_prepack_linears
from kadr.quant.weight_formats import AUTO, INT8, INT8_WEIGHT_ONLY, NONE
from kadr.request.passes import PassPlan
from kadr.sampling.settings import ATTENTION_VALUES
from kadr.spec.model import DECODER, ENCODER, PASS_STAGES, TEXT_ENCODER, ModelSpec
from kadr.spec.options import OFFLOAD_BLOCKS, OFFLOAD_NONE, OFFLOAD_STAGES
from kadr.spec.weights import is_quantized

RESERVE = 0.05  # of what is free, left to the system and to what cannot be foreseen
DISK_RATE = 1.5e9  # bytes a second, of weights that are read from files
FASTER = {INT8: 1.6}  # products in 8 bits against those in the dtype
TOGETHER = {0: 1.0, F23: 0.75, F43: 0.6}  # of a decoder's time, by frames that its convolutions make; measured
SMALL = 500_000_000  # bytes: a text encoder of no more is not worth streaming
# Bytes that a process takes on the way whatever it makes: kernels, their threads. Measured.
STARTING = 15_000_000
HOLES = 0.35  # of what a stage works in: what the heap keeps back between blocks on the host. Measured.
# The way of decoded frames into a file: the video encoder itself; copies of a slice in float32, as they are scaled,
# resized and made bytes of; and the frames that the encoder looks ahead at. Measured.
CODEC, COPIES, LOOKED_AHEAD, BYTES_AHEAD = 25_000_000, 8, 60, 3


@dataclass(frozen=True)
class _Way:
    """One way to hold a part: see `Choice`. streams: its blocks come and go."""

    hold: str
    streams: bool = False
    why: str = ""


class Planner:
    """Makes the plan of one request.

    Args:
        spec: the model's components, known by their headers.
        cached: private bytes of modules that are in memory already: there for those who use them.
    """

    def __init__(self, spec: ModelSpec, work: Work, *, cached: int = 0) -> None:
        self.spec, self.work, self.cached = spec, work, cached
        self.device, self.dtype = spec.device, spec.dtype
        self.size = self.dtype.itemsize
        self.on_host = self.device.type == "cpu"

    def plan(self) -> Plan:
        """The plan.

        Raises:
            PlanError: a stage cannot be run in what is free.
        """
        held = self.cached
        free = free_bytes(self.device) + held
        host = free if self.on_host else free_bytes(torch.device("cpu"))
        base = resident_bytes() - held + STARTING if self.on_host else 0
        plan = make_plan(
            list(self.needs()),
            device=str(self.device),
            base=base,
            free=int(free * (1 - RESERVE)),
            host_free=int(host * (1 - RESERVE)),
        )
        return replace(plan, kept=frozenset()) if self.spec.offload == OFFLOAD_STAGES else plan

    def needs(self) -> Iterator[Needs]:
        """The stages, in the order they run."""
        for need in self._all():
            if not self.work.stages or need.stage in self.work.stages:
                yield need

    def _all(self) -> Iterator[Needs]:
        if self.work.prompts:
            yield self._text()
        if any(self.work.media):
            yield self._encode()
        for number, plan in enumerate(self.work.passes):
            if number:
                yield self._upscale()
            yield self._in_windows() if self.work.windows else self._sampled(number, plan)
        yield self._decode()

    @cached_property
    def rate(self) -> float:
        """FLOPs a second."""
        return measure_rate(self.dtype, self.device)

    def _text(self) -> Needs:
        text = self.spec.text
        working = activations.text_bytes(text.config, self.size)
        flops = self.work.prompts * text_flops(text.config)
        choices = []
        for way in self._text_ways(text.source):
            weights = weigh(text.source, self.dtype, way.hold, looked_up=True)
            path = backends.of_matrices(self.dtype, self.device, way.hold, streamed=True)  # never packed: it runs once
            choices.append(self._choice(way, weights, working, flops, text.source.size_bytes, path))
        return Needs(stage="text", part=TEXT_ENCODER, choices=tuple(choices))

    def _text_ways(self, source: Source) -> list[_Way]:
        streamed = _Way(AS_STORED, streams=True, why="the text encoder is read block by block, once per prompt")
        resident = _Way(CONVERTED)
        offload = self.spec.offload
        if offload == OFFLOAD_NONE or source.size_bytes <= SMALL:
            return [resident, streamed] if offload != OFFLOAD_NONE else [resident]
        # On a CPU streaming costs nothing: the pages are the system's, in memory or not.
        return [streamed] if self.on_host or offload == OFFLOAD_BLOCKS else [resident, streamed]

    def _encode(self) -> Needs:
        vae = self.spec.vae
        config = vae.info.vae
        assert config is not None
        grids = [grid for grids in self.work.media for grid in grids]
        # Of pictures, pairs make a single product.
        together = F23 if should_prepack_convs(self.dtype, self.device) else 0
        working = max(encode_bytes(config, grid, self.size, together=together) for grid in grids)
        flops = sum(encoder_flops(config, grid) for grid in grids)
        path = backends.of_convolutions(self.dtype, self.device)
        weights = self._vae_weights("encoder", together)
        choice = self._choice(_Way(CONVERTED, why=self._context()), weights, working, flops, 0, path)
        return Needs(stage="encode", part=ENCODER, choices=(replace(choice, winograd_frames=together),))

    def _context(self) -> str:
        """What controls cost, in words."""
        if self.work.windows:
            one = max(self.work.windows, key=lambda window: window.context)
            pairs = [(one.context, one.plan)]
        else:
            pairs = list(zip(self.work.context, self.work.passes, strict=False))
        if not any(tokens for tokens, _ in pairs):
            return ""
        of = "a window's" if self.work.windows else "the video's"
        told = ", ".join(f"{tokens} beside {of} {plan.grid.num_tokens}" for tokens, plan in pairs)
        return f"the transformer works on tokens of controls, too: {told}"

    def _decode(self) -> Needs:
        config = self.spec.vae.info.vae
        assert config is not None
        grid, path = self.work.passes[-1].grid, backends.of_convolutions(self.dtype, self.device)
        flops, choices = decoder_flops(config, grid), []
        for handed, together in self._slices():
            working = decode_bytes(config, grid, self.size, handed=handed, together=together) + self._frames(handed)
            why = "" if handed == CHUNK_FRAMES else f"the decoder hands on {handed} frames at a time"
            if together == F23 and handed == CHUNK_FRAMES:
                why = "its convolutions make 2 frames at a time"
            weights = self._vae_weights("decoder", together)
            choice = self._choice(_Way(CONVERTED, why=why), weights, working, flops, 0, path)
            seconds = choice.seconds * TOGETHER[together] * (1 + 0.1 * (CHUNK_FRAMES - handed))
            choices.append(replace(choice, frames=handed, winograd_frames=together, seconds=seconds))
        return Needs(stage="decode", part=DECODER, choices=tuple(choices))

    def _slices(self) -> list[tuple[int, int]]:
        """Frames that the decoder hands on, and that its convolutions make at a time, the fastest first."""
        if not should_prepack_convs(self.dtype, self.device):
            return [(CHUNK_FRAMES, 0), (2, 0), (1, 0)]
        return [(CHUNK_FRAMES, F43), (CHUNK_FRAMES, F23), (2, F23), (1, F23)]

    def _frames(self, handed: int) -> int:
        """Of decoded frames on their way into a file."""
        plan = self.work.passes[-1]
        pixels = plan.size.width * plan.size.height
        return CODEC + pixels * (COPIES * handed * 3 * 4 + BYTES_AHEAD * min(plan.frames, LOOKED_AHEAD))

    def _vae_weights(self, half: str, together: int) -> Weights:
        source = self.spec.vae.sources["vae"]
        infos = {name: info for name, info in source.infos.items() if name.startswith(f"{half}.")}
        return weigh(replace(source, infos=infos), self.dtype, CONVERTED, together=together)

    def _upscale(self) -> Needs:
        grid, most = self.work.passes[0].grid, Choice(dtype="float32")
        for checkpoint in self.spec.upscalers.values():
            config, source = checkpoint.info.upscaler, checkpoint.sources["upsampler"]
            assert config is not None
            weights = weigh(source, torch.float32, CONVERTED)
            working, flops = activations.upsampler_bytes(config, grid), upsampler_flops(config, grid)
            one = self._choice(_Way(CONVERTED), weights, working, flops, 0)
            most = replace(max(most, one, key=lambda choice: choice.bytes), seconds=most.seconds + one.seconds)
        return Needs(stage="upscale", part="upscaler", choices=(replace(most, dtype="float32"),))

    def _in_windows(self) -> Needs:
        """As much memory as the largest window takes, and the time of all."""
        kinds: dict[tuple[object, ...], list[WindowWork]] = {}  # all but the first and the last are mostly alike
        for window in self.work.windows:
            alike = (window.plan.frames, window.texts, window.extra, window.held, window.context)
            kinds.setdefault(alike, []).append(window)
        needs = []
        for one, *others in kinds.values():
            work = replace(
                self.work,
                passes=(one.plan,),
                texts=one.texts,
                extra=(one.extra,),
                held=(one.held,),
                context=(one.context,),
                windows=(),
            )
            needs.append((1 + len(others), Planner(self.spec, work)._sampled(0, one.plan)))
        choices = []
        for same in zip(*(need.choices for _, need in needs), strict=True):
            seconds = sum(count * choice.seconds for (count, _), choice in zip(needs, same, strict=True))
            largest = max(same, key=lambda choice: choice.bytes)
            choices.append(replace(largest, seconds=seconds, windows=len(self.work.windows)))
        return replace(needs[0][1], choices=tuple(choices))

    def _sampled(self, number: int, plan: PassPlan) -> Needs:
        checkpoint = self.spec.transformers[number]
        source, config = checkpoint.sources["transformer"], self.spec.config(number)
        tokens = plan.grid.num_tokens + self.work.beside(number)
        working, flops = self._working(number, plan, tokens), self._flops(number, plan, tokens)
        choices = []
        for way in self._ways(source):
            packed = not way.streams and should_prepack_linears(self.dtype, self.device)
            weights = self._with_loras(weigh(source, self.dtype, way.hold, packed=packed), way)
            read = source.size_bytes * (len(plan.steps) if way.streams else 1)
            path = backends.of_matrices(self.dtype, self.device, way.hold, streamed=way.streams)
            choices.append(self._choice(way, weights, working, flops, read, path))
        stage = PASS_STAGES[number]
        assert config.num_layers
        return Needs(stage=stage, part=self.spec.transformer_name(number), choices=tuple(choices))

    def _ways(self, source: Source) -> list[_Way]:
        """How a transformer can be held, best first."""
        scheme, offload = self.spec.quant, self.spec.offload
        plain = source.dtype == self.dtype or any(info.ggml_type is not None for info in source.infos.values())
        merged = self.spec.loras.merged
        resident = [_Way(CONVERTED)]
        if not plain and not merged:
            resident.append(_Way(AS_STORED, why="weights stay as stored"))
        streamed = [_Way(AS_STORED, streams=True, why="the transformer's blocks come and go")]
        if merged:
            # On a CPU blocks can come and go only where they lie in a file.
            streamed = [] if self.on_host else [replace(streamed[0], hold=CONVERTED)]
        if scheme not in (NONE, AUTO):
            resident = [_Way(scheme)]
            streamed = [] if self.on_host else [_Way(scheme, streams=True, why=streamed[0].why)]
        elif scheme == AUTO and not is_quantized(source):
            small = INT8 if not self.on_host or has_fast_int8() else INT8_WEIGHT_ONLY
            resident.append(_Way(small, why="weights in 8 bits, as --quant auto allows"))
        if offload == OFFLOAD_NONE:
            return resident
        return streamed if offload == OFFLOAD_BLOCKS and streamed else resident + streamed

    def _with_loras(self, weights: Weights, way: _Way) -> Weights:
        """The bytes with those of the LoRAs: beside the weights, or of weights that are the file's no more."""
        loras = self.spec.loras
        if not loras:
            return weights
        if not loras.merged:
            return replace(weights, own=weights.own + loras.bytes(self.dtype))
        changed = min(weights.mapped, loras.changed_bytes(self.dtype)) if way.hold == CONVERTED else 0
        return replace(weights, mapped=weights.mapped - changed, own=weights.own + changed)

    def _working(self, number: int, plan: PassPlan, tokens: int) -> int:
        config, texts = self.spec.config(number), self._texts(plan)
        while_made, afterwards = activations.rope_bytes(config, tokens, self.size)
        both, longest = self.work.together and plan.guided, max(texts)
        evaluation = activations.transformer_bytes(
            config,
            tokens,
            self.size,
            batch=2 if both else 1,
            text=longest,
            per_token=self.work.levels(number),
            disturbed=int(any(step.stg_scale > 0 and step.skip_blocks for step in plan.steps)),
            fused=should_prepack_linears(self.dtype, self.device),
        )
        loras = self.spec.loras
        if loras and not loras.merged:
            evaluation += activations.lora_bytes(
                tokens, self.size, rank=loras.rank, widest=loras.widest, batch=2 if both else 1
            )
        if self.work.cache is not None:
            evaluation += activations.step_cache_bytes(
                config,
                tokens,
                self.size,
                points=self.work.cache.cached_steps,
                streams=max(step.model_evaluations for step in plan.steps),
                batch=2 if both else 1,
            )
        states = 8 * tokens * config.in_channels * 4  # latents, noise, velocities of the guidance
        read = activations.reading_bytes(config, self.size, text=len(texts) * longest if both else sum(texts))
        if not self.on_host and (2 if both else 1) * tokens <= CUDA_GRAPH_MAX_TOKENS:
            evaluation, read = 2 * evaluation, 2 * read  # a graph has memory and inputs of its own
        return max(while_made, afterwards + evaluation) + read + states

    def _texts(self, plan: PassPlan) -> tuple[int, ...]:
        """Tokens of the prompts that a pass reads."""
        return self.work.texts if plan.guided else self.work.texts[:1]

    def _flops(self, number: int, plan: PassPlan, tokens: int) -> int:
        config, texts = self.spec.config(number), self._texts(plan)
        total = reading_flops(config, text=sum(texts))
        levels, longest, loras = 2 if self.work.levels(number) else 1, max(texts), self.spec.loras
        beside = 0 if loras.merged else lora_flops(sum(loras.parameters), tokens)
        for step in plan.steps:
            own = transformer_flops(config, tokens, text=longest, levels=levels)
            total += (1 + (step.cfg_scale > 1)) * (own + beside)
            if step.stg_scale > 0 and step.skip_blocks:
                mode = plan.settings.guidance.stg_mode or ATTENTION_VALUES
                total += disturbed_flops(config, tokens, step.skip_blocks, mode, text=longest)
        return total

    def _choice(
        self, way: _Way, weights: Weights, working: int, flops: int, read: int, path: str = backends.PLAIN
    ) -> Choice:
        rate = self.rate * FASTER.get(way.hold, 1.0)
        choice = Choice(
            dtype=str(self.dtype).removeprefix("torch."),
            hold=way.hold,
            mapped=weights.mapped,
            own=weights.own,
            working=working + int(HOLES * working * self.on_host) + weights.scratch,
            seconds=seconds(flops, rate, read=read, disk_rate=DISK_RATE),
            path=path,
            why=way.why,
        )
        if not self.on_host:
            choice = replace(choice, mapped=0, own=weights.mapped + weights.own)
        return self._streamed(choice, weights) if way.streams else choice

    def _streamed(self, choice: Choice, weights: Weights) -> Choice:
        """With the blocks in memory only while they run."""
        if self.on_host:
            # One block runs; of the next, what the system has read ahead is not the process's.
            mapped = weights.mapped - weights.blocks + weights.block
            return replace(choice, streamed=weights.count, mapped=mapped)
        blocks = weights.all_blocks
        block = blocks // max(1, weights.count)
        return replace(choice, streamed=weights.count, own=choice.own - blocks + 2 * block, host=blocks)
