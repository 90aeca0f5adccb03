"""Step caching in a whole generation: what is skipped, what stays the same, what is recorded, planned and said."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kadr import Engine, KadrWarning, Request, StepCache
from kadr.cli.main import main
from kadr.errors import RequestError
from kadr.models.transformer import Transformer
from kadr.planning import activations
from kadr.planning.planner import HEAP_FRAGMENTATION
from kadr.sampling.positions import token_positions
from kadr.sampling.settings import Guidance, StepGuidance
from kadr.sampling.step_cache import PassCache
from kadr.shapes import LatentGrid
from tests import tiny_models
from tests.live_bytes import LiveBytes
from tests.oracles import randn

LAYERS, STEPS = 4, 12
BASE = Request(prompt="a red circle", negative_prompt="blue", size=(64, 64), frames=9, steps=STEPS, guidance=1.0)
STG = Guidance(cfg_scale=3.0, stg_scale=1.0, rescale=0.7, skip_blocks=(2,))
WAYS: dict[str, Request] = {
    "plain": BASE,
    "guided": replace(BASE, guidance=3.0),
    "in one batch": replace(BASE, guidance=3.0, guidance_batch=True),
    "disturbed": replace(BASE, guidance=STG),
    "disturbed from the first block, in one batch": replace(
        BASE, guidance=replace(STG, skip_blocks=(0, 2), stg_mode="attention_skip"), guidance_batch=True
    ),
    "a block left out": replace(BASE, guidance=replace(STG, skip_blocks=(0, 3), stg_mode="transformer_block")),
}
KINDS = {"first-block": StepCache("first-block", threshold=0.5), "taylor": StepCache("taylor", interval=3)}
ALL_COMPUTED = (StepCache("first-block", threshold=0), StepCache("taylor", interval=1))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    home = tiny_models.write_model(tmp_path_factory.mktemp("model"), num_layers=LAYERS)
    engine = Engine.open(home / tiny_models.MODEL_FILE, device="cpu", dtype="float32", prompt_cache=False)
    engine.denoise(replace(BASE, steps=1))  # the transformer stays from now on
    return engine


@contextmanager
def counted(engine: Engine) -> Iterator[list[int]]:
    """How often each layer of the transformer is run inside the block."""
    calls = [0] * LAYERS
    with engine.components.transformer(0, None) as transformer:
        hooks = [
            layer.register_forward_hook(lambda *_, at=at: calls.__setitem__(at, calls[at] + 1))
            for at, layer in enumerate(transformer.blocks)
        ]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_that_computes_every_step_changes_no_bit(engine: Engine, way: str) -> None:
    right = engine.denoise(WAYS[way])
    for cache in ALL_COMPUTED:
        assert torch.equal(engine.denoise(replace(WAYS[way], cache=cache)), right)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_layers_after_the_first_are_skipped_and_a_second_request_begins_anew(
    engine: Engine, way: str, kind: str
) -> None:
    request = replace(WAYS[way], cache=KINDS[kind])
    plain, made = engine.denoise(WAYS[way]), engine.denoise(request)
    with counted(engine) as whole:
        engine.denoise(WAYS[way])
    with counted(engine) as calls:
        again = engine.denoise(request)
    assert calls[0] == whole[0]
    assert all(few <= 0.75 * many for few, many in zip(calls[1:], whole[1:], strict=True))
    assert torch.equal(again, made)
    assert not torch.equal(made, plain)
    assert made.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_one_batch_are_skipped_on_the_same_steps_as_one_after_the_other(engine: Engine, kind: str) -> None:
    request = replace(WAYS["disturbed"], cache=KINDS[kind])
    with counted(engine) as apart:
        one = engine.denoise(request)
    with counted(engine) as together:
        other = engine.denoise(replace(request, guidance_batch=True))
    assert (together[0], together[1]) == (apart[0] // 2, apart[1] // 2)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# The transformer alone


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return tiny_models.build_random(lambda: Transformer(tiny_models.transformer_config(num_layers=LAYERS)))


GRID = LatentGrid(2, 3, 4)
PLAIN = StepGuidance(1.0, 0.0, 1.0, ())


def asked(transformer: Transformer, step: int, seed: int, **how: Any) -> Any:
    """A velocity on one of twelve steps that are near each other, with the text of that seed."""
    rope = transformer.compute_rope(token_positions(GRID, fps=24.0, causal=True)[None])
    tokens = randn(1, GRID.num_tokens, tiny_models.CHANNELS, seed=1) + 0.02 * step * randn(
        1, GRID.num_tokens, tiny_models.CHANNELS, seed=2
    )
    call = transformer.forward_with_perturbed if "blocks" in how else transformer
    return call(
        tokens, rope, randn(1, 5, tiny_models.TEXT_WIDTH, seed=seed), None, torch.tensor([[1 - step / 40]]), **how
    )


@torch.no_grad()
def test_two_texts_in_turn_give_what_each_gives_alone(transformer: Transformer) -> None:
    shared, alone = PassCache(KINDS["taylor"], [PLAIN] * STEPS), {}
    for step in range(STEPS):
        shared.begin_step(step)
        for seed in (8, 9):
            own = alone.setdefault(seed, PassCache(KINDS["taylor"], [PLAIN] * STEPS))
            own.begin(step)
            expected = asked(transformer, step, seed, cache=own.stream("the only one"))
            assert torch.equal(asked(transformer, step, seed, cache=shared.residual_cache(seed)), expected)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["attention_values", "attention_skip", "transformer_block"])
@pytest.mark.parametrize("blocks", [(2,), (0, 3), (1, 2)])
def test_a_disturbed_evaluation_has_a_residual_of_its_own(
    transformer: Transformer, blocks: tuple[int, ...], mode: str
) -> None:
    """Where nothing changes from step to step, skipped steps say what all layers would, both plain and disturbed."""
    cache, how = PassCache(KINDS["taylor"], [PLAIN] * STEPS), {"blocks": blocks, "mode": mode}
    right, beside = asked(transformer, 0, 8, **how)
    assert (right - beside).norm() > 0.01 * right.norm()
    for step in range(STEPS):
        cache.begin_step(step)
        made, aside = asked(transformer, 0, 8, cache=cache.residual_cache(0), **how)
        torch.testing.assert_close(made, right, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(aside, beside, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_disturbed_evaluation_leaves_the_plain_one_as_it_is(transformer: Transformer) -> None:
    caches = [PassCache(KINDS["taylor"], [PLAIN] * STEPS) for _ in range(2)]
    for step in range(STEPS):
        for cache in caches:
            cache.begin_step(step)
        plain = asked(transformer, step, 8, cache=caches[0].residual_cache(0))
        made, _ = asked(transformer, step, 8, cache=caches[1].residual_cache(0), blocks=(2,), mode="attention_skip")
        assert torch.equal(made, plain)


# What is recorded, planned and said


def test_a_record_repeats_the_cache() -> None:
    request = Request.from_json(Request(prompt="x", cache="taylor").to_json())
    assert request.cache == StepCache("taylor", interval=3, order=1)
    old = Request(prompt="x").to_json()
    del old["cache"]
    assert Request.from_json(old).cache is None


@pytest.mark.parametrize("value", [3, ["taylor"], True])
def test_a_cache_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="must be a StepCache, or its kind: first-block, taylor"):
        Request(prompt="x", cache=value)


def test_few_steps_are_warned_of(engine: Engine) -> None:
    with pytest.warns(KadrWarning, match="steps are cached, and pass 1 has 9: with fewer than 10"):
        engine.plan(replace(BASE, steps=9, cache="taylor"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.plan(replace(BASE, steps=10, cache="taylor"))


def peak(transformer: Transformer, request: Request, cache: StepCache | None) -> int:
    """Bytes of tensors at the worst moment of all evaluations."""
    guidance = request.guidance
    assert isinstance(guidance, Guidance)
    steps = [guidance.at_sigma(1 - step / 40) for step in range(STEPS)]
    kept = cache and PassCache(cache, steps)
    with LiveBytes() as counter:
        for step in range(7):  # of which four are computed
            if kept is not None:
                kept.begin_step(step)
            for seed in (8, 9) if steps[0].cfg_scale > 1 else (8,):
                how: dict[str, Any] = {"cache": kept.residual_cache(seed)} if kept else {}
                if seed == 8 and guidance.stg_scale:
                    how |= {"blocks": guidance.skip_blocks, "mode": "attention_values"}
                said: Tensor | tuple[Tensor, ...] = asked(transformer, step, seed, **how)
                del said
    return counter.peak_bytes


@torch.no_grad()
@pytest.mark.parametrize("cache", [*KINDS.values(), StepCache("taylor", order=2)], ids=str)
@pytest.mark.parametrize("way", ["plain", "guided", "disturbed"])
def test_what_a_cache_keeps_is_what_is_planned(transformer: Transformer, way: str, cache: StepCache) -> None:
    streams = {"plain": 1, "guided": 2, "disturbed": 3}[way]
    grown = peak(transformer, WAYS[way], cache) - peak(transformer, WAYS[way], None)
    planned = activations.step_cache_bytes(
        transformer.config, GRID.num_tokens, 4, history_length=cache.cached_steps, evaluations_per_step=streams
    )
    one = GRID.num_tokens * transformer.config.width * 4
    assert planned - 2 * one <= grown <= planned


def test_the_plan_of_a_request_holds_what_its_cache_keeps(engine: Engine) -> None:
    (without,) = [stage for stage in engine.plan(WAYS["guided"]).stages if stage.stage == "denoise"]
    cached = engine.plan(replace(WAYS["guided"], cache="taylor"))
    (kept,) = [stage for stage in cached.stages if stage.stage == "denoise"]
    tokens, config = LatentGrid(2, 2, 2).num_tokens, tiny_models.transformer_config(num_layers=LAYERS)
    expected = activations.step_cache_bytes(config, tokens, 4, history_length=2, evaluations_per_step=2)
    assert (
        abs(kept.placement.workspace_bytes - without.placement.workspace_bytes - (1 + HEAP_FRAGMENTATION) * expected)
        <= 1
    )


def told(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["generate", "a red circle", *words, "--dry-run"])
    return int(end.value.code or 0), *capfd.readouterr()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--cache taylor", "step cache       taylor, every 3 steps, order 1"),
        ("--cache taylor --cache-interval 2", "step cache       taylor, every 2 steps, order 1"),
        ("--cache first-block --cache-threshold 0.05", "step cache       first-block, threshold 0.05"),
    ],
)
def test_the_command_takes_a_cache_and_shows_it(capfd: pytest.CaptureFixture[str], words: str, line: str) -> None:
    code, out, err = told(capfd, *words.split())
    assert (code, err) == (0, "")
    assert line in out.splitlines()


def test_the_command_says_nothing_of_a_cache_that_is_off(capfd: pytest.CaptureFixture[str]) -> None:
    assert "cache" not in told(capfd, "--cache", "none")[1]
    _, out, _ = told(capfd, "--cache", "taylor", "--json")
    assert json.loads(out)["request"]["cache"] == {"kind": "taylor", "threshold": None, "interval": 3, "order": 1}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--cache tea", 2, "none, first-block, taylor"),
        ("--cache-threshold 0.1", 2, "it needs --cache first-block"),
        ("--cache none --cache-interval 2", 2, "it needs --cache taylor"),
        ("--cache taylor --cache-threshold 0.1", 1, "belongs to the step cache 'first-block'"),
        ("--cache first-block --cache-threshold 3", 1, "between 0 and 1"),
    ],
)
def test_the_command_refuses_what_does_not_fit(
    capfd: pytest.CaptureFixture[str], words: str, code: int, says: str
) -> None:
    ended, out, err = told(capfd, *words.split())
    assert (ended, out) == (code, "")
    assert says in " ".join(err.replace("│", " ").split())


def test_the_command_warns_of_few_steps(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = told(capfd, "--cache", "taylor", "--steps", "8")
    assert code == 0
    assert "pass 1 has 8" in err
