"""Rules of the house that the source itself shows: who imports whom, how large things are, what is never called."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for package in ("tiling", "pipeline") for path in (ROOT / package).rglob("*.py"))
MODULE_LINES, FUNCTION_LINES = 400, 60


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_of(path): ast.parse(path.read_text()) for path in SOURCES}


def at_import(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that run when the module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from at_import(node.body)
            yield from at_import(node.orelse)
        elif isinstance(node, ast.Try):
            for part in (node.body, node.orelse, node.finalbody, *(handler.body for handler in node.handlers)):
                yield from at_import(part)
        elif isinstance(node, ast.With | ast.ClassDef):
            yield from at_import(node.body)


def named(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Every module that a statement may name: ``from a import b`` may mean ``a`` or ``a.b``."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    assert node.level == 0, "relative import"
    assert node.module is not None
    return {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}


def all_imports(tree: ast.Module) -> set[str]:
    return {name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for name in named(node)}


def calls(tree: ast.Module) -> Iterator[tuple[str, dict[str, str]]]:
    """Name of what is called, and its keywords, as source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg or "**": ast.unparse(word.value) for word in node.keywords}


def test_there_is_something_to_read() -> None:
    assert {"tiling.slide", "tiling.store", "pipeline.cli", "pipeline.commands.tile"} <= set(TREES)


@pytest.mark.parametrize("module", [name for name in TREES if name.split(".")[0] == "tiling"])
def test_tiling_needs_neither_pipeline_nor_torch(module: str) -> None:
    tops = {name.split(".")[0] for name in all_imports(TREES[module])}
    assert not tops & {"pipeline", "torch", "torchvision", "timm", "lightly"}


def test_no_cycles() -> None:
    graph = {}
    for module, tree in TREES.items():
        found = {name for node in at_import(tree.body) for name in named(node)} & set(TREES)
        # `from package import module` needs the package first, and the package's __init__ imports nothing of ours.
        graph[module] = found - {module}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")
    assert set(order) == set(TREES)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_sizes(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MODULE_LINES
    functions = [node for node in ast.walk(TREES[module_of(path)]) if isinstance(node, ast.FunctionDef)]
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: size for name, size in sizes.items() if size > FUNCTION_LINES} == {}


@pytest.mark.parametrize("module", TREES)
def test_nothing_unpickles(module: str) -> None:
    tops = {name.split(".")[0] for name in all_imports(TREES[module])}
    assert not tops & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for name, words in calls(TREES[module]):
        last = name.split(".")[-1]
        if name == "torch.load":
            assert words.get("weights_only") == "True"
        if last == "load_state_dict":
            assert words.get("strict") in (None, "True")
        if last == "load" and name.split(".")[0] in ("np", "numpy"):
            assert words.get("allow_pickle") in (None, "False")
        assert name not in ("eval", "exec", "torch.serialization.add_safe_globals")


def test_importing_all_of_tiling_leaves_torch_out() -> None:
    modules = [name for name in TREES if name.split(".")[0] == "tiling"]
    program = f"import sys\nfor name in {modules!r}: __import__(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert set(modules) <= loaded
    assert not {name for name in loaded if name.split(".")[0] in ("torch", "pipeline", "torchvision", "timm")}


def test_the_command_line_starts_without_torch() -> None:
    program = "import sys\nfrom pipeline.cli import main\ncode = main(['index', 'gone'])\nprint(code, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    code, *loaded = done.stdout.split()
    assert code == "1"
    assert "torch" not in loaded
