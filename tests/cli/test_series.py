"""Several videos of one command: names, order, progress, failures, and the frames of single commands."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kadr.cli.reservation import reserve_file
from kadr.errors import (
    Cancelled,
    CheckpointError,
    EnhanceError,
    MediaError,
    NonFiniteError,
    PlanError,
    RequestError,
)
from kadr.media.clip import read_metadata
from kadr.media.writer import VideoWriter
from kadr.memory.module_cache import ModuleCache
from kadr.request.request import MAX_SEED_BITS, Request
from kadr.spec.model import TEXT_ENCODER, TRANSFORMER, VAE_DECODER
from tests.cli.conftest import CommandResult, FakeEngine
from tests.fakechat import FakeChat, chat_completion, serve_fake_chat

Run = Callable[..., CommandResult]
PROMPT = "a red circle"
PROMPTS = ("a red circle", "a blue square moving left", "a green circle")


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """A file with three prompts, beside the working directory."""
    folder = tmp_path.with_name(f"{tmp_path.name}-prompts")
    folder.mkdir()
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder / "prompts.txt"


def fail_at(engine: FakeEngine, errors: dict[int, BaseException]) -> None:
    """Makes the engine raise each error in the video of that number."""

    def raise_error() -> None:
        if (error := errors.get(len(engine.written_requests))) is not None:
            raise error

    engine.on_half_written = raise_error


def errors_of(result: CommandResult) -> list[str]:
    return [line for line in result.err.splitlines() if line.startswith("error: ")]


def test_variations_differ_in_their_seed_alone(kadr: Run, engine: FakeEngine) -> None:
    result = kadr("generate", PROMPT, "--variations", "3", "--seed", "7", "--frames", "17")
    assert (result.code, result.out) == (0, "out.mp4\nout-2.mp4\nout-3.mp4\n"), result.err
    assert engine.written_requests == [Request(prompt=PROMPT, seed=seed, frames=17) for seed in (7, 8, 9)]
    assert len(engine.open_calls) == 1


def test_every_prompt_is_made_with_every_seed(kadr: Run, engine: FakeEngine, prompt_file: Path) -> None:
    result = kadr("generate", "--prompt-file", prompt_file, "--variations", "2", "--seed", "-1", "--seconds", "1")
    assert result.code == 0, result.err
    expected = [Request(prompt=prompt, seed=seed, frames=24) for prompt in PROMPTS for seed in (-1, 0)]
    assert engine.written_requests == expected
    assert engine.prompts_encoded_ahead == list(PROMPTS)


def test_one_prompt_and_no_cache_are_not_encoded_ahead(kadr: Run, engine: FakeEngine, prompt_file: Path) -> None:
    assert kadr("generate", PROMPT, "--variations", "2").code == 0
    assert kadr("generate", "--prompt-file", prompt_file, "--no-prompt-cache").code == 0
    assert engine.prompts_encoded_ahead == []


def test_a_single_video_of_a_file_has_the_name_of_the_flag(kadr: Run, engine: FakeEngine, tmp_path: Path) -> None:
    Path("one.txt").write_text(PROMPT)
    assert kadr("generate", "--prompt-file", "one.txt", "--variations", "1", "--output", "clip.mp4").out == "clip.mp4\n"
    Path("one.txt").write_text("a | | b")
    result = kadr("generate", "--prompt-file", "one.txt", "--window", "9")
    assert (result.code, len(engine.open_calls)) == (1, 1)
    assert errors_of(result) == [result.err.splitlines()[-1]]
    assert "prompt 2 of 3 is empty" in result.err


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (2, ["clip-1.mp4", "clip-2.mp4"]),
        (10, [f"clip-{number:02}.mp4" for number in range(1, 11)]),
    ],
)
def test_named_output_is_numbered(kadr: Run, engine: FakeEngine, count: int, names: list[str]) -> None:
    result = kadr("generate", PROMPT, "--variations", str(count), "--output", "clip.mp4")
    assert (result.code, result.out.split(), sorted(os.listdir())) == (0, names, names)


def test_a_folder_gets_the_next_free_names(kadr: Run, engine: FakeEngine) -> None:
    Path("videos").mkdir()
    (Path("videos") / "out.mp4").write_bytes(b"old")
    result = kadr("generate", PROMPT, "--variations", "2", "--output", "videos")
    assert result.out.split() == [str(Path("videos", f"out-{number}.mp4")) for number in (2, 3)]


@pytest.mark.parametrize("taken", ["clip-2.mp4", "clip-3.mp4", "clip-2.windows"])
def test_no_numbered_file_is_replaced(kadr: Run, engine: FakeEngine, taken: str) -> None:
    if taken.endswith(".windows"):
        Path(taken).mkdir()
        (Path(taken) / "window-0001.safetensors").write_bytes(b"precious")
    else:
        Path(taken).write_bytes(b"precious")
    for other in ("clip-4.mp4", "clip-01.mp4", "clip.mp4", "clip-x.mp4"):
        Path(other).touch()  # no names of this series
    before = sorted(os.listdir())
    result = kadr("generate", PROMPT, "--variations", "3", "--output", "clip.mp4")
    assert (result.code, result.out, engine.open_calls, sorted(os.listdir())) == (1, "", [], before)
    name = taken.replace(".windows", ".mp4")
    assert f"{name} exist already, and clip.mp4 stands for clip-1.mp4 to clip-3.mp4. Choose another" in result.err
    assert kadr("generate", PROMPT, "--variations", "2", "--output", "other.mp4").code == 0


def test_two_series_of_one_name_do_not_mix(kadr: Run, engine: FakeEngine) -> None:
    with reserve_file(Path("clip.mp4"), flag="--output"):
        result = kadr("generate", PROMPT, "--variations", "2", "--output", "clip.mp4")
    assert (result.code, engine.open_calls) == (1, [])
    assert "another process is writing clip.mp4. Wait until it ends, or choose another --output." in result.err


@pytest.mark.parametrize("is_written", [False, True])
def test_name_taken_meanwhile_fails_its_video_alone(kadr: Run, engine: FakeEngine, is_written: bool) -> None:
    engine.on_half_written = lambda: Path("clip-2.mp4").write_bytes(b"mine") if is_written else None
    with reserve_file(Path("clip-2.mp4"), flag="--output"):
        result = kadr("generate", PROMPT, "--variations", "3", "--output", "clip.mp4")
    assert (result.code, result.out.split()) == (1, ["clip-1.mp4", "clip-3.mp4"])
    assert "video 2 of 3 failed ('a red circle', seed 1): another process is writing clip-2.mp4." in result.err
    Path("clip-1.mp4").unlink()
    Path("clip-3.mp4").unlink()
    Path("clip-2.mp4").unlink(missing_ok=True)
    engine.on_half_written = lambda: Path("clip-2.mp4").write_bytes(b"mine")
    result = kadr("generate", PROMPT, "--variations", "3", "--output", "clip.mp4")
    assert "video 2 of 3 failed ('a red circle', seed 1): clip-2.mp4 exists" in result.err
    assert Path("clip-2.mp4").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "args",
    [
        "--output v.avi",
        "--output no/such/folder/v.mp4",
        "--output v",
        f"--output {'x' * 250}.mp4",  # the number makes it too long
        "--save-latents l.pt",
        "--save-latents no/such/l.safetensors",
        f"--save-latents {'x' * 242}.safetensors",
        "--frames 0",
        "--variations 0",
        "--variations 1001",
        "--variations -3",
    ],
)
def test_refused_series_ends_with_1_and_leaves_no_file(kadr: Run, engine: FakeEngine, args: str) -> None:
    result = kadr("generate", PROMPT, "--variations", "12", *args.split())
    assert (result.code, result.out, os.listdir(), engine.open_calls) == (1, "", [], [])
    assert errors_of(result) == [result.err.splitlines()[-1]]


@pytest.mark.parametrize("value", ["2.5", "many", "", "1e2", "nan"])
def test_variations_are_a_whole_number(kadr: Run, engine: FakeEngine, value: str) -> None:
    assert kadr("generate", PROMPT, "--variations", value).code == 2
    assert engine.open_calls == []


def test_last_seed_stays_within_the_limit(kadr: Run, engine: FakeEngine) -> None:
    largest = 2**MAX_SEED_BITS - 1
    assert kadr("generate", PROMPT, "--variations", "2", "--seed", str(largest - 1)).code == 0
    result = kadr("generate", PROMPT, "--variations", "2", "--seed", str(largest))
    assert (result.code, len(engine.open_calls)) == (1, 1)
    assert "the seed of variation 2 has 1025 bits; a seed has at most 1024. Give a smaller --seed." in result.err


def test_flags_that_suit_no_video_end_at_once(
    kadr: Run, engine: FakeEngine, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: Request) -> None:
        raise RequestError("the size does not fit")

    monkeypatch.setattr(engine, "resolve", refuse)
    result = kadr("generate", "--prompt-file", prompt_file)
    assert (result.code, errors_of(result)) == (1, ["error: the size does not fit"])
    assert engine.written_requests == []


@pytest.mark.parametrize(
    "error",
    [
        RequestError("no"),
        MediaError("no"),
        PlanError("no", shortfall=1),
        NonFiniteError("no", stage="decode"),
        EnhanceError("no"),
        MemoryError(),
        torch.OutOfMemoryError("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_failed_video_is_reported_and_the_others_are_made(
    kadr: Run, engine: FakeEngine, prompt_file: Path, error: Exception
) -> None:
    fail_at(engine, {2: error})
    result = kadr("generate", "--prompt-file", prompt_file, "--output", "clip.mp4", "--seed", "4")
    assert (result.code, result.out) == (1, "clip-1.mp4\nclip-3.mp4\n")
    assert "video 2 of 3 failed ('a blue square moving left', seed 4): " in result.err
    assert errors_of(result) == ["error: 1 of 3 videos failed: 2. The reasons are above."]
    assert "bug" not in result.err
    assert sorted(os.listdir()) == ["clip-1.mp4", "clip-3.mp4"]


def test_refused_prompt_fails_its_video_alone(kadr: Run, engine: FakeEngine) -> None:
    Path("prompts.txt").write_text("one\na | | b\nthree\n")
    result = kadr("generate", "--prompt-file", "prompts.txt", "--window", "9", "--variations", "2")
    assert (result.code, result.out.split()) == (1, ["out.mp4", "out-2.mp4", "out-3.mp4", "out-4.mp4"])
    assert "video 3 of 6 failed ('a | | b', seed 0): prompt 2 of 3 is empty" in result.err
    assert errors_of(result) == ["error: 2 of 6 videos failed: 3, 4. The reasons are above."]


def test_many_failures_are_counted_in_one_line(kadr: Run, engine: FakeEngine) -> None:
    fail_at(engine, {number: RequestError(f"no\x1b[2J {'x' * 400}") for number in range(1, 31)})
    result = kadr("generate", "y" * 4000, "--variations", "30", "--seed", str(2**1000))
    assert (result.code, result.out) == (1, "")
    listed = ", ".join(map(str, range(1, 13)))
    assert errors_of(result) == [f"error: 30 of 30 videos failed: {listed} and 18 more. The reasons are above."]
    assert all(line.isprintable() and len(line) < 500 for line in result.err.splitlines())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CheckpointError("the weights are damaged"), "error: the weights are damaged"),
        (ZeroDivisionError("by nought"), "This is a bug."),
        (OSError(errno.EIO, "Input/output error", "a"), "error: a cannot be used: Input/output error."),
    ],
    ids=["weights", "bug", "system"],
)
def test_problem_of_all_videos_ends_at_once(
    kadr: Run, engine: FakeEngine, prompt_file: Path, error: Exception, message: str
) -> None:
    fail_at(engine, {2: error})
    result = kadr("generate", "--prompt-file", prompt_file)
    assert (result.code, result.out, len(engine.written_requests), len(errors_of(result))) == (1, "out.mp4\n", 2, 1)
    assert message in result.err
    assert "finished 1 of 3 videos" in result.err


def test_full_disk_ends_at_once(kadr: Run, engine: FakeEngine, prompt_file: Path) -> None:
    full = MediaError("out.mp4 could not be written: No space left on device.")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    fail_at(engine, {1: full})
    result = kadr("generate", "--prompt-file", prompt_file)
    assert (result.code, len(engine.written_requests)) == (1, 1)
    assert "finished" not in result.err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Cancelled("the watcher asked")])
def test_cancelling_stops_all_and_keeps_what_is_finished(
    kadr: Run, engine: FakeEngine, prompt_file: Path, error: BaseException
) -> None:
    fail_at(engine, {2: error})
    result = kadr("generate", "--prompt-file", prompt_file, "--output", "clip.mp4")
    assert (result.code, result.out, os.listdir()) == (130, "clip-1.mp4\n", ["clip-1.mp4"])
    assert result.err.splitlines()[-2:] == ["finished 1 of 3 videos", "cancelled"]
    assert len(engine.written_requests) == 2


def test_progress_names_the_video(kadr: Run, engine: FakeEngine, prompt_file: Path) -> None:
    result = kadr("generate", "--prompt-file", prompt_file, "--model", "demo", "--seed", "3")
    lines = result.err.splitlines()
    begin = lines.index("video 2 of 3, seed 3: a blue square moving left")
    assert lines.index("denoising, video 2 of 3: 2 of 2") > begin
    assert "video" not in kadr("generate", PROMPT, "--model", "demo").err


def test_json_is_one_object_per_line(kadr: Run, engine: FakeEngine) -> None:
    result = kadr("generate", PROMPT, "--variations", "2", "--seed", "5", "--json")
    reports = [json.loads(line) for line in result.out.splitlines()]
    assert [(report["path"], report["seed"]) for report in reports] == [("out.mp4", 5), ("out-2.mp4", 6)]


def test_paths_are_printed_as_videos_are_completed(
    kadr: Run, engine: FakeEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    printed = []
    engine.on_half_written = lambda: printed.append(capfd.readouterr().out)
    kadr("generate", PROMPT, "--variations", "3")
    assert printed == ["", "out.mp4\n", "out-2.mp4\n"]


def test_latents_are_numbered_like_the_videos(kadr: Run, engine: FakeEngine) -> None:
    engine.latents = torch.zeros(1)
    args = ("--variations", "2", "--save-latents", "l.safetensors")
    assert kadr("generate", PROMPT, *args, "--output", "clip.mp4").code == 0
    assert sorted(os.listdir()) == ["clip-1.mp4", "clip-2.mp4", "l-1.safetensors", "l-2.safetensors"]
    result = kadr("generate", PROMPT, *args)
    assert (result.code, len(engine.open_calls)) == (1, 1)
    assert "l-1.safetensors and 1 more exist already" in result.err
    assert "Choose another --save-latents" in result.err


def test_resume_is_refused_by_name(kadr: Run, engine: FakeEngine) -> None:
    result = kadr("generate", PROMPT, "--variations", "2", "--window", "9", "--resume")
    assert (result.code, engine.open_calls) == (2, [])
    assert "it resumes one video, and this command makes 2. Give that one's prompt, --seed and --output." in result.err


def test_interrupted_long_video_names_the_flags_that_resume_it(kadr: Run, engine: FakeEngine) -> None:
    def interrupt() -> None:
        if len(engine.written_requests) == 2:
            Path("clip-2.windows").mkdir()
            (Path("clip-2.windows") / "window-0001.safetensors").touch()
            raise KeyboardInterrupt

    engine.on_half_written = interrupt
    args = ("generate", PROMPT, "--window", "9", "--frames", "25")
    result = kadr(*args, "--variations", "3", "--seed", "4", "--output", "clip.mp4")
    hint = "1 finished window is kept; resume the video with its prompt, --seed 5 --output clip-2.mp4 --resume"
    assert (result.code, hint in result.err) == (130, True)
    engine.on_half_written = lambda: None
    assert kadr(*args, "--seed", "5", "--output", "clip-2.mp4", "--resume").out == "clip-2.mp4\n"


def test_unused_flags_are_warned_of_once(kadr: Run, engine: FakeEngine, prompt_file: Path) -> None:
    result = kadr("generate", "--prompt-file", prompt_file, "--upscaler", "u.safetensors")
    assert result.err.count("a single pass is run, and the") == 1


@pytest.fixture
def chat() -> Any:
    with serve_fake_chat() as chat:
        yield chat


def test_variations_of_a_prompt_share_its_enhancement(
    kadr: Run, engine: FakeEngine, chat: FakeChat, prompt_file: Path
) -> None:
    answers = iter([f"An enhanced prompt number {number} of the series." for number in (1, 2, 3)])
    chat.reply = lambda request: chat_completion(next(answers))
    result = kadr("generate", "--prompt-file", prompt_file, "--variations", "2", "--enhance", chat.url)
    assert result.code == 0, result.err
    assert [(request.prompt[:26], request.original_prompt) for request in engine.written_requests] == [
        (f"An enhanced prompt number {number}"[:26], prompt)
        for number, prompt in enumerate(PROMPTS, 1)
        for _ in range(2)
    ]
    assert (len(chat.requests), engine.prompts_encoded_ahead) == (3, [])


TINY = ("--model", "demo", "--size", "64x64", "--frames", "9", "--steps", "1", "--device", "cpu")


@pytest.mark.parametrize("is_json", [False, True])
def test_dry_run_describes_every_video(kadr: Run, prompt_file: Path, is_json: bool) -> None:
    args = ("--prompt-file", prompt_file, "--variations", "2", *TINY, "--dry-run", *(["--json"] if is_json else []))
    result = kadr("generate", *args)
    assert result.code == 0, result.err
    if is_json:
        requests = [json.loads(line)["request"] for line in result.out.splitlines()]
        expected = [(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]
        assert [(request["prompt"], request["seed"]) for request in requests] == expected
    else:
        parts = result.out.split("video ")[1:]
        assert [part.partition("\n")[0] for part in parts] == [f"{number} of 6" for number in range(1, 7)]
        assert all(part.endswith(" model evaluations.\n" + "\n" * (index < 5)) for index, part in enumerate(parts))


def test_dry_run_reports_the_prompts_that_do_not_fit(kadr: Run, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\none | two | three\n")
    result = kadr("generate", "--prompt-file", tmp_path / "p.txt", *TINY, "--window", "9", "--dry-run", "--json")
    assert (result.code, len(result.out.splitlines())) == (1, 1)
    assert "video 2 of 2 failed ('one | two | three', seed 0): 3 prompts are given" in result.err
    assert errors_of(result) == ["error: 1 of 2 videos failed: 2. The reasons are above."]


@pytest.mark.parametrize("flags", [(), ("--no-prompt-cache",)])
def test_modules_are_loaded_once_and_frames_are_those_of_single_commands(
    kadr: Run, prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setenv("KADR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    loads, acquire = Counter[str](), ModuleCache.acquire
    frames, write = defaultdict[str, list[bytes]](list), VideoWriter.write

    def record_frames(writer: VideoWriter, chunk: np.ndarray) -> None:
        frames[writer.path.name].append(np.asarray(chunk).tobytes())  # an encoder may be inexact
        write(writer, chunk)

    def count_loads(cache: ModuleCache, name: str, load: Callable[[], Any], **options: Any) -> Any:
        def load_counted() -> Any:
            loads[name] += 1
            return load()

        return acquire(cache, name, load_counted, **options)

    monkeypatch.setattr(ModuleCache, "acquire", count_loads)
    monkeypatch.setattr(VideoWriter, "write", record_frames)
    args = ("--prompt-file", prompt_file, "--variations", "2", "--seed", "3", "--output", "clip.mp4")
    result = kadr("generate", *args, *TINY, *flags)
    assert (result.code, result.out.split()) == (0, [f"clip-{number}.mp4" for number in range(1, 7)]), result.err
    assert {TEXT_ENCODER, TRANSFORMER, VAE_DECODER} <= set(loads)
    assert set(loads.values()) == {1}
    monkeypatch.setenv("KADR_CACHE", str(tmp_path / "another"))
    pairs = [(prompt, seed) for prompt in PROMPTS for seed in (3, 4)]
    for number, (prompt, seed) in enumerate(pairs, 1):
        name = f"single-{number}.mp4"
        assert kadr("generate", prompt, "--seed", str(seed), "--output", name, *TINY, *flags).code == 0
        assert frames[f"clip-{number}.mp4"] == frames[name]
        assert read_metadata(f"clip-{number}.mp4") == read_metadata(name)
    assert len(set(map(b"".join, frames.values()))) == len(pairs)
