"""Encodes the prompts of videos that come next, so that the text encoder is loaded once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from kadr.errors import ignore_kadr_warnings
from kadr.pipeline.progress import Watch, ignore_progress
from kadr.pipeline.series.loop import concerns_one_video
from kadr.request.request import Request
from kadr.request.series import RequestSeries

if TYPE_CHECKING:
    from kadr.pipeline.engine import Engine

# Embeddings of so many prompts fit in the prompt cache, which drops the oldest: those of T5-XXL take up to 4 MB each.
ENCODED_AHEAD = 100
_PROMPTS_AT_ONCE = 16  # padded embeddings that are on the device at a time


def encode_prompts_ahead(
    engine: Engine, series: RequestSeries, prompts: Sequence[str], *, watch: Watch = ignore_progress
) -> None:
    """Stores the embeddings of prompts in the prompt cache, so that the text encoder is loaded once for all of them.

    A prompt that cannot be encoded is left to its video, which says why, as are warnings about it.

    Args:
        prompts: at most `ENCODED_AHEAD` of the series.
        watch: see `Engine.generate`.

    Raises:
        As `Engine.generate`, but for errors that concern one video.
    """
    requests: list[Request] = []
    texts: dict[str, None] = {}
    for prompt in prompts:
        with _left_to_its_video(), ignore_kadr_warnings():
            request = series.request(prompt, series.template.seed)
            texts |= dict.fromkeys(engine.resolve(request).all_prompts)
            requests.append(request)
    if not requests:
        return
    engine.prepare(requests[0])
    distinct = list(texts)
    for start in range(0, len(distinct), _PROMPTS_AT_ONCE):
        chunk = distinct[start : start + _PROMPTS_AT_ONCE]
        with _left_to_its_video(), ExitStack() as started:
            with ignore_kadr_warnings():
                generation = started.enter_context(
                    engine.start(requests[0], stages=("text",), prompts=chunk, watch=watch)
                )
            generation.encode_prompts()


@contextmanager
def _left_to_its_video() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not concerns_one_video(error):
            raise
