"""Pre-train an expression backbone on count files, without a run."""

from pathlib import Path

from pydantic import ValidationError

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.config import BackboneConfig, explain
from hinge.data.panel import read_panel
from hinge.data.readers import list_samples, listed_names, read_slide
from hinge.data.spots import panel_values, stack_values
from hinge.training import pretrain_expression
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
) -> CellFMModel:
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
        File with the genes of the vocabulary; None for the genes that all files share.
    transform
        Units of the values.
    architecture, settings
        Keys of `BackboneConfig` and of its `pretrain`.
    seed
        Seed of the weights and the masks.
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
        genes = sorted(set.intersection(*(set(slide.var_names) for slide in slides)))
        if not genes:
            raise DataError("the count files share no gene; give --panel")
    values = stack_values([panel_values(slide, genes, transform) for slide in slides], genes)
    size = CellFMConfig(transform=transform, **config.architecture())
    return pretrain_expression(values, genes, size, config.pretrain, output, seed=seed)
