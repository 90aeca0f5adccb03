"""The command of a request, parsed by the command line, gives an equal request; what it cannot say is a note."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields, replace
from typing import Any, get_type_hints

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from kadr.cli.flags import options
from kadr.cli.flags.request import check_choices, lora_options
from kadr.cli.main import app
from kadr.cli.prompts import STDIN
from kadr.cli.series import build_series
from kadr.request.inputs import CONTROL_KINDS, Condition, Control
from kadr.request.reproduce import command_line as module
from kadr.request.reproduce.command_line import CommandLine, command_line
from kadr.request.request import MAX_SEED_BITS, Request
from kadr.request.windows import Windows
from kadr.sampling.samplers import SAMPLERS
from kadr.sampling.settings import STG_MODES, Guidance, Pass
from kadr.sampling.step_cache import StepCache
from kadr.shapes import Size
from kadr.spec.lora import Lora

GENERATE = typer.main.get_command(app).commands["generate"]  # type: ignore[attr-defined]
GROUPS = get_type_hints(options.GenerateFlags)


def parse(command: CommandLine) -> tuple[Request, options.GenerateFlags]:
    """Returns the request and the flags that the command line reads, from the text for a shell."""
    program, verb, *arguments = shlex.split(str(command))
    assert (program, verb) == ("kadr", "generate")
    values = GENERATE.make_context("generate", arguments).params
    groups = {name: group(**{item.name: values[item.name] for item in fields(group)}) for name, group in GROUPS.items()}
    flags = options.GenerateFlags(**groups)
    check_choices(flags)
    assert values["prompt"] != STDIN
    series = build_series(values["prompt"], flags)
    assert len(series) == 1
    return series.request(series.prompts[0], series.template.seed), flags


def same(value: Any) -> Any:
    """Returns a request with one value in the place of a list of one, which means the same, and so for its guidance."""
    guidance = value.guidance
    if guidance == Guidance():
        return replace(value, guidance=None)
    if guidance is None:
        return value
    names = ("cfg_scale", "stg_scale", "rescale")
    single = {name: item[0] for name in names if isinstance(item := getattr(guidance, name), tuple) and len(item) == 1}
    blocks = guidance.skip_blocks
    if blocks and len(blocks) == 1 and isinstance(blocks[0], tuple):
        single["skip_blocks"] = blocks[0]
    return replace(value, guidance=replace(guidance, **single))


def optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


def numbers(low: float, high: float) -> st.SearchStrategy[Any]:
    return st.floats(low, high) | st.integers(int(low), int(high))


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30) | st.sampled_from(
    ["--frames", "-5 degrees", "--", "--lora=x", "it's 'so' \"quoted\" $HOME `x` \\", "a=b", "--num_frames", "", "0.8"]
)
STRENGTHS = st.floats(0, 1, exclude_min=True)
RANGES = optional(st.tuples(optional(st.integers(-(10**9), 10**9)), optional(st.integers(0, 10**9))))
SIGMAS = st.lists(st.floats(0.01, 1), min_size=1, max_size=5, unique=True).map(lambda x: tuple(sorted(x, reverse=True)))
IMAGES = st.builds(
    Condition,
    st.sampled_from(["/in/a.png", "/in/2.jpg", "/in/it's a.png"]),
    frame=st.integers(-400, 400),
    strength=STRENGTHS,
)
BOXES = st.builds(Condition, st.just("/in/b.png"), box=st.tuples(*[st.integers(0, 99)] * 2, *[st.integers(1, 99)] * 2))
CLIPS = st.builds(
    Condition,
    st.sampled_from(["/in/a.mp4", "/in/a.png"]),
    frame=st.integers(-400, 400),
    strength=STRENGTHS,
    is_clip=st.just(True),
    frame_range=RANGES,
)
CONTROLS = st.builds(
    Control, st.sampled_from(["/in/a.mp4", "/in/x:a.mov"]), kind=st.sampled_from(CONTROL_KINDS), frame_range=RANGES
)
BLOCKS = st.lists(st.integers(0, 40), max_size=3, unique=True).map(tuple)
CACHES = st.builds(StepCache, st.just("first-block"), threshold=STRENGTHS) | st.builds(
    StepCache, st.just("taylor"), interval=st.integers(1, 16)
)


@st.composite
def guidances(draw: Any) -> Guidance:
    sigmas = draw(optional(SIGMAS))

    def values(one: st.SearchStrategy[Any]) -> Any:
        lists = st.lists(one, min_size=len(sigmas), max_size=len(sigmas)).map(tuple) if sigmas else st.nothing()
        return draw(optional(one | lists))

    blocks = st.lists(BLOCKS, min_size=len(sigmas), max_size=len(sigmas)).map(tuple) if sigmas else st.nothing()
    return Guidance(
        cfg_scale=values(numbers(1, 100)),
        stg_scale=values(numbers(0, 100)),
        rescale=values(numbers(0, 1)),
        skip_blocks=draw(optional(BLOCKS | blocks)),
        stg_mode=draw(optional(st.sampled_from(STG_MODES))),
        sigmas=sigmas,
        cfg_star=draw(optional(st.booleans())),
        apg=draw(optional(numbers(-1, 1))),
        apg_norm=draw(optional(numbers(0, 1e6))),
    )


@st.composite
def requests(draw: Any) -> Request:
    windows = draw(
        optional(
            st.builds(
                Windows,
                frames=optional(st.integers(9, 257)),
                overlap=optional(st.just(8)),
                overlap_strength=STRENGTHS,
                adain=numbers(0, 1),
                anchor_strength=optional(numbers(0, 1)),
            )
        )
    )
    has_sigmas, has_input = draw(st.booleans()), draw(st.booleans())
    prompt = draw(TEXTS) if windows is None else draw(st.sampled_from(["a|b", "a fox | it sleeps", "-x", ""]))
    steps = {"sigmas": draw(SIGMAS)} if has_sigmas else {"steps": draw(optional(st.integers(1, 1000)))}
    skipped = {} if has_sigmas else {name: draw(st.integers(0, 3)) for name in ("skip_initial", "skip_final")}
    source = {"input_video": "/in/c.mp4", "denoise_strength": draw(optional(st.floats(0.01, 0.99)))}
    second = st.builds(
        Pass,
        steps=optional(st.integers(1, 9)),
        skip_initial=st.integers(0, 3),
        sampler=optional(st.sampled_from(sorted(SAMPLERS))),
        guidance=st.builds(Guidance, cfg_scale=optional(numbers(1, 9))),
        tone_map=optional(numbers(0, 1)),
    ) | st.builds(Pass, sigmas=SIGMAS)
    return Request(
        "" if prompt == STDIN else prompt,
        size=draw(optional(st.just("auto") | st.builds(Size, st.integers(32, 512), st.integers(32, 512)))),
        frames=draw(optional(st.integers(1, 257))),
        fps=draw(optional(numbers(1, 240))),
        seed=draw(st.integers(-(2**MAX_SEED_BITS) + 1, 2**MAX_SEED_BITS - 1)),
        guidance=draw(optional(guidances())),
        guidance_batch=draw(st.booleans()),
        negative_prompt=draw(optional(TEXTS)),
        sampler=draw(optional(st.sampled_from(sorted(SAMPLERS)))),
        cache=draw(optional(CACHES)),
        tone_map=draw(optional(numbers(0, 1))),
        multi_scale=draw(optional(st.booleans())),
        second_pass=draw(optional(second)),
        conditions=(*draw(st.lists(IMAGES | BOXES, max_size=2)), *draw(st.lists(CLIPS, max_size=2))),
        controls=tuple(draw(st.lists(CONTROLS, max_size=2))),
        windows=windows,
        image_noise=draw(optional(numbers(0, 10))),
        image_crf=draw(optional(st.integers(0, 51))),
        decode_timestep=draw(optional(numbers(0, 1))),
        decode_noise=draw(optional(numbers(0, 1))),
        **steps,
        **skipped,
        **(source if has_input else {}),
    )


@given(requests())
@settings(max_examples=150, deadline=None)
def test_parsed_command_is_the_request(request: Request) -> None:
    command = command_line(request)
    assert command.notes == ()
    assert same(parse(command)[0]) == same(request)


def test_default_values_are_left_out() -> None:
    assert str(command_line(Request("a fox"))) == "kadr generate 'a fox'"
    request = Request("a fox", size=(704, 480), fps=24.0, seed=7, cache="taylor")
    assert str(command_line(request)) == "kadr generate 'a fox' --size 704x480 --fps 24 --seed 7 --cache taylor"


def test_every_field_of_a_request_is_in_the_command_or_a_note() -> None:
    elsewhere = {"prompt", "guidance", "guidance_batch", "cache", "multi_scale", "second_pass", "conditions"}
    elsewhere |= {"controls", "lora_strengths", "windows"}
    assert {item.name for item in fields(Request)} == module._PLAIN_FLAGS.keys() | elsewhere
    assert {item.name for item in fields(Windows)} == module._WINDOW_FLAGS.keys()
    assert {item.name for item in fields(StepCache)} == {"kind", *module._CACHE_FLAGS}
    assert {item.name for item in fields(Pass)} == {"guidance", *module._SECOND_PASS_FLAGS}
    assert {item.name for item in fields(Guidance)} == {"skip_blocks", "cfg_star", *module._GUIDANCE_FLAGS}


@pytest.mark.parametrize(
    "fields_, note",
    [
        ({"downscale_factor": 0.5}, "downscale_factor is 0.5"),
        ({"original_prompt": "a"}, "original_prompt is a"),
        ({"cache": StepCache("taylor", order=2)}, "cache.order is 2"),
        ({"second_pass": Pass(steps=3, skip_final=1)}, "second_pass.skip_final is 1"),
        ({"second_pass": Pass(guidance=Guidance(stg_scale=1.0))}, "second_pass.guidance.stg_scale is 1.0"),
        ({"second_pass": Pass(guidance=Guidance(cfg_scale=(3, 2)))}, r"second_pass.guidance.cfg_scale is \(3, 2\)"),
        ({"guidance": Guidance(cfg_scale=(3, 2))}, r"guidance.cfg_scale is \(3, 2\) without sigmas"),
        ({"lora_strengths": (0.5,)}, r"lora_strengths is \(0.5,\)"),
        ({"conditions": (Condition("a.mp4"), Condition("a.png"))}, "images before the clips"),
        ({"conditions": (Condition("a.mp4", is_clip=False),)}, "a.mp4 is an image"),
        ({"prompt": "-"}, "prompt is '-'"),
        ({"prompt": "a\0b"}, r"prompt is 'a\\x00b'"),
        ({"negative_prompt": "a\0b"}, "negative_prompt is a"),
        ({"sigmas": ()}, r"sigmas is \(\)"),
    ],
)
def test_what_no_flag_can_say_is_a_note(fields_: dict[str, Any], note: str) -> None:
    command = command_line(Request(**{"prompt": "a fox", **fields_}))
    assert len(command.notes) == 1
    assert re.search(note, command.notes[0]), command.notes
    parse(command)


@pytest.mark.parametrize(
    "loras, strengths, expected",
    [
        ([Lora("teal")], None, [("teal",)]),
        ([Lora("teal", 0.5)], None, [("teal", 0.5)]),
        ([Lora("teal", 0.5), Lora("b", 1, -2)], None, [("teal", 0.5), ("b", 1, -2)]),
        ([Lora("teal"), Lora("b")], (0.5, (1.0, 2.0)), [("teal", 0.5), ("b", 1, 2)]),
        ([Lora("teal", 3)], (1.0,), [("teal",)]),
    ],
)
def test_loras_are_said_with_their_strengths(loras: list[Lora], strengths: Any, expected: list[Any]) -> None:
    request = Request("0.8", lora_strengths=strengths)
    parsed, flags = parse(command_line(request, model="ltxv", loras=loras, options={"--quant": "int8"}))
    assert lora_options(flags.model)["loras"] == expected
    assert (flags.model.model, flags.model.quant, parsed.prompt) == ("ltxv", "int8", "0.8")
