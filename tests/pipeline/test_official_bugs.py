"""Bugs of the official package, reproduced, and kadr's behaviour in their place; docs/parity.md lists them.

Where kadr refuses, the official package stops with an unhelpful error, or silently does something else.
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
    sampler="euler",
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


def test_stg_perturbs_the_conditional_samples_unlike_official_mask() -> None:
    """Two videos with CFG and STG: a batch of two unconditional, two conditional and two perturbed samples."""
    transformer = SimpleNamespace(transformer_blocks=[None] * 2, device="cpu", dtype=torch.float32)
    mask = Transformer3DModel.create_skip_layer_mask(transformer, 2, 3, 2, [1])
    assert (mask[1] == 0).nonzero().flatten().tolist() == [2, 5]  # a conditional sample and a perturbed one
    perturbations: list[Perturbation] = []

    def model(
        tokens: Tensor, sigma: Tensor, text: PromptEmbeddings, perturbation: Perturbation | None = None
    ) -> tuple[Tensor, Any]:
        if perturbation is not None:
            perturbations.append(perturbation)
        return tokens, tokens[perturbation.rows] if perturbation else None

    text = PromptEmbeddings(torch.zeros(2, 3, 4), torch.ones(2, 3))
    denoiser = guided_denoiser(model, text, text, STG, guidance_batch=True)
    denoiser(1.0, randn(2, 5, 4), torch.ones(2, 1))
    assert [(perturbation.blocks, perturbation.rows) for perturbation in perturbations] == [((1,), slice(2, None))]


@pytest.mark.parametrize("guidance_batch", [False, True])
@pytest.mark.parametrize("mode", official_pipeline.MODES)
@torch.no_grad()
def test_batch_of_videos_is_guided_like_each_by_itself(mode: str, guidance_batch: bool) -> None:
    transformer = build_random(lambda: Transformer(transformer_config()), 1)
    rope = transformer.compute_rope(token_positions(LatentGrid(2, 2, 2), fps=24.0, causal=True)[None])

    def model(
        tokens: Tensor, sigma: Tensor, text: PromptEmbeddings, perturbation: Perturbation | None = None
    ) -> tuple[Tensor, Any]:
        inputs = tokens, rope, text.embeddings, text.mask, sigma
        if perturbation is None:
            return transformer(*inputs), None
        return transformer.forward_with_perturbed(*inputs, **perturbation._asdict())

    tokens, sigma = randn(2, 8, CHANNELS), torch.tensor([[0.9], [0.4]])
    texts = [
        PromptEmbeddings(randn(2, 5, TEXT_WIDTH, seed=seed), torch.arange(5) < torch.tensor([[5], [3]]))
        for seed in (2, 3)
    ]
    guidance = replace(STG, stg_mode=mode, rescale=0.7, cfg_star=True)
    both = guided_denoiser(model, *texts, guidance, guidance_batch=guidance_batch)(1.0, tokens, sigma)
    for row in (slice(1), slice(1, 2)):
        row_texts = [PromptEmbeddings(text.embeddings[row], text.mask[row]) for text in texts]
        single = guided_denoiser(model, *row_texts, guidance)(1.0, tokens[row], sigma[row])
        assert relative_error(both[row], single) <= 1e-5


def test_residual_mode_does_nothing_officially_and_is_refused(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_guidance_lists_without_sigmas_are_refused(engine: Engine, pipeline: Any) -> None:
    request = replace(REQUEST, guidance=Guidance(cfg_scale=(3.0, 1.0), stg_scale=0.0, rescale=1.0))
    with pytest.raises(NameError):
        official_pipeline.run_official(pipeline, request)
    with pytest.raises(RequestError, match=r"guidance has 2 values, and no sigmas that they are for. Give `sigmas`"):
        engine.denoise(request)


def test_skipped_block_past_the_last_is_refused_only_with_stg(engine: Engine, pipeline: Any) -> None:
    """The official config of 2B 0.9.8 distilled skips block 42 of 28, with STG at 0."""
    off = replace(REQUEST, guidance=Guidance(cfg_scale=3.0, stg_scale=0.0, rescale=1.0, skip_blocks=(42,)))
    assert relative_error(engine.denoise(off), official_pipeline.run_official(pipeline, off).latents) <= 1e-5
    on = replace(REQUEST, guidance=replace(STG, skip_blocks=(42,)))
    with pytest.raises(IndexError):
        official_pipeline.run_official(pipeline, on)
    with pytest.raises(RequestError, match="skip_blocks has 42; this model has 2 blocks, 0 to 1"):
        engine.denoise(on)


def test_two_passes_encode_the_prompt_once(
    engine: Engine, pipeline: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Pass(
        sigmas=(0.7,), guidance=Guidance(cfg_scale=1.0, stg_scale=0.0, rescale=1.0), sampler="euler", tone_map=0.0
    )
    request = replace(REQUEST, size=Size(128, 128), multi_scale=True, second_pass=second)
    encode_counts: Counter[str] = Counter()
    encode = type(pipeline).encode_prompt

    def counting(self: Any, prompt: str, *args: Any, **kwargs: Any) -> Any:
        encode_counts[prompt] += 1
        return encode(self, prompt, *args, **kwargs)

    monkeypatch.setattr(type(pipeline), "encode_prompt", counting)
    official_pipeline.run_official(
        pipeline, request, upsampler=official_pipeline.open_upsampler(home / "upscaler.safetensors")
    )
    assert encode_counts == {REQUEST.prompt: 2}
    reports: list[tuple[str, int, int]] = []
    engine.denoise(request, watch=lambda progress: reports.append((progress.stage, progress.step, progress.of)))
    assert [report for report in reports if report[0] == "text"] == [("text", step, 2) for step in range(3)]


def test_official_two_pass_wrapper_cannot_trim_clips() -> None:
    """The official script calls `trim_conditioning_sequence`, which the wrapper lacks; see test_prepared_conditions."""
    assert not hasattr(LTXMultiScalePipeline, "trim_conditioning_sequence")
