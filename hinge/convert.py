"""A checkpoint of the authors' HINGE code into a run's folder, and a trained model into such a checkpoint."""

from pathlib import Path

import torch

from hinge.backbones import CellFMModel
from hinge.backbones.checkpoints import DTYPES, vocabulary_for, write_folder
from hinge.data.panel import Panel
from hinge.diffusion import MaskedDiffusionScheduler
from hinge.errors import ConfigError, DataError, WeightsError
from hinge.files import atomic_path, read_json, write_json
from hinge.models import HingeModel
from hinge.models.checkpoints import import_hinge, read_hinge, write_hinge
from hinge.run import Run

# the released code's diffusion; its sampler is not part of what was released
RELEASED_DIFFUSION = {
    "num_train_timesteps": 50,
    "schedule": "poly_auto",
    "tail": 1,
    "reveal": "budget",
    "fill": "noise",
}
_GENE_IDS_NAME = "gene_ids.json"


def convert_hinge(
    path: str | Path,
    out: str | Path,
    dtype: str = "fp32",
    gate: str | None = None,
    vocabulary: str | Path | None = None,
    num_attention_heads: int | None = None,
) -> Path:
    """Rewrite a checkpoint of the authors' code as a folder laid out like a run's.

    The folder gets `backbone/`, `model/` (with the released code's scheduler), `gene_ids.json` and, with a
    vocabulary, `panel.json`. A run whose `output` is this folder and whose `backbone.path` is the backbone in it
    samples from the model.

    Parameters
    ----------
    path, gate, num_attention_heads
        As `hinge.models.checkpoints.import_hinge`.
    out
        The folder.
    dtype
        Of the backbone: `fp32`, `bf16` or `fp16`. What was trained stays as it is.
    vocabulary
        The user's file of gene symbols.

    Raises
    ------
    WeightsError, ConfigError
        The file is no such checkpoint, not whole, or does not tell its heads or gates.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be {', '.join(DTYPES)}, not {dtype!r}")
    published = read_hinge(path, num_attention_heads)
    config, symbols = dict(published.config), {}
    if vocabulary is not None:
        genes = vocabulary_for(vocabulary, config["num_genes"] + 1)
        symbols = {number: symbol for symbol, number in reversed(genes.id_of.items())}
        config |= {"num_genes": genes.n_genes, "gene_names": genes.numbered()}
    with atomic_path(out) as folder:
        folder.mkdir()
        write_folder(published, config, folder / "backbone", dtype)
        backbone = CellFMModel.from_pretrained(folder / "backbone")
        imported = import_hinge(path, gate, num_attention_heads, backbone)
        imported.model.save_pretrained(folder / "model")
        MaskedDiffusionScheduler(**RELEASED_DIFFUSION).save_config(folder / "model")
        write_json(folder / _GENE_IDS_NAME, imported.gene_ids.tolist())
        if vocabulary is not None:
            unknown = [number for number in imported.gene_ids.tolist() if number not in symbols]
            if unknown:
                raise WeightsError(f"{vocabulary} has no gene for the id {unknown[0]}, which {path} uses")
            Panel.from_list([symbols[number] for number in imported.gene_ids.tolist()]).save(folder / "panel.json")
    return Path(out)


def export_hinge_folder(folder: str | Path, out: str | Path) -> Path:
    """Write the trained model in a run's folder, or in one of `convert_hinge`, as the authors' code loads it.

    Raises
    ------
    DataError, WeightsError
        The folder holds no trained model.
    ConfigError
        The model has something that the authors' code has no place for.
    """
    folder = Path(folder)
    if (folder / "config.yaml").is_file():
        run = Run.open(folder)
        model = run.pipeline().model
        gene_ids = run.gene_ids(model.backbone)
    elif (folder / _GENE_IDS_NAME).is_file():
        model = HingeModel.from_pretrained(folder / "model", CellFMModel.from_pretrained(folder / "backbone"))
        gene_ids = torch.tensor(read_json(folder / _GENE_IDS_NAME))
    else:
        raise DataError(f"{folder} is neither the folder of a run nor one of hinge convert hinge")
    return write_hinge(model, gene_ids, out)
