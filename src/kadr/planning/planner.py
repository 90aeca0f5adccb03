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
from kadr.planning.calibration import measure_matmul_rate
from kadr.planning.flops import (
    estimate_seconds,
    lora_flops,
    perturbed_flops,
    text_encoder_flops,
    text_kv_flops,
    transformer_flops,
    upscaler_flops,
)
from kadr.planning.plan import AS_STORED, CONVERTED, Placement, Plan, StageOptions, make_plan
from kadr.planning.vae_activations import vae_decode_activation_bytes, vae_encode_activation_bytes
from kadr.planning.vae_flops import vae_decoder_flops, vae_encoder_flops
from kadr.planning.weight_bytes import WeightBytes, weight_bytes
from kadr.planning.workload import WindowWorkload, Workload
from kadr.quant.prepack import should_prepack_convs, should_prepack_linears
from kadr.quant.weight_formats import AUTO_QUANT, INT8, INT8_WEIGHT_ONLY, NONE
from kadr.request.passes import ResolvedPass
from kadr.sampling.settings import ATTENTION_VALUES
from kadr.spec.model import PASS_STAGES, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER, ModelSpec
from kadr.spec.offload import OFFLOAD_BLOCKS, OFFLOAD_NONE, OFFLOAD_STAGES
from kadr.spec.weights import is_quantized

RESERVED_FRACTION = 0.05  # of what is free, left to the system and to what cannot be foreseen
DISK_BYTES_PER_SECOND = 1.5e9  # bytes a second, of weights that are read from files
MATMUL_SPEEDUP = {INT8: 1.6}  # products in 8 bits against those in the dtype
WINOGRAD_TIME_RATIO = {
    0: 1.0,
    F23: 0.75,
    F43: 0.6,
}  # of a decoder's time, by frames that its convolutions make; measured
MIN_STREAM_BYTES = 500_000_000  # bytes: a text encoder of no more is not worth streaming
# Bytes that a process takes on the way whatever it makes: kernels, their threads. Measured.
STARTUP_BYTES = 15_000_000
HEAP_FRAGMENTATION = 0.35  # of what a stage works in: what the heap keeps back between blocks on the host. Measured.
# The way of decoded frames into a file: the video encoder itself; copies of a slice in float32, as they are scaled,
# resized and made bytes of; and the frames that the encoder looks ahead at. Measured.
CODEC_BYTES, FRAME_COPIES, LOOKAHEAD_FRAMES, LOOKAHEAD_BYTES_PER_PIXEL = 25_000_000, 8, 60, 3


@dataclass(frozen=True)
class _WeightOption:
    """One way to hold a part: see `Placement`. streams: its blocks come and go."""

    weight_format: str
    is_streamed: bool = False
    reason: str = ""


class Planner:
    """Makes the plan of one request.

    Args:
        spec: the model's components, known by their headers.
        cached: private bytes of modules that are in memory already: there for those who use them.
    """

    def __init__(self, spec: ModelSpec, workload: Workload, *, cached: int = 0) -> None:
        self.spec, self.workload, self.cached = spec, workload, cached
        self.device, self.dtype = spec.device, spec.dtype
        self.itemsize = self.dtype.itemsize
        self.on_cpu = self.device.type == "cpu"

    def plan(self) -> Plan:
        """The plan.

        Raises:
            PlanError: a stage cannot be run in what is free.
        """
        held = self.cached
        free = free_bytes(self.device) + held
        host = free if self.on_cpu else free_bytes(torch.device("cpu"))
        base = resident_bytes() - held + STARTUP_BYTES if self.on_cpu else 0
        plan = make_plan(
            list(self.stage_options()),
            device=str(self.device),
            base_bytes=base,
            free_bytes=int(free * (1 - RESERVED_FRACTION)),
            free_host_bytes=int(host * (1 - RESERVED_FRACTION)),
        )
        return replace(plan, cached_components=frozenset()) if self.spec.offload == OFFLOAD_STAGES else plan

    def stage_options(self) -> Iterator[StageOptions]:
        """The stages, in the order they run."""
        for need in self._all_stage_options():
            if not self.workload.stages or need.stage in self.workload.stages:
                yield need

    def _all_stage_options(self) -> Iterator[StageOptions]:
        if self.workload.prompts_to_encode:
            yield self._text_options()
        if any(self.workload.encode_grids):
            yield self._encode_options()
        for number, plan in enumerate(self.workload.passes):
            if number:
                yield self._upscale_options()
            yield self._windowed_denoise_options() if self.workload.windows else self._denoise_options(number, plan)
        yield self._decode_options()

    @cached_property
    def flops_per_second(self) -> float:
        """FLOPs a second."""
        return measure_matmul_rate(self.dtype, self.device)

    def _text_options(self) -> StageOptions:
        text = self.spec.text_encoder_folder
        working = activations.text_encoder_activation_bytes(text.config, self.itemsize)
        flops = self.workload.prompts_to_encode * text_encoder_flops(text.config)
        choices = []
        for way in self._text_weight_options(text.source):
            weights = weight_bytes(text.source, self.dtype, way.weight_format, is_text_encoder=True)
            path = backends.matmul_backend(
                self.dtype, self.device, way.weight_format, is_streamed=True
            )  # never packed: it runs once
            choices.append(self._placement(way, weights, working, flops, text.source.size_bytes, path))
        return StageOptions(stage="text", component=TEXT_ENCODER, placements=tuple(choices))

    def _text_weight_options(self, source: Source) -> list[_WeightOption]:
        streamed = _WeightOption(
            AS_STORED, is_streamed=True, reason="the text encoder is read block by block, once per prompt"
        )
        resident = _WeightOption(CONVERTED)
        offload = self.spec.offload
        if offload == OFFLOAD_NONE or source.size_bytes <= MIN_STREAM_BYTES:
            return [resident, streamed] if offload != OFFLOAD_NONE else [resident]
        # On a CPU streaming costs nothing: the pages are the system's, in memory or not.
        return [streamed] if self.on_cpu or offload == OFFLOAD_BLOCKS else [resident, streamed]

    def _encode_options(self) -> StageOptions:
        vae = self.spec.vae_checkpoint
        config = vae.info.vae
        assert config is not None
        grids = [grid for grids in self.workload.encode_grids for grid in grids]
        # Of pictures, pairs make a single product.
        together = F23 if should_prepack_convs(self.dtype, self.device) else 0
        working = max(
            vae_encode_activation_bytes(config, grid, self.itemsize, winograd_frames=together) for grid in grids
        )
        flops = sum(vae_encoder_flops(config, grid) for grid in grids)
        path = backends.conv_backend(self.dtype, self.device)
        weights = self._vae_weight_bytes("encoder", together)
        choice = self._placement(
            _WeightOption(CONVERTED, reason=self._reference_reason()), weights, working, flops, 0, path
        )
        return StageOptions(
            stage="encode", component=VAE_ENCODER, placements=(replace(choice, winograd_frames=together),)
        )

    def _reference_reason(self) -> str:
        """What controls cost, in words."""
        if self.workload.windows:
            one = max(self.workload.windows, key=lambda window: window.reference_tokens)
            pairs = [(one.reference_tokens, one.resolved_pass)]
        else:
            pairs = list(zip(self.workload.reference_tokens, self.workload.passes, strict=False))
        if not any(tokens for tokens, _ in pairs):
            return ""
        of = "a window's" if self.workload.windows else "the video's"
        told = ", ".join(f"{tokens} beside {of} {plan.grid.num_tokens}" for tokens, plan in pairs)
        return f"the transformer works on tokens of controls, too: {told}"

    def _decode_options(self) -> StageOptions:
        config = self.spec.vae_checkpoint.info.vae
        assert config is not None
        grid, path = self.workload.passes[-1].grid, backends.conv_backend(self.dtype, self.device)
        flops, choices = vae_decoder_flops(config, grid), []
        for handed, together in self._decode_chunkings():
            working = vae_decode_activation_bytes(
                config, grid, self.itemsize, chunk_frames=handed, winograd_frames=together
            ) + self._output_bytes(handed)
            why = "" if handed == CHUNK_FRAMES else f"the decoder hands on {handed} frames at a time"
            if together == F23 and handed == CHUNK_FRAMES:
                why = "its convolutions make 2 frames at a time"
            weights = self._vae_weight_bytes("decoder", together)
            choice = self._placement(_WeightOption(CONVERTED, reason=why), weights, working, flops, 0, path)
            seconds = choice.seconds * WINOGRAD_TIME_RATIO[together] * (1 + 0.1 * (CHUNK_FRAMES - handed))
            choices.append(replace(choice, chunk_frames=handed, winograd_frames=together, seconds=seconds))
        return StageOptions(stage="decode", component=VAE_DECODER, placements=tuple(choices))

    def _decode_chunkings(self) -> list[tuple[int, int]]:
        """Frames that the decoder hands on, and that its convolutions make at a time, the fastest first."""
        if not should_prepack_convs(self.dtype, self.device):
            return [(CHUNK_FRAMES, 0), (2, 0), (1, 0)]
        return [(CHUNK_FRAMES, F43), (CHUNK_FRAMES, F23), (2, F23), (1, F23)]

    def _output_bytes(self, chunk_frames: int) -> int:
        """Of decoded frames on their way into a file."""
        plan = self.workload.passes[-1]
        pixels = plan.size.width * plan.size.height
        return CODEC_BYTES + pixels * (
            FRAME_COPIES * chunk_frames * 3 * 4 + LOOKAHEAD_BYTES_PER_PIXEL * min(plan.frames, LOOKAHEAD_FRAMES)
        )

    def _vae_weight_bytes(self, half: str, winograd_frames: int) -> WeightBytes:
        source = self.spec.vae_checkpoint.sources["vae"]
        infos = {name: info for name, info in source.infos.items() if name.startswith(f"{half}.")}
        return weight_bytes(replace(source, infos=infos), self.dtype, CONVERTED, winograd_frames=winograd_frames)

    def _upscale_options(self) -> StageOptions:
        grid, most = self.workload.passes[0].grid, Placement(dtype="float32")
        for checkpoint in self.spec.upscaler_checkpoints.values():
            config, source = checkpoint.info.upscaler, checkpoint.sources["upsampler"]
            assert config is not None
            weights = weight_bytes(source, torch.float32, CONVERTED)
            working, flops = activations.upscaler_activation_bytes(config, grid), upscaler_flops(config, grid)
            one = self._placement(_WeightOption(CONVERTED), weights, working, flops, 0)
            most = replace(max(most, one, key=lambda choice: choice.device_bytes), seconds=most.seconds + one.seconds)
        return StageOptions(stage="upscale", component="upscaler", placements=(replace(most, dtype="float32"),))

    def _windowed_denoise_options(self) -> StageOptions:
        """As much memory as the largest window takes, and the time of all."""
        kinds: dict[tuple[object, ...], list[WindowWorkload]] = {}  # all but the first and the last are mostly alike
        for window in self.workload.windows:
            alike = (
                window.resolved_pass.frames,
                window.prompt_tokens,
                window.condition_tokens,
                window.has_conditions,
                window.reference_tokens,
            )
            kinds.setdefault(alike, []).append(window)
        needs = []
        for one, *others in kinds.values():
            work = replace(
                self.workload,
                passes=(one.resolved_pass,),
                prompt_tokens=one.prompt_tokens,
                condition_tokens=(one.condition_tokens,),
                has_conditions=(one.has_conditions,),
                reference_tokens=(one.reference_tokens,),
                windows=(),
            )
            needs.append((1 + len(others), Planner(self.spec, work)._denoise_options(0, one.resolved_pass)))
        choices = []
        for same in zip(*(need.placements for _, need in needs), strict=True):
            seconds = sum(count * choice.seconds for (count, _), choice in zip(needs, same, strict=True))
            largest = max(same, key=lambda choice: choice.device_bytes)
            choices.append(replace(largest, seconds=seconds, window_count=len(self.workload.windows)))
        return replace(needs[0][1], placements=tuple(choices))

    def _denoise_options(self, pass_index: int, resolved_pass: ResolvedPass) -> StageOptions:
        checkpoint = self.spec.transformer_checkpoints[pass_index]
        source, config = checkpoint.sources["transformer"], self.spec.transformer_config_of(pass_index)
        tokens = resolved_pass.grid.num_tokens + self.workload.extra_tokens(pass_index)
        working, flops = (
            self._denoise_workspace_bytes(pass_index, resolved_pass, tokens),
            self._denoise_flops(pass_index, resolved_pass, tokens),
        )
        choices = []
        for way in self._transformer_weight_options(source):
            packed = not way.is_streamed and should_prepack_linears(self.dtype, self.device)
            weights = self._add_lora_bytes(
                weight_bytes(source, self.dtype, way.weight_format, is_prepacked=packed), way
            )
            read = source.size_bytes * (len(resolved_pass.step_guidance) if way.is_streamed else 1)
            path = backends.matmul_backend(self.dtype, self.device, way.weight_format, is_streamed=way.is_streamed)
            choices.append(self._placement(way, weights, working, flops, read, path))
        stage = PASS_STAGES[pass_index]
        assert config.num_layers
        return StageOptions(
            stage=stage, component=self.spec.transformer_component(pass_index), placements=tuple(choices)
        )

    def _transformer_weight_options(self, source: Source) -> list[_WeightOption]:
        """How a transformer can be held, best first."""
        scheme, offload = self.spec.quant, self.spec.offload
        plain = source.dtype == self.dtype or any(info.ggml_type is not None for info in source.infos.values())
        merged = self.spec.loras.is_merged
        resident = [_WeightOption(CONVERTED)]
        if not plain and not merged:
            resident.append(_WeightOption(AS_STORED, reason="weights stay as stored"))
        streamed = [_WeightOption(AS_STORED, is_streamed=True, reason="the transformer's blocks come and go")]
        if merged:
            # On a CPU blocks can come and go only where they lie in a file.
            streamed = [] if self.on_cpu else [replace(streamed[0], weight_format=CONVERTED)]
        if scheme not in (NONE, AUTO_QUANT):
            resident = [_WeightOption(scheme)]
            streamed = [] if self.on_cpu else [_WeightOption(scheme, is_streamed=True, reason=streamed[0].reason)]
        elif scheme == AUTO_QUANT and not is_quantized(source):
            small = INT8 if not self.on_cpu or has_fast_int8() else INT8_WEIGHT_ONLY
            resident.append(_WeightOption(small, reason="weights in 8 bits, as --quant auto allows"))
        if offload == OFFLOAD_NONE:
            return resident
        return streamed if offload == OFFLOAD_BLOCKS and streamed else resident + streamed

    def _add_lora_bytes(self, weights: WeightBytes, option: _WeightOption) -> WeightBytes:
        """The bytes with those of the LoRAs: beside the weights, or of weights that are the file's no more."""
        loras = self.spec.loras
        if not loras:
            return weights
        if not loras.is_merged:
            return replace(weights, private=weights.private + loras.adapter_bytes(self.dtype))
        changed = min(weights.mapped, loras.merged_weight_bytes(self.dtype)) if option.weight_format == CONVERTED else 0
        return replace(weights, mapped=weights.mapped - changed, private=weights.private + changed)

    def _denoise_workspace_bytes(self, pass_index: int, resolved_pass: ResolvedPass, tokens: int) -> int:
        config, texts = self.spec.transformer_config_of(pass_index), self._prompt_tokens(resolved_pass)
        while_made, afterwards = activations.rope_bytes(config, tokens, self.itemsize)
        both, longest = self.workload.guidance_batch and resolved_pass.uses_cfg, max(texts)
        evaluation = activations.transformer_activation_bytes(
            config,
            tokens,
            self.itemsize,
            batch=2 if both else 1,
            text_tokens=longest,
            per_token_sigmas=self.workload.has_per_token_sigmas(pass_index),
            perturbed_samples=int(any(step.stg_scale > 0 and step.skip_blocks for step in resolved_pass.step_guidance)),
            fused_gelu=should_prepack_linears(self.dtype, self.device),
        )
        loras = self.spec.loras
        if loras and not loras.is_merged:
            evaluation += activations.lora_activation_bytes(
                tokens,
                self.itemsize,
                max_rank=loras.max_rank,
                max_out_features=loras.max_out_features,
                batch=2 if both else 1,
            )
        if self.workload.step_cache is not None:
            evaluation += activations.step_cache_bytes(
                config,
                tokens,
                self.itemsize,
                history_length=self.workload.step_cache.cached_steps,
                evaluations_per_step=max(step.model_evaluations for step in resolved_pass.step_guidance),
                batch=2 if both else 1,
            )
        states = 8 * tokens * config.in_channels * 4  # latents, noise, velocities of the guidance
        read = activations.text_kv_bytes(
            config, self.itemsize, text_tokens=len(texts) * longest if both else sum(texts)
        )
        if not self.on_cpu and (2 if both else 1) * tokens <= CUDA_GRAPH_MAX_TOKENS:
            evaluation, read = 2 * evaluation, 2 * read  # a graph has memory and inputs of its own
        return max(while_made, afterwards + evaluation) + read + states

    def _prompt_tokens(self, resolved_pass: ResolvedPass) -> tuple[int, ...]:
        """Tokens of the prompts that a pass reads."""
        return self.workload.prompt_tokens if resolved_pass.uses_cfg else self.workload.prompt_tokens[:1]

    def _denoise_flops(self, pass_index: int, resolved_pass: ResolvedPass, tokens: int) -> int:
        config, texts = self.spec.transformer_config_of(pass_index), self._prompt_tokens(resolved_pass)
        total = text_kv_flops(config, text_tokens=sum(texts))
        levels, longest, loras = 2 if self.workload.has_per_token_sigmas(pass_index) else 1, max(texts), self.spec.loras
        beside = 0 if loras.is_merged else lora_flops(sum(loras.parameter_counts), tokens)
        for step in resolved_pass.step_guidance:
            own = transformer_flops(config, tokens, text_tokens=longest, num_sigmas=levels)
            total += (1 + (step.cfg_scale > 1)) * (own + beside)
            if step.stg_scale > 0 and step.skip_blocks:
                mode = resolved_pass.settings.guidance.stg_mode or ATTENTION_VALUES
                total += perturbed_flops(config, tokens, step.skip_blocks, mode, text_tokens=longest)
        return total

    def _placement(
        self,
        option: _WeightOption,
        weights: WeightBytes,
        workspace_bytes: int,
        flops: int,
        bytes_read: int,
        backend: str = backends.TORCH,
    ) -> Placement:
        rate = self.flops_per_second * MATMUL_SPEEDUP.get(option.weight_format, 1.0)
        choice = Placement(
            dtype=str(self.dtype).removeprefix("torch."),
            weight_format=option.weight_format,
            mapped_bytes=weights.mapped,
            private_bytes=weights.private,
            workspace_bytes=workspace_bytes + int(HEAP_FRAGMENTATION * workspace_bytes * self.on_cpu) + weights.scratch,
            seconds=estimate_seconds(flops, rate, bytes_read=bytes_read, disk_bytes_per_second=DISK_BYTES_PER_SECOND),
            backend=backend,
            reason=option.reason,
        )
        if not self.on_cpu:
            choice = replace(choice, mapped_bytes=0, private_bytes=weights.mapped + weights.private)
        return self._stream_blocks(choice, weights) if option.is_streamed else choice

    def _stream_blocks(self, placement: Placement, weights: WeightBytes) -> Placement:
        """With the blocks in memory only while they run."""
        if self.on_cpu:
            # One block runs; of the next, what the system has read ahead is not the process's.
            mapped = weights.mapped - weights.mapped_blocks + weights.largest_mapped_block
            return replace(placement, streamed_blocks=weights.num_blocks, mapped_bytes=mapped)
        blocks = weights.all_blocks_total
        block = blocks // max(1, weights.num_blocks)
        return replace(
            placement,
            streamed_blocks=weights.num_blocks,
            private_bytes=placement.private_bytes - blocks + 2 * block,
            host_bytes=blocks,
        )
