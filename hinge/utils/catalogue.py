"""The catalogue of the files of many slides: `catalogue.parquet`, one row a file, or a folder such as a Zarr store.

Columns: `slide`, `path` (relative to the folder of the catalogue, where it is inside), `bytes`, `modified` (ns),
`sha256` and `version` of hinge. For a folder they are the sum, the latest, and the digest of
`hinge.utils.checksums.content_digest`. What has not changed since is not read again for its checksum.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from hinge.utils.checksums import content_digest
from hinge.utils.errors import DataError
from hinge.utils.files import atomic_path
from hinge.utils.packages import VERSION, require

NAME = "catalogue.parquet"


@dataclass(frozen=True)
class Entry:
    """A row of the catalogue."""

    slide: str
    path: str
    bytes: int
    modified: int
    sha256: str
    version: str


class Catalogue:
    """The catalogue in a folder.

    Parameters
    ----------
    folder
        Where it lies; it may not exist yet.

    Raises
    ------
    ConfigError
        pyarrow is missing.
    DataError
        The catalogue is damaged.
    """

    def __init__(self, folder: Path):
        require("pyarrow", "ray", "the catalogue of --ray")
        import pandas as pd

        self.path = folder / NAME
        self.entries: dict[str, Entry] = {}
        if self.path.exists():
            try:
                rows = pd.read_parquet(self.path).to_dict("records")
                self.entries = {row["path"]: Entry(**row) for row in rows}
            except Exception as error:  # pyarrow has many errors
                raise DataError(f"{self.path} is not a readable catalogue: delete it for a new one") from error

    def noting(self, open_worker: Callable[[], Callable[[str], list[Path]]]) -> Callable:
        """Return a function that opens a worker whose work returns the entries of the files that it wrote."""
        return partial(_open_noting, open_worker, self.path.parent.absolute(), dict(self.entries))

    def add(self, entries: list[Entry]) -> list[Path]:
        """Note the files of a slide; return their paths."""
        self.entries |= {entry.path: entry for entry in entries}
        return [self.path.parent / entry.path for entry in entries]

    def write(self) -> None:
        """Write the catalogue, sorted by slide and path."""
        import pandas as pd

        if self.entries:
            rows = sorted(self.entries.values(), key=lambda entry: (entry.slide, entry.path))
            with atomic_path(self.path) as temporary:
                pd.DataFrame([asdict(entry) for entry in rows]).to_parquet(temporary, index=False)


def _open_noting(
    open_worker: Callable[[], Callable[[str], list[Path]]], folder: Path, known: Mapping[str, Entry]
) -> Callable[[str], list[Entry]]:
    work = open_worker()
    return lambda slide: [_entry(slide, path.absolute(), folder, known) for path in work(slide)]


def _entry(slide: str, path: Path, folder: Path, known: Mapping[str, Entry]) -> Entry:
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
    inside = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    facts, before = [os.stat(each) for each in inside], known.get(name)
    size, modified = sum(each.st_size for each in facts), max(each.st_mtime_ns for each in facts)
    if before is not None and (before.bytes, before.modified) == (size, modified):
        return before
    return Entry(slide, name, size, modified, content_digest(path), VERSION)
