"""Positions in units of the spot pitch, and features with their neighbourhood mean and standardisation per slide."""

import math

import numpy as np
from scipy.spatial import cKDTree

# neighbours on a square lattice are 1 and 1.41 pitches away, on a hexagonal one 1
NEIGHBOUR_DISTANCE = 1.5


def spot_pitch(coords: np.ndarray) -> float:
    """Return the median distance of a place to the nearest other one, NaN where all spots lie at one place.

    Several spots at one place count once.
    """
    places = np.unique(np.asarray(coords, dtype=np.float64), axis=0)
    return float(np.median(cKDTree(places).query(places, k=2)[0][:, 1])) if len(places) > 1 else math.nan


def spot_positions(coords: np.ndarray) -> np.ndarray:
    """Return coordinates (n, 2) in units of the spot pitch; zeros where all spots lie at one place."""
    coords, pitch = np.asarray(coords, dtype=np.float64), spot_pitch(coords)
    return np.zeros_like(coords) if math.isnan(pitch) else coords / pitch


def slide_features(features: np.ndarray, coords: np.ndarray, neighbours: bool, standardise: bool) -> np.ndarray:
    """Return the features of a whole slide as a model takes them.

    Parameters
    ----------
    features
        (n, V, d) of all spots of one slide, view 0 the unaugmented patch.
    coords
        (n, 2) pixels.
    neighbours
        Append the mean over the spot and its direct neighbours (view 0): d becomes 2d.
    standardise
        Subtract the slide's mean and divide by its standard deviation (view 0), feature by feature. Staining and
        scanner differ between slides and shift all features. No counts are needed, so that slides without counts are
        standardised too.

    Returns
    -------
    ndarray
        (n, V, d or 2d) float32.
    """
    features = np.asarray(features, dtype=np.float32)
    if neighbours:
        near = cKDTree(spot_positions(coords)).query_ball_point(spot_positions(coords), NEIGHBOUR_DISTANCE)
        around = np.stack([features[rows, 0].mean(axis=0, dtype=np.float64) for rows in near]).astype(np.float32)
        repeated = np.repeat(around[:, None], features.shape[1], axis=1)
        features = np.concatenate([features, repeated], axis=2)
    if standardise:
        mean, deviation = feature_scale(features[:, 0])
        features = (features - mean) / deviation
    return features.astype(np.float32)


def feature_scale(plain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (d,) of the features (n, d) of a slide; infinity for constant features.

    A constant feature is divided by infinity and becomes 0, also where rounding makes it vary.
    """
    plain = np.asarray(plain, dtype=np.float64)
    deviation = plain.std(axis=0)
    constant = deviation <= 1e-6 * np.maximum(np.abs(plain).max(axis=0), 1e-12)
    return plain.mean(axis=0), np.where(constant, np.inf, deviation)
