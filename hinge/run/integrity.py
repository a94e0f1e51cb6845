"""Whether the files of a run are what its stages wrote."""

from dataclasses import dataclass
from pathlib import Path

from hinge.data.spot_store import STORE_NAME, damaged_slides
from hinge.utils import checksums
from hinge.utils.errors import DataError


@dataclass(frozen=True)
class Verification:
    """Result of `verify_run`.

    Attributes
    ----------
    faults
        A sentence for each file that was changed or damaged.
    missing, unknown
        Files that have a checksum and are not there, and those that are there and have none.
    right
        Number of files that are as they were written.
    """

    faults: list[str]
    missing: list[str]
    unknown: list[str]
    right: int


def verify_run(folder: str | Path) -> Verification:
    """Compare all files of a run with their checksums; a run of an earlier version has none."""
    folder, right = Path(folder), 0
    try:
        faults, missing, right = checksums.differences(folder)
        known = set(checksums.names(folder))
    except DataError as error:
        faults, missing, known = [str(error)], [], set()
    for store in sorted(folder.glob(f"training/{STORE_NAME}")):
        damaged, whole = damaged_slides(store)
        faults, right = [*faults, *damaged], right + whole
    unknown = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if path.suffix == ".safetensors" and not checksums.is_recorded(name):
            from hinge.training.checkpoints import read_tensors  # imports torch

            try:
                read_tensors(path)
                right += 1
            except DataError as error:
                faults.append(str(error))
        elif checksums.is_recorded(name) and not known & {name.as_posix(), *map(str, name.parents)}:
            unknown.append(name.as_posix())
    return Verification(faults, missing, unknown, right)
