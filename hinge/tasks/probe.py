"""Probes of a frozen encoder: predict labels of spots, such as tumour, on held-out slides.

The probes are logistic regression, the nearest spots of other slides, and prototypes (class means) of other slides or
of a few labelled spots of the slide itself.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from hinge.data.spots import spot_groups
from hinge.encoders import load_encoder
from hinge.tasks.embeddings import embed
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path, write_json

INVERSE_PENALTIES = np.logspace(-5, 1, 7)
"""Inverse penalties of the logistic regression, selected by cross-validation."""

NEIGHBOURS = 20
"""Number of nearest spots."""

SHOTS = 5
"""Labelled spots per class for prototypes of few spots."""

REPEATS = 20
"""Random selections of these spots, over which scores are averaged."""

METHODS = ("linear", "knn", "prototypes", f"prototypes of {SHOTS} spots")

DEFINITIONS = {
    "balanced_accuracy": "mean of sensitivity and specificity",
    "auroc": "probability that a positive spot scores above a negative one",
    "auprc": "average precision; a random score reaches the share of positive spots",
    "positive": "share of positive spots",
    "linear": "logistic regression with balanced classes on standardised features of the other slides",
    "knn": f"share of positives among the {NEIGHBOURS} spots of other slides that are nearest by cosine",
    "prototypes": "cosine with the mean of positive less that with the mean of negative spots, of other slides",
    f"prototypes of {SHOTS} spots": f"the same with {SHOTS} + {SHOTS} labelled spots of the slide itself, which are "
    f"not scored; mean of {REPEATS} random choices",
}


def probe_labels(
    slides: Mapping[str, AnnData],
    labels: Mapping[str, np.ndarray],
    encoders: Sequence[str],
    output: Path,
    *,
    meaning: str = "",
    features_folder: Path | None = None,
    patch_um: float | None = None,
    standardise: bool = True,
    batch_size: int = 64,
    seed: int = 0,
) -> Path:
    """Hold out each slide in turn and predict its labels from the features of encoders.

    Parameters
    ----------
    slides
        At least two slides by name.
    labels
        Labels of each slide's spots (n,): 1, 0, or NaN for spots without a label.
    encoders
        Names for `load_encoder`.
    output
        Folder for `features/`, `probabilities.csv` (a score for each spot, method and encoder) and `scores.json`.
    meaning
        Description of label 1.
    features_folder
        Folder of the feature files; None for `features` in `output`.
    patch_um, standardise, batch_size
        See `hinge.tasks.embeddings.embed`.
    seed
        Seed of the selection of few labelled spots.

    Returns
    -------
    Path
        `scores.json`: a row for each encoder, method and slide, and the means over slides.

    Raises
    ------
    ConfigError
        There are fewer than two slides.
    DataError
        All labelled training spots of a slide held out are of one class.
    """
    if len(slides) < 2:
        raise ConfigError("at least two slides are needed, because each is held out in turn")
    loaded = [load_encoder(name) for name in encoders]  # reports unknown names before features are extracted
    rows, called = [], []
    for encoder in loaded:
        of_encoder = []
        kept, features = {}, {}
        for name, slide in slides.items():
            kept[name] = np.flatnonzero(~np.isnan(labels[name]))
            features[name] = embed(
                slide,
                encoder,
                features_folder or output / "features",
                patch_um=patch_um,
                standardise=standardise,
                batch_size=batch_size,
            )[kept[name]]
        for name, slide in slides.items():
            others = [other for other in slides if other != name]
            y = labels[name][kept[name]].astype(int)
            if len(np.unique(y)) < 2:
                continue  # this slide has one class only
            train_x = np.concatenate([features[other] for other in others])
            train_y = np.concatenate([labels[other][kept[other]] for other in others]).astype(int)
            if len(np.unique(train_y)) < 2:
                raise DataError(f"with slide {name} held out, all labelled spots are of one class")
            origin = np.concatenate([np.full(len(kept[other]), other) for other in others])
            places = np.concatenate([slides[other].obsm["spatial"][kept[other]] for other in others])
            groups = spot_groups(origin, places, "fold")
            found = {
                "linear": linear_probe(train_x, train_y, groups, features[name]),
                "knn": neighbour_probe(train_x, train_y, features[name]),
                "prototypes": prototype_probe(train_x, train_y, features[name]),
            }
            for method, (score, threshold) in found.items():
                row = {"encoder": encoder.name, "method": method, "slide": name}
                of_encoder.append({**row, **probe_scores(y, score, threshold)})
                frame = pd.DataFrame({"spot": slide.obs_names[kept[name]], "label": y, "score": score})
                called.append(frame.assign(**row, called=(score > threshold).astype(int)))
            few = few_shot_scores(features[name], y, seed)
            if few is not None:
                of_encoder.append({"encoder": encoder.name, "method": METHODS[3], "slide": name, **few})
        if not of_encoder:
            raise DataError("no slide has labelled spots of both classes")
        rows += _with_means(of_encoder)
    with atomic_path(output / "probabilities.csv") as temporary:
        columns = ["encoder", "method", "slide", "spot", "label", "score", "called"]
        pd.concat(called)[columns].to_csv(temporary, index=False, float_format="%.6g")
    return write_json(output / "scores.json", {"positive": meaning, "definitions": DEFINITIONS, "rows": rows})


def linear_probe(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return the probability of class 1 by logistic regression, and the threshold 0.5.

    Parameters
    ----------
    features, labels, groups
        Of the training spots: (n, d), (n,) of 0 and 1, and what cross-validation leaves out together (n,).
    test
        (m, d).
    """
    regression = LogisticRegression(class_weight="balanced", max_iter=2000)
    model: Pipeline | GridSearchCV = make_pipeline(StandardScaler(), regression)
    # a fold has to hold both classes, on either side
    folds = list(GroupKFold(min(5, len(np.unique(groups)))).split(features, labels, groups))
    if all(len(np.unique(labels[side])) == 2 for fold in folds for side in fold):
        grid = {"logisticregression__C": INVERSE_PENALTIES}
        model = GridSearchCV(model, grid, scoring="neg_log_loss", cv=folds)
    else:
        regression.C = 1e-2
    return model.fit(features, labels).predict_proba(test)[:, 1], 0.5


def neighbour_probe(features: np.ndarray, labels: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the share of class 1 among the nearest training spots (m,), and the share among all as threshold."""
    search = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(features)), metric="cosine").fit(features)
    nearest = search.kneighbors(test, return_distance=False)
    return labels[nearest].mean(axis=1), float(labels.mean())


def prototype_probe(features: np.ndarray, labels: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the difference of the cosines with the means of class 1 and class 0 (m,), and the threshold 0."""
    means = np.stack([features[labels == kind].mean(axis=0, dtype=np.float64) for kind in (0, 1)])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    unit = test / np.maximum(np.linalg.norm(test, axis=1, keepdims=True), 1e-12)
    cosine = unit @ means.T
    return cosine[:, 1] - cosine[:, 0], 0.0


def few_shot_scores(features: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float] | None:
    """Return the mean scores of prototypes of few labelled spots, None if a class has too few spots."""
    members = [np.flatnonzero(labels == kind) for kind in (0, 1)]
    if min(map(len, members)) <= SHOTS:
        return None
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(REPEATS):
        shown = np.concatenate([rng.choice(spots, SHOTS, replace=False) for spots in members])
        hidden = np.setdiff1d(np.arange(len(labels)), shown)
        score, threshold = prototype_probe(features[shown], labels[shown], features[hidden])
        found.append(probe_scores(labels[hidden], score, threshold))
    return {key: float(np.mean([scores[key] for scores in found])) for key in found[0]} | {"n": len(labels)}


def probe_scores(labels: np.ndarray, score: np.ndarray, threshold: float) -> dict[str, float]:
    """Return balanced accuracy at a threshold, areas under the ROC and precision-recall curves, and class shares."""
    return {
        "balanced_accuracy": float(balanced_accuracy_score(labels, score > threshold)),
        "auroc": float(roc_auc_score(labels, score)),
        "auprc": float(average_precision_score(labels, score)),
        "positive": float(labels.mean()),
        "n": len(labels),
    }


def _with_means(rows: list[dict]) -> list[dict]:
    table = pd.DataFrame(rows)
    means = table.groupby("method", sort=False).mean(numeric_only=True)
    result = list(rows)
    for method, scores in means.iterrows():
        row = {"encoder": rows[0]["encoder"], "method": method, "slide": "mean", **scores.to_dict()}
        result.append(row | {"n": int(table.loc[table["method"] == method, "n"].sum())})
    return result
