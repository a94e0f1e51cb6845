"""Predictions and scores that are kept with a run."""

from dataclasses import replace

import numpy as np
import pytest
from test_scores import prediction_of, spots

from hinge.evaluation.kept import PredictionStore, ScoreStore, digest_of, truth_digest
from hinge.evaluation.names import BASELINES, DEFAULT_BASELINES
from hinge.evaluation.predictions import Prediction
from hinge.evaluation.scores import evaluate_slide
from hinge.utils.errors import DataError
from hinge.utils.files import read_json, write_json


@pytest.fixture
def slide():
    return spots(("t",), seed=1)


def test_predictions_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "baselines" / "t.npz"
    rng = np.random.default_rng(0)
    draws = Prediction("ridge-cv+residual", mean=rng.normal(size=(4, 3)), draws=rng.normal(size=(2, 4, 3)).astype("f4"))
    matrix = Prediction("training-correlation", correlation=np.eye(3))
    store = PredictionStore(path)
    store.put(draws, "one")
    store.put(matrix, "two")
    store.save()
    again = PredictionStore(path)
    for prediction, digest in ((draws, "one"), (matrix, "two")):
        assert again.digest(prediction.method) == digest
        found = again.get(prediction.method)
        for name in ("mean", "draws", "correlation"):
            expected, actual = getattr(prediction, name), getattr(found, name)
            assert (expected is None) == (actual is None)
            if expected is not None:
                assert actual.dtype == expected.dtype
                np.testing.assert_array_equal(actual, expected)
    assert again.digest("knn") is None
    with pytest.raises(DataError, match="no predictions of knn"):
        again.get("knn")
    # a new prediction replaces all of the old one
    again.put(replace(draws, draws=None), "three")
    assert again.digest(draws.method) == "three" and again.get(draws.method).draws is None


def test_a_damaged_file_of_predictions_counts_as_empty(tmp_path, caplog):
    path = tmp_path / "t.npz"
    path.write_bytes(b"PK\x03\x04 nothing")
    assert PredictionStore(path).digest("mean") is None
    assert "is damaged" in caplog.text


def test_the_digest_depends_on_arrays_and_settings(slide):
    values = np.arange(6.0).reshape(2, 3)
    one = digest_of({"values": values, "draws": None}, 20, "knn")
    assert one == digest_of({"values": values.copy()}, 20, "knn")
    others = [digest_of({"values": values + 1}, 20, "knn"), digest_of({"values": values}, 21, "knn")]
    assert len({one, *others, digest_of({"draws": values}, 20, "knn")}) == 4
    moved = replace(slide, coords=slide.coords + 1)
    assert truth_digest(slide, 0) == truth_digest(slide, 0) != truth_digest(slide, 1)
    assert truth_digest(slide, 0) != truth_digest(moved, 0)


@pytest.mark.full
def test_unchanged_scores_are_taken_from_the_file(slide, tmp_path, monkeypatch):
    path, train = tmp_path / "scores" / "t.json", spots()
    prediction = prediction_of(slide)
    first = evaluate_slide(train, slide, [prediction], baselines=DEFAULT_BASELINES, kept=path)
    plain = evaluate_slide(train, slide, [prediction], baselines=DEFAULT_BASELINES)
    scored = []
    from hinge.evaluation import scores

    original = scores._scores_and_detail
    monkeypatch.setattr(
        scores, "_scores_and_detail", lambda test, one, *rest: scored.append(one.method) or original(test, one, *rest)
    )
    again = evaluate_slide(train, slide, [prediction], baselines=DEFAULT_BASELINES, kept=path)
    assert scored == []
    for other in (plain, again):
        for one, two in zip(first.rows, other.rows, strict=True):
            assert one.keys() == two.keys()
            np.testing.assert_equal(one, two)
        np.testing.assert_equal(first.details, other.details)
        np.testing.assert_equal(first.attained, other.attained)
    # one more prediction, a changed one and another seed
    evaluate_slide(train, slide, [prediction, replace(prediction, method="more")], kept=path)
    assert scored == ["more"]
    changed = replace(prediction, mean=prediction.mean + 1)
    evaluate_slide(train, slide, [changed], kept=path)
    assert scored == ["more", "hinge"]
    evaluate_slide(None, slide, [changed], kept=path, seed=1)
    assert scored == ["more", "hinge", "hinge"]


@pytest.mark.full
def test_damaged_scores_are_computed_anew(slide, tmp_path):
    path, prediction = tmp_path / "t.json", prediction_of(slide, 3)
    first = evaluate_slide(None, slide, [prediction], kept=path)
    content = read_json(path)
    for wrong in ("x", [1], {"hinge": None}, {"hinge": content["hinge"] | {"scores": {}}}):
        write_json(path, wrong)
        again = evaluate_slide(None, slide, [prediction], kept=path)
        np.testing.assert_equal(again.rows, first.rows)
    path.write_text("{")
    np.testing.assert_equal(evaluate_slide(None, slide, [prediction], kept=path).rows, first.rows)
    assert ScoreStore(None, "x").get(prediction, lambda: ({}, {})) == ({}, {})


def test_baselines_have_names():
    assert set(DEFAULT_BASELINES) < set(BASELINES)
