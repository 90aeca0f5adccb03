"""A module of kadr imports from a lower floor or its own unit: no cycles, no oracles, no network."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "kadr"
FLOORS = (  # from the lowest up; __init__ re-exports the public names and may import all of them
    "quoting setting_names version",
    "errors notebook",
    "file_names hidden_paths json_reader regular_file validation yaml_reader",
    "cache_home cancellation schema shapes",
    "atomic_write",
    "kernels sampling media text",
    "nn",
    "models quant",
    "memory",
    "checkpoints",
    "spec",
    "request",
    "planning",
    "pipeline",
    "training bench jobs",
    "batch diagnosis selftest",
    "__init__",
    "diffusers server",
    "cli",
    "__main__",
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units.split()}
ORACLES = ("diffusers", "transformers", "ltx_video", "einops")
NETWORK_MODULES = ("checkpoints/hub.py", "text/enhance.py")  # the hub; an endpoint that the user names
MAX_MODULES_PER_FOLDER = 16
NETWORK_LIBRARIES = (
    "huggingface_hub",
    "requests",
    "urllib.request",
    "urllib3",
    "http.client",
    "httpx",
    "httpx2",
    "aiohttp",
)


def imported_names(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Yields every dotted name that a module imports, at any depth. package: that of relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def unit_of(name: str) -> str:
    """Returns the unit of `kadr.unit.rest`; "__init__" for a public name such as `kadr.Engine`."""
    unit = [*name.split("."), "__init__"][1]
    return unit if unit in FLOOR or (PACKAGE / unit).is_dir() or (PACKAGE / f"{unit}.py").is_file() else "__init__"


def complaints(path: str, source: str) -> Iterator[str]:
    """Yields complaints about the imports of a file. path: relative to the package, with slashes."""
    *folders, file = path.split("/")
    unit = folders[0] if folders else file.removesuffix(".py")
    if unit not in FLOOR:
        yield f"{path}: {unit} has no floor; add it to FLOORS"
    for name in imported_names(ast.parse(source), ["kadr", *folders]):
        imported_unit = unit_of(name)
        is_lower = FLOOR.get(imported_unit, len(FLOORS)) < FLOOR.get(unit, -1)
        if name.split(".")[0] == "kadr" and not (is_lower or imported_unit == unit or unit == "__init__"):
            yield f"{path}: imports {name}, which is not on a lower floor"
        if f"{name}.".startswith(tuple(f"{oracle}." for oracle in ORACLES)):
            yield f"{path}: imports {name}, which only tests and benchmarks may"
        if f"{name}.".startswith(tuple(f"{library}." for library in NETWORK_LIBRARIES)) and path not in NETWORK_MODULES:
            yield f"{path}: imports {name}; only {' and '.join(NETWORK_MODULES)} use the network"


def test_every_import_goes_down() -> None:
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}
    assert sources.keys() >= {"__init__.py", "errors.py", "shapes.py"}
    assert "kadr.errors.RequestError" in set(imported_names(ast.parse(sources["shapes.py"]), ["kadr"]))
    assert [complaint for path, source in sorted(sources.items()) for complaint in complaints(path, source)] == []


def module_graph() -> dict[str, set[str]]:
    """Returns module -> the modules of kadr that it imports, at any depth."""
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    names = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in paths}
    graph: dict[str, set[str]] = {}
    for path, file in paths.items():
        if path == "__init__.py":
            continue  # re-exports the public names
        folders = path.split("/")[:-1]
        imports = {
            name.removeprefix("kadr.")
            for name in imported_names(ast.parse(file.read_text("utf-8")), ["kadr", *folders])
        }
        targets = {names.get(name) or names.get(name.rpartition(".")[0]) for name in imports}
        graph[path] = {target for target in targets if target and target not in (path, "__init__.py")}
    return graph


def modules_in_cycles(graph: dict[str, set[str]]) -> list[str]:
    """Returns modules in or above an import cycle: those left after modules without remaining imports are removed."""
    remaining = {path: set(targets) for path, targets in graph.items()}
    while free := {path for path, targets in remaining.items() if not targets & remaining.keys()}:
        remaining = {path: targets for path, targets in remaining.items() if path not in free}
    return sorted(remaining)


def test_there_are_no_import_cycles() -> None:
    graph = module_graph()
    assert "errors.py" in graph["shapes.py"]
    assert modules_in_cycles(graph) == []
    assert modules_in_cycles({"a.py": {"b.py"}, "b.py": {"c.py"}, "c.py": {"a.py"}, "d.py": {"a.py"}}) != []


def test_no_folder_has_too_many_modules() -> None:
    folders = Counter(path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    assert {
        folder: count for folder, count in folders.items() if count - 1 > MAX_MODULES_PER_FOLDER
    } == {}  # __init__ is not counted


@pytest.mark.parametrize(
    "path, source",
    [
        ("shapes.py", "import kadr.pipeline.engine"),
        ("errors.py", "from kadr import shapes"),
        ("sampling/samplers.py", "from kadr.models import transformer"),
        ("sampling/samplers.py", "from kadr.media import image"),  # same floor, another unit
        ("nn/linear.py", "from ..quant import int8"),
        ("nn/__init__.py", "from ..quant import int8"),
        ("nn/linear.py", "from .. import quant"),
        ("nn/linear.py", "def late():\n    import kadr.quant.int8"),
        ("nn/linear.py", "if TYPE_CHECKING:\n    from kadr.checkpoints.source import Source"),
        ("nn/linear.py", "importlib.import_module('kadr.quant')"),
        ("models/t5.py", "from kadr import Engine"),
        ("models/t5.py", "import kadr"),
        ("tools/odd.py", ""),
        ("models/t5.py", "from transformers import T5EncoderModel"),
        ("__init__.py", "import diffusers.models"),
        ("nn/rope.py", "from einops import rearrange"),
        ("checkpoints/load.py", "from huggingface_hub import hf_hub_download"),
        ("text/prompt.py", "from urllib import request"),
        ("text/endpoint.py", "import http.client"),  # beside a network module
        ("cli/enhance.py", "import urllib.request"),  # has the name of one
        ("text/enhance.py", "from kadr.media import image"),  # floors hold for network modules too
    ],
)
def test_a_planted_import_is_caught(path: str, source: str) -> None:
    assert len(list(complaints(path, source))) == 1


@pytest.mark.parametrize(
    "path, source",
    [
        ("shapes.py", "from kadr.errors import RequestError"),
        ("nn/linear.py", "from .rope import rotate\nfrom kadr.nn import norm\nfrom ..kernels import attention"),
        ("pipeline/engine.py", "from kadr.checkpoints import load\nimport kadr.models.t5"),
        ("cli/main.py", "from kadr import Engine, __version__\nimport urllib.parse"),
        ("__init__.py", "from kadr.pipeline.engine import Engine\nfrom kadr.cli import main"),
        ("checkpoints/hub.py", "from huggingface_hub import hf_hub_download"),
        ("text/enhance.py", "import http.client\nimport urllib.request"),
        ("models/t5.py", "import transformers_of_another_kind\nimport torch"),
    ],
)
def test_a_downward_import_is_allowed(path: str, source: str) -> None:
    assert list(complaints(path, source)) == []
