"""The regression on slides that lack genes: what the other genes of a spot say of them is used."""

import numpy as np
import pytest

from hinge.data.gene_parts import GenePart, slide_sets
from hinge.evaluation.ridge import RidgeFolds, fit_ridge_by_component, fit_ridge_of_parts
from hinge.training import completed_regression
from hinge.training.completed_regression import fit_completed_ridge
from hinge.training.measured import MeasuredGenes

GENES, SLIDES, SPOTS, FEATURES = 24, 6, 360, 40


def tissue(seed=0):
    """Six slides whose genes follow three programs, in part seen in the features; return features, values and mean."""
    rng = np.random.default_rng(seed)
    weights, loadings = rng.normal(size=(FEATURES, 3)) / FEATURES**0.5, rng.normal(size=(3, GENES))
    x = rng.normal(size=(2 * SPOTS, FEATURES))
    mean = (x @ weights) @ loadings + 4
    y = mean + rng.normal(size=(2 * SPOTS, 3)) @ loadings + 0.3 * rng.normal(size=mean.shape)
    return x[:SPOTS], y[:SPOTS], x[SPOTS:], mean[SPOTS:]


def halves():
    """Half of the genes are lacking from four of six slides, the other half from none but one."""
    of_slides = np.ones((SLIDES, GENES), dtype=bool)
    of_slides[:4, ::2] = False
    of_slides[4, 1::2] = False
    return MeasuredGenes(of_slides, np.arange(SPOTS) % SLIDES)


def parts_of(measured):
    found = []
    for columns, slides in slide_sets(measured.of_slides):
        rows = np.flatnonzero(slides[measured.slide_of])
        slide = measured.slide_of[rows]
        bands = np.arange(len(rows)) * 5 // len(rows)
        found.append(GenePart(rows, columns, (slide if slides.sum() > 1 else bands).astype(str)))
    return found


def fit(x, y, measured, num_factors=3):
    return fit_completed_ridge(x, y, parts_of(measured), measured.slide_of.astype(str), measured, num_factors)


def test_genes_that_slides_lack_are_predicted_better_than_from_the_slides_that_have_them():
    x, y, new, mean = tissue()
    measured = halves()
    alone = fit_ridge_of_parts(x, y, parts_of(measured))
    lacking = np.arange(GENES) % 2 == 0

    def error(found):
        return ((found.predict(new) - mean)[:, lacking] ** 2).mean()

    complete, _ = fit_ridge_by_component(RidgeFolds(x, measured.slide_of), y)
    assert error(complete) < error(fit(x, y, measured)) < 0.7 * error(alone)


def test_what_stands_for_a_missing_value_does_not_count():
    x, y, _, _ = tissue()
    measured = halves()
    found = [fit(x, np.where(measured.values(), y, missing), measured) for missing in (0.0, 7.0)]
    for name in ("weight", "bias", "held_out", "penalty"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name), err_msg=name)


def test_values_are_predicted_by_regressions_that_have_not_seen_them():
    x, y, _, _ = tissue()
    measured = halves()
    y[:, :2] = np.random.default_rng(5).normal(size=(SPOTS, 2))  # nothing predicts these genes
    found, known = fit(x, y, measured), measured.values()
    for gene in (0, 1):
        own = known[:, gene]
        assert np.corrcoef(found.held_out[own, gene], y[own, gene])[0, 1] < 0.15


def test_a_gene_of_a_single_slide_keeps_its_cross_validation_within_the_slide():
    x, y, _, _ = tissue()
    of_slides = np.ones((SLIDES, GENES), dtype=bool)
    of_slides[1:, 0] = False
    measured = MeasuredGenes(of_slides, np.arange(SPOTS) % SLIDES)
    own = measured.slide_of == 0
    found, alone = fit(x, y, measured), fit_ridge_of_parts(x, y, parts_of(measured))
    np.testing.assert_array_equal(found.held_out[own, 0], alone.held_out[own, 0])
    assert np.isfinite(found.weight).all() and np.isfinite(found.held_out).all()


@pytest.mark.parametrize("num_factors", [0, 3])
def test_large_panels_and_models_without_factors(monkeypatch, num_factors):
    x, y, _, _ = tissue()
    measured = halves()
    assert np.isfinite(fit(x, y, measured, num_factors).weight).all()
    monkeypatch.setattr(completed_regression, "MOST_GENES", GENES - 1)
    alone = fit_ridge_of_parts(x, y, parts_of(measured))
    np.testing.assert_array_equal(fit(x, y, measured, num_factors).weight, alone.weight)
