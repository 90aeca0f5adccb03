"""The tokenizer on a small SentencePiece model trained here, against transformers' T5Tokenizer and closed forms."""

import io
import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers

from kadr.errors import CheckpointError, RequestError
from kadr.text.tokenizer import EOS_ID, MAX_SEQUENCE_LENGTH, MAX_TOKENIZER_BYTES, Tokenizer

PLAIN = (
    "a red circle moving right over the blue sea while birds fly slowly through golden light of evening cafés 42 , ."
)
PROMPTS = [
    PLAIN,
    "",
    "  \n circle  \t  over\nthe   sea ",
    "héllo wörld, 電影 and кадр!",
    "cats 🐈🐈 and a family 👨\u200d👩\u200d👧",
    "ﬁve ½ ① cafe\u0301 wide\u3000space no\u00a0break zero\u200bwidth",
    "control\x01 characters\x1c and \x00 nothing",
    "▁ already▁marked ▁",
    "x" * 90,
    "a </s> in the middle, <pad> and <unk>, and one at the end </s>",
    "<pad>circle</s></s>",
]


def train(**ids: int) -> bytes:
    """Trains a unigram model of 150 pieces, with T5's ids by default."""
    draw = random.Random(0)
    syllables = ["".join(draw.choices("aeiou", k=1) + draw.choices("bdfgklmnprstv", k=1)) for _ in range(40)]
    words = PLAIN.split() + ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(400)]
    lines = [" ".join(draw.choices(words, k=draw.randint(3, 14))) for _ in range(1500)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=150,
        **({"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | ids),
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def field(message: bytes, number: int) -> bytes:
    """Returns a length-delimited field of a protocol buffer, without a dependency on protobuf."""
    offset = 0

    def varint() -> int:
        nonlocal offset
        value = shift = 0
        while True:
            byte, offset = message[offset], offset + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while True:
        tag = varint()
        if tag & 7 == 0:
            varint()
            continue
        if tag & 7 != 2:
            offset += {1: 8, 5: 4}[tag & 7]
            continue
        size = varint()
        body, offset = message[offset : offset + size], offset + size
        if tag >> 3 == number:
            return body


@pytest.fixture(scope="module")
def model() -> bytes:
    return train()


@pytest.fixture(scope="module")
def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def oracle(model: bytes, processor: sentencepiece.SentencePieceProcessor) -> transformers.T5Tokenizer:
    """Returns transformers' tokenizer with the same pieces and normalization (precompiled_charsmap)."""
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    charsmap = field(field(model, 3), 2)
    return transformers.T5Tokenizer(vocab=pieces, _spm_precompiled_charsmap=charsmap, extra_ids=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: bytes, oracle: transformers.T5Tokenizer) -> Path:
    """Returns a folder with original/spiece.model and converted/tokenizer.json."""
    root = tmp_path_factory.mktemp("tokenizers")
    (root / "original").mkdir()
    (root / "original" / "spiece.model").write_bytes(model)
    oracle.save_pretrained(root / "converted")
    return root


@pytest.fixture(params=["original", "converted"])
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    return Tokenizer.open(folder / request.param)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_and_mask_equal_those_of_transformers(tokenizer, oracle, prompt):
    ours = tokenizer.encode(prompt)
    options = {"max_length": MAX_SEQUENCE_LENGTH, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
    # The official tokenizer adds no end of sequence to a prompt that has one; the newer one compared with here does.
    expected = oracle(re.sub("</s>$", "", prompt.strip()), **options)
    assert torch.equal(ours.ids, expected.input_ids)
    assert torch.equal(ours.mask, expected.attention_mask.bool())
    assert ours.truncated_text == ""


def test_ids_are_pieces_then_end_of_sequence_then_padding(tokenizer, processor):
    pieces = processor.encode(PLAIN)
    ids, mask, truncated_text, num_tokens = tokenizer.encode(f" {PLAIN}\n")
    assert (ids.dtype, ids.shape, mask.dtype, mask.shape) == (torch.int64, (1, 256), torch.bool, (1, 256))
    assert ids[0].tolist() == pieces + [1] + [0] * (255 - len(pieces))
    assert mask.sum() == len(pieces) + 1
    assert mask[0, : len(pieces) + 1].all()
    assert (truncated_text, num_tokens) == ("", len(pieces) + 1)


@pytest.mark.parametrize("prompt", ["", " \n "])
def test_an_empty_prompt_is_a_lone_end_of_sequence(tokenizer, prompt):
    ids, mask, *_, num_tokens = tokenizer.encode(prompt)
    assert ids[0].tolist() == [1] + [0] * 255
    assert mask[0].tolist() == [True] + [False] * 255
    assert num_tokens == 1


def test_a_long_prompt_keeps_its_end_of_sequence_and_reports_the_cut(tokenizer, processor):
    prompt = "\n".join([PLAIN] * 8)
    ids, mask, truncated_text, num_tokens = tokenizer.encode(prompt)
    assert ids[0].tolist() == processor.encode(prompt)[:255] + [EOS_ID]
    assert mask.all()
    assert num_tokens == len(processor.encode(prompt)) + 1
    assert prompt.endswith(truncated_text)
    fitting = prompt.removesuffix(truncated_text)
    first_cut_word = truncated_text.split()[0]
    assert len(processor.encode(fitting)) <= 255 < len(processor.encode(fitting + first_cut_word))


def test_a_prompt_is_cut_from_the_first_token_too_many(tokenizer, processor):
    word = "x"  # one token for the space, one for the unknown letter
    assert len(processor.encode(word)) == 2
    fits, too_long = " ".join([word] * 127), " ".join([word] * 128)
    assert tokenizer.encode(fits).truncated_text == ""
    assert tokenizer.encode(fits).mask.sum() == 255
    assert tokenizer.encode(too_long).truncated_text == word
    assert tokenizer.encode(too_long).mask.sum() == 256
    assert [tokenizer.encode(prompt).num_tokens for prompt in (fits, too_long)] == [255, 257]


def test_one_endless_word_is_cut_as_a_whole(tokenizer):
    tokens = tokenizer.encode("ab" * 600)
    assert tokens.truncated_text == "ab" * 600
    assert tokens.ids[0, -1] == EOS_ID


def test_a_literal_end_of_sequence_is_not_followed_by_another(tokenizer, processor):
    ids, mask, *_, num_tokens = tokenizer.encode("circle </s>")
    assert ids[0, mask[0]].tolist() == processor.encode("circle") + [1]
    assert num_tokens == len(processor.encode("circle")) + 1


def test_both_files_give_the_same_ids_for_random_text(folder):
    original, converted = Tokenizer.open(folder / "original"), Tokenizer.open(folder / "converted")
    draw = random.Random(1)
    alphabet = "abcdefghij KLMNOP 0123 .,;:!?'\"-()<>/\n\t éüñßжю電影ﬁ½²™🐈"
    for _ in range(300):
        prompt = "".join(draw.choices(alphabet, k=draw.randint(0, 400)))
        ours, theirs = original.encode(prompt), converted.encode(prompt)
        assert torch.equal(ours.ids, theirs.ids), prompt
        assert ours.truncated_text == theirs.truncated_text


def test_ids_are_below_the_vocabulary_size(folder):
    assert Tokenizer.open(folder / "original").vocab_size == 150
    assert Tokenizer.open(folder / "converted").vocab_size == 150
    prompt = "<extra_id_0> <extra_id_99>"
    assert Tokenizer.open(folder / "original").encode(prompt).ids.max() < 150


def test_a_vocabulary_of_released_size_has_sentinels(monkeypatch, folder, processor):
    monkeypatch.setattr("kadr.text.tokenizer._RELEASED_PIECES", 150)
    tokenizer = Tokenizer.open(folder / "original")
    ids, mask, *_ = tokenizer.encode("circle <extra_id_0>sea<extra_id_99>")
    assert ids[0, mask[0]].tolist() == [*processor.encode("circle"), 32099, *processor.encode("sea"), 32000, 1]
    assert tokenizer.vocab_size == 32100


@pytest.mark.parametrize("source", ["original/spiece.model", "converted/tokenizer.json"])
@pytest.mark.parametrize(
    "subfolder, opened",
    [("", ""), ("tokenizer", ""), ("tokenizer", "text_encoder"), ("", "file"), ("", "text_encoder.safetensors")],
    ids=["in the folder", "in its tokenizer", "in the tokenizer beside it", "by name", "beside the weights"],
)
def test_the_tokenizer_is_found(folder, tmp_path, source, subfolder, opened):
    file = tmp_path / subfolder / Path(source).name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes((folder / source).read_bytes())
    if opened.endswith("safetensors"):
        (tmp_path / opened).touch()
    elif opened == "text_encoder":
        (tmp_path / opened).mkdir()
    path = file if opened == "file" else tmp_path / opened
    assert Tokenizer.open(path).encode("circle").ids[0, 0] > 2
    assert Tokenizer.open(str(path)).vocab_size == 150


def test_spiece_model_is_preferred_to_tokenizer_json(folder, tmp_path):
    (tmp_path / "spiece.model").write_bytes((folder / "original" / "spiece.model").read_bytes())
    (tmp_path / "tokenizer.json").write_text("never read")
    assert Tokenizer.open(tmp_path).vocab_size == 150


def test_a_missing_tokenizer_is_refused_with_all_searched_folders(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.open(tmp_path / "text_encoder")
    text = str(tmp_path / "text_encoder")
    for part in (
        f"{text}, in tokenizer/ there, or in tokenizer/ beside it.",
        "spiece.model",
        "tokenizer.json",
        "google/t5",
    ):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        Tokenizer.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"{}", b"\xff\xfe\x00"])
def test_a_broken_file_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} .* is not a .*git-lfs.*google/t5"):
        Tokenizer.open(tmp_path)


def test_a_truncated_file_is_refused(tmp_path, model):
    (tmp_path / "spiece.model").write_bytes(model[: len(model) // 2])
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        Tokenizer.open(tmp_path)


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "spiece.model").touch()

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("kadr.regular_file.open_regular", denied)
    with pytest.raises(CheckpointError, match=r"spiece.model cannot be read: Permission denied"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
def test_file_too_large_for_a_tokenizer_is_not_read(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        file.truncate(MAX_TOKENIZER_BYTES + 1)
    with pytest.raises(CheckpointError, match=r"cannot be read: it has more than 32,000,000 bytes, too many"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize(
    "rule",
    [
        {"type": "Replace", "pattern": {"String": "r"}, "content": "rr"},
        {"type": "Prepend", "prepend": "rr"},
    ],
)
@pytest.mark.parametrize("kind", ["normalizer", "pre_tokenizer"])
def test_rules_that_make_a_text_longer_are_refused(tmp_path, rule, kind):
    rules = {"type": "Sequence", "normalizers": [rule] * 33}  # each doubles the text
    (tmp_path / "tokenizer.json").write_text(json.dumps({kind: rules}))
    with pytest.raises(CheckpointError, match=r"replaces or adds text by 'rr', more than one character"):
        Tokenizer.open(tmp_path)


UNIGRAM = {"type": "Unigram", "unk_id": 2, "vocab": [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["red", -1]]}


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # the library panics when it opens it
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},  # and here when it encodes
        {"model": {**UNIGRAM, "unk_id": None}},
    ],
)
def test_file_on_which_the_library_fails_is_refused(tmp_path, change):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": UNIGRAM, **change}))
    with pytest.raises(CheckpointError, match=r"tokenizer.json .* is not a tokenizer of the tokenizers library"):
        Tokenizer.open(tmp_path).encode("a blue circle")


def test_the_tokenizer_of_another_family_is_refused(tmp_path):
    (tmp_path / "spiece.model").write_bytes(train(pad_id=-1, unk_id=0, bos_id=1, eos_id=2))
    with pytest.raises(CheckpointError, match=r"not T5's tokenizer.* as -1, 2, 0"):
        Tokenizer.open(tmp_path)


def test_half_a_character_is_refused_with_its_position(tokenizer):
    with pytest.raises(RequestError, match="position 4"):
        tokenizer.encode(" red \ud83d circle")
