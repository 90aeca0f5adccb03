"""Every sampler with every condition and guidance mode: finite latents, the same noise, and the planned evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kadr import Condition, Control, Engine, Request
from kadr.cli.main import main
from kadr.errors import RequestError
from kadr.media.writer import VideoWriter
from kadr.request.windows import Windows
from kadr.sampling import guidance as guiding
from kadr.sampling.noise import NoiseStreams
from kadr.sampling.samplers import SAMPLERS
from kadr.sampling.settings import Guidance, Pass
from kadr.shapes import Size
from tests import lora_files
from tests.tiny_models import MODEL_FILE, write_random_upscaler

SIGMAS = (1.0, 0.8, 0.55, 0.3)
BASE = Request(
    prompt="a red circle",
    negative_prompt="blue",
    size=(64, 64),
    frames=25,
    fps=24,
    sigmas=SIGMAS,
    guidance=1.0,
    image_noise=0.15,
)
CFG_STG = Guidance(cfg_scale=3.0, stg_scale=1.0, rescale=0.7, skip_blocks=(1,))
GUIDANCE: dict[str, Guidance] = {
    "CFG": Guidance(cfg_scale=3.0),
    "STG by values": CFG_STG,
    "STG by skipped attention": replace(CFG_STG, stg_mode="attention_skip"),
    "STG by skipped blocks, without CFG": replace(CFG_STG, stg_mode="transformer_block", cfg_scale=1.0),
    "CFG*": replace(CFG_STG, cfg_star=True),
    "APG": replace(CFG_STG, apg=0.5, apg_norm=5.0),
    # 0.66 lies between the sigmas of two steps: only a second evaluation is guided.
    "CFG between two steps": Guidance(cfg_scale=(1.0, 3.0, 1.0), sigmas=(0.8, 0.6, 0.0)),
}
SECOND_ORDER = [name for name in SAMPLERS if len(SAMPLERS[name].evaluation_sigmas(1.0, 0.5)) > 1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Clip of noise, 17 frames."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with VideoWriter(path, Size(64, 64), 24) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8))
    return str(path)


@pytest.fixture(scope="module")
def arguments(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    lora = lora_files.write_lora_file(tmp_path_factory.mktemp("lora") / "lora.safetensors", lora_files.block_pairs())
    return {"model": home / MODEL_FILE, "loras": [(lora, 0.5)]}


@pytest.fixture(scope="module")
def engine(arguments: dict[str, Any]) -> Engine:
    return Engine.open(**arguments, device="cpu", prompt_cache=False)


@pytest.fixture(scope="module")
def two_pass_engine(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    upscaler = write_random_upscaler(tmp_path_factory.mktemp("upscaler") / "upscaler.safetensors")
    return Engine.open(**arguments, upscaler=upscaler, device="cpu", prompt_cache=False)


Conditioned = Callable[[str], Request]
Check = Callable[[Engine, Request], None]


@pytest.fixture
def conditioned(clip: str, image_condition: Condition) -> Conditioned:
    """Returns a request with the conditions of a name."""
    image = image_condition.media
    changes: dict[str, dict[str, Any]] = {
        "image": {"conditions": (image_condition,)},
        "image at 0.6": {"conditions": (replace(image_condition, strength=0.6),)},
        "image in a box": {"conditions": (replace(image_condition, box=(0, 0, 64, 64), strength=0.6),)},
        "keyframe": {"conditions": (Condition(image, frame=16),)},
        "keyframe at 0.3": {"conditions": (Condition(image, frame=16, strength=0.3),)},
        "clip": {"conditions": (Condition(clip),)},
        "clip in the middle at 0.5": {"conditions": (Condition(clip, frame=8, strength=0.5),)},
        "several": {"conditions": (image_condition, Condition(clip, frame=8, strength=0.5))},
        "control": {"controls": (Control(clip),), "frames": 17},
        "windows": {"windows": Windows(frames=17, overlap=8, overlap_strength=0.6), "frames": 33},
        "windows with an anchor image": {"windows": Windows(frames=17), "frames": 33, "conditions": (image_condition,)},
        "input video": {"input_video": clip, "frames": 17, "denoise_strength": 0.8},
    }
    return lambda name: replace(BASE, **changes[name])


CONDITIONS = (
    *("image", "image at 0.6", "image in a box", "keyframe", "keyframe at 0.3", "clip", "clip in the middle at 0.5"),
    *("several", "control", "windows", "windows with an anchor image", "input video"),
)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Check:
    """Checks that latents are finite and the same each time, and evaluations as many as the dry run says."""
    evaluations, original_combine = [0], guiding.combine

    def combine(predictions: guiding.Predictions, *arguments: Any) -> Tensor:
        evaluations[0] += sum(prediction is not None for prediction in predictions)
        return original_combine(predictions, *arguments)

    monkeypatch.setattr(guiding, "combine", combine)

    def check_request(engine: Engine, request: Request) -> None:
        evaluations[0] = 0
        latents = engine.denoise(request)
        assert latents.isfinite().all()
        assert evaluations[0] == engine.dry_run(request).resolved.model_evaluations
        assert torch.equal(engine.denoise(request), latents)

    return check_request


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_takes_every_guidance_mode(
    check: Check, engine: Engine, conditioned: Conditioned, sampler: str, guidance: str
) -> None:
    for request in (BASE, conditioned("image at 0.6")):
        check(engine, replace(request, sampler=sampler, guidance=GUIDANCE[guidance]))


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_takes_every_condition(
    check: Check, engine: Engine, conditioned: Conditioned, sampler: str, condition: str
) -> None:
    check(engine, replace(conditioned(condition), sampler=sampler, guidance=GUIDANCE["CFG"]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_of_two_passes_has_its_own_sampler(check: Check, two_pass_engine: Engine, sampler: str) -> None:
    second_pass = Pass(sigmas=(0.7, 0.4), sampler="res_2s")
    request = replace(BASE, size=(128, 128), downscale_factor=0.5, sampler=sampler, second_pass=second_pass)
    check(two_pass_engine, request)
    assert [step.settings.sampler for step in two_pass_engine.dry_run(request).passes] == [sampler, "res_2s"]


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_frames_of_a_second_order_sampler_are_finite_and_differ(
    engine: Engine, conditioned: Conditioned, name: str
) -> None:
    request = replace(conditioned("several"), guidance_batch=True, guidance=GUIDANCE["CFG"])
    euler, second = (engine.generate(replace(request, sampler=sampler)).frames for sampler in ("euler", name))
    assert euler.shape == second.shape
    assert not np.array_equal(euler, second)


def test_samplers_draw_the_same_noise(
    engine: Engine, conditioned: Conditioned, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    original_draw = NoiseStreams.draw

    def draw(self: NoiseStreams, name: str, shape: Any) -> Tensor:
        drawn.append(name)
        return original_draw(self, name, shape)

    monkeypatch.setattr(NoiseStreams, "draw", draw)
    names = {}
    for sampler in SAMPLERS:
        engine.denoise(replace(conditioned("several"), sampler=sampler))
        names[sampler] = set(drawn)
        drawn.clear()
    assert names["res_2s"] == names["euler"]
    assert names["euler_stochastic"] - names["euler"] == {f"stochastic {step}" for step in range(len(SIGMAS))}


def test_guidance_of_a_second_evaluation_is_that_of_its_own_sigma(engine: Engine) -> None:
    request = replace(BASE, sampler="res_2s", guidance=GUIDANCE["CFG between two steps"])
    (resolved_pass,) = engine.dry_run(request).passes
    scales = [[(round(sigma, 3), guidance.cfg_scale) for sigma, guidance in step] for step in resolved_pass.evaluations]
    assert scales == [
        [(1.0, 1.0), (0.894, 1.0)],
        [(0.8, 1.0), (0.663, 3.0)],
        [(0.55, 1.0), (0.406, 1.0)],
        [(0.3, 1.0)],
    ]
    assert resolved_pass.uses_cfg


def test_plan_counts_every_evaluation(engine: Engine) -> None:
    """Four steps of RES 2S are planned as the seven Euler steps that have as many evaluations."""
    (resolved_pass,) = engine.resolve(replace(BASE, sampler="res_2s")).passes
    sigmas = tuple(evaluation.sigma for step in resolved_pass.evaluations for evaluation in step)
    assert len(sigmas) == 7
    by_res, by_euler = (
        engine.plan(request).stage("denoise").placement.seconds
        for request in (replace(BASE, sampler="res_2s"), replace(BASE, sigmas=sigmas))
    )
    assert by_res == by_euler


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_step_cache_with_several_evaluations_per_step_is_refused(engine: Engine, name: str) -> None:
    refused = replace(BASE, sampler=name, cache="taylor")
    for resolve in (engine.plan, engine.denoise, engine.resolve):
        with pytest.raises(RequestError, match=f"step cache is 'taylor', and the sampler '{name}' has 2 evaluations"):
            resolve(refused)


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_sampler_between_the_sigmas_of_a_distilled_model_is_refused(name: str) -> None:
    engine = Engine.open("demo-distilled", device="cpu")
    assert engine.dry_run(Request(prompt="x", sampler="euler_stochastic")).resolved.model_evaluations > 0
    with pytest.raises(RequestError, match=f"distilled for the sigmas .*the sampler '{name}' evaluates it between"):
        engine.dry_run(Request(prompt="x", sampler=name))


@pytest.mark.parametrize("flag", ["--sampler", "--second-sampler"])
def test_unknown_sampler_is_refused_with_the_list(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "x", flag, "heun_pp", "--dry-run"])
    assert f"'heun_pp'; it must be one of {', '.join(SAMPLERS)}" in " ".join(capsys.readouterr().err.split())


def test_dry_run_prints_the_sampler_and_a_line_for_each_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "x", "--model", "demo", "--sigmas", "0.99,0.5", "--sampler", "res_2s", "--dry-run"]
    with pytest.raises(SystemExit):
        main(arguments)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [row[:2] for row in lines if row and row[-1] == "-"]
    assert rows == [["1", "0.99"], ["0.703562", "3"], ["2", "0.5"]]
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    (resolved_pass,) = json.loads(capsys.readouterr().out)["passes"]
    assert resolved_pass["sampler"] == "res_2s"
    assert [step["evaluations"] for step in resolved_pass["steps"]] == [4, 2]
    assert [len(step["intermediate"]) for step in resolved_pass["steps"]] == [1, 0]
