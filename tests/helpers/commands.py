"""The command line in the process of the tests."""

import contextlib
import io
import logging
import signal
import sys
import warnings
from typing import NamedTuple

import pytest

HIDDEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


class Called(NamedTuple):
    """What a command left: its exit code and its text on both streams."""

    code: int
    out: str
    err: str


def call_hinge(*arguments) -> Called:
    """Run `hinge ARGUMENTS…` in this process, as in one of its own: log lines and warnings go to stderr."""
    from hinge.cli import main

    out, err = io.StringIO(), io.StringIO()
    level, handler = logging.getLogger("hinge").level, signal.getsignal(signal.SIGTERM)
    # main switches these bars off through the environment, which transformers reads when it is imported
    bars = getattr(sys.modules.get("transformers.utils"), "logging", None)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("default")
        for hidden in HIDDEN:
            warnings.simplefilter("ignore", hidden)
        patch.setattr(logging.root, "handlers", [])
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        patch.setattr(sys, "argv", ["hinge", *map(str, arguments)])
        if bars is not None:
            bars.disable_progress_bar()
        try:
            with pytest.raises(SystemExit) as stopped:
                main()
        finally:
            logging.getLogger("hinge").setLevel(level)
            signal.signal(signal.SIGTERM, handler)
            if bars is not None:
                bars.enable_progress_bar()
    said = err.getvalue() + "".join(f"{warning.message}\n" for warning in caught)
    return Called(stopped.value.code or 0, out.getvalue(), said)
