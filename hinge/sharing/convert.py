"""Convert published weights into folders of this package, and a trained model into the authors' format."""

from pathlib import Path
from typing import Any

import torch

from hinge.backbones import CellFMConfig, CellFMModel, load_backbone
from hinge.backbones.loading import MODELS, read_weights
from hinge.backbones.published_cellfm import PublishedCellFM, read_published
from hinge.backbones.state_files import DTYPES, check_shapes, stream_safetensors
from hinge.backbones.vocabulary import vocabulary_for
from hinge.backbones.weights import Weights
from hinge.data.panel import Panel
from hinge.diffusion import MaskedDiffusionScheduler
from hinge.models import HingeModel
from hinge.run.run import Run
from hinge.sharing.released_hinge import import_hinge, read_hinge, write_hinge
from hinge.utils import checksums
from hinge.utils.errors import ConfigError, DataError, WeightsError
from hinge.utils.files import atomic_path, read_json, remove_left_behind, write_json
from hinge.utils.licences import BACKBONE_LICENCES

# the diffusion settings of the released code, which does not contain a sampler
RELEASED_DIFFUSION = {
    "num_train_timesteps": 50,
    "schedule": "poly_auto",
    "reveal": "budget",
    "fill": "noise",
}
_GENE_IDS_NAME = "gene_ids.json"


def convert_cellfm(
    path: str | Path,
    out: str | Path,
    dtype: str = "fp32",
    vocabulary: str | Path | None = None,
    num_attention_heads: int | None = None,
    **options: Any,
) -> Path:
    """Convert published weights into a folder that `CellFMModel.from_pretrained` reads, in parts of 4 MB.

    `config.json` records the licence of the published weights, which `hinge push` reads.

    Parameters
    ----------
    path
        A published file.
    out
        The folder; gets `config.json`, `model.safetensors` and their checksums.
    dtype
        `fp32`, `bf16` or `fp16`.
    vocabulary
        Table of the gene symbols, which are then stored in `config.json`; its ids must be 1, 2, 3 …
    num_attention_heads, options
        As `read_published`.

    Raises
    ------
    WeightsError
        The file does not hold a CellFM, the vocabulary belongs to other weights, or a weight becomes infinite.
    ConfigError
        `dtype` is unknown, or the number of heads is needed.
    """
    _check_dtype(dtype)
    published = read_published(path, num_attention_heads, **options)
    return _write_backbone(_cellfm_weights(published, _genes(published, vocabulary)), out, dtype)


def convert_transformer(
    kind: str, path: str | Path, out: str | Path, dtype: str = "fp32", attention: str | None = None
) -> Path:
    """Convert published weights of scGPT, scGPT-spatial or Tahoe-x1, in parts of 4 MB; the vocabulary goes along.

    Parameters
    ----------
    kind
        `"scgpt"` or `"tahoe"`.
    path
        The published folder, or the file of the weights in it.
    out, dtype
        As of `convert_cellfm`.
    attention
        `"generative"` or `"full"`; None: as published.

    Raises
    ------
    WeightsError
        The folder holds something else, a tensor is missing, unknown or of another shape, or a weight becomes infinite.
    ConfigError
        `dtype` or `attention` is unknown, or the weights do not allow the attention.
    """
    _check_dtype(dtype)
    if not Path(path).exists():
        raise WeightsError(f"there is no {path}")
    found, weights = read_weights(path, attention=attention)
    if found != kind:
        raise WeightsError(f"{path} holds a {found}; use hinge convert {found}")
    return _write_backbone(weights, out, dtype)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be {', '.join(DTYPES)}, not {dtype!r}")


def _genes(published: PublishedCellFM, vocabulary: str | Path | None) -> list[str] | None:
    """Return the genes of the vocabulary in the order of their ids, if it belongs to the weights."""
    if vocabulary is None:
        return None
    return vocabulary_for(vocabulary, CellFMConfig(**published.config).num_embeddings).numbered()


def _refuse_existing(out: str | Path) -> None:
    if Path(out).exists():
        remove_left_behind(Path(out))  # by a process that was killed after it had written it
        raise ConfigError(f"{out} exists already; name a new folder")


def _cellfm_weights(published: PublishedCellFM, genes: list[str] | None) -> Weights:
    """Return the weights with a config that has the genes."""
    cellfm = CellFMConfig(**published.config, gene_names=genes)
    if genes is not None:
        cellfm.num_genes = len(genes)
    return Weights(published.state, cellfm, published.sources)


def _write_backbone(weights: Weights, out: str | Path, dtype: str) -> Path:
    """Write `config.json` and `model.safetensors`; the folder appears when both are complete."""
    _refuse_existing(out)
    config = weights.config
    model_class = MODELS[config.model_type]
    with torch.device("meta"):
        parameters = dict(model_class(config).named_parameters())
    check_shapes(parameters, weights.state, weights.sources)
    with atomic_path(out) as folder:
        folder.mkdir()
        config.architectures = [model_class.__name__]
        config.licence = BACKBONE_LICENCES[config.model_type]
        config.save_pretrained(folder)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        stream_safetensors(weights.state, weights.sources, shapes, folder / "model.safetensors", DTYPES[dtype])
        checksums.accept(folder, "convert")
    return Path(out)


def convert_hinge(
    path: str | Path,
    out: str | Path,
    dtype: str = "fp32",
    gate: str | None = None,
    vocabulary: str | Path | None = None,
    num_attention_heads: int | None = None,
) -> Path:
    """Convert a checkpoint of the authors' code into a folder with the layout of a run.

    The folder gets `backbone/`, `model/` (with the released code's scheduler), `gene_ids.json` and, with a
    vocabulary, `panel.json`. A run whose `output` is this folder and whose `backbone.path` is the backbone in it
    samples from the model.

    Parameters
    ----------
    path, gate, num_attention_heads
        As `hinge.sharing.released_hinge.import_hinge`.
    out
        The folder.
    dtype
        Type of the backbone: `fp32`, `bf16` or `fp16`. Trained tensors keep their type.
    vocabulary
        Table of the gene symbols.

    Raises
    ------
    WeightsError, ConfigError
        The file is not such a checkpoint or is incomplete, or the number of heads or the gate cannot be inferred.
    """
    _check_dtype(dtype)
    published = read_hinge(path, num_attention_heads)
    genes = _genes(published, vocabulary)
    _refuse_existing(out)
    with atomic_path(out) as folder:
        folder.mkdir()
        _write_backbone(_cellfm_weights(published, genes), folder / "backbone", dtype)
        backbone = CellFMModel.from_pretrained(folder / "backbone")
        imported = import_hinge(path, gate, num_attention_heads, backbone)
        imported.model.save_pretrained(folder / "model")
        MaskedDiffusionScheduler(**RELEASED_DIFFUSION).save_config(folder / "model")
        write_json(folder / _GENE_IDS_NAME, imported.gene_ids.tolist())
        if genes is not None:
            if not 1 <= imported.gene_ids.min() <= imported.gene_ids.max() <= len(genes):
                raise WeightsError(
                    f"{path} has gene ids that are not in {vocabulary}; give its own table with --vocabulary"
                )
            Panel.from_list([genes[number - 1] for number in imported.gene_ids.tolist()]).save(folder / "panel.json")
    return Path(out)


def export_hinge_folder(folder: str | Path, out: str | Path) -> Path:
    """Write the trained model of a run, or of a folder of `convert_hinge`, in the authors' format.

    Raises
    ------
    DataError, WeightsError
        The folder holds no trained model.
    ConfigError
        The model has a part that the authors' code does not have.
    """
    folder = Path(folder)
    if Path(out).is_dir():
        raise ConfigError(f"{out} is a folder; name the file to write, e.g. {Path(out) / 'model.pth'}")
    if (folder / "config.yaml").is_file():
        run = Run.open(folder)
        model = run.pipeline().model
        gene_ids = run.gene_ids(model.backbone)
    elif (folder / _GENE_IDS_NAME).is_file():
        model = HingeModel.from_pretrained(folder / "model", load_backbone(folder / "backbone"))
        gene_ids = torch.tensor(read_json(folder / _GENE_IDS_NAME))
    else:
        raise DataError(f"{folder} is neither the folder of a run nor the output of hinge convert hinge")
    return write_hinge(model, gene_ids, out)
