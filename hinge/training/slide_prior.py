"""Fit of the prior of slide levels to all slides with counts, by moments."""

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from hinge.data.slide_levels import SlideLevels, shares_of_composition
from hinge.models.expected_values import counting_variance, fit_dispersion, moments
from hinge.models.slide_effects import SlidePrior

logger = logging.getLogger(__name__)

# standard deviations of log2 compositions and library sizes in HER2ST, eight patients: between patients, and between
# sections of one. They are what is assumed where slides of one patient, or one slide of each, cannot tell.
BETWEEN_PATIENTS, BETWEEN_SECTIONS = 0.9, 0.2
LIBRARY_BETWEEN_PATIENTS, LIBRARY_BETWEEN_SECTIONS = 1.1, 0.4
# degrees of freedom that these assumptions count for, and the variance of all genes beside that of one
ASSUMED_DEGREES, POOLED_DEGREES = 1.0, 3.0

SHARED_PART = 0.5
"""Share of the variance between patients that few directions carry; the rest is of each gene alone."""

MOST_SLIDES = 40
SMALLEST_VARIANCE = 1e-3
SMALLEST_SHARE = 1e-3
SMALLEST_PENALTY, LARGEST_PENALTY = 1e-3, 10.0


def fit_slide_prior(prior: SlidePrior, levels: SlideLevels, training: NDArray[np.bool_], transform: str) -> None:
    """Set the buffers of a `SlidePrior`.

    Variances are moments: within patients over the slides of each, between patients over the means of patients less
    their uncertainty. The variance of a gene is shrunk towards the mean over genes (as variances are in limma; Smyth,
    Statistical Applications in Genetics and Molecular Biology 3, 2004), and that towards the assumed one.

    Parameters
    ----------
    prior
        Of the patients in `levels`.
    levels
        Of S slides, with the training slides among them.
    training
        (S,) which are those.
    transform
        Name of the transform of the values.
    """
    patients, numbers = prior.patients, np.array([prior.patients.index(name) for name in levels.patient])
    log_library, composition = np.log2(levels.library_size)[:, None], levels.composition
    own_means, _ = _means(composition, numbers, len(patients))
    own_library, _ = _means(log_library, numbers, len(patients))
    effects, token_shares = token_effects(levels, numbers)
    if len(effects):
        # from here on levels are those of a slide without the effects of its categories
        of_slides = np.where(np.isfinite(levels.tokens), levels.tokens, token_shares) @ effects
        composition, log_library = composition - of_slides[:, :-1], log_library - of_slides[:, -1:]
    means, counts = _means(composition, numbers, len(patients))
    library_means, library_counts = _means(log_library, numbers, len(patients))
    # a gene that a patient lacks has the population's level there
    population = np.nanmean(means, axis=0)
    known = np.where(np.isfinite(means), means, population)
    of_patients, _ = _means(levels.values, numbers, len(patients))
    section = _pooled(composition, known[numbers], counts, BETWEEN_SECTIONS)
    library_section = _pooled(log_library, library_means[numbers], library_counts, LIBRARY_BETWEEN_SECTIONS)
    between = _between(means, counts, section, BETWEEN_PATIENTS)
    library_between = _between(library_means, library_counts, library_section, LIBRARY_BETWEEN_PATIENTS)
    loadings, noise = _directions(known - population, between, prior.patient_loadings.shape[1])
    rows = np.flatnonzero(training)
    weights = levels.num_spots / levels.num_spots.sum()
    shares = shares_of_composition(levels.composition)
    chosen = _some_slides(training)
    dispersion = fit_dispersion(
        shares[chosen],
        levels.library_size[chosen],
        levels.ratios[chosen],
        levels.values[chosen],
        weights[chosen],
        transform,
    )
    of_rows = []
    for row in rows:
        arguments = np.nan_to_num(shares[row]), levels.library_size[row], levels.ratios[row], dispersion, transform
        of_rows.append((*moments(*arguments), counting_variance(*arguments)))
    expected, variance, counting = (
        np.where(np.isfinite(shares[rows]), np.stack(each), np.nan) for each in zip(*of_rows, strict=True)
    )
    of_training = weights[rows] / weights[rows].sum()
    contents = {
        "population": population,
        "patient_loadings": loadings,
        "patient_noise": noise,
        "section_noise": section,
        "patient_means": np.where(np.isfinite(own_means), own_means, population),
        "patient_values": np.where(np.isfinite(of_patients), of_patients, np.nanmean(of_patients, axis=0)),
        "patient_sections": np.concatenate([counts, library_counts], axis=1),
        "patient_library": own_library[:, 0],
        "library": np.array([library_means.mean(), library_between[0], library_section[0]]),
        "training_library": np.array([log_library[rows].mean(), library_section[0] * (1 + 1 / len(rows))]),
        "degrees": np.array(ASSUMED_DEGREES + POOLED_DEGREES + len(patients) - 1),
        "dispersion": dispersion,
        "offset": np.nan_to_num(np.nanmean(levels.values[rows] - expected, axis=0)),
        "training_values": np.nan_to_num(_weighted_mean(levels.values[rows], of_training)),
        "training_variance": _weighted_mean(variance, of_training),
        "training_counting": _weighted_mean(counting, of_training),
        "ratios": levels.ratios[rows].mean(axis=0),
        "measured_share": _measured_share(levels.values[rows], of_training),
        "token_effects": effects,
        "token_shares": token_shares,
    }
    with torch.no_grad():
        for name, content in contents.items():
            buffer = getattr(prior, name)
            buffer.copy_(torch.from_numpy(np.asarray(content, dtype=np.float64)).reshape(buffer.shape))
    logger.info(
        "slide levels: slides %d, patients %d, standard deviation of log2 composition %.2f between patients and %.2f "
        "between slides of one",
        len(levels),
        len(patients),
        np.sqrt(between.mean()),
        np.sqrt(section.mean()),
    )


def token_effects(levels: SlideLevels, numbers: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the effects of categories on the levels of slides, and the shares of the categories.

    Ridge regression of the levels on the categories. Every patient counts as much, and the penalty is the variance
    between patients of one category over that between categories (empirical Bayes), which all genes share.

    Parameters
    ----------
    levels
        Of S slides, with tokens of T categories.
    numbers
        (S,) of each slide's patient.

    Returns
    -------
    tuple
        (T, G + 1), with log2 of the library size last, and (T,).
    """
    y = np.concatenate([levels.composition, np.log2(levels.library_size)[:, None]], axis=1)
    if not levels.tokens.shape[1]:
        return np.zeros((0, y.shape[1])), np.zeros(0)
    weight = 1 / np.bincount(numbers)[numbers]
    has = np.isfinite(levels.tokens) * weight[:, None]
    shares = np.nansum(levels.tokens * weight[:, None], axis=0) / np.maximum(has.sum(axis=0), 1e-12)
    design = np.where(np.isfinite(levels.tokens), levels.tokens, shares)
    design = design - np.average(design, axis=0, weights=weight)
    known = np.isfinite(y) * weight[:, None]
    mean = np.nansum(y * weight[:, None], axis=0) / np.maximum(known.sum(axis=0), 1e-12)
    centred = np.nan_to_num(y - mean)
    gram = np.einsum("sg,st,su->gtu", known, design, design)
    right = (known * centred).T @ design

    def effects_with(penalty: float) -> NDArray:
        return np.linalg.solve(gram + penalty * np.eye(len(shares)), right[:, :, None])[:, :, 0].T

    rough = effects_with(SMALLEST_PENALTY)
    squares = (known * (centred - design @ rough) ** 2).sum()
    degrees = max(known.sum() - y.shape[1] * (np.linalg.matrix_rank(design) + 1), 0.0) / y.shape[1]
    within = (ASSUMED_DEGREES * BETWEEN_PATIENTS**2 + squares / y.shape[1]) / (ASSUMED_DEGREES + degrees)
    penalty = within / max(float((rough**2).mean()), 1e-12)
    return effects_with(float(np.clip(penalty, SMALLEST_PENALTY, LARGEST_PENALTY))), shares


def _means(values: NDArray, numbers: NDArray, count: int) -> tuple[NDArray, NDArray]:
    """Return means (P, G) of the slides of each patient, NaN where none has the gene, and their numbers (P, G)."""
    known = np.isfinite(values)
    sums, counts = np.zeros((2, count, values.shape[1]))
    np.add.at(sums, numbers, np.where(known, values, 0.0))
    np.add.at(counts, numbers, known)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), counts


def _pooled(values: NDArray, means: NDArray, counts: NDArray, assumed: float) -> NDArray:
    """Return the variance (G,) of slides (S, G) around their patients' means (S, G)."""
    squares = np.nansum((values - means) ** 2, axis=0)
    degrees = np.maximum(counts - 1, 0).sum(axis=0)
    return _shrunk(squares, degrees, assumed)


def _between(means: NDArray, counts: NDArray, section: NDArray, assumed: float) -> NDArray:
    """Return the variance (G,) between patients, whose means (P, G) are of `counts` (P, G) slides each."""
    known = np.isfinite(means)
    number = known.sum(axis=0)
    centred = np.where(known, means - np.nanmean(means, axis=0), 0.0)
    # the mean of a patient's slides varies too
    uncertain = np.where(known, section / np.maximum(counts, 1), 0.0).sum(axis=0) / np.maximum(number, 1)
    degrees = np.maximum(number - 1, 0)
    squares = np.maximum((centred**2).sum(axis=0) - degrees * uncertain, 0.0)
    return _shrunk(squares, degrees, assumed)


def _shrunk(squares: NDArray, degrees: NDArray, assumed: float) -> NDArray:
    """Return variances (G,) of sums of squares with degrees of freedom (G,), shrunk towards their mean."""
    pooled = (ASSUMED_DEGREES * assumed**2 + squares.mean()) / (ASSUMED_DEGREES + degrees.mean())
    return np.maximum((POOLED_DEGREES * pooled + squares) / (POOLED_DEGREES + degrees), SMALLEST_VARIANCE)


def _directions(centred: NDArray, variance: NDArray, rank: int) -> tuple[NDArray, NDArray]:
    """Return loadings (G, R) and variances (G,) whose sum has the given variances (G,).

    The directions are those of the patients' means (P, G); `SHARED_PART` of every gene's variance is theirs.
    """
    count = len(centred)
    loadings = np.zeros((len(variance), rank))
    if count < 3:
        return loadings, variance
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    found = (directions[:rank] * sizes[:rank, None]).T
    length = np.sqrt((found**2).sum(axis=1))
    scale = np.sqrt(SHARED_PART * variance) / np.maximum(length, 1e-12)
    scale = np.where(length > 1e-6, scale, 0.0)
    loadings[:, : found.shape[1]] = found * scale[:, None]
    return loadings, np.maximum(variance - (loadings**2).sum(axis=1), SMALLEST_VARIANCE)


def _some_slides(training: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the numbers of at most `MOST_SLIDES` slides, training slides first."""
    order = np.argsort(~training, kind="stable")
    if len(order) <= MOST_SLIDES:
        return order
    return order[np.linspace(0, len(order) - 1, MOST_SLIDES).astype(int)]


def _measured_share(values: NDArray, weights: NDArray) -> NDArray:
    """Return the share (G,) of slides with weights (S,) whose values (S, G) are known; of all slides exactly 1."""
    known = np.isfinite(values)
    return np.where(known.all(axis=0), 1.0, np.maximum(known.T @ weights, SMALLEST_SHARE))


def _weighted_mean(values: NDArray, weights: NDArray) -> NDArray:
    known = np.isfinite(values) * weights[:, None]
    return np.nansum(values * known, axis=0) / np.maximum(known.sum(axis=0), 1e-12)
