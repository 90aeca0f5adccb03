"""A name is looked up in folders of models, and never leads outside of them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kadr import Engine, KadrWarning
from kadr.checkpoints.checkpoint import Checkpoint
from kadr.checkpoints.gguf.convert import transformer_to_gguf
from kadr.errors import CheckpointError, RequestError
from kadr.models.registry import LORA
from kadr.quant.mixes import find_mix
from kadr.spec import model_folders
from kadr.spec.folder_listing import list_models
from kadr.spec.locate import KINDS_BY_ROLE, MODEL, SECOND_MODEL, TEXT_ENCODER_ROLE, UPSCALER_ROLE, VAE, locate
from kadr.spec.model_folders import FOLDER_KINDS, LORA_KINDS, MODEL_KINDS, ModelFolders
from tests import tiny_models

WEIGHTS = b"\2\0\0\0\0\0\0\0{}"  # a safetensors file without tensors


def put(path: Path, content: bytes = WEIGHTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with one empty file in every folder of a kind."""
    for kind in FOLDER_KINDS:
        put(tmp_path / "models" / kind / f"{kind}-one.safetensors")
    return tmp_path / "models"


@pytest.mark.parametrize("role", [MODEL, SECOND_MODEL, VAE, TEXT_ENCODER_ROLE, UPSCALER_ROLE, LORA])
def test_role_finds_names_in_exactly_its_folders(home: Path, role: str) -> None:
    folders = ModelFolders.open([home])
    for kind in FOLDER_KINDS:
        name = f"{kind}-one"
        found = folders.find(name, KINDS_BY_ROLE[role])
        assert found == (home / kind / f"{name}.safetensors" if kind in KINDS_BY_ROLE[role] else None)
        if found is not None:
            assert locate(name, role, folders).path == found


@pytest.mark.parametrize("name", ["a", "a.safetensors", "sub/b", "sub\\b", "sub/b.gguf", "folder", "sub/deep/folder"])
def test_names_have_subfolders_and_may_leave_out_the_ending(tmp_path: Path, name: str) -> None:
    put(tmp_path / "checkpoints" / "a.safetensors")
    put(tmp_path / "checkpoints" / "sub" / "b.gguf")
    put(tmp_path / "checkpoints" / "folder" / "model_index.json")
    put(tmp_path / "checkpoints" / "sub" / "deep" / "folder" / "transformer" / "config.json")
    found = ModelFolders.open([tmp_path]).find(name, MODEL_KINDS)
    plain = name.replace("\\", "/")
    assert found is not None
    assert found.relative_to(tmp_path / "checkpoints").as_posix().startswith(plain)


def test_name_of_two_files_needs_its_ending(tmp_path: Path) -> None:
    for suffix in ("safetensors", "gguf"):
        put(tmp_path / "unet" / f"x.{suffix}")
    folders = ModelFolders.open([tmp_path])
    with pytest.raises(RequestError, match=r"has x\.safetensors and x\.gguf\. Give the name with its ending"):
        folders.find("x", MODEL_KINDS)
    assert folders.find("x.gguf", MODEL_KINDS) == tmp_path / "unet" / "x.gguf"


ESCAPES = [
    "../secret",
    "sub/../../secret",
    "..\\secret",
    "/etc/passwd",
    "C:\\secret",
    "C:secret",
    "\\\\server\\share",
    "//server/share",
    "",
    ".",
    "a//b",
    "a/",
    ".. /secret",
    ".hidden",
    "a\0b",
    "a\nb",
    "x" * 300,
    "/".join("a" * 17),
]


@pytest.mark.parametrize("name", ESCAPES)
def test_name_that_could_lead_outside_is_refused(home: Path, name: str) -> None:
    put(home.parent / "secret.safetensors")
    with pytest.raises(RequestError, match="is not the name of a model: it must be a file's name"):
        ModelFolders.open([home]).find(name, MODEL_KINDS)


def test_no_combination_of_parts_leads_outside(tmp_path: Path) -> None:
    inside = tmp_path / "models" / "checkpoints"
    for folder in (inside, inside / "a", inside.parent, tmp_path):
        for name in ("a", "b"):
            put(folder / f"{name}.safetensors")
    (inside / "l").symlink_to(tmp_path)
    folders, found = ModelFolders.open([tmp_path / "models"]), set()
    for tokens in itertools.product(("", "a", "b", "l", ".", "..", "/", "\\"), repeat=4):
        try:
            path = folders.find("".join(tokens), MODEL_KINDS)
        except (RequestError, CheckpointError):
            continue
        if path is not None:
            found.add(path.resolve().relative_to(inside).as_posix())
    assert found == {"a.safetensors", "b.safetensors", "a/a.safetensors", "a/b.safetensors"}


def test_link_is_followed_inside_the_folders_and_refused_outside(home: Path, tmp_path: Path) -> None:
    outside = put(tmp_path / "other" / "secret.safetensors")
    (home / "loras" / "out.safetensors").symlink_to(outside)
    (home / "loras" / "outfolder").symlink_to(outside.parent)
    put(home / "loras" / "mixed" / "adapter_config.json")
    (home / "loras" / "mixed" / "adapter_model.safetensors").symlink_to(outside)
    (home / "loras" / "in.safetensors").symlink_to(home / "clip" / "clip-one.safetensors")
    folders = ModelFolders.open([home])
    for name in ("out", "outfolder/secret", "mixed"):
        with pytest.raises(CheckpointError, match="is a link that leads out of the folders of models"):
            folders.find(name, LORA_KINDS)
    assert folders.find("in", LORA_KINDS) == home / "loras" / "in.safetensors"


def test_folder_that_is_a_link_itself_is_one_of_the_folders(tmp_path: Path) -> None:
    file = put(tmp_path / "disk" / "big.safetensors")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "checkpoints").symlink_to(file.parent)
    found = ModelFolders.open([tmp_path / "models"]).find("big", MODEL_KINDS)
    assert found == tmp_path / "models" / "checkpoints" / "big.safetensors"


def test_fifo_and_plain_folder_are_no_models(home: Path) -> None:
    os.mkfifo(home / "checkpoints" / "pipe.safetensors")
    (home / "checkpoints" / "plain").mkdir()
    folders = ModelFolders.open([home])
    assert folders.find("pipe", MODEL_KINDS) is None
    assert folders.find("plain", MODEL_KINDS) is None


def test_first_folder_wins_and_comfyui_itself_is_a_folder(tmp_path: Path) -> None:
    first = put(tmp_path / "first" / "models" / "vae" / "x.safetensors")
    put(tmp_path / "second" / "vae" / "x.safetensors")
    folders = ModelFolders.open([tmp_path / "first", tmp_path / "second"])
    assert folders.find("x", ("vae",)) == first
    assert [entry.path for entry in folders.list_entries()] == [first]


def test_environment_and_config_file_come_after_the_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("argument", "first", "second", "config"):
        put(tmp_path / name / "loras" / f"{name}.safetensors")
    monkeypatch.setenv("KADR_MODELS", os.pathsep.join([str(tmp_path / "first"), "", str(tmp_path / "second")]))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    put(tmp_path / "settings" / "kadr" / "config.toml", b'models_dirs = ["../../config", "/nowhere"]\n')
    folders = ModelFolders.open([tmp_path / "argument"])
    names = [folder.path.parent.resolve().name for folder in folders.folders]
    assert names == ["argument", "first", "second", "config"]
    assert folders.missing == (Path("/nowhere"),)
    with pytest.raises(
        RequestError, match=r"no model named 'x', neither a release nor in the folders.*not there: /nowh"
    ):
        locate("x", MODEL, folders)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"models_dirs = 3", "models_dirs must be a list of folders"),
        (b"models = []", "has 'models'; kadr knows only models_dirs"),
        (b"models_dirs = [", "is not TOML"),
        (b"a = " + b"[" * 5000, "is not TOML"),
        (b"\xff\xfe", "is not text in UTF-8"),
        (b"a." * 20_000 + b"a = 1", "has more than 8,192 bytes"),
        (b"a = " + b"9" * 5000, "is not TOML"),
        (b'models_dirs = ["~\\u0000"]', "no path has a NUL character"),
        (b'models_dirs = ["' + b"x" * 300 + b'"]', "a file name has at most 255 bytes"),
    ],
)
def test_bad_config_file_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = put(tmp_path / "kadr" / "config.toml", content)
    with pytest.raises(RequestError, match=rf"{file}.*{message}"):
        ModelFolders.open()


YAML = """
other:
    base_path: {base}/plain
    loras: loras
comfyui:
    base_path: {base}/comfy
    is_default: true
    checkpoints: models/checkpoints
    clip: |
        models/clip

        {base}/far/encoders
    upscale_models: models/upscale
"""


def test_extra_model_paths_of_comfyui_name_folders_by_kind(tmp_path: Path) -> None:
    for folder in (
        "plain/loras",
        "comfy/models/checkpoints",
        "comfy/models/clip",
        "comfy/models/upscale",
        "far/encoders",
    ):
        put(tmp_path / folder / "x.safetensors")
    file = put(tmp_path / "extra_model_paths.yaml", YAML.format(base=tmp_path).encode())
    assert [(folder.kind, folder.path) for folder in ModelFolders.open([file]).folders] == [
        ("checkpoints", tmp_path / "comfy/models/checkpoints"),
        ("clip", tmp_path / "comfy/models/clip"),
        ("clip", tmp_path / "far/encoders"),
        ("loras", tmp_path / "plain/loras"),
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        ("- a\n- b", "is not an extra_model_paths.yaml"),
        ("a: b", "is not an extra_model_paths.yaml"),
        ("a: {loras: [x]}", r"'loras' is .* it must be text"),
        ("a: {base_path: 3}", r"'base_path' is 3; it must be text"),
        ("a: [", "is not YAML"),
        ("[" * 1200, "is not YAML"),
        ("a: !!python/object:os.system x", "is not YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: {vae: [*b, *b]}", r"\*a in line 2 is an alias"),
        ("a: {vae: [" + "x," * 6000 + "]}", "has more than 5000 keys and values"),
        ('a: {base_path: "~\\0", vae: x}', "no path has a NUL character"),
        ("a: {unknown: x}", "has none of the folders checkpoints"),
    ],
)
def test_bad_extra_model_paths_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = put(tmp_path / "x.yaml", content.encode())
    with pytest.raises(RequestError, match=message):
        ModelFolders.open([file])


@pytest.mark.parametrize("dirs", ["models", 3, [3], [""]])
def test_folders_of_the_wrong_type_are_refused(dirs: object) -> None:
    with pytest.raises(RequestError, match=r"models_dirs is|a folder of models is"):
        ModelFolders.open(dirs)


def test_absent_and_empty_folders_are_refused_if_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nowhere does not exist\. Create it"):
        ModelFolders.open([tmp_path / "nowhere"])
    with pytest.raises(RequestError, match="has none of the folders checkpoints, diffusion_models, unet"):
        ModelFolders.open([tmp_path])


def test_release_comes_before_a_file_of_its_name_with_a_warning(tmp_path: Path) -> None:
    file = put(tmp_path / "checkpoints" / "demo.safetensors")
    folders = ModelFolders.open([tmp_path])
    with pytest.warns(KadrWarning, match=r"demo is a release, which is used, and also .* write demo\.safetensors"):
        component = locate("demo", MODEL, folders)
    assert component.release is not None
    assert locate("demo.safetensors", MODEL, folders).path == file


def test_existing_path_comes_before_the_folders(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(put(tmp_path / "here" / "checkpoints-one.safetensors").parent)
    found = locate("checkpoints-one.safetensors", MODEL, ModelFolders.open([home]))
    assert found.path == Path("checkpoints-one.safetensors")


def test_engine_opens_every_component_by_its_name(tmp_path: Path) -> None:
    model = tiny_models.write_model(tmp_path / "tiny")
    for folder in ("checkpoints", "clip", "latent_upscale_models", "unet"):
        (tmp_path / folder).mkdir()
    (model / "model.safetensors").rename(tmp_path / "checkpoints" / "mine.safetensors")
    model.rename(tmp_path / "clip" / "t5")
    tiny_models.write_random_upscaler(tmp_path / "latent_upscale_models" / "up.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "checkpoints" / "mine.safetensors")
    transformer_to_gguf(checkpoint, tmp_path / "unet" / "small.gguf", find_mix("Q8_0"))
    engine = Engine.open(
        "small",
        vae="mine",
        text_encoder="t5",
        upscaler="up",
        second_model="mine",
        models_dirs=[tmp_path],
        device="cpu",
    )
    paths = engine.spec.component_paths(has_two_passes=True)
    assert {name: Path(path).relative_to(tmp_path).as_posix() for name, path in paths.items()} == {
        "model": "unet/small.gguf",
        "text_encoder": "clip/t5",
        "vae": "checkpoints/mine.safetensors",
        "second_model": "checkpoints/mine.safetensors",
        "spatial_upscaler": "latent_upscale_models/up.safetensors",
    }


def test_listing_reads_headers_and_goes_on_after_broken_files(home: Path, tmp_path: Path) -> None:
    tiny_models.write_model(home / "clip" / "t5")
    (home / "clip" / "t5" / "model.safetensors").rename(home / "checkpoints" / "mine.safetensors")
    put(home / "checkpoints" / "cut.safetensors", WEIGHTS[:9])
    put(home / "checkpoints" / "old.ckpt", b"\x80\x02")
    (home / "loras" / "dead.safetensors").symlink_to(tmp_path / "gone.safetensors")
    listed = {(item.entry.kind, item.entry.name): item for item in list_models(ModelFolders.open([home]))}
    model, encoder = listed["checkpoints", "mine.safetensors"], listed["clip", "t5"]
    assert (model.dtype, model.entry.problem) == ("float32", None)
    assert model.size_bytes == (home / "checkpoints" / "mine.safetensors").stat().st_size
    assert (encoder.dtype, encoder.entry.problem) == ("float32", None)
    problems = {name: item.entry.problem or "" for (_, name), item in listed.items()}
    assert "is truncated" in problems["cut.safetensors"]
    assert "is a pickle" in problems["old.ckpt"]
    assert "leads out of the folders" in problems["dead.safetensors"]
    assert len(listed) == 2 + 3 + len(FOLDER_KINDS)


def test_every_listed_name_without_a_problem_is_found(home: Path) -> None:
    put(home / "vae" / "sub" / "deep.gguf")
    put(home / "vae" / "back\\slash.safetensors")
    put(home / "vae" / "es\x1bc.safetensors")
    folders = ModelFolders.open([home])
    entries = list(folders.list_entries())
    assert [entry.name for entry in entries if entry.problem] == ["back\\slash.safetensors", "es\x1bc.safetensors"]
    for entry in entries:
        if entry.problem is None:
            assert folders.find(entry.name, (entry.kind,)) == entry.path


def test_large_folder_is_listed_in_part_with_a_warning(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folders, "MAX_ENTRIES", 3)
    for number in range(5):
        put(home / "loras" / f"{number}" / "x.safetensors")
    with pytest.warns(KadrWarning, match="has more than 3 files; the rest is not listed"):
        listed = list(ModelFolders.open([home]).list_entries())
    assert any(entry.kind == "vae" for entry in listed)


def test_looking_up_names_loads_no_torch() -> None:
    code = "import sys, kadr.spec.model_folders; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
