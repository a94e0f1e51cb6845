"""The data of one slide in the report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from hinge.data import Panel, load_spots, slide_name
from hinge.evaluation import prediction_from_draws
from hinge.utils.errors import DataError


@dataclass
class ReportSlide:
    """The data of one slide in the report.

    Parameters
    ----------
    name
        Shown above the figures and in the slide menu.
    image
        Histology image (h, w, 3), uint8, at most about 2,000 px on its long side.
    image_scale
        Pixels of `image` per full-resolution pixel.
    coords
        Spot centres (n, 2) as x, y in full-resolution pixels.
    spot_diameter_px
        Diameter of a spot in full-resolution pixels.
    genes
        The panel's G gene names.
    measured
        Measured values (n, G) in transform units.
    draws
        Draws (K, n, G) in transform units; K may be 0 (the measured slide alone is shown) or 1 (no spread).
    transform
        Name of the transform, as the page prints it.
    barcodes
        Name of each spot (n,); numbers if not given.
    mean
        Predicted mean (n, G), the value that is scored; the mean of the draws if not given.
    comparison
        Comparison of two regions to show: `first` and `second` (name, spots, mm²) and `table`, the result of
        `hinge.tasks.regions.compare_regions`; None for none.
    """

    name: str
    image: NDArray[np.uint8]
    image_scale: float
    coords: NDArray[np.floating]
    spot_diameter_px: float
    genes: list[str]
    measured: NDArray[np.float32]
    draws: NDArray[np.float32]
    transform: str
    barcodes: list[str] | None = None
    mean: NDArray[np.float32] | None = None
    comparison: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        n, n_genes = len(self.coords), len(self.genes)
        expected = {"coords": (n, 2), "measured": (n, n_genes), "draws": (len(self.draws), n, n_genes)}
        if self.mean is not None:
            expected["mean"] = (n, n_genes)
        for field, shape in expected.items():
            found = np.shape(getattr(self, field))
            if found != shape:
                raise DataError(f"slide {self.name}: {field} has shape {found}, the report needs {shape}")
            if not np.isfinite(getattr(self, field)).all():
                raise DataError(f"slide {self.name}: {field} holds values that are not finite")
        if not n or not n_genes:
            raise DataError(f"slide {self.name} has {n} spots and {n_genes} genes, the report needs one of each")
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8:
            raise DataError(
                f"slide {self.name}: the image is {self.image.dtype} {self.image.shape}, "
                "the report needs uint8 (h, w, 3)"
            )
        if not (self.image_scale > 0 and self.spot_diameter_px > 0):
            raise DataError(f"slide {self.name}: image scale and spot diameter must be positive")
        if self.barcodes is not None and len(self.barcodes) != n:
            raise DataError(f"slide {self.name}: {len(self.barcodes)} barcodes for {n} spots")


def report_slide(draws: AnnData, slide: AnnData, shares: Mapping[str, float] | None = None) -> ReportSlide:
    """Return the data that the report shows of one slide, of the genes that were drawn and measured.

    Parameters
    ----------
    draws
        Result of sampling, as `hinge.evaluation.prediction_from_draws` takes it, with the slide's image in
        `uns["spatial"]`.
    slide
        The measured slide, with raw counts of at least the draws' spots and one of their genes.
    shares
        For the library sizes, see `hinge.data.library_sizes`.

    Raises
    ------
    DataError
        If the draws are of another slide, of spots that the slide lacks or of other genes, or hold no image.
    """
    name, transform = slide_name(slide), draws.uns.get("hinge", {}).get("transform")
    if transform is None:
        raise DataError(f"the draws for slide {name} lack uns['hinge']['transform'], which sampling writes")
    panel = Panel(genes=list(draws.var_names), method="list", shares=dict(shares or {}))
    spots = load_spots(slide, panel, transform, drop_empty=False, lacking="drop")
    rows = pd.Index(spots.barcodes).get_indexer(draws.obs_names)
    if (rows < 0).any():
        missing = draws.obs_names[rows < 0]
        raise DataError(f"slide {name} lacks {len(missing)} of the draws' spots: {', '.join(missing[:5])}")
    spots = spots.subset(rows)
    prediction = prediction_from_draws(draws, spots)
    library: dict[str, Any] = next(iter(draws.uns.get("spatial", {}).values()), {})
    size = next((size for size in ("hires", "lowres") if size in library.get("images", {})), None)
    if size is None:
        raise DataError(f"the draws of slide {name} hold no image in uns['spatial']")
    scales = library["scalefactors"]
    return ReportSlide(
        name=name,
        image=np.asarray(library["images"][size]),
        image_scale=float(scales[f"tissue_{size}_scalef"]),
        coords=spots.coords,
        spot_diameter_px=float(scales["spot_diameter_fullres"]),
        genes=spots.genes,
        measured=spots.values,
        draws=np.zeros((0, *spots.values.shape)) if prediction.draws is None else prediction.draws,
        transform=transform,
        barcodes=spots.barcodes.tolist(),
        mean=prediction.mean,
    )
