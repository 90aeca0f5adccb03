"""The transformer against the official and the diffusers modules, and the refusals of its config."""

from __future__ import annotations

import json
import re
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
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, Transformer, TransformerConfig
from kadr.sampling.positions import token_positions
from kadr.sampling.settings import ATTENTION_SKIP, ATTENTION_VALUES, TRANSFORMER_BLOCK
from kadr.shapes import LatentGrid
from tests.kernels.test_cuda_graphs import FakeBackend
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
    """A batch of two: other latents, texts of other lengths, other noise levels for every token."""

    tokens: Tensor
    positions: Tensor
    text: Tensor
    text_mask: Tensor
    levels: Tensor

    @classmethod
    def of(cls, config: TransformerConfig, *, grid: LatentGrid = GRID, text_length: int = 9) -> Inputs:
        grids = [token_positions(grid, fps=fps, causal=config.causal_temporal_positioning) for fps in (30.0, 24.0)]
        levels = torch.tensor([0.9094, 0.3])[:, None].repeat(1, grid.num_tokens)
        levels[0, : grid.height * grid.width] = 0.0  # a clean first frame
        levels[1, ::3] = torch.rand(levels[1, ::3].shape, generator=torch.Generator().manual_seed(3))
        return cls(
            tokens=randn(2, grid.num_tokens, config.in_channels, seed=4),
            positions=torch.stack(grids),
            text=randn(2, text_length, config.caption_channels, seed=5),
            text_mask=torch.arange(text_length) < torch.tensor([text_length, 4])[:, None],
            levels=levels,
        )


def velocity(model: Transformer, given: Inputs, *, mask: bool = True) -> Tensor:
    rope = model.compute_rope(given.positions)
    return model(given.tokens, rope, given.text, given.text_mask if mask else None, given.levels)


def official_velocity(model: Transformer, given: Inputs) -> Tensor:
    return official_transformer(model)(
        given.tokens,
        indices_grid=given.positions,
        encoder_hidden_states=given.text,
        encoder_attention_mask=given.text_mask,
        timestep=given.levels,
        return_dict=False,
    )[0]


def diffusers_velocity(model: Transformer, given: Inputs) -> Tensor:
    return asked_of_diffusers(diffusers_transformer(model), given)


def asked_of_diffusers(module: torch.nn.Module, given: Inputs) -> Tensor:
    """The velocity by diffusers' transformer, or by one with adapters of PEFT."""
    return module(
        given.tokens,
        encoder_hidden_states=given.text,
        encoder_attention_mask=given.text_mask.to(given.tokens.dtype),
        timestep=given.levels * 1000,
        video_coords=given.positions,
        return_dict=False,
    )[0]


# Against the oracles


@pytest.mark.parametrize("causal", [True, False])
def test_velocity_equals_official_and_diffusers(tiny, causal):
    given = Inputs.of(replace(TINY, causal_temporal_positioning=causal))
    ours = velocity(tiny, given)
    assert ours.shape == given.tokens.shape
    assert relative_error(ours, official_velocity(tiny, given)) <= 1e-5
    assert relative_error(ours, diffusers_velocity(tiny, given)) <= 1e-5


@pytest.mark.parametrize("size", RELEASED_WIDTHS)
def test_velocity_at_released_widths_equals_official_and_diffusers(size, parity):
    model = build_random(lambda: Transformer(RELEASED_WIDTHS[size]))
    given = Inputs.of(model.config, grid=LatentGrid(2, 2, 2), text_length=6)
    ours = velocity(model, given)
    for oracle, theirs in {"official": official_velocity, "diffusers": diffusers_velocity}.items():
        assert parity("transformer", size, oracle, relative_error(ours, theirs(model, given))) <= 1e-5


@pytest.mark.parametrize("heads, head_width", [(1, 6), (3, 8), (2, 13), (5, 2)])  # D mod 6 = 0, 0, 2, 4
def test_velocity_equals_official_at_every_width_modulo_six(heads, head_width):
    model = build_random(lambda: Transformer(replace(TINY, num_heads=heads, head_dim=head_width, num_layers=1)))
    given = Inputs.of(model.config)
    assert relative_error(velocity(model, given), official_velocity(model, given)) <= 1e-5


def test_velocity_equals_official_where_the_text_is_all_padding(tiny):
    given = Inputs.of(TINY)
    given = replace(given, text_mask=given.text_mask & torch.tensor([[False], [True]]))
    assert relative_error(velocity(tiny, given), official_velocity(tiny, given)) <= 1e-5


def test_velocity_equals_official_at_activations_near_epsilon(tiny):
    faint = deepcopy(tiny)
    for name, weight in faint.state_dict().items():
        if re.search(r"^proj_in|attention\.(q|k|out)\.|feed_forward\.down", name):
            weight *= 1e-3
    given = Inputs.of(TINY)
    assert relative_error(velocity(faint, given), official_velocity(faint, given)) <= 1e-5


def test_bf16_error_is_no_larger_than_that_of_official(tiny):
    given = Inputs.of(TINY)
    half = deepcopy(tiny).to(torch.bfloat16)
    rounded = replace(given, tokens=given.tokens.bfloat16(), text=given.text.bfloat16())
    exact, ours, theirs = velocity(tiny, given), velocity(half, rounded), official_velocity(half, rounded)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) <= 1.2 * relative_error(theirs, exact)
    assert relative_error(ours, theirs) <= 1e-2


# Laws


def test_one_sigma_equals_the_same_sigma_per_token(tiny):
    given = Inputs.of(TINY)
    one = torch.tensor([[0.7], [0.2]])
    each = one.expand(-1, GRID.num_tokens)
    assert (
        relative_error(velocity(tiny, replace(given, levels=one)), velocity(tiny, replace(given, levels=each))) <= 1e-6
    )


def test_one_sigma_equals_official_and_diffusers(tiny):
    given = replace(Inputs.of(TINY), levels=torch.tensor([[1.0], [0.025]]))
    ours = velocity(tiny, given)
    assert relative_error(ours, official_velocity(tiny, given)) <= 1e-5
    assert relative_error(ours, diffusers_velocity(tiny, given)) <= 1e-5


def test_padded_text_does_not_change_the_velocity(tiny):
    given = Inputs.of(TINY)
    loud = torch.where(given.text_mask[..., None], given.text, 50.0)
    assert torch.equal(velocity(tiny, replace(given, text=loud)), velocity(tiny, given))
    alone = replace(given, text=given.text[:, :4], text_mask=given.text_mask[:, :4])
    assert relative_error(velocity(tiny, alone)[1], velocity(tiny, given)[1]) <= 1e-6
    assert relative_error(velocity(tiny, alone)[0], velocity(tiny, given)[0]) > 1e-3  # there, it was not padding


def test_no_mask_means_that_nothing_is_padding(tiny):
    given = Inputs.of(TINY)
    full = replace(given, text_mask=torch.ones_like(given.text_mask))
    assert relative_error(velocity(tiny, given, mask=False), velocity(tiny, full)) <= 1e-6


def test_integer_mask_equals_boolean_mask(tiny):
    given = Inputs.of(TINY)
    assert torch.equal(velocity(tiny, replace(given, text_mask=given.text_mask.long())), velocity(tiny, given))


def test_samples_of_a_batch_are_independent(tiny):
    given = Inputs.of(TINY)
    whole = velocity(tiny, given)
    for index in range(2):
        only = Inputs(*(field[index : index + 1] for field in vars(given).values()))
        assert relative_error(velocity(tiny, only), whole[index : index + 1]) <= 1e-6


def test_velocity_depends_on_positions_not_on_token_order(tiny):
    given = Inputs.of(TINY)
    order = torch.randperm(GRID.num_tokens, generator=torch.Generator().manual_seed(6))
    shuffled = replace(
        given,
        tokens=given.tokens[:, order],
        positions=given.positions[..., order],
        levels=given.levels[:, order],
    )
    assert relative_error(velocity(tiny, shuffled), velocity(tiny, given)[:, order]) <= 1e-6


# Some layers disturbed

STRATEGIES = {
    ATTENTION_VALUES: SkipLayerStrategy.AttentionValues,
    ATTENTION_SKIP: SkipLayerStrategy.AttentionSkip,
    TRANSFORMER_BLOCK: SkipLayerStrategy.TransformerBlock,
}
ROWS = {1: [slice(None)], 3: [slice(None), slice(1, None), slice(2), slice(1, 2)]}


def inputs(batch: int) -> Inputs:
    """One or three samples that differ in everything: positions, levels of each token, lengths of the text."""
    two = Inputs.of(TINY)
    rows = torch.tensor([1, 0, 1][:batch])
    drawn_again = {
        "tokens": randn(batch, GRID.num_tokens, TINY.in_channels, seed=7),
        "text": randn(batch, 9, 24, seed=8),
    }
    return replace(Inputs(*(field[rows] for field in vars(two).values())), **drawn_again)


def both_ways(model: Transformer, given: Inputs, **disturbance: Any) -> tuple[Tensor, Tensor]:
    rope = model.compute_rope(given.positions)
    return model.forward_with_perturbed(given.tokens, rope, given.text, given.text_mask, given.levels, **disturbance)


def disturbed_from_the_start(model: Transformer, given: Inputs, blocks: tuple[int, ...], mode: str) -> Tensor:
    """A whole forward in which the listed layers are disturbed for every sample."""
    hooks = [model.blocks[index].register_forward_pre_hook(lambda layer, given: (*given[:2], mode)) for index in blocks]
    made = velocity(model, given)
    for hook in hooks:
        hook.remove()
    return made


@pytest.mark.parametrize("mode", STRATEGIES)
@pytest.mark.parametrize("blocks", [(0,), (1,), (2,), (0, 2), (2, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_branch_at_first_perturbed_block_equals_perturbed_forward(tiny, batch, blocks, mode):
    given = inputs(batch)
    plain = velocity(tiny, given)
    expected = disturbed_from_the_start(tiny, given, blocks, mode)
    assert relative_error(expected, plain) > 1e-2
    for rows in ROWS[batch]:
        made, disturbed = both_ways(tiny, given, blocks=blocks, mode=mode, rows=rows)
        assert torch.equal(made, plain)
        assert relative_error(disturbed, expected[rows]) <= 1e-6


@pytest.mark.parametrize("mode", STRATEGIES)
@pytest.mark.parametrize("blocks", [(0,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_perturbed_blocks_equal_the_official_skip_layer_mask(tiny, batch, blocks, mode, parity):
    """The mask is the transformer's own: what the official pipeline does wrong in batches is how it makes one."""
    given = inputs(batch)
    official = official_transformer(tiny)
    for rows in ROWS[batch]:
        mask = torch.ones(TINY.num_layers, batch)
        mask[list(blocks), rows] = 0
        theirs = official(
            given.tokens,
            indices_grid=given.positions,
            encoder_hidden_states=given.text,
            encoder_attention_mask=given.text_mask,
            timestep=given.levels,
            skip_layer_mask=mask,
            skip_layer_strategy=STRATEGIES[mode],
            return_dict=False,
        )[0]
        made, disturbed = both_ways(tiny, given, blocks=blocks, mode=mode, rows=rows)
        together = made.clone()
        together[rows] = disturbed
        assert parity("perturbed transformer", mode, "official", relative_error(together, theirs)) <= 1e-5


@pytest.mark.parametrize("mode", STRATEGIES)
def test_one_rope_equals_the_same_rope_per_sample(tiny, mode):
    given = inputs(3)
    one = replace(given, positions=given.positions[:1])
    each = replace(given, positions=given.positions[:1].expand(3, -1, -1))
    for rows in ROWS[3]:
        results = [both_ways(tiny, which, blocks=(1,), mode=mode, rows=rows) for which in (one, each)]
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_padded_text_does_not_change_perturbed_samples(tiny):
    given = inputs(3)
    loud = replace(given, text=torch.where(given.text_mask[..., None], given.text, 50.0))
    for rows in ROWS[3]:
        quiet, noisy = (
            both_ways(tiny, which, blocks=(1, 2), mode=ATTENTION_SKIP, rows=rows)[1] for which in (given, loud)
        )
        assert torch.equal(quiet, noisy)


@pytest.mark.parametrize(
    "blocks, calls", [((0,), [2, 2, 2]), ((1,), [1, 2, 2]), ((2,), [1, 1, 2]), ((2, 1), [1, 2, 2])], ids=str
)
def test_blocks_before_the_first_perturbed_one_run_once(tiny, blocks, calls):
    counted = [0] * TINY.num_layers

    def count(index: int) -> Callable[..., None]:
        def hook(layer: Any, given: Any, made: Any) -> None:
            counted[index] += 1

        return hook

    hooks = [layer.register_forward_hook(count(index)) for index, layer in enumerate(tiny.blocks)]
    both_ways(tiny, inputs(3), blocks=blocks, mode=ATTENTION_VALUES, rows=slice(1, None))
    for hook in hooks:
        hook.remove()
    assert counted == calls


@pytest.mark.parametrize("mode", [None, ATTENTION_VALUES, TRANSFORMER_BLOCK])
@pytest.mark.parametrize("masked", [False, True])
def test_cuda_graph_replay_equals_a_plain_run(tiny, mode, masked):
    given, notes, replayed = inputs(2), FakeBackend(), deepcopy(tiny)
    replayed.use_cuda_graphs(notes)
    rope, mask = tiny.compute_rope(given.positions), given.text_mask if masked else None
    reading, other = replayed.project_text(given.text, mask), replayed.project_text(given.text.flip(0), None)
    how = {} if mode is None else {"blocks": (1,), "mode": mode, "rows": slice(1, 2)}
    for step, levels in enumerate((given.levels, given.levels / 2, given.levels / 3, given.levels / 4)):
        tokens = given.tokens + step
        made, right = (
            (model if mode is None else model.forward_with_perturbed)(tokens, rope, *text, levels, **how)
            for model, text in ((replayed, (reading, None)), (tiny, (given.text, mask)))
        )
        assert all(map(torch.equal, made, right))
        assert replayed(tokens, rope, other, None, levels).isfinite().all()  # another text in between
    assert notes.warm_ups
    assert notes.captures
    assert notes.replays >= 2
    replayed.clear_cuda_graphs()
    assert not replayed._cuda_graphs._graphs


def test_no_cuda_graph_above_the_token_limit(tiny, monkeypatch):
    given, notes, replayed = inputs(2), FakeBackend(), deepcopy(tiny)
    monkeypatch.setattr("kadr.models.transformer.CUDA_GRAPH_MAX_TOKENS", given.tokens.shape[1] * 2 - 1)
    replayed.use_cuda_graphs(notes)
    reading = replayed.project_text(given.text, None)
    for _ in range(3):
        replayed(given.tokens, replayed.compute_rope(given.positions), reading, None, given.levels)
    assert not notes.warm_ups


def test_perturbation_changes_no_weight_and_no_input(tiny):
    given = inputs(3)
    before = [field.clone() for field in vars(given).values()]
    plain = velocity(tiny, given)
    for mode in STRATEGIES:
        both_ways(tiny, given, blocks=(0, 2), mode=mode, rows=slice(1, None))
    assert all(torch.equal(*pair) for pair in zip(before, vars(given).values(), strict=True))
    assert torch.equal(velocity(tiny, given), plain)


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
    before = TransformerConfig.from_header(OURS_TRANSFORMER_CONFIG)
    assert before == replace(TRANSFORMER_2B, causal_temporal_positioning=False)
    since = {name: value for name, value in OURS_TRANSFORMER_CONFIG.items() if name != "project_to_2d_pos"}
    since |= {"causal_temporal_positioning": True}
    assert TransformerConfig.from_header(since) == TRANSFORMER_2B
    larger = {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096}
    assert TransformerConfig.from_header(since | larger) == TRANSFORMER_13B


@pytest.mark.parametrize(
    "change, value",
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
def test_unreleased_header_value_is_refused_by_value(change, value):
    with pytest.raises(CheckpointError, match=f"{change} = {re.escape(repr(value))};"):
        TransformerConfig.from_header(TRANSFORMER_2B.to_header() | {change: value})


@pytest.mark.parametrize("heads, head_width", [(1, 4), (3, 3)])
def test_width_too_small_for_rope_is_refused_by_value(heads, head_width):
    with pytest.raises(CheckpointError, match=str(heads * head_width)):
        replace(TINY, num_heads=heads, head_dim=head_width)
