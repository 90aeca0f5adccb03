"""Every field of what kadr stores, and of a config in a header, refuses values of every wrong type and size."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kadr.checkpoints.detect.single_file import _parse_config_entry
from kadr.errors import CheckpointError, KadrError, RequestError
from kadr.models.t5 import T5_XXL, T5Config
from kadr.models.transformer import TRANSFORMER_2B, TransformerConfig
from kadr.models.upscaler import SPATIAL_UPSCALER_CONFIG, UpscalerConfig
from kadr.models.vae.config import VAE_0_9_1, VAE_0_9_5, VAEConfig
from kadr.request.inputs import Condition, Control
from kadr.request.request import Request
from kadr.request.windows import Windows
from kadr.sampling.schedules import Schedule
from kadr.sampling.settings import Guidance, Pass

HOSTILE: tuple[Any, ...] = (
    *(None, True, 0, -1, 10**9, 2**64, 10**400, 10**5000, 0.5, 1e308, math.nan, math.inf, "", "x" * 10**5, "\x1b[31m"),
    *(
        "\ud800",
        "a\0b",
        "y" * 256,
        [],
        ["x"],
        [[]],
        [math.nan] * 3,
        [10**400],
        {},
        {"a": 1},
        {"x": {"y": []}},
        [{"a": 1}],
    ),
)


def full_request() -> Request:
    """A request with every field set."""
    guidance = Guidance(
        cfg_scale=(1.0, 2.0), sigmas=(1.0, 0.5), skip_blocks=((1,), (2,)), stg_scale=(1.0, 1.0), apg=0.1, apg_norm=1.0
    )
    return Request(
        prompt="a | b",
        size=(64, 64),
        frames=9,
        fps=24,
        steps=3,
        guidance=guidance,
        negative_prompt="n",
        sampler="euler",
        multi_scale=True,
        second_pass=Pass(sigmas=(0.9, 0.5), guidance=Guidance(cfg_scale=2.0)),
        conditions=(Condition(media="a.png", box=(0, 0, 10, 10)), Condition(media="a.mp4", frame_range=(0, 9))),
        controls=(Control(media="a.mp4", kind="canny", frame_range=(0, None)),),
        lora_strengths=(0.5, (1.0, 0.3)),
        windows=Windows(frames=25, overlap=8, anchor_strength=0.4),
        input_video="a.mp4",
        denoise_strength=0.4,
        cache="first-block",
    )


def paths(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every value of plain data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def replace(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(data)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def from_header(entry: str, parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    source: Any = SimpleNamespace(path="x.safetensors")
    return lambda data: _parse_config_entry(source, entry, lambda: parse(data))


T5_HEADER = {"model_type": "t5", "feed_forward_proj": "gated-gelu", **vars(T5_XXL)}
READERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "request": (full_request().to_json(), lambda data: Request.from_json(data).to_json()),
    "transformer": (TRANSFORMER_2B.to_header(), from_header("transformer", TransformerConfig.from_header)),
    "vae": (VAE_0_9_5.to_header(), from_header("vae", VAEConfig.from_header)),
    "vae 0.9.1": (VAE_0_9_1.to_header(), from_header("vae", VAEConfig.from_header)),
    "scheduler": (
        {"scheduler": Schedule(shifting="SD3", shift_terminal=0.1).to_header(), "sigmas": [1.0, 0.5]},
        from_header("scheduler", lambda data: Schedule.from_header(data["scheduler"], data["sigmas"])),
    ),
    "upscaler": (SPATIAL_UPSCALER_CONFIG.to_header(), from_header("upscaler", UpscalerConfig.from_header)),
    "t5": (T5_HEADER, T5Config.from_header),
}


@pytest.mark.parametrize("name", READERS)
def test_hostile_value_of_any_field_is_read_or_refused_in_a_line(name: str) -> None:
    data, read = READERS[name]
    data = json.loads(json.dumps(data))
    messages = []
    for path in paths(data):
        for value in HOSTILE:
            try:
                read(replace(data, path, value))
            except KadrError as error:
                messages.append(str(error))
    assert len(messages) > 5 * len(HOSTILE)
    assert all(map(str.isprintable, messages))
    assert max(map(len, messages)) < 490


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("transformer", ("num_layers",), 10**9),
        ("transformer", ("num_layers",), -1),
        ("transformer", ("num_attention_heads",), math.nan),
        ("transformer", ("attention_head_dim",), "64"),
        ("transformer", ("positional_embedding_max_pos",), [20, 2048]),
        ("transformer", ("positional_embedding_theta",), math.inf),
        ("vae", ("latent_channels",), 10**9),
        ("vae", ("encoder_blocks", 0, 1, "num_layers"), 10**9),
        ("vae", ("decoder_blocks", 1, 1, "multiplier"), 0),
        ("vae", ("encoder_blocks",), [["res_x", 1]] * 10**5),
        ("upscaler", ("num_blocks_per_stage",), 10**9),
        ("upscaler", ("mid_channels",), 33),
        ("t5", ("num_layers",), 10**9),
        ("t5", ("vocab_size",), 2**40),
        ("t5", ("relative_attention_num_buckets",), 10**6),
        ("scheduler", ("scheduler", "target_shift_terminal"), math.nan),
        ("scheduler", ("sigmas",), [10**400]),
    ],
)
def test_absurd_config_is_refused_when_the_header_is_read(name: str, path: tuple[Any, ...], value: Any) -> None:
    data, read = READERS[name]
    with pytest.raises(CheckpointError):
        read(replace(json.loads(json.dumps(data)), path, value))


def test_long_and_impossible_paths_of_a_request_are_refused() -> None:
    for media in ("x" * 256, "x/" * 3000, "a\0b", "\ud800"):
        with pytest.raises(RequestError, match="path"):
            Condition(media=media)
