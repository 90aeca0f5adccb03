"""A predicted header is that of the released file: the same configs, names, shapes and storage types."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.lora.file import LoraFile
from kadr.checkpoints.predict import RELEASED_LORAS, predict_checkpoint, predict_lora, predict_text_encoder
from kadr.checkpoints.source import Source
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError
from kadr.models.registry import (
    DEFAULT_TEXT_ENCODER,
    DISTILLED_SIGMAS,
    LORA,
    RELEASES,
    TEXT_ENCODER_GGUF,
    TOKENIZER,
    Release,
    find_release,
)
from kadr.models.t5 import T5_XXL
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B
from kadr.models.upscaler import SPATIAL_UPSCALER_CONFIG, TEMPORAL_UPSCALER_CONFIG
from kadr.models.vae.config import VAE_0_9, VAE_0_9_1, VAE_0_9_5
from kadr.sampling.schedules import Schedule
from tests.checkpoints.checkpoint_files import (
    LINEAR_QUADRATIC,
    Shapes,
    official_metadata,
    single_file_shapes,
    t5_shapes,
    upscaler_shapes,
    write_sparse,
)
from tests.checkpoints.gguf import gguf_files
from tests.lora_files import ATTENTION, FEED_FORWARD, OUTER_LAYERS, comfy

HOSTED = [release for release in RELEASES if release.repo is not None]
MODELS = [release for release in HOSTED if release.kind == "model"]
UPSCALERS = [release for release in HOSTED if release.kind.endswith("upscaler")]
LORAS = [release for release in HOSTED if release.kind == LORA]
TEXT_ENCODERS = [find_release(DEFAULT_TEXT_ENCODER), find_release(TEXT_ENCODER_GGUF)]
VAES = {"0.9": VAE_0_9, "0.9.1": VAE_0_9_1, "0.9.5": VAE_0_9_5}
OLD_SCHEDULE = Schedule(sampler="Uniform", shifting="SD3", shift_terminal=0.1)
UNUSED_STATISTICS = ("mean-of-stds", "mean-of-stds_over_std-of-means", "channel")
# Rank, and the layers that are adapted in each block and around the blocks.
LORA_LAYERS = {
    "ltxv-13b-0.9.7-distilled-lora": (128, (*ATTENTION, *FEED_FORWARD), OUTER_LAYERS),
    "ltxv-13b-0.9.7-ic-lora-canny": (8, (*ATTENTION, *FEED_FORWARD), {}),
    "ltxv-13b-0.9.7-ic-lora-depth": (8, (*ATTENTION, *FEED_FORWARD), {}),
    "ltxv-13b-0.9.7-ic-lora-pose": (24, ATTENTION, {}),
    "ltxv-13b-0.9.8-ic-lora-detailer": (128, (*ATTENTION, *FEED_FORWARD), {}),
}


def by_name(release: Release) -> str:
    return release.name


def described(source: Source) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Returns key, shape and storage type of every tensor."""
    return {name: (info.name, info.shape, info.storage_type) for name, info in source.infos.items()}


def write_model(folder: Path, release: Release) -> Path:
    """Writes the file of a release in the official layout, with the official config, sparse."""
    is_old = release.vae_family in ("0.9", "0.9.1")
    config = {28: TRANSFORMER_2B, 48: TRANSFORMER_13B}[release.num_layers or 0]
    transformer, vae = replace(config, causal_temporal_positioning=not is_old), VAES[release.vae_family or ""]
    extra: dict[str, Any] = {}
    if release.version == "0.9.8-distilled":
        extra["allowed_inference_steps"] = DISTILLED_SIGMAS
    schedule = OLD_SCHEDULE if is_old else LINEAR_QUADRATIC
    shapes = single_file_shapes(transformer, vae)
    shapes |= {f"vae.per_channel_statistics.{name}": (128,) for name in UNUSED_STATISTICS}
    dtypes = {name: _model_dtype(release, name, shape) for name, shape in shapes.items()}
    metadata = official_metadata(transformer, vae, schedule, **extra)
    return write_sparse(folder / release.file, shapes, dtype=dtypes, metadata=metadata)


def _model_dtype(release: Release, name: str, shape: tuple[int, ...]) -> str:
    """Returns the storage dtype; in an fp8 file, by the rule of the official converter."""
    is_block_matrix = "transformer_blocks." in name and len(shape) == 2 and ("attn" in name or "ff." in name)
    if is_block_matrix and name.endswith(".weight") and release.name.endswith("fp8"):
        return "F8_E4M3"
    return "F32" if release.version == "0.9" else "BF16"


def test_every_release_that_is_fetched_is_predicted() -> None:
    assert {*MODELS, *UPSCALERS, *LORAS, *TEXT_ENCODERS} == {*HOSTED} - {find_release(TOKENIZER)}  # it has no tensors
    assert RELEASED_LORAS.keys() == {release.name for release in LORAS}


@pytest.mark.parametrize("release", MODELS, ids=by_name)
def test_a_predicted_model_equals_the_opened_file(release: Release, tmp_path: Path) -> None:
    predicted, opened = predict_checkpoint(release), Checkpoint.open(write_model(tmp_path, release))
    assert predicted.info == opened.info
    assert predicted.info.release is release
    assert {name: described(source) for name, source in predicted.sources.items()} == {
        name: described(source) for name, source in opened.sources.items()
    }
    assert predicted.size_bytes == pytest.approx(release.size_bytes, rel=0.01)
    assert (predicted.is_on_disk, opened.is_on_disk) == (False, True)
    assert predicted.path == Path(release.file)


@pytest.mark.parametrize("release", UPSCALERS, ids=by_name)
def test_a_predicted_upscaler_equals_the_opened_file(release: Release, tmp_path: Path) -> None:
    config = SPATIAL_UPSCALER_CONFIG if "spatial" in release.name else TEMPORAL_UPSCALER_CONFIG
    metadata = {"config": json.dumps(config.to_header())}
    file = write_sparse(tmp_path / release.file, upscaler_shapes(config), dtype="F32", metadata=metadata)
    predicted, opened = predict_checkpoint(release), Checkpoint.open(file)
    assert predicted.info == opened.info
    assert described(predicted.sources["upscaler"]) == described(opened.sources["upscaler"])
    assert predicted.size_bytes == pytest.approx(release.size_bytes, rel=0.01)


def write_text_encoder(folder: Path, release: Release) -> Path:
    """Writes the files of a released text encoder, sparse."""
    if release.name == TEXT_ENCODER_GGUF:
        types = {
            name: (shape, "F32" if len(shape) == 1 or "attn_rel_b" in name else "Q8_0")
            for name, shape in gguf_files.t5_shapes(T5_XXL).items()
        }
        return gguf_files.write_sparse_gguf(folder / release.file, "t5encoder", types, **gguf_files.t5_fields(T5_XXL))
    home, shapes = folder / "text_encoder", t5_shapes(T5_XXL)
    names = list(shapes)
    shards = {"model-00001-of-00002": names[:100], "model-00002-of-00002": names[100:]}
    for stem, shard in shards.items():
        write_sparse(home / f"{stem}.safetensors", {name: shapes[name] for name in shard}, dtype="F32")
    weight_map = {name: f"{stem}.safetensors" for stem, shard in shards.items() for name in shard}
    (home / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {**vars(T5_XXL), "model_type": "t5", "feed_forward_proj": "gated-gelu"}
    (home / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("release", TEXT_ENCODERS, ids=by_name)
def test_a_predicted_text_encoder_equals_the_opened_files(release: Release, tmp_path: Path) -> None:
    predicted = predict_text_encoder(release)
    opened = TextEncoderCheckpoint.open(write_text_encoder(tmp_path, release))
    assert (predicted.config, predicted.key_table) == (opened.config, opened.key_table)
    assert described(predicted.source) == described(opened.source)
    assert predicted.size_bytes == pytest.approx(release.size_bytes, rel=0.01)
    assert (predicted.is_on_disk, opened.is_on_disk) == (False, True)


def lora_shapes(release: Release) -> Shapes:
    """Returns the keys and shapes of a released LoRA."""
    rank, targets, outer_layers = LORA_LAYERS[release.name]
    features = {"ff.net.0.proj": (4096, 4 * 4096), "ff.net.2": (4 * 4096, 4096)}
    layers = {
        f"transformer_blocks.{block}.{target}": features.get(target, (4096, 4096))
        for block in range(48)
        for target in targets
    }
    shapes: Shapes = {}
    for name, (in_features, out_features) in (layers | outer_layers).items():
        down, up = comfy(name)
        shapes |= {down: (rank, in_features), up: (out_features, rank)}
    return shapes


@pytest.mark.parametrize("release", LORAS, ids=by_name)
def test_a_predicted_lora_equals_the_opened_file(release: Release, tmp_path: Path) -> None:
    predicted = predict_lora(release)
    opened = LoraFile.open(write_sparse(tmp_path / release.file, lora_shapes(release)))
    assert (predicted.key_format, predicted.layers) == (opened.key_format, opened.layers)
    assert described(predicted.source) == described(opened.source)
    assert predicted.source.size_bytes == pytest.approx(release.size_bytes, rel=0.01)
    assert (predicted.is_on_disk, opened.is_on_disk) == (False, True)


def test_a_predicted_lora_fits_the_13b_models_only() -> None:
    for lora in map(predict_lora, LORAS):
        lora.check_fits(TRANSFORMER_13B, Path("ltxv-13b"))
        with pytest.raises(CheckpointError, match="does not fit ltxv-2b"):
            lora.check_fits(TRANSFORMER_2B, Path("ltxv-2b"))


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("ltxv-2b-0.9.5", lambda release: predict_checkpoint(release).load_transformer()),
        ("ltxv-2b-0.9.5", lambda release: predict_checkpoint(release).load_vae()),
        ("ltxv-spatial-upscaler-0.9.8", lambda release: predict_checkpoint(release).load_upscaler()),
        (DEFAULT_TEXT_ENCODER, lambda release: predict_text_encoder(release).load()),
        (DEFAULT_TEXT_ENCODER, lambda release: predict_text_encoder(release).load_tokenizer()),
        ("ltxv-13b-0.9.7-ic-lora-canny", lambda release: predict_lora(release).load()),
        ("ltxv-13b-0.9.7-ic-lora-canny", lambda release: predict_lora(release).sha256),
    ],
)
def test_a_predicted_file_is_not_loaded(name: str, load: Callable[[Release], Any]) -> None:
    error = re.escape(f"{name} is not on disk. Fetch it with `kadr models pull {name}`.")
    with pytest.raises(CheckpointError, match=error):
        load(find_release(name))


def test_a_folder_beside_the_caller_is_not_taken_for_its_text_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert "text encoder" in predict_checkpoint(find_release("ltxv-2b-0.9.5")).describe().missing_components


@pytest.mark.parametrize("predict", [predict_checkpoint, predict_text_encoder, predict_lora])
@pytest.mark.parametrize("name", ["demo", "demo-lora-teal", "demo-upscaler"])
def test_a_bundled_release_is_not_predicted(predict: Callable[[Release], Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not a"):
        predict(find_release(name))
