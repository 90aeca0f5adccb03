"""Contender of transformers: its T5 encoder, read from the same folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from torch import Tensor
from transformers import T5EncoderModel

from kadr.bench.runner import Contender, SkippedContender
from kadr.bench.stage_case import StageCase, stored_bytes


def create_contenders(stage_case: StageCase, stack: ExitStack) -> Iterator[Contender | SkippedContender]:
    folder = stage_case.files.text_encoder_folder / "text_encoder"
    module = T5EncoderModel.from_pretrained(folder, dtype=stage_case.dtype).eval().to(stage_case.device)
    input_ids, mask = stage_case.inputs["input_ids"], stage_case.inputs["prompt_attention_mask"]

    def run() -> Tensor:
        return module(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state[mask]

    dtype = str(stage_case.dtype).removeprefix("torch.")
    yield Contender(name="transformers", run=run, dtype=dtype, weight_bytes=stored_bytes(module))
