"""Write an AnnData in CELLxGENE's schema: the prediction in X, the measured counts as raw."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
from anndata import AnnData

from hinge.data.slide import slide_name
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path

SCHEMA_VERSION = "7.1.0"
VISIUM_ASSAYS = ("EFO:0010961", "EFO:0022857", "EFO:0022858", "EFO:0022859", "EFO:0022860")

# fields that only the user can give, with examples
REQUIRED = {
    "organism_ontology_term_id": "NCBITaxon:9606",
    "tissue_ontology_term_id": "UBERON:0000310",
    "disease_ontology_term_id": "MONDO:0007254",
    "assay_ontology_term_id": "EFO:0022857",
}
# values of the schema for unknown fields
_DEFAULTS = {
    "cell_type_ontology_term_id": "unknown",
    "development_stage_ontology_term_id": "unknown",
    "sex_ontology_term_id": "unknown",
    "suspension_type": "na",
    "tissue_type": "tissue",
}
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d+")


def write_cellxgene(
    draws: AnnData, slide: AnnData, path: str | Path, metadata: Mapping[str, Any], gene_ids: str | Path | None = None
) -> Path:
    """Write the prediction and the measured counts of one slide with the fields of CELLxGENE's schema.

    `X` is the mean of the draws and `layers["std"]` their deviation. Genes that were measured and not predicted have 0
    and `feature_is_filtered`. `raw` holds the measured counts. `is_primary_data` is false, and so is `is_single` of a
    Visium slide, because the schema requires all 4,992 spots of a single capture area. Genes without an Ensembl id and
    spots without a count are left out.

    Parameters
    ----------
    draws
        One slide's draws.
    slide
        The same slide with its counts.
    path
        h5ad file to write.
    metadata
        Ontology terms of the slide: those of `REQUIRED`, and optionally `donor_id`, `sex_ontology_term_id`,
        `development_stage_ontology_term_id`, `self_reported_ethnicity_ontology_term_id`,
        `cell_type_ontology_term_id`, `suspension_type`, `tissue_type`, `title`.
    gene_ids
        Table of symbols and Ensembl ids, such as Space Ranger's features.tsv.gz; None to read
        them from `var["gene_ids"]`.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    ConfigError
        `metadata` lacks a field or has an unknown one, or there are no gene ids.
    DataError
        If the slide has no counts, or lacks a spot or gene of the draws.
    """
    name = slide_name(draws)
    fields = _fields(metadata, name)
    if slide.n_vars == 0:
        raise DataError(f"slide {name} has no measured counts, and CELLxGENE's schema needs raw counts")
    for what, wanted, there in (
        ("spots", draws.obs_names, slide.obs_names),
        ("genes", draws.var_names, slide.var_names),
    ):
        missing = wanted.difference(there)
        if len(missing):
            raise DataError(f"slide {name} lacks {len(missing)} {what} of its draws, for example {missing[0]}")
    ids = _ensembl_ids(slide, gene_ids, name)
    known = ids.notna().to_numpy()
    if not ids[draws.var_names].notna().any():
        raise DataError(f"no gene of the draws of {name} has an Ensembl id")
    counts = scipy.sparse.csr_matrix(slide[draws.obs_names].X, dtype=np.float32)[:, known]
    counted = np.asarray(counts.sum(axis=1)).ravel() > 0
    genes = slide.var_names[known]
    predicted = genes.intersection(draws.var_names)
    places = genes.get_indexer(predicted)
    chosen = draws[counted, predicted]

    title = fields.pop("title")
    organism = fields.pop("organism_ontology_term_id")
    obs = pd.DataFrame(index=chosen.obs_names.copy())
    for key, value in fields.items():
        obs[key] = pd.Categorical([value] * len(obs))
    obs["is_primary_data"] = False
    result = AnnData(counts[counted], obs=obs, var=pd.DataFrame(index=pd.Index(ids[known].to_numpy())))
    result.raw = result.copy()
    result.X = _spread(chosen.X, places, result.shape)
    result.layers["std"] = _spread(chosen.layers["std"], places, result.shape)
    result.var["feature_is_filtered"] = ~genes.isin(predicted)
    result.uns = {"title": title, "organism_ontology_term_id": organism, "hinge": dict(draws.uns["hinge"])}
    # the schema allows the key spatial for spatial assays only
    place = "spatial" if fields["assay_ontology_term_id"] in VISIUM_ASSAYS else "X_pixels"
    result.obsm[place] = np.asarray(chosen.obsm["spatial"], dtype=np.float64)
    result.uns["default_embedding"] = place
    if place == "spatial":
        result.uns["spatial"] = {"is_single": False}
    with atomic_path(path) as temporary:
        result.write_h5ad(temporary, compression="gzip")
    return Path(path)


def _fields(metadata: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return all fields of a slide; missing ones have the values of the schema for unknown fields."""
    human = metadata.get("organism_ontology_term_id") == "NCBITaxon:9606"
    fields = {
        **_DEFAULTS,
        "donor_id": name,
        "title": f"Expression of {name} predicted from histology",
        "self_reported_ethnicity_ontology_term_id": "unknown" if human else "na",
    }
    known = {*fields, *REQUIRED}
    for key, value in metadata.items():
        if key not in known:
            raise ConfigError(f"CELLxGENE's metadata have no field {key!r}; the fields are {', '.join(sorted(known))}")
        fields[key] = str(value)
    missing = [key for key in REQUIRED if key not in fields]
    if missing:
        raise ConfigError(
            f"CELLxGENE's schema needs {', '.join(missing)} of the slide: give them with --metadata, e.g. "
            f"{missing[0]}: {REQUIRED[missing[0]]}"
        )
    return fields


def _spread(values: np.ndarray, places: np.ndarray, shape: tuple[int, int]) -> scipy.sparse.csr_matrix:
    """Return a sparse matrix with the columns of a dense one at their places."""
    columns = scipy.sparse.csr_matrix(np.asarray(values, dtype=np.float32)).tocoo()
    return scipy.sparse.csr_matrix((columns.data, (columns.row, places[columns.col])), shape=shape)


def _ensembl_ids(slide: AnnData, table: str | Path | None, name: str) -> pd.Series:
    """Return the Ensembl id of each gene without version; missing if there is none or an earlier gene has it."""
    if table is not None:
        try:
            columns = pd.read_csv(table, sep=None, engine="python", header=None, dtype=str)
        except (OSError, ValueError) as error:
            raise DataError(f"{table} is not a readable table of gene ids: {error}") from error
        are_ids = [columns[column].str.fullmatch(_ENSEMBL.pattern + r"(\.\d+)?").mean() for column in columns]
        if len(columns.columns) < 2 or max(are_ids) < 0.5:
            raise DataError(f"{table} needs a column of Ensembl ids and one of symbols")
        id_column = int(np.argmax(are_ids))
        symbol_column = next(column for column in columns if column != id_column)
        known = columns.drop_duplicates(symbol_column).set_index(symbol_column)[id_column]
    elif "gene_ids" in slide.var:
        known = slide.var["gene_ids"].astype(str)
    else:
        raise ConfigError(
            f"slide {name} has no Ensembl ids in var['gene_ids']: give a table of symbols and ids with "
            "--gene-ids, for example Space Ranger's features.tsv.gz"
        )
    ids = known.reindex(slide.var_names).str.split(".").str[0]
    ids = ids.where(ids.str.fullmatch(_ENSEMBL.pattern).fillna(False).astype(bool))
    ids = ids.mask(ids.duplicated())
    return ids
