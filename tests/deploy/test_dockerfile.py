"""The image: its steps are read as Docker reads them, and it is small, pinned, unprivileged and looked after."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from packaging.requirements import Requirement

from deploy.dockerfile import Container, DockerfileError, Stage, expand, needed_stages, read_stages, split_copy
from deploy.rehearse import DOCKERFILE
from tests.page_commands import ROOT, run_in_process

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = DOCKERFILE.read_text("utf-8")
VARIANTS = ("cpu", "cu130")
OPEN = "can be reached from other machines, and there is no token"


def image_stages(variant: str) -> list[Stage]:
    return needed_stages(read_stages(TEXT, {"TORCH": variant}))


def image_container(variant: str = "cpu") -> Container:
    container = Container()
    for instruction in image_stages(variant)[-1].instructions:
        container.apply(instruction, {})
    return container


def commands(variant: str) -> list[str]:
    return [each.value for stage in image_stages(variant) for each in stage.instructions if each.keyword == "RUN"]


def test_lines_are_joined_and_arguments_are_passed_on() -> None:
    text = """
    ARG TAG=1
    ARG UNUSED
    FROM debian:${TAG}-slim AS one
    # a comment
    RUN a \\
        # and one between
        && b
    FROM scratch AS aside
    FROM one
    ARG TAG
    ARG OWN=x${TAG}
    ENV A=${OWN} B="two words"
    COPY --from=one /a b /c/
    USER me
    HEALTHCHECK --timeout=5s CMD ["x", "y"]
    """
    one, aside, last = read_stages(text, {"TAG": "2"})
    assert (one.base, [each.value for each in one.instructions]) == ("debian:2-slim", ["a && b"])
    assert needed_stages([one, aside, last]) == [one, last]
    container = Container()
    for instruction in last.instructions:
        container.apply(instruction, {"TAG": "2"})
    assert container.environment == {"A": "x2", "B": "two words"}
    assert (container.user, container.health_check) == ("me", ["x", "y"])
    copies = [split_copy(each) for each in last.instructions if each.keyword == "COPY"]
    assert [(copy.stage, copy.sources, copy.target) for copy in copies] == [("one", ("/a", "b"), "/c/")]
    assert expand("$A-${B:-c}${D}", {"A": "a"}) == "a-c"


@pytest.mark.parametrize("line", ["ADD x /", 'SHELL ["sh"]', "ENTRYPOINT kadr serve", "COPY --chown=1 a b"])
def test_instruction_that_is_not_read_is_refused_by_line(line: str) -> None:
    def read() -> None:
        (instruction,) = read_stages(f"FROM a:1\n{line}\n")[0].instructions
        Container().apply(instruction, {})
        split_copy(instruction)

    with pytest.raises(DockerfileError, match="line 2"):
        read()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_base_of_the_image_has_a_version(variant: str) -> None:
    stages = image_stages(variant)
    names = {stage.name for stage in stages}
    assert [stage.base for stage in stages if stage.base not in names] == ["debian:bookworm-slim"]
    assert "latest" not in TEXT


@pytest.mark.parametrize("variant", VARIANTS)
def test_image_installs_only_versions_that_were_tested(variant: str) -> None:
    installs = [
        part for text in commands(variant) for part in re.split(" && ", text) if "pip" in part and "install" in part
    ]
    installs = [part for part in installs if "apt-get" not in part]
    assert len(installs) == 3
    assert all("--constraint /src/constraints.txt" in part for part in installs)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", TEXT, re.MULTILINE)
    assert "serve" in extras.split(",")
    wanted = [
        *project["dependencies"],
        *(text for name in extras.split(",") for text in project["optional-dependencies"][name]),
    ]
    names = {Requirement(text).name.replace("_", "-") for text in wanted if "python_version <" not in text}
    assert names <= set(pins)


def test_torch_comes_from_the_index_of_its_variant() -> None:
    for variant in VARIANTS:
        (build,) = [stage for stage in image_stages(variant) if stage.name == "build"]
        container = Container()
        for instruction in build.instructions:
            container.apply(instruction, {})
        assert container.arguments["TORCH_INDEX"] == f"https://download.pytorch.org/whl/{variant}"


def test_image_has_a_compiler_only_where_triton_needs_it() -> None:
    last_stages = {variant: [stage.name for stage in image_stages(variant)][-2:] for variant in VARIANTS}
    assert last_stages == {"cpu": ["runtime-cpu", ""], "cu130": ["runtime-cu130", ""]}
    assert not any("gcc" in text for text in commands("cpu"))
    assert any("gcc" in text for text in commands("cu130"))
    for text in commands("cpu")[0], commands("cu130")[-2]:
        assert "rm -rf /var/lib/apt/lists/*" in text


def test_image_runs_as_a_user_who_owns_the_volumes() -> None:
    container = image_container()
    (make_user,) = [text for text in commands("cpu") if "useradd" in text]
    assert container.user not in ("root", "0")
    assert make_user.partition("&&")[0].split()[-1] == container.user
    assert container.volumes == ["/data", "/models"]
    for volume in container.volumes:
        assert re.search(rf"install -d -o {container.user} -g {container.user} .*{volume}\b", make_user)
    written = {container.environment[name] for name in ("HOME", "KADR_CACHE", "KADR_MODELS", "HF_HOME")}
    assert all(path.startswith(tuple(container.volumes)) for path in written)


def test_entrypoint_refuses_to_serve_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KADR_TOKEN", raising=False)
    program, *arguments = image_container().entrypoint
    call = run_in_process(arguments)
    assert (program, call.code) == ("kadr", 1)
    assert OPEN in call.err
    assert run_in_process([*arguments, "--new-token", "anna"]).code == 0  # every flag is one of kadr serve


@contextmanager
def server_that_answers(status: int) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/alive" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def test_health_check_fails_unless_the_server_answers() -> None:
    program, flag, script = image_container().health_check
    assert (program, flag, image_container().ports) == ("python3", "-c", [8000])
    assert script.count("8000") == 1

    def check(port: int) -> int:
        command = [sys.executable, flag, script.replace("8000", str(port))]
        return subprocess.run(command, capture_output=True, timeout=30).returncode

    for status, code in ((200, 0), (503, 1)):
        with server_that_answers(status) as port:
            assert check(port) == code
    assert check(port) == 1
