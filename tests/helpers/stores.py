"""Stores of spots, written slide by slide."""

from dataclasses import replace

import numpy as np

from hinge.data.spot_store import SpotStore, write_slide
from hinge.data.spots import SpotTable, concatenate_spots


def by_slide(spots: SpotTable) -> list[SpotTable]:
    """Return the spots of each slide, with features as a store holds them."""
    tables = []
    for name in np.unique(spots.slide).tolist():
        rows = np.flatnonzero(spots.slide == name)
        there = {name: spots.measured[name]} if name in spots.measured else {}
        features = spots.features[rows].astype(np.float16).astype(np.float32)
        tables.append(replace(spots.subset(rows), features=features, measured=there))
    return tables


def write_store(folder, spots: SpotTable) -> tuple[SpotStore, SpotTable]:
    """Write a store of spots; return it, and its spots in their order."""
    tables = by_slide(spots)
    for table in tables:
        write_slide(folder, table, made_from="inputs")
    names = [str(table.slide[0]) for table in tables]
    store = SpotStore(folder, names, spots.genes, spots.transform, spots.token_columns)
    return store, concatenate_spots(tables)
