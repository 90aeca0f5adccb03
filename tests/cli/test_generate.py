"""`kadr generate`: every flag reaches the request, and stdout has only the result."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kadr.cli.flags.official import ALIASES
from kadr.errors import Cancelled, KadrWarning, NonFiniteError, RequestError
from kadr.request.inputs import Condition
from kadr.request.official_config import OfficialConfig
from kadr.request.request import Request
from kadr.sampling.settings import Guidance, Pass
from kadr.schema import LATENTS
from kadr.shapes import Size
from tests.cli.conftest import CommandResult, FakeEngine
from tests.request.official_configs import OFFICIAL_CONFIGS

Run = Callable[..., CommandResult]
PROMPT = "a red circle"
VALUES = {  # for flags that do not take the number 1
    "--output": "named.mp4",
    "--negative-prompt": "dull",
    "--config": "config.yaml",
    "--input-video": "config.yaml",  # a file that exists
    "--stg-mode": "attention_skip",
    "--guidance-sigmas": "1.0,0.9",
}
SKIPPING = Guidance(skip_blocks=((), (11, 25), (28,)), sigmas=(1.0, 0.9, 0.5))


@pytest.fixture
def image_path(tmp_path: Path) -> str:
    (tmp_path / "photo.jpg").write_bytes(b"read only by the engine")
    return "photo.jpg"


@pytest.mark.parametrize(
    "flags, field, value",
    [
        ("--size 704x480", "size", Size(704, 480)),
        ("--frames 25", "frames", 25),
        ("--seconds 2", "frames", 48),  # at the recipe's 24 per second
        ("--seconds 2 --fps 30", "frames", 60),
        ("--seconds 0.001", "frames", 1),
        ("--fps 29.97", "fps", 29.97),
        ("--seed 7", "seed", 7),
        ("--steps 8", "steps", 8),
        ("--sigmas 1.0,0.9,.5", "sigmas", (1.0, 0.9, 0.5)),
        ("--skip-initial 2", "skip_initial", 2),
        ("--skip-final 3", "skip_final", 3),
        ("--guidance 4.5", "guidance", Guidance(cfg_scale=4.5)),
        ("--guidance 1,6 --guidance-sigmas 1.0,.9", "guidance", Guidance(cfg_scale=(1.0, 6.0), sigmas=(1.0, 0.9))),
        ("--stg 1", "guidance", Guidance(stg_scale=1.0)),
        ("--stg 0,4 --guidance-sigmas 1,.9", "guidance", Guidance(stg_scale=(0.0, 4.0), sigmas=(1.0, 0.9))),
        ("--rescale .7", "guidance", Guidance(rescale=0.7)),
        ("--rescale 1,.5 --guidance-sigmas 1,.9", "guidance", Guidance(rescale=(1.0, 0.5), sigmas=(1.0, 0.9))),
        ("--skip-blocks 11,25", "guidance", Guidance(skip_blocks=(11, 25))),
        ("--skip-blocks /11,25/28 --guidance-sigmas 1,.9,.5", "guidance", SKIPPING),
        ("--skip-blocks ;11,25;28 --guidance-sigmas 1,.9,.5", "guidance", SKIPPING),
        ("--stg-mode attention_skip", "guidance", Guidance(stg_mode="attention_skip")),
        ("--cfg-star", "guidance", Guidance(cfg_star=True)),
        ("--no-cfg-star", "guidance", Guidance(cfg_star=False)),
        ("--apg 0.5 --apg-norm 10", "guidance", Guidance(apg=0.5, apg_norm=10.0)),
        ("--multi-scale", "multi_scale", True),
        ("--single-pass", "multi_scale", False),
        ("--second-steps 10 --second-skip-initial 6", "second_pass", Pass(steps=10, skip_initial=6)),
        ("--second-sigmas .9,.7", "second_pass", Pass(sigmas=(0.9, 0.7))),
        ("--second-guidance 2", "second_pass", Pass(guidance=Guidance(cfg_scale=2.0))),
        ("--second-tone-map .6", "second_pass", Pass(tone_map=0.6)),
        ("--tone-map .6", "tone_map", 0.6),
        ("--guidance-batch", "guidance_batch", True),
        ("--negative-prompt blurry", "negative_prompt", "blurry"),
        ("--sampler euler_stochastic", "sampler", "euler_stochastic"),
        ("--second-sampler res_2s", "second_pass", Pass(sampler="res_2s")),
        ("--image-noise 0.2", "image_noise", 0.2),
        ("--image-crf 0", "image_crf", 0),
        ("--decode-timestep 0.1", "decode_timestep", 0.1),
        ("--decode-noise 0", "decode_noise", 0.0),
    ],
)
def test_flag_reaches_the_request(kadr: Run, engine: FakeEngine, flags: str, field: str, value: Any) -> None:
    result = kadr("generate", PROMPT, *flags.split())
    assert result.code == 0, result.err
    assert getattr(engine.requests[0], field) == value


def test_omitted_flags_are_left_to_the_recipe(kadr: Run, engine: FakeEngine) -> None:
    assert kadr("generate", PROMPT).code == 0
    assert engine.requests == [Request(prompt=PROMPT)]
    assert engine.open_calls == [("demo", {"device": "auto", "dtype": "auto"})]


def test_model_flags_reach_the_engine(kadr: Run, engine: FakeEngine) -> None:
    components = ("--model", "m.safetensors", "--text-encoder", "t5", "--vae", "v.safetensors", "--second-model", "n")
    args = (*components, "--upscaler", "s", "--upscaler", "t", "--device", "cuda:1", "--dtype", "float32")
    assert kadr("generate", PROMPT, *args).code == 0
    options = {"text_encoder": Path("t5"), "vae": Path("v.safetensors"), "second_model": "n", "upscaler": ["s", "t"]}
    assert engine.open_calls == [("m.safetensors", {**options, "device": "cuda:1", "dtype": "float32"})]


def test_loras_reach_the_engine_with_their_strengths(kadr: Run, engine: FakeEngine) -> None:
    args = "--lora a.safetensors --lora b.safetensors 0.5 --lora=c.safetensors -5e-1 2 --lora-partial --merge-loras"
    assert kadr("generate", PROMPT, *args.split()).code == 0
    _, options = engine.open_calls[0]
    assert options["loras"] == [("a.safetensors",), ("b.safetensors", 0.5), ("c.safetensors", -0.5, 2.0)]
    assert (options["lora_partial"], options["merge_loras"]) == (True, True)
    assert kadr("generate", PROMPT).code == 0
    assert not {"loras", "lora_partial", "merge_loras"} & engine.open_calls[1][1].keys()


def test_unused_second_pass_flags_are_a_warning(kadr: Run, engine: FakeEngine) -> None:
    assert "a single pass" not in kadr("generate", PROMPT, *["--lora", "l.safetensors", "1", "1"]).err
    for args in ("--upscaler u.safetensors", "--second-model m.safetensors", "--lora l.safetensors 1 0.5"):
        result = kadr("generate", PROMPT, *args.split())
        assert (result.code, "a single pass is run, and the" in result.err) == (0, True)
        assert "a single pass" not in kadr("generate", PROMPT, *args.split(), "--multi-scale").err


def test_prompt_cache_is_used_unless_disabled(kadr: Run, engine: FakeEngine) -> None:
    assert kadr("generate", PROMPT).code == kadr("generate", PROMPT, "--no-prompt-cache").code == 0
    assert [options.get("prompt_cache", True) for _, options in engine.open_calls] == [True, False]


@pytest.mark.parametrize("numbers, frame, strength", [((), 0, 1.0), (("0",), 0, 1.0), (("0", "0.8"), 0, 0.8)])
def test_image_takes_an_optional_frame_and_strength(
    kadr: Run, engine: FakeEngine, image_path: str, numbers: tuple[str, ...], frame: int, strength: float
) -> None:
    assert kadr("generate", "--image", image_path, *numbers, PROMPT).code == 0
    expected = Condition(media=os.path.abspath(image_path), frame=frame, strength=strength)
    assert engine.requests == [Request(prompt=PROMPT, conditions=(expected,))]


@pytest.mark.parametrize(
    "args, frame, strength, frame_range, box",
    [
        ("clip.mp4", 0, 1.0, None, None),
        ("clip.mp4 -1 .5", -1, 0.5, None, None),
        ("clip.mp4#-25: 96", 96, 1.0, (-25, None), None),
        ("clip.mp4#8:33", 0, 1.0, (8, 33), None),
        ("clip.mp4#:9 0 1 box=0,32,64,32", 0, 1.0, (None, 9), (0, 32, 64, 32)),
        ("strange#name 0", 0, 1.0, None, None),
    ],
)
def test_video_takes_a_frame_range_frame_and_strength(
    kadr: Run, engine: FakeEngine, args: str, frame: int, strength: float, frame_range: Any, box: Any
) -> None:
    Path("clip.mp4").touch()
    Path("strange#name").touch()
    result = kadr("generate", PROMPT, "--video", *args.split())
    assert result.code == 0, result.err
    path = args.split()[0].partition(".mp4")[0] + (".mp4" if "mp4" in args else "")
    expected = Condition(
        media=os.path.abspath(path), frame=frame, strength=strength, is_clip=True, frame_range=frame_range, box=box
    )
    assert engine.requests[0].conditions == (expected,)


def test_image_takes_a_box_with_or_without_numbers(kadr: Run, engine: FakeEngine, image_path: str) -> None:
    for args in (["0", "1.0"], []):
        assert kadr("generate", "--image", image_path, *args, "box=0,0,32,64", PROMPT).code == 0
    expected = Condition(media=os.path.abspath(image_path), box=(0, 0, 32, 64))
    assert [request.conditions for request in engine.requests] == [(expected,), (expected,)]


def test_input_video_is_stored_by_its_absolute_path(kadr: Run, engine: FakeEngine) -> None:
    Path("clip.mp4").touch()
    assert kadr("generate", PROMPT, "--input-video", "clip.mp4", "--denoise-strength", ".4").code == 0
    assert engine.requests == [Request(prompt=PROMPT, input_video=os.path.abspath("clip.mp4"), denoise_strength=0.4)]


@pytest.mark.parametrize("flag", ["--image", "--video", "--input-video"])
def test_absent_media_is_named_before_the_model_is_opened(kadr: Run, engine: FakeEngine, flag: str) -> None:
    for args in ([], ["--dry-run"]):
        result = kadr("generate", PROMPT, flag, "absent.mp4", *args)
        assert (result.code, result.out, engine.open_calls) == (1, "", [])
        assert "absent.mp4" in result.err


def test_config_sets_components_and_recipe_and_flags_override_it(kadr: Run, engine: FakeEngine) -> None:
    config = Path("config.yaml")
    config.write_text(OFFICIAL_CONFIGS["ltxv-13b-0.9.8-dev"], "utf-8")
    assert kadr("generate", PROMPT, "--config", config).code == 0
    recipe = OfficialConfig.read(config).recipe
    options = {"recipe": recipe, "upscaler": ["ltxv-spatial-upscaler-0.9.8"], "device": "auto", "dtype": "auto"}
    assert engine.open_calls.pop() == ("ltxv-13b-0.9.8-dev", options)
    assert kadr("generate", PROMPT, "--pipeline_config", config, "--model", "demo", "--single-pass").code == 0
    assert engine.open_calls.pop() == ("demo", {"recipe": recipe, "device": "auto", "dtype": "auto"})


@pytest.mark.parametrize(
    "text, message",
    [(None, "config.yaml"), ("stg_scall: 1", "stg_scale?"), ("stg_scale: [", "is not YAML"), ("stg_scale: x", "'x'")],
)
def test_bad_config_ends_with_1_and_is_named(kadr: Run, engine: FakeEngine, text: str | None, message: str) -> None:
    if text is not None:
        Path("config.yaml").write_text(text, "utf-8")
    result = kadr("generate", PROMPT, "--config", "config.yaml")
    assert (result.code, result.out, engine.open_calls) == (1, "", [])
    assert "config.yaml" in result.err
    assert message in result.err


@pytest.mark.parametrize("official, ours", ALIASES.items())
@pytest.mark.parametrize("with_equals_sign", [False, True])
def test_official_flag_equals_ours(
    kadr: Run, engine: FakeEngine, official: str, ours: str, with_equals_sign: bool
) -> None:
    Path("config.yaml").write_text("checkpoint_path: demo", "utf-8")
    value = VALUES.get(ours, "1")
    assert kadr("generate", PROMPT, ours, value).code == 0
    args = (f"{official}={value}",) if with_equals_sign else (official, value)
    assert kadr("generate", PROMPT, *args).code == 0
    assert engine.requests[0] == engine.requests[1]
    assert engine.open_calls[0] == engine.open_calls[1]
    assert ours != "--output" or sorted(os.listdir()) == ["config.yaml", "named.mp4"]


def test_official_command_line_is_understood(kadr: Run, engine: FakeEngine, image_path: str) -> None:
    args = f"--prompt|{PROMPT}|--conditioning_media_paths|{image_path}|--conditioning_start_frames|0|"
    args += "--conditioning_strengths|0.5|--height|480|--width=704|--num_frames|17|--seed|3"
    assert kadr("generate", *args.split("|")).code == 0
    condition = Condition(media=os.path.abspath(image_path), frame=0, strength=0.5)
    expected = Request(prompt=PROMPT, size=(704, 480), frames=17, seed=3, conditions=(condition,))
    assert engine.requests == [expected]


def test_official_media_are_images_or_clips_by_their_suffix(kadr: Run, engine: FakeEngine, image_path: str) -> None:
    Path("clip.MP4").touch()
    args = ("--conditioning_media_paths", "clip.MP4", image_path, "--conditioning_start_frames", "8", "0")
    assert kadr("generate", PROMPT, *args).code == 0
    first = Condition(media=os.path.abspath(image_path), is_clip=False)
    second = Condition(media=os.path.abspath("clip.MP4"), frame=8, is_clip=True)
    assert engine.requests[0].conditions == (first, second)


@pytest.mark.parametrize(
    "args",
    [
        "x --quant int3",
        "x --offload cpu",
        "x --guidance 1,6,8",  # without --guidance-sigmas
        "x --stg 1,2",
        "x --rescale 1,0",
        "x --skip-blocks 1/2",
        "x --skip-blocks 1,a",
        "x --guidance strong",
        "x --guidance-sigmas 1;2",
        "x --second-sigmas x",
        "x --video clip.mp4#25",
        "x --video clip.mp4#a:b",
        "x --video clip.mp4#1:2:3",
        "x --video clip.mp4#-:4",
        "x --video clip.mp4 0.5",
        "x --image photo.jpg box=1,2,3",
        "x --height 480",
        "x --conditioning_media_paths a.jpg b.jpg --conditioning_start_frames 0",
        "x --image photo.jpg 0.5",  # a strength where the frame should be
        "x --image",
        "x --size 704",
        "x --sigmas 1.0;0.9",
        "x --frames many",
        "x --frames 9 --seconds 1",
        "x --device tpu",
        "x --dtype int4",
        "x --wat",
        "x y",
        "",
    ],
)
def test_bad_usage_ends_with_2_and_is_explained(kadr: Run, engine: FakeEngine, args: str) -> None:
    result = kadr("generate", *args.split())
    assert (result.code, result.out, engine.open_calls) == (2, "", [])
    assert "Error: " in result.err


@pytest.mark.parametrize(
    "args",
    ["x --frames 0", "x --guidance 0.5", "x --seconds -1", "x --seconds nan", "x --output no/such/folder/v.mp4"]
    + ["x --denoise-strength 0.5", "x --stg-mode residual", "x --skip-blocks -1", "x --apg 7", "x --tone-map 2"]
    + ["x --second-sigmas .9 --second-skip-initial 1", "x --guidance 0.5,1 --guidance-sigmas 1,0"]
    + ["x --output v.avi", "x --size 63x63", "x --save-latents l.pt", "x --save-latents no/such/l.safetensors"],
)
def test_refused_request_ends_with_1_and_leaves_no_file(kadr: Run, engine: FakeEngine, args: str) -> None:
    result = kadr("generate", *args.split())
    assert (result.code, result.out, os.listdir()) == (1, "", [])
    assert result.err.splitlines()[-1].startswith("error: ")


def test_path_goes_to_stdout_and_messages_to_stderr(kadr: Run, engine: FakeEngine) -> None:
    result = kadr("generate", PROMPT, "--model", "m.safetensors")
    assert (result.code, result.out) == (0, "out.mp4\n")
    messages = [line for line in result.err.splitlines() if not line.startswith("plan: ")]
    assert messages == ["denoising: 2 of 2", "9 frames of 64x64 at 24 per second, made in 0:02"]
    assert "\n1 frame of 64x64" in kadr("generate", PROMPT, "--model", "m.safetensors", "--frames", "1").err


def test_demo_is_announced_only_where_no_model_is_named(
    kadr: Run, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KADR_CACHE", str(tmp_path / "cache"))  # where no notice was printed today
    assert "kadr models" in kadr("generate", PROMPT).err.splitlines()[0]
    assert "kadr models" not in kadr("generate", PROMPT, "--model", "demo").err


def test_json_is_one_object_with_the_request(kadr: Run, engine: FakeEngine) -> None:
    report = json.loads(kadr("generate", PROMPT, "--model", "demo", "--seed", "5", "--json").out)
    assert Request.from_json(report.pop("request")) == engine.complete(Request(prompt=PROMPT, seed=5))
    expected = {"path": "out.mp4", "size": "64x64", "frames": 9, "fps": 24.0, "seconds": 1.5, "seed": 5}
    expected |= {"model_name": "demo", "notices": []}
    assert report == expected


def test_default_name_replaces_no_file(kadr: Run, engine: FakeEngine) -> None:
    assert [kadr("generate", PROMPT).out for _ in range(3)] == ["out.mp4\n", "out-2.mp4\n", "out-3.mp4\n"]


def test_named_output_is_replaced_and_a_folder_gets_a_new_file(kadr: Run, engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "mine.mp4").write_bytes(b"old")
    assert kadr("generate", PROMPT, "--output", "mine.mp4").out == "mine.mp4\n"
    assert (tmp_path / "mine.mp4").read_bytes() == b"half"
    (tmp_path / "videos").mkdir()
    assert kadr("generate", PROMPT, "--output", "videos").out == f"{Path('videos', 'out.mp4')}\n"


@pytest.mark.parametrize("strength", ["50%", "0,5", "nan", "-inf", "0.5,0.7"])
def test_malformed_lora_strength_is_refused(kadr: Run, engine: FakeEngine, strength: str) -> None:
    result = kadr("generate", PROMPT, "--lora", "l.safetensors", strength)
    assert (result.code, engine.open_calls) == (2, [])
    assert f"'{strength}' is not a strength: write PATH, a number such as 0.8" in " ".join(
        result.err.replace("│", " ").split()
    )


@pytest.mark.parametrize("flag", ["--image", "--video", "--input-video", "--control"])
def test_inputs_are_never_overwritten(kadr: Run, engine: FakeEngine, tmp_path: Path, flag: str) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"mine")
    (tmp_path / "link.mp4").symlink_to("clip.mp4")
    for output in ("clip.mp4", "./clip.mp4", "link.mp4"):
        result = kadr("generate", PROMPT, flag, "clip.mp4", "--output", output)
        assert (result.code, engine.open_calls) == (1, [])
        assert "is an input of the video: it would be overwritten" in result.err
    assert (tmp_path / "clip.mp4").read_bytes() == b"mine"


def test_latents_are_saved_with_the_request(kadr: Run, engine: FakeEngine) -> None:
    import torch
    from safetensors import safe_open

    engine.latents = torch.arange(24.0).reshape(6, 1, 2, 2)
    assert kadr("generate", PROMPT, "--model", "demo", "--save-latents", "l.safetensors").code == 0
    with safe_open("l.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("latents"), engine.latents)
        stored = json.loads(file.metadata()["kadr"])
    assert stored["schema"] == LATENTS.number
    assert Request.from_json(stored["request"]) == engine.complete(Request(prompt=PROMPT))
    assert sorted(os.listdir()) == ["l.safetensors", "out.mp4"]


def raises(error: BaseException) -> Callable[[], None]:
    """Returns a function that raises the error."""

    def raise_error() -> None:
        raise error

    return raise_error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Cancelled("the watcher asked")])
def test_cancelling_ends_with_130_and_leaves_no_file(kadr: Run, engine: FakeEngine, error: BaseException) -> None:
    engine.on_half_written = raises(error)
    result = kadr("generate", PROMPT, "--save-latents", "l.safetensors")
    assert (result.code, result.out, os.listdir()) == (130, "", [])
    assert result.err.splitlines()[-1] == "cancelled"


@pytest.mark.parametrize("error", [RequestError("no"), NonFiniteError("no", stage="decode")])
def test_explained_error_is_one_line(kadr: Run, engine: FakeEngine, error: Exception) -> None:
    engine.on_half_written = raises(error)
    result = kadr("generate", PROMPT)
    assert (result.code, result.out, os.listdir()) == (1, "", [])
    assert result.err.splitlines()[-1] == "error: no"
    assert "Traceback" not in result.err


def test_an_unexpected_error_asks_for_a_report_and_can_show_its_traceback(
    kadr: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.on_half_written = raises(ZeroDivisionError("by nought\nand more"))
    monkeypatch.delenv("KADR_DEBUG", raising=False)
    result = kadr("generate", PROMPT)
    assert (result.code, result.out) == (1, "")
    assert "ZeroDivisionError: by nought\n" in result.err
    assert "KADR_DEBUG=1" in result.err
    assert "Traceback" not in result.err
    monkeypatch.setenv("KADR_DEBUG", "1")
    assert "Traceback" in kadr("generate", PROMPT).err


def test_library_that_cannot_be_imported_is_named(
    kadr: Run, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_library.py").write_text("import a_library_inside")
    (tmp_path / "a_library_inside.py").write_text("import os\nfloat(os.environ['A_SETTING'])")
    monkeypatch.setenv("A_SETTING", "high")
    engine.on_half_written = lambda: importlib.import_module("a_library")
    result = kadr("generate", PROMPT)
    assert result.code == 1
    assert "error: a_library cannot be imported: ValueError: could not convert string to float: 'high'" in result.err
    assert "bug" not in result.err


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no folder that a process is in")
def test_removed_working_folder_is_explained(kadr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = kadr("plan", PROMPT)
    monkeypatch.chdir(tmp_path)
    assert (result.code, result.out) == (1, "")
    assert result.err == "error: the current folder was removed. Change to one that exists.\n"


def test_out_of_memory_is_not_reported_as_a_bug(kadr: Run, engine: FakeEngine) -> None:
    engine.on_half_written = raises(MemoryError())
    result = kadr("generate", PROMPT)
    assert (result.code, "--size" in result.err, "bug" in result.err) == (1, True, False)


def test_warnings_of_kadr_are_one_line_each_and_others_are_silent(kadr: Run, engine: FakeEngine) -> None:
    def warn() -> None:
        warnings.warn("the prompt is cut:\n'tail'", KadrWarning, stacklevel=1)
        warnings.warn("somebody else's", UserWarning, stacklevel=1)

    engine.on_half_written = warn
    result = kadr("generate", PROMPT)
    assert result.code == 0
    assert "warning: the prompt is cut: 'tail'\n" in result.err
    assert "somebody" not in result.err
    assert "test_generate" not in result.err


@pytest.mark.parametrize(
    "args, expected",
    [
        ("", {}),
        ("--quant q4_k", {"quant": "q4_k"}),
        ("--quant none --offload blocks", {"offload": "blocks"}),
        ("--offload_to_cpu", {"offload": "stages"}),
        ("--offload_to_cpu True", {"offload": "stages"}),
        ("--offload_to_cpu=False", {}),
        ("--compile", {"compile_transformer": True}),
    ],
)
def test_quant_offload_and_compile_reach_the_engine(
    kadr: Run, engine: FakeEngine, args: str, expected: dict[str, object]
) -> None:
    assert kadr("generate", PROMPT, *args.split()).code == 0
    options = engine.open_calls[0][1]
    assert {name: options[name] for name in ("quant", "offload", "compile_transformer") if name in options} == expected


def test_plan_is_printed_before_the_video_is_made(kadr: Run, engine: FakeEngine) -> None:
    result = kadr("generate", PROMPT)
    assert "plan: peak 1.0 GB on cpu, of 2.0 GB available; about 60 s\nplan: denoise: it is a fake" in result.err
    assert result.out == "out.mp4\n"


def test_plan_prints_the_plan_and_makes_no_file(kadr: Run, engine: FakeEngine) -> None:
    result = kadr("plan", PROMPT, "--size", "64x64", "--seconds", "0.5")
    assert result.code == 0
    assert "denoise  transformer  bfloat16  torch    1.0 GB  60 s" in result.out
    assert engine.requests == [Request(prompt=PROMPT, size=(64, 64), frames=12)]
    assert json.loads(kadr("plan", PROMPT, "--json").out)["peak_bytes"] == 10**9
    assert not list(Path().iterdir())


def test_plan_of_a_model_that_is_not_on_disk_says_what_to_fetch(
    kadr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))  # no test uses the network
    result = kadr("plan", PROMPT, "--model", "ltxv-2b-0.9.5", "--size", "256x192", "--frames", "9", "--json")
    report = json.loads(result.out)
    assert result.code == 0
    assert report["bytes_to_fetch"] == 6_341_000_000 + 19_060_000_000
    assert "fetch: 25.4 GB are not on disk: ltxv-2b-0.9.5, t5-v1.1-xxl" in report["reasons"]
    assert list(tmp_path.iterdir()) == []
