"""Step caching on the demo's own recipe of 24 guided steps: a good part of it is skipped, and the video stays close."""

from __future__ import annotations

import pytest

from kadr import Engine, Request, StepCache
from train.evaluate import psnr
from train.scenes import held_out_captions

# The cache, the least share of layers that is skipped, and a bound on the PSNR; measured there: 39.6 and 41.3 dB.
WAYS = {
    "first-block": (StepCache("first-block"), 0.25, 33.0),
    "taylor": (StepCache("taylor"), 0.4, 35.0),
}


def test_step_caching_skips_many_blocks_and_the_video_stays_close() -> None:
    engine = Engine.open("demo", device="cpu", dtype="float32")
    ((caption, _),) = held_out_captions(1, 77)
    request = Request(prompt=caption, seed=0)
    assert engine.resolve(request).steps == 24
    right, calls = engine.generate(request), 0

    def ran(*_: object) -> None:
        nonlocal calls
        calls += 1

    with engine.components.transformer(0, None) as transformer:
        whole = 2 * 24 * len(transformer.blocks)
        hooks = [layer.register_forward_hook(ran) for layer in transformer.blocks]
    for kind, (cache, share, bound) in WAYS.items():
        calls = 0
        video = engine.generate(Request(prompt=caption, seed=0, cache=cache))
        assert 1 - calls / whole >= share, kind
        assert psnr(video.frames, right.frames) == pytest.approx(60, abs=60 - bound), kind  # and it is not the same
    for hook in hooks:
        hook.remove()
