"""Gene-gene correlations of draws, beside those of the measured slide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from hinge.data import Panel, load_spots, slide_name
from hinge.data.layers import draw_names
from hinge.evaluation import correlation_matrix, matrix_scores
from hinge.evaluation.metrics.coexpression import gene_order
from hinge.utils.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LABELS = 60  # genes whose names fit beside a matrix


def coexpression(
    draws: AnnData,
    *,
    measured: AnnData | None = None,
    genes: Sequence[str] | None = None,
    cmap: str = "RdBu_r",
    size: float = 4.5,
    show: bool = False,
) -> Figure:
    """Return the gene-gene correlations over the spots: the mean over the draws, and the measured ones.

    Parameters
    ----------
    draws
        Result of sampling.
    measured
        The measured slide with raw counts; None to show the draws alone.
    genes
        At least 2 genes of the draws; None for all.
    cmap
        Colour map from -1 to 1.
    size
        Width of a matrix in inches.
    show
        Whether to open the figure in a window; a notebook shows what the call returns.

    Returns
    -------
    matplotlib.figure.Figure
        One matrix, or two in the same order of genes: that of a hierarchical clustering of the first. The title of the
        draws' matrix holds the mean over the draws of the correlation with the measured matrix.

    Raises
    ------
    DataError
        A gene is missing, or there are no draws.
    """
    import matplotlib.pyplot as plt

    names, layers = list(draws.var_names if genes is None else genes), draw_names(draws)
    columns = draws.var_names.get_indexer(names)
    if (columns < 0).any():
        raise DataError(f"the draws of {slide_name(draws)} lack {names[int(np.flatnonzero(columns < 0)[0])]}")
    if len(names) < 2 or not layers:
        raise DataError(f"co-expression needs draws and at least 2 genes, not {len(layers)} and {len(names)}")
    each = [correlation_matrix(np.asarray(draws.layers[layer])[:, columns]) for layer in layers]
    known = np.isfinite(each).sum(axis=0)
    mean = np.where(known, np.nansum(each, axis=0) / np.maximum(known, 1), np.nan)
    matrices: dict[str, NDArray] = {f"draws (mean of {len(layers)})": mean}
    if measured is not None:
        spots = load_spots(measured, Panel.from_list(names), draws.uns["hinge"]["transform"], drop_empty=False)
        rows = np.isin(spots.barcodes, draws.obs_names)
        truth = correlation_matrix(spots.values[rows])
        r = np.nanmean([matrix_scores(truth, matrix)["r"] for matrix in each])
        matrices = {"measured": truth, f"draws (mean of {len(layers)}), r = {r:.2f}": mean}
    order = gene_order(next(iter(matrices.values())))
    figure, axes = plt.subplots(
        1, len(matrices), figsize=(size * len(matrices) + 0.8, size), layout="constrained", squeeze=False
    )
    for ax, (title, matrix) in zip(axes[0], matrices.items(), strict=True):
        shown = ax.imshow(matrix[np.ix_(order, order)], cmap=cmap, vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(title)
        if len(names) <= _MOST_LABELS:
            labels = [names[index] for index in order]
            font = min(8.0, 60 * size / len(names))
            ax.set_xticks(range(len(names)), labels, rotation=90, fontsize=font)
            ax.set_yticks(range(len(names)), labels, fontsize=font)
        else:
            ax.set(xticks=[], yticks=[], xlabel=f"{len(names)} genes")
    figure.colorbar(shown, ax=axes[0].tolist(), shrink=0.8, label="Pearson correlation over spots")
    figure.suptitle(f"Co-expression, slide {slide_name(draws)}")
    if show:
        plt.show()
    plt.close(figure)  # pyplot would show it a second time in a notebook
    return figure
