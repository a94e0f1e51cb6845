"""The import contract of pyproject.toml holds, and fails on what it is there for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

pytest.importorskip("importlinter", reason='needs import-linter: pip install -e ".[test]"')


def lint(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]
    # the current folder comes first on the path of `-c`: its package is read, not the installed one
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package and its contract."""
    shutil.copytree(ROOT / "hinge", tmp_path / "hinge", ignore=shutil.ignore_patterns("__pycache__", "static"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def append(path: Path, line: str) -> None:
    path.write_text((path.read_text() if path.exists() else "") + f"\n\n{line}\n")


def test_contract_holds(package):
    done = lint(package)
    assert done.returncode == 0, done.stdout + done.stderr


def test_upward_import_breaks_the_contract_also_inside_a_function(package):
    append(package / "hinge" / "utils" / "files.py", "def _upwards():\n    from hinge.training import loop")
    done = lint(package)
    assert done.returncode == 1 and "hinge.utils is not allowed to import hinge.training" in done.stdout


def test_circle_breaks_the_contract(package):
    append(package / "hinge" / "data" / "one.py", "import hinge.data.other")
    append(package / "hinge" / "data" / "other.py", "import hinge.data.one")
    done = lint(package)
    assert done.returncode == 1 and "No cycles are allowed in hinge.data" in done.stdout


def test_siblings_of_one_layer_do_not_import_each_other(package):
    append(package / "hinge" / "viewer" / "server.py", "import hinge.report")
    done = lint(package)
    assert done.returncode == 1 and "hinge.viewer is not allowed to import hinge.report" in done.stdout


def test_loose_module_breaks_the_contract(package):
    append(package / "hinge" / "loose.py", "VALUE = 1")
    done = lint(package)
    assert done.returncode == 1 and "loose" in done.stdout


def test_nothing_lies_beside_the_packages_but_the_configuration():
    assert {path.name for path in (ROOT / "hinge").glob("*.py")} == {"__init__.py", "config.py"}
    folders = [path for path in (ROOT / "hinge").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_files_of_tests_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_no_source_file_is_too_long():
    long = {str(path): n for path in (ROOT / "hinge").rglob("*.py") if (n := len(path.read_text().splitlines())) > 450}
    assert not long
