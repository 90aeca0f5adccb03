"""Habits of the command line: --quiet, shell completion, near matches for misspelt words."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from kadr.cli.main import app
from kadr.errors import RequestError
from kadr.models.registry import LORA, MODEL_RELEASES, RELEASES
from kadr.request.official_config import OfficialConfig
from tests.cli.conftest import CommandResult, FakeEngine
from tests.request.official_configs import OFFICIAL_CONFIGS

Kadr = Callable[..., CommandResult]


def leaf_commands() -> list[tuple[str, ...]]:
    """Returns the words of every verb."""
    group = typer.main.get_command(app)
    nested = [("models", name) for name in group.commands["models"].commands]
    return [(name,) for name in group.commands if name != "models"] + nested


@pytest.mark.parametrize("words", leaf_commands(), ids=" ".join)
def test_every_verb_has_the_flag_quiet(kadr: Kadr, words: tuple[str, ...]) -> None:
    assert "-q, --quiet" in kadr(*words, "--help").out


def test_quiet_leaves_the_result_and_errors(kadr: Kadr, engine: FakeEngine) -> None:
    assert kadr("generate", "a fox").err != ""
    quiet = kadr("generate", "a fox", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "out-2.mp4\n", "")
    assert kadr("generate", "a fox").err != ""  # the next command talks again
    failed = kadr("generate", "a fox", "-q", "--size", "63x63")
    assert (failed.code, failed.err.count("\n")) == (1, 1)
    assert failed.err.startswith("error: ")


def complete(*words: str, folder: Path | None = None) -> list[str]:
    """Returns what bash would complete the last word to."""
    environment = {"_KADR_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("kadr", *words))}
    code = (
        "import sys; from kadr.cli.main import main\n"
        "try:\n    main([])\nfinally:\n    assert 'torch' not in sys.modules, 'torch'"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment | {"COMP_CWORD": str(len(words))},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert "torch" not in result.stderr
    return result.stdout.split()


def test_bash_completes_verbs_models_choices_and_files_without_torch(tmp_path: Path) -> None:
    (tmp_path / "ltxv-mine.safetensors").touch()
    (tmp_path / "ltxv-folder").mkdir()
    assert complete("gen") == ["generate"]
    models = [release.name for release in MODEL_RELEASES if release.name.startswith("ltxv-")]
    assert complete("generate", "--model", "ltxv-", folder=tmp_path) == [
        *models,
        "ltxv-folder/",
        "ltxv-mine.safetensors",
    ]
    assert complete("generate", "--offload", "") == ["auto", "none", "stages", "blocks"]
    loras = [release.name for release in RELEASES if release.kind == LORA and release.name.startswith("demo-")]
    assert complete("generate", "--lora", "demo-", folder=tmp_path) == loras
    assert complete("generate", "--codec", "h") == ["h264", "hevc"]
    assert complete("models", "rm", "t5") == ["t5-v1.1-xxl", "t5-v1.1-xxl-q8-gguf", "t5-v1.1-tokenizer"]
    assert "--frames" in complete("generate", "--fr")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown_for_every_common_shell(shell: str) -> None:
    environment = os.environ | {"_KADR_COMPLETE": f"source_{shell}"}
    command = [sys.executable, "-c", "from kadr.cli.main import main; main([])"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "_KADR_COMPLETE" in result.stdout


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("genrate x", "Did you mean 'generate'?"),
        ("models infos", "Did you mean 'info'?"),
        ("generate x --frame 9", "--frames"),
        ("generate x --offload block", "Did you mean blocks?"),
        ("generate x --quant int-8", "Did you mean int8?"),
        ("generate x --config ltxv-13b-0.9.8-dv", "Did you mean ltxv-13b-0.9.8-dev"),
        ("models info ltxv-2b-0.98", "Did you mean ltxv-2b-0.9"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest(kadr: Kadr, command: str, advice: str) -> None:
    result = kadr(*command.split())
    assert result.code in (1, 2)
    assert advice in " ".join(result.err.split())


@pytest.mark.parametrize("name", sorted(OFFICIAL_CONFIGS))
def test_a_config_by_name_is_the_official_file(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.yaml").write_text(OFFICIAL_CONFIGS[name])
    named, read = OfficialConfig.read(name), OfficialConfig.read(tmp_path / f"{name}.yaml")
    assert named.recipe == read.recipe
    assert named.engine_arguments() == read.engine_arguments()
    assert OfficialConfig.read(f"{name}.yaml").recipe == named.recipe


def test_a_file_goes_before_a_config_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ltxv-2b-0.9.5.yaml").write_text("checkpoint_path: mine.safetensors\nnum_inference_steps: 3\n")
    assert OfficialConfig.read("ltxv-2b-0.9.5.yaml").checkpoint == "mine.safetensors"
    with pytest.raises(RequestError, match="cannot be read"):
        OfficialConfig.read("folder/ltxv-2b-0.9.5.yaml")
