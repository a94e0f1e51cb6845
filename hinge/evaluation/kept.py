"""Predictions and scores that are kept, so that evaluating again computes only what has changed."""

import logging
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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

SCORES_VERSION = 4
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


@dataclass(frozen=True)
class KeptPrediction:
    """A prediction in a file, which is read when it is needed: all draws of a large slide do not fit in memory at once.

    Attributes
    ----------
    method
        As of the `Prediction`.
    load
        Returns it.
    """

    method: str
    load: Callable[[], Prediction]


class PredictionStore:
    """Predictions of one slide by several methods, in one `npz` file.

    Parameters
    ----------
    path
        The file, existing or not. A damaged one counts as empty.
    """

    def __init__(self, path: Path):
        self.path = path
        self._digests: dict[str, str] = {}
        self._new: dict[str, Prediction] = {}
        try:
            with zipfile.ZipFile(checksums.verified(path)) as archive:
                if damaged := archive.testzip():
                    raise BadZipFile(f"{damaged} is damaged")
            with np.load(path, allow_pickle=False) as content:
                names = [name for name in content if name.endswith("/digest")]
                self._digests = {name.removesuffix("/digest"): str(content[name]) for name in names}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, EOFError, BadZipFile, DataError) as error:
            logger.warning("%s is damaged (%s); it is replaced", path, error)

    def digest(self, method: str) -> str | None:
        """Return the digest of what the prediction of a method was made from, None without a prediction."""
        return self._digests.get(method)

    def get(self, method: str) -> Prediction:
        """Return the prediction of a method.

        Raises
        ------
        DataError
            There is none.
        """
        if method in self._new:
            return self._new[method]
        if method not in self._digests:
            raise DataError(f"{self.path} has no predictions of {method}")
        with np.load(self.path, allow_pickle=False) as content:
            arrays = {name: content[f"{method}/{name}"] for name in _ARRAYS if f"{method}/{name}" in content}
        return Prediction(method, **arrays)

    def kept(self, method: str) -> KeptPrediction:
        """Return the prediction of a method, not yet read; a DataError if there is none."""
        if method not in self._digests:
            raise DataError(f"{self.path} has no predictions of {method}")
        return KeptPrediction(method, partial(self.get, method))

    def put(self, prediction: Prediction, digest: str) -> None:
        """Add a prediction, or replace the one of the same method; `save` writes it."""
        self._new[prediction.method], self._digests[prediction.method] = prediction, digest

    def save(self) -> None:
        """Write the file."""
        arrays: dict[str, NDArray] = {}
        for method, digest in self._digests.items():
            prediction = self.get(method)
            of_method = {name: getattr(prediction, name) for name in _ARRAYS}
            arrays |= {f"{method}/{name}": array for name, array in of_method.items() if array is not None}
            arrays[f"{method}/digest"] = np.array(digest)
        with atomic_path(self.path) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle
        self._new = {}


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
            # sorted, because methods may be scored in any order
            write_json(self.path, dict(sorted(self.entries.items())))


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
