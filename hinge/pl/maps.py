"""Maps of one gene: measured values, mean, standard deviation and single draws over the H&E image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from hinge.data import get_transform, slide_name
from hinge.data.layers import draw_names
from hinge.utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LENGTHS_UM = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_TITLES = {"measured": "measured", "mean": "mean of the draws", "std": "standard deviation"}


def gene(
    draws: AnnData,
    name: str,
    *,
    measured: AnnData | None = None,
    layers: Sequence[str] | None = None,
    cmap: str = "YlGn",
    cmap_std: str = "YlOrBr",
    percentiles: tuple[float, float] = (1.0, 99.0),
    image: bool = True,
    size: float = 3.6,
    show: bool = False,
) -> Figure:
    """Return maps of one gene over the H&E image.

    Measured values, mean and draws share one range, so that their colours can be compared.

    Parameters
    ----------
    draws
        Result of sampling.
    name
        Symbol of a gene of the draws.
    measured
        The measured slide with raw counts; its values are the first map.
    layers
        Maps to draw: `measured`, `mean`, `std`, `draw_000`, …; None for measured (if given), mean, std and the first
        draw.
    cmap, cmap_std
        Colour maps of expression and of the standard deviation.
    percentiles
        Percentiles of the values at which the colours end.
    image
        Whether to draw the image behind the spots.
    size
        Width of a map in inches.
    show
        Whether to open the figure in a window; a notebook shows what the call returns.

    Returns
    -------
    matplotlib.figure.Figure
        One map for each layer, with a colour bar in units of the transform and a scale bar.

    Raises
    ------
    DataError
        The draws, or the measured slide, lack the gene or a layer.
    """
    import matplotlib.pyplot as plt

    values = _values(draws, name, measured, layers)
    shared = np.concatenate([array for key, array in values.items() if key != "std"] or [np.zeros(1)])
    low, high = np.nanpercentile(shared, percentiles)
    tissue, scale = _image(draws) if image else (None, 1.0)
    places = np.asarray(draws.obsm["spatial"], dtype=np.float64)
    around = _frame(places, _diameter(draws, places))
    aspect = (around[3] - around[2]) / (around[1] - around[0])
    figure, axes = plt.subplots(
        1, len(values), figsize=(size * len(values), size * aspect + 0.8), layout="constrained", squeeze=False
    )
    for number, (ax, (layer, colours)) in enumerate(zip(axes[0], values.items(), strict=True)):
        if tissue is not None:
            height, width = tissue.shape[:2]
            ax.imshow(tissue, extent=(0, width / scale, height / scale, 0), interpolation="bilinear")
        limits = (0.0, float(np.nanpercentile(colours, percentiles[1]))) if layer == "std" else (low, high)
        spots = _spots(ax, places, _diameter(draws, places), colours, cmap_std if layer == "std" else cmap, limits)
        ax.set(xlim=around[:2], ylim=(around[3], around[2]), xticks=[], yticks=[], aspect="equal")
        ax.set_title(_TITLES.get(layer, f"draw {layer.removeprefix('draw_').lstrip('0') or '0'}"))
        figure.colorbar(spots, ax=ax, shrink=0.8, label=_unit(draws), extend="both")
        if number == 0:
            _scale_bar(ax, draws, around)
    figure.suptitle(f"{name}, slide {slide_name(draws)}")
    if show:
        plt.show()
    plt.close(figure)  # pyplot would show it a second time in a notebook
    return figure


def _values(
    draws: AnnData, name: str, measured: AnnData | None, layers: Sequence[str] | None
) -> dict[str, NDArray[np.float64]]:
    """Return layer → values of a gene (n,)."""
    if name not in draws.var_names:
        raise DataError(
            f"the draws of {slide_name(draws)} lack the gene {name!r}; hinge sample --genes draws genes outside the "
            "panel that the backbone knows"
        )
    column, drawn = draws.var_names.get_loc(name), draw_names(draws)
    wanted = list(layers or [*(["measured"] if measured is not None else []), "mean", "std", *drawn[:1]])
    found = {}
    for layer in wanted:
        if layer == "measured" and measured is not None:
            found[layer] = _measured(draws, name, measured)
        elif layer == "mean":
            found[layer] = np.asarray(draws.layers.get("expected", draws.X)[:, column], dtype=np.float64)
        elif layer == "std" or layer in drawn:
            found[layer] = np.asarray(draws.layers[layer][:, column], dtype=np.float64)
        else:
            known = ", ".join(["mean", "std", *drawn[:2]])
            raise ConfigError(
                f"there is no layer {layer!r}; choose of {known}, …, or give measured=slide for 'measured'"
            )
    return found


def _measured(draws: AnnData, name: str, measured: AnnData) -> NDArray[np.float64]:
    if name not in measured.var_names:
        raise DataError(f"slide {slide_name(measured)} does not measure the gene {name!r}; leave measured= out")
    rows = measured.obs_names.get_indexer(draws.obs_names)
    total = np.asarray(measured.X.sum(axis=1, dtype=np.float64)).ravel()
    counts = measured[:, name].X
    counts = np.asarray(counts.toarray() if hasattr(counts, "toarray") else counts, dtype=np.float64)
    values = np.asarray(get_transform(draws.uns["hinge"]["transform"]).forward(counts, total), dtype=np.float64)[:, 0]
    return np.where(rows >= 0, values[rows], np.nan)


def _unit(draws: AnnData) -> str:
    return str(draws.uns["hinge"].get("transform", "expression"))


def _image(draws: AnnData) -> tuple[NDArray | None, float]:
    """Return the image in the draws and its pixels per full-resolution pixel."""
    library: dict[str, Any] = next(iter(draws.uns.get("spatial", {}).values()), {})
    for size in ("hires", "lowres"):
        if size in library.get("images", {}):
            return np.asarray(library["images"][size]), float(library["scalefactors"][f"tissue_{size}_scalef"])
    return None, 1.0


def _diameter(draws: AnnData, places: NDArray) -> float:
    """Return the diameter of a spot in full-resolution pixels."""
    library: dict[str, Any] = next(iter(draws.uns.get("spatial", {}).values()), {})
    facts = draws.uns["hinge"]
    known = library.get("scalefactors", {}).get("spot_diameter_fullres")
    diameter = float(known or facts.get("spot_diameter_um", math.nan) / facts.get("um_per_px", math.nan))
    if math.isfinite(diameter) and diameter > 0:
        return diameter
    return 0.6 * math.sqrt(max(float(np.prod(np.maximum(np.ptp(places, axis=0), 1))), 1) / len(places))


def _frame(places: NDArray, diameter: float) -> tuple[float, float, float, float]:
    """Return left, right, top and bottom of the part of the slide around the spots."""
    margin = 1.5 * diameter + 0.02 * float(np.ptp(places, axis=0).max())
    (left, top), (right, bottom) = places.min(axis=0) - margin, places.max(axis=0) + margin
    return float(left), float(right), float(top), float(bottom)


def _spots(ax: Axes, places: NDArray, diameter: float, values: NDArray, cmap: str, limits: tuple[float, float]) -> Any:
    """Draw the spots at their size on the slide; spots without a value are empty."""
    from matplotlib.collections import EllipseCollection

    sides = np.full(len(places), diameter)
    spots = EllipseCollection(
        sides,
        sides,
        np.zeros(len(places)),
        units="xy",
        offsets=places,
        offset_transform=ax.transData,
        cmap=cmap,
        edgecolors=(0.1, 0.1, 0.1, 0.6),
        linewidths=0.3,
        rasterized=len(places) > 5000,
    )
    spots.set_array(np.ma.masked_invalid(values))
    spots.set_clim(limits[0], limits[1] if limits[1] > limits[0] else limits[0] + 1)
    ax.add_collection(spots)
    return spots


def _scale_bar(ax: Axes, draws: AnnData, around: tuple[float, float, float, float]) -> None:
    um_per_px = float(draws.uns["hinge"].get("um_per_px", math.nan))
    if not (math.isfinite(um_per_px) and um_per_px > 0):
        return
    left, right, _, bottom = around
    width = (right - left) * um_per_px
    length = max((um for um in _LENGTHS_UM if um <= width / 4), default=_LENGTHS_UM[0])
    start, end = left + 0.04 * (right - left), left + 0.04 * (right - left) + length / um_per_px
    y = bottom - 0.05 * (right - left)
    ax.plot([start, end], [y, y], color="black", linewidth=2, solid_capstyle="butt")
    label = f"{length // 1000} mm" if length >= 1000 else f"{length} µm"
    ax.text((start + end) / 2, y - 0.01 * (right - left), label, ha="center", va="bottom", fontsize=8)
