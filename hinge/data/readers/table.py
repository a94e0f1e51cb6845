"""Read a table of slides: one row per slide, with the paths of its files in any format.

    slide,image,counts,sample,um_per_px,patient,split,condition
    P1_A,scans/P1_A.svs,visium/P1_A,,,P1,train,tumour
    P2_A,scans/P2_A.svs,,,0.25,P2,test,tumour

`slide` is needed, and `image` or `counts`; further columns are the slide's `uns["hinge"]["metadata"]`. Fields are
separated by commas, semicolons or tabs, and capitals in the first line do not matter. Paths are relative to the table.
`sample` names the slide within `counts`, where there are several; a slide without counts can be sampled. `patient` and
`condition` go into `uns["hinge"]`; a run (`data.path`) reads `split`.
"""

import csv
from pathlib import Path
from typing import Any

from anndata import AnnData

from hinge.utils.errors import DataError

LAYOUT = "a .csv table with the columns slide, image and counts"
COLUMNS = ("slide", "image", "counts", "sample", "um_per_px", "patient", "split", "condition")
_MOST_BYTES = 20 << 20


def recognises(path: Path) -> bool:
    """Return whether a path has this layout."""
    if path.suffix.lower() not in (".csv", ".tsv") or not path.is_file():
        return False
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            line = file.readline(10_000)
        head = _names(next(csv.reader([line], delimiter=_delimiter(line)), []))
    except (OSError, UnicodeDecodeError, csv.Error):
        return False
    return "slide" in head and bool({"image", "counts"} & set(head))


def _delimiter(line: str) -> str:
    """Return what separates the fields of a first line."""
    return max(",;\t", key=line.count)


def _names(head: list[str]) -> list[str]:
    return [name.strip().lower() for name in head]


def read_table(path: str | Path) -> dict[str, dict[str, str]]:
    """Return the rows of a table by the name of their slide, with all `COLUMNS` and others; "" for an empty field.

    Raises
    ------
    DataError
        The table is missing or damaged, a column occurs twice, or a slide has no name, a name that is not a file name,
        the name of another slide, or neither image nor counts.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path} is too large to be a table of slides")
        with open(path, encoding="utf-8-sig", newline="") as file:
            delimiter = _delimiter(file.readline())
            file.seek(0)
            reader = csv.DictReader(file, strict=True, delimiter=delimiter)
            reader.fieldnames = head = _names(list(reader.fieldnames or []))
            rows = list(reader)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a readable table: {error}") from error
    known = [column for column in head if column in COLUMNS]
    if "slide" not in known or len(set(known)) < len(known):
        raise DataError(f"{path} has no column slide, or a column twice; a table of slides has {', '.join(COLUMNS)}")
    found: dict[str, dict[str, str]] = {}
    for line, row in enumerate(rows, 2):
        if None in row:
            raise DataError(f"{path}, line {line}: more fields than columns")
        fields = {column: (row.get(column) or "").strip() for column in (*COLUMNS, *filter(None, head))}
        name = fields["slide"]
        if not any(fields.values()):
            continue
        if not name or name.startswith(".") or set(name) & set('/\\\0\n\r:*?"<>|'):
            raise DataError(
                f"{path}, line {line}: {name!r} cannot be the name of a slide, because it is not a valid file name"
            )
        if name in found:
            raise DataError(f"{path}, line {line}: slide {name} occurs twice")
        if not fields["image"] and not fields["counts"]:
            raise DataError(f"{path}, line {line}: slide {name} has neither image nor counts")
        found[name] = fields
    if not found:
        raise DataError(f"{path} has no slides")
    return found


def list_samples(path: Path) -> list[str]:
    """Names of the slides."""
    return sorted(read_table(path))


def split_table(path: str | Path) -> dict[str, list[str]]:
    """Names of the slides by what stands in `split`, in the table's order.

    Raises
    ------
    DataError
        A slide's split is none of train, test and pretrain, nor empty.
    """
    splits: dict[str, list[str]] = {"train": [], "test": [], "pretrain": []}
    for name, fields in read_table(path).items():
        split = fields["split"].lower()
        if split not in (*splits, ""):
            raise DataError(f"{path}: the split of slide {name} is {fields['split']!r}, not train, test or pretrain")
        if split:
            splits[split].append(name)
    return splits


def images_alone(path: str | Path) -> set[str]:
    """Names of the slides without counts."""
    return {name for name, fields in read_table(path).items() if not fields["counts"]}


def read(
    path: Path, sample: str, *, image: Path | None, um_per_px: float | None, require_image: bool, **grid: float
) -> AnnData:
    """Read one slide from where the table says it is; `grid` is for slides without counts."""
    from hinge.data.readers import build_slide, image_only, recognise_format
    from hinge.data.readers import list_samples as list_others

    fields = read_table(path)[sample]
    if um_per_px is None and fields["um_per_px"]:
        try:
            um_per_px = float(fields["um_per_px"])
        except ValueError as error:
            raise DataError(f"{path}: um_per_px of slide {sample} is {fields['um_per_px']!r}, not a number") from error
    if image is None and fields["image"]:
        image = path.parent / fields["image"]
        if not image.exists() and (require_image or not fields["counts"]):
            raise DataError(f"{path}: there is no image {image} of slide {sample}")
    if image is not None and not image.exists():
        image = None
    if not fields["counts"]:
        slide = image_only.read(image, sample, image=image, um_per_px=um_per_px, require_image=True, **grid)
    else:
        counts = path.parent / fields["counts"]
        if not counts.exists():
            raise DataError(f"{path}: there are no counts {counts} of slide {sample}")
        if recognise_format(counts) == "table":
            raise DataError(f"{path}: the counts of slide {sample} are another table of slides")
        others = list_others(counts)
        inside = fields["sample"] or (sample if sample in others and len(others) > 1 else None)
        slide = build_slide(counts, inside, image=image, um_per_px=um_per_px, require_image=require_image)
    further = {column: field for column, field in fields.items() if column not in COLUMNS and field}
    facts: dict[str, Any] = {key: fields[key] for key in ("patient", "condition") if fields[key]}
    return _renamed(slide, sample, facts | ({"metadata": further} if further else {}))


def _renamed(slide: AnnData, name: str, facts: dict[str, Any]) -> AnnData:
    """Return the slide with its name and metadata of the table; changed in place."""
    library = next(iter(slide.uns.get("spatial", {}).values()), None)
    if library is not None:
        slide.uns["spatial"] = {name: library}
    slide.uns["hinge"] = {**slide.uns["hinge"], "name": name, **facts}
    return slide
