"""The public Python API: names, import orders, types, and examples that run."""

from __future__ import annotations

import ast
import doctest
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

import tron_cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def python(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=cwd
    )


def test_importing_the_package_is_quick_and_loads_no_library() -> None:
    """Below 50 ms: most runs take a tenth of that."""
    heavy = {"torch", "numpy", "polars", "typer", "scipy", "tqdm"}
    script = f"import sys, tron_cli, tron_cli.errors; assert not {heavy} & sys.modules.keys()"
    times = []
    for _ in range(5):
        done = python("-X", "importtime", "-c", script)
        assert done.returncode == 0, done.stderr
        times.append(int(re.findall(r"\| +(\d+) \| tron_cli\n", done.stderr)[0]) / 1000)
    assert median(times) < 50


def test_every_name_is_there_and_typed() -> None:
    assert set(tron_cli.__all__) <= set(dir(tron_cli))
    for name in tron_cli.__all__:
        assert callable(getattr(tron_cli, name)), name
    for node in ast.walk(ast.parse(Path(tron_cli.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            typed = [alias.name for each in node.body for alias in each.names]  # type: ignore[attr-defined]
            assert sorted(typed) == sorted(tron_cli.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'predict'"):
        tron_cli.predict  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "import tron_cli; prepare = tron_cli.prepare",
        "from tron_cli import prepare",
        "import tron_cli.prepare.sources.table; from tron_cli import prepare",
        "import tron_cli.prepare; prepare = tron_cli.prepare",
        "from tron_cli import prepare; import tron_cli.prepare.split; from tron_cli import prepare",
        "from tron_cli.prepare import summary; from tron_cli import prepare",
        "from tron_cli import train, evaluate, prepare",
        "from tron_cli import *",
    ],
)
def test_prepare_is_the_function_in_every_order_of_imports(imports: str, tmp_path: Path) -> None:
    script = f"{imports}\nprepare('synthetic', sessions=1)"
    done = python("-c", script, cwd=tmp_path)
    assert "never occur in the training part of 1 session;" in done.stderr


def test_preparing_loads_no_torch(tmp_path: Path) -> None:
    script = "import sys, tron_cli; tron_cli.prepare('synthetic', sessions=12_000)\n"
    done = python("-c", f"{script}assert 'torch' not in sys.modules", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_package_prepare_is_still_a_package() -> None:
    import tron_cli.prepare as package
    from tron_cli.prepare.sources import table

    assert package.__path__
    assert package.sources.table is table


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the docstrings, and then the page's, in one folder."""
    from tron_cli.api.preparation import prepare

    monkeypatch.chdir(tmp_path)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    functions = (tron_cli.load_config, prepare, tron_cli.train, tron_cli.evaluate)
    for documented in (*functions, tron_cli.mix, tron_cli.compare, tron_cli.Recommender):
        (example,) = finder.find(documented, globs={})
        assert example.examples, documented
        runner.run(example)
    assert runner.summarize().failed == 0
    scope: dict[str, object] = {"__name__": "page"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), scope)


@pytest.mark.slow
def test_a_type_checker_sees_the_types(tmp_path: Path) -> None:
    script = (
        "import tron_cli\n"
        "from tron_cli import Recommender, prepare, train\n"
        "reveal_type(train('c').metrics)\n"
        "reveal_type(tron_cli.evaluate('a.pt').metrics['R@20'].stderr)\n"
        "reveal_type(prepare('table'))\n"
        "reveal_type(Recommender.load('a.pt').recommend([['a']]))\n"
        "tron_cli.evaluate('a.pt', split='tset')\n"
    )
    (tmp_path / "snippet.py").write_text(script)
    done = python("-m", "mypy", "--no-error-summary", str(tmp_path / "snippet.py"), cwd=ROOT)
    found = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert [re.sub(r"builtins\.|tron_cli\.[\w.]*\.", "", each) for each in found] == [
        "dict[str, float]", "float | None", "Dataset", "list[Recommendation]",
    ], done.stdout  # fmt: skip
    assert done.stdout.count("error:") == 1
    assert "incompatible type" in done.stdout
