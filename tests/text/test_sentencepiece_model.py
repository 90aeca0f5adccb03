"""Pieces of a SentencePiece model, or of a GGUF file, give the ids of SentencePiece."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2 as protobuf

from kadr.errors import CheckpointError
from kadr.text.sentencepiece_model import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
    parse_sentencepiece,
    serialize_sentencepiece,
)
from kadr.text.tokenizer import Tokenizer
from tests.checkpoints.gguf.gguf_files import tokenizer_fields

DEMO = Path(__file__).parents[2] / "src" / "kadr" / "assets" / "demo" / "tokenizer" / "spiece.model"
TEXT = """a red circle moving right over the blue sea while birds fly slowly through golden light of evening café 42 , .
кадр кино город 電影 東京 naïve façade ½ ﬁne isn't co-op 1,000 №"""
PROMPTS = [
    "a red circle moving right on a black background",
    "",
    "  two  spaces,\nnew lines\r\n and\ttabs  ",
    "héllo wörld, 電影 and кадр! ﬁve ½ ① cafe\u0301 wide\u3000space no\u00a0break zero\u200bwidth",
    "cats 🐈🐈 and a family 👨\u200d👩\u200d👧, unknown ꙮ 𒀀",
    "a </s> in the middle, <pad> and <unk>, and one at the end </s>",
    "<extra_id_0> and <extra_id_99>, [PAD130] is none",
    "▁ already▁marked ▁",
    "x" * 90,
]


@cache
def train_model(size: int, **more: object) -> bytes:
    draw, model = random.Random(0), io.BytesIO()
    words = ["".join(draw.choices("abcdefghiklmnoprstu", k=draw.randint(2, 9))) for _ in range(4000)]
    lines = [" ".join(draw.choices(TEXT.split() + words, k=draw.randint(3, 14))) for _ in range(3000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=more.pop("model_type", "unigram"),
        vocab_size=size,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
        **more,
    )
    return model.getvalue()


MODELS = {
    "demo": DEMO.read_bytes,
    "large": lambda: train_model(2000),
    "bytes": lambda: train_model(600, byte_fallback=True),
    "unsqueezed": lambda: train_model(300, remove_extra_whitespaces=False, add_dummy_prefix=False),
    "lowered": lambda: train_model(300, normalization_rule_name="nmt_nfkc_cf"),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> bytes:
    return MODELS[request.param]()


def model_from_gguf(fields: Mapping[str, object]) -> SentencePieceModel:
    """Makes a model of the tokenizer fields of a GGUF file."""
    values = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    return SentencePieceModel(
        tuple(values["tokens"]),
        tuple(values["scores"]),
        tuple(values["token_type"]),
        precompiled_charsmap=values.get("precompiled_charsmap", b""),
        add_dummy_prefix=values["add_space_prefix"],
        remove_extra_whitespaces=values["remove_extra_whitespaces"],
    )


def test_pieces_equal_those_that_protobuf_reads(model: bytes) -> None:
    ours, oracle = parse_sentencepiece(model), protobuf.ModelProto.FromString(model)
    assert ours.pieces == tuple(piece.piece for piece in oracle.pieces)
    assert ours.scores == tuple(piece.score for piece in oracle.pieces)
    assert ours.types == tuple(piece.type for piece in oracle.pieces)
    rules = oracle.normalizer_spec
    assert ours.precompiled_charsmap == rules.precompiled_charsmap
    assert (ours.add_dummy_prefix, ours.remove_extra_whitespaces) == (
        rules.add_dummy_prefix,
        rules.remove_extra_whitespaces,
    )


def test_pieces_survive_a_round_trip(model: bytes) -> None:
    pieces = parse_sentencepiece(model)
    assert parse_sentencepiece(serialize_sentencepiece(pieces)) == pieces
    protobuf.ModelProto.FromString(serialize_sentencepiece(pieces))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_pieces_of_a_gguf_file_give_the_ids_of_sentencepiece(tmp_path: Path, model: bytes, prompt: str) -> None:
    (tmp_path / "spiece.model").write_bytes(model)
    original = Tokenizer.open(tmp_path)
    pieces = model_from_gguf(tokenizer_fields(model, original.vocab_size + 28))
    ours = Tokenizer.from_sentencepiece(pieces, tmp_path / "t5.gguf")
    assert torch.equal(ours.encode(prompt).ids, original.encode(prompt).ids)
    assert ours.vocab_size == original.vocab_size


def t5_sized_model(size: int = 32000) -> bytes:
    """Returns a model with as many pieces as the released tokenizer."""
    texts = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", *(f"▁w{i}" for i in range(size - 30))]
    types = [CONTROL, CONTROL, UNKNOWN, *[NORMAL] * (size - 3)]
    return serialize_sentencepiece(
        SentencePieceModel(tuple(texts), tuple(-float(i) / size for i in range(size)), tuple(types))
    )


@pytest.mark.parametrize("added", [{}, {f"<extra_id_{n}>": 32099 - n for n in range(100)}], ids=["filled up", "named"])
def test_sentinels_have_the_ids_of_the_released_tokenizer(tmp_path: Path, added: Mapping[str, int]) -> None:
    model = t5_sized_model()
    (tmp_path / "spiece.model").write_bytes(model)
    original = Tokenizer.open(tmp_path)
    ours = Tokenizer.from_sentencepiece(model_from_gguf(tokenizer_fields(model, 32128, added)), tmp_path / "t5.gguf")
    for prompt in ("a <extra_id_0> b", "x<extra_id_7><extra_id_99> w12 </s>", "[PAD32100]"):
        assert torch.equal(ours.encode(prompt).ids, original.encode(prompt).ids)
    assert 32099 in ours.encode("a <extra_id_0> b").ids
    assert ours.vocab_size <= 32128


def test_fillers_are_trimmed_at_the_end_and_kept_in_between() -> None:
    types = (CONTROL, UNUSED, NORMAL, UNUSED, USER_DEFINED, UNUSED)
    trimmed, markers = SentencePieceModel(tuple("abcdef"), (0.0,) * 6, types).trim_fillers()
    assert (trimmed.pieces, trimmed.types) == (tuple("abc"), types[:3])
    assert markers == {"e": 4}


def test_a_vocabulary_of_another_family_is_refused() -> None:
    pieces = SentencePieceModel(("<unk>", "<s>", "</s>", "a"), (0.0,) * 4, (UNKNOWN, CONTROL, CONTROL, NORMAL))
    with pytest.raises(CheckpointError, match=r"x\.gguf is not T5's .* numbers <pad>, </s>, <unk> as -1, 2, 0"):
        Tokenizer.from_sentencepiece(pieces, Path("x.gguf"))


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: train_model(300, model_type="bpe"), "not a unigram model"),
        (lambda: train_model(300, treat_whitespace_as_suffix=True), "treats spaces differently"),
        (lambda: DEMO.read_bytes()[:-3], "cut short"),
        (lambda: b"\x0b\x01", "wire type 3"),
        (lambda: b"\x08\x01", "a number, where bytes are expected"),
        (lambda: b"\x80" * 20, "cut short"),
    ],
)
def test_an_unsupported_model_file_is_refused(model: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_sentencepiece(model())


def test_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in number: 2, 1, 2"):
        SentencePieceModel(("a", "b"), (0.0,), (NORMAL, NORMAL))
