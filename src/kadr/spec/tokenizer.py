"""Finds the tokenizer of a text encoder that comes without one: the released one, on disk or to be fetched."""

from __future__ import annotations

from dataclasses import replace

from kadr.checkpoints.text_encoder import TextEncoderCheckpoint
from kadr.errors import CheckpointError
from kadr.models.registry import RELEASES_BY_NAME, TOKENIZER
from kadr.models.t5 import T5_XXL
from kadr.spec.locate import TOKENIZER_ROLE, ModelComponent, fetch_release, locate_release


def add_tokenizer(text_encoder: TextEncoderCheckpoint) -> tuple[TextEncoderCheckpoint, ModelComponent | None]:
    """Returns a text encoder with the released tokenizer if it has none, and that tokenizer.

    An encoder of another vocabulary is returned as it is: its tokens are not those of the released tokenizer.
    """
    has_released_vocabulary = text_encoder.config.vocab_size == T5_XXL.vocab_size
    if not text_encoder.is_on_disk or text_encoder.has_tokenizer or not has_released_vocabulary:
        return text_encoder, None
    component = locate_release(TOKENIZER, TOKENIZER_ROLE)
    return replace(text_encoder, tokenizer_path=component.path), component


def fetch_tokenizer(text_encoder: TextEncoderCheckpoint) -> TextEncoderCheckpoint:
    """Returns a text encoder with its tokenizer on disk, which is fetched if it is nowhere.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    text_encoder, component = add_tokenizer(text_encoder)
    if component is None or component.path is not None:
        return text_encoder
    try:
        fetch_release(RELEASES_BY_NAME[TOKENIZER])
    except CheckpointError as error:
        raise CheckpointError(f"{error} Or put spiece.model beside {text_encoder.path}.") from error
    return add_tokenizer(text_encoder)[0]
