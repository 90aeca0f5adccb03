"""A dry run resolves a request as an engine does, also for models that are not on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kadr.errors import CheckpointError, RequestError
from kadr.models.registry import MODEL_RELEASES, Recipe, Release
from kadr.pipeline.engine import Engine
from kadr.request.official_config import OfficialConfig
from kadr.request.request import Request
from kadr.sampling.settings import Guidance, Pass
from kadr.spec import locate
from tests import tiny_models
from tests.request.official_configs import OFFICIAL_CONFIGS

REQUEST = Request(prompt="a red circle")
# Steps of the official 13B dev config, by entry of guidance_timesteps: CFG, STG, rescale, blocks, sigmas.
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
    """Hides every model but the bundled ones."""

    def find_bundled(release: Release) -> Path | None:
        return find_on_disk(release) if release.repo is None else None

    find_on_disk = locate.find_release_on_disk
    monkeypatch.setattr(locate, "find_release_on_disk", find_bundled)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def upscaler(home: Path) -> Callable[..., Path]:
    def write(**kind: bool) -> Path:
        return tiny_models.write_random_upscaler(home / f"{'-'.join(kind)}.safetensors", **kind)

    return write


@pytest.mark.usefixtures("nothing_on_disk")
@pytest.mark.parametrize("model", ["ltxv-13b-0.9.8-dev", "ltxv-13b-0.9.7-dev-fp8"])
def test_steps_of_13b_dev_are_the_official_ones(model: str) -> None:
    run = Engine.open(model).dry_run(REQUEST)
    for resolved_pass, table in zip(run.passes, (FIRST, SECOND), strict=True):
        expected = [(sigma, values) for *values, sigmas in table for sigma in sigmas]
        assert list(resolved_pass.sigmas) == pytest.approx([sigma for sigma, _ in expected], abs=5e-7)
        assert [list(step) for step in resolved_pass.step_guidance] == [values for _, values in expected]
    sizes = [(str(resolved_pass.size), resolved_pass.grid.num_tokens) for resolved_pass in run.passes]
    assert sizes == [("800x448", 5600), ("1600x896", 22400)]
    assert run.resolved.model_evaluations == 62 + 26


@pytest.mark.usefixtures("nothing_on_disk")
def test_sigmas_of_2b_0_9_are_shifted_by_size() -> None:
    (resolved_pass,) = Engine.open("ltxv-2b-0.9").dry_run(REQUEST).passes
    expected = pytest.approx([1, 0.999301, 0.972873, 0.524141, 0.1], abs=1e-6)
    assert [resolved_pass.sigmas[index] for index in (0, 1, 20, 38, 39)] == expected


@pytest.mark.usefixtures("nothing_on_disk")
@pytest.mark.parametrize("name", OFFICIAL_CONFIGS)
def test_official_config_gives_the_dry_run_of_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(OFFICIAL_CONFIGS[name], "utf-8")
    by_config = Engine.open(**OfficialConfig.read("config.yaml").engine_arguments()).dry_run(REQUEST)
    by_name = Engine.open(name).dry_run(REQUEST)
    assert [component.path for component in by_config.components] == [None] * len(by_config.components)
    assert by_config.components == by_name.components
    for actual, expected in zip(by_config.passes, by_name.passes, strict=True):
        assert actual.sigmas == expected.sigmas
        assert actual.step_guidance == expected.step_guidance


@pytest.mark.usefixtures("nothing_on_disk")
@pytest.mark.parametrize("model", [model.name for model in MODEL_RELEASES])
def test_dry_run_of_every_release_lists_its_components(model: str) -> None:
    run = Engine.open(model).dry_run(REQUEST)
    roles = [component.role for component in run.components]
    assert roles[0] == "model"
    assert ("upscaler" in roles) == (len(run.passes) == 2)
    assert all(component.path or component.bytes_to_fetch for component in run.components)
    assert run.to_json()["evaluations"] == run.resolved.model_evaluations


SETTINGS = (
    {},
    {"steps": 7, "guidance": Guidance(cfg_scale=(1.0, 3.0), stg_scale=1.0, skip_blocks=(1,), sigmas=(1.0, 0.9))},
    {"size": (100, 70), "frames": 20, "skip_final": 2},
)


@pytest.mark.parametrize("settings", SETTINGS)
def test_passes_equal_those_of_the_engine(home: Path, settings: dict[str, Any]) -> None:
    request = Request(**{"prompt": "x", "size": (64, 64), "frames": 9, "steps": 4, **settings})
    dry_run_engine = Engine.open(home / tiny_models.MODEL_FILE)
    engine = Engine.open(home / tiny_models.MODEL_FILE, device="cpu")
    assert dry_run_engine.resolve(request) == engine.resolve(request)
    assert_equal_passes(dry_run_engine.dry_run(request).passes, engine.resolve(request).passes)


@pytest.mark.parametrize(
    "kind",
    [
        {"upscales_space": True},
        {"upscales_space": False, "upscales_time": True},
        {"upscales_space": True, "upscales_time": True},
    ],
)
def test_two_passes_equal_those_of_the_engine(home: Path, upscaler: Callable[..., Path], kind: dict[str, bool]) -> None:
    request = Request(prompt="x", size=(128, 96), frames=17, steps=4, second_pass=Pass(sigmas=(0.9, 0.5)))
    components = {"upscaler": [upscaler(**kind)], "second_model": home / tiny_models.MODEL_FILE}
    dry_run_engine = Engine.open(home / tiny_models.MODEL_FILE, **components)
    engine = Engine.open(home / tiny_models.MODEL_FILE, **components, device="cpu")
    assert_equal_passes(dry_run_engine.dry_run(request).passes, engine.resolve(request).passes)


def assert_equal_passes(actual_passes: Any, expected_passes: Any) -> None:
    for actual, expected in zip(actual_passes, expected_passes, strict=True):
        assert actual.sigmas == expected.sigmas
        assert (actual.size, actual.frames, actual.fps) == (expected.size, expected.frames, expected.fps)
        assert (actual.settings, actual.step_guidance) == (expected.settings, expected.step_guidance)


@pytest.mark.usefixtures("nothing_on_disk")
def test_second_model_brings_its_second_pass() -> None:
    engine = Engine.open("ltxv-13b-0.9.8-dev", second_model="ltxv-13b-0.9.8-distilled")
    run = engine.dry_run(REQUEST)
    assert [len(resolved_pass.sigmas) for resolved_pass in run.passes] == [27, 3]
    assert [component.name for component in run.components][:2] == ["ltxv-13b-0.9.8-dev", "ltxv-13b-0.9.8-distilled"]


@pytest.mark.usefixtures("nothing_on_disk")
def test_temporal_upscaler_by_name_doubles_the_rate() -> None:
    engine = Engine.open("ltxv-13b-0.9.8-dev", upscaler="ltxv-temporal-upscaler-0.9.8")
    first, second = engine.dry_run(REQUEST).passes
    assert (first.size, first.frames, first.fps) == (second.size, 65, 15.0)
    assert (second.frames, second.fps) == (129, 30.0)


@pytest.mark.usefixtures("nothing_on_disk")
@pytest.mark.parametrize(
    "components, fields, error, expected",
    [
        ({"model": "ltxv-13b-0.9.8"}, {}, RequestError, "Did you mean"),
        ({"model": "t5-v1.1-xxl"}, {}, RequestError, "text encoder"),
        ({"model": "gone.safetensors"}, {}, CheckpointError, "gone.safetensors"),
        ({"model": "demo", "upscaler": ["demo"]}, {}, RequestError, "ltxv-spatial-upscaler"),
        (
            {"model": "demo", "upscaler": ["gone.safetensors"]},
            {},
            CheckpointError,
            "the upscaler gone.safetensors does not exist",
        ),
        ({"model": "demo", "text_encoder": "gone/t5"}, {}, CheckpointError, "the text encoder gone/t5 does not exist"),
        ({"model": "ltxv-2b-0.9.5"}, {"second_pass": Pass(sigmas=(0.5,))}, CheckpointError, "upscaler"),
        ({"model": "ltxv-2b-0.9.8-distilled"}, {"steps": 9}, RequestError, "distilled for"),
        ({"model": "ltxv-2b-0.9"}, {"guidance": Guidance(skip_blocks=(28,))}, RequestError, "28 blocks"),
    ],
)
def test_dry_run_refuses_what_cannot_work(
    components: dict[str, Any], fields: dict[str, Any], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        Engine.open(**components).dry_run(Request(prompt="x", **fields))


def test_given_recipe_replaces_that_of_the_model() -> None:
    recipe = Recipe(first_pass=Pass(steps=3), frames=17)
    run = Engine.open("demo", recipe=recipe).dry_run(REQUEST)
    assert (len(run.passes[0].sigmas), run.resolved.frames) == (3, 17)
