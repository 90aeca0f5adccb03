"""The T5 text encoder against transformers' T5EncoderModel, and its laws."""

import json
import re

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention as OracleAttention

from kadr.errors import CheckpointError
from kadr.models.t5 import T5Config, T5Encoder, initialise_t5, relative_position_bucket
from tests.oracles import relative_error

TINY = T5Config(vocab_size=101, d_model=48, num_layers=3, num_heads=4, d_kv=8, d_ff=80)
XXL_TWO_LAYERS = T5Config(vocab_size=64, d_model=4096, num_layers=2, num_heads=64, d_kv=64, d_ff=10240)

LEAVES = {
    "attention_norm": "layer.0.layer_norm",
    "attention.q": "layer.0.SelfAttention.q",
    "attention.k": "layer.0.SelfAttention.k",
    "attention.v": "layer.0.SelfAttention.v",
    "attention.o": "layer.0.SelfAttention.o",
    "feed_forward_norm": "layer.1.layer_norm",
    "feed_forward.gate": "layer.1.DenseReluDense.wi_0",
    "feed_forward.up": "layer.1.DenseReluDense.wi_1",
    "feed_forward.down": "layer.1.DenseReluDense.wo",
}
TOP = {
    "embedding.weight": "shared.weight",
    "position_bias.weight": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "final_norm.weight": "encoder.final_layer_norm.weight",
}


def transformers_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    index, leaf = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name).groups()
    return f"encoder.block.{index}.{LEAVES[leaf]}.weight"


def oracle_config(config: T5Config) -> transformers.T5Config:
    return transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )


def build_encoder(config: T5Config) -> T5Encoder:
    """Builds an encoder with initial weights, and biases and norms far enough from 0 and 1 to reveal mistakes."""
    generator = torch.Generator().manual_seed(7)
    with torch.device("meta"):
        encoder = T5Encoder(config)
    encoder.to_empty(device="cpu")
    initialise_t5(encoder, generator)
    with torch.no_grad():
        encoder.position_bias.weight.normal_(generator=generator)
        for name, weight in encoder.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
    return encoder


def oracle(encoder: T5Encoder) -> transformers.T5EncoderModel:
    """Returns transformers' encoder with the same weight memory."""
    with torch.device("meta"):
        model = transformers.T5EncoderModel(oracle_config(encoder.config)).eval()
    weights = {transformers_name(name): weight for name, weight in encoder.named_parameters()}
    model.load_state_dict(weights | {"encoder.embed_tokens.weight": encoder.embedding.weight}, assign=True)
    return model


def random_prompts(config: T5Config, lengths: list[int], longest: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, config.vocab_size, (len(lengths), longest), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return ids * mask, mask


def assert_close(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    difference = ours - expected
    assert difference.norm() / expected.norm() <= tolerance
    assert difference.abs().max() / expected.abs().max() <= tolerance


@pytest.mark.parametrize(
    "config, lengths, longest",
    [
        (TINY, [256, 1, 2, 30, 255], 256),
        (TINY, [100], 256),
        (TINY, [1], 256),
        (TINY, [9], 9),
        (XXL_TWO_LAYERS, [24, 1, 7], 40),
    ],
    ids=["full and padded", "padded", "empty prompt", "without padding", "XXL width"],
)
@torch.no_grad()
def test_encoder_equals_transformers_in_fp32(config, lengths, longest, parity):
    encoder = build_encoder(config)
    ids, mask = random_prompts(config, lengths, longest)
    expected = oracle(encoder)(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask]
    ours = encoder(ids, mask)[mask]
    parity("text encoder", f"T5, width {config.d_model}", "transformers", relative_error(ours, expected))
    assert_close(ours, expected)


def test_gradients_equal_transformers():
    encoder = build_encoder(TINY)
    ids, mask = random_prompts(TINY, [40, 13, 1], 60)
    model = oracle(encoder)
    direction = torch.randn(3, 60, TINY.d_model, generator=torch.Generator().manual_seed(1)) * mask[:, :, None]
    outputs = encoder(ids, mask), model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    names, weights = zip(*encoder.named_parameters(), strict=True)
    gradients = [torch.autograd.grad((out * direction).sum(), weights) for out in outputs]
    for name, ours, expected in zip(names, *gradients, strict=True):
        assert expected.norm() > 0, name
        assert_close(ours, expected)


def test_distances_have_the_published_buckets():
    distances = [-200, -127, -64, -20, -9, -8, -7, -1, 0, 1, 7, 8, 9, 12, 20, 64, 127, 200]
    buckets = [15, 15, 14, 10, 8, 8, 7, 1, 0, 17, 23, 24, 24, 25, 26, 30, 31, 31]
    assert relative_position_bucket(torch.tensor(distances)).tolist() == buckets


@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20), (4, 100), (64, 256), (32, 100)])
def test_buckets_equal_transformers_at_every_distance(buckets, max_distance):
    distance = torch.arange(-3000, 3001)
    expected = OracleAttention._relative_position_bucket(distance, num_buckets=buckets, max_distance=max_distance)
    assert torch.equal(relative_position_bucket(distance, num_buckets=buckets, max_distance=max_distance), expected)


@torch.no_grad()
def test_padding_does_not_change_real_tokens():
    encoder = build_encoder(TINY)
    ids, mask = random_prompts(TINY, [19, 4], 256)
    ids[~mask] = 5  # not even if the padding has words
    assert_close(encoder(ids, mask)[1, :4], encoder(ids[1:, :4], mask[1:, :4])[0])


@pytest.mark.parametrize("lengths, computed", [([19], 19), ([1], 1), ([4, 11], 11), ([256], 256), ([0, 5], 256)])
@torch.no_grad()
def test_padding_behind_the_longest_prompt_is_zero_and_not_computed(lengths, computed):
    encoder, seen = build_encoder(TINY), []
    for block in encoder.blocks:
        block.register_forward_pre_hook(lambda block, inputs: seen.append([tensor.shape[-2] for tensor in inputs]))
    ids, mask = random_prompts(TINY, lengths, 256)
    encoded = encoder(ids, mask)
    assert seen == TINY.num_layers * [[computed, computed]]
    assert encoded.shape == (len(lengths), 256, TINY.d_model)
    assert encoded[:, computed:].eq(0).all()
    assert encoded[:, :computed].ne(0).all()


@torch.no_grad()
def test_real_tokens_keep_their_positions_behind_padding_at_the_start():
    encoder = build_encoder(TINY)
    ids, mask = random_prompts(TINY, [40], 256)
    mask[0, :17] = mask[0, 30] = False
    expected = oracle(encoder)(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert_close(encoder(ids, mask)[mask], expected[mask])


@torch.no_grad()
def test_attention_bias_of_fewer_tokens_is_part_of_that_of_more():
    encoder, mask = build_encoder(TINY), torch.ones(1, 256, dtype=torch.bool)
    assert torch.equal(encoder._attention_bias(mask[:, :100]), encoder._attention_bias(mask)[:, :, :100, :100])


@torch.no_grad()
def test_integer_mask_equals_boolean_mask():
    encoder = build_encoder(TINY)
    ids, mask = random_prompts(TINY, [4, 11], 12)
    assert torch.equal(encoder(ids, mask), encoder(ids, mask.long()))


@torch.no_grad()
def test_sample_of_only_padding_equals_transformers():
    encoder = build_encoder(TINY)
    ids, mask = random_prompts(TINY, [0, 5], 8)
    expected = oracle(encoder)(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert_close(encoder(ids, mask), expected)


@pytest.mark.parametrize("lengths", [[256, 40, 1], [100], [1]], ids=str)
@torch.no_grad()
def test_bf16_is_finite_and_as_exact_as_transformers(lengths):
    encoder = build_encoder(TINY)
    ids, mask = random_prompts(TINY, lengths, 256)
    exact = encoder(ids, mask)[mask]
    encoder.to(torch.bfloat16)
    ours = encoder(ids, mask)[mask]
    assert ours.dtype == torch.bfloat16
    assert ours.isfinite().all()
    theirs = oracle(encoder)(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask]
    error, their_error = ((out.float() - exact).norm() / exact.norm() for out in (ours, theirs))
    assert error <= 1.2 * their_error
    assert error <= 0.05


@torch.no_grad()
def test_norm_rounds_to_bf16_before_its_weight():
    encoder = build_encoder(TINY).to(torch.bfloat16)
    x = torch.randn(64, TINY.d_model, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    assert torch.equal(encoder.final_norm(x), oracle(encoder).encoder.final_layer_norm(x))


def test_initial_weights_have_the_published_stds_and_repeat():
    config = T5Config(vocab_size=500, d_model=128, num_layers=1, num_heads=8, d_kv=32, d_ff=320)
    encoder, again = T5Encoder(config), T5Encoder(config)
    for t5 in (encoder, again):
        initialise_t5(t5, torch.Generator().manual_seed(0))
    block = encoder.blocks[0]
    expected = {
        encoder.embedding: 1.0,
        encoder.position_bias: 128**-0.5,
        block.attention.q: (128 * 32) ** -0.5,
        block.attention.k: 128**-0.5,
        block.attention.v: 128**-0.5,
        block.attention.o: (8 * 32) ** -0.5,
        block.feed_forward.gate: 128**-0.5,
        block.feed_forward.up: 128**-0.5,
        block.feed_forward.down: 320**-0.5,
    }
    for module, std in expected.items():
        tolerance = 5 / module.weight.numel() ** 0.5
        assert module.weight.std().item() == pytest.approx(std, rel=tolerance)
    for norm in (block.attention_norm, block.feed_forward_norm, encoder.final_norm):
        assert norm.weight.eq(1).all()
    for name, weight in again.named_parameters():
        assert torch.equal(weight, encoder.get_parameter(name)), name


def test_config_written_by_transformers_is_read(tmp_path):
    oracle_config(TINY).save_pretrained(tmp_path)
    assert T5Config.from_header(json.loads((tmp_path / "config.json").read_text())) == TINY


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "umt5"),
        ("feed_forward_proj", "relu"),
        ("dense_act_fn", "silu"),
        ("is_gated_act", False),
        ("d_model", 0),
        ("num_heads", "64"),
        ("num_layers", True),
        ("layer_norm_epsilon", float("nan")),
        ("relative_attention_num_buckets", 30),
        ("relative_attention_max_distance", 8),
    ],
)
def test_unreleased_config_value_is_refused_by_value(key, value):
    with pytest.raises(CheckpointError, match=re.escape(repr(value))):
        T5Config.from_header(oracle_config(TINY).to_dict() | {key: value})


@pytest.mark.parametrize("absent", ["d_ff", "num_layers", "feed_forward_proj"])
def test_config_without_a_required_key_is_refused(absent):
    header = {name: value for name, value in oracle_config(TINY).to_dict().items() if name != absent}
    with pytest.raises(CheckpointError, match=absent):
        T5Config.from_header(header)
