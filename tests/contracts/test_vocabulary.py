"""The field's language: retired words stay away, docstrings say what a thing does, a constant means one thing."""

from __future__ import annotations

import ast
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "kadr"
TREES = ("src/kadr", "integrations", "tests", "benchmarks", "deploy", "train")
LONGEST_TEST_NAME = 70

# Words that nothing may say any more, in code, comments, docstrings or documents, and the word that took their place.
RETIRED = {
    r"bends?|bent": "modulation, adaLN, scale and shift",
    r"disturb\w*": "perturb (STG)",
    r"carousels?": "block swapping",
    r"shelf|shelves": "ModuleCache",
    r"watchm[ae]n": "FiniteCheck",
    r"wordless": "null text",
    r"strangers?": "unexpected keys",
    r"unheard": "ignored",
    r"lend|lends|lent|lending": "acquire, override",
    r"rescue[ds]?": "retry",
    r"noise levels?": "sigma",
    r"pictures?": "image, frame",
}
# Files where such a word is somebody else's, or the subject.
ALLOWED = {
    "bends?|bent": (  # names of noise streams, which decide a LoRA's initial bits
        "src/kadr/training/trainable_lora.py",
        "tests/training/test_trainable_lora.py",
        "tests/text/test_enhance.py",  # a river
    ),
    "noise levels?": ("docs/glossary.md",),  # where a sigma is explained
    "pictures?": (
        "src/kadr/text/chat_messages.py",  # the words that a chat model is sent decide what it answers
        "tests/text/test_enhance.py",
        "tests/request/test_prompt_enhancement.py",
    ),
}
# Names that were kadr's own dialect, and would read as plain words elsewhere: (name, module it must not be defined in).
RETIRED_NAMES = (
    *((name, "*") for name in ("levels", "level_bends", "level_embedding", "patch_in", "patch_out", "text_in")),
    *((name, "*") for name in ("text_attention", "around_attention", "around_thought", "text_kv_reading", "joined")),
    *((name, "*") for name in ("guarded", "rescued", "weigh", "nearest", "coarse", "handed", "turned", "seams")),
    *((name, "*") for name in ("Given", "Reading", "Said", "Needs", "Choice", "Shelf", "PassPlan", "Work", "Film")),
    *((name, "*") for name in ("Placed", "Fitted", "Shown", "Followed", "Made", "Packing", "Adapted", "Prepares")),
    ("read", "models/transformer.py"),
    ("given", "sampling/state.py"),
    ("strength", "sampling/state.py"),
    ("hold", "sampling/conditioning.py"),
    ("append", "sampling/conditioning.py"),
    ("join", "sampling/conditioning.py"),
    ("shake", "sampling/conditioning.py"),
    ("over", "sampling/settings.py"),
    ("over", "sampling/guidance.py"),
    ("only_pass", "request/request.py"),
    ("alone", "models/registry.py"),
    ("continued", "sampling/blending.py"),
    ("prepared", "nn/linear.py"),
    ("finished", "nn/linear.py"),
    ("several", "nn/linear.py"),
    ("acting", "nn/linear.py"),
    ("take", "memory/module_cache.py"),
    ("lane", "memory/block_swap.py"),
    ("places", "memory/block_swap.py"),
    ("homes", "memory/block_swap.py"),
    ("hold", "planning/plan.py"),
    ("way", "planning/planner.py"),
    ("path", "planning/plan.py"),
    ("together", "planning/plan.py"),
    ("rate", "training/settings.py"),
    ("remember", "request/windows.py"),
    ("making", "cli/run.py"),
)
# Participles that say nothing of a value: no variable, parameter or field is called so.
BARE_PARTICIPLES = {"held", "told", "kept", "given", "asked", "shown", "together"}
DOCSTRINGS_NEVER_BEGIN = ("What", "Whether", "How", "Of")


def texts() -> Iterator[tuple[str, str]]:
    """Every file that people read: its path from the root, and its text."""
    for tree in TREES:
        for path in sorted((ROOT / tree).rglob("*.py")):
            if path != Path(__file__):
                yield path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
    for path in (*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        yield path.relative_to(ROOT).as_posix(), path.read_text("utf-8")


def words(text: str) -> str:
    """The text with its identifiers taken apart: `ModuleCache.look_up` is "Module Cache look up"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text).replace("_", " ")


def retired_words(path: str, text: str) -> Iterator[str]:
    """Complaints about retired words of one file."""
    lines = [words(line) for line in text.splitlines()]
    for pattern, instead in RETIRED.items():
        if path in ALLOWED.get(pattern, ()):
            continue
        for number, line in enumerate(lines, 1):
            if found := re.search(rf"\b(?:{pattern})\b", line, re.IGNORECASE):
                yield f"{path}:{number}: {found.group()!r} is retired; say {instead}"


def defined_names(tree: ast.AST) -> set[str]:
    """Classes, functions, parameters, attributes and fields that a module defines; not its local variables."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        if isinstance(node, ast.arg):
            names.add(node.arg)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        if isinstance(node, ast.ClassDef):
            fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            names |= {field.id for field in fields if isinstance(field, ast.Name)}
    return names


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring."""
    for node in ast.walk(tree):
        has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if has_docstring and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Upper-case names that a module assigns, with what they are assigned."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = (
                    zip(target.elts, node.value.elts, strict=False)
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                    else [(target, node.value)]
                )
                yield from ((name.id, ast.unparse(value)) for name, value in pairs if isinstance(name, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, ast.unparse(node.value)


def package() -> Iterator[tuple[str, ast.Module]]:
    """Modules of kadr, by their path in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text("utf-8"))


def test_nothing_says_a_retired_word() -> None:
    assert [complaint for path, text in texts() for complaint in retired_words(path, text)] == []


@pytest.mark.parametrize(
    "line",
    [
        "self.shelf = 1",
        "class Watchman:",
        "def undisturbed(): disturb()",
        "# lends a module",
        "the Carousel",
        "bent_x = 1",
    ],
)
def test_a_planted_word_is_caught(line: str) -> None:
    assert list(retired_words("planted.py", line))


def test_no_module_defines_a_retired_name() -> None:
    found = []
    for path, tree in package():
        names = defined_names(tree)
        found += [f"{path}: {name}" for name, where in RETIRED_NAMES if where in ("*", path) and name in names]
    assert found == []


def test_modules_with_retired_names_exist() -> None:
    assert [where for _, where in RETIRED_NAMES if where != "*" and not (PACKAGE / where).is_file()] == []


def test_no_value_is_named_by_a_bare_participle() -> None:
    found = []
    for path, tree in package():
        variables = {
            node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        found += [f"{path}: {name}" for name in sorted((variables | defined_names(tree)) & BARE_PARTICIPLES)]
    assert found == []


def test_no_two_classes_share_a_name() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path, tree in package():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(path)
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("tree", TREES)
def test_no_docstring_begins_with_what_whether_how_or_of(tree: str) -> None:
    found = []
    for path in sorted((ROOT / tree).rglob("*.py")):
        for line, text in docstrings(ast.parse(path.read_text("utf-8"))):
            if text.split()[0] in DOCSTRINGS_NEVER_BEGIN:
                found.append(f"{path.relative_to(ROOT).as_posix()}:{line}: {text.splitlines()[0]}")
    assert found == []


def test_a_constant_means_one_thing() -> None:
    """A name of one letter and a type variable are exempt: they are local in all but place."""
    values: dict[str, dict[str, str]] = defaultdict(dict)
    for path, tree in package():
        for name, value in constants(tree):
            if len(name) > 1 and name.upper() == name and not value.startswith("TypeVar("):
                values[name][path] = value
    assert {name: where for name, where in values.items() if len(set(where.values())) > 1} == {}


def test_names_of_tests_are_short_enough_to_read() -> None:
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        with tokenize.open(path) as file:
            found += [name for name in re.findall(r"def (test_\w+)", file.read()) if len(name) > LONGEST_TEST_NAME]
    assert found == []
