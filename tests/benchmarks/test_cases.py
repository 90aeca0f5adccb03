"""What can be chosen, what it comes to, and the random models it is run on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kadr.bench import model_files
from kadr.bench.benchmark import _stages
from kadr.bench.cases import (
    BENCH_STAGES,
    DEFAULT_SHAPES,
    END_TO_END,
    SCHEDULES,
    VIDEO_SHAPES,
    Selection,
    VideoShape,
    schedule_for,
)
from kadr.bench.model_files import ModelFiles, RandomWeights, open_model_files
from kadr.bench.stage_case import TEXT_LENGTH, StageCase
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.errors import CheckpointError, RequestError
from kadr.models.transformer import TransformerConfig
from kadr.planning.flops import perturbed_flops, transformer_flops
from kadr.planning.vae_flops import vae_decoder_flops
from tests.tiny_models import vae_config

SMALL = TransformerConfig(num_layers=3, num_heads=4, head_dim=16, caption_channels=4096)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the released shape and next to no size."""
    monkeypatch.setitem(model_files.TRANSFORMERS, "2b", SMALL)
    monkeypatch.setattr(model_files, "VAE_0_9_5", replace(vae_config("0.9.5"), latent_channels=128))
    monkeypatch.setattr(model_files, "POOL_NUMEL", (1 << 12) + 1)


@pytest.mark.parametrize("text", ["512x320x25", "512x320"])
def test_a_fixed_size_is_known_by_its_sides(text: str) -> None:
    assert VideoShape.parse(text) is VIDEO_SHAPES[1]


@pytest.mark.parametrize("text", ["512", "512x320x26", "500x320x25", "640x320", "axbx9", "64x64x"])
def test_a_size_that_cannot_be_run_as_it_is_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="size is"):
        VideoShape.parse(text)


@pytest.mark.parametrize("field", ["models", "stages", "schedules", "ways"])
def test_a_name_that_does_not_exist_is_refused_with_those_that_do(field: str) -> None:
    with pytest.raises(RequestError, match=r"'odd'; known are \w+"):
        Selection(**{field: ("odd",)})  # type: ignore[arg-type]


def test_the_demo_has_no_layers_to_spare() -> None:
    with pytest.raises(RequestError, match="layers"):
        Selection(num_layers=2)
    with pytest.raises(RequestError, match="rounds is 0"):
        Selection(rounds=0)


def test_only_the_whole_way_has_schedules_and_only_the_demo_a_start() -> None:
    chosen = Selection(models=("demo", "2b"), schedules=("8", "20-cfg"))
    assert [stage for stage, _ in _stages(chosen, "demo")] == [*BENCH_STAGES, END_TO_END]
    assert [stage for stage, _ in _stages(chosen, "2b")] == [*BENCH_STAGES[1:], END_TO_END]
    assert {name for stage, name in _stages(chosen, "2b") if stage != END_TO_END} == {None}
    assert chosen.shapes_for("demo") == (DEFAULT_SHAPES["demo"],)


def test_guidance_disturbs_a_block_that_there_is() -> None:
    blocks = [schedule_for("40-cfg-stg", layers).guidance.skip_blocks for layers in (1, 2, 28)]
    assert blocks == [(0,), (1,), (18,)]
    assert schedule_for("8", 28) is SCHEDULES["8"]


@pytest.mark.usefixtures("small")
def test_random_models_are_written_once_and_open_as_any_other(tmp_path: Path) -> None:
    chosen = Selection(models=("2b",), num_layers=2, stages=("dit",))
    with open_model_files("2b", chosen, tmp_path / "kept") as source:
        assert source.transformer_blocks == (2, 3)
        written = source.path.stat().st_mtime_ns
        detected = Checkpoint.open(source.path).info
        assert detected.transformer is not None
        assert detected.transformer.num_layers == 2
        assert detected.vae_family is None or detected.vae_family == "0.9.5"
    with open_model_files("2b", chosen, tmp_path / "kept") as source:
        assert source.path.stat().st_mtime_ns == written
    with open_model_files("2b", replace(chosen, num_layers=None)) as source:
        assert source.transformer_blocks is None
        temporary = source.scratch_folder
    assert not temporary.exists()


@pytest.mark.usefixtures("small")
def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with (
        pytest.raises(CheckpointError, match=r"has room for 0\.0"),
        open_model_files("2b", Selection(models=("2b",)), tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_weight_is_zero_and_activations_keep_their_size() -> None:
    noise = RandomWeights()
    matrix, bias = noise("a.weight", torch.empty(300, 200)), noise("a.bias", torch.empty(300))
    assert (torch.randn(4, 200) @ matrix.float().T).std() == pytest.approx(1, abs=0.1)
    for made in (matrix, bias):
        assert made.count_nonzero() > 0.999 * made.numel()
    assert not torch.equal(matrix, noise("b.weight", torch.empty(300, 200)))


def demo_work(name: str) -> StageCase:
    path = Path(model_files.__file__).parents[1] / "assets" / "demo" / "demo.safetensors"
    source = ModelFiles("demo", path, path.parent, Path())
    return StageCase(source, VideoShape.parse("128x128x25"), END_TO_END, torch.device("cpu"), name)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_products_of_the_whole_way_are_those_of_its_evaluations_and_the_decoder(name: str) -> None:
    work = demo_work(name)
    chosen = schedule_for(name, work.transformer_config.num_layers)
    tokens, guidance = work.shape.grid.num_tokens, chosen.guidance
    once = transformer_flops(work.transformer_config, tokens, text_tokens=TEXT_LENGTH)
    each = once * (1 + (guidance.cfg_scale > 1))  # type: ignore[operator]
    if guidance.stg_scale:
        blocks = guidance.skip_blocks
        each += perturbed_flops(work.transformer_config, tokens, blocks, guidance.stg_mode, text_tokens=TEXT_LENGTH)  # type: ignore[arg-type]
    assert work.flops == chosen.steps * each + vae_decoder_flops(work.vae_config, work.shape.grid)


@pytest.mark.usefixtures("small")
def test_layers_that_are_left_out_are_told_where_they_count(tmp_path: Path) -> None:
    chosen = Selection(models=("2b",), num_layers=2, stages=("dit",))
    with open_model_files("2b", chosen, tmp_path) as source:
        told = {
            stage: StageCase(source, VIDEO_SHAPES[0], stage, torch.device("cpu")).active_blocks
            for stage in BENCH_STAGES
        }
    assert (told["dit"], told["end-to-end"], told["text"]) == ((2, 3), (2, 3), (1, 24))
    assert (told["encode"], told["decode"]) == (None, None)
