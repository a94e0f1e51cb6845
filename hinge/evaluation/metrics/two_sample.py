"""Can a classifier tell drawn spots from measured ones?"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler

from hinge.data.transforms import get_transform
from hinge.evaluation.metrics.accuracy import as_matrix
from hinge.evaluation.metrics.calibration import check_draws
from hinge.utils.errors import DataError

_FOLDS = 5
_TREES, _LEAVES, _BINS = 60, 8, 63  # some hundred spots do not feed more
_FEATURE_COMPONENTS = 32  # of wide encoders; boosting looks at every column


def two_sample_auc(
    measured: ArrayLike,
    draws: ArrayLike,
    features: ArrayLike | None = None,
    *,
    n_draws: int = 2,
    seed: int = 0,
) -> float:
    """Classifier two-sample test [1]_: AUC of gradient boosting between measured and drawn spots.

    A classifier learns, for one draw at a time, to tell its n spots from the n measured ones, and is scored on
    spots it has not seen: in each of five folds a spot is left out in both its versions, so that nothing can be
    remembered. With features it also sees what the image shows there and so tests the conditional distribution:
    a draw that is right for the slide but at the wrong spots then gives itself away.

    Parameters
    ----------
    measured
        Values (n, G) in transform units.
    draws
        Values (K, n, G); the first `n_draws` of them are tested, each by itself.
    features
        (n, d), or None. More than 32 are reduced to 32 principal components.
    n_draws
        Draws that are tested; the AUC is their mean.
    seed
        Of the folds and of the components.

    Returns
    -------
    float
        0.5 if drawn spots cannot be told from measured ones, 1 if they always can. Below 0.5 by chance only.
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
    image = np.zeros((n_spots, 0))
    if features is not None:
        image = as_matrix(features, "the features")
        if len(image) != n_spots:
            raise DataError(f"{len(image)} spots have features, but {n_spots} were measured")
        if image.shape[1] > _FEATURE_COMPONENTS:
            image = StandardScaler().fit_transform(image)
            components = min(_FEATURE_COMPONENTS, n_spots)
            image = PCA(components, svd_solver="full").fit_transform(image)
    return float(np.mean([_auc(measured, draw, image, seed) for draw in draws[:n_draws]]))


def round_to_counts(draws: ArrayLike, library_size: ArrayLike, transform: str) -> NDArray[np.float32]:
    """Move drawn values to the nearest whole count that the spot's library size allows.

    Measured values are transforms of whole numbers. A method that draws from a continuous distribution is told
    from them by that alone, whatever else it gets right; rounded, its draws have to be told by their shape.

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
    functions, library_size = get_transform(transform), np.asarray(library_size)
    counts = np.rint(functions.inverse(np.maximum(draws, 0.0), library_size))
    return functions.forward(counts, library_size)


def _auc(measured: NDArray, drawn: NDArray, image: NDArray, seed: int) -> float:
    # float32 on both sides: the same number in another precision must not give a draw away
    values = np.concatenate([measured, drawn]).astype(np.float32)
    values = np.concatenate([values, np.tile(image, (2, 1)).astype(np.float32)], axis=1)
    n_spots = len(measured)
    is_drawn = np.repeat([0, 1], n_spots)
    scores = []
    for spots in KFold(_FOLDS, shuffle=True, random_state=seed).split(measured):
        # a spot's two versions are n rows apart, and both on one side
        training, held = (np.concatenate([rows, rows + n_spots]) for rows in spots)
        classifier = HistGradientBoostingClassifier(
            max_iter=_TREES, max_leaf_nodes=_LEAVES, max_bins=_BINS, early_stopping=False, random_state=seed
        ).fit(values[training], is_drawn[training])
        scores.append(roc_auc_score(is_drawn[held], classifier.predict_proba(values[held])[:, 1]))
    return float(np.mean(scores))
