"""Predict expression on a grid finer than the spots, over all tissue of a slide.

A prediction holds for a disc of tissue as large as a spot. Predictions are made at every point of a dense grid, so that
the discs overlap. The value of a point of the map is the mean of the predictions of all discs that cover it, weighted
by a raised cosine of the distance that ends at the radius of a spot. Averaged over a spot, the map agrees with the
prediction of that spot.

The grid is processed in blocks of rows, with features and predictions on disk: memory depends on the width of the
slide and not on its area.
"""

import hashlib
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.spatial import KDTree
from torch import nn
from tqdm import tqdm

from hinge.data.condition_tokens import categories_of_slide
from hinge.data.features import read_features
from hinge.data.gene_parts import gene_parts
from hinge.data.neighbourhood import feature_scale, slide_features, spot_pitch, spot_positions
from hinge.data.readers import list_samples, read_slide
from hinge.data.slide import patient_of_slide, slide_name
from hinge.data.tissue_detection import slide_from_image
from hinge.diffusion import SlideInputs
from hinge.diffusion.evidence import slide_evidence
from hinge.diffusion.pipeline import PRECISIONS
from hinge.diffusion.slide_effect import SlideEffect, SlideEvidence
from hinge.encoders import Encoder, extract_features
from hinge.evaluation.metrics.accuracy import gene_pcc
from hinge.evaluation.ridge import fit_ridge_of_parts
from hinge.run.run import Run
from hinge.run.sampling import sampling_settings
from hinge.tasks.lattice import Lattice, neighbour_offsets, window_offsets
from hinge.tasks.map_image import write_ome_tiff
from hinge.tasks.regressor import load_regressor
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import HOST, arrays_digest, atomic_path, process_mark
from hinge.utils.locks import lock_file
from hinge.utils.resumable import remove_leftovers
from hinge.utils.safe_hdf5 import check_hdf5

logger = logging.getLogger(__name__)

BLOCK_POINTS = 4096
"""Points of the grid in memory, in whole rows."""

DEFAULT_GENES = 10
"""Number of channels of the image if no genes are named: the first genes of the panel."""


class Predictor(Protocol):
    """The interface of a predictor of maps.

    Attributes
    ----------
    encoder
        Encoder of the features.
    patch_um
        Side of a patch.
    genes, transform
        Genes and units of the values.
    pitch_um, diameter_um
        Distance and diameter of the training spots.
    neighbours, standardise
        Whether features of the neighbourhood are appended, and whether features are standardised per slide.
    about
        Settings that determine the result, for `uns["hinge"]` of the file.
    """

    encoder: Encoder
    patch_um: float
    genes: list[str]
    transform: str
    pitch_um: float
    diameter_um: float
    neighbours: bool
    standardise: bool
    about: dict[str, Any]

    def slide(self, name: str, um_per_px: float | None) -> AnnData:
        """Return a slide by name or path; an image without counts gets spots as in training."""

    def predict(self, conditions: np.ndarray, names: list[str], slide: str, positions: np.ndarray) -> dict:
        """Return layers (n, G) by name, `X` among them, of conditions (n, d) at positions (n, 2) in spot pitches."""


class RunPredictor:
    """Predict by ridge regression on the features of a run's training slides, or by draws of its model.

    Parameters
    ----------
    run
        A run; the regression needs no trained model.
    method
        `regression` or `draws`.
    draws, steps, seed
        Settings of the draws; None for those of the run.
    """

    def __init__(
        self, run: Run, method: str, draws: int | None = None, steps: int | None = None, seed: int | None = None
    ):
        if method not in ("regression", "draws"):
            raise ConfigError(f"there is no method {method!r}; choose regression or draws")
        settings, sampling = run.config.features, run.config.sampling
        self.run, self.method = run, method
        self.encoder = run.encoder
        self.patch_um = settings.patch_um or run.encoder.patch_um
        self.neighbours, self.standardise = settings.neighbourhood, settings.standardise_slide
        self.genes: list[str] = run.panel().genes
        self.transform: str = run.config.transform
        self.pitch_um, self.diameter_um = run.spot_grid()
        encoder = self.encoder
        self.about: dict[str, Any] = {"method": method, "encoder": encoder.name, "encoder_digest": encoder.digest}
        self._categories: dict[str, dict[str, str | None]] = {}
        if method == "regression":
            spots = run.spots(run.config.data.train)
            self.ridge = fit_ridge_of_parts(spots.features[:, 0], spots.values, gene_parts(spots))
            return
        self._evidence: dict[str, SlideEvidence] = {}
        self._effects: dict[str, SlideEffect | None] = {}
        self.sampling = sampling_settings(sampling, draws, steps, seed)
        self.pipeline = run.pipeline().to(PRECISIONS[sampling.precision]).to(encoder.device)
        self.about |= self.pipeline.provenance(self.sampling, encoder.name, encoder.digest)
        self._about = self.about

    def slide(self, name: str, um_per_px: float | None) -> AnnData:
        data = self.run.config.data
        known = name in [*data.train, *data.test, *data.pretrain] or not Path(name).exists()
        slide = self.run.slide(name) if known else self.run.slide_at(Path(name), um_per_px)
        self._categories[slide_name(slide)] = categories_of_slide(slide, self.run.config.condition.tokens)
        if self.method == "draws":
            patient = self.run.patient(name) if known else patient_of_slide(slide)
            evidence, facts = slide_evidence(
                self.pipeline.model,
                slide,
                self.genes,
                patient,
                shares=self.pipeline.settings.shares,
                tokens=self.pipeline.tokens,
                categories=self._categories[slide_name(slide)],
            )
            self._evidence[slide_name(slide)] = evidence
            self.about = self._about | facts
        return slide

    def predict(self, conditions, names, slide, positions):
        if self.run.config.condition.tokens:
            conditions = self.run.tokens.append(conditions, self._categories[slide])
        if self.method == "regression":
            return {"X": self.ridge.predict(conditions).astype(np.float32)}
        inputs = SlideInputs(slide, names, conditions, positions, evidence=self._evidence.get(slide, SlideEvidence()))
        # the first prediction is of the slide's own spots; points between them have its effect, not one of their own
        if slide not in self._effects:
            self._effects[slide] = self.pipeline.with_slide_effect(inputs).slide_effect
        inputs.slide_effect = self._effects[slide]
        [(_, result)] = self.pipeline.draw_parts(inputs, self.sampling, [slice(0, len(names))], progress=False)
        return {
            "X": result.values.mean(axis=0, dtype=np.float64).astype(np.float32),
            "expected": result.expected,
            "std": result.values.std(axis=0, dtype=np.float64).astype(np.float32),
        }


class TunedPredictor:
    """Predict by an encoder and head of `hinge finetune-encoder`, whose predictions are the features.

    Parameters
    ----------
    folder
        `folds/<name>` of its output.
    """

    neighbours = standardise = False

    def __init__(self, folder: Path):
        model, encoder, about = load_regressor(folder)
        self.data, self.genes, self.transform = Path(about["data"]), about["genes"], about["transform"]
        self.patch_um, self.pitch_um = about["patch_um"], about["spot_pitch_um"]
        self.diameter_um = about["spot_diameter_um"]
        digest = hashlib.sha256(f"{encoder.digest}{arrays_digest(model.head())}".encode()).hexdigest()
        self.encoder = Encoder(
            f"tuned {folder.name}",
            len(self.genes),
            self.patch_um,
            encoder.patch_px,
            digest,
            nn.Identity(),
            model,
            "float32",
        )
        self.about = {"method": "fine-tuned", "encoder": encoder.name, "encoder_digest": digest}

    def slide(self, name: str, um_per_px: float | None) -> AnnData:
        if not Path(name).exists() and name in list_samples(self.data):
            return read_slide(self.data, name)
        return read_slide(
            name,
            um_per_px=um_per_px,
            require_counts=False,
            spot_pitch_um=self.pitch_um,
            spot_diameter_um=self.diameter_um,
        )

    def predict(self, conditions, names, slide, positions):
        return {"X": conditions}


def open_predictor(folder: Path, method: str, draws: int | None, steps: int | None, seed: int | None) -> Predictor:
    """Return the predictor in the folder of a run, or of a fold of `hinge finetune-encoder`."""
    if (folder / "model.json").is_file():
        if method != "regression":
            raise ConfigError(
                f"{folder} is a fine-tuned encoder with a regression, which has no draws: use --method regression"
            )
        return TunedPredictor(folder)
    return RunPredictor(Run.open(folder), method, draws, steps, seed)


def map_slide(
    predictor: Predictor,
    slide: AnnData,
    output: Path,
    pitch_um: float = 25.0,
    genes: list[str] | None = None,
    batch_size: int = 64,
    block_points: int = BLOCK_POINTS,
) -> tuple[Path, Path]:
    """Predict a slide's expression on a dense grid.

    Parameters
    ----------
    predictor
        Result of `open_predictor`.
    slide
        A slide with an image. Features are standardised and the agreement is computed on its spots.
    output
        Folder for `<slide>.<pitch>um.h5ad` and `.ome.tif`.
    pitch_um
        Distance between points of the grid.
    genes
        Channels of the image; None for the first `DEFAULT_GENES` of the panel.
    batch_size
        Patches in one forward pass.
    block_points
        Points that are held in memory at a time; no effect on the result.

    Returns
    -------
    tuple of Path
        AnnData: grid points × genes in units of the transform, full-resolution pixels in `obsm["spatial"]`, cells in
        `obs["array_x"]`, `obs["array_y"]`; with draws also layers `std` (of a spot's draws) and `expected`. And an
        OME-TIFF of one pixel a cell, its first channel 1 on tissue and 0 elsewhere. `uns["hinge"]["agreement"]`
        compares the map averaged over spots with the prediction of the spots.

    Raises
    ------
    ConfigError
        The grid is coarser than the spots, or a gene is not in the panel.
    """
    name = slide_name(slide)
    if not 0 < pitch_um <= predictor.pitch_um:
        raise ConfigError(f"--pitch-um must be above 0 and at most the spots' {predictor.pitch_um:g}, not {pitch_um:g}")
    genes = list(predictor.genes[:DEFAULT_GENES]) if genes is None else genes
    missing = [gene for gene in genes if gene not in predictor.genes]
    if missing:
        raise ConfigError(f"the panel lacks {', '.join(missing[:5])}: give --gene for genes of the panel")
    stem = f"{name}.{pitch_um:g}um"
    path, image_path = output / f"{stem}.h5ad", output / f"{stem}.ome.tif"
    facts = slide.uns["hinge"]
    um_per_px = float(facts["um_per_px"])
    about = {**predictor.about, "transform": predictor.transform, "window_um": predictor.diameter_um, "channels": genes}
    if image_path.exists() and _same_map(path, slide, predictor.genes, about):
        remove_leftovers(path)
        logger.info("%s is finished", path)
        return path, image_path
    # cells that are half on tissue, so that the map ends where the tissue does
    grid = slide_from_image(facts["image_path"], um_per_px, pitch_um, pitch_um, name=name)
    grid.obs_names = [f"{pitch_um:g}um-{barcode}" for barcode in grid.obs_names]
    grid.uns["hinge"] |= {"spot_diameter_um": predictor.diameter_um, **about}
    at_spots = _SpotPrediction(predictor, slide, output, batch_size)
    lattice = Lattice.of(grid)
    logger.info("%s: %d points %g µm apart", name, grid.n_obs, pitch_um)
    mark = process_mark(os.getpid(), HOST)
    with lock_file(path), tempfile.TemporaryDirectory(prefix=f".{stem}.{mark}.", dir=output) as scratch:
        features = extract_features(
            grid,
            predictor.encoder,
            Path(scratch) / "features.h5",
            patch_um=predictor.patch_um,
            batch_size=batch_size,
        )
        with h5py.File(Path(scratch) / "raw.h5", "w") as raw:
            _predict_points(predictor, grid, lattice, features, raw, at_spots, pitch_um, block_points)
            with atomic_path(path) as temporary, atomic_path(image_path) as temporary_image:
                # tissue first, then genes; on disk, since all of them together may be large
                shape = (1 + len(genes), int(lattice.cells[:, 1].max()) + 1, int(lattice.cells[:, 0].max()) + 1)
                planes = np.lib.format.open_memmap(Path(scratch) / "planes.npy", "w+", np.float32, shape)
                _write_map(temporary, grid, predictor, lattice, raw, planes, genes, at_spots, block_points)
                write_ome_tiff(temporary_image, planes, ["tissue", *genes], grid, pitch_um)
    logger.info("map averaged over spots and prediction of spots: %s", at_spots.summary())
    return path, image_path


def _same_map(path: Path, slide: AnnData, genes: list[str], about: dict[str, Any]) -> bool:
    if not path.exists():
        return False
    check_hdf5(path, "a readable h5ad file")
    try:
        there = anndata.read_h5ad(path, backed="r")
    except Exception as error:  # a damaged HDF5 file can raise almost any exception
        raise DataError(f"{path} is not a readable h5ad file: {error}") from error
    facts = {**about, "image_path": slide.uns["hinge"]["image_path"]}
    try:
        found = there.uns.get("hinge", {})
        return list(there.var_names) == genes and all(
            np.array_equal(found.get(key), value) for key, value in facts.items()
        )
    finally:
        there.file.close()


class _SpotPrediction:
    """The prediction of the slide's own spots, and the map averaged over each of them."""

    def __init__(self, predictor: Predictor, slide: AnnData, output: Path, batch_size: int):
        self.coords = np.asarray(slide.obsm["spatial"], dtype=np.float64)
        self.radius = predictor.diameter_um / 2 / float(slide.uns["hinge"]["um_per_px"])
        with tempfile.TemporaryDirectory() as scratch:
            path = extract_features(
                slide, predictor.encoder, Path(scratch) / "f.h5", patch_um=predictor.patch_um, batch_size=batch_size
            )
            stored = read_features(path, barcodes=list(slide.obs_names), digest=predictor.encoder.digest)
        conditions = slide_features(stored.features, self.coords, predictor.neighbours, False)[:, 0]
        self.mean: Any = 0.0
        self.deviation: Any = 1.0
        if predictor.standardise:
            self.mean, self.deviation = feature_scale(conditions)
        conditions = ((conditions - self.mean) / self.deviation).astype(np.float32)
        layers = predictor.predict(conditions, list(slide.obs_names), slide_name(slide), spot_positions(self.coords))
        self.layer = "expected" if "expected" in layers else "X"
        self.values = layers[self.layer]
        self.total = np.zeros(self.values.shape)
        self.count = np.zeros(len(self.coords))

    def add(self, coords: np.ndarray, values: np.ndarray) -> None:
        """Add points of the map (m, 2) and their values (m, G) to the means over spots."""
        for point, spots in zip(values, KDTree(self.coords).query_ball_point(coords, self.radius), strict=True):
            self.total[spots] += point
            self.count[spots] += 1

    def agreement(self) -> dict[str, float]:
        """Return the mean over genes of the correlation over spots, and the root mean squared difference."""
        covered = self.count > 0
        if covered.sum() < 2:
            return {"spots": int(covered.sum()), "pcc": math.nan, "rmse": math.nan}
        averaged = self.total[covered] / self.count[covered, None]
        pcc = gene_pcc(self.values[covered], averaged)
        difference = averaged - self.values[covered]
        return {
            "spots": int(covered.sum()),
            "pcc": float(np.nanmean(pcc)) if np.isfinite(pcc).any() else math.nan,
            "rmse": float(np.sqrt(np.mean(difference**2))),
        }

    def summary(self) -> str:
        found = self.agreement()
        return (
            f"correlation {found['pcc']:.3f}, root mean squared difference {found['rmse']:.3f}, {found['spots']} spots"
        )


def _predict_points(predictor, grid, lattice, features, raw, at_spots, pitch_um, block_points) -> None:
    """Write the predictions of all points, before blending, to datasets of `raw`."""
    coords, names = np.asarray(grid.obsm["spatial"]), list(grid.obs_names)
    um_per_px = float(grid.uns["hinge"]["um_per_px"])
    spots = at_spots.coords
    # positions as in Run.sample, so that draws of the map and of the spots share their smooth noise
    pitch_px = spot_pitch(spots)
    if math.isnan(pitch_px):
        pitch_px = predictor.pitch_um / um_per_px
    offsets = neighbour_offsets(spots, pitch_px * um_per_px / pitch_um) if predictor.neighbours else None
    rows = 0 if offsets is None else int(np.abs(offsets[:, 1]).max())
    progress = tqdm(total=grid.n_obs, desc=f"map {slide_name(grid)}", unit="point", disable=None)
    with h5py.File(features) as file, progress:
        for first, last in lattice.blocks(block_points):
            low, high = lattice.halo(first, last, rows)
            loaded = file["features"][low:high, 0].astype(np.float32)
            conditions = loaded[first - low : last - low]
            if offsets is not None:
                around = lattice.weighted_mean(loaded, low, first, last, offsets, np.ones(len(offsets)))
                conditions = np.concatenate([conditions, around], axis=1)
            conditions = ((conditions - at_spots.mean) / at_spots.deviation).astype(np.float32)
            layers = predictor.predict(conditions, names[first:last], slide_name(grid), coords[first:last] / pitch_px)
            for layer, values in layers.items():
                if layer not in raw:
                    chunks = (min(1024, grid.n_obs), len(predictor.genes))
                    raw.create_dataset(layer, (grid.n_obs, len(predictor.genes)), np.float32, chunks=chunks)
                raw[layer][first:last] = values
            progress.update(last - first)


def _write_map(path, grid, predictor, lattice, raw, planes, genes, at_spots, block_points) -> None:
    """Blend the predictions into an h5ad, the planes of the image and the means over spots."""
    columns = [predictor.genes.index(gene) for gene in genes]
    offsets, weights = window_offsets(predictor.diameter_um / 2 / float(grid.uns["hinge"]["spot_pitch_um"]))
    rows = int(np.abs(offsets[:, 1]).max())
    content = AnnData(obs=grid.obs.copy(), var=pd.DataFrame(index=predictor.genes))
    content.obsm["spatial"] = grid.obsm["spatial"]
    content.uns["spatial"] = grid.uns["spatial"]
    content.uns["hinge"] = grid.uns["hinge"]
    content.write_h5ad(path)
    places, coords = lattice.cells, np.asarray(grid.obsm["spatial"])
    planes[0][places[:, 1], places[:, 0]] = 1
    with h5py.File(path, "r+") as file:
        for layer in raw:
            target = file if layer == "X" else file.require_group("layers")
            stored = target.create_dataset(
                layer, raw[layer].shape, np.float32, chunks=raw[layer].chunks, compression="gzip", compression_opts=1
            )
            stored.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            for first, last in lattice.blocks(block_points):
                low, high = lattice.halo(first, last, rows)
                blended = lattice.weighted_mean(raw[layer][low:high], low, first, last, offsets, weights)
                stored[first:last] = blended
                if layer == "X":
                    column, row = places[first:last].T
                    for plane, number in enumerate(columns, start=1):
                        planes[plane][row, column] = blended[:, number]
                if layer == at_spots.layer:
                    at_spots.add(coords[first:last], blended)
        group = file["uns/hinge"].create_group("agreement")
        group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        for key, value in at_spots.agreement().items():
            group[key] = value
            group[key].attrs.update({"encoding-type": "numeric-scalar", "encoding-version": "0.2.0"})
    planes.flush()
