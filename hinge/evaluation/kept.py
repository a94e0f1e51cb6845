"""Predictions and scores that are kept, so that evaluating again computes only what has changed."""

import logging
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from hinge.evaluation.definitions import METRICS
from hinge.evaluation.predictions import Prediction
from hinge.utils import checksums
from hinge.utils.errors import DataError
from hinge.utils.files import arrays_digest, atomic_path, read_json, write_json

if TYPE_CHECKING:
    from hinge.data.spots import SpotTable

logger = logging.getLogger(__name__)

SCORES_VERSION = 3
"""Version of the scores: kept scores of another one are not used. Raise it with every change that affects a score."""

_ARRAYS = ("mean", "draws", "correlation")


def digest_of(arrays: Mapping[str, NDArray | None], *settings: Any) -> str:
    """Return a digest of arrays, of the `repr` of settings, and of the version of scikit-learn."""
    content = {name: array for name, array in arrays.items() if array is not None}
    return arrays_digest(content | {"settings": np.array(repr((version("scikit-learn"), *settings)))})


def truth_digest(spots: "SpotTable", *settings: Any) -> str:
    """Return a digest of everything but the prediction that the scores of a slide depend on."""
    arrays = {
        "values": spots.values,
        "coords": spots.coords,
        "library_size": spots.library_size,
        "features": None if spots.features is None else spots.features[:, 0],
    }
    return digest_of(arrays, SCORES_VERSION, spots.transform, list(spots.genes), *settings)


class PredictionStore:
    """Predictions of one slide by several methods, in one `npz` file.

    Parameters
    ----------
    path
        The file, existing or not. A damaged one counts as empty.
    """

    def __init__(self, path: Path):
        self.path = path
        self._arrays: dict[str, NDArray] = {}
        try:
            with np.load(checksums.verified(path), allow_pickle=False) as content:
                self._arrays = {name: content[name] for name in content}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, EOFError, BadZipFile, DataError) as error:
            logger.warning("%s is damaged (%s); it is replaced", path, error)

    def digest(self, method: str) -> str | None:
        """Return the digest of what the prediction of a method was made from, None without a prediction."""
        return str(self._arrays.get(f"{method}/digest")) if f"{method}/digest" in self._arrays else None

    def get(self, method: str) -> Prediction:
        """Return the prediction of a method.

        Raises
        ------
        DataError
            There is none.
        """
        if self.digest(method) is None:
            raise DataError(f"{self.path} has no predictions of {method}")
        mean, draws, correlation = (self._arrays.get(f"{method}/{name}") for name in _ARRAYS)
        return Prediction(method, mean, draws, correlation)

    def put(self, prediction: Prediction, digest: str) -> None:
        """Add a prediction, or replace the one of the same method; `save` writes it."""
        method = prediction.method
        for name in _ARRAYS:
            self._arrays.pop(f"{method}/{name}", None)
        arrays = {name: getattr(prediction, name) for name in _ARRAYS}
        self._arrays |= {f"{method}/{name}": array for name, array in arrays.items() if array is not None}
        self._arrays[f"{method}/digest"] = np.array(digest)

    def save(self) -> None:
        """Write the file."""
        with atomic_path(self.path) as temporary:
            np.savez(temporary, **self._arrays)  # type: ignore[arg-type]  # no array is named allow_pickle


class ScoreStore:
    """Scores of the predictions of one slide, which depend on the prediction and on `truth`.

    Parameters
    ----------
    path
        JSON file: method → digest, scores and detail. None keeps nothing.
    truth
        Result of `truth_digest`.
    """

    def __init__(self, path: Path | None, truth: str):
        self.path, self.truth = path, truth
        self.entries: dict[str, dict[str, Any]] = {}
        self._changed = False
        if path is not None and path.exists():
            try:
                content = read_json(path)
                self.entries = content if isinstance(content, dict) else {}
            except DataError as error:
                logger.warning("%s; the scores are computed anew", error)

    def get(
        self, prediction: Prediction, compute: Callable[[], tuple[dict[str, float], dict[str, Any]]]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Return scores and detail of a prediction, those that are kept or what `compute` returns."""
        if self.path is None:
            return compute()
        digest = digest_of({name: getattr(prediction, name) for name in _ARRAYS}, self.truth)
        found = _read_entry(self.entries.get(prediction.method), digest)
        if found is None:
            found = compute()
            self.entries[prediction.method] = {"digest": digest, "scores": found[0], "detail": found[1]}
            self._changed = True
        return found

    def save(self) -> None:
        """Write the file, if something was computed."""
        if self.path is not None and self._changed:
            write_json(self.path, self.entries)


def _read_entry(entry: Any, digest: str) -> tuple[dict[str, float], dict[str, Any]] | None:
    """Return scores and detail of an entry, or None if it is of something else or damaged."""
    try:
        if entry["digest"] != digest:
            return None
        scores = {name: _number(entry["scores"][name]) for name in METRICS}
        detail = {
            key: value if key == "intervals" else [_number(number) for number in value]
            for key, value in entry["detail"].items()
        }
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    return scores, detail


def _number(value: Any) -> float:
    """Return a number of a JSON file, in which NaN is null."""
    return float("nan") if value is None else float(value)
