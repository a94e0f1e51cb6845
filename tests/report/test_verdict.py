"""The verdict: two sentences that follow from the scores."""

import pytest

from hinge.report.verdict import verdict


def scores(own: dict, others: dict[str, dict], slides: int = 1, intervals: float | None = None) -> dict:
    """Scores of the model and others on some slides; with `intervals`, of that half width."""
    rows, details = [], []
    for number in range(slides):
        for method, values in {"hinge": own, **others}.items():
            shifted = {key: value + 0.001 * number for key, value in values.items()}
            rows.append({"slide": f"S{number}", "method": method, "transform": "log2p1", **shifted})
            if intervals:
                ranges = {key: [value - intervals, value + intervals] for key, value in shifted.items()}
                details.append({"slide": f"S{number}", "method": method, "intervals": ranges})
    return {"rows": rows, "details": details}


@pytest.mark.parametrize(
    "pcc, crps, covered, mean, draws",
    [
        (0.70, 0.40, 0.90, "more accurate than", "better than"),
        (0.60, 0.50, 0.92, "as accurate as", "as good as"),
        (0.50, 0.60, 0.70, "less accurate than", "worse than"),
    ],
)
@pytest.mark.parametrize("slides, intervals", [(1, None), (1, 0.02), (3, None)])
def test_the_numbers_decide(pcc, crps, covered, mean, draws, slides, intervals):
    others = {
        "ridge-cv": {"pcc_mean": 0.6},
        "knn": {"pcc_mean": 0.4, "crps": 0.5},
        "noise-ceiling": {"pcc_mean": 0.9},
        "oracle": {"pcc_mean": 0.8, "crps": 0.1},
    }
    own = {"pcc_mean": pcc, "crps": crps, "coverage_90": covered}
    first, second = verdict(scores(own, others, slides, intervals))
    assert f"{mean} ridge regression (ridge-cv), the best baseline" in first
    assert f"{draws} those of nearest neighbours (knn)" in second
    assert ("too narrow" in second) == (covered < 0.87) and ("calibrated" in second) == (covered > 0.87)
    assert first.startswith("On this slide" if slides == 1 else "On 3 slides")


def test_one_slide_of_several():
    content = scores({"pcc_mean": 0.5}, {"ridge-cv": {"pcc_mean": 0.6}}, slides=2)
    content["rows"] += [{"slide": "S1", "method": "new", "transform": "log2p1", "pcc_mean": 0.99}]
    assert "less accurate than ridge" in verdict(content)[0]  # `new` was not scored on all slides
    assert "less accurate than new" in verdict(content, "S1")[0]


def test_what_is_missing_is_said():
    assert "not scored" in verdict({"rows": []})[0]
    first, second = verdict(scores({"pcc_mean": 0.5}, {}))
    assert "no baseline" in first and "too few draws" in second
    assert "no gene varies" in verdict(scores({"crps": 0.5}, {}))[0]
    nan = float("nan")
    first, second = verdict(scores({"pcc_mean": 0.5, "crps": 0.3, "coverage_90": nan}, {"mean": {"pcc_mean": nan}}))
    assert "no baseline" in first and "without a baseline" in second and "fewer than 19" in second
