"""Verbs that read a model's file find it by its name in folders of models, as `--model` does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kadr.checkpoints.checkpoint import Checkpoint
from kadr.spec.locate import PACKAGE_ROOT
from tests import lora_files, tiny_models
from tests.cli.conftest import CommandResult, FakeEngine

Run = Callable[..., CommandResult]
DEMO = PACKAGE_ROOT / "assets" / "demo"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models with a tiny model, its text encoder, a LoRA and an upscaler."""
    home = tmp_path_factory.mktemp("models")
    model = tiny_models.write_model(home / "text_encoders" / "t5")
    (home / "checkpoints" / "sub").mkdir(parents=True)
    (model / tiny_models.MODEL_FILE).rename(home / "checkpoints" / "sub" / "tiny.safetensors")
    for kind in ("loras", "latent_upscale_models"):
        (home / kind).mkdir()
    lora_files.write_lora_file(home / "loras" / "style.safetensors", lora_files.block_pairs())
    tiny_models.write_random_upscaler(home / "latent_upscale_models" / "up.safetensors")
    return home


@pytest.fixture(params=["flag", "environment", "config file"])
def named(request: pytest.FixtureRequest, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flags that make kadr search the folders, which each of three ways names."""
    if request.param == "flag":
        return ["--models-dir", str(folders)]
    if request.param == "environment":
        monkeypatch.setenv("KADR_MODELS", str(folders))
        return []
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config" / "kadr").mkdir(parents=True)
    (tmp_path / "config" / "kadr" / "config.toml").write_text(f"models_dirs = [{json.dumps(str(folders))}]\n")
    return []


@pytest.mark.parametrize(
    "name, line",
    [
        ("sub/tiny", "LTX-Video 0.9.5"),
        ("sub/tiny.safetensors", "LTX-Video 0.9.5"),
        ("t5", "T5 text encoder"),
        ("style", "LTX-Video LoRA"),
        ("up", "LTX-Video unreleased spatial upscaler"),
    ],
)
def test_inspect_finds_a_name_of_any_kind(kadr: Run, folders: Path, name: str, line: str) -> None:
    result = kadr("inspect", name, "--models-dir", folders)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(line)


def test_every_verb_finds_a_name_by_every_way_to_name_folders(
    kadr: Run, named: list[str], folders: Path, tmp_path: Path
) -> None:
    file = folders / "checkpoints" / "sub" / "tiny.safetensors"
    assert json.loads(kadr("inspect", "sub/tiny", "--json", *named).out)["path"] == str(file)
    information = json.loads(kadr("models", "info", "sub/tiny", "--json", *named).out)
    assert (information["kind"], information["files"][0]["on_disk"]) == ("checkpoints", str(file))
    for verb, out in (("quantize", tmp_path / "x.gguf"), ("convert", tmp_path / "folder")):
        result = kadr(verb, "sub/tiny", out, *named, *["--type", "F16"] * (verb == "quantize"))
        assert (result.code, result.out) == (0, f"{out}\n"), result.err
        assert Checkpoint.open(out).info.transformer == Checkpoint.open(file).info.transformer


def test_info_of_a_file_has_the_recipe_of_its_release(kadr: Run, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    file = tmp_path / "unet" / "mine.gguf"
    assert kadr("quantize", "demo", file, "--type", "BF16").code == 0
    lines = kadr("models", "info", "mine", "--models-dir", tmp_path).out.splitlines()
    assert (lines[0][:6], lines[1]) == ("mine: ", f"file: {file}")
    assert lines[2].startswith("release: demo, a small model that comes with kadr")
    demo_lines = kadr("models", "info", "demo").out.splitlines()
    assert lines[4:] == demo_lines[next(i for i, line in enumerate(demo_lines) if line.startswith("recipe")) - 1 :]
    data, known = (
        json.loads(kadr("models", "info", name, "--json", "--models-dir", tmp_path).out) for name in ("mine", "demo")
    )
    assert data.keys() == known.keys() | {"dtype", "release"}
    assert (data["recipe"], data["words"], data["release"]) == (known["recipe"], known["words"], "demo")
    assert data["files"][0]["bytes"] == file.stat().st_size


def test_info_of_an_unreleased_model_has_the_default_recipe(kadr: Run, folders: Path) -> None:
    lines = kadr("models", "info", "sub/tiny", "--models-dir", folders).out.splitlines()
    assert lines[2] == "release: none that kadr knows, so it runs with the default recipe"
    assert "  single pass: 40 steps; guidance 3" in lines
    upscaler_lines = kadr("models", "info", "up", "--models-dir", folders).out.splitlines()
    assert upscaler_lines[2:] == ["release: none that kadr knows"]


@pytest.mark.parametrize("name, dtype", [("style", "float32"), ("t5", "float32")])
def test_info_of_other_files_has_their_dtype(kadr: Run, folders: Path, name: str, dtype: str) -> None:
    data = json.loads(kadr("models", "info", name, "--json", "--models-dir", folders).out)
    assert (data["dtype"], data["recipe"], data["release"]) == (dtype, None, None)


def test_info_of_a_broken_file_is_the_reason(kadr: Run, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "x.safetensors").write_bytes(b"no header")
    result = kadr("models", "info", "x", "--models-dir", tmp_path)
    assert (result.code, result.out, len(result.err.splitlines())) == (1, "", 1)
    assert "does not start with a header" in result.err


def test_release_comes_before_a_file_of_its_name_with_a_warning(kadr: Run, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    shutil.copy(DEMO / "demo-upscaler.safetensors", tmp_path / "vae" / "demo.safetensors")
    for args in (["inspect", "demo"], ["models", "info", "demo"]):
        result = kadr(*args, "--models-dir", tmp_path)
        assert result.code == 0
        assert "demo is a release, which is used, and also" in result.err
    assert "spatial upscaler" in kadr("inspect", "demo.safetensors", "--models-dir", tmp_path).out


def test_name_in_folders_of_two_kinds_is_the_model_with_a_warning(kadr: Run, folders: Path, tmp_path: Path) -> None:
    for kind, source in (("loras", "loras/style"), ("diffusion_models", "checkpoints/sub/tiny")):
        (tmp_path / kind).mkdir()
        shutil.copy(folders / f"{source}.safetensors", tmp_path / kind / "x.safetensors")
    result = kadr("inspect", "x", "--models-dir", tmp_path)
    assert result.out.startswith("LTX-Video 0.9.5")
    lora = tmp_path / "loras" / "x.safetensors"
    assert f"x is {tmp_path / 'diffusion_models' / 'x.safetensors'} here; for {lora} pass that path" in result.err
    assert kadr("inspect", lora).out.startswith("LTX-Video LoRA")


@pytest.mark.parametrize("args", [["inspect"], ["quantize", "x.gguf", "--type", "F16"], ["convert", "x"]])
def test_name_that_nothing_has_is_refused_with_the_folders(
    kadr: Run, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("absent", "../secret", "sub/absent.safetensors"):
        result = kadr(args[0], name, *args[1:], "--models-dir", folders)
        assert (result.code, result.out, len(result.err.splitlines())) == (1, "", 1)
        assert f"{folders}" in result.err
    assert list(tmp_path.iterdir()) == []


def test_release_that_is_not_on_disk_is_said_to_be_so(kadr: Run) -> None:
    result = kadr("inspect", "ltxv-2b-0.9.8-distilled")
    assert result.code == 1
    assert "is not on disk. `kadr models pull ltxv-2b-0.9.8-distilled` fetches it" in result.err


def test_path_is_no_release_of_the_same_name(kadr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = kadr("inspect", "./demo")
    assert result.code == 1
    assert "the file demo does not exist" in result.err


def test_flags_before_a_verb_of_models_are_not_ignored(kadr: Run, folders: Path) -> None:
    for flags in (["--models-dir", str(folders)], ["--json"]):
        result = kadr("models", *flags, "info", "demo")
        assert (result.code, result.out) == (2, "")
        assert "give it after info" in result.err


def test_train_lora_looks_names_up_in_folders(kadr: Run, engine: FakeEngine, folders: Path) -> None:
    kadr("train-lora", ".", "--model", "sub/tiny", "--models-dir", folders, "--rank", "0")
    ((model, keywords),) = engine.open_calls
    assert (model, keywords["models_dirs"]) == ("sub/tiny", [str(folders)])
