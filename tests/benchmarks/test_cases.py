"""Selections of benchmark cases, their FLOPs, and the random models they run on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kadr.bench import model_files
from kadr.bench.benchmark import stage_cases
from kadr.bench.cases import (
    BENCH_STAGES,
    DEFAULT_SHAPES,
    END_TO_END,
    FLOAT32_VARIANT,
    PROMPT_TOKENS,
    SCHEDULES,
    TEXT,
    TEXT_LENGTH,
    VIDEO_SHAPES,
    Selection,
    VideoShape,
    parse_prompt_tokens,
    schedule_for,
)
from kadr.bench.model_files import ModelFiles, RandomWeights, open_model_files
from kadr.bench.stage_case import StageCase
from kadr.bench.suites import SUITES, select_cases
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.errors import CheckpointError, RequestError
from kadr.models.transformer import TransformerConfig
from kadr.planning.costs.flops import perturbed_flops, text_encoder_flops, transformer_flops
from kadr.planning.costs.vae_flops import vae_decoder_flops
from kadr.shapes import Size
from kadr.text.tokenizer import MAX_SEQUENCE_LENGTH
from tests.tiny_models import vae_config

SMALL = TransformerConfig(num_layers=3, num_heads=4, head_dim=16, caption_channels=4096)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the released architecture and tiny size."""
    monkeypatch.setitem(model_files.TRANSFORMERS, "2b", SMALL)
    monkeypatch.setattr(model_files, "VAE_0_9_5", replace(vae_config("0.9.5"), latent_channels=128))
    monkeypatch.setattr(model_files, "POOL_NUMEL", (1 << 12) + 1)


@pytest.mark.parametrize("text", ["512x320x25", "512x320"])
def test_a_known_shape_is_found_by_its_sides(text: str) -> None:
    assert VideoShape.parse(text) is VIDEO_SHAPES[1]


@pytest.mark.parametrize("text", ["512", "512x320x26", "500x320x25", "640x320", "axbx9", "64x64x"])
def test_a_shape_that_needs_rounding_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="size is"):
        VideoShape.parse(text)


@pytest.mark.parametrize("field", ["models", "stages", "schedules", "variants"])
def test_an_unknown_name_is_refused_with_the_known_ones(field: str) -> None:
    with pytest.raises(RequestError, match=r"'odd'; known are \w+"):
        Selection(**{field: ("odd",)})  # type: ignore[arg-type]


def test_num_layers_of_the_demo_and_zero_rounds_are_refused() -> None:
    with pytest.raises(RequestError, match="num_layers must be 1 or more"):
        Selection(num_layers=2)
    with pytest.raises(RequestError, match="rounds is 0"):
        Selection(rounds=0)


def cases_of(selection: Selection, name: str) -> list[tuple[str, str | None, int]]:
    files = replace(demo_case("8").files, name=name)
    cases = stage_cases(files, selection, torch.device("cpu"))
    return [(case.stage, case.schedule, case.prompt_tokens) for case in cases]


def test_only_end_to_end_has_schedules_and_only_the_demo_a_start_up() -> None:
    selection = Selection(models=("demo", "2b"), schedules=("8", "20-cfg"))
    assert [stage for stage, _, _ in cases_of(selection, "demo")] == [*BENCH_STAGES, END_TO_END]
    assert [stage for stage, _, _ in cases_of(selection, "2b")] == [*BENCH_STAGES[1:], END_TO_END]
    assert {schedule for stage, schedule, _ in cases_of(selection, "2b") if stage != END_TO_END} == {None}
    assert selection.shapes_for("demo") == (DEFAULT_SHAPES["demo"],)


def test_text_encoder_has_a_case_for_each_prompt_not_shape() -> None:
    selection = Selection(stages=(TEXT, "dit"), shapes=VIDEO_SHAPES[:2], prompt_tokens=(100, 256))
    expected = [(TEXT, None, 100), (TEXT, None, 256), ("dit", None, PROMPT_TOKENS), ("dit", None, PROMPT_TOKENS)]
    assert cases_of(selection, "2b") == expected


def test_prompts_are_as_long_as_the_tokenizer_makes_them() -> None:
    assert TEXT_LENGTH == MAX_SEQUENCE_LENGTH
    assert parse_prompt_tokens("1,256") == [1, 256]
    for text in ("0", "257", "1,x", "9" * 20):
        with pytest.raises(RequestError, match="prompt_tokens is"):
            Selection(prompt_tokens=parse_prompt_tokens(text))


def test_padding_of_a_prompt_is_no_work() -> None:
    short, full = (replace(demo_case("8"), stage=TEXT, prompt_tokens=tokens) for tokens in (100, 256))
    assert short.inputs["prompt_attention_mask"].sum() == 100
    assert full.inputs["prompt_attention_mask"].all()
    config = short.open_engine(FLOAT32_VARIANT).spec.text_encoder_checkpoint.config
    assert (short.flops, full.flops) == tuple(text_encoder_flops(config, length=tokens) for tokens in (100, 256))


def test_suites_cover_the_sizes_that_people_make() -> None:
    shapes = {
        (model, stage, str(shape), each.num_layers)
        for each in SUITES["released"]
        for model in each.models
        for stage in each.stages
        for shape in each.shapes_for(model)
    }
    assert shapes >= {
        ("2b", "dit", "768x512x121", 2),
        ("2b", "dit", "1216x704x121", 2),
        ("13b", "dit", "768x512x121", 1),
        ("2b", "encode", "768x512x25", 2),
        ("2b", "decode", "768x512x25", 2),
        ("2b", "end-to-end", "512x320x25", None),
    }


def test_a_suite_has_cases_of_its_own_and_the_settings_of_the_flags() -> None:
    flags = Selection(rounds=7, variants=("int8",), device="cpu")
    chosen = select_cases(["demo", "released"], flags)
    assert [each.models for each in chosen[:2]] == [("demo",), ("2b",)]
    assert {(each.rounds, *each.variants, each.device) for each in chosen} == {(7, "int8", "cpu")}
    assert select_cases([], flags) == [flags]
    with pytest.raises(RequestError, match="no suite 'all'; known are demo, released"):
        select_cases(["all"], flags)
    for choice in ({"num_layers": 2, "models": ("2b",)}, {"shapes": (VideoShape(Size(64, 64), 9),)}):
        with pytest.raises(RequestError, match="leave --suite or those flags out"):
            select_cases(["released"], replace(flags, **choice))


def test_stg_perturbs_a_block_that_exists() -> None:
    blocks = [schedule_for("40-cfg-stg", layers).guidance.skip_blocks for layers in (1, 2, 28)]
    assert blocks == [(0,), (1,), (18,)]
    assert schedule_for("8", 28) is SCHEDULES["8"]


@pytest.mark.usefixtures("small")
def test_random_models_are_written_once_and_open_like_any_other(tmp_path: Path) -> None:
    selection = Selection(models=("2b",), num_layers=2, stages=("dit",))
    with open_model_files("2b", selection, tmp_path / "models") as files:
        assert files.transformer_blocks == (2, 3)
        written = files.path.stat().st_mtime_ns
        info = Checkpoint.open(files.path).info
        assert info.transformer is not None
        assert info.transformer.num_layers == 2
        assert info.vae_family is None or info.vae_family == "0.9.5"
    with open_model_files("2b", selection, tmp_path / "models") as files:
        assert files.path.stat().st_mtime_ns == written
    with open_model_files("2b", replace(selection, num_layers=None)) as files:
        assert files.transformer_blocks is None
        temporary = files.scratch_folder
    assert not temporary.exists()


@pytest.mark.usefixtures("small")
def test_a_full_disk_is_reported_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with (
        pytest.raises(CheckpointError, match=r"has 0\.0 GB free"),
        open_model_files("2b", Selection(models=("2b",)), tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_random_weights_are_nonzero_and_keep_activations_in_scale() -> None:
    random_weights = RandomWeights()
    matrix, bias = random_weights("a.weight", torch.empty(300, 200)), random_weights("a.bias", torch.empty(300))
    assert (torch.randn(4, 200) @ matrix.float().T).std() == pytest.approx(1, abs=0.1)
    for tensor in (matrix, bias):
        assert tensor.count_nonzero() > 0.999 * tensor.numel()
    assert not torch.equal(matrix, random_weights("b.weight", torch.empty(300, 200)))


def demo_case(schedule: str) -> StageCase:
    path = Path(model_files.__file__).parents[1] / "assets" / "demo" / "demo.safetensors"
    files = ModelFiles("demo", path, path.parent, Path())
    return StageCase(files, VideoShape.parse("128x128x25"), END_TO_END, torch.device("cpu"), schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_end_to_end_flops_are_those_of_evaluations_and_decoder(name: str) -> None:
    case = demo_case(name)
    config, grid = case.transformer_config, case.shape.grid
    schedule = schedule_for(name, config.num_layers)
    guidance = schedule.guidance
    evaluation_flops = transformer_flops(config, grid.num_tokens, text_tokens=PROMPT_TOKENS)
    step_flops = evaluation_flops * (1 + (guidance.cfg_scale > 1))  # type: ignore[operator]
    if guidance.stg_scale:
        step_flops += perturbed_flops(
            config,
            grid.num_tokens,
            guidance.skip_blocks,  # type: ignore[arg-type]
            guidance.stg_mode,  # type: ignore[arg-type]
            text_tokens=PROMPT_TOKENS,
        )
    assert case.flops == schedule.steps * step_flops + vae_decoder_flops(case.vae_config, grid)


@pytest.mark.usefixtures("small")
def test_omitted_blocks_are_reported_where_they_count(tmp_path: Path) -> None:
    selection = Selection(models=("2b",), num_layers=2, stages=("dit",))
    with open_model_files("2b", selection, tmp_path) as files:
        blocks = {
            stage: StageCase(files, VIDEO_SHAPES[0], stage, torch.device("cpu")).active_blocks for stage in BENCH_STAGES
        }
    assert (blocks["dit"], blocks["end-to-end"], blocks["text"]) == ((2, 3), (2, 3), (1, 24))
    assert (blocks["encode"], blocks["decode"]) == (None, None)
