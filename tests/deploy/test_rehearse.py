"""The rehearsal of the image takes the Dockerfile's own steps, with what pip has on this machine."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from deploy import rehearse
from deploy.chroot import Network, find_user
from deploy.dockerfile import read_stages

STEPS = Path(rehearse.__file__).with_name("Dockerfile").read_text("utf-8")


def test_rehearsal_takes_every_step_of_the_dockerfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, str, Mapping[str, str]]] = []

    def bootstrap(root: Path, suite: str, mirror: str) -> None:
        (root / "etc").mkdir(parents=True)
        (root / "etc" / "suite").write_text(f"{suite} {mirror}")

    def run(root: Path, words: Sequence[str], environment: Mapping[str, str], folder: str, network: Network) -> None:
        taken.append((root.name, words[-1], environment))
        assert (root / folder.lstrip("/")).is_dir()
        if "pip wheel" in words[-1]:
            (root / "opt" / "kadr").mkdir(parents=True)
            (root / "opt" / "kadr" / "installed").touch()

    monkeypatch.setattr(rehearse, "bootstrap", bootstrap)
    monkeypatch.setattr(rehearse, "run_in_root", run)
    monkeypatch.setattr(rehearse, "read_pip_settings", lambda: (Network(), "https://mirror.example/simple"))
    image, container = rehearse.build(tmp_path, "http://debian.example", {"EXTRAS": "serve"})

    written = [each.value for stage in read_stages(STEPS) for each in stage.instructions if each.keyword == "RUN"]
    assert {text for _, text, _ in taken} == {text for text in written if "gcc" not in text}
    assert (image / "etc" / "suite").read_text() == "bookworm http://debian.example"
    assert (image / "opt" / "kadr" / "installed").is_file()
    assert not (image / "src").exists()
    variables = next(variables for _, text, variables in taken if "pip wheel" in text)
    assert (variables["TORCH_INDEX"], variables["EXTRAS"]) == ("https://mirror.example/simple", "serve")
    sources = tmp_path / "build" / "src"
    assert {path.name for path in sources.iterdir()} == {
        "constraints.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "src",
    }
    assert (sources / "src" / "kadr" / "version.py").is_file()
    assert not list(sources.rglob("__pycache__"))
    assert container.entrypoint[:2] == ["kadr", "serve"]
    assert "TORCH_INDEX" not in container.environment


def test_pip_settings_are_those_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index" / "simple"
    index.mkdir(parents=True)
    (tmp_path / "ca.crt").touch()
    (tmp_path / "wheels").mkdir()
    lines = (
        f":env:.find-links='{tmp_path}/wheels'",
        "global.find-links='/overridden'",
        f"global.cert='{tmp_path}/ca.crt'",
        "global.index-url='https://mirror.example/simple'",
        f"user.extra-index-url='https://other.example file://{index}'",
        "global.constraint='/not/passed/on'",
    )
    answer = subprocess.CompletedProcess([], 0, "\n".join(lines) + "\n", "")
    monkeypatch.setattr(rehearse.subprocess, "run", lambda *arguments, **options: answer)
    network, first = rehearse.read_pip_settings()
    assert first == "https://mirror.example/simple"
    assert network.environment == {
        "PIP_INDEX_URL": "https://mirror.example/simple",
        "PIP_EXTRA_INDEX_URL": "https://other.example file:///mnt/pip/extra-index-url-1/simple",
        "PIP_FIND_LINKS": "/mnt/pip/find-links-0",
        "PIP_CERT": "/mnt/pip/cert-0/ca.crt",
    }
    assert network.binds == {
        str(index.parent): "/mnt/pip/extra-index-url-1",
        str(tmp_path / "wheels"): "/mnt/pip/find-links-0",
        str(tmp_path): "/mnt/pip/cert-0",
    }


def test_user_of_the_image_is_looked_up_in_the_image(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nkadr:x:10001:999::/data:/bin/false\n")
    assert find_user(tmp_path, "kadr") == (10001, 999)
    with pytest.raises(LookupError, match="ghost"):
        find_user(tmp_path, "ghost")
