"""Pre-train an expression backbone on count files, without a run."""

from pathlib import Path

import numpy as np
from anndata import AnnData
from pydantic import ValidationError

from hinge.backbones import ExpressionBackbone
from hinge.backbones.loading import new_config
from hinge.config import BackboneConfig, explain
from hinge.data.count_table import read_counts
from hinge.data.panel import read_panel
from hinge.data.readers import list_samples, listed_names, read_slide
from hinge.training import pretrain_expression
from hinge.utils import checksums
from hinge.utils.errors import ConfigError, DataError


def pretrain_on_files(
    paths: list[Path],
    output: Path,
    samples: list[str] | None,
    panel: Path | None,
    transform: str,
    architecture: dict,
    settings: dict,
    seed: int,
    patient_prefix: int | None = None,
    num_genes: int | None = None,
) -> ExpressionBackbone:
    """Pre-train an expression backbone on the counts of files and folders.

    Parameters
    ----------
    paths
        h5ad files, or folders that `read_slide` reads.
    output
        Folder for the backbone.
    samples
        Names of the samples; None for all.
    panel
        File with the genes of the vocabulary; None for the most expressed ones, see `num_genes`.
    transform
        Units of the values of a CellFM.
    architecture, settings
        Keys of `BackboneConfig` and of its `pretrain`.
    seed
        Seed of the weights and the masks.
    patient_prefix
        How many first characters of a sample's name are its patient; None: every sample is a patient.
    num_genes
        Most genes of the vocabulary where there is no panel; None: all that at least half of the samples have.
    """
    try:
        config = BackboneConfig.model_validate({**architecture, "pretrain": settings})
    except ValidationError as error:
        raise ConfigError(f"pre-training cannot start: {explain(error, BackboneConfig)}") from error
    listed = [(path, sample) for path in paths for sample in list_samples(path)]
    unknown = sorted(set(samples or []) - {sample for _, sample in listed})
    if unknown:
        named = sorted({sample for _, sample in listed})
        raise DataError(
            f"there is no sample {', '.join(unknown)} in {', '.join(map(str, paths))}, which has {listed_names(named)}"
        )
    slides = [
        read_slide(path, sample, require_image=False) for path, sample in listed if samples is None or sample in samples
    ]
    if panel is not None:
        genes = read_panel(panel).genes
    else:
        genes = most_expressed(slides, num_genes)
        if not genes:
            raise DataError("no gene is in at least half of the samples; give --panel")
    counts = read_counts(slides, genes, lambda name: name if patient_prefix is None else name[:patient_prefix])
    wanted = new_config(transform=transform, **config.size())
    model = pretrain_expression(counts, wanted, config.pretrain, output, seed=seed)
    checksums.accept(output, "pretrain-expression")
    return model


def most_expressed(slides: list[AnnData], number: int | None) -> list[str]:
    """Return the genes that at least half of the slides have and whose mean share of the counts is largest, sorted.

    Each slide weighs the same, whatever its library sizes.
    """
    found: dict[str, list[float]] = {}
    for slide in slides:
        total = np.asarray(slide.X.sum(axis=0), dtype=np.float64).ravel()
        for gene, share in zip(slide.var_names, total / max(total.sum(), 1), strict=True):
            if share > 0:
                found.setdefault(gene, []).append(share)
    common = {gene: sum(shares) for gene, shares in found.items() if 2 * len(shares) >= len(slides)}
    return sorted(sorted(common, key=lambda gene: -common[gene])[:number])
