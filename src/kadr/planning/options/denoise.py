"""Placements of the transformer: how its weights are stored, and which blocks are streamed."""

from __future__ import annotations

from dataclasses import replace

from kadr.checkpoints.source import Source
from kadr.memory.device import has_fast_int8
from kadr.models.transformer import CUDA_GRAPH_MAX_TOKENS, CUDA_GRAPH_TEXT_MULTIPLE
from kadr.planning import backends
from kadr.planning.calibration import calibration as speeds
from kadr.planning.costs import activations
from kadr.planning.costs.weight_bytes import WeightBytes, weight_bytes
from kadr.planning.options.context import StageContext, WeightOption
from kadr.planning.placement import AS_STORED, CONVERTED, StageOptions
from kadr.planning.timing.transformer import EvaluationTimer, pass_seconds
from kadr.planning.timing.weights import weight_seconds
from kadr.planning.workload import WindowWorkload
from kadr.quant.prepack import should_prepack_linears
from kadr.quant.weight_formats import AUTO_QUANT, FP8, INT8, INT8_WEIGHT_ONLY, NONE
from kadr.request.passes import ResolvedPass
from kadr.spec.model import PASS_STAGES
from kadr.spec.offload import OFFLOAD_BLOCKS, OFFLOAD_NONE
from kadr.spec.weights import can_stay_stored, is_quantized


def windowed_denoise_options(context: StageContext) -> StageOptions:
    """Returns placements with the memory of the largest window and the time of all."""
    groups: dict[tuple[object, ...], list[WindowWorkload]] = {}  # all but the first and the last are mostly alike
    for window in context.workload.windows:
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
            context.workload,
            passes=(window.resolved_pass,),
            prompt_tokens=window.prompt_tokens,
            condition_tokens=(window.condition_tokens,),
            has_conditions=(window.has_conditions,),
            reference_tokens=(window.reference_tokens,),
            windows=(),
        )
        options = denoise_options(replace(context, workload=workload), 0, window.resolved_pass)
        counted_options.append((1 + len(others), options))
    placements = []
    for by_group in zip(*(options.placements for _, options in counted_options), strict=True):
        seconds = sum(
            count * placement.seconds for (count, _), placement in zip(counted_options, by_group, strict=True)
        )
        largest = max(by_group, key=lambda placement: placement.device_bytes)
        placements.append(replace(largest, seconds=seconds, window_count=len(context.workload.windows)))
    return replace(counted_options[0][1], placements=tuple(placements))


def denoise_options(context: StageContext, pass_index: int, resolved_pass: ResolvedPass) -> StageOptions:
    source = context.spec.transformer_checkpoints[pass_index].sources["transformer"]
    tokens = resolved_pass.grid.num_tokens + context.workload.extra_tokens(pass_index)
    workspace_bytes = _workspace_bytes(context, pass_index, resolved_pass, tokens)
    placements = []
    for option in _weight_options(context, source):
        is_prepacked = not option.is_streamed and should_prepack_linears(context.dtype, context.device)
        weights = weight_bytes(source, context.dtype, option.weight_format, is_prepacked=is_prepacked)
        weights = _add_lora_bytes(context, weights, option)
        times = weight_seconds(
            context.calibration,
            source,
            context.dtype,
            option.weight_format,
            device=context.device,
            is_streamed=option.is_streamed,
            is_prepacked=is_prepacked,
        )
        seconds = _seconds(context, pass_index, resolved_pass, tokens, option, times.per_use, is_prepacked=is_prepacked)
        backend = _matmul_backend(context, option)
        placements.append(
            context.placement(option, weights, workspace_bytes, backend, seconds=seconds, load_seconds=times.load)
        )
    return StageOptions(
        stage=PASS_STAGES[pass_index],
        component=context.spec.transformer_component(pass_index),
        placements=tuple(placements),
    )


def _matmul_backend(context: StageContext, option: WeightOption) -> str:
    return backends.matmul_backend(context.dtype, context.device, option.weight_format, is_streamed=option.is_streamed)


def _weight_options(context: StageContext, source: Source) -> list[WeightOption]:
    """Decides how the transformer's weights may be stored and whether its blocks may be streamed, best first."""
    resident = _resident_weight_options(context, source)
    if context.spec.offload == OFFLOAD_NONE:
        return resident
    streamed = _streamed_weight_options(context, source)
    return streamed if context.spec.offload == OFFLOAD_BLOCKS and streamed else resident + streamed


def _resident_weight_options(context: StageContext, source: Source) -> list[WeightOption]:
    """Decides how the weights of a transformer that stays on the device may be stored, best first."""
    scheme = context.spec.quant
    if scheme not in (NONE, AUTO_QUANT):
        return [WeightOption(scheme)]
    options = [WeightOption(CONVERTED)]
    has_ggml_blocks = any(info.ggml_type is not None for info in source.infos.values())
    needs_no_conversion = source.dtype == context.dtype or has_ggml_blocks
    can_stay = can_stay_stored(source, context.device) and not context.spec.loras.is_merged
    if can_stay and not needs_no_conversion:
        options.append(WeightOption(AS_STORED, reason="weights stay as stored"))
    if scheme == AUTO_QUANT and not is_quantized(source):
        weight_format = INT8 if has_fast_int8(context.device) else INT8_WEIGHT_ONLY
        options.append(WeightOption(weight_format, reason="weights in 8 bits, as --quant auto allows"))
    return options


def _streamed_weight_options(context: StageContext, source: Source) -> list[WeightOption]:
    """Decides how the weights of streamed transformer blocks may be stored; [] if they cannot be streamed."""
    is_converted = context.spec.loras.is_merged or not can_stay_stored(source, context.device)
    weight_format = CONVERTED if is_converted else AS_STORED
    if context.spec.quant not in (NONE, AUTO_QUANT):
        weight_format = context.spec.quant
    # On a CPU blocks can be streamed only from a file.
    if context.on_cpu and weight_format != AS_STORED:
        return []
    streamed = WeightOption(weight_format, is_streamed=True, reason="transformer blocks are streamed")
    if context.device.type != "cuda":
        return [streamed]
    reason = f"{streamed.reason}, and copied twice: the host has too little free memory to pin them"
    return [replace(streamed, is_pinned=True), replace(streamed, reason=reason)]


def _add_lora_bytes(context: StageContext, weights: WeightBytes, option: WeightOption) -> WeightBytes:
    """Adds the bytes of LoRAs: their own matrices, or merged weights, which are no longer mapped from the file."""
    loras = context.spec.loras
    if not loras:
        return weights
    if not loras.is_merged:
        return replace(weights, private=weights.private + loras.adapter_bytes(context.dtype))
    merged = min(weights.mapped, loras.merged_weight_bytes(context.dtype)) if option.weight_format == CONVERTED else 0
    return replace(weights, mapped=weights.mapped - merged, private=weights.private + merged)


def _workspace_bytes(context: StageContext, pass_index: int, resolved_pass: ResolvedPass, tokens: int) -> int:
    config, prompt_tokens = context.spec.transformer_config_of(pass_index), _prompt_tokens(context, resolved_pass)
    rope_peak, rope_table = activations.rope_bytes(config, tokens)
    batch = 2 if context.workload.guidance_batch and resolved_pass.uses_cfg else 1
    in_graph = not context.on_cpu and batch * tokens <= CUDA_GRAPH_MAX_TOKENS
    if in_graph:  # the text is padded, so that prompts share graphs
        prompt_tokens = tuple(
            -(-count // CUDA_GRAPH_TEXT_MULTIPLE) * CUDA_GRAPH_TEXT_MULTIPLE for count in prompt_tokens
        )
    longest = max(prompt_tokens)
    evaluation = activations.transformer_activation_bytes(
        config,
        tokens,
        context.itemsize,
        batch=batch,
        text_tokens=longest,
        per_token_sigmas=context.workload.has_per_token_sigmas(pass_index),
        perturbed_samples=int(any(at.stg_scale > 0 and at.skip_blocks for at in resolved_pass.evaluation_guidance)),
        fused_gelu=should_prepack_linears(context.dtype, context.device),
    )
    loras = context.spec.loras
    if loras and not loras.is_merged:
        evaluation += activations.lora_activation_bytes(
            tokens,
            context.itemsize,
            max_rank=loras.max_rank,
            max_out_features=loras.max_out_features,
            batch=batch,
        )
    if context.workload.step_cache is not None:
        evaluation += activations.step_cache_bytes(
            config,
            tokens,
            context.itemsize,
            history_length=context.workload.step_cache.cached_steps,
            evaluations_per_step=max(step.model_evaluations for step in resolved_pass.step_guidance),
            batch=batch,
        )
    states = 8 * tokens * config.in_channels * 4  # latents, noise, velocities of the guidance, all in float32
    text_kv = activations.text_kv_bytes(
        config, context.itemsize, text_tokens=len(prompt_tokens) * longest if batch == 2 else sum(prompt_tokens)
    )
    if in_graph:
        evaluation, text_kv = 2 * evaluation, 2 * text_kv  # a CUDA graph has its own memory and inputs
    return max(rope_peak, rope_table + evaluation) + text_kv + states


def _prompt_tokens(context: StageContext, resolved_pass: ResolvedPass) -> tuple[int, ...]:
    """Returns the number of tokens of each prompt of a pass: the second one only with CFG."""
    return context.workload.prompt_tokens if resolved_pass.uses_cfg else context.workload.prompt_tokens[:1]


def _seconds(
    context: StageContext,
    pass_index: int,
    resolved_pass: ResolvedPass,
    tokens: int,
    option: WeightOption,
    weights_per_use: float,
    *,
    is_prepacked: bool,
) -> float:
    """Returns the seconds of a pass, with the transformer loaded."""
    prompt_tokens, loras = _prompt_tokens(context, resolved_pass), context.spec.loras
    timer = EvaluationTimer(
        calibration=context.calibration,
        config=context.spec.transformer_config_of(pass_index),
        kernel=_layer_kernel(option.weight_format, is_prepacked=is_prepacked),
        tokens=tokens,
        text_tokens=max(prompt_tokens),
        num_sigmas=2 if context.workload.has_per_token_sigmas(pass_index) else 1,
        weights_per_use=weights_per_use,
        lora_parameters=0 if loras.is_merged else sum(loras.parameter_counts),
    )
    return pass_seconds(timer, resolved_pass, prompt_tokens, guidance_batch=context.workload.guidance_batch)


def _layer_kernel(weight_format: str, *, is_prepacked: bool) -> str:
    """Returns the kernel of the transformer's layers, by its name in a calibration."""
    if weight_format in (INT8, FP8):
        return speeds.INT8
    return speeds.PREPACKED if is_prepacked and weight_format == CONVERTED else speeds.PLAIN
