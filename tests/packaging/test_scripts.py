"""What lies beside the package imports names that the package has, also inside functions."""

import ast
from importlib import import_module
from pathlib import Path

import pytest
from helpers import ROOT

FOLDERS = ("benchmarks", "docs", "examples", "scripts", "tests")
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> list[tuple[str, str | None]]:
    """Return (module, name) of every import from hinge."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hinge":
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names if alias.name.split(".")[0] == "hinge"]
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imported_names_exist(path):
    for module, name in imported(ROOT / path):
        found = import_module(module)
        if name is not None and not hasattr(found, name):
            import_module(f"{module}.{name}")


def test_only_the_launchers_are_scripts():
    assert {path.name for path in (ROOT / "scripts").iterdir() if path.suffix == ".py"} == {
        "train.py",
        "pretrain_histology.py",
    }
