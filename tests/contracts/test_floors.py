"""A module of kadr imports from a lower floor or its own unit; no circles, no oracles, no network."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "kadr"
FLOORS = (  # from the ground up; shapes stands on errors; the public list stands on all it lists
    "errors version",
    "shapes validation",
    "kernels sampling media text",
    "nn",
    "models quant",
    "checkpoints memory",
    "spec",
    "request",
    "planning",
    "pipeline",
    "training bench",
    "__init__",
    "cli",
    "__main__",
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units.split()}
ORACLES = ("diffusers", "transformers", "ltx_video", "einops")
DOORS = ("checkpoints/hub.py", "text/enhance.py")  # files of the hub; an endpoint that the user names
LONGEST_FOLDER = 16  # modules
NETWORK = ("huggingface_hub", "requests", "urllib.request", "urllib3", "http.client", "httpx", "httpx2", "aiohttp")


def imported(tree: ast.AST, home: list[str]) -> Iterator[str]:
    """Every dotted name that a module imports, wherever the import stands. home: the package that dots start from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def unit_of(name: str) -> str:
    """The unit that `kadr.unit.rest` names; any other name under `kadr` is read from the public list."""
    unit = [*name.split("."), "__init__"][1]
    return unit if unit in FLOOR or (PACKAGE / unit).is_dir() or (PACKAGE / f"{unit}.py").is_file() else "__init__"


def complaints(path: str, source: str) -> Iterator[str]:
    """Yields complaints about the imports of a file. path: relative to the package, with slashes."""
    *folders, file = path.split("/")
    unit = folders[0] if folders else file.removesuffix(".py")
    if unit not in FLOOR:
        yield f"{path}: {unit} stands on no floor; give it one in FLOORS"
    for name in imported(ast.parse(source), ["kadr", *folders]):
        there = unit_of(name)
        lower = FLOOR.get(there, len(FLOORS)) < FLOOR.get(unit, -1)
        if name.split(".")[0] == "kadr" and not (lower or there == unit or unit == "__init__"):
            yield f"{path}: imports {name}, which is not on a lower floor"
        if f"{name}.".startswith(tuple(f"{oracle}." for oracle in ORACLES)):
            yield f"{path}: imports {name}, which only tests and benchmarks may"
        if f"{name}.".startswith(tuple(f"{door}." for door in NETWORK)) and path not in DOORS:
            yield f"{path}: imports {name}; only {' and '.join(DOORS)} touch the network"


def test_every_import_goes_down() -> None:
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}
    assert sources.keys() >= {"__init__.py", "errors.py", "shapes.py"}
    assert "kadr.errors.RequestError" in set(imported(ast.parse(sources["shapes.py"]), ["kadr"]))
    assert [complaint for path, source in sorted(sources.items()) for complaint in complaints(path, source)] == []


def module_graph() -> dict[str, set[str]]:
    """Module -> the modules of kadr that it imports, wherever the import stands."""
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    names = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in paths}
    graph: dict[str, set[str]] = {}
    for path, file in paths.items():
        if path == "__init__.py":
            continue  # the public list stands on all it lists
        folders = path.split("/")[:-1]
        found = {
            name.removeprefix("kadr.") for name in imported(ast.parse(file.read_text("utf-8")), ["kadr", *folders])
        }
        targets = {names.get(name) or names.get(name.rpartition(".")[0]) for name in found}
        graph[path] = {target for target in targets if target and target not in (path, "__init__.py")}
    return graph


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that are left when those that import nothing of the rest are taken away, again and again."""
    left = {path: set(targets) for path, targets in graph.items()}
    while free := {path for path, targets in left.items() if not targets & left.keys()}:
        left = {path: targets for path, targets in left.items() if path not in free}
    return sorted(left)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = module_graph()
    assert "errors.py" in graph["shapes.py"]
    assert circles(graph) == []
    assert circles({"a.py": {"b.py"}, "b.py": {"c.py"}, "c.py": {"a.py"}, "d.py": {"a.py"}}) != []


def test_no_folder_is_a_long_flat_list() -> None:
    folders = Counter(path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    assert {folder: count for folder, count in folders.items() if count - 1 > LONGEST_FOLDER} == {}  # but for __init__


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
        ("text/endpoint.py", "import http.client"),  # beside a door
        ("cli/enhance.py", "import urllib.request"),  # named as one
        ("text/enhance.py", "from kadr.media import image"),  # a door is no way up or across
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
