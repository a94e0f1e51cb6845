"""Export the draws of a run to formats of other tools, and its denoiser as a program."""

import io
import logging
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from hinge.data.draws import read_draws
from hinge.data.writers import write_cellxgene, write_draws_zarr, write_geojson, write_spatialdata, write_vitessce
from hinge.models import HingeModel
from hinge.run.run import Run
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import atomic_path, write_json
from hinge.utils.yaml import parse_yaml

logger = logging.getLogger(__name__)

SUFFIXES = {
    "geojson": ".geojson",
    "spatialdata": ".spatialdata.zarr",
    "cellxgene": ".cellxgene.h5ad",
    "vitessce": ".vitessce",
    "zarr": ".zarr",
}


def export_draws(
    run: Run,
    name: str,
    format: str,
    output: Path | None = None,
    genes: list[str] | None = None,
    full_image: bool = False,
    metadata: Path | None = None,
    gene_ids: Path | None = None,
    threshold: float | None = None,
    url: str | None = None,
) -> Path:
    """Write a sampled slide in another format.

    Parameters
    ----------
    run
        A run with draws.
    name
        The slide's name.
    format
        One of `SUFFIXES`.
    output
        File or folder to write; by default `exports/<slide>` in the run's folder, with the format's ending.
    genes
        For geojson and vitessce: genes to write; None for all.
    full_image
        For spatialdata: the image at full resolution.
    metadata, gene_ids
        For cellxgene: YAML file of ontology terms, table of Ensembl ids.
    threshold
        For geojson: value whose share of draws above is written too.
    url
        For vitessce: address at which the folder will be served.

    Returns
    -------
    Path
        The file or folder that was written.
    """
    if format not in SUFFIXES:
        raise ConfigError(f"there is no format {format!r} to export to; choose one of {', '.join(SUFFIXES)}")
    source = run.paths.samples(name)
    if not source.exists():
        raise DataError(f"there are no draws of {name} in {source.parent}; run hinge sample first")
    output = output or run.folder / "exports" / f"{name}{SUFFIXES[format]}"
    draws = read_draws(source)
    if format == "geojson":
        written = write_geojson(draws, output, genes, threshold)
    elif format == "spatialdata":
        written = write_spatialdata(draws, output, full_image)
    elif format == "vitessce":
        written = write_vitessce(draws, output, genes, *([url] if url else []))
    elif format == "zarr":
        written = write_draws_zarr(draws, output)
    else:
        slide = run.slide(name, require_image=False)
        written = write_cellxgene(draws, slide, output, _read_metadata(metadata), gene_ids)
    logger.info("wrote %s", written)
    return written


class DenoiserStep(nn.Module):
    """One denoising step of a run with backbone and panel, as a module for `torch.export`.

    Parameters
    ----------
    model
        Trained model with its backbone attached.
    gene_ids
        (G,) vocabulary ids of the panel.
    """

    def __init__(self, model: HingeModel, gene_ids: Tensor):
        super().__init__()
        # the backbone is not a submodule of the model, and the program needs its weights
        self.model, self.backbone = model, model.backbone
        self.register_buffer("gene_ids", gene_ids)
        self.next = model.config.condition_on_visible == "next"

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """Return example inputs by name: zeros, except for library size and timestep."""
        config = self.model.config
        given = {
            "values": torch.zeros(batch, config.num_genes),
            "visible": torch.zeros(batch, config.num_genes),
            "timestep": torch.ones(batch, dtype=torch.long),
            "features": torch.zeros(batch, config.feature_dim),
        }
        if self.next:
            given["next_visible"] = torch.zeros(batch, config.num_genes)
        if self.model.library_size_model is not None:
            given["library_size"] = torch.full((batch,), 1000.0)
        return given

    def forward(
        self,
        values: Tensor,
        visible: Tensor,
        timestep: Tensor,
        features: Tensor,
        next_visible: Tensor | None = None,
        library_size: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return mean (B, G) and parameters of the head's distribution by name; arguments as of `HingeModel`."""
        output = self.model(values, visible, timestep, features, self.gene_ids, next_visible, library_size=library_size)
        parameters = {name: value for name, value in vars(output).items() if isinstance(value, Tensor)}
        return {"mean": output.mean, **parameters}


def export_denoiser(run: Run, output: Path | None = None) -> Path:
    """Write one step of a run's denoiser as a program that `torch.export.load` opens without this package.

    The batch size is dynamic. A `.json` file beside it lists inputs, outputs, genes and units.

    Parameters
    ----------
    run
        A trained run.
    output
        File to write; `exports/denoiser.pt2` in the run's folder by default.

    Returns
    -------
    Path
        The program.
    """
    output = output or run.folder / "exports" / "denoiser.pt2"
    if output.suffix != ".pt2":
        raise ConfigError(f"--output must name a file that ends in .pt2, not {output.name}")
    model = run.pipeline().model.eval()
    step = DenoiserStep(model, run.gene_ids(model.backbone)).eval()
    given = step.inputs(3)
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    with torch.no_grad():
        program = torch.export.export(step, (), given, dynamic_shapes={name: {0: batch} for name in given})
        outputs = {name: list(value.shape[1:]) for name, value in step(**given).items()}
    # torch's own writer aborts the process if the disk is full
    archive = io.BytesIO()
    torch.export.save(program, archive)
    with atomic_path(output) as temporary:
        temporary.write_bytes(archive.getbuffer())
    about = {
        "inputs": {
            name: {"shape": ["batch", *value.shape[1:]], "dtype": str(value.dtype)} for name, value in given.items()
        },
        "outputs": outputs,
        "genes": run.panel().genes,
        "transform": run.config.transform,
        "head": model.config.head,
        "model_digest": model.digest(),
    }
    write_json(output.with_suffix(".json"), about)
    logger.info("wrote %s", output)
    return output


def _read_metadata(path: Path | None) -> dict:
    if path is None:
        return {}
    try:
        content = parse_yaml(path.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold fields and values, such as tissue_ontology_term_id: UBERON:0000310")
    return content
