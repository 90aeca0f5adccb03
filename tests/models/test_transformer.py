"""The transformer against the official and the diffusers modules, and the refusals of its config."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from ltx_video.utils.diffusers_config_mapping import OURS_TRANSFORMER_CONFIG
from ltx_video.utils.skip_layer_strategy import SkipLayerStrategy
from torch import Tensor

from kadr.errors import CheckpointError
from kadr.models.transformer import (
    CUDA_GRAPH_MAX_TOKENS,
    TRANSFORMER_2B,
    TRANSFORMER_13B,
    Transformer,
    TransformerConfig,
)
from kadr.sampling.positions import token_positions
from kadr.sampling.settings import ATTENTION_SKIP, ATTENTION_VALUES, TRANSFORMER_BLOCK
from kadr.shapes import LatentGrid
from tests.kernels.cuda.test_graphs import FakeBackend
from tests.oracles import diffusers_transformer, official_transformer, randn, relative_error
from tests.tiny_models import build_random

pytestmark = pytest.mark.usefixtures("no_gradients")

GRID = LatentGrid(2, 3, 4)
TINY = TransformerConfig(num_layers=3, num_heads=4, head_dim=10, caption_channels=24, in_channels=8)  # 40 = 6 * 6 + 4
RELEASED_WIDTHS = {"2B": replace(TRANSFORMER_2B, num_layers=2), "13B": replace(TRANSFORMER_13B, num_layers=1)}


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tiny() -> Transformer:
    return build_random(lambda: Transformer(TINY))


@dataclass(frozen=True)
class Inputs:
    """A batch of two samples that differ in latents, positions, text lengths and the sigma of each token."""

    tokens: Tensor
    positions: Tensor
    text: Tensor
    text_mask: Tensor
    sigma: Tensor

    @classmethod
    def random(cls, config: TransformerConfig, *, grid: LatentGrid = GRID, text_length: int = 9) -> Inputs:
        grids = [token_positions(grid, fps=fps, causal=config.causal_temporal_positioning) for fps in (30.0, 24.0)]
        sigma = torch.tensor([0.9094, 0.3])[:, None].repeat(1, grid.num_tokens)
        sigma[0, : grid.height * grid.width] = 0.0  # a clean first frame
        sigma[1, ::3] = torch.rand(sigma[1, ::3].shape, generator=torch.Generator().manual_seed(3))
        return cls(
            tokens=randn(2, grid.num_tokens, config.in_channels, seed=4),
            positions=torch.stack(grids),
            text=randn(2, text_length, config.caption_channels, seed=5),
            text_mask=torch.arange(text_length) < torch.tensor([text_length, 4])[:, None],
            sigma=sigma,
        )


def velocity(model: Transformer, inputs: Inputs, *, mask: bool = True) -> Tensor:
    rope = model.compute_rope(inputs.positions)
    return model(inputs.tokens, rope, inputs.text, inputs.text_mask if mask else None, inputs.sigma)


def official_velocity(model: Transformer, inputs: Inputs) -> Tensor:
    return official_transformer(model)(
        inputs.tokens,
        indices_grid=inputs.positions,
        encoder_hidden_states=inputs.text,
        encoder_attention_mask=inputs.text_mask,
        timestep=inputs.sigma,
        return_dict=False,
    )[0]


def diffusers_velocity(model: Transformer, inputs: Inputs) -> Tensor:
    return run_diffusers(diffusers_transformer(model), inputs)


def run_diffusers(module: torch.nn.Module, inputs: Inputs) -> Tensor:
    """Predicts the velocity with diffusers' transformer, or one with PEFT adapters."""
    return module(
        inputs.tokens,
        encoder_hidden_states=inputs.text,
        encoder_attention_mask=inputs.text_mask.to(inputs.tokens.dtype),
        timestep=inputs.sigma * 1000,
        video_coords=inputs.positions,
        return_dict=False,
    )[0]


# Against the oracles


@pytest.mark.parametrize("causal", [True, False])
def test_velocity_equals_official_and_diffusers(tiny, causal):
    inputs = Inputs.random(replace(TINY, causal_temporal_positioning=causal))
    ours = velocity(tiny, inputs)
    assert ours.shape == inputs.tokens.shape
    assert relative_error(ours, official_velocity(tiny, inputs)) <= 1e-5
    assert relative_error(ours, diffusers_velocity(tiny, inputs)) <= 1e-5


@pytest.mark.parametrize("size", RELEASED_WIDTHS)
def test_velocity_at_released_widths_equals_official_and_diffusers(size, parity):
    model = build_random(lambda: Transformer(RELEASED_WIDTHS[size]))
    inputs = Inputs.random(model.config, grid=LatentGrid(2, 2, 2), text_length=6)
    ours = velocity(model, inputs)
    for oracle, theirs in {"official": official_velocity, "diffusers": diffusers_velocity}.items():
        assert parity("transformer", size, oracle, relative_error(ours, theirs(model, inputs))) <= 1e-5


@pytest.mark.parametrize("num_heads, head_dim", [(1, 6), (3, 8), (2, 13), (5, 2)])  # D mod 6 = 0, 0, 2, 4
def test_velocity_equals_official_at_every_width_modulo_six(num_heads, head_dim):
    model = build_random(lambda: Transformer(replace(TINY, num_heads=num_heads, head_dim=head_dim, num_layers=1)))
    inputs = Inputs.random(model.config)
    assert relative_error(velocity(model, inputs), official_velocity(model, inputs)) <= 1e-5


def test_velocity_equals_official_where_the_text_is_all_padding(tiny):
    inputs = Inputs.random(TINY)
    inputs = replace(inputs, text_mask=inputs.text_mask & torch.tensor([[False], [True]]))
    assert relative_error(velocity(tiny, inputs), official_velocity(tiny, inputs)) <= 1e-5


def test_velocity_equals_official_at_activations_near_epsilon(tiny):
    faint = deepcopy(tiny)
    for name, weight in faint.state_dict().items():
        if re.search(r"^proj_in|attention\.(q|k|out)\.|feed_forward\.down", name):
            weight *= 1e-3
    inputs = Inputs.random(TINY)
    assert relative_error(velocity(faint, inputs), official_velocity(faint, inputs)) <= 1e-5


def test_bf16_error_is_no_larger_than_that_of_official(tiny):
    inputs = Inputs.random(TINY)
    half = deepcopy(tiny).to(torch.bfloat16)
    rounded = replace(inputs, tokens=inputs.tokens.bfloat16(), text=inputs.text.bfloat16())
    exact, ours, theirs = velocity(tiny, inputs), velocity(half, rounded), official_velocity(half, rounded)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) <= 1.2 * relative_error(theirs, exact)
    assert relative_error(ours, theirs) <= 1e-2


# Laws


def test_one_sigma_equals_the_same_sigma_per_token(tiny):
    inputs = Inputs.random(TINY)
    sigma = torch.tensor([[0.7], [0.2]])
    sigma_per_token = sigma.expand(-1, GRID.num_tokens)
    ours, expected = (velocity(tiny, replace(inputs, sigma=value)) for value in (sigma, sigma_per_token))
    assert relative_error(ours, expected) <= 1e-6


def test_one_sigma_equals_official_and_diffusers(tiny):
    inputs = replace(Inputs.random(TINY), sigma=torch.tensor([[1.0], [0.025]]))
    ours = velocity(tiny, inputs)
    assert relative_error(ours, official_velocity(tiny, inputs)) <= 1e-5
    assert relative_error(ours, diffusers_velocity(tiny, inputs)) <= 1e-5


def test_padded_text_does_not_change_the_velocity(tiny):
    inputs = Inputs.random(TINY)
    noisy_padding = torch.where(inputs.text_mask[..., None], inputs.text, 50.0)
    assert torch.equal(velocity(tiny, replace(inputs, text=noisy_padding)), velocity(tiny, inputs))
    cut = replace(inputs, text=inputs.text[:, :4], text_mask=inputs.text_mask[:, :4])
    assert relative_error(velocity(tiny, cut)[1], velocity(tiny, inputs)[1]) <= 1e-6
    assert relative_error(velocity(tiny, cut)[0], velocity(tiny, inputs)[0]) > 1e-3  # here the cut text was not padding


def test_no_mask_means_that_nothing_is_padding(tiny):
    inputs = Inputs.random(TINY)
    full = replace(inputs, text_mask=torch.ones_like(inputs.text_mask))
    assert relative_error(velocity(tiny, inputs, mask=False), velocity(tiny, full)) <= 1e-6


def test_integer_mask_equals_boolean_mask(tiny):
    inputs = Inputs.random(TINY)
    assert torch.equal(velocity(tiny, replace(inputs, text_mask=inputs.text_mask.long())), velocity(tiny, inputs))


def test_samples_of_a_batch_are_independent(tiny):
    inputs = Inputs.random(TINY)
    batch_velocity = velocity(tiny, inputs)
    for index in range(2):
        sample = Inputs(*(field[index : index + 1] for field in vars(inputs).values()))
        assert relative_error(velocity(tiny, sample), batch_velocity[index : index + 1]) <= 1e-6


def test_velocity_depends_on_positions_not_on_token_order(tiny):
    inputs = Inputs.random(TINY)
    order = torch.randperm(GRID.num_tokens, generator=torch.Generator().manual_seed(6))
    shuffled = replace(
        inputs,
        tokens=inputs.tokens[:, order],
        positions=inputs.positions[..., order],
        sigma=inputs.sigma[:, order],
    )
    assert relative_error(velocity(tiny, shuffled), velocity(tiny, inputs)[:, order]) <= 1e-6


# Perturbed blocks (STG)

STRATEGIES = {
    ATTENTION_VALUES: SkipLayerStrategy.AttentionValues,
    ATTENTION_SKIP: SkipLayerStrategy.AttentionSkip,
    TRANSFORMER_BLOCK: SkipLayerStrategy.TransformerBlock,
}
ROWS = {1: [slice(None)], 3: [slice(None), slice(1, None), slice(2), slice(1, 2)]}


def batch_inputs(batch: int) -> Inputs:
    """One or three samples that differ in positions, sigma of each token and length of the text."""
    two = Inputs.random(TINY)
    rows = torch.tensor([1, 0, 1][:batch])
    redrawn = {
        "tokens": randn(batch, GRID.num_tokens, TINY.in_channels, seed=7),
        "text": randn(batch, 9, 24, seed=8),
    }
    return replace(Inputs(*(field[rows] for field in vars(two).values())), **redrawn)


def velocity_and_perturbed(model: Transformer, inputs: Inputs, **perturbation: Any) -> tuple[Tensor, Tensor]:
    rope = model.compute_rope(inputs.positions)
    return model.forward_with_perturbed(
        inputs.tokens, rope, inputs.text, inputs.text_mask, inputs.sigma, **perturbation
    )


def velocity_perturbed_for_all(model: Transformer, inputs: Inputs, blocks: tuple[int, ...], mode: str) -> Tensor:
    """Predicts the velocity with the listed blocks perturbed for every sample."""
    hooks = [
        model.blocks[index].register_forward_pre_hook(lambda block, arguments: (*arguments[:2], mode))
        for index in blocks
    ]
    perturbed = velocity(model, inputs)
    for hook in hooks:
        hook.remove()
    return perturbed


@pytest.mark.parametrize("mode", STRATEGIES)
@pytest.mark.parametrize("blocks", [(0,), (1,), (2,), (0, 2), (2, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_branch_at_first_perturbed_block_equals_perturbed_forward(tiny, batch, blocks, mode):
    inputs = batch_inputs(batch)
    expected_plain = velocity(tiny, inputs)
    expected = velocity_perturbed_for_all(tiny, inputs, blocks, mode)
    assert relative_error(expected, expected_plain) > 1e-2
    for rows in ROWS[batch]:
        plain, perturbed = velocity_and_perturbed(tiny, inputs, blocks=blocks, mode=mode, rows=rows)
        assert torch.equal(plain, expected_plain)
        assert relative_error(perturbed, expected[rows]) <= 1e-6


@pytest.mark.parametrize("mode", STRATEGIES)
@pytest.mark.parametrize("blocks", [(0,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_perturbed_blocks_equal_the_official_skip_layer_mask(tiny, batch, blocks, mode, parity):
    """Builds the mask here, because the official pipeline builds a wrong one for batches."""
    inputs = batch_inputs(batch)
    official = official_transformer(tiny)
    for rows in ROWS[batch]:
        mask = torch.ones(TINY.num_layers, batch)
        mask[list(blocks), rows] = 0
        theirs = official(
            inputs.tokens,
            indices_grid=inputs.positions,
            encoder_hidden_states=inputs.text,
            encoder_attention_mask=inputs.text_mask,
            timestep=inputs.sigma,
            skip_layer_mask=mask,
            skip_layer_strategy=STRATEGIES[mode],
            return_dict=False,
        )[0]
        plain, perturbed = velocity_and_perturbed(tiny, inputs, blocks=blocks, mode=mode, rows=rows)
        combined = plain.clone()
        combined[rows] = perturbed
        assert parity("perturbed transformer", mode, "official", relative_error(combined, theirs)) <= 1e-5


@pytest.mark.parametrize("mode", STRATEGIES)
def test_one_rope_equals_the_same_rope_per_sample(tiny, mode):
    inputs = batch_inputs(3)
    shared = replace(inputs, positions=inputs.positions[:1])
    expanded = replace(inputs, positions=inputs.positions[:1].expand(3, -1, -1))
    for rows in ROWS[3]:
        results = [velocity_and_perturbed(tiny, each, blocks=(1,), mode=mode, rows=rows) for each in (shared, expanded)]
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_padded_text_does_not_change_perturbed_samples(tiny):
    inputs = batch_inputs(3)
    noisy_padding = replace(inputs, text=torch.where(inputs.text_mask[..., None], inputs.text, 50.0))
    for rows in ROWS[3]:
        perturbed, expected = (
            velocity_and_perturbed(tiny, each, blocks=(1, 2), mode=ATTENTION_SKIP, rows=rows)[1]
            for each in (noisy_padding, inputs)
        )
        assert torch.equal(perturbed, expected)


@pytest.mark.parametrize(
    "blocks, calls", [((0,), [2, 2, 2]), ((1,), [1, 2, 2]), ((2,), [1, 1, 2]), ((2, 1), [1, 2, 2])], ids=str
)
def test_blocks_before_the_first_perturbed_one_run_once(tiny, blocks, calls):
    block_calls = [0] * TINY.num_layers

    def count(index: int) -> Callable[..., None]:
        def hook(block: Any, arguments: Any, output: Any) -> None:
            block_calls[index] += 1

        return hook

    hooks = [block.register_forward_hook(count(index)) for index, block in enumerate(tiny.blocks)]
    velocity_and_perturbed(tiny, batch_inputs(3), blocks=blocks, mode=ATTENTION_VALUES, rows=slice(1, None))
    for hook in hooks:
        hook.remove()
    assert block_calls == calls


@pytest.mark.parametrize("mode", [None, ATTENTION_VALUES, TRANSFORMER_BLOCK])
@pytest.mark.parametrize("masked", [False, True])
def test_cuda_graph_replay_equals_a_plain_run(tiny, mode, masked):
    inputs, backend, graphed = batch_inputs(2), FakeBackend(), deepcopy(tiny)
    graphed.use_cuda_graphs(backend)
    rope, mask = tiny.compute_rope(inputs.positions), inputs.text_mask if masked else None
    text_kv, other_text_kv = graphed.project_text(inputs.text, mask), graphed.project_text(inputs.text.flip(0), None)
    perturbation = {} if mode is None else {"blocks": (1,), "mode": mode, "rows": slice(1, 2)}
    for step, sigma in enumerate((inputs.sigma, inputs.sigma / 2, inputs.sigma / 3, inputs.sigma / 4)):
        tokens = inputs.tokens + step
        replayed, expected = (
            (model if mode is None else model.forward_with_perturbed)(tokens, rope, *text, sigma, **perturbation)
            for model, text in ((graphed, (text_kv, None)), (tiny, (inputs.text, mask)))
        )
        assert all(map(torch.equal, replayed, expected))
        assert graphed(tokens, rope, other_text_kv, None, sigma).isfinite().all()  # another text in between the steps
    assert backend.warm_ups
    assert backend.captures
    assert backend.replays >= 2
    graphed.clear_cuda_graphs()
    assert not graphed._cuda_graphs._graphs


def test_requests_with_prompts_of_other_lengths_share_a_cuda_graph(tiny):
    """The first evaluations of a transformer make the graph; every later request replays it from its first step."""
    inputs, backend, graphed = Inputs.random(TINY, text_length=100), FakeBackend(), deepcopy(tiny)
    graphed.use_cuda_graphs(backend)
    rope = tiny.compute_rope(inputs.positions)
    num_tokens = inputs.tokens.shape[:2].numel()
    for lengths in ((31, 64), (5, 3), (64, 12), (40, 40)):  # real tokens of the two samples
        mask = torch.arange(100) < torch.tensor(lengths)[:, None]
        text_kv = graphed.project_text(inputs.text, mask, num_tokens=num_tokens)
        expected = tiny(inputs.tokens, rope, inputs.text, mask, inputs.sigma)
        for _ in range(2):
            velocity = graphed(inputs.tokens, rope, text_kv, None, inputs.sigma)
            assert relative_error(velocity, expected) <= 1e-6
    assert (backend.warm_ups, backend.captures, backend.replays) == (1, 1, 7)


def test_a_text_is_padded_only_for_a_cuda_graph(tiny):
    inputs, backend, graphed = Inputs.random(TINY, text_length=100), FakeBackend(), deepcopy(tiny)
    num_tokens = inputs.tokens.shape[:2].numel()
    graphed.use_cuda_graphs(backend)
    mask = (torch.arange(100) < 65).expand(2, -1)
    assert graphed.project_text(inputs.text, mask, num_tokens=num_tokens).text.shape[1] == 100  # all there is
    assert graphed.project_text(inputs.text, mask, num_tokens=CUDA_GRAPH_MAX_TOKENS + 1).text.shape[1] == 65
    assert graphed.project_text(inputs.text, mask).text.shape[1] == 65
    assert tiny.project_text(inputs.text, mask, num_tokens=num_tokens).text.shape[1] == 65


@pytest.mark.usefixtures("no_garbage_collection")
def test_transformer_with_cuda_graphs_is_freed_with_its_last_reference(tiny):
    inputs, graphed, backend = batch_inputs(2), deepcopy(tiny), FakeBackend()
    graphed.use_cuda_graphs(backend)
    text_kv, rope = graphed.project_text(inputs.text, None), graphed.compute_rope(inputs.positions)
    for _ in range(3):
        graphed(inputs.tokens, rope, text_kv, None, inputs.sigma)
    assert backend.replays
    reference = weakref.ref(graphed)
    del graphed
    assert reference() is None


def test_a_mask_beside_a_text_kv_cache_is_refused(tiny):
    inputs = batch_inputs(2)
    rope, text_kv = tiny.compute_rope(inputs.positions), tiny.project_text(inputs.text, None)
    arguments = (inputs.tokens, rope, text_kv, inputs.text_mask, inputs.sigma)
    with pytest.raises(ValueError, match="pass it to project_text"):
        tiny(*arguments)
    with pytest.raises(ValueError, match="pass it to project_text"):
        tiny.forward_with_perturbed(*arguments, blocks=(1,), mode=ATTENTION_VALUES)


def test_no_cuda_graph_above_the_token_limit(tiny, monkeypatch):
    inputs, backend, graphed = batch_inputs(2), FakeBackend(), deepcopy(tiny)
    monkeypatch.setattr("kadr.models.transformer.CUDA_GRAPH_MAX_TOKENS", inputs.tokens.shape[1] * 2 - 1)
    graphed.use_cuda_graphs(backend)
    text_kv = graphed.project_text(inputs.text, None)
    for _ in range(3):
        graphed(inputs.tokens, graphed.compute_rope(inputs.positions), text_kv, None, inputs.sigma)
    assert not backend.warm_ups


def test_perturbation_changes_no_weight_and_no_input(tiny):
    inputs = batch_inputs(3)
    before = [field.clone() for field in vars(inputs).values()]
    plain = velocity(tiny, inputs)
    for mode in STRATEGIES:
        velocity_and_perturbed(tiny, inputs, blocks=(0, 2), mode=mode, rows=slice(1, None))
    assert all(torch.equal(*pair) for pair in zip(before, vars(inputs).values(), strict=True))
    assert torch.equal(velocity(tiny, inputs), plain)


# The header


@pytest.mark.parametrize(
    "config",
    [
        TRANSFORMER_2B,
        TRANSFORMER_13B,
        replace(TRANSFORMER_2B, causal_temporal_positioning=False),
        replace(TINY, rope_theta=500.0, rope_max_positions=(10.0, 64.0, 32.0)),
    ],
    ids=["2B", "13B", "2B before 0.9.5", "tiny"],
)
def test_header_round_trips_through_json(config):
    assert TransformerConfig.from_header(json.loads(json.dumps(config.to_header()))) == config


def test_released_headers_give_the_released_configs():
    config_0_9 = TransformerConfig.from_header(OURS_TRANSFORMER_CONFIG)
    assert config_0_9 == replace(TRANSFORMER_2B, causal_temporal_positioning=False)
    header = {name: value for name, value in OURS_TRANSFORMER_CONFIG.items() if name != "project_to_2d_pos"}
    header |= {"causal_temporal_positioning": True}
    assert TransformerConfig.from_header(header) == TRANSFORMER_2B
    larger_sizes = {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}
    assert TransformerConfig.from_header(header | larger_sizes) == TRANSFORMER_13B


@pytest.mark.parametrize(
    "key, value",
    [
        ("_class_name", "AVTransformer3DModel"),  # LTX-2
        ("qk_norm", None),
        ("qk_norm", "layer_norm"),
        ("standardization_norm", "layer_norm"),
        ("adaptive_norm", "single_scale"),
        ("norm_elementwise_affine", True),
        ("norm_eps", 1e-5),
        ("activation_fn", "geglu"),
        ("attention_bias", False),
        ("only_cross_attention", True),
        ("double_self_attention", True),
        ("upcast_attention", True),
        ("positional_embedding_type", "absolute"),
        ("timestep_scale_multiplier", 1),
        ("timestep_scale_multiplier", None),
        ("dropout", 0.1),
        ("cross_attention_dim", 1024),
        ("out_channels", 64),
    ],
    ids=str,
)
def test_unreleased_header_value_is_refused_by_value(key, value):
    with pytest.raises(CheckpointError, match=f"{key} = {re.escape(repr(value))};"):
        TransformerConfig.from_header(TRANSFORMER_2B.to_header() | {key: value})


@pytest.mark.parametrize("num_heads, head_dim", [(1, 4), (3, 3)])
def test_width_too_small_for_rope_is_refused_by_value(num_heads, head_dim):
    with pytest.raises(CheckpointError, match=str(num_heads * head_dim)):
        replace(TINY, num_heads=num_heads, head_dim=head_dim)
