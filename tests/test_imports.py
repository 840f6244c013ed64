"""Rules of the house: imports run one way down, torch only where needed, nothing too long."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tron_cli

PACKAGE = Path(tron_cli.__file__).parent
MODULES = {
    ".".join(("tron_cli", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imported(file: Path, *, in_functions: bool = True, for_types: bool = False) -> set[str]:
    """Return full names of what a module imports; under TYPE_CHECKING only if for_types."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        for child in ast.iter_child_nodes(node):
            if not for_types and is_type_checking(node) and child in node.body:  # type: ignore[attr-defined]
                continue
            if not in_functions and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return found


def group(module: str) -> str:
    """Return the room of a module: tron_cli.models.sasrec -> models; else its full name."""
    parts = module.split(".")
    return module if parts[0] != "tron_cli" else ".".join(parts[1:2]) or "tron_cli"


def test_the_rule_reader_sees_imports() -> None:
    """Otherwise the checks below would hold for anything."""
    assert "torch" in imported(MODULES["tron_cli.training.loop"])
    assert "tron_cli.data.batches" not in imported(MODULES["tron_cli.models.sasrec"])
    assert "tron_cli.data.batches" in imported(MODULES["tron_cli.models.sasrec"], for_types=True)
    train = MODULES["tron_cli.cli.train"]
    assert "tron_cli.api.training" in imported(train)
    assert "tron_cli.api.training" not in imported(train, in_functions=False)


@pytest.mark.parametrize("name", [name for name in MODULES if ".prepare" in name])
def test_prepare_never_imports_torch(name: str) -> None:
    """Follow its imports through the package."""
    seen: set[str] = set()
    waiting = {name}
    while waiting:
        module = waiting.pop()
        seen.add(module)
        imports = imported(MODULES[module])
        assert "torch" not in {found.split(".")[0] for found in imports}, f"{name} -> {module}"
        waiting |= {found for found in imports if found in MODULES} - seen


def test_importing_all_of_prepare_loads_no_torch() -> None:
    names = [name for name in MODULES if ".prepare" in name]
    script = f"import sys, {', '.join(names)}\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ARITHMETIC = ("models", "sampling", "losses", "ops")


@pytest.mark.parametrize(
    "name",
    [name for name in MODULES if group(name) in ARITHMETIC],
)
def test_the_arithmetic_imports_only_arrays_and_itself(name: str) -> None:
    allowed = {
        "torch",
        "triton",
        "numpy",
        "errors",
        "registry",
        *ARITHMETIC,
        *sys.stdlib_module_names,
    }
    found = {group(module).split(".")[0] for module in imported(MODULES[name])}
    assert found <= allowed


def test_imports_point_one_way() -> None:
    """Every module can be read after those that it imports: no cycles, not even for types."""
    waiting = {
        name: imported(file, for_types=True) & MODULES.keys() - {name}
        for name, file in MODULES.items()
    }
    while ready := {name for name, needs in waiting.items() if not needs}:
        waiting = {name: needs - ready for name, needs in waiting.items() if name not in ready}
    while above := waiting.keys() - set().union(*waiting.values()):  # they only stand on a circle
        waiting = {name: needs for name, needs in waiting.items() if name not in above}
    assert not waiting, f"these import each other: {sorted(waiting)}"


# The rooms of the house, and which others each may know; the command line may know all of them.
MAY_IMPORT = {
    "errors": "",
    "text_table": "",
    "files": "errors",
    "registry": "errors",
    "data": "errors files",
    "config": "data errors registry",
    "configs": "config",
    "ops": "errors",
    "models": "errors losses ops registry sampling",
    "sampling": "errors losses models ops registry",
    "losses": "errors models ops registry sampling",
    "distributed": "errors losses",
    "baselines": "config data errors registry",
    "checkpoint": "baselines config data distributed errors files models ops registry",
    "prepare": "data errors files text_table",
    "evaluation": "baselines checkpoint config data distributed errors files models ops registry "
    "text_table",
    "training": "baselines checkpoint config data distributed errors evaluation files losses "
    "models ops registry sampling text_table",
    "serving": "baselines checkpoint config data distributed errors evaluation files models ops "
    "prepare registry",
    "importing": "checkpoint config data errors files models",
    "api": "checkpoint config data distributed errors evaluation files models ops prepare registry "
    "serving training",
}


@pytest.mark.parametrize("name", MODULES)
def test_rooms_know_only_those_below_them(name: str) -> None:
    room = group(name)
    if room in ("cli", "__main__", "tron_cli"):
        return
    known = {group(module) for module in imported(MODULES[name]) if module in MODULES}
    assert known <= {room, *MAY_IMPORT[room].split()}


@pytest.mark.parametrize("name", [name for name in MODULES if group(name) == "cli"])
def test_the_command_line_imports_torch_only_in_commands(name: str) -> None:
    found = {module.split(".")[0] for module in imported(MODULES[name], in_functions=False)}
    assert not found & {"torch", "numpy", "polars", "ir_measures"}


def test_reading_a_configuration_loads_no_torch() -> None:
    script = (
        "import sys; from tron_cli.config import load_config, packaged_configs\n"
        "for name in packaged_configs(): load_config(name)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_root_is_a_map() -> None:
    """It has at most eight files; the rest is in rooms."""
    assert len([file for file in PACKAGE.iterdir() if file.is_file()]) <= 8


# Modules of more than 500 lines, and why.
LONG = {
    "tron_cli.config.experiment": "one declaration per setting",
    "tron_cli.data.dataset": "reader and writer of one format",
    "tron_cli.evaluation.ranking": "stages of one comparison, each with its error bound",
}


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines of a function without its signature and its docstring."""
    first = function.body[1:] if ast.get_docstring(function) else function.body
    assert function.end_lineno is not None
    return function.end_lineno - first[0].lineno + 1 if first else 0


# Functions of more than 60 lines, and why.
LONG_FUNCTIONS = {
    "_read_canonical": "one pass whose steps share their arrays",
    "start_training": "the parts of a training in the order in which they need each other",
}


# Docstrings begin with a verb, or with a noun phrase that names the thing.
FRAGMENT = re.compile(r"(What|Whether|Of|How|Where|When|Which|The same|As|Such|Also|And|But)\b")


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_too_long_and_docstrings_are_no_fragments(name: str) -> None:
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500 or name in LONG
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert body_lines(node) <= 60 or node.name in LONG_FUNCTIONS, node.name
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            assert not FRAGMENT.match(ast.get_docstring(node) or ""), node


def test_docstrings_of_tests_and_benchmarks_are_no_fragments() -> None:
    tests = Path(__file__).parent
    for file in [*tests.rglob("*.py"), *(tests.parent / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                assert not FRAGMENT.match(text), f"{file.name}: {text.splitlines()[0]}"


def test_no_test_imports_another() -> None:
    """Shared code lives in tests/helpers; one file runs the tests for CUDA on stand-ins."""
    tests = Path(__file__).parent
    names = {file.stem for file in tests.rglob("test_*.py")} | {"conftest"}
    files = [*tests.rglob("test_*.py")]
    assert len(names) == len(files) + 1, "pytest imports tests by name: two have the same"
    for file in set(tests.rglob("*.py")) - {tests / "test_cuda_stand_ins.py"}:
        assert not {module.split(".")[-1] for module in imported(file)} & names, file


def test_there_is_no_utils() -> None:
    assert not [name for name in MODULES if name.split(".")[-1] in ("utils", "helpers", "common")]
