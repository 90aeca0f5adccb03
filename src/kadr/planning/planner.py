"""Lists the stages of a request and the placements of each, from headers, the request and free memory.

This is where it is decided which weights may be streamed: T5 in `Planner._text_weight_options`, the transformer in
`Planner._transformer_weight_options`, the chunks of the VAE decoder in `Planner._decode_chunkings`. `planning.choose`
then takes the first placement of each stage that fits and raises `PlanError` if none does; a stage that runs out of
memory in spite of its plan is retried by `pipeline.retry`.
"""

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
from kadr.planning.choose import make_plan
from kadr.planning.flops import (
    estimate_seconds,
    lora_flops,
    perturbed_flops,
    text_encoder_flops,
    text_kv_flops,
    transformer_flops,
    upscaler_flops,
)
from kadr.planning.placement import AS_STORED, CONVERTED, Placement, StageOptions
from kadr.planning.plan import Plan
from kadr.planning.vae_activations import vae_decode_activation_bytes, vae_encode_activation_bytes
from kadr.planning.vae_flops import vae_decoder_flops, vae_encoder_flops
from kadr.planning.weight_bytes import WeightBytes, weight_bytes
from kadr.planning.workload import WindowWorkload, Workload
from kadr.quant.prepack import should_prepack_convs, should_prepack_linears
from kadr.quant.weight_formats import AUTO_QUANT, INT8, INT8_WEIGHT_ONLY, NONE
from kadr.request.passes import ResolvedPass
from kadr.sampling.settings import ATTENTION_VALUES
from kadr.spec.model import PASS_STAGES, TEXT_ENCODER, UPSCALERS, VAE_DECODER, VAE_ENCODER, ModelSpec
from kadr.spec.offload import OFFLOAD_BLOCKS, OFFLOAD_NONE, OFFLOAD_STAGES
from kadr.spec.weights import is_quantized

RESERVED_FRACTION = 0.05  # of free memory, left to the system and to what cannot be foreseen
DISK_BYTES_PER_SECOND = 1.5e9  # assumed rate at which weights are read from files
MATMUL_SPEEDUP = {INT8: 1.6}  # matrix products in 8 bits against those in the dtype
# Decoding time by `winograd_frames`, against convolutions without Winograd. Measured.
WINOGRAD_TIME_RATIO = {0: 1.0, F23: 0.75, F43: 0.6}
MIN_STREAM_BYTES = 500_000_000  # a text encoder of no more bytes is not worth streaming
# Bytes that any process takes while it runs: kernels, their threads. Measured.
STARTUP_BYTES = 15_000_000
HEAP_FRAGMENTATION = 0.35  # of a stage's workspace: free memory that the host's heap keeps between blocks. Measured.
# Decoded frames on their way into a file: the video encoder itself; copies of a chunk in float32, as it is scaled,
# resized and converted to bytes; and the frames that the encoder looks ahead at. Measured.
CODEC_BYTES, FRAME_COPIES, LOOKAHEAD_FRAMES, LOOKAHEAD_BYTES_PER_PIXEL = 25_000_000, 8, 60, 3


@dataclass(frozen=True)
class _WeightOption:
    """A weight format of a component and why it is offered; see `Placement`. is_streamed: its blocks are streamed."""

    weight_format: str
    is_streamed: bool = False
    reason: str = ""


class Planner:
    """Plans one request.

    Args:
        spec: components of the model, known from their headers.
        cached: private bytes of cached modules, free to the stage that reuses one.
    """

    def __init__(self, spec: ModelSpec, workload: Workload, *, cached: int = 0) -> None:
        self.spec, self.workload, self.cached = spec, workload, cached
        self.device, self.dtype = spec.device, spec.dtype
        self.itemsize = self.dtype.itemsize
        self.on_cpu = self.device.type == "cpu"

    def plan(self) -> Plan:
        """Returns the plan.

        Raises:
            PlanError: a stage does not fit into free memory.
        """
        free = free_bytes(self.device) + self.cached
        host = free if self.on_cpu else free_bytes(torch.device("cpu"))
        base = resident_bytes() - self.cached + STARTUP_BYTES if self.on_cpu else 0
        plan = make_plan(
            list(self.stage_options()),
            device=str(self.device),
            base_bytes=base,
            free_bytes=int(free * (1 - RESERVED_FRACTION)),
            free_host_bytes=int(host * (1 - RESERVED_FRACTION)),
        )
        return replace(plan, cached_components=frozenset()) if self.spec.offload == OFFLOAD_STAGES else plan

    def stage_options(self) -> Iterator[StageOptions]:
        """Yields the stages in the order they run."""
        for options in self._all_stage_options():
            if not self.workload.stages or options.stage in self.workload.stages:
                yield options

    def _all_stage_options(self) -> Iterator[StageOptions]:
        if self.workload.prompts_to_encode:
            yield self._text_options()
        if any(self.workload.encode_grids):
            yield self._encode_options()
        for pass_index, resolved_pass in enumerate(self.workload.passes):
            if pass_index:
                yield self._upscale_options()
            if self.workload.windows:
                yield self._windowed_denoise_options()
            else:
                yield self._denoise_options(pass_index, resolved_pass)
        yield self._decode_options()

    @cached_property
    def flops_per_second(self) -> float:
        """FLOPs per second of a matrix product on this device."""
        return measure_matmul_rate(self.dtype, self.device)

    def _text_options(self) -> StageOptions:
        checkpoint = self.spec.text_encoder_checkpoint
        workspace_bytes = activations.text_encoder_activation_bytes(checkpoint.config, self.itemsize)
        flops = self.workload.prompts_to_encode * text_encoder_flops(checkpoint.config)
        placements = []
        for option in self._text_weight_options(checkpoint.source):
            weights = weight_bytes(checkpoint.source, self.dtype, option.weight_format, is_text_encoder=True)
            # Never prepacked, as a streamed module: it runs once.
            backend = backends.matmul_backend(self.dtype, self.device, option.weight_format, is_streamed=True)
            placements.append(
                self._placement(option, weights, workspace_bytes, flops, checkpoint.source.size_bytes, backend)
            )
        return StageOptions(stage="text", component=TEXT_ENCODER, placements=tuple(placements))

    def _text_weight_options(self, source: Source) -> list[_WeightOption]:
        """Decides whether the text encoder (T5) is streamed block by block, resident, or either.

        Above `MIN_STREAM_BYTES` it is always streamed on a CPU, and on a GPU if it does not fit or offload is "blocks".
        A smaller one is streamed only if it does not fit. Offload "none" keeps it resident.
        """
        streamed = _WeightOption(
            AS_STORED, is_streamed=True, reason="the text encoder is streamed block by block, once per prompt"
        )
        resident = _WeightOption(CONVERTED)
        offload = self.spec.offload
        if offload == OFFLOAD_NONE or source.size_bytes <= MIN_STREAM_BYTES:
            return [resident, streamed] if offload != OFFLOAD_NONE else [resident]
        # On a CPU streaming is free: the system keeps the pages of the file in its cache.
        return [streamed] if self.on_cpu or offload == OFFLOAD_BLOCKS else [resident, streamed]

    def _encode_options(self) -> StageOptions:
        config = self.spec.vae_config
        grids = [grid for grids in self.workload.encode_grids for grid in grids]
        # The encoder's convolutions compute pairs of frames: a still image is then a single product.
        winograd_frames = F23 if should_prepack_convs(self.dtype, self.device) else 0
        workspace_bytes = max(
            vae_encode_activation_bytes(config, grid, self.itemsize, winograd_frames=winograd_frames) for grid in grids
        )
        flops = sum(vae_encoder_flops(config, grid) for grid in grids)
        backend = backends.conv_backend(self.dtype, self.device)
        weights = self._vae_weight_bytes("encoder", winograd_frames)
        option = _WeightOption(CONVERTED, reason=self._reference_reason())
        placement = self._placement(option, weights, workspace_bytes, flops, 0, backend)
        placement = replace(placement, winograd_frames=winograd_frames)
        return StageOptions(stage="encode", component=VAE_ENCODER, placements=(placement,))

    def _reference_reason(self) -> str:
        """Returns how many reference tokens controls add, for people; "" without controls."""
        if self.workload.windows:
            largest = max(self.workload.windows, key=lambda window: window.reference_tokens)
            pairs = [(largest.reference_tokens, largest.resolved_pass)]
        else:
            pairs = list(zip(self.workload.reference_tokens, self.workload.passes, strict=False))
        if not any(tokens for tokens, _ in pairs):
            return ""
        owner = "a window's" if self.workload.windows else "the video's"
        counts = ", ".join(
            f"{tokens} beside {owner} {resolved_pass.grid.num_tokens}" for tokens, resolved_pass in pairs
        )
        return f"the transformer also sees reference tokens of controls: {counts}"

    def _decode_options(self) -> StageOptions:
        config = self.spec.vae_config
        grid, backend = self.workload.passes[-1].grid, backends.conv_backend(self.dtype, self.device)
        flops, placements = vae_decoder_flops(config, grid), []
        for chunk_frames, winograd_frames in self._decode_chunkings():
            workspace_bytes = vae_decode_activation_bytes(
                config, grid, self.itemsize, chunk_frames=chunk_frames, winograd_frames=winograd_frames
            ) + self._output_bytes(chunk_frames)
            reason = ""
            if chunk_frames != CHUNK_FRAMES:
                reason = f"the decoder works in chunks of {chunk_frames} latent frames"
            elif winograd_frames == F23:
                reason = "its Winograd convolutions compute 2 frames at a time"
            weights = self._vae_weight_bytes("decoder", winograd_frames)
            option = _WeightOption(CONVERTED, reason=reason)
            placement = self._placement(option, weights, workspace_bytes, flops, 0, backend)
            seconds = placement.seconds * WINOGRAD_TIME_RATIO[winograd_frames]
            seconds *= 1 + 0.1 * (CHUNK_FRAMES - chunk_frames)
            placements.append(
                replace(
                    placement,
                    chunk_frames=chunk_frames,
                    winograd_frames=winograd_frames,
                    seconds=seconds,
                )
            )
        return StageOptions(stage="decode", component=VAE_DECODER, placements=tuple(placements))

    def _decode_chunkings(self) -> list[tuple[int, int]]:
        """Returns pairs of `chunk_frames` and `winograd_frames` for the VAE decoder, the fastest first."""
        if not should_prepack_convs(self.dtype, self.device):
            return [(CHUNK_FRAMES, 0), (2, 0), (1, 0)]
        return [(CHUNK_FRAMES, F43), (CHUNK_FRAMES, F23), (2, F23), (1, F23)]

    def _output_bytes(self, chunk_frames: int) -> int:
        """Returns the bytes of decoded frames on their way into a file."""
        last_pass = self.workload.passes[-1]
        pixels = last_pass.size.width * last_pass.size.height
        return CODEC_BYTES + pixels * (
            FRAME_COPIES * chunk_frames * 3 * 4 + LOOKAHEAD_BYTES_PER_PIXEL * min(last_pass.frames, LOOKAHEAD_FRAMES)
        )

    def _vae_weight_bytes(self, half: str, winograd_frames: int) -> WeightBytes:
        source = self.spec.vae_checkpoint.sources["vae"]
        infos = {name: info for name, info in source.infos.items() if name.startswith(f"{half}.")}
        return weight_bytes(replace(source, infos=infos), self.dtype, CONVERTED, winograd_frames=winograd_frames)

    def _upscale_options(self) -> StageOptions:
        """Returns one placement: the weights of all upscalers, the workspace of the largest, the time of all."""
        grid, total = self.workload.passes[0].grid, Placement(dtype="float32")
        for checkpoint in self.spec.upscalers(has_two_passes=True).values():
            config, source = checkpoint.info.upscaler, checkpoint.sources["upscaler"]
            assert config is not None
            weights = weight_bytes(source, torch.float32, CONVERTED)
            workspace_bytes = activations.upscaler_activation_bytes(config, grid)
            placement = self._placement(
                _WeightOption(CONVERTED), weights, workspace_bytes, upscaler_flops(config, grid), 0
            )
            total = replace(
                total,
                mapped_bytes=total.mapped_bytes + placement.mapped_bytes,
                private_bytes=total.private_bytes + placement.private_bytes,
                workspace_bytes=max(total.workspace_bytes, placement.workspace_bytes),
                seconds=total.seconds + placement.seconds,
            )
        return StageOptions(stage="upscale", component=UPSCALERS, placements=(total,))

    def _windowed_denoise_options(self) -> StageOptions:
        """Returns placements with the memory of the largest window and the time of all."""
        groups: dict[tuple[object, ...], list[WindowWorkload]] = {}  # all but the first and the last are mostly alike
        for window in self.workload.windows:
            shape = (
                window.resolved_pass.frames,
                window.prompt_tokens,
                window.condition_tokens,
                window.has_conditions,
                window.reference_tokens,
            )
            groups.setdefault(shape, []).append(window)
        counted_options = []
        for window, *others in groups.values():
            workload = replace(
                self.workload,
                passes=(window.resolved_pass,),
                prompt_tokens=window.prompt_tokens,
                condition_tokens=(window.condition_tokens,),
                has_conditions=(window.has_conditions,),
                reference_tokens=(window.reference_tokens,),
                windows=(),
            )
            options = Planner(self.spec, workload)._denoise_options(0, window.resolved_pass)
            counted_options.append((1 + len(others), options))
        placements = []
        for by_group in zip(*(options.placements for _, options in counted_options), strict=True):
            seconds = sum(
                count * placement.seconds for (count, _), placement in zip(counted_options, by_group, strict=True)
            )
            largest = max(by_group, key=lambda placement: placement.device_bytes)
            placements.append(replace(largest, seconds=seconds, window_count=len(self.workload.windows)))
        return replace(counted_options[0][1], placements=tuple(placements))

    def _denoise_options(self, pass_index: int, resolved_pass: ResolvedPass) -> StageOptions:
        source = self.spec.transformer_checkpoints[pass_index].sources["transformer"]
        tokens = resolved_pass.grid.num_tokens + self.workload.extra_tokens(pass_index)
        workspace_bytes = self._denoise_workspace_bytes(pass_index, resolved_pass, tokens)
        flops = self._denoise_flops(pass_index, resolved_pass, tokens)
        placements = []
        for option in self._transformer_weight_options(source):
            is_prepacked = not option.is_streamed and should_prepack_linears(self.dtype, self.device)
            weights = weight_bytes(source, self.dtype, option.weight_format, is_prepacked=is_prepacked)
            weights = self._add_lora_bytes(weights, option)
            bytes_read = source.size_bytes * (len(resolved_pass.evaluation_guidance) if option.is_streamed else 1)
            backend = self._matmul_backend(option)
            placements.append(self._placement(option, weights, workspace_bytes, flops, bytes_read, backend))
        return StageOptions(
            stage=PASS_STAGES[pass_index],
            component=self.spec.transformer_component(pass_index),
            placements=tuple(placements),
        )

    def _matmul_backend(self, option: _WeightOption) -> str:
        return backends.matmul_backend(self.dtype, self.device, option.weight_format, is_streamed=option.is_streamed)

    def _transformer_weight_options(self, source: Source) -> list[_WeightOption]:
        """Decides how the transformer's weights may be stored and whether its blocks may be streamed, best first."""
        resident = self._resident_weight_options(source)
        if self.spec.offload == OFFLOAD_NONE:
            return resident
        streamed = self._streamed_weight_options()
        return streamed if self.spec.offload == OFFLOAD_BLOCKS and streamed else resident + streamed

    def _resident_weight_options(self, source: Source) -> list[_WeightOption]:
        """Decides how the weights of a transformer that stays on the device may be stored, best first."""
        scheme = self.spec.quant
        if scheme not in (NONE, AUTO_QUANT):
            return [_WeightOption(scheme)]
        options = [_WeightOption(CONVERTED)]
        has_ggml_blocks = any(info.ggml_type is not None for info in source.infos.values())
        needs_no_conversion = source.dtype == self.dtype or has_ggml_blocks
        if not needs_no_conversion and not self.spec.loras.is_merged:
            options.append(_WeightOption(AS_STORED, reason="weights stay as stored"))
        if scheme == AUTO_QUANT and not is_quantized(source):
            weight_format = INT8 if not self.on_cpu or has_fast_int8() else INT8_WEIGHT_ONLY
            options.append(_WeightOption(weight_format, reason="weights in 8 bits, as --quant auto allows"))
        return options

    def _streamed_weight_options(self) -> list[_WeightOption]:
        """Decides how the weights of streamed transformer blocks may be stored; [] if they cannot be streamed."""
        weight_format = CONVERTED if self.spec.loras.is_merged else AS_STORED
        if self.spec.quant not in (NONE, AUTO_QUANT):
            weight_format = self.spec.quant
        # On a CPU blocks can be streamed only from a file.
        if self.on_cpu and weight_format != AS_STORED:
            return []
        return [_WeightOption(weight_format, is_streamed=True, reason="transformer blocks are streamed")]

    def _add_lora_bytes(self, weights: WeightBytes, option: _WeightOption) -> WeightBytes:
        """Adds the bytes of LoRAs: their own matrices, or merged weights, which are no longer mapped from the file."""
        loras = self.spec.loras
        if not loras:
            return weights
        if not loras.is_merged:
            return replace(weights, private=weights.private + loras.adapter_bytes(self.dtype))
        merged = min(weights.mapped, loras.merged_weight_bytes(self.dtype)) if option.weight_format == CONVERTED else 0
        return replace(weights, mapped=weights.mapped - merged, private=weights.private + merged)

    def _denoise_workspace_bytes(self, pass_index: int, resolved_pass: ResolvedPass, tokens: int) -> int:
        config, prompt_tokens = self.spec.transformer_config_of(pass_index), self._prompt_tokens(resolved_pass)
        rope_peak, rope_table = activations.rope_bytes(config, tokens, self.itemsize)
        batch = 2 if self.workload.guidance_batch and resolved_pass.uses_cfg else 1
        longest = max(prompt_tokens)
        evaluation = activations.transformer_activation_bytes(
            config,
            tokens,
            self.itemsize,
            batch=batch,
            text_tokens=longest,
            per_token_sigmas=self.workload.has_per_token_sigmas(pass_index),
            perturbed_samples=int(any(at.stg_scale > 0 and at.skip_blocks for at in resolved_pass.evaluation_guidance)),
            fused_gelu=should_prepack_linears(self.dtype, self.device),
        )
        loras = self.spec.loras
        if loras and not loras.is_merged:
            evaluation += activations.lora_activation_bytes(
                tokens,
                self.itemsize,
                max_rank=loras.max_rank,
                max_out_features=loras.max_out_features,
                batch=batch,
            )
        if self.workload.step_cache is not None:
            evaluation += activations.step_cache_bytes(
                config,
                tokens,
                self.itemsize,
                history_length=self.workload.step_cache.cached_steps,
                evaluations_per_step=max(step.model_evaluations for step in resolved_pass.step_guidance),
                batch=batch,
            )
        states = 8 * tokens * config.in_channels * 4  # latents, noise, velocities of the guidance, all in float32
        text_kv = activations.text_kv_bytes(
            config, self.itemsize, text_tokens=len(prompt_tokens) * longest if batch == 2 else sum(prompt_tokens)
        )
        if not self.on_cpu and batch * tokens <= CUDA_GRAPH_MAX_TOKENS:
            evaluation, text_kv = 2 * evaluation, 2 * text_kv  # a CUDA graph has its own memory and inputs
        return max(rope_peak, rope_table + evaluation) + text_kv + states

    def _prompt_tokens(self, resolved_pass: ResolvedPass) -> tuple[int, ...]:
        """Returns the number of tokens of each prompt of a pass: the second one only with CFG."""
        return self.workload.prompt_tokens if resolved_pass.uses_cfg else self.workload.prompt_tokens[:1]

    def _denoise_flops(self, pass_index: int, resolved_pass: ResolvedPass, tokens: int) -> int:
        config, prompt_tokens = self.spec.transformer_config_of(pass_index), self._prompt_tokens(resolved_pass)
        total = text_kv_flops(config, text_tokens=sum(prompt_tokens))
        num_sigmas = 2 if self.workload.has_per_token_sigmas(pass_index) else 1
        longest, loras = max(prompt_tokens), self.spec.loras
        lora_total = 0 if loras.is_merged else lora_flops(sum(loras.parameter_counts), tokens)
        for guidance in resolved_pass.evaluation_guidance:
            evaluation = transformer_flops(config, tokens, text_tokens=longest, num_sigmas=num_sigmas)
            total += (1 + (guidance.cfg_scale > 1)) * (evaluation + lora_total)
            if guidance.stg_scale > 0 and guidance.skip_blocks:
                mode = resolved_pass.settings.guidance.stg_mode or ATTENTION_VALUES
                total += perturbed_flops(config, tokens, guidance.skip_blocks, mode, text_tokens=longest)
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
        placement = Placement(
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
            placement = replace(placement, mapped_bytes=0, private_bytes=weights.mapped + weights.private)
        return self._stream_blocks(placement, weights) if option.is_streamed else placement

    def _stream_blocks(self, placement: Placement, weights: WeightBytes) -> Placement:
        """Returns the placement with blocks in memory only while they run."""
        if self.on_cpu:
            # One block runs; what the system has read ahead of the next one does not count as the process's.
            mapped = weights.mapped - weights.mapped_blocks + weights.largest_mapped_block
            return replace(placement, streamed_blocks=weights.num_blocks, mapped_bytes=mapped)
        all_blocks = weights.all_blocks_total
        block = all_blocks // max(1, weights.num_blocks)
        return replace(
            placement,
            streamed_blocks=weights.num_blocks,
            private_bytes=placement.private_bytes - all_blocks + 2 * block,  # two slots; see `memory.block_swap`
            host_bytes=all_blocks,
        )
