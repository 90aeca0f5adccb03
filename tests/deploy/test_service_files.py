"""The compose file, the unit and their environment: valid, hardened, without a secret, and as the guide says."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.dockerfile import Container, needed_stages, read_stages
from tests.page_commands import ROOT, run_in_process

FOLDER = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text("utf-8"))
SERVICES = COMPOSE["services"]
UNIT = (FOLDER / "kadr.service").read_text("utf-8")
EXAMPLE = (FOLDER / "kadr.env.example").read_text("utf-8")
GUIDE = (ROOT / "docs" / "guides" / "deploy.md").read_text("utf-8")


def image(torch: str = "cpu") -> Container:
    container = Container()
    for instruction in needed_stages(read_stages((FOLDER / "Dockerfile").read_text("utf-8"), {"TORCH": torch}))[
        -1
    ].instructions:
        container.apply(instruction, {})
    return container


def unit_values(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", UNIT, re.MULTILINE)


def test_each_profile_has_one_service_of_the_same_image() -> None:
    assert {name: service["profiles"] for name, service in SERVICES.items()} == {"cpu": ["cpu"], "gpu": ["gpu"]}
    for service in SERVICES.values():
        build = service["build"]
        assert (FOLDER / build["context"] / build["dockerfile"]).resolve() == FOLDER / "Dockerfile"
        assert read_stages((FOLDER / "Dockerfile").read_text("utf-8"), build.get("args", {}))
    assert SERVICES["gpu"]["build"]["args"] == {"TORCH": "cu130"}
    (device,) = SERVICES["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in SERVICES["cpu"]


@pytest.mark.parametrize("name", SERVICES)
def test_service_has_the_volumes_and_the_port_of_the_image(name: str) -> None:
    service, container = SERVICES[name], image()
    volumes = dict(reversed(text.split(":")) for text in service["volumes"])
    assert list(volumes) == container.volumes
    assert set(volumes.values()) == set(COMPOSE["volumes"])
    assert service["ports"] == [f"127.0.0.1:{port}:{port}" for port in container.ports]
    assert "healthcheck" not in service, "the image's own is meant"
    assert container.health_check


@pytest.mark.parametrize("name", SERVICES)
def test_service_can_write_nothing_but_its_volumes(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "user", "network_mode", "pid"} & service.keys()


def test_no_file_has_a_secret_or_a_floating_version() -> None:
    texts = {path.name: path.read_text("utf-8") for path in FOLDER.iterdir() if path.is_file()}
    for name, text in texts.items():
        assert ":latest" not in text, name
        assert not re.search(r"KADR_TOKEN[=:][ \t]*\S", text), name
    assert re.search(r"^KADR_TOKEN=$", EXAMPLE, re.MULTILINE)
    assert {service["env_file"] for service in SERVICES.values()} == {"kadr.env"}
    ignored = subprocess.run(["git", "check-ignore", "-q", "deploy/kadr.env"], cwd=ROOT).returncode
    assert ignored in (0, 128), "git would take a kadr.env with a token"  # 128: not a clone


def test_unit_runs_kadr_serve_as_a_user_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = unit_values("ExecStart")
    program, *arguments = shlex.split(command.replace("$KADR_SERVE_FLAGS", ""))
    assert Path(program).name == "kadr"
    monkeypatch.delenv("KADR_TOKEN", raising=False)
    assert run_in_process([*arguments, "--new-token", "anna"]).code == 0  # every flag is one of kadr serve
    assert unit_values("DynamicUser") == ["yes"]
    assert unit_values("Restart") == ["on-failure"]
    written = {
        f"/var/lib/{unit_values('StateDirectory')[0].split()[0]}",
        f"/var/cache/{unit_values('CacheDirectory')[0]}",
    }
    places = [part.partition("=")[2] for line in unit_values("Environment") for part in line.split() if "=/" in part]
    assert len(places) == 4
    assert all(place.startswith(tuple(written)) for place in [*places, arguments[arguments.index("--data") + 1]])


def test_unit_passes_systemds_own_check(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("this machine has no systemd-analyze")
    unit = tmp_path / "kadr.service"
    unit.write_text(UNIT.replace("/opt/kadr/bin/kadr", sys.executable))  # which must exist

    def verify() -> str:
        process = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
        return "\n".join(line for line in process.stderr.splitlines() if "kadr.service" in line)

    assert verify() == ""
    unit.write_text(unit.read_text().replace("ProtectHome=yes", "ProtectHome=perhaps"))
    assert "protect home" in verify()


def test_guide_names_what_the_files_name() -> None:
    container = image()
    for name in (*container.volumes, *map(str, container.ports), *COMPOSE["volumes"], *SERVICES):
        assert re.search(rf"(?<!\w){re.escape(name)}\b", GUIDE), name
    for place in ("/var/lib/kadr", "/var/cache/kadr", "/etc/kadr/kadr.env", "/opt/kadr"):
        assert place in UNIT
        assert place in GUIDE
    for variable in re.findall(r"^#?([A-Z_]+)=", EXAMPLE, re.MULTILINE):
        assert f"`{variable}`" in GUIDE
    assert sorted(set(re.findall(r"--build-arg (\w+)=", GUIDE))) == ["EXTRAS", "TORCH"]
