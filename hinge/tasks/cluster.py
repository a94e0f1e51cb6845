"""Clusters of spots by their histology features, smoothed over the tissue."""

import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix, identity
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import kneighbors_graph

from hinge.encoders import load_encoder
from hinge.evaluation.metrics.spatial import neighbour_weights
from hinge.tasks.embeddings import embed
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path, write_json
from hinge.utils.packages import require

METHODS = ("kmeans", "leiden", "gmm")

COMPONENTS = 20
"""Maximum number of principal components that are clustered."""

NEIGHBOURS = 15
"""Neighbours of each spot in the graph of Leiden clustering."""

_MOST_LABELS = 50
_BISECTIONS = 20

DEFINITIONS = {
    "ari": "adjusted Rand index of clusters and labels over labelled spots: 0 by chance, 1 where they are the same",
    "nmi": "normalised mutual information of the same, by the arithmetic mean of the entropies",
}


def cluster_slides(
    slides: Mapping[str, AnnData],
    encoders: Sequence[str],
    output: Path,
    *,
    method: str = "kmeans",
    n_clusters: int | None = None,
    resolution: float = 1.0,
    smooth: int = 1,
    joint: bool = False,
    labels: Mapping[str, pd.Series] | None = None,
    features_folder: Path | None = None,
    patch_um: float | None = None,
    standardise: bool = True,
    batch_size: int = 64,
    seed: int = 0,
) -> Path:
    """Cluster the spots of slides by the features of encoders.

    Parameters
    ----------
    slides
        Slides by name.
    encoders
        Names for `load_encoder`.
    output
        Folder for `<slide>.h5ad` (clusters in `obs`, clustered components in `obsm`), `clusters.csv`, `features/`
        and `scores.json`. `hinge.report.report_clusters` writes the maps into it.
    method
        One of `METHODS`.
    n_clusters
        Number of clusters; None for the number of labels, or, for Leiden without labels, as the resolution gives.
    resolution
        Resolution of Leiden without a number of clusters.
    smooth
        How often each spot's features are replaced by the mean over it and its direct neighbours.
    joint
        Cluster all slides together, so that clusters are shared between slides.
    labels
        Labels of each slide's spots for the scores, NaN where unknown.
    features_folder
        Folder of the feature files; None for `features` in `output`.
    patch_um, standardise, batch_size
        See `hinge.tasks.embeddings.embed`.
    seed
        Seed of the starting points.

    Returns
    -------
    Path
        `scores.json`: for each encoder and slide the number of clusters and, with labels, ARI and NMI.

    Raises
    ------
    ConfigError
        The method is unknown, or the number of clusters is not given.
    """
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}")
    if method == "leiden":
        _igraph()
    if smooth < 0:
        raise ConfigError(f"features can be smoothed 0 times or more, not {smooth}")
    for name, series in (labels or {}).items():
        if series.nunique() > _MOST_LABELS:
            raise DataError(
                f"slide {name} has {series.nunique()} different labels; at most {_MOST_LABELS} can be compared"
            )
    groups = [list(slides)] if joint else [[name] for name in slides]
    wanted = [_number(names, method, n_clusters, labels) for names in groups]
    loaded = [load_encoder(name) for name in encoders]  # reports unknown names before features are extracted
    results = {name: _result(slide, labels, name) for name, slide in slides.items()}
    rows = []
    features_of = partial(
        embed,
        folder=features_folder or output / "features",
        patch_um=patch_um,
        standardise=standardise,
        batch_size=batch_size,
    )
    for encoder in loaded:
        features = {
            name: smooth_features(features_of(slide, encoder), np.asarray(slide.obsm["spatial"]), smooth)
            for name, slide in slides.items()
        }
        for names, number in zip(groups, wanted, strict=True):
            together = np.concatenate([features[name] for name in names])
            most = min(COMPONENTS, *together.shape)
            components = PCA(most, svd_solver="full").fit_transform(together)
            clusters = cluster(components, method, number, resolution, seed)
            ends = np.cumsum([len(features[name]) for name in names])[:-1]
            for name, part, place in zip(names, np.split(clusters, ends), np.split(components, ends), strict=True):
                results[name].obs[cluster_column(encoder.name)] = pd.Categorical(part.astype(str))
                results[name].obsm[f"X_{_key(encoder.name)}"] = place.astype(np.float32)
                row = {"encoder": encoder.name, "method": method, "slide": name, "clusters": len(np.unique(part))}
                rows.append(row | (agreement(part, labels[name]) if labels else {}))
        if labels and len(slides) > 1:
            own = [row for row in rows if row["encoder"] == encoder.name]
            means = {key: float(np.mean([row[key] for row in own])) for key in ("clusters", "ari", "nmi")}
            rows.append({"encoder": encoder.name, "method": method, "slide": "mean", **means})
    settings = {
        "method": method,
        "clusters": n_clusters,
        "resolution": resolution,
        "smooth": smooth,
        "joint": joint,
        "standardise": standardise,
        "seed": seed,
    }
    _write_clusters(results, settings, output)
    return write_json(output / "scores.json", {"definitions": DEFINITIONS, "settings": settings, "rows": rows})


def _write_clusters(results: Mapping[str, AnnData], settings: Mapping[str, Any], output: Path) -> None:
    """Write an h5ad for each slide, and one table of all spots."""
    for name, result in results.items():
        result.uns["hinge"] |= {f"cluster_{key}": value for key, value in settings.items() if value is not None}
        with atomic_path(output / f"{name}.h5ad") as temporary:
            result.write_h5ad(temporary, compression="gzip")
    with atomic_path(output / "clusters.csv") as temporary:
        tables = [
            result.obs.rename_axis("spot").reset_index().assign(slide=name, x=xy[:, 0], y=xy[:, 1])
            for name, result in results.items()
            for xy in [np.asarray(result.obsm["spatial"])]
        ]
        table = pd.concat(tables)
        first = ["slide", "spot", "x", "y"]
        table[[*first, *(column for column in table if column not in first)]].to_csv(temporary, index=False)


def cluster_column(encoder: str) -> str:
    """Return the column of `obs` that holds the clusters by an encoder's features."""
    return f"cluster {_key(encoder)}"


def _key(encoder: str) -> str:
    """Return an encoder's name without slashes, which keys of an h5ad file must not contain."""
    return encoder.replace("/", "_")


def smooth_features(features: np.ndarray, coords: np.ndarray, times: int) -> np.ndarray:
    """Replace each spot's features by the mean over it and its direct neighbours, several times.

    Neighbours are those of `hinge.evaluation.metrics.spatial.neighbour_weights`: four on a square lattice, six on a
    hexagonal one, the same as squidpy's spatial graph within 1.25 spot pitches.

    Parameters
    ----------
    features
        (n, d).
    coords
        (n, 2), in any unit.
    times
        0 for none.

    Returns
    -------
    numpy.ndarray
        (n, d) float32.
    """
    adjacency = (neighbour_weights(coords) > 0).astype(np.float64) + identity(len(coords))
    mean = csr_matrix(adjacency.multiply(1 / adjacency.sum(axis=1)))
    result = np.asarray(features, dtype=np.float64)
    for _ in range(times):
        result = mean @ result
    return result.astype(np.float32)


def cluster(components: np.ndarray, method: str, number: int | None, resolution: float, seed: int) -> np.ndarray:
    """Return the cluster of each spot, numbered by size from 0 for the largest.

    Parameters
    ----------
    components
        (n, d).
    method
        `kmeans`; `gmm`, a mixture of Gaussians of one covariance; `leiden`, modularity on the graph of nearest
        neighbours weighted by the share of neighbours they have in common.
    number
        Number of clusters; None for Leiden at a resolution. Leiden comes as close to it as the resolution allows.
    resolution
        Resolution of Leiden, if `number` is None.
    seed
        Seed of the starting points.

    Returns
    -------
    numpy.ndarray
        (n,) int.

    Raises
    ------
    DataError
        There are fewer spots than clusters.
    """
    if number is not None and number > len(components):
        raise DataError(f"{len(components)} spots cannot form {number} clusters")
    if method == "kmeans":
        found = KMeans(number, n_init=10, random_state=seed).fit_predict(components)
    elif method == "gmm":
        mixture = GaussianMixture(number, covariance_type="tied", n_init=5, reg_covar=1e-4, random_state=seed)
        found = mixture.fit_predict(components)
    else:
        found = _leiden(components, number, resolution, seed)
    kinds, sizes = np.unique(found, return_counts=True)
    rank = np.empty(len(kinds), dtype=int)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(kinds))
    return rank[np.searchsorted(kinds, found)]


def agreement(clusters: np.ndarray, labels: pd.Series) -> dict[str, float]:
    """Return ARI and NMI over the labelled spots, NaN if there are none."""
    known = labels.notna().to_numpy()
    if not known.any():
        return {"ari": float("nan"), "nmi": float("nan")}
    truth = labels[known].astype(str).to_numpy()
    return {
        "ari": float(adjusted_rand_score(truth, clusters[known])),
        "nmi": float(normalized_mutual_info_score(truth, clusters[known])),
    }


def _igraph():
    return require("igraph", "cluster", "Leiden clustering (kmeans and gmm do without it)")


def _leiden(components: np.ndarray, number: int | None, resolution: float, seed: int) -> np.ndarray:
    igraph = _igraph()
    near = kneighbors_graph(components, min(NEIGHBOURS, len(components) - 1), include_self=False)
    near = near + identity(len(components))  # a spot is among its own neighbours
    shared = (near @ near.T).multiply(near.maximum(near.T) > 0).tocoo()
    size = np.asarray(near.sum(axis=1)).ravel()
    upper = shared.row < shared.col
    row, column = shared.row[upper], shared.col[upper]
    weight = shared.data[upper] / (size[row] + size[column] - shared.data[upper])
    graph = igraph.Graph(n=len(components), edges=np.stack([row, column], axis=1).tolist())

    def divide(resolution: float) -> np.ndarray:
        # igraph draws from the random module: its own generator for this call, so that the result is one of the seed
        igraph.set_random_number_generator(random.Random(seed))
        try:
            parts = graph.community_leiden(
                objective_function="modularity", weights=weight.tolist(), resolution=resolution, n_iterations=10
            )
        finally:
            igraph.set_random_number_generator(random)
        return np.array(parts.membership)

    if number is None:
        return divide(resolution)
    low, high = 1e-3, 20.0
    best = divide(resolution)
    for _ in range(_BISECTIONS):
        middle = float(np.sqrt(low * high))
        found = divide(middle)
        count = found.max() + 1
        if abs(count - number) < abs(best.max() + 1 - number):
            best = found
        if count == number:
            return found
        low, high = (middle, high) if count < number else (low, middle)
    return best


def _number(names: list[str], method: str, wanted: int | None, labels: Mapping[str, pd.Series] | None) -> int | None:
    if wanted is not None:
        return wanted
    if labels is not None:
        number = pd.concat([labels[name] for name in names]).nunique()
        if number:
            return number
        raise DataError(
            f"no spot of {', '.join(names)} has a label, so that the number of clusters is unknown; give --clusters"
        )
    if method == "leiden":
        return None
    raise ConfigError(f"{method} needs the number of clusters: --clusters, or --labels to compare with")


def _result(slide: AnnData, labels: Mapping[str, pd.Series] | None, name: str) -> AnnData:
    result = AnnData(obs=pd.DataFrame(index=slide.obs_names))
    result.obsm["spatial"] = slide.obsm["spatial"]
    result.uns["spatial"], result.uns["hinge"] = slide.uns.get("spatial", {}), dict(slide.uns["hinge"])
    if labels is not None:
        known = labels[name].notna()
        # numbers that name a cluster: 5 and not 5.0
        text = [f"{label:g}" if isinstance(label, float) else str(label) for label in labels[name]]
        result.obs["label"] = pd.Categorical(np.where(known, text, None))
    return result
