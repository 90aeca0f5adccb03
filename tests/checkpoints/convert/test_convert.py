"""A converted checkpoint is the same model to kadr and to diffusers, and comes back with the same bits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kadr.cancellation import CancelToken, cancellable
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.convert import convert as convert_module
from kadr.checkpoints.convert.convert import convert_checkpoint
from kadr.checkpoints.convert.diffusers_configs import vae_json
from kadr.checkpoints.detect.diffusers_folder import read_vae_config
from kadr.checkpoints.gguf.convert import transformer_to_gguf
from kadr.checkpoints.keys import VAE_UNUSED_KEYS
from kadr.checkpoints.save import write_single_file
from kadr.errors import Cancelled, CheckpointError
from kadr.models.registry import DISTILLED_SIGMAS
from kadr.models.transformer import TRANSFORMER_13B, Transformer
from kadr.models.vae import VAE
from kadr.quant.mixes import find_mix
from kadr.sampling.schedules import Schedule
from tests import oracles, tiny_models
from tests.checkpoints.checkpoint_files import official_metadata, single_file_shapes, write_sparse
from tests.tiny_models import LINEAR_QUADRATIC, MODEL_FILE, SHIFTED

FAMILIES = ["0.9", "0.9.1", "0.9.5"]


def write_tiny(folder: Path, family: str = "0.9.5", *, schedule: Schedule | None = None) -> Path:
    """Writes a model whose positions and sigmas are those of its family, and returns the file."""
    is_new = family == "0.9.5"
    schedule = schedule or (LINEAR_QUADRATIC if is_new else SHIFTED)
    return tiny_models.write_model(folder, family=family, is_causal=is_new, schedule=schedule) / MODEL_FILE


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp(f"family{request.param}"), request.param)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


def convert(source: Path, out: Path, **options: object) -> Path:
    convert_checkpoint(Checkpoint.open(source), out, **options)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_the_folder_with_the_same_tensors(tmp_path: Path, family: str) -> None:
    config = replace(tiny_models.transformer_config(is_causal=family == "0.9.5"), in_channels=12)
    ours = tiny_models.build_random(lambda: Transformer(config), 1)
    our_vae = tiny_models.build_random(lambda: VAE(oracles.narrow_vae_config(oracles.VAES[family])), 2)
    schedule = LINEAR_QUADRATIC if family == "0.9.5" else SHIFTED
    file = tmp_path / "x.safetensors"
    write_single_file(file, transformer=ours, vae=our_vae, schedule=schedule, dtype=torch.float32)
    folder = convert(file, tmp_path / "folder")
    transformer = LTXVideoTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    vae = AutoencoderKLLTXVideo.from_pretrained(folder, subfolder="vae")
    for loaded, expected in (
        (transformer, oracles.diffusers_transformer(ours)),
        (vae, oracles.diffusers_vae(our_vae, family)),
    ):
        assert same_bits(dict(loaded.state_dict()), dict(expected.state_dict()))
        assert public_config(loaded) == public_config(expected)


def public_config(model: Any) -> dict[str, Any]:
    """Returns the config of a diffusers model, with lists for tuples and without what it records of its file."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return json.loads(json.dumps(config))


def test_diffusers_pipeline_loads_the_folder(tiny: Path, tmp_path: Path) -> None:
    folder = convert(tiny, tmp_path / "folder")
    pipeline = LTXPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    assert pipeline.transformer.config.num_layers == 2
    assert pipeline.text_encoder is None
    assert not pipeline.scheduler.config.use_dynamic_shifting


def test_single_file_comes_back_bit_for_bit(model: Path, tmp_path: Path) -> None:
    back = convert(convert(model, tmp_path / "folder"), tmp_path / "back.safetensors")
    assert same_bits(load_file(model), load_file(back))
    original, returned = Checkpoint.open(model).info, Checkpoint.open(back).info
    assert replace(returned, version=original.version, release=original.release) == original


def test_folder_comes_back_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    first = convert(tiny, tmp_path / "first")
    second = convert(convert(first, tmp_path / "x.safetensors"), tmp_path / "second")
    files = sorted(file.relative_to(first) for file in first.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(second) for file in second.rglob("*") if file.is_file())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_kadr_opens_folder_and_file_as_the_same_model(model: Path, tmp_path: Path) -> None:
    info, folder_info = Checkpoint.open(model).info, Checkpoint.open(convert(model, tmp_path / "folder")).info
    assert folder_info == replace(info, layout="diffusers")


def test_sigmas_of_a_distilled_model_survive_both_ways(tmp_path: Path) -> None:
    schedule = replace(LINEAR_QUADRATIC, allowed_sigmas=DISTILLED_SIGMAS)
    file = write_tiny(tmp_path / "tiny", schedule=schedule)
    folder = convert(file, tmp_path / "folder")
    assert Checkpoint.open(folder).info.schedule == schedule
    assert Checkpoint.open(convert(folder, tmp_path / "x.safetensors")).info.schedule == schedule


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("out", ["folder", "x.safetensors"])
def test_every_tensor_gets_the_dtype_that_is_asked_for(
    tiny: Path, tmp_path: Path, dtype: torch.dtype, out: str
) -> None:
    path = convert(tiny, tmp_path / out, dtype=dtype)
    ours, original = Checkpoint.open(path), Checkpoint.open(tiny)
    for source in ours.sources.values():
        assert {info.dtype for info in source.infos.values()} == {dtype}
    for name, module in (("transformer", "load_transformer"), ("vae", "load_vae")):
        converted = getattr(ours, module)().state_dict()
        expected = getattr(original, module)().state_dict()
        assert all(torch.equal(converted[key], expected[key].to(dtype)) for key in expected), name


@pytest.mark.parametrize("value", [70_000.0, -1e30])
def test_value_beyond_float16_is_refused_and_nothing_written(tmp_path: Path, value: float) -> None:
    file = tiny_models.write_model(
        tmp_path / "tiny",
        weight_edits={"transformer": lambda module: module.proj_out.bias.fill_(value)},
    )
    message = r"the tensor proj_out\.bias reaches .*; the maximum of float16 is 65504\. Use another dtype"
    for out in ("folder", "x.safetensors"):
        with pytest.raises(CheckpointError, match=message):
            convert(file / MODEL_FILE, tmp_path / out, dtype=torch.float16)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny"]
    convert(file / MODEL_FILE, tmp_path / "folder", dtype=torch.bfloat16)


def test_value_that_is_not_finite_is_refused_in_another_dtype(tmp_path: Path) -> None:
    home = tiny_models.write_model(
        tmp_path / "tiny", weight_edits={"vae": lambda module: module.statistics.mean.fill_(float("nan"))}
    )
    with pytest.raises(CheckpointError, match="has NaN or infinity in it"):
        convert(home / MODEL_FILE, tmp_path / "folder", dtype=torch.bfloat16)


@pytest.mark.parametrize("change, message", [("missing", "1 tensors missing"), ("unexpected", "1 tensors unexpected")])
@pytest.mark.parametrize("from_folder", [False, True])
def test_every_tensor_is_accounted_for(
    tiny: Path, tmp_path: Path, change: str, message: str, from_folder: bool
) -> None:
    if from_folder:
        source = convert(tiny, tmp_path / "source")
        file, prefix = source / "transformer" / "diffusion_pytorch_model.safetensors", ""
    else:
        source = file = tmp_path / "source.safetensors"
        shutil.copy(tiny, file)
        prefix = "model.diffusion_model."
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    if change == "missing":
        del tensors[f"{prefix}proj_out.bias"]
    else:
        tensors[f"{prefix}transformer_blocks.0.extra"] = torch.zeros(2)
    save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / ("x.safetensors" if from_folder else "folder"))
    assert not (tmp_path / "folder").exists()


def test_statistics_that_nothing_reads_are_left_out_and_said(tiny: Path, tmp_path: Path) -> None:
    with safe_open(tiny, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(tiny)
    tensors |= {f"vae.{key}": torch.zeros(tiny_models.CHANNELS) for key in VAE_UNUSED_KEYS}
    save_file(tensors, tmp_path / "full.safetensors", metadata)
    result = convert_checkpoint(Checkpoint.open(tmp_path / "full.safetensors"), tmp_path / "folder")
    assert result.notes == (f"left out, because nothing reads them: {', '.join(VAE_UNUSED_KEYS)}",)


@pytest.mark.parametrize("upscales_time", [False, True])
def test_upscaler_goes_both_ways_and_diffusers_loads_it(tmp_path: Path, upscales_time: bool) -> None:
    file = tiny_models.write_random_upscaler(
        tmp_path / "up.safetensors", upscales_space=not upscales_time, upscales_time=upscales_time
    )
    folder = convert(file, tmp_path / "folder")
    loaded = LTXLatentUpsamplerModel.from_pretrained(folder, subfolder="latent_upsampler")
    assert same_bits(dict(loaded.state_dict()), load_file(file))
    back = convert(folder, tmp_path / "back.safetensors")
    assert same_bits(load_file(file), load_file(back))
    assert Checkpoint.open(back).info.upscaler == Checkpoint.open(file).info.upscaler


@pytest.mark.parametrize("family", FAMILIES)
def test_config_of_a_released_vae_is_the_published_one(family: str) -> None:
    config = tiny_models.VAES[family]
    written = vae_json(config, family)
    released = oracles.DIFFUSERS_VAES[family].items()
    published = {key: list(value) if isinstance(value, tuple) else value for key, value in released}
    for key in ("block_out_channels", "decoder_block_out_channels"):
        published[key] = [128 * width for width in published[key]]
    assert {key: written[key] for key in published} == published
    assert read_vae_config(written, Path("vae")) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"is_causal": False}, "has no place for causal_temporal_positioning = False"),
        ({"schedule": Schedule(sampler="Uniform")}, "has no place for sampler = 'Uniform'"),
    ],
)
def test_model_that_diffusers_cannot_express_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    home = tiny_models.write_model(tmp_path / "tiny", **change)
    with pytest.raises(CheckpointError, match=message):
        convert(home / MODEL_FILE, tmp_path / "folder")


def test_demo_and_a_2b_transformer_alone_cannot_be_a_folder(tiny: Path, tmp_path: Path) -> None:
    demo = convert_module.__file__.replace("checkpoints/convert/convert.py", "assets/demo/demo.safetensors")
    with pytest.raises(CheckpointError, match=r"a VAE that is built as none of 0.9, 0.9.1 and 0.9.5"):
        convert(Path(demo), tmp_path / "folder")
    transformer = Checkpoint.open(tiny).load_transformer()
    write_single_file(tmp_path / "t.safetensors", transformer=transformer, schedule=LINEAR_QUADRATIC)
    with pytest.raises(CheckpointError, match=r"a transformer and no VAE. Of a 2B model"):
        convert(tmp_path / "t.safetensors", tmp_path / "folder")


def test_transformer_of_13b_alone_can_be_a_folder(tmp_path: Path) -> None:
    config = replace(TRANSFORMER_13B, num_heads=2, head_dim=16, caption_channels=24, in_channels=8)
    file = write_sparse(
        tmp_path / "x.safetensors", single_file_shapes(config), metadata=official_metadata(config, None)
    )
    assert Checkpoint.open(convert(file, tmp_path / "folder")).info.transformer == config


def test_quantized_files_are_refused(tiny: Path, tmp_path: Path) -> None:
    transformer_to_gguf(Checkpoint.open(tiny), tmp_path / "x.gguf", find_mix("Q8_0"))
    tensors = load_file(tiny)
    with safe_open(tiny, "pt") as opened:
        metadata = opened.metadata()
    key = "model.diffusion_model.transformer_blocks.0.attn1.to_q.weight"
    save_file({**tensors, key: tensors[key].to(torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors", metadata)
    for file in ("x.gguf", "fp8.safetensors"):
        with pytest.raises(CheckpointError, match=r"is quantized \(.*Convert the model's file in bfloat16"):
            convert(tmp_path / file, tmp_path / "y.safetensors")


def test_existing_folder_is_replaced_only_if_it_is_such_a_folder(tiny: Path, tmp_path: Path) -> None:
    folder = convert(tiny, tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"folder exists already. Pass --force"):
        convert(tiny, folder)
    (folder / "transformer" / "stale.json").write_text("{}")
    convert(tiny, folder, replace=True)
    assert not (folder / "transformer" / "stale.json").exists()
    (folder / "text_encoder").mkdir()
    with pytest.raises(CheckpointError, match="has text_encoder in it, which would be lost"):
        convert(tiny, folder, replace=True)
    with pytest.raises(CheckpointError, match=r"is the input. Write to another path"):
        convert(tiny, tiny, replace=True)
    with pytest.raises(CheckpointError, match=r"has the source .* in it"):
        convert(folder / "vae", folder, replace=True)
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is a folder already"):
        convert(tiny, tmp_path / "x.safetensors", replace=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "x.safetensors"]


@pytest.mark.parametrize("out", ["folder", "x.safetensors"])
def test_cancelled_conversion_leaves_what_was_there(tiny: Path, tmp_path: Path, out: str) -> None:
    path = convert(tiny, tmp_path / out)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    token = CancelToken()

    def cancel_later(done: int, of: int) -> None:
        if done == of // 2:
            token.cancel()

    with cancellable(token), pytest.raises(Cancelled):
        convert(tiny, path, dtype=torch.bfloat16, replace=True, watch=cancel_later)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_full_disk_and_missing_parent_are_refused_before_writing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        convert(tiny, tmp_path / "no" / "folder")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="MB free"):
        convert(tiny, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_other_metadata_of_a_single_file_stays(tiny: Path, tmp_path: Path) -> None:
    with safe_open(tiny, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(tiny), tmp_path / "a.safetensors", {**metadata, "license": "x"})
    out = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype=torch.bfloat16)
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["license"] == "x"
        assert json.loads(opened.metadata()["config"]) == json.loads(metadata["config"])


def test_modules_are_never_loaded(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (Transformer, VAE):
        monkeypatch.setattr(module, "load_state_dict", None)
    convert(tiny, tmp_path / "folder")
