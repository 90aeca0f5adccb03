"""Strategies for whole commands: hostile files, prompts, paths, numbers and variables."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import typer
from hypothesis import strategies as st

from kadr.batch.field_names import FIELDS
from kadr.cli.main import app
from kadr.cli.prompts import MAX_PROMPT_BYTES
from tests.fuzz import files
from tests.fuzz.command import Case
from tests.fuzz.values import json_values, numbers, texts

PROMPT = "a red circle moving right on a black background"
TINY = ("--size", "32x32", "--frames", "1", "--steps", "1")
PLANS = (("plan", PROMPT), ("generate", PROMPT, "--dry-run"))
MAKES = ("generate", PROMPT, "--model", "demo", *TINY, "--no-prompt-cache")


@st.composite
def checkpoint_cases(draw: Any) -> Case:
    """A damaged safetensors as model, VAE, upscaler, second model; or a text encoder's config.json."""
    tiny = dict(files.tiny_folder())
    role = draw(st.sampled_from(("model", "model", "vae", "upscaler", "text_encoder", "second-model")))
    if role == "text_encoder":
        import json

        from tests.fuzz.values import replace_value

        config = json.loads(tiny["text_encoder/config.json"])
        tiny["text_encoder/config.json"] = replace_value(config, draw).encode("utf-8", "surrogatepass")
    elif role == "upscaler":
        tiny["x.safetensors"] = draw(files.safetensors(files.tiny_upscaler))
    else:
        name = "model.safetensors" if role == "model" else "x.safetensors"
        tiny[name] = draw(files.safetensors(lambda: files.tiny_folder()["model.safetensors"]))
    flags = () if role in ("model", "text_encoder") else (f"--{role}", "x.safetensors", "--multi-scale")
    inspected = {"model": "model.safetensors", "text_encoder": "text_encoder"}.get(role, "x.safetensors")
    args = draw(
        st.sampled_from(
            (
                ("inspect", inspected),
                *((*plan, "--model", "model.safetensors", *flags) for plan in PLANS),
                ("generate", PROMPT, "--model", "model.safetensors", *flags, *TINY),
            )
        )
    )
    return Case(args, tiny)


@st.composite
def gguf_cases(draw: Any) -> Case:
    data = {"x.gguf": draw(files.gguf())}
    roles = (("--model", "x.gguf"), ("--text-encoder", "x.gguf"), ("--vae", "x.gguf"))
    plans = [(*plan, *role) for plan in PLANS for role in roles]
    return Case(draw(st.sampled_from((("inspect", "x.gguf"), ("inspect", "x.gguf", "--json"), *plans))), data)


@st.composite
def lora_cases(draw: Any) -> Case:
    data = {"x.safetensors": draw(files.safetensors(files.demo_lora))}
    if draw(st.integers(0, 3)) == 0:
        data["adapter_config.json"] = draw(json_values()).encode("utf-8", "surrogatepass")
        data["adapter_model.safetensors"] = data["x.safetensors"]
    lora = ("--lora", "adapter_model.safetensors" if "adapter_config.json" in data else "x.safetensors")
    partial = draw(st.sampled_from(((), ("--lora-partial",), ("--merge-loras",))))
    args = [("inspect", lora[1]), *((*plan, *lora, *partial) for plan in PLANS), (*MAKES, *lora, *partial)]
    return Case(draw(st.sampled_from(args)), data)


@st.composite
def video_cases(draw: Any) -> Case:
    data = {"x.mp4": draw(files.stored_videos())}
    rerun = ("rerun", "x.mp4", "--output", "again.mp4")
    args = (("inspect", "x.mp4"), ("inspect", "x.mp4", "--json"), rerun, (*rerun, "--model", "demo"))
    return Case(draw(st.sampled_from(args)), data)


@st.composite
def image_cases(draw: Any) -> Case:
    name = draw(st.sampled_from(("x.png", "x.jpg", "x", "x.gif")))
    frame = draw(st.sampled_from(((), ("0", "0.5"), ("-1",), (draw(numbers()), draw(numbers())))))
    plans = [(*plan, "--image", name, *frame) for plan in PLANS]
    args = (*plans, (*MAKES, "--image", name), (*MAKES, "--control", f"canny:{name}"))
    return Case(draw(st.sampled_from(args)), {name: draw(files.images())})


@st.composite
def clip_cases(draw: Any) -> Case:
    name = draw(st.sampled_from(("x.mp4", "x.mkv", "x#1.mp4", "x.gif")))
    parts = draw(st.tuples(numbers(), numbers()))
    frames = draw(st.sampled_from(("", "", "#0:1", "#-1:", "#:", f"#{parts[0]}:{parts[1]}", "#0:" + "9" * 5000)))
    flag = draw(st.sampled_from(("--video", "--control", "--input-video", "--image")))
    value = name + ("" if flag in ("--input-video", "--image") else frames)
    strength = ("--denoise-strength", "0.5") if flag == "--input-video" else ()
    args = [(*plan, flag, value, *strength) for plan in PLANS]
    return Case(draw(st.sampled_from(args)), {name: draw(files.clips())})


@st.composite
def config_cases(draw: Any) -> Case:
    data = {"x.yaml": draw(files.yaml_files())}
    return Case(draw(st.sampled_from([(*plan, "--config", "x.yaml") for plan in PLANS])), data)


@st.composite
def prompt_cases(draw: Any) -> Case:
    prompt = draw(st.one_of(texts(400), st.integers(1, 3000).map(lambda count: "circle " * count)))
    form = draw(st.sampled_from(((prompt,), ("--prompt", prompt, "--prompt", draw(texts())), ("--", prompt))))
    negative = draw(st.sampled_from(((), ("--negative-prompt", draw(texts(200)), "--guidance", "2"))))
    verb = draw(st.sampled_from((("plan",), ("generate", "--dry-run"), ("generate", *TINY, "--no-prompt-cache"))))
    return Case((*verb, *negative, *form))


@st.composite
def series_cases(draw: Any) -> Case:
    """Files of prompts, and prompts on stdin: not text, not UTF-8, empty, or a line of anything."""
    lines = st.lists(st.one_of(texts(80).map(os.fsencode), st.binary(max_size=40), st.just(b"# a comment")), max_size=6)
    data = draw(st.sampled_from((b"", b"\xef\xbb\xbf"))) + draw(st.sampled_from((b"\n", b"\r\n"))).join(draw(lines))
    data *= draw(st.sampled_from((1, 1, 1, MAX_PROMPT_BYTES // max(1, len(data)) + 1)))
    windows = draw(st.sampled_from(((), ("--window", "9"))))
    variations = draw(st.sampled_from(((), ("--variations", draw(st.sampled_from(("2", "3", "0", "1001", "x")))))))
    source = draw(st.sampled_from((("-",), ("--prompt-file", "prompts.txt"), ("--prompt", "-"))))
    output = draw(st.sampled_from((("--dry-run",), ("--dry-run", "--json"), ("--output", "no/such/folder/x.mp4"))))
    args = ("generate", *output, "--model", "demo", *TINY, *windows, *variations, *source)
    return Case(args, {"prompts.txt": data}, stdin=data)


@st.composite
def batch_cases(draw: Any) -> Case:
    """Files of rows: hostile values in fields that exist, fields that do not, and lines of anything."""
    names = st.one_of(st.sampled_from(FIELDS), st.sampled_from(FIELDS), texts(20))
    rows = st.dictionaries(names, st.one_of(json_values(), numbers(), texts(40)), max_size=4)
    objects = rows.map(lambda row: json.dumps({"prompt": PROMPT, **row}).encode())
    lines = st.lists(st.one_of(objects, objects, objects, st.binary(max_size=40)), min_size=1, max_size=5)
    header = st.lists(names.map(os.fsencode), min_size=1, max_size=4).map(b",".join)
    cells = st.lists(st.lists(st.one_of(texts(20).map(os.fsencode), st.binary(max_size=9)), max_size=4).map(b",".join))
    name, data = draw(
        st.one_of(
            st.tuples(st.just("x.jsonl"), lines.map(b"\n".join)),
            st.tuples(st.just("x.csv"), st.tuples(header, cells).map(lambda parts: b"\n".join((parts[0], *parts[1])))),
            st.tuples(st.just("x.csv"), cells.map(lambda lines: b"\n".join((b"prompt,seed,image", *lines)))),
            st.tuples(st.sampled_from(("x.txt", "x.csv", "x.jsonl", "x.mp4")), st.binary(max_size=200)),
        )
    )
    as_json = draw(st.sampled_from(((), ("--json",))))
    return Case(("batch", name, "--out", "out", "--dry-run", "--model", "demo", *TINY, *as_json), {name: data})


PATH_FLAGS = ("--model", "--config", "--upscaler", "--second-model", "--text-encoder", "--vae", "--lora", "--image")
PATH_FLAGS += (
    "--prompt-file",
    "--video",
    "--control",
    "--input-video",
    "--output",
    "--save-latents",
    "--enhance",
    "--device",
    "--dtype",
)
PATH_FLAGS += (
    "--models-dir",
    "--quant",
    "--offload",
    "--sampler",
    "--cache",
    "--stg-mode",
    "--second-sampler",
    "--enhance-model",
)


PATH = "PATH"
PATH_FORMS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "inspect": ((PATH,), ("demo", "--models-dir", PATH)),
    "rerun": ((PATH,), (PATH, "--output", PATH)),
    "quantize": ((PATH, "x.gguf", "--type", "Q8_0"), (PATH, PATH, "--type", PATH)),
    "convert": ((PATH, "x"), ("demo", PATH), (PATH, PATH, "--force")),
    "train-lora": ((PATH,), (".", "--model", PATH), (".", "--output", PATH)),
    "models": (("verify", PATH), ("info", PATH), ("--models-dir", PATH), (PATH,)),
    "bench": (("--model", PATH, "--stage", PATH), ("nothing", PATH)),  # nothing that starts a benchmark, as -- does
}


@st.composite
def path_cases(draw: Any) -> Case:
    """Paths and names that do not exist, or that no file can have."""
    suffix = draw(st.sampled_from(("", ".safetensors", ".gguf", ".mp4", ".png", ".yaml")))
    path = draw(texts(300)) + suffix
    verb = draw(st.sampled_from(("generate", "plan", *PATH_FORMS)))
    if verb in ("generate", "plan"):
        flag = draw(st.sampled_from(PATH_FLAGS))
        prompt = () if flag == "--prompt-file" else (PROMPT,)
        return Case((verb, *prompt, *(("--dry-run",) if verb == "generate" else ()), flag, path))
    form = draw(st.sampled_from(PATH_FORMS[verb]))
    return Case((verb, *(path if part is PATH else part for part in form)))


@cache
def value_flags(verb: str) -> tuple[str, ...]:
    """The flags of a verb that take a number, or numbers in a list."""
    command = typer.main.get_command(app).commands[verb]
    skipped = {"--help", "--prompt", *PATH_FLAGS}
    options = [
        item for item in command.params if item.param_type_name == "option" and not getattr(item, "is_flag", False)
    ]
    return tuple(sorted({item.opts[0] for item in options} - skipped))


@st.composite
def number_cases(draw: Any) -> Case:
    """A hostile number for every flag that takes one."""
    verb = draw(st.sampled_from(("generate", "generate", "plan", "train-lora", "bench", "rerun")))
    flag, value = draw(st.sampled_from(value_flags(verb))), draw(numbers())
    first = {
        "generate": (PROMPT, "--dry-run"),
        "plan": (PROMPT,),
        "train-lora": (".",),
        "bench": ("nothing",),
        "rerun": ("no.mp4",),
    }
    value_args = draw(st.sampled_from(((flag, value), (f"{flag}={value}",))))
    return Case((verb, *first[verb], *value_args))


VARIABLES = (
    "KADR_KERNELS",
    "KADR_CACHE",
    "KADR_MODELS",
    "XDG_CONFIG_HOME",
    "HOME",
    "XDG_CACHE_HOME",
    "KADR_DEBUG_",
    "COLUMNS",
    "TERM",
    "LANG",
    "KADR_ENHANCE_KEY",
)


@st.composite
def environment_cases(draw: Any) -> Case:
    """Hostile environment variables. The dry run reads most of them, the tiny video all."""
    name = draw(st.sampled_from(VARIABLES))
    value = draw(texts()).replace("\ud800", "")
    args = draw(st.sampled_from((*PLANS, ("models",), MAKES)))
    return Case(args, environment={name: value})


ALL: Mapping[str, st.SearchStrategy[Case]] = {
    "checkpoint": checkpoint_cases(),
    "gguf": gguf_cases(),
    "lora": lora_cases(),
    "video": video_cases(),
    "image": image_cases(),
    "clip": clip_cases(),
    "config": config_cases(),
    "prompt": prompt_cases(),
    "series": series_cases(),
    "batch": batch_cases(),
    "path": path_cases(),
    "number": number_cases(),
    "environment": environment_cases(),
}
