"""`kadr doctor`: what it prints, as text and as JSON, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kadr.cli.terminal.diagnosis import _finding_lines, _print
from kadr.diagnosis.finding import Finding
from tests.cli.conftest import CommandResult

Run = Callable[..., CommandResult]
KNOWN = "a red circle moving right on a black background"


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_a_request_it_describes_the_machine(kadr: Run) -> None:
    code, out, err = kadr("doctor")
    assert (code, err) == (0, "")
    labels = [line.partition("  ")[0] for line in out.splitlines()]
    assert {"versions", "device", "dtype", "memory", "kadr cache", "hub cache", "extras"} <= set(labels)
    assert "text encoder" not in labels
    assert "looks bad" not in out


def test_a_request_off_the_recipe_exits_with_1_and_names_the_flag(kadr: Run) -> None:
    code, out, err = kadr("doctor", KNOWN, "--model", "demo-distilled", "--guidance", "4", "--device", "cpu")
    assert (code, err) == (1, "")
    lines = out.splitlines()
    title = lines.index("looks bad:")
    assert lines[title + 1].startswith("  guidance: guidance is above 1, but demo-distilled is distilled")
    assert lines[title + 2] == "    fix: --guidance 1"


def test_a_request_by_the_recipe_exits_with_0(kadr: Run) -> None:
    assert kadr("doctor", KNOWN, "--device", "cpu").code == 0


def test_flags_alone_are_a_request_without_a_prompt(kadr: Run) -> None:
    code, out, _ = kadr("doctor", "--steps", "4")
    assert code == 1
    assert "fix: --steps 24" in out
    assert "prompt: " not in out


def test_json_is_one_object_on_stdout(kadr: Run) -> None:
    code, out, err = kadr("doctor", "a fox", "--fps", "60", "--json")
    report = json.loads(out)
    assert (code, err) == (1, "")
    assert report.keys() == {"machine", "components", "findings"}
    assert report["components"][0]["name"] == "demo"
    by_topic = {finding["topic"]: finding for finding in report["findings"]}
    assert by_topic["frame rate"].keys() == {"kind", "topic", "message", "fix"}
    assert (by_topic["frame rate"]["kind"], by_topic["frame rate"]["fix"]) == ("quality", "--fps 24")


@pytest.mark.parametrize(
    "args, topic",
    [
        (["--model", "none.safetensors"], "model"),
        (["--steps", "5000"], "request"),
        ([KNOWN, "--image", "none.png"], "images and clips"),
        (["--prompt-file", "none.txt"], "request"),
        ([KNOWN, "--config", "none.yaml"], "request"),
    ],
)
def test_what_cannot_be_opened_is_a_finding_with_exit_code_1(kadr: Run, args: list[str], topic: str) -> None:
    code, out, err = kadr("doctor", *args)
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[lines.index("does not run:") + 1].startswith(f"  {topic}: ")


def test_bad_usage_exits_with_2(kadr: Run) -> None:
    for args in (["--steps", "x"], ["--frames", "9", "--seconds", "1"], [KNOWN, "--prompt-file", "p.txt"]):
        assert kadr("doctor", *args).code == 2


def test_a_file_of_prompts_is_summed_up(kadr: Run) -> None:
    Path("prompts.txt").write_text("\n".join(f"a red circle number {word}" for word in "abcdefgh") + "\n")
    code, out, _ = kadr("doctor", "--prompt-file", "prompts.txt")
    assert code == 1
    assert out.count("demo was not trained with") == 3
    assert "and 5 more like these; --json has all" in out
    assert out.count("fix: --model ltxv-2b-0.9.8-distilled") == 1


def test_a_broken_config_of_folders_is_a_finding(kadr: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "kadr").mkdir()
    (tmp_path / "kadr" / "config.toml").write_text("models_dirs = [")
    code, out, err = kadr("doctor")
    assert (code, err) == (1, "")
    assert "config.toml is not TOML" in out[out.index("does not run:") :]


def test_fixes_are_coloured_on_a_terminal_and_plain_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = Finding("quality", "steps", "too few \x1b[31m [bold]", "--steps 24")
    lines = list(_finding_lines([finding]))
    _print(lines)
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    _print(lines)
    out = capsys.readouterr().out
    assert "\x1b[32m    fix: --steps 24\x1b[0m" in out
    assert "too few \\x1b[31m [bold]" in out  # foreign text is neither obeyed nor read as markup
