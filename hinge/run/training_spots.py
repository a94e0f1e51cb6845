"""The training spots of a run: in memory, or in a store in its folder that is written slide by slide."""

import hashlib
import json
import logging

import numpy as np
from anndata import AnnData
from tqdm import tqdm

from hinge.data.condition_tokens import categories_of_slide
from hinge.data.count_table import panel_counts
from hinge.data.slide_levels import SlideLevels
from hinge.data.spot_store import STORE_NAME, SpotStore, digest_of_slide, write_slide
from hinge.data.spots import SpotTable
from hinge.run.preparation import Preparation
from hinge.utils.errors import DataError
from hinge.utils.files import arrays_digest, file_digest

logger = logging.getLogger(__name__)

STORE_VERSION = 1


def training_spots(inputs: Preparation) -> SpotTable | SpotStore:
    """Return the training spots: all of the training slides, or a random choice of `data.train_spots`.

    Where `Preparation.trains_from_disk`, a store that has those of all slides; what is missing of it is written.

    Raises
    ------
    DataError
        There are fewer spots than `data.train_spots`; or a slide of the store has changed since training began.
    """
    data = inputs.config.data
    if inputs.trains_from_disk:
        return _store(inputs)
    spots, wanted = inputs.spots(data.train), data.train_spots
    if wanted is None:
        return spots
    if wanted > len(spots):
        raise DataError(f"data.train_spots is {wanted}, but the training slides have {len(spots)} spots with counts")
    chosen = np.random.default_rng([inputs.config.seed, 5]).choice(len(spots), wanted, replace=False)
    return spots.subset(np.sort(chosen))


def training_table(inputs: Preparation) -> SpotTable:
    """Return the training spots in memory: all, or the bounded part of a store that the initialisation uses."""
    spots, most = training_spots(inputs), inputs.config.training.spots_in_memory
    # evaluation imports no torch, which takes seconds and half a gigabyte
    table = spots if isinstance(spots, SpotTable) else spots.some_spots(most, inputs.config.seed)[0]
    if len(table) < len(spots):
        logger.info("baselines are fitted to %d of %d training spots, which are on disk", len(table), len(spots))
    return table


def slide_levels(inputs: Preparation, spots: SpotTable | SpotStore) -> SlideLevels:
    """Return the levels of all slides with counts: those of the training spots, and those to pre-train on."""
    data, transform = inputs.config.data, inputs.config.transform
    tokens = inputs.known_tokens(data.train)
    if isinstance(spots, SpotStore):
        levels = spots.levels({name: inputs.patient(name) for name in spots.names}, tokens)
    else:
        patient_of = {name: inputs.patient(name) for name in np.unique(spots.slide).tolist()}
        patients = np.array([patient_of[name] for name in spots.slide.tolist()])
        known = (spots.known_counts(), spots.library_size, spots.slide, patients, transform)
        levels = SlideLevels.of_spots(*known, tokens)
    if data.pretrain:
        counts = inputs.pretraining_counts()
        known = (counts.counts, counts.library_size, counts.sample, counts.patient, transform)
        levels = levels.joined(SlideLevels.of_spots(*known, inputs.known_tokens(data.pretrain)))
    return levels


def _store(inputs: Preparation) -> SpotStore:
    """Return the store of the run; slides that are missing, or were made from other inputs, are written."""
    folder, names = inputs.paths.training / STORE_NAME, inputs.config.data.train
    begun, written = (inputs.paths.training / "latest.safetensors").exists(), 0
    for name in tqdm(names, desc="training store", unit="slide", disable=None, dynamic_ncols=True):
        digest, there = _made_from(inputs, inputs.slide(name)), digest_of_slide(folder, name)
        if digest == there:
            continue
        if there is not None and begun:
            raise DataError(
                f"slide {name}, or its features, changed after training in {inputs.paths.folder} had begun: restore "
                f"them, or delete {inputs.paths.training} and run hinge train again"
            )
        write_slide(folder, inputs.spots([name]), digest)
        written += 1
    columns = inputs.tokens.columns(_feature_dim(inputs)) if len(inputs.tokens) else ()
    store = SpotStore(folder, names, inputs.panel().genes, inputs.config.transform, columns)
    if written:
        logger.info("wrote %s (%d spots of %d slides)", folder, len(store), len(names))
    return store


def _feature_dim(inputs: Preparation) -> int:
    """Return the width of the condition with the columns of its tokens."""
    slide = inputs.slide(inputs.config.data.train[0])
    return inputs.conditions(slide, inputs.features(slide)).shape[2]


def _made_from(inputs: Preparation, slide: AnnData) -> str:
    """Return a digest of everything that the spots of a slide are made from."""
    config, panel = inputs.config, inputs.panel()
    counts, sizes = panel_counts(slide, panel.genes, panel.shares)
    arrays = {"counts": counts, "sizes": sizes, "coords": np.asarray(slide.obsm["spatial"], dtype=np.float64)}
    about = {
        "version": STORE_VERSION,
        "genes": panel.genes,
        "spots": list(slide.obs_names),
        "measured": arrays_digest(arrays),
        "features": file_digest(inputs.features(slide)),
        "condition": [config.features.neighbourhood, config.features.standardise_slide],
        "tokens": [inputs.tokens.shares, categories_of_slide(slide, config.condition.tokens)],
        "transform": config.transform,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
