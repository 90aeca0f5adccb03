"""Plans of requests: the placements to choose from, the one chosen, and the suggestion if none fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.errors import CheckpointError, KadrWarning, PlanError, RequestError
from kadr.kernels import fp8
from kadr.memory.device import has_fast_int8
from kadr.pipeline.engine import Engine
from kadr.pipeline.loading import module_loader
from kadr.pipeline.loading.module_placement import spread_blocks
from kadr.planning import planner
from kadr.planning.calibration.storage import current_calibration
from kadr.planning.costs import images
from kadr.planning.costs.weight_bytes import weight_bytes
from kadr.planning.placement import AS_STORED, CONVERTED
from kadr.planning.plan import Plan
from kadr.planning.timing.transformer import text_encoder_seconds
from kadr.quant.layers import Fp8Linear
from kadr.quant.prepack import should_prepack_convs
from kadr.request.inputs import Condition
from kadr.request.request import Request
from kadr.shapes import Size
from kadr.spec import options
from tests import tiny_models
from tests.checkpoints.test_load import cast_as_released

CPU = torch.device("cpu")
REQUEST = Request(prompt="a red circle", size=(64, 64), frames=9, steps=2, guidance=1.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def open_engine(home: Path) -> Callable[..., Engine]:
    def open_engine(**settings: object) -> Engine:
        return Engine.open(
            home / tiny_models.MODEL_FILE, prompt_cache=False, **{"device": "cpu", "dtype": "float32", **settings}
        )

    return open_engine


def set_free_bytes(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Lets the planner find so many free bytes."""
    monkeypatch.setattr(planner, "free_bytes", lambda device: size)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def formats_and_streaming(plan: Plan) -> dict[str, tuple[str, bool]]:
    return {
        stage.stage: (stage.placement.weight_format, bool(stage.placement.streamed_blocks)) for stage in plan.stages
    }


def test_with_free_memory_all_components_are_converted_and_cached(open_engine: Callable[..., Engine]) -> None:
    plan = open_engine().plan(REQUEST)
    assert formats_and_streaming(plan) == dict.fromkeys(("text", "denoise", "decode"), (CONVERTED, False))
    assert plan.cached_components == {"text encoder", "transformer", "VAE decoder"}
    assert plan.peak_bytes - plan.base_bytes < 50e6
    assert 0 < plan.seconds < 10


def test_text_stage_is_planned_for_the_tokens_of_the_prompts(open_engine: Callable[..., Engine]) -> None:
    engine = open_engine()
    short, long = (replace(REQUEST, prompt=prompt) for prompt in ("a red circle", "circle " * 120))
    text_encoder, calibration = engine.spec.text_encoder_checkpoint.config, current_calibration(torch.float32, CPU)
    seconds, workspaces = [], []
    for request in (short, long, replace(long, guidance=3.0, negative_prompt="a red circle")):
        placement, prompts = engine.plan(request).stage("text").placement, engine.resolve(request).all_prompts
        tokens = tuple(int(engine.spec.tokenizer.encode(prompt).mask.sum()) for prompt in prompts)
        seconds.append(placement.seconds)
        workspaces.append(placement.workspace_bytes)
        assert placement.seconds == pytest.approx(text_encoder_seconds(calibration, text_encoder, tokens, 0.0))
    assert seconds[2] == pytest.approx(seconds[0] + seconds[1])  # prompts are encoded one after the other
    assert seconds[1] > 5 * seconds[0]
    assert workspaces[0] < workspaces[1] == workspaces[2]


def test_planning_loads_nothing(open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine()

    def acquire(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(engine._model.module_cache, "acquire", acquire)
    engine.plan(replace(REQUEST, guidance=3.0))


def test_second_request_loads_nothing(open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, loaded = open_engine(), []
    load_transformer, load_vae = Checkpoint.load_transformer, Checkpoint.load_vae
    monkeypatch.setattr(
        Checkpoint, "load_transformer", lambda *a, **k: loaded.append("transformer") or load_transformer(*a, **k)
    )
    monkeypatch.setattr(Checkpoint, "load_vae", lambda *a, **k: loaded.append("vae") or load_vae(*a, **k))
    first = engine.generate(REQUEST).frames
    assert loaded == ["transformer", "vae"]
    assert (engine.generate(replace(REQUEST, seed=1)).frames != first).any()
    assert (engine.generate(REQUEST).frames == first).all()
    assert loaded == ["transformer", "vae"]


@pytest.mark.parametrize(
    "offload, is_streamed, is_cached", [("none", False, True), ("stages", False, False), ("blocks", True, True)]
)
def test_offload_decides_what_leaves_memory(
    open_engine: Callable[..., Engine], offload: str, is_streamed: bool, is_cached: bool
) -> None:
    engine = open_engine(offload=offload)
    plan = engine.plan(REQUEST)
    assert formats_and_streaming(plan)["denoise"][1] is is_streamed
    assert bool(plan.cached_components) is is_cached
    engine.generate(REQUEST)
    assert engine._model.module_cache.cached_names == plan.cached_components


@pytest.mark.parametrize(
    "settings", [{"offload": "blocks"}, {"offload": "stages"}, {"offload": "blocks", "dtype": "bfloat16"}]
)
def test_offload_does_not_change_the_video(open_engine: Callable[..., Engine], settings: dict[str, str]) -> None:
    without_offload = {key: value for key, value in settings.items() if key == "dtype"}
    expected = open_engine(**without_offload).generate(REQUEST)
    video = open_engine(**settings).generate(REQUEST)
    assert torch.equal(video.latents, expected.latents)
    assert (video.frames == expected.frames).all()


def test_blocks_are_streamed_if_the_transformer_does_not_fit(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    resident = engine.plan(REQUEST).stage("denoise")
    streamed = next(placement for placement in resident.fallbacks if placement.streamed_blocks)
    assert streamed.device_bytes < resident.placement.device_bytes
    monkeypatch.setattr(planner, "RESERVED_FRACTION", 0.0)
    stage_bytes = {stage.stage: stage.placement.device_bytes for stage in engine.plan(REQUEST).stages}
    if max(stage_bytes["text"], stage_bytes["decode"]) < resident.placement.device_bytes:
        set_free_bytes(monkeypatch, resident.placement.device_bytes - 1)
        plan = engine.plan(REQUEST)
        assert formats_and_streaming(plan)["denoise"] == (AS_STORED, True)
        pattern = r"denoise: .*blocks are streamed, because .* do not fit into"
        assert any(re.search(pattern, reason) for reason in plan.reasons())


def test_decoder_uses_smaller_chunks_if_memory_is_short(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, long_request = open_engine(), replace(REQUEST, frames=121, size=(96, 96))
    decode = engine.plan(long_request).stage("decode")
    placements = [decode.placement, *decode.fallbacks]
    is_prepacked = should_prepack_convs(torch.float32, CPU)
    expected = [(4, 4), (4, 2), (2, 2), (1, 2)] if is_prepacked else [(4, 0), (2, 0), (1, 0)]
    assert [(placement.chunk_frames, placement.winograd_frames) for placement in placements] == expected
    assert all(larger.device_bytes > smaller.device_bytes for larger, smaller in pairwise(placements))
    frames = open_engine().generate(replace(long_request, frames=25)).frames
    monkeypatch.setattr(planner, "RESERVED_FRACTION", 0.0)
    for fallback in decode.fallbacks:
        set_free_bytes(monkeypatch, fallback.device_bytes)
        engine = open_engine()
        assert engine.plan(long_request).stage("decode").placement.chunk_frames == fallback.chunk_frames
        assert engine.plan(long_request).stage("decode").placement.winograd_frames == fallback.winograd_frames
        difference = np.abs(engine.generate(replace(long_request, frames=25)).frames.astype(int) - frames)
        assert difference.max() <= 1  # a value between two integers
        assert difference.mean() < 1e-3


def test_no_fit_is_refused_before_loading_with_a_suggestion(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    big = replace(REQUEST, size=(1024, 1024), frames=121)
    monkeypatch.setattr(planner, "RESERVED_FRACTION", 0.0)
    set_free_bytes(monkeypatch, engine.plan(replace(big, size=(512, 512))).peak_bytes - engine.plan(big).base_bytes)
    monkeypatch.setattr(engine._model.module_cache, "acquire", lambda *a, **k: pytest.fail("something was loaded"))
    with pytest.raises(PlanError, match=r"are missing\. These would fit: .*size=\d+x\d+ frames=\d+\.") as raised:
        engine.generate(big)
    assert raised.value.shortfall > 0
    assert set(raised.value.smaller) == {"size", "frames"}
    assert "size={size} frames={frames}".format(**raised.value.smaller) in str(raised.value)
    fitting = replace(big, **raised.value.smaller)
    assert engine.plan(fitting).stages  # the suggestion does fit
    assert isinstance(fitting.size, Size)
    assert fitting.size.width * fitting.size.height * (fitting.frames or 0) < 1024 * 1024 * 121


def test_memory_that_another_process_will_free_counts_as_free(open_engine: Callable[..., Engine]) -> None:
    engine = open_engine()
    plain, more = engine.plan(REQUEST), engine.plan(REQUEST, reclaimable_bytes=10**12)
    assert 0.9e12 < more.free_bytes - plain.free_bytes < 1e12


def test_no_suggestion_if_nothing_smaller_fits(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine()
    set_free_bytes(monkeypatch, 1000)
    with pytest.raises(PlanError, match=r"Nothing smaller fits either"):
        engine.plan(REQUEST)


def test_conditions_and_guidance_add_to_the_plan(open_engine: Callable[..., Engine], tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    engine = open_engine()
    plain = engine.plan(REQUEST)
    first_frame = engine.plan(replace(REQUEST, conditions=(Condition(str(tmp_path / "a.png"), frame=0),)))
    assert [stage.stage for stage in first_frame.stages] == ["text", "encode", "denoise", "decode"]
    keyframe = engine.plan(replace(REQUEST, conditions=(Condition(str(tmp_path / "a.png"), frame=8),)))
    assert (
        keyframe.stage("denoise").placement.workspace_bytes
        > first_frame.stage("denoise").placement.workspace_bytes
        > plain.stage("denoise").placement.workspace_bytes
    )
    batched = engine.plan(replace(REQUEST, guidance=3.0, guidance_batch=True))
    assert batched.stage("denoise").placement.workspace_bytes > plain.stage("denoise").placement.workspace_bytes


@pytest.mark.filterwarnings("ignore:this CPU has no instructions for int8")  # int8-weights stands in for it there
@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "fp8", "fp8-weights", "Q8_0", "q4_0"])
def test_quant_halves_weight_bytes_and_keeps_the_video_close(
    open_engine: Callable[..., Engine], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "has_fp8_units", lambda device: True)
    monkeypatch.setattr(fp8, "select_matmul", lambda device, dtype: fp8.FP32_MATMUL)
    plain, engine = open_engine(), open_engine(quant=scheme)
    full, quantized = (e.plan(REQUEST).stage("denoise").placement for e in (plain, engine))
    assert quantized.private_bytes < 0.5 * (full.private_bytes + full.mapped_bytes)
    expected, video = plain.generate(REQUEST), engine.generate(REQUEST)
    assert 0 < relative_error(video.latents, expected.latents) < 0.2


def test_auto_quant_uses_8_bits_only_if_stored_weights_do_not_fit(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(quant="auto", dtype="bfloat16", offload="none")
    monkeypatch.setattr(planner, "RESERVED_FRACTION", 0.0)
    assert formats_and_streaming(engine.plan(REQUEST))["denoise"] == (CONVERTED, False)
    formats = [placement.weight_format for placement in engine.plan(REQUEST).stage("denoise").fallbacks]
    in_8_bits = "int8" if has_fast_int8(CPU) else "int8-weights"
    assert formats == [AS_STORED, in_8_bits]  # the file is in float32


@pytest.mark.parametrize(
    "dtype, scheme", [(torch.float8_e4m3fn, "int8"), (torch.float8_e4m3fn, "fp8-weights"), (torch.float8_e5m2, "fp8")]
)
def test_fp8_file_is_not_quantized_again(home: Path, tmp_path: Path, dtype: torch.dtype, scheme: str) -> None:
    tiny_models.write_model(tmp_path)
    cast_as_released(tmp_path / tiny_models.MODEL_FILE, dtype)
    with pytest.raises(
        CheckpointError, match=rf"is stored as float8_\w+ already; quantizing it to {scheme} would lose"
    ):
        Engine.open(tmp_path / tiny_models.MODEL_FILE, quant=scheme)


def test_fp8_file_is_multiplied_as_stored_with_fp8_units(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.write_model(tmp_path)
    cast_as_released(tmp_path / tiny_models.MODEL_FILE, torch.float8_e4m3fn)
    monkeypatch.setattr(fp8, "has_fp8_units", lambda device: True)
    monkeypatch.setattr(fp8, "select_matmul", lambda device, dtype: fp8.FP32_MATMUL)
    monkeypatch.setattr(module_loader, "may_be_rotated", lambda checkpoint: False)  # it is not trained
    plain, engine = (Engine.open(tmp_path / tiny_models.MODEL_FILE, quant=quant) for quant in (None, "fp8"))
    with (
        plain.start(REQUEST) as plain_generation,
        engine.start(REQUEST) as generation,
        plain_generation.modules.transformer() as expected,
        generation.modules.transformer() as transformer,
    ):
        assert {type(layer) for layer in transformer.blocks[0].modules() if hasattr(layer, "scale")} == {Fp8Linear}
        stored = transformer.blocks[0].self_attention.q.weight
        assert torch.equal(stored.float(), expected.blocks[0].self_attention.q.weight.float())
    assert 0 < relative_error(engine.generate(REQUEST).latents, plain.generate(REQUEST).latents) < 0.2


def test_cached_module_keeps_no_dequantization_buffer(open_engine: Callable[..., Engine]) -> None:
    """A dequantized weight of 13B is 134 MB, and the plan of the decode stage does not count it."""
    engine = open_engine(quant="int8-weights")
    engine.generate(REQUEST)
    assert "transformer" in engine._model.module_cache.cached_names
    with engine.start(REQUEST) as generation, generation.modules.transformer() as transformer:
        layer = transformer.blocks[0].feed_forward.up
        assert not layer.scratch._buffers
        layer(torch.zeros(1, layer.in_features, dtype=engine.spec.dtype))
        assert layer.scratch._buffers
    assert not layer.scratch._buffers


def test_without_fp8_units_only_weights_are_fp8_with_a_warning(
    open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    with pytest.warns(KadrWarning, match=r"cpu has no fp8 matmuls.*fp8-weights is used instead"):
        engine = open_engine(quant="fp8")
    assert engine.spec.quant == "fp8-weights"
    tiny_models.write_model(tmp_path / "cast")
    cast_as_released(tmp_path / "cast" / tiny_models.MODEL_FILE, torch.float8_e4m3fn)
    with pytest.warns(KadrWarning, match="cpu has no fp8 matmuls"):
        engine = Engine.open(tmp_path / "cast" / tiny_models.MODEL_FILE, quant="fp8")
    assert engine.spec.quant == "none"


def test_without_int8_units_only_weights_are_int8_with_a_warning(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "has_fast_int8", lambda device: False)
    with pytest.warns(KadrWarning, match=r"no instructions for int8 matmuls \(VNNI\).*int8-weights is used instead"):
        engine = open_engine(quant="int8")
    assert engine.plan(REQUEST).stage("denoise").placement.weight_format == "int8-weights"


@pytest.mark.parametrize(
    "settings, message",
    [({"quant": "int3"}, "quant is 'int3'; it must be one of"), ({"offload": "cpu"}, "offload is 'cpu'")],
)
def test_unknown_quant_and_offload_are_refused(
    open_engine: Callable[..., Engine], settings: dict[str, str], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        open_engine(**settings)


def test_weight_bytes_from_the_header_match_the_module(home: Path) -> None:
    checkpoint = Checkpoint.open(home / tiny_models.MODEL_FILE)
    source = checkpoint.sources["transformer"]
    for dtype in (torch.float32, torch.bfloat16):
        weights = weight_bytes(source, dtype, CONVERTED)
        module = checkpoint.load_transformer(dtype)
        assert weights.mapped + weights.private == sum(w.nbytes for w in module.state_dict().values())
        assert (weights.private == 0) is (dtype == source.dtype)
        assert weights.num_blocks == len(module.blocks)


def test_streamed_blocks_are_spread_evenly() -> None:
    assert spread_blocks(28, 4) == {0, 7, 14, 21}
    assert spread_blocks(5, 5) == {0, 1, 2, 3, 4}
    assert len(spread_blocks(48, 31)) == 31


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize(
    ("sides", "bytes_per_pixel"),
    [((4000, 3000), 15 * 3 / 4), ((4000, 100), 15 / 40), ((10000, 6000), 15 / 4 * 3 / 5), ((100, 100), 15)],
    ids=str,
)
def test_a_plan_counts_the_preparation_of_an_image(
    open_engine: Callable[..., Engine],
    tmp_path: Path,
    sides: tuple[int, int],
    bytes_per_pixel: float,
    suffix: str,
) -> None:
    pixels, path = sides[0] * sides[1], tmp_path / f"photo.{suffix}"
    Image.new("L", sides).save(path)
    decoded_bytes = 4 * pixels * (1 if pixels < 50e6 else 1.25 if suffix == "png" else 0.25)
    expected = images.IMAGE_LIBRARY_BYTES + max(bytes_per_pixel * pixels, decoded_bytes)
    plan = open_engine().plan(replace(REQUEST, conditions=(Condition(str(path)),)))
    assert plan.stage("encode").placement.device_bytes == pytest.approx(expected, rel=0.05)
    assert plan.peak_bytes >= plan.base_bytes + expected * 0.95
