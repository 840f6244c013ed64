"""The import rules: one way down, and no torch where it is not needed."""

from __future__ import annotations

import ast
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
    """tron_cli.models.sasrec -> models; of other packages the top name."""
    parts = module.split(".")
    return module if parts[0] != "tron_cli" else ".".join(parts[1:2]) or "tron_cli"


def test_the_rule_reader_sees_imports() -> None:
    """The checks below would hold for nothing if it did not."""
    assert "torch" in imported(MODULES["tron_cli.training.loop"])
    assert "tron_cli.data.batches" not in imported(MODULES["tron_cli.models.sasrec"])
    assert "tron_cli.data.batches" in imported(MODULES["tron_cli.models.sasrec"], for_types=True)
    train = MODULES["tron_cli.cli.train"]
    assert "tron_cli.api.training" in imported(train)
    assert "tron_cli.api.training" not in imported(train, in_functions=False)


@pytest.mark.parametrize("name", [name for name in MODULES if ".prepare" in name])
def test_prepare_never_imports_torch(name: str) -> None:
    """Neither itself nor through another module of the package."""
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
    """No cycles, not even for types: every module can be read after those that it imports."""
    waiting = {
        name: imported(file, for_types=True) & MODULES.keys() - {name}
        for name, file in MODULES.items()
    }
    while ready := {name for name, needs in waiting.items() if not needs}:
        waiting = {name: needs - ready for name, needs in waiting.items() if name not in ready}
    while above := waiting.keys() - set().union(*waiting.values()):  # they only stand on a circle
        waiting = {name: needs for name, needs in waiting.items() if name not in above}
    assert not waiting, f"these import each other: {sorted(waiting)}"


@pytest.mark.parametrize(
    ("lower", "uppers"),
    [
        (
            "data",
            {
                "cli",
                "config",
                "models",
                "sampling",
                "losses",
                "ops",
                "training",
                "serving",
                "evaluation",
                "baselines",
                "prepare",
                "checkpoint",
                "registry",
            },
        ),
        (
            "config",
            {
                "cli",
                "models",
                "sampling",
                "losses",
                "ops",
                "training",
                "serving",
                "evaluation",
                "baselines",
                "prepare",
                "checkpoint",
            },
        ),
        (
            "registry",
            {
                "cli",
                "config",
                "data",
                "models",
                "sampling",
                "losses",
                "ops",
                "training",
                "serving",
                "evaluation",
                "baselines",
                "prepare",
                "checkpoint",
            },
        ),
        (
            "ops",
            {
                "cli",
                "config",
                "data",
                "models",
                "sampling",
                "losses",
                "training",
                "serving",
                "evaluation",
                "baselines",
                "prepare",
                "checkpoint",
            },
        ),
        (
            "models",
            {
                "cli",
                "config",
                "data",
                "training",
                "serving",
                "evaluation",
                "baselines",
                "prepare",
                "checkpoint",
            },
        ),
        (
            "sampling",
            {
                "cli",
                "config",
                "data",
                "training",
                "serving",
                "evaluation",
                "baselines",
                "prepare",
                "checkpoint",
            },
        ),
        (
            "losses",
            {
                "cli",
                "config",
                "data",
                "training",
                "serving",
                "evaluation",
                "baselines",
                "prepare",
                "checkpoint",
            },
        ),
        ("checkpoint", {"cli", "evaluation", "prepare", "serving"}),
        ("baselines", {"cli", "training", "prepare", "checkpoint", "serving"}),
        (
            "prepare",
            {
                "cli",
                "config",
                "models",
                "sampling",
                "losses",
                "ops",
                "training",
                "serving",
                "evaluation",
                "baselines",
                "checkpoint",
            },
        ),
        ("evaluation", {"cli", "training", "prepare", "serving"}),
        ("training", {"cli", "prepare", "serving"}),
        ("serving", {"cli", "training"}),
    ],
)
def test_lower_layers_do_not_know_the_upper_ones(lower: str, uppers: set[str]) -> None:
    for name, file in MODULES.items():
        if group(name) == lower:
            assert not {group(module) for module in imported(file)} & {"api", *uppers}, name


def test_the_python_api_does_not_know_the_command_line() -> None:
    for name, file in MODULES.items():
        assert group(name) != "api" or "cli" not in map(group, imported(file)), name


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
    """Eight files at most; the rest is in rooms."""
    assert len([file for file in PACKAGE.iterdir() if file.is_file()]) <= 8


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
