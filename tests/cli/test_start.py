"""Commands that end early import nothing heavy."""

import shutil
import signal
import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "scanpy", "sklearn")
SCRIPT = """
import sys
try:
    {code}
except SystemExit as stop:
    print("exit", stop.code)
print("imported", *[name for name in {heavy} if name in sys.modules])
"""


def imported(code: str) -> tuple[list[str], str]:
    script = SCRIPT.format(code=code, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:], done.stdout + done.stderr


def command(*arguments: str) -> str:
    return f"sys.argv = ['hinge', *{arguments!r}]; import hinge.cli; hinge.cli.main()"


def test_reading_settings_imports_nothing_heavy():
    settings = {"output": "o", "data": {"path": "d", "train": ["a"]}}
    assert imported(f"from hinge.config import check_config; check_config({settings!r}, 'test')")[0] == []


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--help"], "Usage"),
        (["config"], "training:"),
        (["train", "--config", "nowhere.yaml"], "there is no configuration file nowhere.yaml"),
        (["sample", "nowhere"], "nowhere is not the folder of a run"),
        (["evaluate", "nowhere"], "nowhere is not the folder of a run"),
        (["features", "nowhere", "--output", "o"], "there is no file or folder nowhere"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0],
)
def test_help_and_mistakes_import_nothing_heavy(arguments, says):
    found, text = imported(command(*arguments))
    assert found == [] and says in text, text


def test_a_wrong_key_imports_nothing_heavy(tmp_path):
    (tmp_path / "run.yaml").write_text("output: o\ndata: {path: d, train: [a]}\nmodel: {hed: point}\n")
    found, text = imported(command("run", "--config", str(tmp_path / "run.yaml")))
    assert found == [] and "model.hed" in text and "there is no such key" in text, text


def test_names_are_checked_before_anything_is_loaded(tmp_path, tiny_slide):
    found, text = imported(command("features", str(tiny_slide), "--sample", "x", "--output", str(tmp_path / "o")))
    assert found == [] and "there is no sample 'x'" in text and "which has tiny" in text, text
    (tmp_path / "config.yaml").write_text("output: o\ndata: {path: d, train: [a], test: [b]}\n")
    found, text = imported(command("sample", str(tmp_path)))
    assert found == [] and "holds no trained model; run hinge train first" in text, text


STOPPED = """
import os, signal, sys
# a shell's background job, such as a CI runner, inherits SIGINT as ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
class Stop:
    def find_spec(name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Stop)
sys.argv = ["hinge", "features", {slide!r}, "--output", "o"]
import hinge.cli
hinge.cli.main()
"""


@pytest.mark.parametrize(
    "name, number",
    [
        ("hinge.cli.app", signal.SIGINT),
        ("typer", signal.SIGTERM),
        ("hinge.data.readers", signal.SIGTERM),
        ("hinge.data.readers", signal.SIGINT),
    ],
)
def test_a_signal_during_imports_prints_no_traceback(name, number, tiny_slide, tmp_path):
    script = STOPPED.format(name=name, number=int(number), slide=str(tiny_slide))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode in (-number, 128 + number)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slides"]


def test_reading_a_run_needs_no_model():
    assert imported("from hinge.run.run import Run")[0] == []


@pytest.mark.full
def test_evaluation_imports_no_torch(copied_tiny_run):
    """It takes seconds and half a gigabyte."""
    shutil.rmtree(copied_tiny_run.folder / "baselines")
    found, text = imported(command("evaluate", str(copied_tiny_run.folder)))
    assert "scores:" in text and not {"torch", "diffusers", "transformers"} & set(found), text
