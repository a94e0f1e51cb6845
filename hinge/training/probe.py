"""Probes of an encoder in pre-training: accuracy of simple classifiers on its features of labelled spots."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from anndata import AnnData
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from hinge.data.patches import PatchReader
from hinge.training.loop import step_generator
from hinge.utils.errors import DataError

NEIGHBOURS = 20
"""Neighbours of the kNN probe."""


@dataclass
class Probe:
    """Labelled spots that measure the progress of pre-training.

    Attributes
    ----------
    patches
        uint8 (n, px, px, 3).
    labels
        (n,) classes.
    is_test
        (n,) True for test spots; the others are training spots of the classifiers.
    """

    patches: np.ndarray
    labels: np.ndarray
    is_test: np.ndarray

    def accuracies(self, features: np.ndarray) -> dict[str, float]:
        """Return the accuracy of a kNN (cosine) and a logistic regression on features (n, d) of the test spots."""
        known, unknown = features[~self.is_test], features[self.is_test]
        classes, truth = self.labels[~self.is_test], self.labels[self.is_test]
        knn = KNeighborsClassifier(min(NEIGHBOURS, len(known)), weights="distance")
        linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
        most_frequent = np.unique(classes, return_counts=True)
        return {
            "knn_accuracy": float(knn.fit(normalize(known), classes).score(normalize(unknown), truth)),
            "linear_accuracy": float(linear.fit(known, classes).score(unknown, truth)),
            "chance": float((truth == most_frequent[0][most_frequent[1].argmax()]).mean()),
        }


def make_probe(
    slides: Sequence[AnnData], labels: Sequence[np.ndarray], patch_um: float, patch_px: int, most: int, seed: int
) -> Probe:
    """Read the patches of labelled spots.

    Parameters
    ----------
    slides, labels
        Slides and the classes of their spots, (n,) each. The last slide is the test; of a single slide, the half with
        larger y.
    patch_um, patch_px
        Size of a patch.
    most
        Most spots that are taken, at random by `seed`.

    Raises
    ------
    DataError
        There are fewer than two classes among the training spots.
    """
    patches, is_test, order = [], [], step_generator(seed, 31)
    chosen = []
    for number, slide in enumerate(slides):
        rows = np.sort(torch.randperm(slide.n_obs, generator=order).numpy()[: max(1, most // len(slides))])
        part = slide[rows]
        own = np.empty((len(rows), patch_px, patch_px, 3), dtype=np.uint8)
        for places, read in PatchReader(part, patch_um, patch_px):
            own[places] = read
        y = np.asarray(part.obsm["spatial"])[:, 1]
        is_test.append(y > np.median(y) if len(slides) == 1 else np.full(len(rows), number == len(slides) - 1))
        patches.append(own)
        chosen.append(np.asarray(labels[number])[rows])
    probe = Probe(np.concatenate(patches), np.concatenate(chosen), np.concatenate(is_test))
    if len(np.unique(probe.labels[~probe.is_test])) < 2:
        raise DataError("the probe's spots are all of one class")
    return probe
