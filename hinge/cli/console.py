"""Tables on the console."""

from pathlib import Path


def print_scores(path: Path) -> None:
    """Print a file of scores, one line a method."""
    from hinge.evaluation.tables import scores_table
    from hinge.utils.files import read_json

    console = wide_console()
    scores = read_json(path)
    console.print(scores_table(scores["rows"], scores["attained"]))
    print(f"scores: {path}")


def print_rows(path: Path) -> None:
    """Print the rows of a file of scores as a table."""
    from rich.table import Table

    from hinge.utils.files import read_json

    console = wide_console()
    rows = read_json(path)["rows"]
    table = Table(*(str(key) for key in rows[0]))
    for row in rows:
        cells = ("–" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    console.print(table)
    print(f"scores: {path}")


def wide_console():
    """Return a console; in a pipe, which has no width, one with room for wide tables."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=240)
