"""A GGUF file that kadr writes is read by the gguf package, says all of itself, and is there whole or not at all."""

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
from kadr.spec.locate import PACKAGE_ROOT
from tests import tiny_models
from tests.checkpoints.checkpoint_files import SMALL_VAE, have_same_weights
from tests.checkpoints.gguf import gguf_files
from tests.oracles import VAES, diffusers_transformer, diffusers_vae, narrow_vae_config, relative_error

DEMO = PACKAGE_ROOT / "assets" / "demo"
SPIECE = DEMO / "tokenizer" / "spiece.model"
# Wide enough for blocks of 256.
WIDE = TransformerConfig(num_layers=1, num_heads=8, head_dim=32, caption_channels=64, in_channels=12)
WORDS = T5Config(vocab_size=128, d_model=256, num_layers=1, num_heads=4, d_kv=64, d_ff=512)
LEVELS = Schedule(sampler="LinearQuadratic", allowed_sigmas=(1.0, 0.9937, 0.725))
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return tiny_models.build_random(lambda: Transformer(WIDE))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, transformer: Transformer) -> Path:
    """x.safetensors in bf16, of a transformer and a VAE; and text, a text encoder's folder."""
    home = tmp_path_factory.mktemp("wide")
    vae = tiny_models.build_random(lambda: VAE(SMALL_VAE))
    write_single_file(home / "x.safetensors", transformer=transformer, vae=vae, schedule=LEVELS)
    write_text_encoder(home / "text", tiny_models.build_random(lambda: T5Encoder(WORDS)), SPIECE)
    return home


def written(home: Path, path: Path, kind: str, **more: Any) -> ConversionResult:
    return transformer_to_gguf(Checkpoint.open(home / "x.safetensors"), path, find_mix(kind), **more)


def numbers_of(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as the package reads and unpacks it."""
    made = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        made[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return made


# What is in the file


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_0", "Q4_K_M", "Q3_K_M", "Q2_K"])
def test_the_package_finds_every_tensor_in_its_type_and_near_its_numbers(home: Path, tmp_path: Path, kind: str) -> None:
    told = written(home, tmp_path / "x.gguf", kind)
    mix, official = find_mix(kind), Checkpoint.open(home / "x.safetensors").sources["transformer"]
    ours, reader = Source.open(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    shapes = {name: (info.shape, "BF16") for name, info in official.infos.items()}
    expected = assign_types(mix, mix.transformer, shapes)
    assert {tensor.name: tensor.tensor_type.name for tensor in reader.tensors} == expected
    assert dict(told.type_counts) == {one: list(expected.values()).count(one) for one in set(expected.values())}
    assert (told.source_bytes, told.output_bytes) == (official.size_bytes, ours.size_bytes)
    bits = GGML_TYPES[mix.base_type].bits_per_weight if mix.base_type in GGML_TYPES else 16
    for name, numbers in numbers_of(tmp_path / "x.gguf").items():
        original = official.read(name).float()
        assert relative_error(torch.tensor(numbers), original) < 2 ** (1.2 - bits) + 2e-3, name
        assert ours.infos[name].shape == official.infos[name].shape


@pytest.mark.parametrize("kind, dtype", [("F32", torch.float32), ("BF16", torch.bfloat16)])
def test_a_file_of_plain_numbers_is_the_same_model(home: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    written(home, tmp_path / "x.gguf", kind)
    official = Checkpoint.open(home / "x.safetensors").load_transformer(dtype)
    assert have_same_weights(Checkpoint.open(tmp_path / "x.gguf").load_transformer(dtype), official)


def test_the_file_says_all_of_itself(home: Path, tmp_path: Path) -> None:
    written(home, tmp_path / "any name.gguf", "Q8_0")
    official, ours = (
        Checkpoint.open(home / "x.safetensors").info,
        Checkpoint.open(tmp_path / "any name.gguf").info,
    )
    assert replace(official, layout="GGUF", vae=None, dtype=ours.dtype) == ours
    fields = gguf.GGUFReader(tmp_path / "any name.gguf").fields
    values = {name: field.contents() for name, field in fields.items()}
    assert values["general.architecture"] == "ltxv"
    assert (values["general.file_type"], values["general.quantization_version"]) == (7, gguf.GGML_QUANT_VERSION)
    config = json.loads(values["config"])
    assert config["allowed_inference_steps"] == list(LEVELS.allowed_sigmas or ())
    assert set(config) == {"transformer", "vae", "scheduler", "allowed_inference_steps"}


def test_the_name_of_a_released_model_goes_with_it(tmp_path: Path) -> None:
    demo = Checkpoint.open(DEMO / "demo-distilled.safetensors", release=find_release("demo-distilled"))
    transformer_to_gguf(demo, tmp_path / "x.gguf", find_mix("BF16"))
    opened = Checkpoint.open(tmp_path / "x.gguf")
    assert opened.info.release is find_release("demo-distilled")
    assert opened.info.schedule == demo.info.schedule
    with pytest.raises(CheckpointError, match="as --vae, such as demo"):
        raise opened.missing_component_error("vae")


@pytest.mark.parametrize("family", ["0.9", "0.9.1", "0.9.5"])
def test_a_folder_of_diffusers_gives_the_same_tensors_under_the_official_names(
    tmp_path: Path, transformer: Transformer, family: str
) -> None:
    folder, vae = tmp_path / "folder", tiny_models.build_random(lambda: VAE(narrow_vae_config(VAES[family], width=4)))
    diffusers_transformer(transformer).save_pretrained(folder / "transformer")
    diffusers_vae(vae, family).save_pretrained(folder / "vae")
    one = Checkpoint.open(folder)
    transformer_to_gguf(one, tmp_path / "one.gguf", find_mix("Q8_0"))
    opened = Checkpoint.open(tmp_path / "one.gguf").info
    assert (opened.schedule, opened.vae_family) == (one.info.schedule, family)
    assert opened.transformer == one.info.transformer
    write_single_file(
        tmp_path / "x.safetensors", transformer=transformer, schedule=one.info.schedule, dtype=torch.float32
    )
    transformer_to_gguf(Checkpoint.open(tmp_path / "x.safetensors"), tmp_path / "other.gguf", find_mix("Q8_0"))
    folders, files = numbers_of(tmp_path / "one.gguf"), numbers_of(tmp_path / "other.gguf")
    assert list(folders) == list(files)
    assert all(np.array_equal(folders[name], files[name]) for name in files)


def changed(home: Path, path: Path, change: Callable[[dict[str, Tensor]], object]) -> Checkpoint:
    """The checkpoint with other tensors, written as it was."""
    tensors = load_file(home / "x.safetensors")
    change(tensors)
    save_file(tensors, path, metadata=dict(Source.open(home / "x.safetensors").metadata))
    return Checkpoint.open(path)


@pytest.mark.parametrize("scale", [None, 2.0])
def test_a_file_in_8_bit_floats_gives_what_its_numbers_stand_for(
    home: Path, tmp_path: Path, scale: float | None
) -> None:
    name = f"{PREFIX}transformer_blocks.0.attn1.to_q.weight"

    def as_fp8(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        if scale is not None:
            tensors[name.replace("weight", "scale_weight")] = torch.tensor(scale)

    checkpoint = changed(home, tmp_path / "fp8.safetensors", as_fp8)
    transformer_to_gguf(checkpoint, tmp_path / "x.gguf", find_mix("BF16"))
    meant = load_file(tmp_path / "fp8.safetensors")[name].float() * (scale or 1)
    assert torch.equal(torch.from_numpy(numbers_of(tmp_path / "x.gguf")[name.removeprefix(PREFIX)]), meant)


@pytest.mark.parametrize("kind", ["BF16", "F32"])
def test_a_gguf_file_that_is_not_quantized_can_be(home: Path, tmp_path: Path, kind: str) -> None:
    written(home, tmp_path / "plain.gguf", kind)
    transformer_to_gguf(Checkpoint.open(tmp_path / "plain.gguf"), tmp_path / "two.gguf", find_mix("Q4_1"))
    written(home, tmp_path / "one.gguf", "Q4_1")
    one, two = numbers_of(tmp_path / "one.gguf"), numbers_of(tmp_path / "two.gguf")
    assert list(one) == list(two)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    first, second = (Checkpoint.open(tmp_path / name).info for name in ("one.gguf", "two.gguf"))
    assert replace(first, dtype=second.dtype) == second


def test_what_is_kept_is_kept_as_it_is_stored(transformer: Transformer, tmp_path: Path) -> None:
    for dtype, kind in ((torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")):
        write_single_file(tmp_path / "x.safetensors", transformer=transformer, schedule=LEVELS, dtype=dtype)
        written(tmp_path, tmp_path / "x.gguf", "Q8_0")
        types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
        assert {types[name] for name in types if "adaln" in name and name.endswith("weight")} == {kind}


# Text encoders


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_K_M"])
def test_a_text_encoder_is_written_with_its_sizes_its_weights_and_its_tokenizer(
    home: Path, tmp_path: Path, kind: str
) -> None:
    folder, mix = TextEncoderCheckpoint.open(home / "text"), find_mix(kind)
    text_encoder_to_gguf(folder, tmp_path / "t5.gguf", mix)
    opened = TextEncoderCheckpoint.open(tmp_path / "t5.gguf")
    assert opened.config == WORDS
    shapes = gguf_files.t5_shapes(WORDS)
    assert {name: info.shape for name, info in opened.source.infos.items()} == shapes
    plain = {"float32": "F32"}
    types = {name: plain.get(info.storage_type, info.storage_type) for name, info in opened.source.infos.items()}
    assert types == assign_types(mix, mix.text_encoder, {name: (shape, "BF16") for name, shape in shapes.items()})
    for prompt in ("a red  circle", "</s> x\n café", "ꙮ"):
        assert torch.equal(opened.load_tokenizer().encode(prompt).ids, folder.load_tokenizer().encode(prompt).ids)
    if kind == "F32":
        assert have_same_weights(opened.load(torch.float32), folder.load(torch.float32))


def test_the_values_of_a_text_encoder_are_those_that_llama_cpp_writes(home: Path, tmp_path: Path) -> None:
    text_encoder_to_gguf(TextEncoderCheckpoint.open(home / "text"), tmp_path / "t5.gguf", find_mix("Q8_0"))
    found = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "t5.gguf").fields.items()}
    for name, value in gguf_files.t5_fields(WORDS, SPIECE.read_bytes()).items():
        near = "scores" in name or "epsilon" in name
        assert found[name] == (pytest.approx(value) if near else value), name
    assert (found["general.architecture"], found["general.file_type"]) == ("t5encoder", 7)


def test_the_rules_of_a_tokenizer_are_written_too(home: Path, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(tiny_models.sentencepiece_model())
    text = replace(TextEncoderCheckpoint.open(home / "text"), tokenizer_root=tmp_path)
    text_encoder_to_gguf(text, tmp_path / "t5.gguf", find_mix("Q4_0"))
    rules = gguf_files.tokenizer_fields(tiny_models.sentencepiece_model(), 64)["tokenizer.ggml.precompiled_charsmap"]
    assert read_gguf_header(tmp_path / "t5.gguf").read_array("tokenizer.ggml.precompiled_charsmap") == rules
    opened = TextEncoderCheckpoint.open(tmp_path / "t5.gguf")
    assert torch.equal(opened.load_tokenizer().encode("ﬁve ½").ids, text.load_tokenizer().encode("ﬁve ½").ids)


def test_a_text_encoder_of_a_gguf_file_that_is_not_quantized_can_be(home: Path, tmp_path: Path) -> None:
    folder = TextEncoderCheckpoint.open(home / "text")
    text_encoder_to_gguf(folder, tmp_path / "plain.gguf", find_mix("BF16"))
    text_encoder_to_gguf(TextEncoderCheckpoint.open(tmp_path / "plain.gguf"), tmp_path / "two.gguf", find_mix("Q8_0"))
    text_encoder_to_gguf(folder, tmp_path / "one.gguf", find_mix("Q8_0"))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_an_embedding_under_its_second_name_is_written(home: Path, tmp_path: Path) -> None:
    text_encoder_to_gguf(TextEncoderCheckpoint.open(home / "text"), tmp_path / "one.gguf", find_mix("Q8_0"))
    (tmp_path / "text").symlink_to(home / "text")
    file = home / "text" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / "other" / name).mkdir(parents=True)
        for given in (home / "text" / name).iterdir():
            (tmp_path / "other" / name / given.name).write_bytes(given.read_bytes())
    save_file(tensors, tmp_path / "other" / "text_encoder" / "model.safetensors")
    text_encoder_to_gguf(TextEncoderCheckpoint.open(tmp_path / "other"), tmp_path / "two.gguf", find_mix("Q8_0"))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_a_tokenizer_that_cannot_be_put_into_the_file_is_refused(home: Path, tmp_path: Path) -> None:
    text = replace(TextEncoderCheckpoint.open(home / "text"), tokenizer_root=tmp_path)
    with pytest.raises(CheckpointError, match="There is no tokenizer for"):
        text_encoder_to_gguf(text, tmp_path / "x.gguf", find_mix("Q8_0"))
    fast = tokenizers.Tokenizer(tokenizers.models.Unigram([("<pad>", 0), ("</s>", 0), ("<unk>", 0)], unk_id=2))
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json, and a GGUF file takes the pieces of a spiece\.model"):
        text_encoder_to_gguf(text, tmp_path / "x.gguf", find_mix("Q8_0"))
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_a_size_that_the_format_cannot_say_is_refused(home: Path, tmp_path: Path) -> None:
    text = TextEncoderCheckpoint.open(home / "text")
    text = replace(text, config=replace(text.config, relative_attention_max_distance=64))
    with pytest.raises(CheckpointError, match=r"distances apart up to 64 tokens; .* to be 128"):
        text_encoder_to_gguf(text, tmp_path / "x.gguf", find_mix("Q8_0"))


# What is refused, and what stays


def test_a_quantized_file_is_not_quantized_again(home: Path, tmp_path: Path) -> None:
    written(home, tmp_path / "x.gguf", "Q8_0")
    with pytest.raises(CheckpointError, match=r"is quantized already \(.* is in Q8_0\).*loses twice.*Take the bf16"):
        transformer_to_gguf(Checkpoint.open(tmp_path / "x.gguf"), tmp_path / "y.gguf", find_mix("Q4_0"))
    text_encoder_to_gguf(TextEncoderCheckpoint.open(home / "text"), tmp_path / "t.gguf", find_mix("Q4_0"))
    with pytest.raises(CheckpointError, match="is quantized already"):
        text_encoder_to_gguf(TextEncoderCheckpoint.open(tmp_path / "t.gguf"), tmp_path / "y.gguf", find_mix("F32"))
    assert not (tmp_path / "y.gguf").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "BF16", "F32"])
def test_a_weight_that_is_not_finite_is_named(home: Path, tmp_path: Path, kind: str, number: float) -> None:
    name = f"{PREFIX}transformer_blocks.0.attn1.to_q.weight"

    def spoil(tensors: Mapping[str, Tensor]) -> None:
        tensors[name][3, 5] = number

    checkpoint = changed(home, tmp_path / "x.safetensors", spoil)
    with pytest.raises(CheckpointError, match=r"tensor transformer_blocks\.0\.attn1\.to_q\.weight has .* not finite"):
        transformer_to_gguf(checkpoint, tmp_path / "x.gguf", find_mix(kind))
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_weight_beyond_float16_is_refused_where_it_would_not_fit(home: Path, tmp_path: Path, kind: str) -> None:
    name = f"{PREFIX}transformer_blocks.0.attn1.to_k.weight"
    checkpoint = changed(home, tmp_path / "x.safetensors", lambda tensors: tensors[name][0].fill_(1e5))
    with pytest.raises(CheckpointError, match=rf"to_k\.weight reaches 99\d\d\d, and {kind} holds no more than 65504"):
        transformer_to_gguf(checkpoint, tmp_path / "x.gguf", find_mix(kind))
    transformer_to_gguf(checkpoint, tmp_path / "x.gguf", find_mix("BF16"))


def test_what_lacks_a_tensor_is_not_written(home: Path, tmp_path: Path) -> None:
    checkpoint = changed(home, tmp_path / "x.safetensors", lambda tensors: tensors.pop(f"{PREFIX}proj_out.bias"))
    with pytest.raises(CheckpointError, match=r"1 tensors missing: proj_out\.bias"):
        transformer_to_gguf(checkpoint, tmp_path / "x.gguf", find_mix("Q8_0"))


def stop(done: int, of: int) -> None:
    if done == of // 2:
        raise KeyboardInterrupt


def test_an_interruption_leaves_nothing_and_an_older_file_as_it_was(home: Path, tmp_path: Path) -> None:
    for before in ([], ["x.gguf"]):
        with pytest.raises(KeyboardInterrupt):
            written(home, tmp_path / "x.gguf", "Q8_0", watch=stop)
        assert os.listdir(tmp_path) == before
        (tmp_path / "x.gguf").write_text("older")
    assert (tmp_path / "x.gguf").read_text() == "older"


def test_a_full_disk_leaves_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, tensor: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(CheckpointError, match=r"x\.gguf cannot be written: No space left on device"):
        written(home, tmp_path / "x.gguf", "Q8_0")
    assert os.listdir(tmp_path) == []


def test_a_file_that_has_no_room_or_no_folder_is_refused_before_it_is_begun(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"there is no folder .*/absent\. Make it"):
        written(home, tmp_path / "absent" / "x.gguf", "Q8_0")
    usage = writer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"x\.gguf will take 0\.0 GB, and its disk has 0\.0 GB free"):
        written(home, tmp_path / "x.gguf", "Q8_0")
    assert os.listdir(tmp_path) == []


def test_the_watcher_is_told_of_every_tensor(home: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    written(home, tmp_path / "x.gguf", "Q8_0", watch=lambda done, of: told.append((done, of)))
    count = len(gguf.GGUFReader(tmp_path / "x.gguf").tensors)
    assert told == [(done, count) for done in range(count + 1)]


def test_a_tensor_is_rounded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = writer.quantize

    def counting(piece: Tensor, packing: GGMLType) -> Tensor:
        sizes.append(piece.numel())
        return real(piece, packing)

    monkeypatch.setattr(writer, "SLICE_ELEMENTS", 1000)
    monkeypatch.setattr(writer, "quantize", counting)
    numbers = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    entries = [OutputTensor(name, (50, 64), "Q8_0", lambda: numbers) for name in "ab"]
    writer.write_gguf(tmp_path / "x.gguf", "ltxv", {}, entries)
    assert max(sizes) <= 1000
    assert sum(sizes) == 2 * numbers.numel()
    expected = real(numbers, GGML_TYPES["Q8_0"]).numpy()
    assert all(np.array_equal(tensor.data, expected) for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors)
