"""What the official package gets wrong, shown on it, and what kadr does there. docs/parity.md lists it.

Where kadr refuses, the official package stops with an error that explains nothing, or makes something else in silence.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ltx_video.models.transformers.transformer3d import Transformer3DModel
from ltx_video.pipelines.pipeline_ltx_video import LTXMultiScalePipeline
from ltx_video.utils.skip_layer_strategy import SkipLayerStrategy
from torch import Tensor

from kadr import Engine, Request
from kadr.errors import RequestError
from kadr.models.transformer import Transformer
from kadr.sampling.guidance import Perturbation, PromptEmbeddings, guided_denoiser
from kadr.sampling.positions import token_positions
from kadr.sampling.settings import Guidance, Pass
from kadr.shapes import LatentGrid, Size
from tests.oracles import randn, relative_error
from tests.pipeline import official_pipeline
from tests.tiny_models import (
    CHANNELS,
    MODEL_FILE,
    TEXT_WIDTH,
    build_random,
    transformer_config,
    write_model,
    write_random_upscaler,
)

REQUEST = Request(
    prompt="a red circle moving right",
    negative_prompt="blue sea",
    size=Size(64, 64),
    frames=9,
    fps=24.0,
    steps=2,
    guidance=3.0,
    stochastic=False,
    image_crf=29,
    image_noise=0.15,
    decode_timestep=0.05,
    decode_noise=0.025,
    tone_map=0.0,
)
STG = Guidance(cfg_scale=3.0, stg_scale=1.5, rescale=1.0, skip_blocks=(1,))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(home: Path) -> Engine:
    return Engine.open(home / MODEL_FILE, upscaler=write_random_upscaler(home / "upscaler.safetensors"), device="cpu")


@pytest.fixture(scope="module")
def pipeline(home: Path) -> Any:
    return official_pipeline.open_pipeline(home)


def test_stg_disturbs_the_samples_with_the_prompt_where_the_official_mask_takes_others() -> None:
    """Two videos with guidance and STG: their samples stand in a batch as n n p p d d."""
    transformer = SimpleNamespace(transformer_blocks=[None] * 2, device="cpu", dtype=torch.float32)
    mask = Transformer3DModel.create_skip_layer_mask(transformer, 2, 3, 2, [1])
    assert (mask[1] == 0).nonzero().flatten().tolist() == [2, 5]  # a prompt's own and one of the disturbed
    asked: list[Perturbation] = []

    def model(
        tokens: Tensor, level: Tensor, text: PromptEmbeddings, disturb: Perturbation | None = None
    ) -> tuple[Tensor, Any]:
        if disturb is not None:
            asked.append(disturb)
        return tokens, tokens[disturb.rows] if disturb else None

    text = PromptEmbeddings(torch.zeros(2, 3, 4), torch.ones(2, 3))
    estimate = guided_denoiser(model, text, text, STG, [STG.at_sigma(1.0)], guidance_batch=True)
    estimate(0, randn(2, 5, 4), torch.ones(2, 1))
    assert [(disturb.blocks, disturb.rows) for disturb in asked] == [((1,), slice(2, None))]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("mode", official_pipeline.MODES)
@torch.no_grad()
def test_each_video_of_a_batch_is_guided_as_if_alone(mode: str, together: bool) -> None:
    transformer = build_random(lambda: Transformer(transformer_config()), 1)
    rope = transformer.compute_rope(token_positions(LatentGrid(2, 2, 2), fps=24.0, causal=True)[None])

    def model(
        tokens: Tensor, level: Tensor, text: PromptEmbeddings, disturb: Perturbation | None = None
    ) -> tuple[Tensor, Any]:
        given = tokens, rope, text.embeddings, text.mask, level
        if disturb is None:
            return transformer(*given), None
        return transformer.forward_with_perturbed(*given, **disturb._asdict())

    tokens, level = randn(2, 8, CHANNELS), torch.tensor([[0.9], [0.4]])
    texts = [
        PromptEmbeddings(randn(2, 5, TEXT_WIDTH, seed=seed), torch.arange(5) < torch.tensor([[5], [3]]))
        for seed in (2, 3)
    ]
    guidance = replace(STG, stg_mode=mode, rescale=0.7, cfg_star=True)
    steps = [guidance.at_sigma(1.0)]
    both = guided_denoiser(model, *texts, guidance, steps, guidance_batch=together)(0, tokens, level)
    for row in (slice(1), slice(1, 2)):
        own = [PromptEmbeddings(text.embeddings[row], text.mask[row]) for text in texts]
        alone = guided_denoiser(model, *own, guidance, steps)(0, tokens[row], level[row])
        assert relative_error(both[row], alone) <= 1e-5


def test_the_official_residual_mode_does_nothing_and_is_refused(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    without = official_pipeline.run_official(
        pipeline, replace(REQUEST, guidance=Guidance(cfg_scale=3.0, stg_scale=0.0, rescale=1.0))
    )
    with_it = official_pipeline.run_official(pipeline, replace(REQUEST, guidance=STG))
    assert relative_error(with_it.latents, without.latents) > 1e-2
    monkeypatch.setitem(official_pipeline.MODES, "attention_values", SkipLayerStrategy.Residual)
    assert (
        relative_error(
            official_pipeline.run_official(pipeline, replace(REQUEST, guidance=STG)).latents, without.latents
        )
        <= 1e-5
    )
    with pytest.raises(RequestError, match="changes nothing"):
        Guidance(stg_mode="residual")


def test_lists_without_their_levels_are_refused_where_the_official_pipeline_breaks(
    engine: Engine, pipeline: Any
) -> None:
    request = replace(REQUEST, guidance=Guidance(cfg_scale=(3.0, 1.0), stg_scale=0.0, rescale=1.0))
    with pytest.raises(NameError):
        official_pipeline.run_official(pipeline, request)
    with pytest.raises(RequestError, match=r"guidance has 2 values, and no levels that they are for. Give `at`"):
        engine.denoise(request)


def test_a_block_that_is_not_there_is_refused_only_where_it_would_be_disturbed(engine: Engine, pipeline: Any) -> None:
    """As 42 of the 28 blocks of 2B 0.9.8 distilled, whose config has STG at 0."""
    off = replace(REQUEST, guidance=Guidance(cfg_scale=3.0, stg_scale=0.0, rescale=1.0, skip_blocks=(42,)))
    assert relative_error(engine.denoise(off), official_pipeline.run_official(pipeline, off).latents) <= 1e-5
    on = replace(REQUEST, guidance=replace(STG, skip_blocks=(42,)))
    with pytest.raises(IndexError):
        official_pipeline.run_official(pipeline, on)
    with pytest.raises(RequestError, match="skip_blocks has 42; this model has 2 blocks, 0 to 1"):
        engine.denoise(on)


def test_of_two_passes_both_read_one_encoding_of_the_prompt(
    engine: Engine, pipeline: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Pass(
        sigmas=(0.7,), guidance=Guidance(cfg_scale=1.0, stg_scale=0.0, rescale=1.0), stochastic=False, tone_map=0.0
    )
    request = replace(REQUEST, size=Size(128, 128), multi_scale=True, second_pass=second)
    encoded: Counter[str] = Counter()
    encode = type(pipeline).encode_prompt

    def counted(self: Any, prompt: str, *given: Any, **more: Any) -> Any:
        encoded[prompt] += 1
        return encode(self, prompt, *given, **more)

    monkeypatch.setattr(type(pipeline), "encode_prompt", counted)
    official_pipeline.run_official(
        pipeline, request, upsampler=official_pipeline.open_upsampler(home / "upscaler.safetensors")
    )
    assert encoded == {REQUEST.prompt: 2}
    told: list[tuple[str, int, int]] = []
    engine.denoise(request, watch=lambda progress: told.append((progress.stage, progress.step, progress.of)))
    assert [progress for progress in told if progress[0] == "text"] == [("text", step, 2) for step in range(3)]


def test_the_official_wrapper_of_two_passes_cuts_no_clip() -> None:
    """Its script asks the pipeline for `trim_conditioning_sequence`, which the wrapper lacks; see test_conditions."""
    assert not hasattr(LTXMultiScalePipeline, "trim_conditioning_sequence")
