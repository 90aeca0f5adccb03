"""Step caching in a generation: skipped blocks, exactness, the planned memory, and the command line."""

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
from kadr.planning.costs import activations
from kadr.planning.options.context import HEAP_FRAGMENTATION
from kadr.sampling.positions import token_positions
from kadr.sampling.settings import Guidance, StepGuidance
from kadr.sampling.step_cache import PassCache
from kadr.shapes import LatentGrid
from tests import tiny_models
from tests.live_bytes import LiveBytes
from tests.oracles import randn

NUM_LAYERS, STEPS = 4, 12
BASE = Request(prompt="a red circle", negative_prompt="blue", size=(64, 64), frames=9, steps=STEPS, guidance=1.0)
STG = Guidance(cfg_scale=3.0, stg_scale=1.0, rescale=0.7, skip_blocks=(2,))
REQUESTS: dict[str, Request] = {
    "plain": BASE,
    "guided": replace(BASE, guidance=3.0),
    "in one batch": replace(BASE, guidance=3.0, guidance_batch=True),
    "perturbed": replace(BASE, guidance=STG),
    "perturbed from the first block, in one batch": replace(
        BASE, guidance=replace(STG, skip_blocks=(0, 2), stg_mode="attention_skip"), guidance_batch=True
    ),
    "blocks skipped": replace(BASE, guidance=replace(STG, skip_blocks=(0, 3), stg_mode="transformer_block")),
}
KINDS = {"first-block": StepCache("first-block", threshold=0.5), "taylor": StepCache("taylor", interval=3)}
ALL_COMPUTED = (StepCache("first-block", threshold=0), StepCache("taylor", interval=1))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    home = tiny_models.write_model(tmp_path_factory.mktemp("model"), num_layers=NUM_LAYERS)
    engine = Engine.open(home / tiny_models.MODEL_FILE, device="cpu", dtype="float32", prompt_cache=False)
    engine.denoise(replace(BASE, steps=1))  # the transformer stays in memory from now on
    return engine


@contextmanager
def count_block_calls(engine: Engine) -> Iterator[list[int]]:
    """Counts the calls of each transformer block."""
    calls = [0] * NUM_LAYERS
    with engine.start(BASE) as generation, generation.modules.transformer() as transformer:
        hooks = [
            block.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
            for index, block in enumerate(transformer.blocks)
        ]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("guidance", REQUESTS)
def test_cache_that_computes_every_step_changes_no_bit(engine: Engine, guidance: str) -> None:
    expected = engine.denoise(REQUESTS[guidance])
    for cache in ALL_COMPUTED:
        assert torch.equal(engine.denoise(replace(REQUESTS[guidance], cache=cache)), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", REQUESTS)
def test_cache_skips_blocks_after_the_first_and_starts_empty(engine: Engine, guidance: str, kind: str) -> None:
    request = replace(REQUESTS[guidance], cache=KINDS[kind])
    uncached, cached = engine.denoise(REQUESTS[guidance]), engine.denoise(request)
    with count_block_calls(engine) as uncached_calls:
        engine.denoise(REQUESTS[guidance])
    with count_block_calls(engine) as cached_calls:
        repeated = engine.denoise(request)
    assert cached_calls[0] == uncached_calls[0]
    assert all(few <= 0.75 * many for few, many in zip(cached_calls[1:], uncached_calls[1:], strict=True))
    assert torch.equal(repeated, cached)
    assert not torch.equal(cached, uncached)
    assert cached.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_batch_skips_the_same_steps(engine: Engine, kind: str) -> None:
    request = replace(REQUESTS["perturbed"], cache=KINDS[kind])
    with count_block_calls(engine) as separate_calls:
        separate = engine.denoise(request)
    with count_block_calls(engine) as batched_calls:
        batched = engine.denoise(replace(request, guidance_batch=True))
    assert (batched_calls[0], batched_calls[1]) == (separate_calls[0] // 2, separate_calls[1] // 2)
    torch.testing.assert_close(separate, batched, rtol=1e-3, atol=1e-4)


# --- the transformer without a sampler -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return tiny_models.build_random(lambda: Transformer(tiny_models.transformer_config(num_layers=NUM_LAYERS)))


GRID = LatentGrid(2, 3, 4)
NO_GUIDANCE = StepGuidance(1.0, 0.0, 1.0, ())


def evaluate(transformer: Transformer, step: int, seed: int, **options: Any) -> Any:
    """Evaluates the transformer on one of twelve similar steps, with the text of a seed."""
    rope = transformer.compute_rope(token_positions(GRID, fps=24.0, causal=True)[None])
    tokens = randn(1, GRID.num_tokens, tiny_models.CHANNELS, seed=1) + 0.02 * step * randn(
        1, GRID.num_tokens, tiny_models.CHANNELS, seed=2
    )
    call = transformer.forward_with_perturbed if "blocks" in options else transformer
    text, sigma = randn(1, 5, tiny_models.TEXT_WIDTH, seed=seed), torch.tensor([[1 - step / 40]])
    return call(tokens, rope, text, None, sigma, **options)


@torch.no_grad()
def test_cache_shared_by_two_texts_equals_a_cache_for_each(transformer: Transformer) -> None:
    shared, separate = PassCache(KINDS["taylor"], [NO_GUIDANCE] * STEPS), {}
    for step in range(STEPS):
        shared.begin_step(step)
        for seed in (8, 9):
            cache = separate.setdefault(seed, PassCache(KINDS["taylor"], [NO_GUIDANCE] * STEPS))
            cache.begin_step(step)
            expected = evaluate(transformer, step, seed, residual_cache=cache.residual_cache("the only one"))
            assert torch.equal(evaluate(transformer, step, seed, residual_cache=shared.residual_cache(seed)), expected)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["attention_values", "attention_skip", "transformer_block"])
@pytest.mark.parametrize("blocks", [(2,), (0, 3), (1, 2)])
def test_perturbed_prediction_has_its_own_residual_cache(
    transformer: Transformer, blocks: tuple[int, ...], mode: str
) -> None:
    """If no step differs, skipped steps give the predictions of all blocks, with and without perturbation."""
    cache, options = PassCache(KINDS["taylor"], [NO_GUIDANCE] * STEPS), {"blocks": blocks, "mode": mode}
    expected, expected_perturbed = evaluate(transformer, 0, 8, **options)
    assert (expected - expected_perturbed).norm() > 0.01 * expected.norm()
    for step in range(STEPS):
        cache.begin_step(step)
        actual, actual_perturbed = evaluate(transformer, 0, 8, residual_cache=cache.residual_cache(0), **options)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(actual_perturbed, expected_perturbed, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_perturbed_evaluation_leaves_the_unperturbed_one_unchanged(transformer: Transformer) -> None:
    caches = [PassCache(KINDS["taylor"], [NO_GUIDANCE] * STEPS) for _ in range(2)]
    for step in range(STEPS):
        for cache in caches:
            cache.begin_step(step)
        expected = evaluate(transformer, step, 8, residual_cache=caches[0].residual_cache(0))
        actual, _ = evaluate(
            transformer, step, 8, residual_cache=caches[1].residual_cache(0), blocks=(2,), mode="attention_skip"
        )
        assert torch.equal(actual, expected)


# --- requests, plans and the command line --------------------------------------------------------------------------


def test_cache_survives_json() -> None:
    request = Request.from_json(Request(prompt="x", cache="taylor").to_json())
    assert request.cache == StepCache("taylor", interval=3, order=1)
    without_cache = Request(prompt="x").to_json()
    del without_cache["cache"]
    assert Request.from_json(without_cache).cache is None


@pytest.mark.parametrize("value", [3, ["taylor"], True])
def test_value_that_is_not_a_cache_is_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="must be a StepCache, or its kind: first-block, taylor"):
        Request(prompt="x", cache=value)


def test_cache_with_few_steps_gives_a_warning(engine: Engine) -> None:
    with pytest.warns(KadrWarning, match="a step cache is given, and pass 1 has 9 steps: with fewer than 10"):
        engine.plan(replace(BASE, steps=9, cache="taylor"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.plan(replace(BASE, steps=10, cache="taylor"))


def measure_peak_bytes(transformer: Transformer, request: Request, cache: StepCache | None) -> int:
    """Returns the peak bytes of tensors over all model evaluations."""
    guidance = request.guidance
    assert isinstance(guidance, Guidance)
    steps = [guidance.at_sigma(1 - step / 40) for step in range(STEPS)]
    pass_cache = cache and PassCache(cache, steps)
    with LiveBytes() as counter:
        for step in range(7):  # of which four are computed
            if pass_cache is not None:
                pass_cache.begin_step(step)
            for seed in (8, 9) if steps[0].cfg_scale > 1 else (8,):
                options: dict[str, Any] = {"residual_cache": pass_cache.residual_cache(seed)} if pass_cache else {}
                if seed == 8 and guidance.stg_scale:
                    options |= {"blocks": guidance.skip_blocks, "mode": "attention_values"}
                prediction: Tensor | tuple[Tensor, ...] = evaluate(transformer, step, seed, **options)
                del prediction
    return counter.peak_bytes


@torch.no_grad()
@pytest.mark.parametrize("cache", [*KINDS.values(), StepCache("taylor", order=2)], ids=str)
@pytest.mark.parametrize("guidance", ["plain", "guided", "perturbed"])
def test_memory_of_a_cache_is_the_planned_one(transformer: Transformer, guidance: str, cache: StepCache) -> None:
    evaluations_per_step = {"plain": 1, "guided": 2, "perturbed": 3}[guidance]
    cache_bytes = measure_peak_bytes(transformer, REQUESTS[guidance], cache) - measure_peak_bytes(
        transformer, REQUESTS[guidance], None
    )
    planned = activations.step_cache_bytes(
        transformer.config,
        GRID.num_tokens,
        4,
        history_length=cache.cached_steps,
        evaluations_per_step=evaluations_per_step,
    )
    residual_bytes = GRID.num_tokens * transformer.config.width * 4
    assert planned - 2 * residual_bytes <= cache_bytes <= planned


def test_plan_counts_the_memory_of_the_cache(engine: Engine) -> None:
    (uncached_stage,) = [stage for stage in engine.plan(REQUESTS["guided"]).stages if stage.stage == "denoise"]
    cached = engine.plan(replace(REQUESTS["guided"], cache="taylor"))
    (cached_stage,) = [stage for stage in cached.stages if stage.stage == "denoise"]
    tokens, config = LatentGrid(2, 2, 2).num_tokens, tiny_models.transformer_config(num_layers=NUM_LAYERS)
    expected = activations.step_cache_bytes(config, tokens, 4, history_length=2, evaluations_per_step=2)
    cache_bytes = cached_stage.placement.workspace_bytes - uncached_stage.placement.workspace_bytes
    assert abs(cache_bytes - (1 + HEAP_FRAGMENTATION) * expected) <= 1


def dry_run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of `kadr generate --dry-run`."""
    with pytest.raises(SystemExit) as end:
        main(["generate", "a red circle", *arguments, "--dry-run"])
    return int(end.value.code or 0), *capfd.readouterr()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--cache taylor", "step cache       taylor, every 3 steps, order 1"),
        ("--cache taylor --cache-interval 2", "step cache       taylor, every 2 steps, order 1"),
        ("--cache first-block --cache-threshold 0.05", "step cache       first-block, threshold 0.05"),
    ],
)
def test_dry_run_shows_the_cache_of_the_flags(capfd: pytest.CaptureFixture[str], flags: str, line: str) -> None:
    code, out, err = dry_run(capfd, *flags.split())
    assert (code, err) == (0, "")
    assert line in out.splitlines()


def test_dry_run_shows_no_cache_that_is_off(capfd: pytest.CaptureFixture[str]) -> None:
    assert "cache" not in dry_run(capfd, "--cache", "none")[1]
    _, out, _ = dry_run(capfd, "--cache", "taylor", "--json")
    assert json.loads(out)["request"]["cache"] == {"kind": "taylor", "threshold": None, "interval": 3, "order": 1}


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        ("--cache tea", 2, "none, first-block, taylor"),
        ("--cache-threshold 0.1", 2, "it needs --cache first-block"),
        ("--cache none --cache-interval 2", 2, "it needs --cache taylor"),
        ("--cache taylor --cache-threshold 0.1", 1, "belongs to the step cache 'first-block'"),
        ("--cache first-block --cache-threshold 3", 1, "between 0 and 1"),
    ],
)
def test_cache_flags_that_do_not_fit_are_refused(
    capfd: pytest.CaptureFixture[str], flags: str, code: int, expected: str
) -> None:
    exit_code, out, err = dry_run(capfd, *flags.split())
    assert (exit_code, out) == (code, "")
    assert expected in " ".join(err.replace("│", " ").split())


def test_command_warns_of_a_cache_with_few_steps(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = dry_run(capfd, "--cache", "taylor", "--steps", "8")
    assert code == 0
    assert "pass 1 has 8" in err
