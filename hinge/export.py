"""A run's draws in the formats of other tools: what `hinge export` does."""

import logging
from pathlib import Path

import yaml

from hinge.data.writers import write_cellxgene, write_draws_zarr, write_geojson, write_spatialdata
from hinge.errors import ConfigError, DataError
from hinge.run import Run, read_draws

logger = logging.getLogger(__name__)

SUFFIXES = {"geojson": ".geojson", "spatialdata": ".spatialdata.zarr", "cellxgene": ".cellxgene.h5ad", "zarr": ".zarr"}


def export_draws(
    run: Run,
    name: str,
    format: str,
    output: Path | None = None,
    genes: list[str] | None = None,
    full_image: bool = False,
    metadata: Path | None = None,
    gene_ids: Path | None = None,
) -> Path:
    """Write a sampled slide in another format.

    Parameters
    ----------
    run
        Where the draws are.
    name
        The slide's name.
    format
        One of `SUFFIXES`.
    output
        File or folder to write; by default `exports/<slide>` in the run's folder, with the format's ending.
    genes
        For geojson: only these.
    full_image
        For spatialdata: the image at full resolution.
    metadata, gene_ids
        For cellxgene: YAML file of ontology terms, table of Ensembl ids.

    Returns
    -------
    Path
        What was written.
    """
    if format not in SUFFIXES:
        raise ConfigError(f"there is no format {format!r} to export to; choose one of {', '.join(SUFFIXES)}")
    source = run.samples_path(name)
    if not source.exists():
        raise DataError(f"there are no draws of {name} in {source.parent}; run hinge sample first")
    output = output or run.folder / "exports" / f"{name}{SUFFIXES[format]}"
    draws = read_draws(source)
    if format == "geojson":
        written = write_geojson(draws, output, genes)
    elif format == "spatialdata":
        written = write_spatialdata(draws, output, full_image)
    elif format == "zarr":
        written = write_draws_zarr(draws, output)
    else:
        slide = run.slide(name, require_image=False)
        written = write_cellxgene(draws, slide, output, _read_metadata(metadata), gene_ids)
    logger.info("wrote %s", written)
    return written


def _read_metadata(path: Path | None) -> dict:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold fields and values, such as tissue_ontology_term_id: UBERON:0000310")
    return content
