"""What a stage costs, told from configs and sizes alone: against the modules, torch's counters and the system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import PERTURBED_VALUES, TRANSFORMER_2B, TRANSFORMER_13B, Transformer, TransformerConfig
from kadr.models.upscaler import LatentUpscaler, UpscalerConfig
from kadr.models.vae import VAE, VAEConfig
from kadr.models.vae.config import VAE_0_9, VAE_0_9_1, VAE_0_9_5
from kadr.planning import activations, vae_activations
from kadr.planning.flops import (
    estimate_seconds,
    perturbed_flops,
    text_encoder_flops,
    text_kv_flops,
    transformer_flops,
    upscaler_flops,
)
from kadr.planning.parameters import text_encoder_parameters, transformer_parameters, upscaler_parameters
from kadr.planning.vae_flops import vae_decoder_flops, vae_encoder_flops
from kadr.planning.vae_stages import latent_statistics_parameters, vae_decoder_parameters, vae_encoder_parameters
from kadr.quant.prepack import should_prepack_linears
from kadr.sampling.settings import TRANSFORMER_BLOCK
from kadr.shapes import LatentGrid
from tests.live_bytes import LiveBytes
from tests.tiny_models import vae_config

DEMO = TransformerConfig(num_layers=8, num_heads=4, head_dim=64, caption_channels=256)
XXL = T5Config(vocab_size=32128, d_model=4096, num_layers=24, num_heads=64, d_kv=64, d_ff=10240)
VAES = {"0.9": VAE_0_9, "0.9.1": VAE_0_9_1, "0.9.5": VAE_0_9_5}
UPSAMPLERS = [
    UpscalerConfig(mid_channels=64, num_blocks_per_stage=2, spatial_upsample=space, temporal_upsample=time)
    for space, time in ((1, 0), (0, 1), (1, 1))
]
GRID = LatentGrid(3, 4, 2)
SMALL = TransformerConfig(num_layers=3, num_heads=4, head_dim=64, caption_channels=48, in_channels=8)
SMALL_T5 = T5Config(vocab_size=50, d_model=256, num_layers=2, num_heads=4, d_kv=64, d_ff=640)
TEXT = 24
CPU = torch.device("cpu")
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@pytest.fixture(autouse=True)
def plainly() -> Iterator[None]:
    """Without gradients; in one thread, for what is counted here is too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what kernels take besides their tensors: torch's own account does not have it."""
    monkeypatch.setattr(activations, "KERNEL_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(activations, "conv_workspace_bytes", lambda *_: 0)


def thinned(family: str, layers: int) -> VAEConfig:
    """A released VAE with this many layers where it has more, and an eighth of its channels."""
    full = VAES[family]
    encoder, decoder = (
        tuple(replace(block, num_layers=min(block.num_layers, layers)) for block in blocks)
        for blocks in (full.encoder_blocks, full.decoder_blocks)
    )
    return replace(
        full, encoder_blocks=encoder, decoder_blocks=decoder, encoder_base_channels=16, decoder_base_channels=16
    )


def on_meta(make: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        return make(config)


def numbers(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


def flops(run: Callable[[], object]) -> int:
    """As torch counts them. It leaves out the attention of CPUs, unless told."""

    def attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention}) as counter:
        run()
    return counter.get_total_flops()


def live(run: Callable[[], object]) -> int:
    with LiveBytes() as counter:
        run()
    return counter.peak_bytes


def arguments(batch: int, tokens: int, *, per_token: bool = False) -> tuple[Any, ...]:
    # Padding between words costs what they do; what is behind them is left out.
    mask = (torch.arange(TEXT)[None].expand(batch, -1) < 7) | (torch.arange(TEXT) == TEXT - 1)
    level = torch.full((batch, tokens if per_token else 1), 0.7)
    level[:, 1:] = 0.1
    text = torch.randn(batch, TEXT, SMALL.caption_channels)
    return torch.randn(batch, tokens, SMALL.in_channels), text, mask, level


@pytest.mark.parametrize("config", [DEMO, TRANSFORMER_2B, TRANSFORMER_13B], ids=["demo", "2B", "13B"])
def test_the_weights_of_a_transformer_are_counted_block_by_block(config: TransformerConfig) -> None:
    module, weights = on_meta(Transformer, config), transformer_parameters(config)
    block = list(module.layers[0].parameters())
    matrices = sum(layer.weight.numel() for layer in module.layers[0].modules() if isinstance(layer, nn.Linear))
    assert weights.total == numbers(module)
    assert (weights.linear_per_block, weights.other_per_block) == (matrices, sum(p.numel() for p in block) - matrices)


def test_the_weights_of_a_text_encoder_are_counted_block_by_block() -> None:
    module, weights = on_meta(T5Encoder, XXL), text_encoder_parameters(XXL)
    matrices = sum(layer.weight.numel() for layer in module.blocks[0].modules() if isinstance(layer, nn.Linear))
    assert weights.total == numbers(module)
    assert (weights.linear_per_block, weights.other_per_block) == (matrices, numbers(module.blocks[0]) - matrices)


@pytest.mark.parametrize("config", [*VAES.values(), vae_config("0.9.5")], ids=[*VAES, "tiny"])
def test_the_weights_of_a_vae_are_counted_half_by_half(config: VAEConfig) -> None:
    module = on_meta(VAE, config)
    assert vae_encoder_parameters(config).total == numbers(module.encoder)
    assert vae_decoder_parameters(config).total == numbers(module.decoder)
    assert latent_statistics_parameters(config).total == numbers(module.statistics)


@pytest.mark.parametrize("config", UPSAMPLERS, ids=lambda config: config.kind)
def test_the_weights_of_an_upscaler_are_counted(config: UpscalerConfig) -> None:
    assert upscaler_parameters(config).total == numbers(on_meta(LatentUpscaler, config))


def test_matrices_may_be_stored_in_fewer_bits_than_the_rest() -> None:
    weights = transformer_parameters(DEMO)
    assert weights.bytes(2, 0.5625) == 0.5625 * weights.linear + 2 * (weights.total - weights.linear)
    assert weights.bytes(4) == 4 * weights.total
    assert weights.num_blocks * weights.block_bytes(2) + 2 * weights.outside_blocks == weights.bytes(2)


@pytest.mark.parametrize(("batch", "per_token", "levels"), [(1, False, None), (2, False, None), (2, True, 2)])
def test_the_products_of_a_transformer_are_those_that_torch_counts(
    batch: int, per_token: bool, levels: int | None
) -> None:
    module, (tokens, text, mask, level) = Transformer(SMALL), arguments(batch, 12, per_token=per_token)
    rope = module.compute_rope(torch.rand(1, 3, 12))
    counted = flops(lambda: module(tokens, rope, text, mask, level))
    reading = text_kv_flops(SMALL, batch=batch, text_tokens=TEXT)
    assert counted == reading + transformer_flops(SMALL, 12, batch=batch, text_tokens=TEXT, num_sigmas=levels)


def test_a_text_that_was_read_costs_a_step_no_products() -> None:
    module, (tokens, text, mask, level) = Transformer(SMALL), arguments(2, 12)
    rope, reading = module.compute_rope(torch.rand(1, 3, 12)), module.project_text(text, mask)
    first = flops(lambda: module(tokens, rope, reading, None, level))
    second = flops(lambda: module(tokens, rope, reading, None, level))
    assert second == transformer_flops(SMALL, 12, batch=2, text_tokens=TEXT)
    kept = 4 * SMALL.num_layers * 2 * TEXT * SMALL.width**2
    assert first == second + kept


@pytest.mark.parametrize("mode", [*PERTURBED_VALUES, TRANSFORMER_BLOCK])
def test_the_products_of_a_disturbed_evaluation_are_those_that_torch_counts(mode: str) -> None:
    module, given = Transformer(SMALL), arguments(2, 12)
    tokens, text, mask, level = given
    rope = module.compute_rope(torch.rand(1, 3, 12))
    disturb: dict[str, Any] = {"blocks": (1,), "mode": mode, "rows": slice(1, 2)}
    both = flops(lambda: module.forward_with_perturbed(tokens, rope, text, mask, level, **disturb))
    added = perturbed_flops(SMALL, 12, (1,), mode, text_tokens=TEXT)
    reading = text_kv_flops(SMALL, batch=2, text_tokens=TEXT)
    assert both == reading + transformer_flops(SMALL, 12, batch=2, text_tokens=TEXT) + added


def test_the_products_of_a_text_encoder_are_those_that_torch_counts() -> None:
    module, ids = T5Encoder(SMALL_T5), torch.zeros(2, TEXT, dtype=torch.int64)
    assert flops(lambda: module(ids, ids == 0)) == text_encoder_flops(SMALL_T5, batch=2, length=TEXT)


@pytest.mark.parametrize("family", VAES)
def test_the_products_of_a_vae_are_those_that_torch_counts(family: str) -> None:
    config = thinned(family, 2)
    with torch.device("meta"):
        module, latents, pixels = VAE(config), torch.empty(1, 128, 3, 4, 2), torch.empty(1, 3, 17, 128, 64)
        level = torch.empty(1)
        decoded = flops(lambda: module.decode(latents, timestep=level, noise_source=torch.empty))
        encoded = flops(lambda: module.encode(pixels))
    assert decoded == vae_decoder_flops(config, GRID)
    assert encoded == vae_encoder_flops(config, GRID)


@pytest.mark.parametrize("config", UPSAMPLERS, ids=lambda config: config.kind)
def test_the_products_of_an_upscaler_are_those_that_torch_counts(config: UpscalerConfig) -> None:
    with torch.device("meta"):
        module, latents = LatentUpscaler(config), torch.empty(1, 128, 3, 4, 2)
        assert flops(lambda: module(latents)) == upscaler_flops(config, GRID)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "per_token", "disturbed"),
    [
        (1, 16, False, 0),
        (1, 600, False, 0),
        (2, 300, False, 0),
        (1, 300, True, 0),
        (2, 300, False, 1),
        (1, 300, True, 1),
    ],
)
def test_a_transformer_holds_the_bytes_that_are_predicted(
    batch: int, tokens: int, per_token: bool, disturbed: int, dtype: torch.dtype
) -> None:
    module = Transformer(SMALL).to(dtype)
    x, text, mask, level = arguments(batch, tokens, per_token=per_token)
    given = (x.to(dtype), module.compute_rope(torch.rand(1, 3, tokens)), text.to(dtype), mask, level)
    if disturbed:
        disturb: dict[str, Any] = {"blocks": (0,), "mode": "attention_skip", "rows": slice(batch - 1, None)}
        counted = live(lambda: module.forward_with_perturbed(*given, **disturb))
    else:
        counted = live(lambda: module(*given))
    predicted = activations.transformer_activation_bytes(
        SMALL,
        tokens,
        dtype.itemsize,
        batch=batch,
        text_tokens=TEXT,
        per_token_sigmas=per_token,
        perturbed_samples=disturbed,
        fused_gelu=should_prepack_linears(dtype, CPU),
    )
    predicted += activations.text_kv_bytes(SMALL, dtype.itemsize, batch=batch, text_tokens=TEXT)
    assert counted == pytest.approx(predicted, rel=0.02, abs=20_000)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_table_of_rotations_holds_the_bytes_that_are_predicted(dtype: torch.dtype) -> None:
    module, (making, made) = Transformer(SMALL).to(dtype), activations.rope_bytes(SMALL, 600, dtype.itemsize)
    rope = module.compute_rope(torch.rand(1, 3, 600))
    assert sum(part.nbytes for part in rope) == made
    assert live(lambda: module.compute_rope(torch.rand(1, 3, 600))) == pytest.approx(making, rel=0.02)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [32, 256])
def test_a_text_encoder_holds_the_bytes_that_are_predicted(length: int, dtype: torch.dtype) -> None:
    module, ids = T5Encoder(SMALL_T5).to(dtype), torch.zeros(1, length, dtype=torch.int64)
    counted = live(lambda: module(ids, ids == 0))
    assert counted == pytest.approx(
        activations.text_encoder_activation_bytes(SMALL_T5, dtype.itemsize, length=length), rel=0.04
    )


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("config", UPSAMPLERS, ids=lambda config: config.kind)
def test_an_upscaler_holds_the_bytes_that_are_predicted(config: UpscalerConfig) -> None:
    with torch.device("meta"):
        module, latents = LatentUpscaler(config), torch.empty(1, 128, 3, 4, 2)
        assert live(lambda: module(latents)) == pytest.approx(
            activations.upscaler_activation_bytes(config, GRID), rel=0.08
        )


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(("frames", "handed"), [(1, 4), (2, 4), (3, 4), (6, 4), (3, 1)])
@pytest.mark.parametrize("family", VAES)
def test_a_decoder_holds_the_bytes_that_are_predicted_wherever_its_stream_is(
    family: str, frames: int, handed: int
) -> None:
    config, grid = thinned(family, 2), LatentGrid(frames, 4, 2)
    with torch.device("meta"):
        module, latents = VAE(config).bfloat16(), torch.empty(1, 128, frames, 4, 2, dtype=torch.bfloat16)

        def decode() -> None:
            for _ in module.decode_stream(
                latents, timestep=torch.empty(1), noise_source=torch.empty, chunk_frames=handed
            ):
                pass

        counted = live(decode)
    # A loop holds the pixels of the turn before; that they are made into bytes as well is the pipeline's doing.
    as_bytes = 3 * handed * 128 * 64
    predicted = vae_activations.vae_decode_activation_bytes.__wrapped__(config, grid, 2, handed=handed) - as_bytes
    assert counted == pytest.approx(predicted, rel=0.02, abs=3 * handed * 128 * 64 * 2)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("family", VAES)
def test_an_encoder_holds_the_bytes_that_are_predicted(family: str, frames: int) -> None:
    config = thinned(family, 1)
    with torch.device("meta"):
        module = VAE(config).bfloat16()
        pixels = torch.empty(1, 3, 8 * frames - 7, 128, 64, dtype=torch.bfloat16)
        counted = live(lambda: module.encode(pixels, chunk_frames=8))
    predicted = vae_activations.vae_encode_activation_bytes.__wrapped__(config, LatentGrid(frames, 4, 2), 2)
    assert counted == pytest.approx(predicted, rel=0.01, abs=100_000)


def test_fewer_frames_handed_on_take_less() -> None:
    grid = LatentGrid(4, 10, 16)
    four, two, one = (
        vae_activations.vae_decode_activation_bytes(VAE_0_9_5, grid, 2, chunk_frames=handed) for handed in (4, 2, 1)
    )
    assert four > two > one


def test_a_long_video_takes_no_more_to_decode_than_one_that_has_settled() -> None:
    settled, long, longer = (
        vae_activations.vae_decode_activation_bytes(VAE_0_9_5, LatentGrid(frames, 10, 16), 2)
        for frames in (30, vae_activations.STEADY_STATE_FRAMES, 500)
    )
    assert settled == pytest.approx(long, rel=0.01)
    assert long == longer


def test_seconds_are_of_computing_and_of_reading() -> None:
    assert estimate_seconds(10**12, 10**11) == 10
    assert estimate_seconds(10**12, 10**11, bytes_read=3 * 10**9, disk_bytes_per_second=10**9) == 13


@pytest.fixture(scope="module")
def measured() -> dict[str, list[int]]:
    """For each part at work, what the system says that it took at most, and what was predicted; in bytes."""
    if sys.platform != "linux" or not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not say how much memory a process took at most since some moment")
    # All blocks but the smallest go back when they are freed, so that what is measured is what was in use.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "passive"}
    environment = {**os.environ, **settings}
    command = [sys.executable, "-m", "tests.planning.measure_memory"]
    paths = os.pathsep.join([os.getcwd(), *sys.path])
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "part",
    [
        "transformer",
        "transformer in float32",
        "conditioned",
        "text",
        "decoder",
        "decoder in float32",
        "encoder",
        "packed decoder",
        "packed decoder in float32",
        "decoder packed for pairs",
        "packed encoder",
    ],
)
def test_a_part_at_work_takes_the_memory_that_was_predicted(part: str, measured: dict[str, list[int]]) -> None:
    taken, predicted = measured[part]
    # Packed convolutions take a little less than is said: the plan may be above what happens, and hardly below.
    bound = 0.15 if "packed" in part else 0.05
    assert taken <= 1.05 * predicted + 6_000_000
    assert taken >= (1 - bound) * predicted - 6_000_000
