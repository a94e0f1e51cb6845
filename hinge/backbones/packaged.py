"""The small expression backbone that is part of this package; its card is docs/hinge-cellfm-mini.md."""

from pathlib import Path

from transformers import PretrainedConfig

from hinge.backbones.cellfm import CellFMModel
from hinge.backbones.cellfm_config import CellFMConfig
from hinge.backbones.weights import read_our_config

PACKAGED = {
    "hinge-cellfm-mini": Path(__file__).with_name("hinge-cellfm-mini") / "log1p_cp10k",
    "hinge-cellfm-mini-log2p1": Path(__file__).with_name("hinge-cellfm-mini") / "log2p1",
}
"""Folders of packaged backbones by their name for `load_backbone`."""

LEAST_KNOWN_SHARE = 0.5
"""Share of a panel that the packaged backbone must know to be of use."""

_SIZE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_value_bins")


def packaged_for(wanted: PretrainedConfig, genes: list[str], seed: int) -> CellFMModel | None:
    """Return the packaged backbone of a transform and size with all genes of a panel in its vocabulary.

    Genes that it does not know get new embeddings.

    Parameters
    ----------
    wanted
        Configuration of the model that would be pre-trained otherwise.
    genes
        The panel, G symbols.
    seed
        Seed of the new embeddings.

    Returns
    -------
    CellFMModel or None
        In float32 and eval mode; None if there is none of this architecture, size and transform, or if it knows
        fewer than `LEAST_KNOWN_SHARE` of the genes.
    """
    if not isinstance(wanted, CellFMConfig):
        return None
    folder = next((folder for folder in PACKAGED.values() if folder.name == wanted.transform), None)
    if folder is None:
        return None
    config = CellFMConfig.from_dict(read_our_config(folder, CellFMConfig.model_type))
    known = set(config.gene_names or [])
    unknown = [gene for gene in genes if gene not in known]
    fits = all(getattr(config, name) == getattr(wanted, name) for name in _SIZE)
    if not fits or len(unknown) > (1 - LEAST_KNOWN_SHARE) * len(genes):
        return None
    model = CellFMModel.from_pretrained(folder, dtype="float32")
    model.add_genes({gene: config.num_genes + number for number, gene in enumerate(unknown, 1)}, seed)
    return model
