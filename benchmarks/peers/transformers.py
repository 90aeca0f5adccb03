"""The text encoder of transformers, read from the same folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from torch import Tensor
from transformers import T5EncoderModel

from kadr.bench.runner import Absent, Contender
from kadr.bench.stage_case import Work, stored_bytes


def enter(work: Work, stack: ExitStack) -> Iterator[Contender | Absent]:
    folder = work.source.text / "text_encoder"
    module = T5EncoderModel.from_pretrained(folder, dtype=work.dtype).eval().to(work.device)
    ids, mask = work.given["ids"], work.given["mask"]

    def run() -> Tensor:
        return module(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask]

    dtype = str(work.dtype).removeprefix("torch.")
    yield Contender(name="transformers", run=run, dtype=dtype, weights=stored_bytes(module))
