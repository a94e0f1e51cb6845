"""What the viewer serves on regions: labels of the spots, saved regions, a region's table, comparisons of two regions.

    slides/<i>/labels.json                                       columns of labels, regions saved with the run
    slides/<i>/region.json, region.csv    ?spots=S&threshold=T   table of a region
    slides/<i>/compare.json, compare.csv  ?first=S&second=S&threshold=T

A set of spots S is a bit for each spot (lowest bit first), deflated, as URL-safe base64 without padding. The numbers
are those of `hinge.tasks.regions`, without rounding.
"""

import base64
import binascii
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from hinge.data.regions import Region
from hinge.tasks.regions import compare_regions, region_table
from hinge.utils.errors import DataError

MOST_LABELS = 60  # of a column that is offered

TABLES = ("region.json", "region.csv", "compare.json", "compare.csv")


def labels(measured: AnnData | None, draws: AnnData, saved: Mapping[str, Region], scale: float) -> dict[str, Any]:
    """Return the content of `labels.json`.

    Parameters
    ----------
    measured
        The measured slide, whose columns of labels are offered; None for none.
    draws
        The draws, whose spots the labels are given for.
    saved
        Regions saved with the run.
    scale
        Pixels of the shown image per full-resolution pixel.

    Returns
    -------
    dict
        `columns`: name, labels, and the index of each spot's label (-1 for none); `regions`: name, spots (as in the
        requests) and polygons in pixels of the shown image.
    """
    columns: list[dict[str, Any]] = []
    for slide in (draws, measured):
        if slide is None:
            continue
        for name, column in slide.obs.items():
            if pd.api.types.is_float_dtype(column) or name in {known["name"] for known in columns}:
                continue
            codes, found = pd.factorize(column.astype(object).where(column.isna(), column.astype(str)), sort=True)
            if 1 < len(found) <= MOST_LABELS:
                rows = slide.obs_names.get_indexer(draws.obs_names)
                of_spots = np.where(rows >= 0, codes[rows], -1)
                columns.append({"name": str(name), "labels": list(map(str, found)), "codes": of_spots.tolist()})
    regions = [
        {
            "name": region.name,
            "spots": encode_spots(region.spots),
            "polygons": [[np.round(ring * scale, 2).tolist() for ring in polygon] for polygon in region.polygons],
        }
        for region in saved.values()
    ]
    return {"columns": columns, "regions": regions}


def table(
    path: str, query: Mapping[str, str], draws: AnnData, measured: AnnData | None, spot_mm2: float
) -> dict[str, Any] | str:
    """Return the content of one of `TABLES`: columns and areas, or text of CSV.

    Parameters
    ----------
    path, query
        The request.
    draws, measured
        The slide, as in `compare_regions`.
    spot_mm2
        `region_area` of one spot, which takes seconds for 100,000 spots.

    Raises
    ------
    DataError
        A set of spots or the threshold is missing or damaged, or a region holds no spot.
    """
    threshold = None
    if query.get("threshold"):
        try:
            threshold = float(query["threshold"])
        except ValueError:
            threshold = math.nan
        if not math.isfinite(threshold):
            raise DataError(f"the threshold must be a number, not {query['threshold'][:40]!r}")
    names = ("spots",) if path.startswith("region") else ("first", "second")
    sets = [decode_spots(query.get(name, ""), draws.n_obs) for name in names]
    if len(sets) == 1:
        found = region_table(draws, sets[0], measured, threshold)
    else:
        found = compare_regions(draws, sets[0], sets[1], measured, threshold)
    found.index.name = "gene"
    if path.endswith(".csv"):
        return found.to_csv()
    numbers = found.to_dict("list")
    columns = {name: [value if math.isfinite(value) else None for value in values] for name, values in numbers.items()}
    counts = [int(spots.sum()) for spots in sets]
    return {
        "genes": found.index.tolist(),
        "columns": columns,
        "spots": counts,
        "mm2": [count * spot_mm2 if math.isfinite(spot_mm2) else None for count in counts],
    }


def encode_spots(spots: NDArray[np.bool_]) -> str:
    """Return a set of spots (n,) as text for a request."""
    packed = zlib.compress(np.packbits(spots, bitorder="little").tobytes())
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def decode_spots(text: str, n_spots: int) -> NDArray[np.bool_]:
    """Return the set of spots (n,) that `encode_spots` wrote.

    Raises
    ------
    DataError
        The text is no set of this number of spots.
    """
    size = (n_spots + 7) // 8
    try:
        packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        content = zlib.decompressobj().decompress(packed, size + 1)
    except (binascii.Error, ValueError, zlib.error):
        content = b""
    if len(content) != size:
        raise DataError(f"the request holds no set of {n_spots} spots")
    return np.unpackbits(np.frombuffer(content, np.uint8), count=n_spots, bitorder="little").astype(bool)
