"""The part of `hinge check` that compares the files of a run with their checksums."""

from pathlib import Path

import typer


def check_run(folder: Path, accept: bool) -> None:
    """Print which files of a run were changed, and exit with code 2 if any; with `accept`, note them as they are."""
    from hinge.utils import checksums

    if accept:
        print(f"{folder}: {checksums.accept(folder)} files are accepted as they are")
        return
    from hinge.run.integrity import verify_run

    found = verify_run(folder)
    for fault in found.faults:
        print(f"  error: {fault}")
    for what, names in (("missing", found.missing), ("without a checksum", found.unknown)):
        if names:
            print(f"  {what}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")
    print(f"{folder}: {found.right} files are as they were written, {len(found.faults)} were changed or damaged")
    if found.faults:
        raise typer.Exit(2)
