"""What a request is planned to take: which ways there are, which is taken, and what is said when none fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.errors import CheckpointError, KadrWarning, PlanError, RequestError
from kadr.pipeline import components, module_placement
from kadr.pipeline.engine import Engine
from kadr.pipeline.module_placement import spread_blocks
from kadr.planning import planner
from kadr.planning.plan import AS_STORED, CONVERTED, Plan
from kadr.planning.weight_bytes import weight_bytes
from kadr.quant.layers import Fp8Linear
from kadr.quant.prepack import should_prepack_convs
from kadr.request.inputs import Condition
from kadr.request.request import Request
from tests import tiny_models
from tests.checkpoints.test_load import cast_as_released

REQUEST = Request(prompt="a red circle", size=(64, 64), frames=9, steps=2, guidance=1.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def opened(home: Path) -> Callable[..., Engine]:
    def engine(**how: object) -> Engine:
        return Engine.open(
            home / tiny_models.MODEL_FILE, prompt_cache=False, **{"device": "cpu", "dtype": "float32", **how}
        )

    return engine


def with_free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """So much memory, and no more, can be had."""
    monkeypatch.setattr(planner, "free_bytes", lambda device: size)


def relative(made: torch.Tensor, right: torch.Tensor) -> float:
    return float((made - right).norm() / right.norm())


def ways(plan: Plan) -> dict[str, tuple[str, bool]]:
    return {
        stage.stage: (stage.placement.weight_format, bool(stage.placement.streamed_blocks)) for stage in plan.stages
    }


def test_with_room_everything_is_converted_and_stays(opened: Callable[..., Engine]) -> None:
    plan = opened().plan(REQUEST)
    assert ways(plan) == dict.fromkeys(("text", "denoise", "decode"), (CONVERTED, False))
    assert plan.cached_components == {"text encoder", "transformer", "VAE decoder"}
    assert plan.peak_bytes - plan.base_bytes < 50e6
    assert 0 < plan.seconds < 10


def test_nothing_is_loaded_to_make_a_plan(opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened()

    def take(*given: object, **more: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(engine.components.module_cache, "acquire", take)
    engine.plan(replace(REQUEST, guidance=3.0))


def test_the_second_request_loads_nothing_again(opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, loaded = opened(), []
    load = Checkpoint.load_transformer
    monkeypatch.setattr(Checkpoint, "load_transformer", lambda *a, **k: loaded.append("transformer") or load(*a, **k))
    vae = Checkpoint.load_vae
    monkeypatch.setattr(Checkpoint, "load_vae", lambda *a, **k: loaded.append("vae") or vae(*a, **k))
    first = engine.generate(REQUEST).frames
    assert loaded == ["transformer", "vae"]
    assert (engine.generate(replace(REQUEST, seed=1)).frames != first).any()
    assert (engine.generate(REQUEST).frames == first).all()
    assert loaded == ["transformer", "vae"]


@pytest.mark.parametrize(
    "offload, streamed, kept", [("none", False, True), ("stages", False, False), ("blocks", True, True)]
)
def test_offload_says_what_leaves_memory(
    opened: Callable[..., Engine], offload: str, streamed: bool, kept: bool
) -> None:
    engine = opened(offload=offload)
    plan = engine.plan(REQUEST)
    assert ways(plan)["denoise"][1] is streamed
    assert bool(plan.cached_components) is kept
    engine.generate(REQUEST)
    assert engine.components.module_cache.cached_names == plan.cached_components


@pytest.mark.parametrize(
    "how", [{"offload": "blocks"}, {"offload": "stages"}, {"offload": "blocks", "dtype": "bfloat16"}]
)
def test_the_same_video_comes_out_however_it_is_held(opened: Callable[..., Engine], how: dict[str, str]) -> None:
    plain = {key: value for key, value in how.items() if key == "dtype"}
    right = opened(**plain).generate(REQUEST)
    made = opened(**how).generate(REQUEST)
    assert torch.equal(made.latents, right.latents)
    assert (made.frames == right.frames).all()


def test_blocks_come_and_go_where_the_transformer_does_not_fit(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened()
    roomy = engine.plan(REQUEST).stage("denoise")
    streamed = next(choice for choice in roomy.fallbacks if choice.streamed_blocks)
    assert streamed.device_bytes < roomy.placement.device_bytes
    monkeypatch.setattr(planner, "RESERVED_FRACTION", 0.0)
    needs = {stage.stage: stage.placement.device_bytes for stage in engine.plan(REQUEST).stages}
    if max(needs["text"], needs["decode"]) < roomy.placement.device_bytes:
        with_free(monkeypatch, roomy.placement.device_bytes - 1)
        plan = engine.plan(REQUEST)
        assert ways(plan)["denoise"] == (AS_STORED, True)
        assert any(re.search(r"denoise: .*come and go, because .* do not fit into", why) for why in plan.reasons())


def test_the_decoder_hands_on_fewer_frames_where_memory_is_short(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, long = opened(), replace(REQUEST, frames=121, size=(96, 96))
    right = engine.plan(long).stage("decode")
    choices = [right.placement, *right.fallbacks]
    packs = should_prepack_convs(torch.float32, torch.device("cpu"))
    ways = [(4, 4), (4, 2), (2, 2), (1, 2)] if packs else [(4, 0), (2, 0), (1, 0)]
    assert [(choice.chunk_frames, choice.winograd_frames) for choice in choices] == ways
    assert all(more.device_bytes > less.device_bytes for more, less in pairwise(choices))
    frames = opened().generate(replace(long, frames=25)).frames
    monkeypatch.setattr(planner, "RESERVED_FRACTION", 0.0)
    for choice in right.fallbacks:
        with_free(monkeypatch, choice.device_bytes)
        engine = opened()
        assert engine.plan(long).stage("decode").placement.chunk_frames == choice.chunk_frames
        assert engine.plan(long).stage("decode").placement.winograd_frames == choice.winograd_frames
        apart = np.abs(engine.generate(replace(long, frames=25)).frames.astype(int) - frames)
        assert apart.max() <= 1  # a number that lay between two
        assert apart.mean() < 1e-3


def test_what_does_not_fit_is_refused_before_anything_is_loaded_with_what_would(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened()
    big = replace(REQUEST, size=(1024, 1024), frames=121)
    monkeypatch.setattr(planner, "RESERVED_FRACTION", 0.0)
    with_free(monkeypatch, engine.plan(replace(big, size=(512, 512))).peak_bytes - engine.plan(big).base_bytes)
    monkeypatch.setattr(engine.components.module_cache, "acquire", lambda *a, **k: pytest.fail("something was loaded"))
    with pytest.raises(PlanError, match=r"are missing\. What would fit: .*--size \d+x\d+ --frames \d+\.") as said:
        engine.generate(big)
    assert said.value.shortfall > 0
    width, height, frames = map(int, re.findall(r"--size (\d+)x(\d+) --frames (\d+)", str(said.value))[0])
    fitting = replace(big, size=(width, height), frames=frames)
    assert engine.plan(fitting).stages  # what is advised does fit
    assert width * height * frames < 1024 * 1024 * 121


def test_where_nothing_fits_it_says_so(opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened()
    with_free(monkeypatch, 1000)
    with pytest.raises(PlanError, match=r"Nothing smaller fits either"):
        engine.plan(REQUEST)


def test_conditions_and_guidance_are_in_the_plan(opened: Callable[..., Engine], tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    engine = opened()
    plain = engine.plan(REQUEST)
    held = engine.plan(replace(REQUEST, conditions=(Condition(str(tmp_path / "a.png"), frame=0),)))
    assert [stage.stage for stage in held.stages] == ["text", "encode", "denoise", "decode"]
    extra = engine.plan(replace(REQUEST, conditions=(Condition(str(tmp_path / "a.png"), frame=8),)))
    assert (
        extra.stage("denoise").placement.workspace_bytes
        > held.stage("denoise").placement.workspace_bytes
        > plain.stage("denoise").placement.workspace_bytes
    )
    together = engine.plan(replace(REQUEST, guidance=3.0, guidance_batch=True))
    assert together.stage("denoise").placement.workspace_bytes > plain.stage("denoise").placement.workspace_bytes


@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "fp8", "fp8-weights", "Q8_0", "q4_0"])
def test_a_scheme_halves_the_weights_or_more_and_makes_a_video(
    opened: Callable[..., Engine], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_placement.fp8, "has_units", lambda device: True)
    monkeypatch.setattr(module_placement.fp8, "way", lambda device, dtype: module_placement.fp8.FP32_MATMUL)
    plain, engine = opened(), opened(quant=scheme)
    full, less = (e.plan(REQUEST).stage("denoise").placement for e in (plain, engine))
    assert less.private_bytes < 0.5 * (full.private_bytes + full.mapped_bytes)
    right, made = plain.generate(REQUEST), engine.generate(REQUEST)
    assert 0 < relative(made.latents, right.latents) < 0.2


def test_auto_stores_weights_in_8_bits_only_where_the_files_own_do_not_fit(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(quant="auto", dtype="bfloat16", offload="none")
    monkeypatch.setattr(planner, "RESERVED_FRACTION", 0.0)
    assert ways(engine.plan(REQUEST))["denoise"] == (CONVERTED, False)
    holds = [choice.weight_format for choice in engine.plan(REQUEST).stage("denoise").fallbacks]
    assert holds == [AS_STORED, "int8" if planner.has_fast_int8() else "int8-weights"]  # the file is in float32


@pytest.mark.parametrize(
    "kind, scheme", [(torch.float8_e4m3fn, "int8"), (torch.float8_e4m3fn, "fp8-weights"), (torch.float8_e5m2, "fp8")]
)
def test_an_fp8_file_is_not_rounded_again(home: Path, tmp_path: Path, kind: torch.dtype, scheme: str) -> None:
    tiny_models.write_model(tmp_path)
    cast_as_released(tmp_path / tiny_models.MODEL_FILE, kind)
    with pytest.raises(
        CheckpointError, match=rf"is stored as float8_\w+ already, and to round it to {scheme} would lose"
    ):
        Engine.open(tmp_path / tiny_models.MODEL_FILE, quant=scheme)


def test_an_fp8_file_is_multiplied_in_8_bits_as_it_is_where_a_gpu_does_that(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.write_model(tmp_path)
    cast_as_released(tmp_path / tiny_models.MODEL_FILE, torch.float8_e4m3fn)
    monkeypatch.setattr(module_placement.fp8, "has_units", lambda device: True)
    monkeypatch.setattr(module_placement.fp8, "way", lambda device, dtype: module_placement.fp8.FP32_MATMUL)
    monkeypatch.setattr(components, "may_be_rotated", lambda checkpoint: False)  # nobody trained it
    plain, engine = (Engine.open(tmp_path / tiny_models.MODEL_FILE, quant=quant) for quant in (None, "fp8"))
    for opened in (plain, engine):
        opened.components.apply_plan(opened.plan(REQUEST))
    with plain.components.transformer() as right, engine.components.transformer() as made:
        assert {type(layer) for layer in made.blocks[0].modules() if hasattr(layer, "scale")} == {Fp8Linear}
        stored = made.blocks[0].self_attention.q.weight
        assert torch.equal(stored.float(), right.blocks[0].self_attention.q.weight.float())
    assert 0 < relative(engine.generate(REQUEST).latents, plain.generate(REQUEST).latents) < 0.2


def test_a_module_that_waits_holds_no_buffer_for_unpacked_weights(opened: Callable[..., Engine]) -> None:
    """A weight of 13B unpacked is 134 MB, and the decoder's stage was planned without it."""
    engine = opened(quant="int8-weights")
    engine.generate(REQUEST)
    assert "transformer" in engine.components.module_cache.cached_names
    with engine.components.transformer() as transformer:
        layer = transformer.blocks[0].feed_forward.up
        assert not layer.scratch._buffers
        layer(torch.zeros(1, layer.columns, dtype=engine.components.dtype))
        assert layer.scratch._buffers
    assert not layer.scratch._buffers


def test_where_no_8_bit_floats_are_multiplied_weights_alone_are_stored_so_and_it_is_said(
    opened: Callable[..., Engine], tmp_path: Path
) -> None:
    with pytest.warns(KadrWarning, match=r"cpu does not multiply 8-bit floats.*\(fp8-weights\)"):
        engine = opened(quant="fp8")
    assert engine.components.quant == "fp8-weights"
    tiny_models.write_model(tmp_path / "cast")
    cast_as_released(tmp_path / "cast" / tiny_models.MODEL_FILE, torch.float8_e4m3fn)
    with pytest.warns(KadrWarning, match="cpu does not multiply 8-bit floats"):
        engine = Engine.open(tmp_path / "cast" / tiny_models.MODEL_FILE, quant="fp8")
    assert engine.components.quant == "none"


def test_without_fast_int8_weights_alone_are_stored_so_and_it_is_said(
    opened: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_placement, "has_fast_int8", lambda: False)
    with pytest.warns(KadrWarning, match=r"no instructions for products in 8 bits \(VNNI\).*\(int8-weights\)"):
        engine = opened(quant="int8")
    assert engine.plan(REQUEST).stage("denoise").placement.weight_format == "int8-weights"


@pytest.mark.parametrize(
    "how, said", [({"quant": "int3"}, "quant is 'int3'; it must be one of"), ({"offload": "cpu"}, "offload is 'cpu'")]
)
def test_unknown_ways_are_refused(opened: Callable[..., Engine], how: dict[str, str], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        opened(**how)


def test_weighing_a_header_is_what_the_modules_take(home: Path) -> None:
    checkpoint = Checkpoint.open(home / tiny_models.MODEL_FILE)
    source = checkpoint.sources["transformer"]
    for dtype in (torch.float32, torch.bfloat16):
        weights = weight_bytes(source, dtype, CONVERTED)
        module = checkpoint.load_transformer(dtype)
        assert weights.mapped + weights.private == sum(w.nbytes for w in module.state_dict().values())
        assert (weights.private == 0) is (dtype == source.dtype)
        assert weights.num_blocks == len(module.blocks)


def test_streamed_blocks_lie_as_far_from_each_other_as_can_be() -> None:
    assert spread_blocks(28, 4) == {0, 7, 14, 21}
    assert spread_blocks(5, 5) == {0, 1, 2, 3, 4}
    assert len(spread_blocks(48, 31)) == 31
