"""Two-sample test by a classifier: can it distinguish drawn spots from measured ones?"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hinge.evaluation.metrics.accuracy import as_matrix
from hinge.evaluation.metrics.calibration import check_draws
from hinge.utils.errors import DataError
from hinge.utils.threads import limit_threads

_FOLDS = 5
_TREES, _LEAVES, _BINS = 60, 8, 63  # enough for some hundreds of spots
_FEATURE_COMPONENTS = 32  # boosting searches every column, and encoders have up to thousands
MOST_SPOTS = 1000
"""Spots in a two-sample test; of larger slides a random subset of one draw is tested."""


def two_sample_auc(
    measured: ArrayLike,
    draws: ArrayLike,
    features: ArrayLike | None = None,
    *,
    n_draws: int = 2,
    seed: int = 0,
) -> float:
    """Return the AUC of gradient boosting between measured and drawn spots (classifier two-sample test [1]_).

    Each draw is tested by itself: a classifier learns to distinguish its n spots from the n measured ones and is
    scored on held-out spots. Both versions of a spot are in the same of the five folds, so that the classifier cannot
    use one to recognise the other. With features the test is of the conditional distribution: it then also detects
    draws whose distribution over the slide is right, but whose spots are at the wrong places.

    The folds run in one thread: with hundreds of spots more threads gain nothing, and waiting threads occupy cores
    that other processes need.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    draws
        Values (K, n, G); the first `n_draws` of them are tested, each by itself.
    features
        Histology features (n, d), or None. More than 32 are reduced to 32 principal components.
    n_draws
        Number of draws to test; the AUC is their mean. One where there are more than 1,000 spots, of which it is as
        certain as of several on a small slide.
    seed
        Seed of the folds, and of the subset of spots where there are more than 1,000.

    Returns
    -------
    float
        0.5 if drawn and measured spots cannot be distinguished, 1 if they always can. Below 0.5 by chance only.
        NaN with fewer than 10 spots.

    Raises
    ------
    DataError
        If the shapes do not match, or a value is not finite.

    References
    ----------
    .. [1] Lopez-Paz, Oquab, "Revisiting classifier two-sample tests", ICLR 2017.
    """
    measured, draws = check_draws(measured, draws)
    n_spots = len(measured)
    if n_spots < 2 * _FOLDS:
        return float("nan")
    image = np.zeros((n_spots, 0)) if features is None else as_matrix(features, "the features")
    if len(image) != n_spots:
        raise DataError(f"{len(image)} spots have features, but {n_spots} were measured")
    draws = draws[:n_draws]
    if n_spots > MOST_SPOTS:
        chosen = np.sort(np.random.default_rng(seed).choice(n_spots, MOST_SPOTS, replace=False))
        measured, draws, image = measured[chosen], draws[:1, chosen], image[chosen]
    image = _components(image)
    with limit_threads():
        return float(np.mean([_auc(measured, draw, image, seed) for draw in draws]))


def round_to_counts(draws: ArrayLike, library_size: ArrayLike, transform: str) -> NDArray[np.float32]:
    """Return draws with every value moved to the nearest whole count at the spot's library size.

    Measured values are transforms of whole numbers, so a classifier recognises draws from a continuous distribution
    by that alone. Rounded draws have to be recognised by their distribution.

    Parameters
    ----------
    draws
        Values (..., n, G) in transform units.
    library_size
        Measured counts (n,) over all genes.
    transform
        Name of the transform.

    Returns
    -------
    ndarray
        Of the same shape, in transform units.
    """
    from hinge.data.transforms import get_transform

    functions, library_size = get_transform(transform), np.asarray(library_size)
    counts = np.rint(functions.inverse(np.maximum(draws, 0.0), library_size))
    return functions.forward(counts, library_size)


def _components(features: NDArray) -> NDArray:
    """Return features (n, d), or their 32 first principal components where there are more."""
    if features.shape[1] <= _FEATURE_COMPONENTS:
        return features
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    components = PCA(min(_FEATURE_COMPONENTS, len(features)), svd_solver="full")
    return components.fit_transform(StandardScaler().fit_transform(features))


def _auc(measured: NDArray, drawn: NDArray, image: NDArray, seed: int) -> float:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import KFold

    # float32 on both sides: the same number in another precision would identify a draw
    values = np.concatenate([measured, drawn]).astype(np.float32)
    values = np.concatenate([values, np.tile(image, (2, 1)).astype(np.float32)], axis=1)
    n_spots = len(measured)
    is_drawn = np.repeat([0, 1], n_spots)
    scores = []
    for spots in KFold(_FOLDS, shuffle=True, random_state=seed).split(measured):
        # the two versions of a spot are n rows apart; both go to the same side
        training, held = (np.concatenate([rows, rows + n_spots]) for rows in spots)
        classifier = HistGradientBoostingClassifier(
            max_iter=_TREES, max_leaf_nodes=_LEAVES, max_bins=_BINS, early_stopping=False, random_state=seed
        ).fit(values[training], is_drawn[training])
        scores.append(roc_auc_score(is_drawn[held], classifier.predict_proba(values[held])[:, 1]))
    return float(np.mean(scores))
