"""Tokenizer and text encoder: known ids, finite and distinct embeddings that depend on context and order."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kadr.selftest import figures
from kadr.selftest.result import Check, NotRun, at_least, at_most, none_of
from kadr.selftest.scene import PROMPT, REARRANGED_PROMPT
from kadr.selftest.stages.weights import XXL_WIDTH
from kadr.selftest.subject import Subject

# Vocabulary of the text encoder -> a sentence and its ids, with the end of sequence. T5's are those of its published
# examples; its weights have 32128 rows, of which the tokenizer uses 32000 or 32100.
KNOWN_IDS = {
    32128: (
        "translate English to German: The house is wonderful.",
        (13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1),
    ),
    105: (PROMPT, (3, 40, 31, 16, 9, 30, 7, 6, 3, 17, 5, 1)),  # the demo's
}
# Embeddings that are the same for two prompts, or for all words, say nothing. The demo's have cosines of 0.84 and 0.43,
# T5's of 0.5 to 0.9 and less; rounding to bfloat16 alone stays above 0.999.
MAX_PROMPT_COSINE, MAX_TOKEN_COSINE = 0.995, 0.95
MIN_CONTEXT_EFFECT = 0.01  # of other words on the embedding of one, over its norm: of T5 v1.1 XXL; the demo has none
MIN_SPREAD = 0.05  # std over the channels of the mean embedding, over its rms; 0 if all channels are alike


def check_tokenizer(subject: Subject) -> Iterator[Check]:
    """Compares token ids with those that the text encoder was trained on."""
    tokenizer, vocabulary = subject.spec.tokenizer, subject.spec.text_encoder_checkpoint.config.vocab_size
    if tokenizer is None:
        raise NotRun("the tokenizer is not on disk")
    known = KNOWN_IDS.get(vocabulary)
    if known is None:
        raise NotRun(f"no ids are known of a text encoder with a vocabulary of {vocabulary}")
    sentence, expected = known
    tokens = tokenizer.encode(sentence)
    ids = tuple(tokens.ids[tokens.mask].tolist())
    wrong = [f"{actual} for {right}" for actual, right in zip(ids, expected, strict=False) if actual != right]
    yield none_of("wrong token ids", wrong)
    yield Check("tokens of the sentence", len(ids), len(expected), len(expected))


def check_text_encoder(subject: Subject) -> Iterator[Check]:
    """Encodes prompts that differ, and one word in two of them."""
    prompt, other, empty = (embeddings.float() for embeddings in subject.embeddings)
    yield none_of("embeddings that are not finite", [] if bool(torch.isfinite(prompt).all()) else [PROMPT])
    mean = prompt.mean(0)
    yield at_least("spread over channels", float(mean.std() / mean.square().mean().sqrt()), MIN_SPREAD)
    yield at_most("cosine of two prompts", figures.cosine(prompt.mean(0), other.mean(0)), MAX_PROMPT_COSINE)
    yield at_most("cosine of prompt and no prompt", figures.cosine(mean, empty.mean(0)), MAX_PROMPT_COSINE)
    unit = torch.nn.functional.normalize(prompt, dim=1)
    alike = unit @ unit.T
    count = len(alike)
    yield at_most(
        "mean cosine of a prompt's tokens", float((alike.sum() - count) / (count * (count - 1))), MAX_TOKEN_COSINE
    )
    if subject.spec.text_encoder_checkpoint.config.d_model == XXL_WIDTH:
        rearranged = subject.engine.encode_prompts(subject.request, [REARRANGED_PROMPT])[0].float()
        effect = float((prompt[0] - rearranged[0]).norm() / prompt[0].norm())
        yield at_least("effect of other words on the first", effect, MIN_CONTEXT_EFFECT)
