"""GGUF files that kadr writes: self-contained, atomic, and readable by the gguf package."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kadr.checkpoints import save
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.gguf import writer
from kadr.checkpoints.gguf.convert import ConversionResult, text_encoder_to_gguf, transformer_to_gguf
from kadr.checkpoints.gguf.header import read_gguf_header
from kadr.checkpoints.gguf.writer import OutputTensor
from kadr.checkpoints.save import write_single_file, write_text_encoder
from kadr.checkpoints.source import Source
from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError
from kadr.kernels.ggml_types import GGML_TYPES, GGMLType
from kadr.models.registry import find_release
from kadr.models.t5 import T5Config, T5Encoder
from kadr.models.transformer import Transformer, TransformerConfig
from kadr.models.vae import VAE
from kadr.quant.mixes import assign_types, find_mix
from kadr.sampling.schedules import Schedule
from kadr.schema import GGUF
from kadr.spec.locate import PACKAGE_ROOT
from tests import tiny_models
from tests.checkpoints.checkpoint_files import SMALL_VAE, have_same_weights
from tests.checkpoints.gguf import gguf_files
from tests.oracles import VAES, diffusers_transformer, diffusers_vae, narrow_vae_config, relative_error
from tests.stored_files import STORED_FILES

DEMO = PACKAGE_ROOT / "assets" / "demo"
SPIECE = DEMO / "tokenizer" / "spiece.model"
# Wide enough for blocks of 256.
TRANSFORMER_CONFIG = TransformerConfig(num_layers=1, num_heads=8, head_dim=32, caption_channels=64, in_channels=12)
T5_CONFIG = T5Config(vocab_size=128, d_model=256, num_layers=1, num_heads=4, d_kv=64, d_ff=512)
DISTILLED_SCHEDULE = Schedule(sampler="LinearQuadratic", allowed_sigmas=(1.0, 0.9937, 0.725))
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return tiny_models.build_random(lambda: Transformer(TRANSFORMER_CONFIG))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, transformer: Transformer) -> Path:
    """A folder with x.safetensors in bf16, of a transformer and a VAE; and text, a text encoder's folder."""
    home = tmp_path_factory.mktemp("wide")
    vae = tiny_models.build_random(lambda: VAE(SMALL_VAE))
    write_single_file(home / "x.safetensors", transformer=transformer, vae=vae, schedule=DISTILLED_SCHEDULE)
    write_text_encoder(home / "text", tiny_models.build_random(lambda: T5Encoder(T5_CONFIG)), SPIECE)
    return home


def convert_transformer(home: Path, path: Path, kind: str, **more: Any) -> ConversionResult:
    return transformer_to_gguf(Checkpoint.open(home / "x.safetensors"), path, find_mix(kind), **more)


def read_dequantized(path: Path) -> dict[str, np.ndarray]:
    """Reads and dequantizes every tensor with the gguf package."""
    values = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        values[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return values


# Content of the file


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_0", "Q4_K_M", "Q3_K_M", "Q2_K"])
def test_gguf_reads_every_tensor_in_its_type_and_near_its_values(home: Path, tmp_path: Path, kind: str) -> None:
    result = convert_transformer(home, tmp_path / "x.gguf", kind)
    mix, official = find_mix(kind), Checkpoint.open(home / "x.safetensors").sources["transformer"]
    ours, reader = Source.open(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    shapes = {name: (info.shape, "BF16") for name, info in official.infos.items()}
    expected = assign_types(mix, mix.transformer, shapes)
    assert {tensor.name: tensor.tensor_type.name for tensor in reader.tensors} == expected
    assert dict(result.type_counts) == {name: list(expected.values()).count(name) for name in set(expected.values())}
    assert (result.source_bytes, result.output_bytes) == (official.size_bytes, ours.size_bytes)
    bits = GGML_TYPES[mix.base_type].bits_per_weight if mix.base_type in GGML_TYPES else 16
    for name, values in read_dequantized(tmp_path / "x.gguf").items():
        original = official.read(name).float()
        assert relative_error(torch.tensor(values), original) < 2 ** (1.2 - bits) + 2e-3, name
        assert ours.infos[name].shape == official.infos[name].shape


@pytest.mark.parametrize("kind, dtype", [("F32", torch.float32), ("BF16", torch.bfloat16)])
def test_an_unquantized_file_is_the_same_model(home: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    convert_transformer(home, tmp_path / "x.gguf", kind)
    official = Checkpoint.open(home / "x.safetensors").load_transformer(dtype)
    assert have_same_weights(Checkpoint.open(tmp_path / "x.gguf").load_transformer(dtype), official)


def test_the_file_carries_config_schedule_and_vae_family(home: Path, tmp_path: Path) -> None:
    convert_transformer(home, tmp_path / "any name.gguf", "Q8_0")
    official, ours = (
        Checkpoint.open(home / "x.safetensors").info,
        Checkpoint.open(tmp_path / "any name.gguf").info,
    )
    assert replace(official, layout="GGUF", vae=None, dtype=ours.dtype) == ours
    fields = gguf.GGUFReader(tmp_path / "any name.gguf").fields
    values = {name: field.contents() for name, field in fields.items()}
    assert values["general.architecture"] == "ltxv"
    assert values["kadr.schema"] == GGUF.number
    assert (values["general.file_type"], values["general.quantization_version"]) == (7, gguf.GGML_QUANT_VERSION)
    config = json.loads(values["config"])
    assert config["allowed_inference_steps"] == list(DISTILLED_SCHEDULE.allowed_sigmas or ())
    assert set(config) == {"transformer", "vae", "scheduler", "allowed_inference_steps"}


def test_file_from_before_schema_numbers_opens() -> None:
    path = STORED_FILES / "transformer.gguf"
    assert "kadr.schema" not in gguf.GGUFReader(path).fields
    checkpoint = Checkpoint.open(path)
    assert checkpoint.info.schedule == tiny_models.LINEAR_QUADRATIC
    assert checkpoint.load_transformer(torch.float32).config == checkpoint.info.transformer


@pytest.mark.parametrize("number", [GGUF.number + 1, "1"])
def test_file_of_a_newer_kadr_is_refused_by_name(tmp_path: Path, number: Any) -> None:
    path = gguf_files.write_gguf_file(
        tmp_path / "x.gguf", "ltxv", {"a.weight": (np.zeros((2, 32), np.float32), "F32")}, {"kadr.schema": number}
    )
    with pytest.raises(CheckpointError, match=rf"the GGUF header in .*x.gguf has the schema number {number!r};"):
        Checkpoint.open(path)


def test_the_file_carries_the_name_of_its_release(tmp_path: Path) -> None:
    demo = Checkpoint.open(DEMO / "demo-distilled.safetensors", release=find_release("demo-distilled"))
    transformer_to_gguf(demo, tmp_path / "x.gguf", find_mix("BF16"))
    opened = Checkpoint.open(tmp_path / "x.gguf")
    assert opened.info.release is find_release("demo-distilled")
    assert opened.info.schedule == demo.info.schedule
    with pytest.raises(CheckpointError, match="as vae, such as demo"):
        raise opened.missing_component_error("vae")


@pytest.mark.parametrize("family", ["0.9", "0.9.1", "0.9.5"])
def test_a_diffusers_folder_gives_the_tensors_of_the_single_file(
    tmp_path: Path, transformer: Transformer, family: str
) -> None:
    folder, vae = tmp_path / "folder", tiny_models.build_random(lambda: VAE(narrow_vae_config(VAES[family], width=4)))
    diffusers_transformer(transformer).save_pretrained(folder / "transformer")
    diffusers_vae(vae, family).save_pretrained(folder / "vae")
    checkpoint = Checkpoint.open(folder)
    transformer_to_gguf(checkpoint, tmp_path / "folder.gguf", find_mix("Q8_0"))
    info = Checkpoint.open(tmp_path / "folder.gguf").info
    assert (info.schedule, info.vae_family) == (checkpoint.info.schedule, family)
    assert info.transformer == checkpoint.info.transformer
    write_single_file(
        tmp_path / "x.safetensors", transformer=transformer, schedule=checkpoint.info.schedule, dtype=torch.float32
    )
    transformer_to_gguf(Checkpoint.open(tmp_path / "x.safetensors"), tmp_path / "file.gguf", find_mix("Q8_0"))
    of_folder, of_file = read_dequantized(tmp_path / "folder.gguf"), read_dequantized(tmp_path / "file.gguf")
    assert list(of_folder) == list(of_file)
    assert all(np.array_equal(of_folder[name], of_file[name]) for name in of_file)


def write_changed(home: Path, path: Path, change: Callable[[dict[str, Tensor]], object]) -> Checkpoint:
    """Writes the checkpoint with changed tensors and the same metadata."""
    tensors = load_file(home / "x.safetensors")
    change(tensors)
    save_file(tensors, path, metadata=dict(Source.open(home / "x.safetensors").metadata))
    return Checkpoint.open(path)


@pytest.mark.parametrize("scale", [None, 2.0])
def test_fp8_weights_are_converted_with_their_scales(home: Path, tmp_path: Path, scale: float | None) -> None:
    name = f"{PREFIX}transformer_blocks.0.attn1.to_q.weight"

    def as_fp8(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        if scale is not None:
            tensors[name.replace("weight", "scale_weight")] = torch.tensor(scale)

    checkpoint = write_changed(home, tmp_path / "fp8.safetensors", as_fp8)
    transformer_to_gguf(checkpoint, tmp_path / "x.gguf", find_mix("BF16"))
    expected = load_file(tmp_path / "fp8.safetensors")[name].float() * (scale or 1)
    assert torch.equal(torch.from_numpy(read_dequantized(tmp_path / "x.gguf")[name.removeprefix(PREFIX)]), expected)


@pytest.mark.parametrize("kind", ["BF16", "F32"])
def test_an_unquantized_gguf_file_can_be_quantized(home: Path, tmp_path: Path, kind: str) -> None:
    convert_transformer(home, tmp_path / "plain.gguf", kind)
    transformer_to_gguf(Checkpoint.open(tmp_path / "plain.gguf"), tmp_path / "two.gguf", find_mix("Q4_1"))
    convert_transformer(home, tmp_path / "one.gguf", "Q4_1")
    one, two = read_dequantized(tmp_path / "one.gguf"), read_dequantized(tmp_path / "two.gguf")
    assert list(one) == list(two)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    first, second = (Checkpoint.open(tmp_path / name).info for name in ("one.gguf", "two.gguf"))
    assert replace(first, dtype=second.dtype) == second


def test_unquantized_tensors_keep_their_storage_type(transformer: Transformer, tmp_path: Path) -> None:
    for dtype, kind in ((torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")):
        write_single_file(tmp_path / "x.safetensors", transformer=transformer, schedule=DISTILLED_SCHEDULE, dtype=dtype)
        convert_transformer(tmp_path, tmp_path / "x.gguf", "Q8_0")
        types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
        assert {types[name] for name in types if "adaln" in name and name.endswith("weight")} == {kind}


# Text encoders


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_K_M"])
def test_a_text_encoder_is_written_with_config_weights_and_tokenizer(home: Path, tmp_path: Path, kind: str) -> None:
    folder, mix = TextEncoderCheckpoint.open(home / "text"), find_mix(kind)
    text_encoder_to_gguf(folder, tmp_path / "t5.gguf", mix)
    opened = TextEncoderCheckpoint.open(tmp_path / "t5.gguf")
    assert opened.config == T5_CONFIG
    shapes = gguf_files.t5_shapes(T5_CONFIG)
    assert {name: info.shape for name, info in opened.source.infos.items()} == shapes
    type_names = {"float32": "F32"}
    types = {name: type_names.get(info.storage_type, info.storage_type) for name, info in opened.source.infos.items()}
    assert types == assign_types(mix, mix.text_encoder, {name: (shape, "BF16") for name, shape in shapes.items()})
    for prompt in ("a red  circle", "</s> x\n café", "ꙮ"):
        assert torch.equal(opened.load_tokenizer().encode(prompt).ids, folder.load_tokenizer().encode(prompt).ids)
    if kind == "F32":
        assert have_same_weights(opened.load(torch.float32), folder.load(torch.float32))


def test_the_fields_of_a_text_encoder_are_those_of_llama_cpp(home: Path, tmp_path: Path) -> None:
    text_encoder_to_gguf(TextEncoderCheckpoint.open(home / "text"), tmp_path / "t5.gguf", find_mix("Q8_0"))
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "t5.gguf").fields.items()}
    for name, value in gguf_files.t5_fields(T5_CONFIG, SPIECE.read_bytes()).items():
        is_float = "scores" in name or "epsilon" in name
        assert fields[name] == (pytest.approx(value) if is_float else value), name
    assert (fields["general.architecture"], fields["general.file_type"]) == ("t5encoder", 7)


def test_the_normalizer_of_a_tokenizer_is_written(home: Path, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(tiny_models.sentencepiece_model())
    text = replace(TextEncoderCheckpoint.open(home / "text"), tokenizer_root=tmp_path)
    text_encoder_to_gguf(text, tmp_path / "t5.gguf", find_mix("Q4_0"))
    charsmap = gguf_files.tokenizer_fields(tiny_models.sentencepiece_model(), 64)["tokenizer.ggml.precompiled_charsmap"]
    assert read_gguf_header(tmp_path / "t5.gguf").read_array("tokenizer.ggml.precompiled_charsmap") == charsmap
    opened = TextEncoderCheckpoint.open(tmp_path / "t5.gguf")
    assert torch.equal(opened.load_tokenizer().encode("ﬁve ½").ids, text.load_tokenizer().encode("ﬁve ½").ids)


def test_an_unquantized_gguf_text_encoder_can_be_quantized(home: Path, tmp_path: Path) -> None:
    folder = TextEncoderCheckpoint.open(home / "text")
    text_encoder_to_gguf(folder, tmp_path / "plain.gguf", find_mix("BF16"))
    text_encoder_to_gguf(TextEncoderCheckpoint.open(tmp_path / "plain.gguf"), tmp_path / "two.gguf", find_mix("Q8_0"))
    text_encoder_to_gguf(folder, tmp_path / "one.gguf", find_mix("Q8_0"))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_an_embedding_under_its_tied_key_is_written(home: Path, tmp_path: Path) -> None:
    text_encoder_to_gguf(TextEncoderCheckpoint.open(home / "text"), tmp_path / "one.gguf", find_mix("Q8_0"))
    (tmp_path / "text").symlink_to(home / "text")
    file = home / "text" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / "other" / name).mkdir(parents=True)
        for source in (home / "text" / name).iterdir():
            (tmp_path / "other" / name / source.name).write_bytes(source.read_bytes())
    save_file(tensors, tmp_path / "other" / "text_encoder" / "model.safetensors")
    text_encoder_to_gguf(TextEncoderCheckpoint.open(tmp_path / "other"), tmp_path / "two.gguf", find_mix("Q8_0"))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_a_missing_tokenizer_and_a_tokenizer_json_are_refused(home: Path, tmp_path: Path) -> None:
    text = replace(TextEncoderCheckpoint.open(home / "text"), tokenizer_root=tmp_path)
    with pytest.raises(CheckpointError, match="There is no tokenizer for"):
        text_encoder_to_gguf(text, tmp_path / "x.gguf", find_mix("Q8_0"))
    fast = tokenizers.Tokenizer(tokenizers.models.Unigram([("<pad>", 0), ("</s>", 0), ("<unk>", 0)], unk_id=2))
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json, but a GGUF file needs the pieces of a spiece\.model"):
        text_encoder_to_gguf(text, tmp_path / "x.gguf", find_mix("Q8_0"))
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_another_relative_attention_max_distance_is_refused(home: Path, tmp_path: Path) -> None:
    text = TextEncoderCheckpoint.open(home / "text")
    text = replace(text, config=replace(text.config, relative_attention_max_distance=64))
    with pytest.raises(CheckpointError, match=r"relative_attention_max_distance = 64; .* assume 128"):
        text_encoder_to_gguf(text, tmp_path / "x.gguf", find_mix("Q8_0"))


# Refusals, failures, progress


def test_a_quantized_file_is_not_quantized_again(home: Path, tmp_path: Path) -> None:
    convert_transformer(home, tmp_path / "x.gguf", "Q8_0")
    with pytest.raises(
        CheckpointError, match=r"is quantized already \(.* is in Q8_0\).*loses precision twice.*Use the bf16"
    ):
        transformer_to_gguf(Checkpoint.open(tmp_path / "x.gguf"), tmp_path / "y.gguf", find_mix("Q4_0"))
    text_encoder_to_gguf(TextEncoderCheckpoint.open(home / "text"), tmp_path / "t.gguf", find_mix("Q4_0"))
    with pytest.raises(CheckpointError, match="is quantized already"):
        text_encoder_to_gguf(TextEncoderCheckpoint.open(tmp_path / "t.gguf"), tmp_path / "y.gguf", find_mix("F32"))
    assert not (tmp_path / "y.gguf").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "BF16", "F32"])
def test_an_error_names_the_weight_that_is_not_finite(home: Path, tmp_path: Path, kind: str, value: float) -> None:
    name = f"{PREFIX}transformer_blocks.0.attn1.to_q.weight"

    def spoil(tensors: Mapping[str, Tensor]) -> None:
        tensors[name][3, 5] = value

    checkpoint = write_changed(home, tmp_path / "x.safetensors", spoil)
    with pytest.raises(CheckpointError, match=r"tensor transformer_blocks\.0\.attn1\.to_q\.weight has .* not finite"):
        transformer_to_gguf(checkpoint, tmp_path / "x.gguf", find_mix(kind))
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_weight_beyond_float16_is_refused_unless_the_type_fits_it(home: Path, tmp_path: Path, kind: str) -> None:
    name = f"{PREFIX}transformer_blocks.0.attn1.to_k.weight"
    checkpoint = write_changed(home, tmp_path / "x.safetensors", lambda tensors: tensors[name][0].fill_(1e5))
    with pytest.raises(CheckpointError, match=rf"to_k\.weight reaches 99\d\d\d; the maximum of {kind} is 65504"):
        transformer_to_gguf(checkpoint, tmp_path / "x.gguf", find_mix(kind))
    transformer_to_gguf(checkpoint, tmp_path / "x.gguf", find_mix("BF16"))


def test_a_checkpoint_that_lacks_a_tensor_is_not_converted(home: Path, tmp_path: Path) -> None:
    checkpoint = write_changed(home, tmp_path / "x.safetensors", lambda tensors: tensors.pop(f"{PREFIX}proj_out.bias"))
    with pytest.raises(CheckpointError, match=r"1 tensors missing: proj_out\.bias"):
        transformer_to_gguf(checkpoint, tmp_path / "x.gguf", find_mix("Q8_0"))


def stop(done: int, of: int) -> None:
    if done == of // 2:
        raise KeyboardInterrupt


def test_an_interruption_leaves_no_file_and_the_old_one_unchanged(home: Path, tmp_path: Path) -> None:
    for before in ([], ["x.gguf"]):
        with pytest.raises(KeyboardInterrupt):
            convert_transformer(home, tmp_path / "x.gguf", "Q8_0", watch=stop)
        assert os.listdir(tmp_path) == before
        (tmp_path / "x.gguf").write_text("older")
    assert (tmp_path / "x.gguf").read_text() == "older"


def test_a_full_disk_leaves_no_file(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, tensor: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(CheckpointError, match=r"x\.gguf cannot be written: No space left on device"):
        convert_transformer(home, tmp_path / "x.gguf", "Q8_0")
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_or_disk_space_is_refused_before_writing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*/absent\. Create it"):
        convert_transformer(home, tmp_path / "absent" / "x.gguf", "Q8_0")
    usage = save.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"x\.gguf will take \d+ MB, and its disk has 0 MB free"):
        convert_transformer(home, tmp_path / "x.gguf", "Q8_0")
    assert os.listdir(tmp_path) == []


def test_watch_is_called_for_every_tensor(home: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    convert_transformer(home, tmp_path / "x.gguf", "Q8_0", watch=lambda done, of: calls.append((done, of)))
    num_tensors = len(gguf.GGUFReader(tmp_path / "x.gguf").tensors)
    assert calls == [(done, num_tensors) for done in range(num_tensors + 1)]


def test_a_tensor_is_quantized_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real_quantize = writer.quantize

    def recording_quantize(rows: Tensor, ggml_type: GGMLType) -> Tensor:
        sizes.append(rows.numel())
        return real_quantize(rows, ggml_type)

    monkeypatch.setattr(writer, "WRITER_SLICE_ELEMENTS", 1000)
    monkeypatch.setattr(writer, "quantize", recording_quantize)
    values = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    entries = [OutputTensor(name, (50, 64), "Q8_0", lambda: values) for name in "ab"]
    writer.write_gguf(tmp_path / "x.gguf", "ltxv", {}, entries)
    assert max(sizes) <= 1000
    assert sum(sizes) == 2 * values.numel()
    expected = real_quantize(values, GGML_TYPES["Q8_0"]).numpy()
    assert all(np.array_equal(tensor.data, expected) for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors)
