"""The command line: `hinge`, and `python -m hinge.cli` for launchers."""

from hinge.cli.app import main

__all__ = ["main"]
