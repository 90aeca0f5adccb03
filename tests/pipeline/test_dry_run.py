"""A dry run says what an engine would do, and says it of models that are not here too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kadr.errors import CheckpointError, RequestError
from kadr.models.registry import MODEL_RELEASES, Recipe, Release
from kadr.pipeline import dry_run
from kadr.pipeline.dry_run import DryRunEngine
from kadr.pipeline.engine import Engine
from kadr.request.official_config import OfficialConfig
from kadr.request.request import Request
from kadr.sampling.settings import Guidance, Pass
from kadr.spec import locate
from tests import tiny_models
from tests.request.official_configs import OFFICIAL_CONFIGS

REQUEST = Request(prompt="a red circle")
# The table of the official 13B dev config: index of guidance_timesteps -> guidance, STG, rescale, blocks, levels.
FIRST = (
    (1, 0, 1, (), (1.0,)),
    (1, 0, 1, (11, 25, 35, 39), (0.998333, 0.996667)),
    (6, 4, 0.5, (22, 35, 39), (0.995, 0.993333)),
    (8, 4, 0.5, (28,), (0.991667, 0.99, 0.988333, 0.986667, 0.985)),
    (6, 4, 1, (28,), (0.983333, 0.981667, 0.98, 0.978333)),
    (1, 2, 1, (28,), (0.976667, 0.975, 0.969111, 0.954778, 0.932)),
    (1, 1, 1, (28,), (0.900778, 0.861111, 0.813, 0.756444, 0.691444, 0.618, 0.536111, 0.445778)),
)
LATER = (0.954778, 0.932, 0.900778, 0.861111, 0.813, 0.756444, 0.691444, 0.618, 0.536111, 0.445778, 0.347, 0.239778)
SECOND = ((1, 1, 1, (27,), (*LATER, 0.124111)),)


@pytest.fixture
def nothing_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_disk(released: Release) -> Path | None:
        return locate.find_release_on_disk(released) if released.repo is None else None

    monkeypatch.setattr(dry_run, "find_release_on_disk", on_disk)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def upscaler(home: Path) -> Callable[..., Path]:
    def write(**kind: bool) -> Path:
        return tiny_models.write_random_upscaler(home / f"{'-'.join(kind) or 'space'}.safetensors", **kind)

    return write


@pytest.mark.usefixtures("nothing_on_disk")
@pytest.mark.parametrize("model", ["ltxv-13b-0.9.8-dev", "ltxv-13b-0.9.7-dev-fp8"])
def test_steps_of_13b_dev_are_the_official_ones(model: str) -> None:
    run = DryRunEngine.open(model).run(REQUEST)
    for plan, table in zip(run.passes, (FIRST, SECOND), strict=True):
        expected = [(level, values) for *values, levels in table for level in levels]
        assert plan.sigmas.tolist() == pytest.approx([level for level, _ in expected], abs=5e-7)
        assert [list(step) for step in plan.step_guidance] == [values for _, values in expected]
    assert [(str(plan.size), plan.grid.num_tokens) for plan in run.passes] == [("800x448", 5600), ("1600x896", 22400)]
    assert run.evaluations == 62 + 26


@pytest.mark.usefixtures("nothing_on_disk")
def test_first_models_shift_their_levels_by_size() -> None:
    (plan,) = DryRunEngine.open("ltxv-2b-0.9").run(REQUEST).passes
    assert plan.sigmas[[0, 1, 20, 38, 39]].tolist() == pytest.approx([1, 0.999301, 0.972873, 0.524141, 0.1], abs=1e-6)


@pytest.mark.usefixtures("nothing_on_disk")
@pytest.mark.parametrize("name", OFFICIAL_CONFIGS)
def test_official_config_makes_what_its_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(OFFICIAL_CONFIGS[name], "utf-8")
    said = DryRunEngine.open(**OfficialConfig.read("config.yaml").engine_arguments()).run(REQUEST)
    known = DryRunEngine.open(name).run(REQUEST)
    assert [part.path for part in said.components] == [None] * len(said.components)
    assert said.components == known.components
    for mine, its in zip(said.passes, known.passes, strict=True):
        assert torch.equal(mine.sigmas, its.sigmas)
        assert mine.step_guidance == its.step_guidance


@pytest.mark.usefixtures("nothing_on_disk")
@pytest.mark.parametrize("model", [model.name for model in MODEL_RELEASES])
def test_every_released_model_has_a_plan_with_its_parts(model: str) -> None:
    run = DryRunEngine.open(model).run(REQUEST)
    roles = [part.role for part in run.components]
    assert roles[0] == "model"
    assert ("upscaler" in roles) == (len(run.passes) == 2)
    assert all(part.path or part.size_bytes for part in run.components)
    assert run.to_json()["evaluations"] == run.evaluations


SETTINGS = (
    {},
    {"steps": 7, "guidance": Guidance(cfg_scale=(1.0, 3.0), stg_scale=1.0, skip_blocks=(1,), sigmas=(1.0, 0.9))},
    {"size": (100, 70), "frames": 20, "skip_final": 2},
)


@pytest.mark.parametrize("settings", SETTINGS)
def test_plan_is_that_of_the_engine(home: Path, settings: dict[str, Any]) -> None:
    request = Request(**{"prompt": "x", "size": (64, 64), "frames": 9, "steps": 4, **settings})
    ours, theirs = (
        DryRunEngine.open(home / tiny_models.MODEL_FILE),
        Engine.open(home / tiny_models.MODEL_FILE, device="cpu"),
    )
    assert ours.resolve(request) == theirs.resolve(request)
    _same(ours.run(request).passes, theirs.resolve_passes(request))


@pytest.mark.parametrize("kind", [{"space": True}, {"space": False, "time": True}, {"space": True, "time": True}])
def test_plan_of_two_passes_is_that_of_the_engine(
    home: Path, upscaler: Callable[..., Path], kind: dict[str, bool]
) -> None:
    request = Request(prompt="x", size=(128, 96), frames=17, steps=4, second_pass=Pass(sigmas=(0.9, 0.5)))
    parts = {"upscaler": [upscaler(**kind)], "second_model": home / tiny_models.MODEL_FILE}
    ours = DryRunEngine.open(home / tiny_models.MODEL_FILE, **parts)
    theirs = Engine.open(home / tiny_models.MODEL_FILE, **parts, device="cpu")
    _same(ours.run(request).passes, theirs.resolve_passes(request))


def _same(ours: Any, theirs: Any) -> None:
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine.levels, its.levels)
        assert (mine.size, mine.frames, mine.fps) == (its.size, its.frames, its.fps)
        assert (mine.settings, mine.steps) == (its.settings, its.steps)


@pytest.mark.usefixtures("nothing_on_disk")
def test_second_model_brings_its_pass() -> None:
    engine = DryRunEngine.open("ltxv-13b-0.9.8-dev", second_model="ltxv-13b-0.9.8-distilled")
    run = engine.run(REQUEST)
    assert [len(plan.sigmas) for plan in run.passes] == [27, 3]
    assert [part.name for part in run.components][:2] == ["ltxv-13b-0.9.8-dev", "ltxv-13b-0.9.8-distilled"]


@pytest.mark.usefixtures("nothing_on_disk")
def test_named_upscaler_doubles_what_it_is_for() -> None:
    engine = DryRunEngine.open("ltxv-13b-0.9.8-dev", upscaler="ltxv-temporal-upscaler-0.9.8")
    first, second = engine.run(REQUEST).passes
    assert (first.size, first.frames, first.fps) == (second.size, 65, 15.0)
    assert (second.frames, second.fps) == (129, 30.0)


@pytest.mark.usefixtures("nothing_on_disk")
@pytest.mark.parametrize(
    "parts, request_, error, word",
    [
        ({"model": "ltxv-13b-0.9.8"}, {}, RequestError, "Did you mean"),
        ({"model": "t5-v1.1-xxl"}, {}, RequestError, "text encoder"),
        ({"model": "gone.safetensors"}, {}, CheckpointError, "gone.safetensors"),
        ({"model": "demo", "upscaler": ["demo"]}, {}, RequestError, "ltxv-spatial-upscaler"),
        ({"model": "demo", "upscaler": ["gone.safetensors"]}, {}, CheckpointError, "upscaler is not at"),
        ({"model": "demo", "text_encoder": "gone/t5"}, {}, CheckpointError, "text encoder is not at"),
        ({"model": "ltxv-2b-0.9.5"}, {"second": Pass(sigmas=(0.5,))}, CheckpointError, "--upscaler"),
        ({"model": "ltxv-2b-0.9.8-distilled"}, {"steps": 9}, RequestError, "distilled for"),
        ({"model": "ltxv-2b-0.9"}, {"guidance": Guidance(skip_blocks=(28,))}, RequestError, "28 blocks"),
    ],
)
def test_what_cannot_work_is_refused(
    parts: dict[str, Any], request_: dict[str, Any], error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        DryRunEngine.open(**parts).run(Request(prompt="x", **request_))


def test_recipe_goes_before_that_of_the_model() -> None:
    recipe = Recipe(first_pass=Pass(steps=3), frames=17)
    run = DryRunEngine.open("demo", recipe=recipe).run(REQUEST)
    assert (len(run.passes[0].sigmas), run.request.frames) == (3, 17)
